"""Visual heads: answers about pictures whose objects have places, and where heads looked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError
from mmlm.head_measures.runs import check_threshold, facts_of, generated, inputs_of

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmlm.engine.head_maps import HeadMap
    from mmlm.token_places import Footprints

__all__ = [
    "Grounded",
    "Named",
    "Observed",
    "observed",
    "tokens_of_boxes",
    "tokens_of_mask",
    "visual_heads",
]

#: Part of a token that an object must cover: 10 of 64 pixels, the embedded world's own rule.
LEAST_COVER = 10 / 64


@dataclass(frozen=True, eq=False)
class Grounded:
    """A picture, a question, and where its objects are.

    Attributes:
        image: The picture.
        prompt: The question.
        masks: bool [height, width] by COCO name; all pixels of all instances.
        boxes: Left, top, right and bottom in pixels, of every instance; for objects without mask.
    """

    image: Image.Image
    prompt: str
    masks: Mapping[str, Any] = field(default_factory=dict)
    boxes: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """Objects in the picture."""
        return frozenset({*self.masks, *self.boxes})

    def regions(self, places: Footprints) -> dict[str, tuple[int, ...]]:
        """Image tokens of every object, by its name; objects that no token shows are left out."""
        found = {name: tokens_of_mask(places, mask) for name, mask in self.masks.items()}
        for name, boxes in self.boxes.items():
            if name not in found:
                found[name] = tokens_of_boxes(places, boxes, self.image.size)
        return {name: tokens for name, tokens in sorted(found.items()) if tokens}


@dataclass(frozen=True)
class Named:
    """An object that an answer names.

    Attributes:
        name: Its COCO name.
        step: Number of the word's first token.
        true: Whether it is in the picture.
        region: Number of its region in the record; None where it has none.
    """

    name: str
    step: int
    true: bool
    region: int | None


@dataclass(frozen=True, eq=False)
class Observed:
    """An answer about a picture, with what the heads saw meanwhile.

    Attributes:
        text: The answer.
        named: The objects that it names, in order.
        record: Of :class:`mmlm.VisualHeads`, with steps.
        norms: Of :class:`mmlm.QueryNorms`, if it was asked for.
    """

    text: str
    named: tuple[Named, ...]
    record: Mapping[str, Any]
    norms: Mapping[str, Any] | None = None


def tokens_of_mask(places: Footprints, mask: Any) -> tuple[int, ...]:
    """Image tokens of which a mask (bool [height, width]) covers enough."""
    import torch
    from torch.nn import functional

    pixels = torch.as_tensor(mask).float()[None, None]
    cells = functional.interpolate(pixels, size=places.shape, mode="area")[0, 0]
    covered = torch.einsum("tr,tc,rc->t", places.down, places.across, cells)
    return _numbers(covered > LEAST_COVER - 1e-4)


def tokens_of_boxes(
    places: Footprints, boxes: Sequence[Sequence[float]], size: tuple[int, int]
) -> tuple[int, ...]:
    """Image tokens whose centre lies in one of some boxes, given in pixels of the picture.

    Args:
        places: Where the tokens lie.
        boxes: Left, top, right, bottom.
        size: Width and height of the picture.
    """
    import torch

    rows, columns = places.shape
    right = places.across @ ((torch.arange(columns) + 0.5) * (size[0] / columns))
    down = places.down @ ((torch.arange(rows) + 0.5) * (size[1] / rows))
    inside = torch.zeros(places.tokens, dtype=torch.bool)
    for left, top, end, bottom in boxes:
        inside |= (left <= right) & (right < end) & (top <= down) & (down < bottom)
    return _numbers(inside & (places.down.sum(-1) > 0))


def _numbers(chosen: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in chosen.nonzero()[:, 0])


def observed(
    model: Any,
    processor: Any,
    samples: Iterable[Grounded],
    *,
    max_new_tokens: int = 84,
    batch_size: int = 16,
    query_norms: bool = False,
) -> Iterator[Observed]:
    """Answers, and what every head saw while each of their words was written.

    Args:
        model: A Hugging Face LVLM; attached methods act.
        processor: Its processor.
        samples: The pictures.
        max_new_tokens: Longest answer. Greedy.
        batch_size: Pictures at once.
        query_norms: Whether the sizes of heads' queries are measured, too.

    Raises:
        UnsupportedModel: If it is not known which token shows which part of a picture.
        InputError: If a picture takes another number of tokens than it does alone.
    """
    from mmlm.probes.query_norms import QueryNorms
    from mmlm.probes.visual_heads import VisualHeads
    from mmlm.token_places import footprints

    rest, beside = iter(samples), (QueryNorms(),) if query_norms else ()
    while batch := tuple(islice(rest, batch_size)):
        regions = [one.regions(footprints(model, processor, one.image.size)) for one in batch]
        probe = VisualHeads(regions=tuple(tuple(row.values()) for row in regions), steps=True)
        messages = [(one.prompt, [one.image]) for one in batch]
        inputs = inputs_of(model, processor, messages)
        answers = generated(model, processor, inputs, (probe, *beside), max_new_tokens)
        for sample, row, (tokens, records) in zip(batch, regions, answers, strict=True):
            record = records[probe.measures]
            places = footprints(model, processor, sample.image.size)
            if record["image_tokens"] != places.tokens:
                raise InputError(
                    f"A picture takes {record['image_tokens']} image tokens in a prompt and "
                    f"{places.tokens} alone.",
                    advice="Its regions are not known; use a family that `mmlm inspect` can draw.",
                )
            text, named = _named(processor, tokens, sample.names, list(row))
            yield Observed(text, named, record, records.get(QueryNorms.measures))


def _named(
    processor: Any, tokens: Sequence[int], names: frozenset[str], regions: list[str]
) -> tuple[str, tuple[Named, ...]]:
    """The text of an answer and the objects in it; a word counts at its first token."""
    from mmlm.show.looking import token_spans
    from mmlm.show.words import pieces

    text, spans = token_spans(processor, tokens)
    found = []
    for piece in pieces(text, names):
        name = piece.name
        if not name:
            continue
        step = next(i for i, (a, b) in enumerate(spans) if a < b and piece.start < b)
        region = regions.index(name) if name in regions else None
        found.append(Named(name, step, name in names, region))
    return text, tuple(found)


def visual_heads(
    model: Any,
    processor: Any,
    samples: Iterable[Grounded],
    *,
    threshold: float = 0.1,
    rank: str = "hit_rate",
    max_new_tokens: int = 84,
    batch_size: int = 16,
    facts: Mapping[str, Any] | None = None,
) -> HeadMap:
    """The map of visual heads over the words that name something whose place is known.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor.
        samples: The pictures.
        threshold: Visual heads have more than this of the ranked value, in (0, 1).
        rank: By which value heads are ranked. "query_norm": the size of their queries, a baseline
            that knows nothing of pictures, is measured only where it ranks.
        max_new_tokens: Longest answer. Greedy.
        batch_size: Pictures at once.
        facts: More about the run, for the file.

    Raises:
        ValueError: For a threshold out of range, or if no answer names anything with a place.
        MmlmError: As :func:`observed`.
    """
    import torch

    from mmlm.engine.head_maps import HeadMap
    from mmlm.engine.head_scores import RegionCounts
    from mmlm.probes.visual_heads import scored

    check_threshold(threshold)
    counts, counted = RegionCounts(), Counter[str]()
    norms, tokens = torch.zeros(()), 0
    runs = observed(
        model,
        processor,
        samples,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        query_norms=rank == "query_norm",
    )
    for one in runs:
        if one.norms is not None:
            n = one.norms["tokens"]
            norms = norms + n * torch.tensor(one.norms["shares"], dtype=torch.float64)
            tokens += n
        words = [(w.step, w.region) for w in one.named if w.region is not None]
        counts = counts.add(RegionCounts.of(scored(one.record, words)))
        counted["samples"] += 1
        counted["counted"] += bool(words)
    values = counts.values()
    counted["steps"] = counts.steps
    # Rows, head by head, that say nothing of how attention is spread over the image.
    counted["left_out_of_focus"] = int((counts.steps - counts.focused).sum())
    if tokens:
        values = {**values, "query_norm": norms / tokens}
    return HeadMap(
        kind="visual",
        values=values,
        rank=rank,
        threshold=threshold,
        counted=dict(counted),
        facts=facts_of(model, facts),
    )
