"""HallusionBench's arithmetic: from a verdict per question to the official numbers.

Everything is counted per *set* (category, subcategory, set number): figures and question pairs lie
within one set, so sets are what the bootstrap may draw independently.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.base import CountTable, Ratio
from benchmarks.hallusionbench.questions import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Verdict = Literal["correct", "incorrect", "unclear"]

__all__ = ["RATIOS", "Outcome", "Verdict", "blame", "count_sets", "needs_same", "official"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one question.

    Attributes:
        entry: The question.
        verdict: Compared with the reference; None if there is no answer or no verdict.
        same: Whether the answer says the same as that about the original figure; None if unknown.
    """

    entry: Entry
    verdict: Verdict | None
    same: bool | None = None

    @property
    def correct(self) -> bool:
        """Whether it counts as right: without a figure it is right not to know."""
        return self.verdict == "correct" or (
            self.verdict == "unclear" and not self.entry.has_figure
        )


def needs_same(entry: Entry, verdict: Verdict | None, original: Verdict | None) -> bool:
    """Whether the reason of an error depends on the ``same`` flag."""
    if entry.is_original or verdict != "incorrect":
        return False
    if entry.category == "VD":
        return original == "correct"
    return original == "incorrect" or (original == "correct" and entry.visual_input == "2")


def blame(
    outcome: Outcome, original: Verdict | None
) -> Literal["LH", "VI", "Mixed", "untold"] | None:
    """Why a question was answered wrongly, by the authors' rules; None if it was not.

    LH, language hallucination: the answer comes from what the model knows, not from the picture.
    VI, visual illusion: the picture was misread. Mixed: it may be either.

    Args:
        outcome: The question's outcome, with a verdict.
        original: Verdict on the same question about the original figure (VS: without one).

    Returns:
        The reason; "untold" if it depends on something that no judge decided.
    """
    entry = outcome.entry
    if outcome.correct:
        return None
    if entry.is_original:
        return "VI" if entry.category == "VD" else "LH"
    if original is None:
        return "untold"
    if not needs_same(entry, outcome.verdict, original):
        # Not knowing is bad vision, unless the model already made things up without the figure.
        unsure = entry.category == "VS" and original == "incorrect"
        return "Mixed" if unsure else "VI"
    if outcome.same is None:
        return "untold"
    if entry.category == "VD":
        return "Mixed" if outcome.same else "VI"
    if outcome.same:
        return "LH"
    return "Mixed" if original == "incorrect" else "VI"


_SCOPED = (
    *("questions", "correct", "figures", "figures_right", "pairs", "pairs_right"),
    *("easy", "easy_right", "hard", "hard_right"),
)
_COLUMNS = (
    *_SCOPED,
    *("figures_mixed", "figures_wrong", "shown", "shown_right", "shown_pairs"),
    *("shown_pairs_right", "yes_surplus", "wrong", "wrong_no", "LH", "VI", "Mixed", "untold"),
    *("unclear", "incomplete_figures", "incomplete_pairs"),
)


def _ratios() -> dict[str, Ratio]:
    def accuracies(scope: str, column: str) -> dict[str, Ratio]:
        return {
            f"{scope}aAcc": Ratio((f"{column}correct",), (f"{column}questions",)),
            f"{scope}fAcc": Ratio((f"{column}figures_right",), (f"{column}figures",)),
            f"{scope}qAcc": Ratio((f"{column}pairs_right",), (f"{column}pairs",)),
            f"{scope}easy_aAcc": Ratio((f"{column}easy_right",), (f"{column}easy",)),
            f"{scope}hard_aAcc": Ratio((f"{column}hard_right",), (f"{column}hard",)),
        }

    return {
        **accuracies("", ""),
        "yes_pct_diff": Ratio(("yes_surplus",), ("questions",)),
        "yes_fp_ratio": Ratio(("wrong_no",), ("wrong",)),
        "fig_inconsistent": Ratio(("figures_mixed",), ("figures",)),
        "fig_wrong": Ratio(("figures_wrong",), ("figures",)),
        **{name: Ratio((name,), ("LH", "VI", "Mixed")) for name in ("LH", "VI", "Mixed")},
        "unclear": Ratio(("unclear",), ("questions",)),
        "with_figure_aAcc": Ratio(("shown_right",), ("shown",)),
        "with_figure_qAcc": Ratio(("shown_pairs_right",), ("shown_pairs",)),
        **accuracies("VD_", "VD."),
        **accuracies("VS_", "VS."),
    }


