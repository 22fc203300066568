"""What a method leaves of a model's language: how likely the words are that name no object.

    counts = text_control(model, processor, scenes, methods)

The model reads a true caption of every picture behind the usual question. Counted is every token of
it but those of objects (the words that CHAIR counts): how many, and the sum of their natural
log-probabilities. A method that is said to touch the sight of a model should leave these alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from measure_embedded import QUESTION, picture

import mmlm
from benchmarks import chair
from benchmarks.base import CountTable, Ratio
from data_tools.world import Scene, caption
from mmlm.inputs import message, prepare

if TYPE_CHECKING:
    import torch

RATIOS = {"log_probability": Ratio(("log_probability",), ("words",))}


def text_control(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    methods: Sequence[mmlm.Method] = (),
    batch_size: int = 50,
) -> CountTable:
    """The counts of every picture; the metric is the mean log-probability of a word, in nats.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor, with a fast tokenizer.
        scenes: The pictures.
        methods: What is attached.
        batch_size: Pictures that are read at a time.
    """
    import torch

    rows = []
    with torch.inference_mode(), mmlm.attach(model, *methods) if methods else nullcontext():
        for start in range(0, len(scenes), batch_size):
            rows += _batch(model, processor, scenes[start : start + batch_size])
    return CountTable.build([s.index for s in scenes], rows, RATIOS)


def _batch(model: Any, processor: Any, scenes: Sequence[Scene]) -> Iterator[dict[str, float]]:
    texts = [true_caption(s) for s in scenes]
    inputs = prepare(
        processor,
        [[message("user", QUESTION, 1)]] * len(scenes),
        [[picture(s)] for s in scenes],
        begun=[f" {text}" for text in texts],
    )
    logits = model(**inputs).logits
    for s, text, ids, own in zip(scenes, texts, inputs["input_ids"], logits, strict=True):
        kept = _kept(processor.tokenizer, s, text, ids)
        likely = own[-len(kept) - 1 : -1].double().log_softmax(-1)
        chosen = likely.gather(-1, ids[-len(kept) :, None])[:, 0]
        yield {"words": int(kept.sum()), "log_probability": float(chosen[kept].sum())}


def _kept(tokenizer: Any, truth: Scene, text: str, ids: torch.Tensor) -> torch.Tensor:
    """Bool [tokens of the caption]: those that are no part of an object's name.

    Raises:
        RuntimeError: If the prompt does not end with the tokens of the caption.
    """
    import torch

    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if ids[-len(read["input_ids"]) :].tolist() != read["input_ids"]:
        raise RuntimeError(f"the prompt of picture {truth.index} does not end with its caption")
    record = {"image_id": truth.index, "caption": text}
    (scored,) = chair.score([record], {truth.index: truth.classes}).per_caption
    names = [(start, end) for start, end, _ in scored.places()]
    outside = [
        not any(a < end and start < b for start, end in names) for a, b in read["offset_mapping"]
    ]
    return torch.tensor(outside)


def true_caption(truth: Scene) -> str:
    """A caption of everything in the picture, the same at every call."""
    clean = replace(truth, config=replace(truth.config, label_noise=0.0))
    return caption(clean, np.random.default_rng(truth.index))
