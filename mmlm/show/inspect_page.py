"""The page of an inspection: one file, no network, no scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING

from mmlm import pages
from mmlm.pages import escaped, prose
from mmlm.show import figures
from mmlm.show.spots import Spot
from mmlm.show.words import words

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from mmlm.show.inspection import Arm, Inspection
    from mmlm.show.looking import Look

__all__ = ["GENERATOR", "page"]

GENERATOR = "mmlm inspect"
"""Stands in the file's head, so that a page is told apart from somebody else's file."""

_NOTES = {
    "layers": "Each curve is a mean over heads and over the tokens of an answer. MDI compares a "
    "text token with an image token: above the line the text gets more attention per token.",
    "heads": "How far the output of each attention head moves when the picture is removed, "
    "relative to its size: 0 for a head that does not see the picture, at most 1.",
    "looks": "For how many tokens of the answer a head's largest weight lay on a picture. Heads "
    "that look exactly at what is named next: `mmlm calibrate heads --kind visual`.",
    "copies": "For how many tokens of the answer a head's largest weight lay on the very same "
    "token in the prompt. Heads that copy a text: `mmlm calibrate heads --kind text`.",
    "norms": "The size of each head's query beside those of its layer, as a router without "
    "parameters sees it. It knows nothing of pictures.",
    "first": "The mean over all queries. A head that rests on the first token does nothing else "
    "meanwhile; most do, in most models.",
    "magnets": "Image tokens that get attention from most queries, whatever these ask. That alone "
    "says nothing about what is there.",
    "sinks": "Image tokens with massive activations. They draw attention and carry nothing: where "
    "a map is bright at a sink, nothing was looked at.",
}


def page(
    inspection: Inspection,
    shown: Sequence[Spot],
    drawn: Mapping[str, Path],
    tables: Sequence[str],
    facts: Mapping[str, str],
) -> str:
    """The page as HTML.

    Args:
        inspection: The answers.
        shown: The words whose maps are shown.
        drawn: Figures by the name of their section: layers, heads, looks, copies, norms, first,
            magnets, sinks.
        tables: HTML tables, shown below the figures.
        facts: What a reader needs to repeat it.
    """
    title = f"{inspection.prompt.strip()} - {inspection.model}"
    css = resources.files("mmlm.show").joinpath("inspect.css").read_text("utf-8")
    body = [
        f'<header><p class="eyebrow">mmlm inspect · {escaped(inspection.model)}</p>',
        f"<h1>{prose(inspection.prompt.strip())}</h1>",
        f'<div class="shown">{"".join(_picture(p.image, p.name) for p in inspection.pictures)}'
        "</div></header><main>",
        "<h2>What it said</h2>",
        '<div class="answers">',
        *(_answer(number, arm, shown) for number, arm in enumerate(inspection.arms)),
        "</div>",
        *_maps(inspection, shown),
        *(_figure(name, path) for name, path in drawn.items()),
        *tables,
        _left_out(inspection),
        "</main>",
        pages.footer(facts),
    ]
    return pages.document(GENERATOR, title, pages.stylesheet(css), body)


def _picture(image: Image.Image, name: str) -> str:
    return f"<figure>{_img(image, name)}<figcaption>{escaped(name)}</figcaption></figure>"


def _img(image: Image.Image, name: str) -> str:
    buffer = io.BytesIO()
    image = image.convert("RGB")
    image.thumbnail((480, 480))
    image.save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escaped(name)}">'


def _answer(number: int, arm: Arm, shown: Sequence[Spot]) -> str:
    seen = "" if arm.look is None else f" · {arm.look.shares.sum(1).mean():.0%} of the attention"
    seen += " on the picture" if seen else ""
    tokens = "1 token" if arm.n_tokens == 1 else f"{arm.n_tokens} tokens"
    return (
        f'<article class="panel answer"><p class="who-name">{escaped(arm.name)}</p>'
        f'<p class="said">{_marked(number, arm.text, shown)}</p>'
        f'<p class="note">{tokens} · {arm.seconds:.1f} s{seen}</p>'
        f"{'' if arm.look is None else _heat(arm.look)}</article>"
    )


def _marked(number: int, text: str, shown: Sequence[Spot]) -> str:
    """An answer with links from its words to their maps."""
    if not text:
        return "<em>(an empty answer)</em>"
    said = sorted(
        ((spot.said[number], spot) for spot in shown if number in spot.said),
        key=lambda pair: pair[0].start,
    )
    parts, end = [], 0
    for one, spot in said:
        parts.append(prose(text[end : one.start]))
        parts.append(
            f'<a href="#{spot.anchor}"><mark class="{one.kind or "plain"}">'
            f"{escaped(text[one.start : one.end])}</mark></a>"
        )
        end = one.end
    return "".join([*parts, prose(text[end:])])


def _heat(look: Look) -> str:
    """The words of an answer, each the darker the more attention the picture got."""
    spans = [span for span in words(look.text) if look.tokens_of(*span)]
    if not spans:
        return ""
    pictures = range(len(look.maps))
    cells = []
    for span in spans:
        share = sum(look.share_of_span(*span, i) for i in pictures)
        cells.append(
            f'<span style="--share:{share:.3f}" title="{share:.0%} on the picture">'
            f"{escaped(look.text[slice(*span)])}</span>"
        )
    return (
        '<p class="note">Darker: more of the attention went to the picture while the word was '
        f'written.</p><p class="heat">{" ".join(cells)}</p>'
    )


def _maps(inspection: Inspection, shown: Sequence[Spot]) -> list[str]:
    """A card for the whole answers, and one for each word."""
    if all(arm.look is None for arm in inspection.arms):
        return []
    whole = dict.fromkeys(range(len(inspection.arms)))
    cards = [
        _card(inspection, "the whole answer", "whole", whole, image)
        for image in range(len(inspection.pictures))
    ]
    for spot in shown:
        name = spot.text + (f" ({spot.number})" if spot.number > 1 else "")
        spans = {i: (one.start, one.end) for i, one in spot.said.items()}
        cards += [
            _card(inspection, name, spot.anchor, spans, image)
            for image in range(len(inspection.pictures))
        ]
    note = (
        "Attention over the picture while a word was written: mean over all heads and layers that "
        "were measured, yellow where it was highest. Both maps of a card have one scale."
    )
    return [
        "<h2>Where it looked</h2>",
        f'<p class="note">{note}</p><div class="maps">',
        *cards,
        "</div>",
    ]


def _card(
    inspection: Inspection,
    title: str,
    anchor: str,
    spans: Mapping[int, tuple[int, int] | None],
    image: int,
) -> str:
    picture = inspection.pictures[image]
    maps = inspection.maps(spans, image)
    peak = max((float(values.max()) for values, _ in maps.values()), default=0.0)
    parts = []
    for number, arm in enumerate(inspection.arms):
        if number in maps:
            values, share = maps[number]
            shown = _img(figures.overlay(picture.image, values, peak=peak, side=320), title)
            text = f"{share:.0%} on the picture"
        else:
            shape = "{} / {}".format(*picture.image.size)
            shown, text = f'<div class="unsaid" style="aspect-ratio: {shape}">not said</div>', ""
        label = escaped(arm.name if len(arm.name) <= 40 else f"{arm.name[:37]}...")
        parts.append(f"<figure>{shown}<figcaption>{label}<br>{text}</figcaption></figure>")
    of = f" · picture {image + 1}" if len(inspection.pictures) > 1 else ""
    mark = f' id="{anchor}"' if image == 0 else ""
    return (
        f'<article class="panel map"{mark}><h3>{escaped(title + of)}</h3>'
        f'<div class="pair">{"".join(parts)}</div></article>'
    )


def _figure(name: str, path: Path) -> str:
    titles = {
        "layers": "Layer by layer",
        "heads": "Head by head",
        "looks": "Heads that look at the picture",
        "copies": "Heads that copy from the prompt",
        "norms": "Heads by the size of their queries",
        "first": "Attention on the first token",
        "magnets": "Attention sinks in the picture",
        "sinks": "Visual sinks",
    }
    kind = "image/svg+xml" if path.suffix == ".svg" else "image/png"
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<h2>{titles[name]}</h2><p class="note">{_NOTES[name]}</p>'
        f'<div class="panel figure"><img src="data:{kind};base64,{data}" alt="{titles[name]}">'
        "</div>"
    )


def _left_out(inspection: Inspection) -> str:
    if not inspection.left_out:
        return ""
    rows = "".join(
        f"<dt>{escaped(name)}</dt><dd>{escaped(reason)}</dd>"
        for name, reason in inspection.left_out.items()
    )
    return f'<h2>Not measured</h2><div class="panel"><dl>{rows}</dl></div>'
