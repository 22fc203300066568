"""Retrieval heads: texts with something in them that the answer repeats."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmlm.head_measures.runs import check_threshold, facts_of, generated, inputs_of

if TYPE_CHECKING:
    from mmlm.engine.head_maps import HeadMap

__all__ = ["Needle", "retrieval_heads", "rouge_1_recall"]

#: Part of a needle's words that an answer must have, so that its run counts.
LEAST_RECALL = 0.5


@dataclass(frozen=True)
class Needle:
    """A text with something in it that the answer should repeat.

    Attributes:
        prompt: The text with the question behind it.
        needle: The words that are to be repeated, exactly as they stand in the prompt.
    """

    prompt: str
    needle: str


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

    check_threshold(threshold)
    counted, probe = Counter[str](samples=0, counted=0, without_needle=0, steps=0), RetrievalHeads()
    anatomy = Anatomy(model)
    sums = torch.zeros(2, anatomy.n_layers, anatomy.n_heads, dtype=torch.float64)
    for sample in samples:
        counted["samples"] += 1
        messages = [(sample.prompt, [])]
        inputs = inputs_of(model, processor, messages)
        ids = inputs["input_ids"][0].cpu()
        try:
            span = _needle_span(processor, ids.tolist(), sample)
        except ValueError:
            if not skip_bad:
                raise
            counted["without_needle"] += 1
            continue
        ((tokens, records),) = generated(model, processor, inputs, (probe,), max_new_tokens)
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
        facts=facts_of(model, facts),
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
