"""``mmlm web``: the playground in a browser."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.cli.options import ModelOptions, check_model_name, method_field
from mmlm.errors import InputError

__all__ = ["COLUMNS", "COMMAND", "Web", "is_loopback", "run"]


COLUMNS = 4
"""Columns of the playground beside the plain model."""


@dataclass(frozen=True)
class Web:
    """Options of ``mmlm web``.

    Attributes:
        model: The model that the page starts with.
        methods: The methods that a column starts with, e.g. "VHR(alpha=2.0)" or "PAI + VCD"; up to
            four columns. One of your own is named by its path, my_package.MyMethod, and can then be
            chosen on the page.
        also: Further models that visitors may choose; each is loaded when it is first chosen.
        detector: Says what is in uploaded pictures, e.g. "HFDetector(model='path')". Without one
            only drawn scenes and pictures of COCO val2014 have words marked.
        host: Address to listen at. Everything but a loopback address lets others in.
        port: Port; 0 for any free one.
        browser: Open the page in this machine's browser.
        max_upload_mb: Largest file that is taken, in MB.
        max_megapixels: Largest picture that is decoded, in millions of pixels.
        max_new_tokens: Most new tokens of an answer.
        max_waiting: Most requests that wait; further ones are told to come again.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    methods: tuple[str, ...] = method_field()
    also: tuple[str, ...] = ()
    detector: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    browser: bool = False
    max_upload_mb: float = 10.0
    max_megapixels: float = 24.0
    max_new_tokens: int = 512
    max_waiting: int = 32


def run(settings: Web, terminal: Terminal) -> int:
    """Serves the page until Ctrl-C.

    Raises:
        InputError: If an option is out of range, the port is taken, a name cannot be a model, or
            Gradio is not installed.
    """
    _check(settings)
    for name in (settings.model.id, *settings.also):
        check_model_name(name)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError(
            "The playground needs Gradio, which is not installed.",
            advice="pip install 'mmlm[web]'",
        ) from error
    from mmlm.web.app import serve

    serve(settings, terminal)
    return DONE


def _check(settings: Web) -> None:
    """Refuses what cannot be, before anything is imported."""
    for name in ("max_upload_mb", "max_megapixels", "max_new_tokens", "max_waiting"):
        value = getattr(settings, name)
        if not value > 0 or value == float("inf"):
            raise InputError(f"--{name} is {value}.", advice="Give a finite number greater than 0.")
    if len(settings.methods) > COLUMNS:
        raise InputError(
            f"{len(settings.methods)} columns of methods were given.",
            advice=f'Give at most {COLUMNS}; methods that act together go in one: "PAI + VCD".',
        )
    if not 0 <= settings.port <= 65535:
        raise InputError(
            f"--port is {settings.port}.", advice="Give 1 to 65535, or 0 for any free port."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


COMMAND = Command(
    summary="the playground in a browser: what the model invents, and what methods do about it",
    settings=Web,
    run=run,
    example=(
        "mmlm web\n"
        'mmlm web --method "VHR(alpha=3.0)" --method "PAI + VCD"\n'
        "mmlm web --model llava-hf/llava-1.5-7b-hf --model.dtype bfloat16 --also embedded\n"
        "mmlm web --host 0.0.0.0 --port 8000"
    ),
)
