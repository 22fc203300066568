"""A server in a thread of the test's process, and ways to talk to it."""

import base64
import contextlib
import io
import json
import threading
from dataclasses import dataclass

import httpx
import openai
from tiny import picture

import mmlm
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

    @property
    def settled(self):
        """Whether nothing is under way or kept any more."""
        worker = self.service.worker
        return (worker.waiting, worker.running, self.service.taken) == (0, 0, 0)


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
