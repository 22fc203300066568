"""``/inspect`` of `mmlm chat`: where the model looked while it wrote a word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli import chat_views as views
from mmlm.cli.options import parse_methods
from mmlm.errors import InputError
from mmlm.show.words import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from mmlm.cli.chat_session import Session
    from mmlm.engine.method import Method
    from mmlm.show.conversation import Conversation
    from mmlm.show.looking import Look

__all__ = ["inspect"]

LISTED = 12
"""Words that the table shows."""


def inspect(session: Session, word: str, file: str) -> None:
    """Shows attention over the pictures during a word of the last answer, or during all of it.

    Args:
        session: The conversation.
        word: A word or several of the answer, as they stand there; "" for the whole answer.
        file: A PNG to be written; "" for none.

    Raises:
        InputError: If there is no answer, no picture or no such word, or the file is impossible.
        UnsupportedModel: If the model's attention over the picture cannot be told.
    """
    target = _target(file)
    talk = session.talk
    if not talk.turns or not talk.shown:
        missing = "picture" if talk.turns else "answer"
        raise InputError(f"There is no {missing} yet.", advice="Ask about a picture first.")
    seen = _look(session, talk)
    span = _span(seen.text, word) if word else None
    maps = [
        seen.overall(i) if span is None else seen.of_span(*span, i) for i in range(len(talk.shown))
    ]
    shares = [
        float(seen.shares[:, i].mean()) if span is None else seen.share_of_span(*span, i)
        for i in range(len(talk.shown))
    ]
    if session.terminal.json:
        session.terminal.emit(
            {
                "answer": seen.text,
                "word": seen.text[slice(*span)] if span else None,
                "images": [picture.name for picture in talk.shown],
                "shares": [round(share, 6) for share in shares],
                "maps": [[[float(f"{x:.4g}") for x in row] for row in one] for one in maps],
            }
        )
    else:
        for picture, values, share in zip(talk.shown, maps, shares, strict=True):
            title = f"{picture.name}: {share:.1%} of the attention"
            session.terminal.table(views.block_map(values, title))
        if span is None:
            session.terminal.table(_table(seen))
    if target:
        _write(target, talk, maps)
        session.terminal.note(f"written to {target}")


def _target(file: str) -> Path | None:
    if not file:
        return None
    path = Path(file).expanduser()
    if path.suffix.lower() != ".png":
        raise InputError(f"{file!r} is no name of a PNG.", advice="Write: /inspect WORD > map.png")
    if not path.parent.is_dir():
        raise InputError(f"There is no folder {str(path.parent)!r}.", advice="Make it first.")
    return path


def _look(session: Session, talk: Conversation) -> Look:
    """Writes the last answer again, with the methods it was written with, and measures."""
    import mmlm
    from mmlm.show import looking
    from mmlm.streaming import AnswerStream

    methods = _methods(session, talk.turns[-1].methods)
    probe = mmlm.AttentionMap()
    inputs = talk.without_answer().inputs(session.model, session.processor)
    with AnswerStream(
        session.model, session.processor, inputs, [*methods, probe], session.settings.generate
    ) as stream:
        for _ in stream:
            pass
    return looking.of_stream(stream, talk.pictures())


def _methods(session: Session, texts: Sequence[str]) -> tuple[Method, ...]:
    """The methods of a stored answer; a class outside mmlm only if the user has chosen it.

    A conversation may come from somebody else, and its text forms could name any module.
    """
    chosen = {method.text: method for method in session.methods}
    foreign = [text for text in texts if "." in text.partition("(")[0] and text not in chosen]
    if foreign:
        raise InputError(
            f"The answer was written with {foreign[0]}, which is not part of mmlm.",
            advice=f"If you trust it: /method {' + '.join(texts)}",
        )
    return tuple(chosen[text] if text in chosen else parse_methods([text])[0] for text in texts)


def _span(text: str, word: str) -> tuple[int, int]:
    found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
    if found is None:
        said = list(dict.fromkeys(text[slice(*span)] for span in words(text)))
        raise InputError(
            f"The answer has no word {word!r}.", advice=f"Its words: {', '.join(said)}"
        )
    return found.span()


def _table(seen: Look) -> object:
    """The words during which the model looked at the pictures most, as they stand in the answer."""
    from rich.table import Table

    spans = [span for span in words(seen.text) if seen.tokens_of(*span)]
    share = {
        span: sum(seen.share_of_span(*span, i) for i in range(len(seen.maps))) for span in spans
    }
    most = sorted(sorted(spans, key=share.__getitem__, reverse=True)[:LISTED])
    table = Table("word", "attention on the pictures", title="the most seeing words, in order")
    for span in most:
        bar = "█" * round(20 * share[span])
        table.add_row(seen.text[slice(*span)], f"{share[span]:6.1%} {bar}")
    return table


def _write(target: Path, talk: Conversation, maps: Sequence[np.ndarray]) -> None:
    """The pictures side by side, each with its map over it."""
    from PIL import Image

    from mmlm.show.figures import overlay

    shown = [
        overlay(picture.image, values) for picture, values in zip(talk.shown, maps, strict=True)
    ]
    whole = Image.new("RGB", (sum(one.width for one in shown), max(one.height for one in shown)))
    left = 0
    for one in shown:
        whole.paste(one, (left, 0))
        left += one.width
    whole.save(target)
