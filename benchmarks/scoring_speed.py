"""How long scoring takes: captions of a file, and made-up answers to the questions that ship.

    python -m benchmarks.scoring_speed --captions captions.jsonl --output scoring.json

Times are wall-clock seconds on this machine after the tables are loaded, the smallest of several
rounds; bootstrap intervals are timed apart, because they can be switched off.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.base import Scored

__all__ = ["lines_of", "main", "measure"]

_FOLDER = Path("images")


def lines_of(task: Any, answers: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Stored lines with an answer drawn at random for every request of a task."""
    draw = random.Random(seed)
    return [
        {
            "id": item.request.id,
            **item.facts,
            "prompt": item.request.prompt,
            task.answer_field: draw.choice(answers),
            "n_tokens": 1,
        }
        for item in task.items
    ]


def measure(score: Callable[[], Scored], rounds: int = 3) -> dict[str, float]:
    """Seconds of scoring and of the bootstrap intervals on top, the smallest of the rounds.

    Args:
        score: Scores some answers.
        rounds: Number of timed rounds, after one that is not timed.
    """
    result = score()
    scoring, intervals = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        result = score()
        scored = time.perf_counter()
        result.as_json()
        scoring.append(scored - start)
        intervals.append(time.perf_counter() - scored)
    return {"scoring": min(scoring), "intervals": min(intervals)}


def cases(captions: Path | None) -> dict[str, Callable[[], Scored]]:
    """What is timed, by name: the number of answers, then the scorer."""
    from benchmarks import amber, chair, pope
    from benchmarks.amber.data import GENERATIVE, shipped_questions

    asked = [question for question in shipped_questions() if question.type != GENERATIVE]
    denied = lines_of(amber.task(asked, _FOLDER), ("Yes", "No"))
    published = pope.task(pope.published("coco-2023-11"), _FOLDER)
    answered = lines_of(published, ("Yes", "No", "Yes, there is.", "No."))
    found: dict[str, Callable[[], Scored]] = {
        f"{len(denied)} answers, amber/exact/normalised": lambda: amber.score_stored(denied),
        f"{len(answered)} answers, pope/strict": lambda: pope.score_stored(answered),
    }
    if captions is not None:
        told = chair.read_captions(captions)
        truth = chair.truth_of_val2014()
        for variant in chair.VARIANTS:
            found[f"{len(told)} captions, chair/{variant}"] = lambda variant=variant: chair.score(
                told, truth, variant
            )
        # The same texts as descriptions, as many as AMBER asks for.
        shown = [question for question in shipped_questions() if question.type == GENERATIVE]
        texts = [caption["caption"] for caption in told]
        described = lines_of(amber.task(shown, _FOLDER), texts)
        found[f"{len(described)} descriptions, amber/exact"] = lambda: amber.score_stored(described)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring_speed", description=__doc__)
    parser.add_argument("--captions", type=Path, help="captions of COCO val2014, e.g. 500 of them")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    figures = {}
    for name, score in cases(options.captions).items():
        figures[name] = measure(score)
        seconds = figures[name]
        print(f"{name:<44} {seconds['scoring']:6.2f} s, intervals {seconds['intervals']:5.2f} s")
    if options.output:
        from benchmarks.speed import machine

        record = {"machine": machine("cpu"), "seconds": figures}
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
