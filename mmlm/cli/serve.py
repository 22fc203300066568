"""``mmlm serve``: a model behind HTTP, for every program that speaks OpenAI's chat completions."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.cli.options import ModelOptions, check_model_name, method_field, open_model
from mmlm.errors import InputError
from mmlm.serve.limits import Limits

if TYPE_CHECKING:
    from mmlm.serve.service import Serving

__all__ = ["COMMAND", "Serve", "run"]


@dataclass(frozen=True)
class Serve:
    """Options of ``mmlm serve``.

    Attributes:
        methods: Methods to list under a name of their own, "VHR(alpha=2.0)" or several joined by
            +, "VHR()+VAR()". Requests may ask for any method of mmlm, listed or not; for one of
            your own package or with a file of weights only if it is given here.
        name: What clients call the plain model; by default --model, of a folder its last part.
        host: Address to listen at. The default is reached from this machine only.
        port: Port to listen at; 0 takes any that is free.
        key_variable: Environment variable that holds an API key, which clients must then send. The
            key itself is never stored or shown.
        allow_hosts: Hosts from which pictures may be fetched if a request gives an address instead
            of a data URL: example.org, or example.org:8080.
        temperature: For requests that do not say; 0 takes the most probable tokens.
        batch_size: Most requests that are answered together; those with the same methods are.
        model: The model.
        limits: What is taken.
    """

    methods: tuple[str, ...] = method_field()
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    key_variable: str = "MMLM_SERVE_KEY"
    allow_hosts: tuple[str, ...] = ()
    temperature: float = 0.0
    batch_size: int = 8
    model: ModelOptions = field(default_factory=ModelOptions)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: For a value out of range.
        """
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not (self.temperature == 0 or 0.01 <= self.temperature <= 100):
            raise ValueError(f"temperature must be 0 or from 0.01 to 100, got {self.temperature}")


def run(settings: Serve, terminal: Terminal) -> int:
    """Serves until SIGTERM (exit code 0) or Ctrl-C (130).

    Raises:
        MmlmError: For everything that makes serving impossible, before the model is loaded where
            that can be.
    """
    check_model_name(settings.model.id)
    _need_packages()
    serving = _serving(settings)
    import mmlm
    from mmlm.serve.app import make_app
    from mmlm.serve.running import bind, run_server
    from mmlm.serve.service import Service

    if not terminal.quiet:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("mmlm.serve").setLevel(logging.INFO)
    with bind(settings.host, settings.port) as listener:
        model, processor = open_model(settings.model, (), terminal)
        for methods in serving.names.offered:
            with mmlm.attach(model, *methods, processor=processor):
                pass  # refuses what this model cannot do, before a client finds out
        service = Service(model, processor, serving)
        host, port = listener.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        url = f"http://{place}:{port}/v1"

        def ready(_: object) -> None:
            if terminal.json:
                terminal.emit({"url": url, "models": list(serving.names.listed)})
            terminal.say(f"{', '.join(serving.names.listed)} at {url}   (Ctrl-C ends)")
            if not serving.local and not serving.key:
                terminal.note(f"note: everybody who reaches {host} may ask; there is no key.")

        run_server(make_app(service), listener, grace=settings.limits.grace, ready=ready)
    return DONE


def _need_packages() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"`mmlm serve` needs {' and '.join(missing)}, which is not installed.",
            advice="Install it: pip install 'mmlm[serve]'",
        )


def _serving(settings: Serve) -> Serving:
    """The options as the server wants them.

    Raises:
        InputError: If a method, a host or the key cannot be right.
    """
    from mmlm.chat_server.wire import checked_key
    from mmlm.serve.names import Names
    from mmlm.serve.pictures import checked_host
    from mmlm.serve.service import Serving

    return Serving(
        names=Names(settings.name or _name_of(settings.model.id), settings.methods),
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        hosts=tuple(checked_host(host) for host in settings.allow_hosts),
        key=checked_key(os.environ.get(settings.key_variable)),
        local=settings.host in ("127.0.0.1", "::1", "localhost"),
        limits=settings.limits,
    )


def _name_of(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


COMMAND = Command(
    summary="a model behind HTTP that answers like OpenAI's chat completions, with methods",
    settings=Serve,
    run=run,
    example=(
        'mmlm serve --method "VHR(alpha=2.0)"\n'
        "curl -s localhost:8000/v1/models\n"
        "mmlm serve --model llava-hf/llava-1.5-7b-hf --model.dtype bfloat16 --host 0.0.0.0"
    ),
)
