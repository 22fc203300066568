"""The server's life: a port of its own, a word when it is ready, an orderly end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from mmlm.errors import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["bind", "run_server"]


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is loaded: a port that is taken is found at once.

    Args:
        host: The address to listen at.
        port: The port; 0 for any that is free.

    Raises:
        InputError: If the address is not this machine's or the port is taken.
    """
    try:
        kind = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(kind[0], kind[1])
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(kind[4])
    except OSError as error:
        raise InputError(
            f"The server cannot listen at {host}:{port}: {error.strerror or error}.",
            advice="Choose another --port (0 takes any that is free) or --host.",
        ) from error
    return found


def run_server(
    app: FastAPI,
    listener: socket.socket,
    *,
    grace: float,
    ready: Callable[[uvicorn.Server], object],
) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Then nothing new is accepted, what runs may end, and what has not ended after ``grace`` seconds
    is cut off.

    Args:
        app: What is served.
        listener: Where.
        grace: Seconds for what runs.
        ready: Called when requests are accepted, with the server: setting its ``should_exit`` ends
            it as a signal does. In a thread other than the main one that is the only way.

    Raises:
        KeyboardInterrupt: After the end that Ctrl-C brought.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=grace,  # type: ignore[arg-type]  # goes to asyncio.wait_for
    )
    server = _Server(config, ready)
    with listener, _good_end():
        server.run(sockets=[listener])


@contextmanager
def _good_end() -> Iterator[None]:
    """Uvicorn raises a signal again when all is over; SIGTERM is then nothing to die of."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[uvicorn.Server], object]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready(self)
