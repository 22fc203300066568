"""The lines that SENTINEL writes, and what can be told from them about a run.

``pairs.jsonl``, one line per pair of sentences (made by `pair_line`)::

    {"id": "000017-2-0",              picture, step (from 0), number of the pair in its step
     "images": ["world/images/000017.png"],     relative to the output folder
     "image_id": "000017",
     "question": "describe the image .",
     "context": "the caption before this sentence ; no blank at its end",
     "chosen": "a clean sentence .", "rejected": "a sentence with an absent object .",
     "chosen_objects": ["dog"],       canonical names, in order, each once
     "rejected_hallucinated": ["cat"],
     "context_objects": ["dog", "bowl"],
     "step": 2,
     "chosen_final": false,           whether the model ended the caption with this sentence, so
     "rejected_final": false,         that an end token belongs behind it; and with the other one
     "is_final": false,               whether it did with either of them
     "kind": "coherent",              or "agnostic", "empty_context"
     "meta": {"model", "model_rev", "processor_hash", "seed", "detectors", "thresholds",
              "extractor", "version"}}          the same in all lines of a run

``images.jsonl``, the audit, one line per picture (made by `image_line`)::

    {"image_id": "000017", "path": "world/images/000017.png", "question": "...",
     "status": "ok",                  see STATUSES
     "caption": "the sentences that were put together", "n_sentences": 5,
     "factual": ["dog"], "uncertain": [], "hallucinated": ["cat"],    canonical names
     "rejected_by": {"HFDetector": ["cat"]},    by detector, whatever the label became
     "boxes": {"dog": {"HFDetector": [[left, top, right, bottom, score], ...]}},
     "counts": {"dropped_equal": 1, ...},       see COUNTS; only what is not zero
     "steps": [{"candidates": [{"text": "a dog sits .",
                                "class": "coherent",      see CLASSES
                                "objects": [["dog", 2, 5], ...],  name, first character, end
                                "drawn": 3,               samples with this text
                                "finished": true,         only if the caption ended with it
                                "pronoun": true,          only if it is about an unnamed "it"
                                "chosen": [0], "rejected": [1]},  numbers of pairs; only if any
                               ...],
                "ended": 1,           samples that were empty: the model ended the caption
                "next": 4},           candidate that extended the context; null ends the picture
               ...],                  the last step may have no candidates: the caption ended
     "error": "why"}                  only with unreadable_image, model_error and failed detectors

The context of a step is the texts of the earlier steps' ``next`` candidates. Pictures that cannot
be read have ``image_id``, ``path``, ``question``, ``status`` and ``error`` only. How long a picture
took stands in ``done.jsonl`` (``seconds``) and not here: equal runs write equal lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from data_tools.sentinel.labels import Knowledge
from data_tools.sentinel.pairs import CLASSES, Candidate, Pair

__all__ = [
    "CLASSES",
    "COUNTS",
    "FAILED",
    "STATUSES",
    "Line",
    "image_line",
    "pair_line",
    "step_line",
    "unreadable_line",
]

Line: TypeAlias = dict[str, Any]

STATUSES = {
    "ok": "at least one pair",
    "no_pairs": "nothing to pair",
    "no_objects": "no candidate named an object",
    "skipped_uncertain": "no pair, because the detectors agreed about no sentence or failed",
    "suspicious_image": "no detector found anything that was named; pairs are withheld",
    "unreadable_image": "the picture cannot be read",
    "model_error": "the generator could not go on; earlier pairs of the picture stand",
}
FAILED = ("unreadable_image", "model_error")
"""Statuses that count as failures of the run."""

COUNTS = {
    "dropped_equal": "pairs of two equal sentences, or an empty one",
    "dropped_pronoun": "sentences about an unnamed it or they, which are not paired",
    "withheld_pairs": "pairs of a suspicious picture",
    "detector_failures": "names that a detector failed on; they count as uncertain",
}


def pair_line(
    image_id: str,
    number: int,
    pair: Pair,
    *,
    image: str,
    question: str,
    context: str,
    context_objects: Sequence[str],
    step: int,
    meta: Mapping[str, Any],
) -> Line:
    """A line of ``pairs.jsonl``; see the module's docstring."""
    return {
        "id": f"{image_id}-{step}-{number}",
        "images": [image],
        "image_id": image_id,
        "question": question,
        "context": context,
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
        "chosen_objects": list(pair.chosen.names),
        "rejected_hallucinated": list(pair.rejected.hallucinated),
        "context_objects": list(context_objects),
        "step": step,
        "chosen_final": pair.chosen.finished,
        "rejected_final": pair.rejected.finished,
        "is_final": pair.chosen.finished or pair.rejected.finished,
        "kind": pair.kind,
        "meta": meta,
    }


def step_line(
    candidates: Sequence[Candidate],
    pairs: Mapping[int, Pair],
    *,
    ended: int,
    chosen_next: Candidate | None,
) -> Line:
    """What happened in one step, for the audit.

    Args:
        candidates: All of them, in the order drawn.
        pairs: The pairs that were made, by their number.
        ended: Empty samples.
        chosen_next: What extended the context.
    """
    lines = []
    for candidate in candidates:
        line: Line = {
            "text": candidate.text,
            "class": candidate.kind,
            "objects": [[m.canonical, m.start, m.end] for m in candidate.mentions],
            "drawn": candidate.drawn,
        }
        if candidate.finished:
            line["finished"] = True
        if candidate.pronoun:
            line["pronoun"] = True
        if chosen := [k for k, pair in pairs.items() if pair.chosen is candidate]:
            line["chosen"] = chosen
        if rejected := [k for k, pair in pairs.items() if pair.rejected is candidate]:
            line["rejected"] = rejected
        lines.append(line)
    position = next((i for i, one in enumerate(candidates) if one is chosen_next), None)
    return {"candidates": lines, "ended": ended, "next": position}


def image_line(
    image_id: str,
    *,
    image: str,
    question: str,
    status: str,
    sentences: Sequence[str],
    knowledge: Knowledge,
    counts: Mapping[str, int],
    steps: Iterable[Line],
    errors: Sequence[str] = (),
) -> Line:
    """A line of ``images.jsonl``; see the module's docstring."""
    line: Line = {
        "image_id": image_id,
        "path": image,
        "question": question,
        "status": status,
        "caption": " ".join(sentences),
        "n_sentences": len(sentences),
        "factual": knowledge.of("factual"),
        "uncertain": knowledge.of("uncertain"),
        "hallucinated": knowledge.of("hallucinated"),
        "rejected_by": knowledge.rejected_by(),
        "boxes": knowledge.boxes(),
        "counts": {name: count for name, count in counts.items() if count},
        "steps": list(steps),
    }
    return line | {"error": "; ".join(errors)} if errors else line


def unreadable_line(image_id: str, *, image: str, question: str, error: str) -> Line:
    """A line of ``images.jsonl`` for a picture that cannot be read."""
    return {
        "image_id": image_id,
        "path": image,
        "question": question,
        "status": "unreadable_image",
        "error": error,
    }
