"""What a request goes through: a place, its methods, pictures and prompt, the model's thread."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmlm.runner import fingerprint
from mmlm.serve.jobs import Choosing, Event, Job
from mmlm.serve.limits import Limits
from mmlm.serve.names import Names, joined
from mmlm.serve.pictures import Fetcher, data_of
from mmlm.serve.prompts import Preparer, picture_parts
from mmlm.serve.refusals import invalid, too_many
from mmlm.serve.replies import Writer
from mmlm.serve.wire import ChatRequest
from mmlm.serve.worker import Worker

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = ["Serving", "Service"]


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        names: What clients call the model, and which methods they may ask for.
        temperature: For requests that do not give one; 0 takes the most probable tokens.
        batch_size: Most requests that are answered together.
        hosts: Hosts from which pictures may be fetched; see `mmlm.serve.pictures.checked_host`.
        key: What clients must send as bearer token; "" for no key.
        local: Whether the server is reached through this machine only. Requests that name another
            host are then refused: they come from a web page that pretends to be here.
        limits: What is taken.
    """

    names: Names
    temperature: float = 0.0
    batch_size: int = 8
    hosts: tuple[str, ...] = ()
    key: str = field(default="", repr=False)
    local: bool = True
    limits: Limits = field(default_factory=Limits)


class Service:
    """A model that answers requests.

    Args:
        model: A Hugging Face LVLM; nobody else may use it meanwhile.
        processor: Its processor.
        serving: How it is served.

    Attributes:
        serving: As given.
        worker: The model's thread.
        taken: Requests under way.
    """

    def __init__(self, model: Any, processor: Any, serving: Serving) -> None:
        self.serving = serving
        self.worker = Worker(model, processor, serving.batch_size)
        self._fingerprint = fingerprint(model)
        text = model.config.get_text_config()
        room = getattr(text, "max_position_embeddings", None)
        self._prepare = Preparer(processor, room, serving.limits)
        self._fetch = Fetcher(serving.hosts, serving.limits.fetch_timeout)
        # One thread: a processor is not for several, and pictures are decoded one at a time.
        self._threads = ThreadPoolExecutor(1, "prepare")
        self.taken = 0

    def start(self) -> None:
        """Starts the model's thread."""
        self.worker.start()

    async def close(self) -> None:
        """Ends the threads after what is running."""
        await asyncio.to_thread(self.worker.close)
        self._threads.shutdown()
        await self._fetch.close()

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places for requests under way, for the length of the block.

        Raises:
            Refusal: If all are taken.
        """
        limits = self.serving.limits
        if self.taken >= limits.requests:
            raise too_many(limits.requests, max(1, math.ceil(self.worker.last_seconds)))
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def job(self, request: ChatRequest) -> Job:
        """Checks everything that can be checked without the model; the job does not wait yet.

        Raises:
            Refusal: If the request cannot be carried out.
        """
        methods = self.serving.names.methods(request.model, request.mmlm_methods)
        choosing = self._choosing(request, methods)
        files = await self._files(request)
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._threads, self._prepare, request, files)
        return Job(prompt, methods, choosing)

    def writer(self, request: ChatRequest, job: Job) -> Writer:
        """Writes what comes of a job."""
        named = request.mmlm_methods is not None
        name = joined(self.serving.names.name, job.methods) if named else request.model
        usage = request.stream_options.include_usage
        return Writer(name, job, self._fingerprint, tells_usage=usage)

    async def first(self, job: Job) -> Event:
        """Lets a job wait for the model, until it has something to say.

        A stream is opened only then: what the methods and the model refuse has a status of its own.
        """
        self.worker.submit(job)
        try:
            return await job.event()
        except BaseException:  # the client has gone, or waited long enough
            self.worker.cancel(job)
            raise

    def _choosing(self, request: ChatRequest, methods: tuple[Method, ...]) -> Choosing:
        limits, given = self.serving.limits, request.temperature
        temperature = self.serving.temperature if given is None else given
        if temperature > 0 and (searching := [m for m in methods if "search" in m.sites]):
            raise invalid(
                f"{searching[0].label} searches for the best answer, and so draws no tokens: it "
                "needs temperature 0.",
                "temperature",
                "invalid_value",
            )
        if len(request.stop) > limits.stops:
            raise invalid(f"At most {limits.stops} stop sequences are taken.", "stop")
        return Choosing(
            temperature=temperature,
            top_p=request.top_p,
            seed=secrets.randbits(31) if request.seed is None else request.seed,
            stops=tuple(request.stop),
            keeps_stop=request.include_stop_str_in_output,
            streams=request.stream,
        )

    async def _files(self, request: ChatRequest) -> list[tuple[str, bytes]]:
        """The bytes of all pictures, each with its field."""
        parts, limits = picture_parts(request), self.serving.limits
        if len(parts) > limits.pictures:
            raise invalid(
                f"The request has {len(parts)} pictures; at most {limits.pictures} are taken.",
                "messages",
                "too_many_images",
            )
        files, left = [], limits.body_bytes
        try:
            async with asyncio.timeout(limits.fetch_timeout):
                for param, url in parts:
                    content = data_of(url, param)
                    if content is None:
                        content = await self._fetch(url, param, left)
                        left -= len(content)
                    files.append((param, content))
        except TimeoutError:
            message = f"The pictures could not be fetched within {limits.fetch_timeout:g} s."
            raise invalid(message, "messages", "invalid_image_url") from None
        return files
