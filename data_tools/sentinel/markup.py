"""What SENTINEL found in a picture as HTML: the boxes over it, the objects in a sentence.

The report and the playground's data tab show the same; the style is ``report.css``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.pictures import Picture
from mmlm import pages
from mmlm.errors import ImageReadError
from mmlm.pages import escaped, prose

__all__ = ["scene", "sentence"]

Line = Mapping[str, Any]


def sentence(image: Line, text: str, objects: Sequence[Sequence[Any]]) -> str:
    """A sentence with its objects marked: class ``good`` if found, ``bad`` if not, ``doubt``.

    Args:
        image: The audit line of its picture, which knows the labels.
        text: The sentence.
        objects: Name, first character and end of each object, as candidates have them.
    """
    kinds = {name: "good" for name in image["factual"]}
    kinds |= {name: "bad" for name in image["hallucinated"]}
    kinds |= {name: "doubt" for name in image["uncertain"]}
    pieces, end = [], 0
    for name, start, stop in objects:
        if start < end or name not in kinds:
            continue
        pieces.append(prose(text[end:start]))
        pieces.append(
            f'<mark class="{kinds[name]}" title="{escaped(name)}">'
            f"{escaped(text[start:stop])}</mark>"
        )
        end = stop
    pieces.append(prose(text[end:]))
    return "".join(pieces)


def scene(folder: Path, image: Line) -> str:
    """The picture with the detectors' boxes as lines over it, so that they stay sharp.

    Args:
        folder: What the line's path is relative to.
        image: The audit line of the picture.
    """
    try:
        picture = Picture.read(image["image_id"], folder / image["path"]).image
    except ImageReadError as error:  # moved away since the run
        return f'<div class="scene note">{escaped(str(error))}</div>'
    width, height = picture.size
    shapes, labels = [], []
    for name, label, (left, top, right, bottom) in _boxes(image):
        shapes.append(
            f'<rect class="{label}" x="{left:.1f}" y="{top:.1f}" '
            f'width="{right - left:.1f}" height="{bottom - top:.1f}"><title>{escaped(name)}</title>'
            "</rect>"
        )
        css = "" if label == "factual" else ' class="doubtful"'
        place = f"left:{100 * left / width:.1f}%;top:{100 * max(top, height * 0.08) / height:.1f}%"
        labels.append(f'<span{css} style="{place}">{escaped(name)}</span>')
    return (
        f'<div class="scene">{pages.image(picture, image["image_id"])}'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(shapes)}</svg>'
        f"{''.join(labels)}</div>"
    )


def _boxes(image: Line) -> Iterator[tuple[str, str, tuple[float, float, float, float]]]:
    """Name, label and place of every box; boxes that two detectors drew alike come once."""
    labels = {
        name: label for label in ("factual", "uncertain", "hallucinated") for name in image[label]
    }
    seen = set()
    for name, by_detector in image["boxes"].items():
        for boxes in by_detector.values():
            for left, top, right, bottom, *_ in boxes:
                key = (name, round(left), round(top), round(right), round(bottom))
                if key not in seen:
                    seen.add(key)
                    yield name, labels.get(name, "uncertain"), (left, top, right, bottom)
