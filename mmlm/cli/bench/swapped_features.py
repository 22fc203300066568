"""SwapMix on features: pictures with boxes, of the embedded world or in COCO format."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.run import Task
    from benchmarks.swapmix.donors import AskedBox, BoxedPicture
    from mmlm.cli.pictures import Source

__all__ = ["TYPES", "feature_task"]

TYPES = ("existence", "count")
"""Types of questions whose truth boxes tell."""
_MOST = 5
"""More of a class are not asked for: people do not count them at a glance either."""


def feature_task(
    model: Any,
    processor: Any,
    source: Source,
    folder: Path,
    *,
    types: Sequence[str],
    kinds: Sequence[str],
    swaps: int,
    seed: int,
    progress: bool = False,
) -> Task:
    """The questions about all pictures, with the features of all of them on the disk.

    Args:
        model: The model, whose features are taken.
        processor: Its processor.
        source: The pictures; drawn already.
        folder: Where the features go.
        types: Types of questions.
        kinds: What is exchanged: object, attribute.
        swaps: Swaps of each kind for each object.
        seed: Of the draws.
        progress: Show a progress bar.

    Raises:
        UnsupportedModel: For a family whose way from patches to tokens is not known.
    """
    from benchmarks import swapmix
    from benchmarks.stored import content_hash
    from benchmarks.swapmix.donors import Donors
    from benchmarks.swapmix.features import capture
    from mmlm.runner import fingerprint

    pictures = _boxed(model, processor, source)
    paths = {picture.name: picture.path for picture in pictures}
    known = content_hash([fingerprint(model), [str(path) for path in paths.values()]])
    file = folder / f"features-{known.removeprefix('sha256:')[:16]}.safetensors"
    features = capture(model, processor, paths, file, progress=progress)
    donors = Donors(pictures, features, seed)
    asked = [
        donors.asked(picture, number, question, kinds, swaps)
        for picture in pictures
        for number, question in enumerate(_questions(picture, seed))
        if question.kind in types
    ]
    return swapmix.task(asked, "features", donors=file)


def _boxed(model: Any, processor: Any, source: Source) -> list[BoxedPicture]:
    """The pictures with the tokens that show each of their objects."""
    from benchmarks.swapmix.boxes import read_things
    from benchmarks.swapmix.donors import BoxedPicture
    from mmlm.inputs import load_image
    from mmlm.token_places import footprints

    things = read_things(source.files[0][0])
    pictures = []
    for picture in source.pictures:
        path = source.folder / picture.file_name
        seen = footprints(model, processor, load_image(path).size)
        name = str(picture.image_id)
        pictures.append(BoxedPicture.of(name, path, things[picture.image_id], seen))
    return pictures


def _questions(picture: BoxedPicture, seed: int) -> Iterator[AskedBox]:
    """Whether a present class is there, and an absent one of the same groups; how many of one."""
    from benchmarks.swapmix.donors import AskedBox
    from data_tools.world.categories import NAMES, SUPERCATEGORIES
    from data_tools.world.language import ASK_COUNT, plural, with_article
    from data_tools.world.polling import TEMPLATE

    counts = Counter(thing.name for thing in picture.things)
    if not counts:
        return
    draw = random.Random(f"{seed}|{picture.name}")
    groups = {thing.group for thing in picture.things}
    near = [n for group, first, end in SUPERCATEGORIES if group in groups for n in NAMES[first:end]]
    absent = [name for name in near if name not in counts]
    absent = absent or [name for name in NAMES if name not in counts]
    for name in (draw.choice(sorted(counts)), draw.choice(absent)):
        text = TEMPLATE.format(with_article(name))
        yield AskedBox("existence", name, text, "yes" if name in counts else "no")
    uncounted = {thing.name for thing in picture.things if thing.crowd}
    few = sorted(n for n, count in counts.items() if count <= _MOST and n not in uncounted)
    if few:
        name = draw.choice(few)
        text = ASK_COUNT.format(things=plural(name))
        yield AskedBox("count", name, text, str(counts[name]))
