"""The HTTP interface: ``/v1/chat/completions``, ``/v1/models``, ``/health``; errors as OpenAI's."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mmlm.serve.bodies import discard, read_body, unless_gone
from mmlm.serve.jobs import Answer, Event, Job
from mmlm.serve.refusals import Refusal, failed
from mmlm.serve.replies import Writer, sse
from mmlm.serve.service import Service
from mmlm.serve.wire import ChatRequest, read_request

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = ["make_app"]

_log = logging.getLogger("mmlm.serve")
_LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})
_GONE = 499  # nginx's word for it; nobody reads it
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": ChatRequest.model_json_schema()}},
    }
}


def make_app(service: Service) -> FastAPI:
    """The application; starts and ends the service with itself.

    Args:
        service: What answers.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    # No pages with documentation: they would load their scripts from elsewhere.
    app = FastAPI(title="mmlm serve", docs_url=None, redoc_url=None, lifespan=lifespan)
    _answer_errors(app, service)
    _add_completions(app, service)
    _add_models(app, service)

    @app.get("/health")
    async def health() -> Response:
        worker = service.worker
        state = {"status": "ok", "running": worker.running, "waiting": worker.waiting}
        if worker.alive:
            return JSONResponse(state)
        return JSONResponse(state | {"status": "stopped"}, 503)

    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    limits = service.serving.limits

    @app.post("/v1/chat/completions", openapi_extra=_BODY)
    async def complete(http: Request) -> Response:
        _check_caller(http, service)
        start = time.monotonic()
        with ExitStack() as stack:
            stack.enter_context(service.place())
            request = read_request(await read_body(http, limits))
            deadline = asyncio.get_running_loop().time() + limits.timeout
            try:
                async with asyncio.timeout_at(deadline):
                    job = await unless_gone(http, service.job(request))
                    event = await unless_gone(http, service.first(job))
            except TimeoutError:
                raise _late(limits.timeout) from None
            writer = service.writer(request, job)
            if isinstance(event, Refusal):
                raise event
            if isinstance(event, Answer) and not request.stream:
                _note(job, event, start)
                return JSONResponse(writer.whole(event))
            chunks = _chunks(service, job, writer, event, start, deadline)
            return _Stream(chunks, stack.pop_all(), deadline)


async def _chunks(
    service: Service, job: Job, writer: Writer, event: Event, start: float, deadline: float
) -> AsyncIterator[bytes]:
    """The events of a job, from one that is there already, as chunks of a stream."""
    try:
        yield writer.first()
        while isinstance(event, str):
            yield writer.piece(event)
            try:
                async with asyncio.timeout_at(deadline):
                    event = await job.event()
            except TimeoutError:
                event = _late(service.serving.limits.timeout)
        if isinstance(event, Answer):
            _note(job, event, start)
            yield writer.last(event)
        else:
            yield sse(event.body)
    finally:
        service.worker.cancel(job)


class _Stream(StreamingResponse):
    """A stream that gives its place back however it ends, also if it never begins."""

    def __init__(self, chunks: AsyncIterator[bytes], place: ExitStack, deadline: float) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._chunks = chunks
        self._place = place
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            try:
                # A client that takes nothing more would hold its place for ever.
                async with asyncio.timeout_at(self._deadline + 1):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                _log.info("A client stopped reading its stream.")
            finally:
                await self._chunks.aclose()  # type: ignore[attr-defined]


def _add_models(app: FastAPI, service: Service) -> None:
    born = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": born, "owned_by": "mmlm"}

    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        _check_caller(http, service)
        cards = [card(name) for name in service.serving.names.listed]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name:path}")
    async def model(http: Request, name: str) -> Response:
        _check_caller(http, service)
        service.serving.names.methods(name, None)
        return JSONResponse(card(name))


def _check_caller(http: Request, service: Service) -> None:
    """Who may ask: who knows the key, and nobody through a page that pretends to be here."""
    serving = service.serving
    host = http.headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if serving.local and not serving.key and name.lower() not in _LOCAL:
        raise Refusal(403, "This server answers to the name localhost only.", code="wrong_host")
    scheme, _, given = http.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), serving.key.encode())
    if serving.key and not (scheme.lower() == "bearer" and right):
        raise Refusal(
            401,
            "The API key is missing or wrong. Send it as: Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _answer_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(Refusal)
    async def refuse(http: Request, refusal: Refusal) -> Response:
        path = http.url.path[:200]
        _log.info("%d %s %r: %s", refusal.status, http.method, path, refusal.code or "")
        await discard(http, service.serving.limits)
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def not_there(http: Request, error: HTTPException) -> Response:
        refusal = Refusal(
            error.status_code,
            f"{http.method} {http.url.path[:200]}: {error.detail}. There are POST "
            "/v1/chat/completions, GET /v1/models and GET /health.",
            code="unknown_url",
            headers=dict(error.headers or {}),
        )
        return await refuse(http, refusal)

    @app.exception_handler(ClientDisconnect)
    async def gone(http: Request, error: ClientDisconnect) -> Response:
        _log.info("%d %s %r", _GONE, http.method, http.url.path[:200])
        return Response(status_code=_GONE)

    @app.exception_handler(Exception)
    async def bug(http: Request, error: Exception) -> Response:
        refusal = failed("The server failed at this request; its log says how.")
        return JSONResponse(refusal.body, refusal.status)


def _late(seconds: float) -> Refusal:
    return Refusal(
        504,
        f"There was no answer within {seconds:g} s. Ask for fewer tokens, or try again later.",
        code="timeout",
    )


def _note(job: Job, answer: Answer, start: float) -> None:
    """One line for the log: never what was asked or answered, nor a name that the client wrote."""
    _log.info(
        "200 %s: %d + %d tokens, %s, %.1f s",
        "+".join(method.label for method in job.methods) or "plain",
        job.prompt.n_tokens,
        answer.n_tokens,
        answer.finish,
        time.monotonic() - start,
    )
