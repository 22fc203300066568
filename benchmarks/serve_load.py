"""A load on `mmlm serve`: many clients, methods mixed, broken bodies, clients that leave.

    python -m benchmarks.serve_load --requests 1000 --clients 16 --output serve.json

Starts a server with the embedded model, sends everything, and then answers every good request once
more by itself, without the server. Counted are good answers that differ from their single run (must
be 0), broken requests that did not get a 4xx with a message (must be 0), seconds per good answer,
and the server's resident memory, in blocks of 200 requests.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

__all__ = ["Case", "Load", "broken_bodies", "main", "measure", "picture"]

METHODS = ("", "VHR(alpha=2.0)", "VCD()", "ImbalancedAttention()+PAI()", "VISTA()")
QUESTIONS = (
    "describe the image .",
    "is there a dog in the image ?",
    "is there a bird to the left of the tree ?",
    "how many chairs are in the image ?",
)
BLOCK = 200
DIFFERENT = 300
"""Requests come again after so many: single runs take as long as the load does."""
MIB = 2**20


def picture(number: int) -> bytes:
    """A PNG file with coloured rectangles."""
    draw = np.random.default_rng(number)
    pixels = np.full((80, 80, 3), draw.integers(0, 256, 3), dtype=np.uint8)
    for _ in range(6):
        top, left = draw.integers(0, 60, 2)
        pixels[top : top + 20, left : left + 20] = draw.integers(0, 256, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@dataclass(frozen=True)
class Case:
    """A good request.

    Attributes:
        question: What is asked.
        pictures: Numbers of its pictures.
        methods: What is added to the model's name.
        tokens: Most new tokens.
        seed: Seed of a drawn answer; None for the most probable one.
        stream: Whether the answer comes in pieces.
    """

    question: str
    pictures: tuple[int, ...]
    methods: str
    tokens: int
    seed: int | None
    stream: bool

    @classmethod
    def drawn(cls, draw: random.Random) -> Case:
        """A case drawn at random."""
        shown = tuple(draw.randrange(8) for _ in range(draw.choice((0, 1, 1, 1, 2))))
        return cls(
            draw.choice(QUESTIONS),
            shown,
            draw.choice(METHODS),
            draw.choice((4, 12, 24)),
            draw.randrange(4) if draw.random() < 0.5 else None,
            draw.random() < 0.3,
        )

    @property
    def body(self) -> bytes:
        """The request as it is sent."""
        content: list[dict[str, Any]] = []
        for number in self.pictures:
            url = "data:image/png;base64," + base64.b64encode(picture(number)).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": self.question})
        body: dict[str, Any] = {
            "model": f"embedded+{self.methods}" if self.methods else "embedded",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.tokens,
            "stream": self.stream,
        }
        if self.seed is not None:
            body |= {"temperature": 1.0, "seed": self.seed}
        return json.dumps(body).encode()

    def single(self, model: Any, processor: Any) -> str:
        """The answer without a server: this request alone."""
        import mmlm
        from mmlm.inputs import load_image, message, prepare
        from mmlm.runner import GenerateSettings
        from mmlm.streaming import AnswerStream

        images = [load_image(picture(number)) for number in self.pictures]
        asked = [message("user", self.question, len(images))]
        settings = GenerateSettings(
            max_new_tokens=self.tokens, do_sample=self.seed is not None, seed=self.seed or 0
        )
        methods = [mmlm.parse_method(text) for text in self.methods.split("+") if text]
        inputs = prepare(processor, [asked], [images])
        with AnswerStream(model, processor, inputs, methods, settings) as stream:
            for _ in stream:
                pass
        return stream.text


def broken_bodies() -> dict[str, bytes]:
    """Requests that cannot be carried out, by what is wrong with them."""
    good = json.loads(Case(QUESTIONS[0], (0,), "", 4, None, False).body)

    def changed(**fields: Any) -> bytes:
        return json.dumps(good | fields).encode()

    def shown(url: str) -> bytes:
        part = {"type": "image_url", "image_url": {"url": url}}
        return changed(messages=[{"role": "user", "content": [part]}])

    cut = base64.b64encode(picture(0)[:100]).decode()
    return {
        "empty": b"",
        "no JSON": b'{"model": "embedded", ',
        "no UTF-8": b'{"model": "\xff"}',
        "deeply nested": b"[" * 100_000,
        "no object": b"[1, 2, 3]",
        "no messages": b'{"model": "embedded"}',
        "another model": changed(model="gpt-4o"),
        "an unknown method": changed(model="embedded+VHRR"),
        "a method out of range": changed(mmlm_methods=["VHR(alpha=-1)"]),
        "methods that exclude each other": changed(mmlm_methods=["OPERA()", "VCD()"]),
        "a class by its path": changed(mmlm_methods=["os.path()"]),
        "an unknown field": changed(tempratur=1),
        "a wrong type": changed(max_tokens="many"),
        "too many tokens": changed(max_tokens=100_000),
        "two answers": changed(n=2),
        "a placeholder in the text": changed(messages=[{"role": "user", "content": "<image> ?"}]),
        "a cut picture": shown(f"data:image/png;base64,{cut}"),
        "no base64": shown("data:image/png;base64,@@@@"),
        "a remote picture": shown("https://example.org/a.png"),
        "a file of the server": shown("file:///etc/passwd"),
    }


@dataclass
class Load:
    """Sends requests to a server and keeps count.

    Attributes:
        url: The server's address, up to /v1.
        answers: What came of good requests, with the seconds it took.
        wrong: What came of broken ones, if it was not a 4xx with a message.
        refused: Statuses of broken requests.
        waited: How often a client was told to come back later.
    """

    url: str

    def __post_init__(self) -> None:
        self.answers: list[tuple[Case, str, float]] = []
        self.wrong: list[str] = []
        self.refused: Counter[int] = Counter()
        self.waited = 0
        self._broken = list(broken_bodies().items())
        self._local = threading.local()

    def send(self, number: int) -> None:
        """Sends one request; the number decides which."""
        draw = random.Random(number % DIFFERENT)
        if number % 20 == 19:
            self._leave(Case.drawn(draw))
        elif number % 4 == 3:
            self._send_broken(*self._broken[number // 4 % len(self._broken)])
        else:
            self._ask(Case.drawn(draw))

    @property
    def _client(self) -> httpx.Client:
        if not hasattr(self._local, "client"):
            self._local.client = httpx.Client(base_url=self.url, timeout=900, trust_env=False)
        client: httpx.Client = self._local.client
        return client

    def _post(self, content: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        while True:
            response = self._client.post("/chat/completions", content=content, headers=headers)
            if response.status_code != 429:
                return response
            self.waited += 1
            time.sleep(float(response.headers["Retry-After"]))

    def _ask(self, case: Case) -> None:
        start = time.perf_counter()
        response = self._post(case.body)
        seconds = time.perf_counter() - start
        response.raise_for_status()
        if not case.stream:
            text = response.json()["choices"][0]["message"]["content"]
        else:
            events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
            choices = [json.loads(event)["choices"][0] for event in events]
            text = "".join(choice["delta"].get("content") or "" for choice in choices)
        self.answers.append((case, text, seconds))

    def _send_broken(self, name: str, body: bytes) -> None:
        response = self._post(body)
        self.refused[response.status_code] += 1
        try:
            told = bool(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            told = False
        if not (400 <= response.status_code < 500 and told):
            self.wrong.append(f"{name}: {response.status_code} {response.text[:100]}")

    def _leave(self, case: Case) -> None:
        """Asks, and does not wait for the answer."""
        headers = {"Content-Type": "application/json"}
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(
                f"{self.url}/chat/completions",
                content=case.body,
                headers=headers,
                timeout=httpx.Timeout(10, read=0.05),
            )


@contextlib.contextmanager
def _server(*options: str) -> Iterator[tuple[str, int]]:
    """A server of one's own: its address and its process id."""
    command = [sys.executable, "-m", "mmlm", "serve", "--port", "0", "--json", "--quiet"]
    # How fast the machine is, is not the question: the time-out has tests of its own.
    command += ["--limits.timeout", "900", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit("The server did not start; its words are above.")
            yield json.loads(line)["url"], process.pid
        finally:
            process.terminate()


def measure(requests: int, clients: int, options: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the load and compares every good answer with its single run.

    Args:
        requests: Requests in all.
        clients: Clients at the same time.
        options: Options of the server.

    Returns:
        What was counted, as JSON values.
    """
    import psutil

    memory = []
    with _server(*options) as (url, pid), ThreadPoolExecutor(clients) as pool:
        load, process = Load(url), psutil.Process(pid)
        memory.append(round(process.memory_info().rss / MIB))
        start = time.perf_counter()
        for block in range(0, requests, BLOCK):
            list(pool.map(load.send, range(block, min(block + BLOCK, requests))))
            memory.append(round(process.memory_info().rss / MIB))
        seconds = time.perf_counter() - start
        health = httpx.get(url.replace("/v1", "/health"), trust_env=False).json()
    times = sorted(seconds for _, _, seconds in load.answers)
    return {
        "requests": requests,
        "clients": clients,
        "seconds": round(seconds, 1),
        "good": len(load.answers),
        "good_that_differ_from_their_single_run": _differing(load),
        "distinct_good": len({case for case, _, _ in load.answers}),
        "distinct_answers": len({text for _, text, _ in load.answers}),
        "broken": sum(load.refused.values()),
        "broken_without_4xx_and_message": len(load.wrong),
        "broken_by_status": dict(sorted(load.refused.items())),
        "told_to_wait": load.waited,
        "seconds_per_answer": {
            "median": round(statistics.median(times), 2),
            "p95": round(times[int(0.95 * (len(times) - 1))], 2),
            "longest": round(times[-1], 2),
        },
        "resident_mib": {"at_start": memory[0], f"after_each_{BLOCK}": memory[1:]},
        "left": {name: health[name] for name in ("running", "waiting")},
    }


def _differing(load: Load) -> int:
    import mmlm

    model, processor = mmlm.load("embedded")
    single = {
        case: case.single(model, processor) for case in dict.fromkeys(c for c, _, _ in load.answers)
    }
    wrong = [(case, text) for case, text, _ in load.answers if text != single[case]]
    for case, text in wrong[:5]:
        print(f"{case}\n  served: {text}\n  single: {single[case]}", file=sys.stderr)
    return len(wrong)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the load; writes or prints the numbers. Returns 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=BLOCK)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--output", type=Path)
    given, options = parser.parse_known_args(argv)
    found = measure(given.requests, given.clients, options)
    text = json.dumps(found, indent=1)
    print(text)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")
    return int(
        bool(found["good_that_differ_from_their_single_run"])
        or bool(found["broken_without_4xx_and_message"])
    )


if __name__ == "__main__":
    sys.exit(main())
