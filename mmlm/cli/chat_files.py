"""What `mmlm chat` talks about: pictures from files, drawn scenes, stored conversations."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.errors import InputError
from mmlm.show.conversation import Conversation, Picture

if TYPE_CHECKING:
    from mmlm.cli.chat import Chat

__all__ = ["drawn", "names", "opening", "read"]


def opening(settings: Chat) -> Conversation:
    """What the conversation begins with, from the command line; reads everything before any work.

    Raises:
        MmlmError: If a picture, the truth or a stored conversation cannot be read.
    """
    talk = Conversation() if settings.load is None else Conversation.load(settings.load)
    if settings.truth is not None and not settings.truth.is_file():
        raise InputError(f"There is no file {str(settings.truth)!r}.", advice="Check --truth.")
    talk = talk.with_pictures(*read(settings.images, settings.truth))
    return talk if settings.scene is None else talk.with_pictures(drawn("natural", settings.scene))


def read(files: Sequence[str], truth: Path | None) -> tuple[Picture, ...]:
    """Pictures from files, with what is known about them.

    Args:
        files: Their paths.
        truth: An ``instances.json`` that describes all of them; None looks beside them.

    Raises:
        MmlmError: If a picture cannot be read, or the truth does not know it.
    """
    from mmlm.show.truth import of_file

    # Pictures first: a broken one is told as such, whatever is known about it.
    found = [Picture.read(os.path.expanduser(file)) for file in files]
    return tuple(replace(picture, known=of_file(picture.name, truth)) for picture in found)


def drawn(split: str, number: int) -> Picture:
    """A scene of the embedded world.

    Raises:
        InputError: For an unknown split or a negative number.
    """
    from mmlm.show.truth import draw_scene

    scene = draw_scene(split, 0, number)
    return Picture(f"world {split} {number}", scene.image, known=scene.known)


def names(rest: str, usage: str) -> list[str]:
    """The files that a command names, quotes as in a shell.

    Raises:
        InputError: If there is none, or quotes stay open; shows the usage.
    """
    try:
        found = shlex.split(rest)
    except ValueError as error:
        raise InputError(f"{rest!r}: {error}.", advice="Close the quotes.") from error
    if not found:
        raise InputError("No file was named.", advice=f"Write: {usage}")
    return found
