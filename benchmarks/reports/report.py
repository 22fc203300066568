"""The demo's report: plain decoding and methods side by side, in numbers and in pictures.

`compare` turns scored answers into rows of numbers with intervals and paired changes; `terminal`
shows them as one table, `benchmarks.reports.page` as one HTML file without network or scripts.
A change is called better or worse only if its paired 95 % interval excludes zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks import chair as chair_module
from benchmarks.reports.rows import (
    SIDE_BY_SIDE,
    Row,
    Verdict,
    change_text,
    line_table,
    make_row,
    side_by_side,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from rich.table import Table

    from benchmarks.base import Direction
    from benchmarks.chair import ChairResult
    from benchmarks.pope import PopeSummary
    from benchmarks.run import Speed

__all__ = [
    "Conclusion",
    "MethodRun",
    "as_json",
    "compare",
    "conclusions",
    "relative_time",
    "terminal",
]


@dataclass(frozen=True)
class MethodRun:
    """What one way of decoding gave.

    Attributes:
        label: Short name, as the user wrote it; "plain" for no method.
        text: The method's full text form, empty for plain decoding.
        chair: Scored captions.
        pope: Scored yes/no answers.
        speed: How long the captions took.
    """

    label: str
    text: str
    chair: ChairResult = field(repr=False)
    pope: PopeSummary = field(repr=False)
    speed: Speed


_CHAIR: tuple[tuple[str, str, Direction], ...] = (
    ("chair_s", "CHAIR_s: captions that invent", "lower"),
    ("chair_i", "CHAIR_i: invented mentions", "lower"),
    ("recall", "Recall: true objects named", "higher"),
    ("f1", "F1 of named objects", "higher"),
    ("mean_length", "Words per caption", "none"),
    ("duplicate_sentence_share", "Repeated sentences", "lower"),
)


def compare(
    runs: Sequence[MethodRun],
    themes: Mapping[int, Collection[str]] | None = None,
    *,
    seed: int = 0,
) -> list[Row]:
    """All numbers of all runs, with paired changes against the first.

    Args:
        runs: Plain decoding, then the methods, on the same pictures.
        themes: Objects that belong to each picture's scene, if known.
        seed: Seed of the bootstrap.
    """
    rows = [
        make_row("Captions", name, label, direction, [r.chair.table for r in runs], seed=seed)
        for name, label, direction in _CHAIR
    ]
    if themes:
        tables = [chair_module.theme_share(run.chair, themes) for run in runs]
        label = "Invented objects that fit the scene"
        rows.append(make_row("Captions", "theme_share", label, "none", tables, seed=seed))
    for split in runs[0].pope.splits:
        tables = [run.pope.splits[split].table for run in runs]
        label = f"Accuracy, {split}"
        rows.append(make_row("Questions", "accuracy", label, "higher", tables, seed=seed))
    tables = [run.pope.table for run in runs]
    rows.append(make_row("Questions", "mean_f1", "Mean F1", "higher", tables, seed=seed))
    rows.append(
        make_row("Questions", "mean_yes_ratio", "Answers that are yes", "none", tables, seed=seed)
    )
    return rows


def relative_time(run: MethodRun, plain: MethodRun) -> float | None:
    """Time per caption, as a multiple of plain decoding; None if either was not timed."""
    own, base = run.speed.seconds_per_answer, plain.speed.seconds_per_answer
    return own / base if own is not None and base else None


@dataclass(frozen=True)
class Conclusion:
    """What the captions allow to say about one method.

    Attributes:
        label: The method.
        effect: In words.
        details: The changes it rests on.
        verdict: The effect on invention.
    """

    label: str
    effect: str
    details: str
    verdict: Verdict

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.label} {self.effect} ({self.details})."


def conclusions(runs: Sequence[MethodRun], rows: Sequence[Row]) -> list[Conclusion]:
    """One honest sentence per method."""
    told = {row.name: row for row in rows}
    shown = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "recall", "mean_f1": "POPE F1"}
    results = []
    for index, run in enumerate(runs[1:], start=1):
        cells = {name: told[name].cells[index] for name in shown}
        details = "; ".join(f"{shown[n]} {change_text(told[n], cell)}" for n, cell in cells.items())
        verdicts = {cells["chair_i"].verdict, cells["chair_s"].verdict}
        verdict: Verdict = "within noise"
        effect = "shows no clear effect on invention here"
        if "better" in verdicts and "worse" not in verdicts:
            verdict, effect = "better", "invents less than plain decoding"
            if cells["recall"].verdict == "worse":
                effect += ", but also names fewer true objects"
        elif "worse" in verdicts and "better" not in verdicts:
            verdict, effect = "worse", "invents more than plain decoding: it does not help here"
        elif "too few pictures" in verdicts:
            effect = "was tried on too few pictures to tell"
        if (answers := cells["mean_f1"].verdict) in ("better", "worse"):
            effect += f"; its yes/no answers are {answers}"
        results.append(Conclusion(run.label, effect, details, verdict))
    return results


def terminal(runs: Sequence[MethodRun], rows: Sequence[Row], title: str) -> Table:
    """All numbers as one table for the terminal; of many runs the main ones, a line each."""
    labels = [run.label for run in runs]
    times = [relative_time(run, runs[0]) for run in runs]
    if len(runs) > SIDE_BY_SIDE:
        shown = ["-" if time is None else f"{time:.2f}" for time in times]
        caption = _CAPTION.replace("second lines", "second numbers")
        caption += " Intervals are in the report."
        return line_table(labels, rows, _MAIN, title=title, caption=caption, last=("Time", shown))
    table = side_by_side(labels, rows, title=title, caption=_CAPTION)
    table.add_section()
    table.add_row(
        "Time per caption, plain = 1", *("-" if t is None else f"[bold]{t:.2f}[/]" for t in times)
    )
    return table


_MAIN = {
    "chair_s": "CHAIR_s ↓",
    "chair_i": "CHAIR_i ↓",
    "recall": "Recall ↑",
    "mean_length": "Words",
    "duplicate_sentence_share": "Repeated ↓",
    "mean_f1": "POPE F1 ↑",
}
_CAPTION = (
    "Percent with 95 % bootstrap intervals over pictures; second lines: paired change against "
    "plain.\nGreen and red: the interval of the change excludes zero."
)


def as_json(runs: Sequence[MethodRun], rows: Sequence[Row]) -> dict[str, Any]:
    """All numbers as plain JSON."""
    return {
        "runs": [
            {
                "label": run.label,
                "method": run.text,
                "chair": run.chair.as_json(),
                "pope": run.pope.as_json(),
                "seconds_per_caption": run.speed.seconds_per_answer,
                "time_relative_to_plain": relative_time(run, runs[0]),
            }
            for run in runs
        ],
        "changes": [
            {
                "metric": row.label,
                "direction": row.direction,
                "runs": {
                    run.label: {
                        "value": cell.measure.value,
                        "change": cell.change.value,
                        "interval": cell.change.interval
                        and [cell.change.interval.low, cell.change.interval.high],
                        "verdict": cell.verdict,
                    }
                    for run, cell in zip(runs, row.cells, strict=True)
                    if cell.change is not None
                },
            }
            for row in rows
        ],
        "conclusions": [str(conclusion) for conclusion in conclusions(runs, rows)],
    }
