"""Whether stored runs may be compared at all, and what else tells them apart.

A difference between two numbers is a difference between two methods only if everything else was
the same. What makes the comparison meaningless is refused (other requests, other data, answers
missing in one run only); what merely weakens it is said (another model, dtype or version).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError
from mmlm.records import INFORMATION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.reports.stored_runs import StoredRun

__all__ = ["check_comparable", "other_differences"]

_LONGEST = 60  # characters of a value in a message
_NOTED = ("model", "weights", "revision", "generate")


def check_comparable(runs: Mapping[str, StoredRun]) -> None:
    """Refuses runs that did not answer the same requests.

    Args:
        runs: The runs by label, the baseline first.

    Raises:
        InputError: With the first difference that matters, and what to do about it.
    """
    (first, baseline), *others = runs.items()
    for label, run in others:
        pair = f"{first} and {label}"
        if run.benchmark != baseline.benchmark:
            raise InputError(
                f"{first} is a run of {baseline.benchmark}, {label} one of {run.benchmark}.",
                advice="Compare runs of one benchmark.",
            )
        if baseline.record and run.record:
            _check_data(pair, baseline.record, run.record)
        _check_answers(first, label, baseline.lines, run.lines)


def _check_data(pair: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name, old, new in _differences(ours.get("data"), theirs.get("data"), "data"):
        raise InputError(
            f"{pair} were asked about different data: {name} is {_both(old, new)}.",
            advice="Repeat one run with the data and the question of the other.",
        )


def _check_answers(
    first: str,
    second: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
) -> None:
    """Compares ids, questions and which requests have answers, as far as the lines have ids."""
    here, there = ({line.get("id"): line for line in lines} for lines in (ours, theirs))
    if None in here or None in there:
        return
    answered = [
        {key for key, line in lines.items() if not line.get("error")} for lines in (here, there)
    ]
    if answered[0] != answered[1]:
        only = [len(answered[0] - answered[1]), len(answered[1] - answered[0])]
        example = min(answered[0] ^ answered[1], key=str)
        raise InputError(
            f"{first} and {second} did not answer the same requests: {only[0]} have an answer in "
            f"{first} only, {only[1]} in {second} only, e.g. {example!r}.",
            advice="Repeat what failed or is missing, then compare.",
        )
    for key, line in here.items():
        for name in ("prompt", "question", "label"):
            if name in line and line[name] != there[key].get(name, line[name]):
                raise InputError(
                    f"{first} and {second} were asked different things: {name} of {key!r} is "
                    f"{_both(line[name], there[key][name])}.",
                    advice="Repeat one run with the questions of the other.",
                )


def other_differences(runs: Mapping[str, StoredRun]) -> list[str]:
    """What apart from the method tells the runs from the baseline: one sentence per difference.

    Args:
        runs: The runs by label, the baseline first.
    """
    (first, baseline), *others = runs.items()
    notes = []
    for label, run in others:
        if not (baseline.record and run.record):
            lacking = first if not baseline.record else label
            notes.append(
                f"{lacking} has no run record: whether {label} differs from {first} in model, "
                "precision or settings is not known."
            )
            continue
        notes += [
            f"{label} also differs from {first} in {name}: {_both(old, new)}."
            for name, old, new in _differences(_noted(baseline.record), _noted(run.record))
        ]
        texts = [
            [line.get("caption", line.get("text")) for line in one.lines] for one in (baseline, run)
        ]
        if texts[0] == texts[1]:
            notes.append(f"{label} gave exactly the same answers as {first}.")
    return notes


def _noted(record: Mapping[str, Any]) -> dict[str, Any]:
    information = record.get(INFORMATION, {})
    noted = {name: record.get(name) for name in _NOTED}
    return noted | {name: information.get(name) for name in ("versions", "device")}


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Where two JSON values differ: dotted name, both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        return found
    return [] if old == new else [(name, old, new)]


def _both(old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list):
        shared = sum(value in new for value in old)
        return f"a list of {len(old)} against one of {len(new)} ({shared} entries in both)"
    return f"{_short(old)} against {_short(new)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
