"""Measures which heads of a model are visual heads, and which are retrieval heads.

    found = visual_heads(model, processor, samples)  # pictures whose objects have places
    found.save("heads.json")
    with mmlm.HeadAblation(heads_file="heads.json", top=20)(model): ...

Answers are generated, not forced: what counts is what the model itself writes. Everything comes
from the run that wrote the answer, by :class:`mmlm.VisualHeads` and :class:`mmlm.RetrievalHeads`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmlm.engine.head_maps import HeadMap
    from mmlm.token_places import Footprints

__all__ = [
    "Grounded",
    "Named",
    "Needle",
    "Observed",
    "observed",
    "retrieval_heads",
    "rouge_1_recall",
    "tokens_of_boxes",
    "tokens_of_mask",
    "visual_heads",
]

#: Part of a token that an object must cover: 10 of 64 pixels, the embedded world's own rule.
LEAST_COVER = 10 / 64
#: Part of a needle's words that an answer must have, so that its run counts.
LEAST_RECALL = 0.5


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


@dataclass(frozen=True)
class Needle:
    """A text with something in it that the answer should repeat.

    Attributes:
        prompt: The text with the question behind it.
        needle: The words that are to be repeated, exactly as they stand in the prompt.
    """

    prompt: str
    needle: str


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
        inputs = _inputs(model, processor, messages)
        answers = _generated(model, processor, inputs, (probe, *beside), max_new_tokens)
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

    _check(threshold)
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
    counted["steps"] = counts.steps
    values = counts.values()
    if tokens:
        values = {**values, "query_norm": norms / tokens}
    return HeadMap(
        kind="visual",
        values=values,
        rank=rank,
        threshold=threshold,
        counted=dict(counted),
        facts=_facts(model, facts),
    )


def retrieval_heads(
    model: Any,
    processor: Any,
    samples: Iterable[Needle],
    *,
    threshold: float = 0.1,
    rank: str = "set_score",
    max_new_tokens: int = 50,
    skip_bad: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> HeadMap:
    """The map of retrieval heads over prompts whose needle the answer repeats.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor.
        samples: The prompts, answered one by one.
        threshold: Retrieval heads have more than this of the ranked value, in (0, 1).
        rank: "set_score", or "score" for the authors' count.
        max_new_tokens: Longest answer. Greedy.
        skip_bad: Whether prompts without their needle are left out and counted.
        facts: More about the run, for the file.

    Returns:
        A map without numbers (NaN) and a warning if no answer repeats its needle.

    Raises:
        ValueError: For a threshold out of range, or a prompt that does not have its needle.
    """
    import torch

    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.head_maps import HeadMap
    from mmlm.engine.head_scores import retrieval_scores
    from mmlm.probes.retrieval_heads import RetrievalHeads

    _check(threshold)
    counted, probe = Counter[str](samples=0, counted=0, without_needle=0, steps=0), RetrievalHeads()
    anatomy = Anatomy(model)
    sums = torch.zeros(2, anatomy.n_layers, anatomy.n_heads, dtype=torch.float64)
    for sample in samples:
        counted["samples"] += 1
        messages = [(sample.prompt, [])]
        inputs = _inputs(model, processor, messages)
        ids = inputs["input_ids"][0].cpu()
        try:
            span = _needle_span(processor, ids.tolist(), sample)
        except ValueError:
            if not skip_bad:
                raise
            counted["without_needle"] += 1
            continue
        ((tokens, records),) = _generated(model, processor, inputs, (probe,), max_new_tokens)
        record = records[probe.measures]
        text = processor.decode(tokens, skip_special_tokens=True)
        if rouge_1_recall(text, sample.needle) <= LEAST_RECALL:
            continue
        counted["counted"] += 1
        counted["steps"] += len(tokens)
        peaks = torch.tensor(record["peaks"])
        sums += torch.stack(retrieval_scores(peaks, ids, span, torch.tensor(tokens)))
    if not counted["counted"]:
        warnings.warn(
            f"None of {counted['samples']} answers repeats its needle: no head was measured.",
            stacklevel=2,
        )
        sums.fill_(math.nan)
    score, once = sums / max(counted["counted"], 1)
    return HeadMap(
        kind="text",
        values={"set_score": once, "score": score},
        rank=rank,
        threshold=threshold,
        counted=dict(counted),
        facts=_facts(model, facts),
    )


def rouge_1_recall(answer: str, needle: str) -> float:
    """Part of a needle's words that an answer has, each as often as it has it; words as written."""
    wanted = Counter(re.findall(r"\w+", needle.lower()))
    said = Counter(re.findall(r"\w+", answer.lower()))
    return (wanted & said).total() / max(wanted.total(), 1)


def _needle_span(processor: Any, ids: list[int], sample: Needle) -> tuple[int, int]:
    """Where a needle stands among the tokens of its prompt.

    By its exact tokens; where the tokenizer joins its ends with what stands beside, by characters.
    """
    from mmlm.engine.head_scores import find_needle

    tokenizer = processor.tokenizer
    for text in (sample.needle, f" {sample.needle}"):
        needle = tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            return find_needle(ids, needle)
        except ValueError:
            continue
    if tokenizer.is_fast:
        from mmlm.inputs import message

        whole = processor.apply_chat_template(
            [message("user", sample.prompt, 0)], add_generation_prompt=True, tokenize=False
        )
        start = whole.find(sample.needle)
        for special in (False, True):
            read = tokenizer(whole, return_offsets_mapping=True, add_special_tokens=special)
            if start >= 0 and read["input_ids"] == ids:
                end = start + len(sample.needle)
                own = [
                    i for i, (a, b) in enumerate(read["offset_mapping"]) if a < end and start < b
                ]
                return own[0], own[-1] + 1
    raise ValueError(f"The needle {sample.needle!r} does not stand in its prompt.")


def _inputs(
    model: Any, processor: Any, messages: Sequence[tuple[str, list[Any]]]
) -> dict[str, Any]:
    from mmlm.inputs import message, prepare

    return prepare(
        processor,
        [[message("user", prompt, len(images))] for prompt, images in messages],
        [images for _, images in messages],
        device=model.device,
        dtype=model.dtype,
    )


def _generated(
    model: Any, processor: Any, inputs: dict[str, Any], probes: Sequence[Any], length: int
) -> list[tuple[list[int], dict[str, Any]]]:
    """New tokens (the end token included) and records of every row."""
    import mmlm
    from mmlm.runner import GenerateSettings, generation_config

    config = generation_config(model, GenerateSettings(max_new_tokens=length))
    with mmlm.attach(model, *probes, processor=processor):
        new = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        tokens = [_ended(row, config.eos_token_id) for row in new.tolist()]
        records = mmlm.measured(model, [len(row) for row in tokens])
    return list(zip(tokens, records, strict=True))


def _ended(tokens: list[int], ends: int | Sequence[int] | None) -> list[int]:
    """The tokens up to the first that ends the answer."""
    own = {ends} if isinstance(ends, int) else set(ends or ())
    last = next((i for i, token in enumerate(tokens) if token in own), len(tokens) - 1)
    return tokens[: last + 1]


def _facts(model: Any, more: Mapping[str, Any] | None) -> dict[str, Any]:
    from mmlm.runner import fingerprint

    return {
        "model": str(getattr(model.config, "_name_or_path", "")),
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        **(more or {}),
    }


def _check(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be above 0 and below 1, got {threshold}")
