"""A server in a thread of the test's process, and ways to talk to it."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from dataclasses import dataclass

import httpx
import openai
from tiny import picture

import mmlm
from mmlm.runner import GenerateSettings, Request, generate_all
from mmlm.serve.app import make_app
from mmlm.serve.limits import Limits
from mmlm.serve.names import Names
from mmlm.serve.running import bind, run_server
from mmlm.serve.service import Service, Serving


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_part(number=0):
    return {"type": "image_url", "image_url": {"url": data_url(png(picture(number)))}}


def text_part(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": [p if isinstance(p, dict) else text_part(p) for p in parts]}


def asking(*parts, **fields):
    """A request's body."""
    return {"model": "embedded", "messages": [user(*parts)], "max_tokens": 8} | fields


def head(length):
    """The head of a request whose body has this many bytes."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\n"
        b"Content-Length: " + str(length).encode() + b"\r\n\r\n"
    )


@dataclass
class Served:
    """A server that runs."""

    service: Service
    url: str

    def post(self, body, **options):
        """Posts a body: bytes as they are, else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        url = f"{self.url}/chat/completions"
        return httpx.post(url, content=content, headers=headers, timeout=60, **options)

    def ask(self, *parts, **fields):
        """The body of a good answer."""
        response = self.post(asking(*parts, **fields))
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, *parts, **fields):
        """The text of a good answer."""
        return self.ask(*parts, **fields)["choices"][0]["message"]["content"]

    def refusal(self, body, **options):
        """Status and error of a refused request."""
        response = self.post(body, **options)
        assert response.status_code >= 400, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        return response.status_code, error

    def client(self, key="-"):
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def settles(self, seconds=20):
        """Waits until nothing is under way or kept any more; returns whether that came about."""
        worker, end = self.service.worker, time.monotonic() + seconds
        while time.monotonic() < end:
            if (worker.waiting, worker.running, self.service.taken) == (0, 0, 0):
                return True
            time.sleep(0.02)
        return False

    def connected(self):
        """A connection of one's own."""
        url = httpx.URL(self.url)
        return socket.create_connection((url.host, url.port), timeout=30)


@contextlib.contextmanager
def running(model=None, processor=None, *, offered=(), limits=None, **serving):
    """Serves a model (the embedded one by default) until the block ends."""
    if model is None:
        model, processor = mmlm.load("embedded")
    names = Names("embedded", offered)
    service = Service(model, processor, Serving(names, limits=limits or Limits(), **serving))
    listener = bind("127.0.0.1", 0)
    ready, server = threading.Event(), []

    def started(running_server):
        server.append(running_server)
        ready.set()

    port = listener.getsockname()[1]
    app = make_app(service)
    thread = threading.Thread(
        target=run_server, args=(app, listener), kwargs={"grace": 5.0, "ready": started}
    )
    thread.start()
    assert ready.wait(30)
    try:
        yield Served(service, f"http://127.0.0.1:{port}/v1")
    finally:
        server[0].should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def single(embedded, question, *numbers, methods=(), marked=False, **settings):
    """The answer of the batched runner to this request alone."""
    pictures = tuple(picture(number) for number in numbers)
    request = Request("x", pictures, question, marked=marked)
    settings = GenerateSettings(**({"max_new_tokens": 8} | settings))
    [result] = generate_all(*embedded, [request], methods, settings)
    return result
