"""``mmlm chat``: talk with a model about pictures in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from mmlm.cli.chat_lines import Editor, Script, history_file
from mmlm.cli.frame import DONE, STOPPED, Command, Terminal
from mmlm.cli.options import ModelOptions, check_model_name, method_field, open_model, parse_methods
from mmlm.decoding_settings import GenerateSettings
from mmlm.errors import InputError

__all__ = ["COMMAND", "Chat", "run"]


@dataclass(frozen=True)
class Chat:
    """Options of ``mmlm chat``.

    Attributes:
        images: A picture for the first question.
        scene: Number of a scene of the embedded world for the first question (split `natural`);
            what is in it is known.
        truth: Objects in the pictures, instances.json in COCO format: objects in answers are
            coloured. Not needed for scenes, for pictures beside the file that `mmlm data world`
            writes, and for pictures of COCO val2014 under their own names.
        methods: A method, e.g. "VHR(alpha=2.0)"; `none` for the plain model.
        prompt: Ask this one question and leave.
        load: A conversation that `/save` wrote, to go on with.
        history: Keep the lines that are typed for the next session.
        model: The model.
        generate: How answers are generated (`batch_size` does not matter here).
    """

    images: tuple[str, ...] = field(default=(), metadata={"alias": "--image"})
    scene: int | None = None
    truth: Path | None = None
    methods: tuple[str, ...] = method_field()
    prompt: str | None = None
    load: Path | None = None
    history: bool = True
    model: ModelOptions = field(default_factory=ModelOptions)
    generate: GenerateSettings = field(default_factory=GenerateSettings)


def run(settings: Chat, terminal: Terminal) -> int:
    """Holds the conversation until the input ends.

    Returns:
        ``DONE``; with a script as input ``SOME_FAILED`` if a line of it failed; ``STOPPED`` if the
        one answer of ``--prompt`` was stopped with Ctrl-C.

    Raises:
        MmlmError: If the model, a method, a picture or a file on the command line is impossible,
            or the one question of ``--prompt`` fails.
    """
    check_model_name(settings.model.id)
    from mmlm.cli.chat_files import opening
    from mmlm.cli.chat_session import Session

    talk = opening(settings)
    methods = parse_methods(settings.methods)
    model, processor = open_model(settings.model, methods, terminal)
    interactive = settings.prompt is None and sys.stdin.isatty()
    session = Session(model, processor, methods, settings, terminal, talk, patient=interactive)
    if settings.prompt is not None:
        if not settings.prompt.strip():
            raise InputError("--prompt is empty.", advice="Write a question.")
        return STOPPED if session.ask(settings.prompt).stopped else DONE
    if not interactive:
        return session.loop(Script())
    if not terminal.quiet:
        session.greet()
    return session.loop(
        Editor(
            history_file() if settings.history else None,
            session.completions,
            "> " if sys.stdout.isatty() and not terminal.json else "",
            terminal.note,
        )
    )


COMMAND = Command(
    summary="talk with a model about pictures in the terminal",
    settings=Chat,
    run=run,
    example=(
        "mmlm chat --scene 7\n"
        'mmlm chat --image photo.jpg --method "VHR(alpha=2.0)"\n'
        'mmlm chat --image photo.jpg --prompt "Is there a dog in the image?" --json'
    ),
)
