"""A word's attention over the picture as HTML, one figure per column, all on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmlm.errors import MmlmError
from mmlm.pages import escaped, image
from mmlm.show.figures import overlay
from mmlm.web.answers import Clicked, failure_html
from mmlm.web.gaze import Gaze

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["figures"]

_SIDE = 320  # pixels; small pictures are enlarged to it


def figures(
    gazes: Sequence[Gaze | MmlmError], clicked: Clicked, picture: Image.Image | None
) -> dict[int, str]:
    """Where each column looked at one word.

    Args:
        gazes: By column: what was seen, or why nothing was.
        clicked: The word.
        picture: The picture of the talk.

    Returns:
        HTML by column.
    """
    span = clicked.start, clicked.end
    seen = [gaze for gaze in gazes if isinstance(gaze, Gaze)]
    # One scale for all, so that brighter means more in every column.
    peak = max((float(gaze.look.of_span(*span).max()) for gaze in seen), default=0.0)
    return {
        place: _figure(gaze, clicked, picture, peak, own=place == clicked.column)
        if isinstance(gaze, Gaze) and picture is not None
        else failure_html(gaze)
        for place, gaze in enumerate(gazes)
    }


def _figure(gaze: Gaze, clicked: Clicked, picture: Image.Image, peak: float, *, own: bool) -> str:
    span = clicked.start, clicked.end
    word = gaze.look.text[slice(*span)]
    first = gaze.first(*span)
    shown = overlay(picture, gaze.look.of_span(*span), peak=peak, side=_SIDE)
    share = gaze.look.share_of_span(*span)
    chance, favourite = gaze.chances[first], gaze.favourites[first]
    lines = [
        f"<b>{share:.0%}</b> of the attention on the picture",
        f"<q>{escaped(word)}</q> had a chance of <b>{chance:.0%}</b>",
    ]
    if favourite and not word.startswith(favourite):
        lines.append(f"it would have written <q>{escaped(favourite)}</q>")
    who = "while it wrote" if own else "given the same words before"
    return (
        f'<figure class="gaze">{image(shown, f"attention at {word}")}'
        f'<figcaption><span class="soft">{who} <q>{escaped(word)}</q></span>'
        f"{''.join(f'<span>{line}</span>' for line in lines)}</figcaption></figure>"
    )
