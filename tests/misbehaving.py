"""A chat server on loopback that answers as it is told, in every way in which servers go wrong.

A behaviour is a function of the request's handler and its body; `Server.behaviours` lists them,
request by request, and the last one goes on for ever.
"""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DRIPS = 60


def completion(text="fine", finish="stop", **message):
    content = {"role": "assistant", "content": text} | message
    return {"choices": [{"index": 0, "message": content, "finish_reason": finish}]}


def send(handler, status, body, headers=(), length=None):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(raw) if length is None else length))
    handler.end_headers()
    handler.wfile.write(raw)


def replies(text="fine", **how):
    return lambda handler, body: send(handler, 200, completion(text, **how))


def echo(handler, body):
    send(handler, 200, completion("re: " + body["messages"][-1]["content"]))


def status(code, body=b"", **headers):
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return lambda handler, _: send(handler, code, body, named)


def raw(content):
    return lambda handler, _: send(handler, 200, content)


def half_body(handler, _):
    send(handler, 200, json.dumps(completion()).encode()[:30], length=500)
    handler.close_connection = True


def hang_up(handler, _):
    handler.close_connection = True


def stall(handler, _):
    time.sleep(1.5)


def drip(handler, _):
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):  # until the client has had enough
        for _ in range(DRIPS):
            handler.wfile.write(b" ")
            handler.server.drips += 1
            time.sleep(0.03)


class Server(ThreadingHTTPServer):
    """Behaves as told, request by request; the last behaviour goes on for ever."""

    daemon_threads = True

    def __init__(self, behaviours):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours = list(behaviours)
        self.bodies, self.headers = [], []
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = self.drips = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """The client may leave whenever it likes."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers) | {"path": self.path})
            behaviours = server.behaviours
            act = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            act(self, body)
        finally:
            with server.lock:
                server.under_way -= 1

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(*behaviours):
    """A server on loopback, on a port of its own, for the length of a ``with`` block."""
    with Server(behaviours or (echo,)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Clock:
    """A clock that moves only when somebody sleeps."""

    def __init__(self):
        self.time = 0.0
        self.sleeps = []

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.time += seconds
