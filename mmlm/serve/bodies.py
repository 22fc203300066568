"""Bodies as they arrive: bounded in size and time, and read to their end before an error is sent.

A client that is still sending when the connection is closed sees a broken connection instead of the
answer. So what is refused unread is taken off the wire first, within bounds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from mmlm.serve.limits import Limits
from mmlm.serve.refusals import Refusal

__all__ = ["discard", "read_body", "unless_gone"]

T = TypeVar("T")

_PATIENCE = 8
"""A body that is too large is taken off the wire up to so many times the limit."""
_QUICK = 5.0  # seconds for that


async def read_body(http: Request, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        Refusal: 413 if it is too large, 408 if it does not arrive in time, 415 if it is no JSON by
            its header.
        ClientDisconnect: If the client has gone.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    packed = http.headers.get("content-encoding", "identity")
    if kind != "application/json" or packed != "identity":
        # Also keeps out web pages of other sites: a browser asks before it sends this type.
        raise Refusal(415, "The body must be JSON, not packed: Content-Type: application/json.")
    too_large = Refusal(
        413,
        f"The body is larger than {limits.body_mib} MiB. Send fewer or smaller pictures.",
        code="body_too_large",
    )
    if int(http.headers.get("content-length", "0")) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            while not _complete(http):
                body += await _chunk(http)
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        http.state.given_up = True
        raise Refusal(
            408,
            f"The body did not arrive within {limits.body_timeout:g} s.",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    return bytes(body)


async def discard(http: Request, limits: Limits) -> None:
    """Reads what is left of a body, as far as that is reasonable."""
    left = _PATIENCE * limits.body_bytes
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(min(_QUICK, limits.body_timeout)):
            while left > 0 and not _complete(http) and not hasattr(http.state, "given_up"):
                left -= len(await _chunk(http))


def _complete(http: Request) -> bool:
    return getattr(http.state, "complete", False)


async def _chunk(http: Request) -> bytes:
    message = await http.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    http.state.complete = not message.get("more_body", False)
    chunk: bytes = message.get("body", b"")
    return chunk


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """What the work brings, unless the client goes away first; its body has been read.

    Raises:
        ClientDisconnect: If it does; the work is cancelled.
    """
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()  # type: ignore[return-value]
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
