"""Conflict samples to find heads with: of the embedded world, or questions about COCO pictures."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mmlm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from benchmarks.coco import Picture
    from decoding.ph3 import Conflicts
    from mmlm.inputs import ImageSource

__all__ = ["Batches", "Sample", "SampleOptions", "answer_token", "samples"]

#: Pictures of a COCO file among which donors are looked for.
_POOL = 4000


@dataclass(frozen=True)
class SampleOptions:
    """Which conflict samples are shown.

    Attributes:
        instances: An instances*.json in COCO format: yes/no questions about its pictures. Take
            train2014, and never the pictures of an evaluation. Without it: the embedded world.
        images: Folder of those pictures; default: that of the file.
        kind: Kinds of samples of the world (repeatable): presence, caption, theme. Default: all.
        count: Scenes of each kind, or pictures.
        first: Number of the first scene: other numbers are other scenes.
        seed: Seed of the scenes, or of the choice of pictures.
        corruption: What the other picture is: `donor`, one without what is asked for; `mean`: every
            image feature is replaced by the mean one.
        prior: `neutral`: memory heads are found from captions without the words that name the
            scene.
    """

    instances: Path | None = field(default=None, metadata={"alias": "--instances"})
    images: Path | None = field(default=None, metadata={"alias": "--images"})
    kind: tuple[Literal["presence", "caption", "theme"], ...] = field(
        default=(), metadata={"alias": "--kind"}
    )
    count: int = field(default=300, metadata={"alias": "--count"})
    first: int = 0
    seed: int = field(default=0, metadata={"alias": "--seed"})
    corruption: Literal["donor", "mean"] = field(
        default="donor", metadata={"alias": "--corruption"}
    )
    prior: Literal["as_is", "neutral"] = field(default="as_is", metadata={"alias": "--prior"})

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: If one is out of range, or options exclude each other.
        """
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.seed < 0 or self.first < 0:
            raise ValueError(f"seed and first must not be negative, got {self.seed}, {self.first}")
        if self.instances is not None and (self.kind or self.prior == "neutral"):
            raise ValueError("kind and prior are for the embedded world, not for --instances")


class Sample(NamedTuple):
    """One conflict, in words and pictures."""

    kind: str
    picture: ImageSource
    donor: ImageSource
    question: str
    memory: str
    """The answer that the scene lets one expect."""
    image: str
    """The answer that the picture gives."""
    begun: str = ""
    neutral: str = ""
    yes_no: bool = True


def samples(options: SampleOptions) -> list[Sample]:
    """The samples that were asked for.

    Raises:
        InputError: If the file of COCO's is missing or damaged, or has too few pictures.
    """
    return _of_world(options) if options.instances is None else _of_coco(options)


def _of_world(options: SampleOptions) -> list[Sample]:
    from PIL import Image

    from data_tools.world import render
    from data_tools.world.conflicts import KINDS, conflicts

    def picture(truth: Any) -> Image.Image:
        return Image.fromarray(render(truth).image)

    return [
        Sample(
            one.kind,
            picture(one.scene),
            picture(one.donor),
            one.question,
            one.memory,
            one.image,
            one.begun,
            one.neutral if options.prior == "neutral" else "",
            yes_no=not one.begun,
        )
        for one in conflicts(options.kind or KINDS, options.seed, options.first, options.count)
    ]


def _of_coco(options: SampleOptions) -> list[Sample]:
    """Per picture one absent object that its own often stand beside, or one that hardly belongs.

    The donor shares the most objects otherwise.
    """
    from benchmarks.coco import read_instances

    assert options.instances is not None
    folder = options.images or options.instances.parent
    usable = [one for one in read_instances(options.instances) if len(one.objects) > 1]
    if len(usable) < 2:
        raise InputError(
            f"{options.instances} has {len(usable)} pictures with two objects or more.",
            advice="Give a file with more pictures.",
        )
    together = _together(usable)
    random.Random(options.seed).shuffle(usable)
    asked, pool = usable[options.first :][: options.count], usable[:_POOL]
    found = (_question(one, together, pool, folder, i % 2 == 0) for i, one in enumerate(asked))
    return [one for one in found if one is not None]


def _together(pictures: Sequence[Picture]) -> dict[str, Counter[str]]:
    """How often objects stand in one picture; an object with itself: how often it is there."""
    counts: dict[str, Counter[str]] = {}
    for picture in pictures:
        for name in picture.objects:
            counts.setdefault(name, Counter()).update(picture.objects)
    return counts


