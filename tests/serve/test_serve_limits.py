"""Servers with other settings: keys, limits, time-outs, clients that leave, remote pictures."""

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import openai
import pytest
from served import asking, head, image_part, png, running, single, user
from tiny import picture

import mmlm
from mmlm.serve.app import _Stream
from mmlm.serve.limits import Limits

QUESTION = "describe the image ."


def address(url):
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_key():
    with running(key="s3cret") as served:
        for key in ("", "wrong", "s3cre", "sécret"):
            headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
            status, error = served.refusal(asking("x"), headers=headers)
            assert (status, error["code"]) == (401, "invalid_api_key")
            assert error["type"] == "authentication_error"
            assert "s3cret" not in json.dumps(error)
        assert httpx.get(f"{served.url}/models").status_code == 401
        assert httpx.get(served.url.replace("/v1", "/health")).status_code == 200
        client = served.client("s3cret")
        assert [model.id for model in client.models.list()] == ["embedded"]
        with pytest.raises(openai.AuthenticationError):
            served.client("wrong").models.list()
        right = {"Authorization": "Bearer s3cret", "Host": "behind.a.proxy"}
        assert served.post(asking("x"), headers=right).status_code == 200


def test_bodies_that_are_too_large():
    with running(limits=Limits(body_mib=1)) as served:
        body = b" " * 3_000_000
        status, error = served.refusal(body)
        assert (status, error["code"]) == (413, "body_too_large")

        def chunks():
            for _ in range(30):
                yield b" " * 100_000

        response = httpx.post(
            f"{served.url}/chat/completions",
            content=chunks(),
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 413
        assert served.text("x")
        assert served.settles()


def test_a_body_that_does_not_arrive():
    with running(limits=Limits(body_timeout=0.5)) as served, served.connected() as connection:
        connection.sendall(head(100) + b"{")
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
        assert answer.splitlines()[0].split()[1] == b"408"
        assert b"request_timeout" in answer
        assert served.settles()


def test_a_client_that_leaves_in_the_middle_of_its_body(served):
    with served.connected() as connection:
        connection.sendall(head(100) + b"{")
    assert served.settles()
    assert served.text("x")


class SlowModel:
    """Makes every token of a model wait until it is let go."""

    def __init__(self, model):
        self.steps = 0
        self.gate = threading.Event()
        model.get_decoder().register_forward_pre_hook(self)

    def __call__(self, *_):
        self.steps += 1
        assert self.gate.wait(60)


@pytest.fixture
def slow():
    """A server whose model waits at every token for `gate`."""
    model, processor = mmlm.load("embedded")
    slowed = SlowModel(model)
    limits = Limits(requests=3, timeout=60.0)
    with running(model, processor, limits=limits, batch_size=2) as served:
        served.model = slowed
        yield served
        slowed.gate.set()


def in_background(function, *arguments):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    return thread, results


def reaches(check, seconds=20):
    end = time.monotonic() + seconds
    while not check() and time.monotonic() < end:
        time.sleep(0.01)
    assert check()


def test_a_full_queue(slow):
    threads = [in_background(slow.post, asking("x", seed=n)) for n in range(3)]
    reaches(lambda: slow.service.taken == 3)
    response = slow.post(asking("x"))
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    with pytest.raises(openai.RateLimitError):
        slow.client().chat.completions.create(model="embedded", messages=[user("x")])
    slow.model.gate.set()
    for thread, results in threads:
        thread.join(30)
        assert results[0].status_code == 200
    assert slow.settles()


def test_a_client_that_leaves_stops_its_answer(slow):
    body = json.dumps(asking("x", max_tokens=400)).encode()
    with slow.connected() as connection:
        connection.sendall(head(len(body)) + body)
        reaches(lambda: slow.model.steps == 1)
    reaches(lambda: slow.service.taken == 0)
    slow.model.gate.set()
    assert slow.settles()
    assert slow.model.steps <= 3


def test_a_client_that_leaves_its_stream_stops_it(served):
    worker = served.service.worker
    with served.connected() as connection:
        body = json.dumps(asking("x", max_tokens=400, stream=True)).encode()
        connection.sendall(head(len(body)) + body)
        assert b"200" in connection.recv(4096)
    assert served.settles()
    assert worker.alive


def test_a_client_that_leaves_while_it_waits_is_never_answered(slow):
    first = in_background(slow.post, asking("x", mmlm_methods=["VHR"], max_tokens=2))
    reaches(lambda: slow.service.worker.running == 1)
    body = json.dumps(asking("x")).encode()
    with slow.connected() as connection:
        connection.sendall(head(len(body)) + body)
        reaches(lambda: slow.service.worker.waiting == 1)
    reaches(lambda: slow.service.worker.waiting == 0)
    slow.model.gate.set()
    first[0].join(30)
    assert first[1][0].status_code == 200
    assert slow.settles()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(stream):
    model, processor = mmlm.load("embedded")
    slowed = SlowModel(model)
    with running(model, processor, limits=Limits(timeout=0.5)) as served:
        status, error = served.refusal(asking("x", stream=stream))
        assert (status, error["code"]) == (504, "timeout")
        assert error["type"] == "server_error"
        slowed.gate.set()
        assert served.settles()
        assert served.text("x")


def test_a_stream_that_takes_too_long_ends_with_an_error():
    model, processor = mmlm.load("embedded")
    slowed = SlowModel(model)
    slowed.gate.set()

    def stop_later(*_):
        if slowed.steps == 5:
            slowed.gate.clear()

    model.get_decoder().register_forward_pre_hook(stop_later, prepend=True)
    with running(model, processor, limits=Limits(timeout=1.5)) as served:
        response = served.post(asking(image_part(0), QUESTION, stream=True, max_tokens=30))
        assert response.status_code == 200
        *pieces, last = [x[6:] for x in response.text.split("\n\n") if x]
        assert len(pieces) > 1
        assert json.loads(last)["error"]["code"] == "timeout"
        slowed.gate.set()
        assert served.settles()


def test_pictures_from_hosts_that_are_allowed(embedded):
    content = png(picture(3))

    def answer(handler, status=200, body=content, **headers):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/right.png":
                answer(self)
            elif self.path == "/moved.png":
                answer(self, 302, Location="/right.png")
            elif self.path == "/huge.png":
                answer(self, body=b"x" * 3_000_000)
            elif self.path == "/slow.png":
                time.sleep(2)  # and no answer
            else:
                answer(self, 404, b"")

        def log_message(self, *_):
            pass

    host = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    place = f"127.0.0.1:{host.server_port}"
    limits = Limits(body_mib=2, fetch_timeout=1.0)
    try:
        with running(hosts=(place,), limits=limits) as served:
            right = address(f"http://{place}/right.png")
            assert served.text(right, QUESTION) == single(embedded, QUESTION, 3).text
            for path, message in (
                ("gone.png", "says 404"),
                ("moved.png", "says 302"),
                ("huge.png", "larger than"),
                ("slow.png", "fetched"),
            ):
                status, error = served.refusal(asking(address(f"http://{place}/{path}"), "x"))
                assert status == 400
                assert message in error["message"]
            for url in (
                "http://127.0.0.1:1/right.png",
                f"http://user@{place}/right.png",
                f"http://{place}@example.org/right.png",
                f"http://example.org\\@{place}/right.png",
                f"http://localhost:{host.server_port}/right.png",
            ):
                assert served.refusal(asking(address(url), "x"))[0] in (400, 403)
            assert served.settles()
    finally:
        host.shutdown()
        thread.join()
        host.server_close()


def test_a_client_that_stops_reading_loses_its_place():
    """Its stream blocks for ever; sockets hide that behind their buffers, so without one."""
    events, closed = [], []

    async def chunks():
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            closed.append("chunks")

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        events.append(message["type"])
        if len(events) > 3:
            await asyncio.sleep(60)

    async def main():
        place = contextlib.ExitStack()
        place.callback(closed.append, "place")
        deadline = asyncio.get_running_loop().time() - 0.8
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await _Stream(chunks(), place, deadline)(scope, receive, send)

    asyncio.run(asyncio.wait_for(main(), 20))
    assert events[0] == "http.response.start"
    assert closed == ["chunks", "place"]
