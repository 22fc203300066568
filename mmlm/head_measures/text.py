"""Retrieval heads: texts with something in them that the answer repeats."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmlm.head_measures.runs import check_threshold, facts_of, generated, inputs_of

if TYPE_CHECKING:
    from mmlm.engine.head_maps import HeadMap

__all__ = ["Needle", "first_line", "retrieval_heads", "rouge_1_recall"]

#: Part of a needle's words that an answer must have, so that its run counts.
LEAST_RECALL = 0.5
#: Words up to this length have no stem.
_SHORT = 3


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
        max_new_tokens: Longest answer. Greedy; it ends at its first line break, too (code).
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
        inputs = inputs_of(model, processor, [(sample.prompt, [])])
        ids = inputs["input_ids"][0].cpu()
        try:
            span = _needle_span(processor, ids.tolist(), sample)
        except ValueError:
            if not skip_bad:
                raise
            counted["without_needle"] += 1
            continue
        ((whole, records),) = generated(model, processor, inputs, (probe,), max_new_tokens)
        tokens = first_line(processor, whole)
        text = processor.decode(tokens, skip_special_tokens=True)
        if rouge_1_recall(text, sample.needle) <= LEAST_RECALL:
            continue
        counted["counted"] += 1
        counted["steps"] += len(tokens)
        peaks = torch.tensor(records[probe.measures]["peaks"][: len(tokens)])
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


def first_line(processor: Any, tokens: Sequence[int]) -> Sequence[int]:
    """The tokens of an answer up to the first that has a line break, with it."""
    breaks = (i for i, token in enumerate(tokens) if "\n" in processor.decode([token]))
    return tokens[: next(breaks, len(tokens)) + 1]


def rouge_1_recall(answer: str, needle: str) -> float:
    """Part of a needle's words that an answer has, each as often as it has it.

    Words of more than three letters count by their stems (Porter's), as in the authors' scorer.
    """
    wanted, said = (_stems(text) for text in (needle, answer))
    return (wanted & said).total() / max(wanted.total(), 1)


def _stems(text: str) -> Counter[str]:
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem
    return Counter(
        stem(word) if len(word) > _SHORT else word for word in re.findall(r"\w+", text.lower())
    )


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
