"""SwapMix in pictures: scenes of the embedded world, painted again with one object exchanged."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.progress import progress_bar

if TYPE_CHECKING:
    from benchmarks.swapmix import Asked, Variant
    from data_tools.world import Scene
    from data_tools.world.swapping import SwapQuestion

__all__ = ["painted_questions"]


def painted_questions(
    folder: Path,
    split: str,
    seed: int,
    count: int,
    *,
    types: Sequence[str],
    kinds: Sequence[str],
    swaps: int,
    progress: bool = False,
) -> list[Asked]:
    """The questions about the first scenes of a split, with every changed picture on the disk.

    A picture's name says what is in it, so one that is there already is the right one.

    Args:
        folder: Where the pictures go.
        split: Split of the world.
        seed: Its seed.
        count: Number of scenes.
        types: Types of questions.
        kinds: What is changed: object, attribute, noise, clutter.
        swaps: Changes of each kind, for objects and attributes per object.
        progress: Show a progress bar.
    """
    from data_tools.world import SPLITS, scene
    from data_tools.world.swapping import swap_questions

    folder.mkdir(parents=True, exist_ok=True)
    asked = []
    with progress_bar(count, progress, "Swapping") as advance:
        for index in range(count):
            truth = scene(SPLITS[split], seed, index, split)
            for number, question in enumerate(swap_questions(truth)):
                if question.kind in types:
                    asked.append(_asked(folder, truth, number, question, kinds, swaps))
            advance(1, "")
    return asked


def _asked(
    folder: Path,
    scene: Scene,
    number: int,
    question: SwapQuestion,
    kinds: Sequence[str],
    swaps: int,
) -> Asked:
    from benchmarks.swapmix import Asked
    from data_tools.world.swapping import draw_swaps, truth_of

    variants: list[Variant] = []
    skipped = 0
    for kind in ("object", "attribute"):
        if kind in kinds:
            drawn = draw_swaps(scene, question, kind, swaps)
            variants += [_exchanged(folder, kind, one) for one in drawn.swaps]
            skipped += drawn.skipped
    for kind in ("noise", "clutter"):
        if kind in kinds:
            variants += _repainted(folder, scene, kind, swaps)
    return Asked(
        id=f"{scene.index + 1}-{question.kind}-{number}",
        kind=question.kind,
        text=question.text,
        answer="" if question.kind == "caption" else truth_of(scene, question),
        picture=str(scene.index + 1),
        image=_paint(folder / f"{scene.index + 1:06d}.png", scene),
        objects=tuple(sorted(scene.classes)),
        variants=tuple(variants),
        skipped=skipped,
    )


def _exchanged(folder: Path, kind: str, swap: Any) -> Variant:
    """A picture with one object exchanged; its name holds all that is known of the new one."""
    from benchmarks.swapmix import Variant

    scene = swap.scene
    parts = (
        scene.index + 1,
        swap.instance,
        *(int(part) for part in scene.instances[swap.instance]),
    )
    path = folder / ("-".join(str(part) for part in parts) + ".png")
    return Variant(
        swap=kind,
        image=_paint(path, scene),
        note=f"{swap.old} -> {swap.new}" if kind == "object" else f"another {swap.old}",
        near=swap.near,
        objects=tuple(sorted(scene.classes)),
        facts={"swapped": swap.old, "touched": list(swap.touched)},
    )


def _repainted(folder: Path, scene: Scene, kind: str, count: int) -> Iterator[Variant]:
    """Pictures in which only noise or clutter differs."""
    from benchmarks.swapmix import Variant

    for number in range(1, count + 1):
        path = folder / f"{scene.index + 1}-{kind}-{number}.png"
        image = _paint(path, scene, **{kind: number})
        yield Variant(kind, image, f"other {kind} {number}", objects=tuple(sorted(scene.classes)))


def _paint(path: Path, scene: Scene, **changes: int) -> Path:
    """Paints a picture if it is not there; it is there whole or not at all."""
    if path.exists():
        return path
    from PIL import Image

    from data_tools.world import render

    buffer = io.BytesIO()
    Image.fromarray(render(scene, **changes).image).save(buffer, "PNG")
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(buffer.getvalue())
    os.replace(part, path)
    return path