RATIOS = _ratios()


def count_sets(outcomes: Sequence[Outcome]) -> CountTable:
    """Counts of every set. What has no verdict is left out, with its figure and its pair."""
    originals = {o.entry.pair: o.verdict for o in outcomes if o.entry.is_original}
    sets: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        sets[outcome.entry.set].append(outcome)
    rows = [_row(members, originals) for members in sets.values()]
    return CountTable.build(list(sets), rows, RATIOS)


def _row(members: Sequence[Outcome], originals: Mapping[str, Verdict | None]) -> dict[str, int]:
    row = dict.fromkeys(_COLUMNS, 0)
    for outcome in members:
        if outcome.verdict is None:
            continue
        yes = outcome.entry.label == "yes"
        row["questions"] += 1
        row["correct"] += outcome.correct
        row["shown"] += outcome.entry.has_figure
        row["shown_right"] += outcome.correct and outcome.entry.has_figure
        row["unclear"] += outcome.verdict == "unclear"
        # The authors infer what was said: right and yes, or wrong and no.
        row["yes_surplus"] += (outcome.correct == yes) - yes
        row["wrong"] += not outcome.correct
        row["wrong_no"] += not outcome.correct and not yes
        if reason := blame(outcome, originals.get(outcome.entry.pair)):
            row[reason] += 1
    _count_groups(row, members)
    category = members[0].entry.category
    for scope in ("VD", "VS"):
        row |= {f"{scope}.{name}": row[name] if scope == category else 0 for name in _SCOPED}
    return row


def _count_groups(row: dict[str, int], members: Sequence[Outcome]) -> None:
    shown = [outcome for outcome in members if outcome.entry.has_figure]
    for group in _groups(shown, lambda entry: entry.figure_id):
        if None in (outcome.verdict for outcome in group):
            row["incomplete_figures"] += 1
            continue
        right = sum(outcome.correct for outcome in group)
        row["figures"] += 1
        row["figures_right"] += right == len(group)
        row["figures_wrong"] += right == 0
        row["figures_mixed"] += 0 < right < len(group)
    parts = {
        "pairs": members,
        "shown_pairs": shown,
        "easy": [outcome for outcome in members if outcome.entry.visual_input != "2"],
        "hard": [outcome for outcome in members if outcome.entry.visual_input == "2"],
    }
    for name, part in parts.items():
        for group in _groups(part, lambda entry: entry.question_id):
            if None in (outcome.verdict for outcome in group):
                row["incomplete_pairs"] += name == "pairs"
                continue
            row[name] += 1
            row[f"{name}_right"] += all(outcome.correct for outcome in group)


def _groups(members: Iterable[Outcome], key: Callable[[Entry], str]) -> Iterable[list[Outcome]]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in members:
        groups[key(outcome.entry)].append(outcome)
    return groups.values()


def official(table: CountTable, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the authors' functions return, rounded as they round: percent with four decimals."""
    sums = table.sums()
    labels = [outcome.entry.label == "yes" for outcome in outcomes]
    said = [outcome.correct == yes for outcome, yes in zip(outcomes, labels, strict=True)]
    wrong = [yes for outcome, yes in zip(outcomes, labels, strict=True) if not outcome.correct]
    unrounded = {
        "yes_pct_diff": sum(said) / len(said) - sum(labels) / len(labels),
        "yes_fp_ratio": (len(wrong) - sum(wrong)) / len(wrong) if wrong else None,
    }
    record: dict[str, Any] = {}
    for name in ("aAcc", "fAcc", "qAcc", "easy_aAcc", "hard_aAcc", *unrounded):
        record[name] = unrounded[name] if name in unrounded else _percent(sums, name)
    for name in ("fig_inconsistent", "fig_wrong", "LH", "VI", "Mixed"):
        record[name] = _percent(sums, name)
    totals = ("questions", "figures", "pairs", "easy", "hard")
    return record | {"totals": {name: sums[name] for name in totals}}


def _percent(sums: Mapping[str, float], name: str) -> float | None:
    above = sum(sums[column] for column in RATIOS[name].numerator)
    below = sum(sums[column] for column in RATIOS[name].denominator)
    return round(100 * above / below, 4) if below else None