def _question(
    one: Picture,
    together: Mapping[str, Counter[str]],
    pool: Sequence[Picture],
    folder: Path,
    absent: bool,
) -> Sample | None:
    def belongs(name: str) -> float:
        """How many of its neighbours one would expect beside each of the picture's objects."""
        others = [other for other in one.objects if other != name]
        return sum(together[other][name] / together[other][other] for other in others)

    if absent:
        names = [name for name in together if name not in one.objects]
        asked = max(names, key=belongs, default=None)
    else:
        asked = min(one.objects, key=belongs)
    donors = [p for p in pool if (asked in p.objects) == absent and p.image_id != one.image_id]
    if asked is None or not donors:
        return None
    wanted = set(one.objects) ^ {asked}
    donor = min(donors, key=lambda p: len(wanted ^ set(p.objects)))
    article = "an" if asked[0] in "aeiou" else "a"
    answers = ("Yes", "No") if absent else ("No", "Yes")
    question = f"Is there {article} {asked} in the image? Please answer yes or no."
    return Sample("coco", folder / one.file_name, folder / donor.file_name, question, *answers)


def answer_token(processor: Any, text: str, word: str) -> int:
    """First token of a word that follows a prompt's text.

    Args:
        processor: The model's processor.
        text: The prompt after templating.
        word: The word.
    """
    blank = "" if not text or text[-1].isspace() else " "
    before, after = (
        processor.tokenizer(whole, add_special_tokens=False)["input_ids"]
        for whole in (text, text + blank + word)
    )
    same = 0
    while same < min(len(before), len(after) - 1) and before[same] == after[same]:
        same += 1
    return int(after[same])


class Batches:
    """Samples as inputs of a model, made anew each time they are gone through.

    Args:
        model: The model.
        processor: Its processor.
        found: The samples.
        options: How the other picture is made.
        size: Samples at once.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        found: Sequence[Sample],
        options: SampleOptions,
        size: int,
    ) -> None:
        self._model, self._processor, self._found = model, processor, list(found)
        self._options, self._size = options, size

    def __len__(self) -> int:
        return -(-len(self._found) // self._size)

    def only(self, numbers: Sequence[int]) -> Batches:
        """Some of the samples, in this order."""
        found = [self._found[i] for i in numbers]
        return Batches(self._model, self._processor, found, self._options, self._size)

    def __iter__(self) -> Iterator[Conflicts]:
        for start in range(0, len(self._found), self._size):
            yield self._batch(self._found[start : start + self._size])

    def _batch(self, found: Sequence[Sample]) -> Conflicts:
        import torch

        from decoding.ph3 import Conflicts
        from mmlm.inputs import load_image

        pictures = [load_image(one.picture) for one in found]
        begun = [one.begun for one in found]
        neutral = [one.neutral or one.begun for one in found]
        donor = None
        if self._options.corruption == "donor":
            # Of the same size, so that as many positions show it.
            others = [
                load_image(one.donor).resize(picture.size)
                for one, picture in zip(found, pictures, strict=True)
            ]
            donor = self._prepare(found, others, begun)
        texts = [self._text(one) for one in found]

        def tokens(words: Sequence[str]) -> torch.Tensor:
            pairs = zip(texts, words, strict=True)
            return torch.tensor([answer_token(self._processor, t, w) for t, w in pairs])

        return Conflicts(
            inputs=self._prepare(found, pictures, begun),
            donor=donor,
            neutral=self._prepare(found, pictures, neutral) if neutral != begun else None,
            memory=tokens([one.memory for one in found]),
            image=tokens([one.image for one in found]),
            kinds=tuple(one.kind for one in found),
            yes_no=tuple(one.yes_no for one in found),
        )

    def _text(self, one: Sample) -> str:
        from mmlm.inputs import message, render

        return render(self._processor, [message("user", one.question, 1)]) + _spaced(one.begun)

    def _prepare(
        self, found: Sequence[Sample], pictures: Sequence[Image.Image], begun: Sequence[str]
    ) -> dict[str, Any]:
        from mmlm.inputs import message, prepare

        return prepare(
            self._processor,
            [[message("user", one.question, 1)] for one in found],
            [[picture] for picture in pictures],
            device=self._model.device,
            dtype=self._model.dtype,
            begun=[_spaced(text) for text in begun],
        )


def _spaced(text: str) -> str:
    return f" {text}" if text else ""
