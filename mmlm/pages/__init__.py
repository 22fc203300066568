"""Parts of our HTML pages: one file, no network, no scripts, light and dark, good on a phone.

Whatever comes from a model or a file passes `escaped`; what these functions return is HTML.
"""

from __future__ import annotations

import base64
import html
import io
import re
from importlib import resources
from typing import TYPE_CHECKING

from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from PIL import Image

__all__ = ["claim", "document", "escaped", "footer", "image", "prose", "stylesheet"]

SMALL = 128  # pixels; pictures up to this size are enlarged without smoothing
THUMBNAIL = 320


def claim(path: Path, generator: str) -> None:
    """Refuses to replace a page that another program wrote.

    Args:
        path: Where a page is to be written.
        generator: What stands in the head of our own pages of this kind.

    Raises:
        InputError: If something else is there.
    """
    if path.exists() and (not path.is_file() or generator.encode() not in path.read_bytes()[:600]):
        raise InputError(
            f"{str(path)!r} exists and was not written by `{generator}`.",
            advice="Choose another --output.",
        )


def stylesheet(*more: str) -> str:
    """The style that all pages share, and what one page adds to it.

    Args:
        *more: CSS.
    """
    shared = resources.files("mmlm.pages").joinpath("page.css").read_text("utf-8")
    return "".join([shared, *more])


def document(generator: str, title: str, style: str, body: Iterable[str]) -> str:
    """A whole page.

    Args:
        generator: The command that writes it; stands in the head, so that a report is told apart
            from somebody else's file.
        title: Plain text.
        style: CSS.
        body: HTML; empty parts are left out.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="generator" content="{escaped(generator)}">',
        f"<title>{escaped(title)}</title>",
        f"<style>{style}</style></head><body>",
        *body,
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def footer(facts: Mapping[str, str]) -> str:
    """Name and value of what a reader needs to repeat what the page is about."""
    lines = "".join(
        f"<dt>{escaped(name)}</dt><dd><code>{escaped(value)}</code></dd>"
        for name, value in facts.items()
    )
    return f"<footer><h2>How this was made</h2><dl>{lines}</dl></footer>"


def escaped(text: str) -> str:
    """Text as HTML."""
    return html.escape(text)


def prose(text: str) -> str:
    """Escaped text; word-level models put a blank before punctuation, people do not."""
    return escaped(re.sub(r"\s+([.,?!:;])", r"\1", text))


def image(picture: Image.Image, name: object) -> str:
    """A picture inside the page: small ones as they are, large ones as thumbnails."""
    small = max(picture.size) <= SMALL
    picture = picture.convert("RGB")
    kind = "PNG" if small else "JPEG"
    if not small:
        picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"optimize": True} if small else {"quality": 82}))
    data = base64.b64encode(buffer.getvalue()).decode()
    css = ' class="small"' if small else ""
    return (
        f'<img{css} src="data:image/{kind.lower()};base64,{data}" '
        f'alt="picture {escaped(str(name))}" width="{picture.width}" height="{picture.height}">'
    )
