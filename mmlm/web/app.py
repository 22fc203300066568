"""The page: a head, the choice of the model, and the tabs."""

from __future__ import annotations

import os
import socket
import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import gradio as gr

import mmlm
from mmlm.cli.web import Web, is_loopback
from mmlm.errors import InputError
from mmlm.web import compare_tab, data, effects
from mmlm.web.method_forms import load_methods
from mmlm.web.models import Limits, Models, Session
from mmlm.web.theme import head, script, stylesheet, theme

if TYPE_CHECKING:
    from data_tools.detectors import Detector
    from mmlm.cli.frame import Terminal

__all__ = ["launch", "playground", "serve"]

_TITLE = "mmlm · see what a model invents"
#: Seconds: how often files of visitors are looked through, and how old they may grow.
_DELETE = (3600, 86400)
_HEADER = """
<header class="brand"><h1>mmlm</h1>
<p>See what a vision-language model invents, why, and what each method does about it.</p></header>
"""


def playground(
    models: Models,
    limits: Limits | None = None,
    detector: Detector | None = None,
    start: Sequence[str] = ("VHR(alpha=2.0)",),
) -> gr.Blocks:
    """The whole page, not yet served.

    Args:
        models: What visitors may choose.
        limits: What one visitor may ask for.
        detector: Says what is in uploaded pictures.
        start: The methods that each column starts with, as text; at most `settings.COLUMNS`.
    """
    limits = limits or Limits()
    with gr.Blocks(
        title=_TITLE, analytics_enabled=False, fill_width=True, delete_cache=_DELETE
    ) as page:
        with gr.Row(elem_id="top"):
            gr.HTML(_HEADER)
            model = gr.Dropdown(
                list(models.names),
                value=models.names[0],
                label="Model",
                show_label=False,
                container=False,
                elem_id="model",
                scale=0,
                min_width=220,
            )
            shade = gr.Button("Light or dark", elem_id="shade", scale=0, min_width=42)
        shade.click(None, None, None, js=script("shade.js"))
        session = Session(models, limits, model, detector=detector, start=tuple(start))
        with gr.Tabs():
            with gr.Tab("Compare", elem_id="compare-tab", id="compare"):
                session = replace(session, methods=compare_tab.build(session))
            with gr.Tab("Effects", elem_id="effects-tab", id="effects"):
                effects.build(session)
            with gr.Tab("Data", elem_id="data-tab", id="data"):
                data.build(session)
    page.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    return page


def launch(page: gr.Blocks, limits: Limits, host: str = "127.0.0.1", port: int = 0) -> str:
    """Starts serving a page; it is served until the page is closed or the process ends.

    Args:
        page: From `playground`.
        limits: What one visitor may ask for.
        host: Address to listen at.
        port: Port; 0 for any free one.

    Returns:
        The address of the page.

    Raises:
        InputError: If nothing can listen there.
    """
    port = _free(host, port)
    # Gradio reports each start to its makers otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=theme(),
        css=stylesheet(),
        head=head(),
        max_file_size=limits.upload_bytes,
        share=False,
        ssr_mode=False,
        footer_links=[],
        enable_monitoring=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    return address


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0; refused if it is taken or the address is not ours."""
    try:
        with socket.create_server((host, port)) as listening:
            return listening.getsockname()[1]
    except OSError as error:
        raise InputError(
            f"Nothing can listen at {host}, port {port}: {error.strerror or error}.",
            advice="Choose another --port (0 for any free one) or --host.",
        ) from error


def serve(settings: Web, terminal: Terminal) -> None:
    """Serves the page, loads the first model meanwhile, and waits for Ctrl-C.

    The page is there before the model: a visitor sees a picture in seconds, and whoever asks at
    once waits for the model.

    Args:
        settings: Of the command.
        terminal: Where the address is written.

    Raises:
        InputError: If the model, a method or the detector cannot be loaded, or the address is
            taken.
        MmlmError: If a method cannot work on the model.
    """
    from data_tools.detectors import parse_detector

    limits = Limits(
        upload_bytes=int(settings.max_upload_mb * 2**20),
        pixels=int(settings.max_megapixels * 1e6),
        new_tokens=settings.max_new_tokens,
        waiting=settings.max_waiting,
    )
    columns = [load_methods(text) for text in settings.methods]
    models = Models((settings.model.id, *settings.also), settings.model)
    detector = parse_detector(settings.detector) if settings.detector else None
    page = playground(models, limits, detector, settings.methods or Session.start)
    address = launch(page, limits, settings.host, settings.port)
    try:
        _announce(address, settings, terminal)
        model, processor = models.open(models.names[0])
        for methods in columns:
            with mmlm.attach(model, *methods, processor=processor):
                pass  # refuses what this model cannot do, before anybody asks
        if detector is not None:
            detector.load()
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _announce(address: str, settings: Web, terminal: Terminal) -> None:
    if terminal.json:
        terminal.emit({"address": address})
    terminal.say(f"The playground is at {address}   (Ctrl-C ends it)")
    if not is_loopback(settings.host):
        terminal.note(
            "note: anyone who can reach this machine can use it; there is no password. "
            "Put a proxy with one in front of it."
        )
    if settings.browser:
        webbrowser.open(address)
