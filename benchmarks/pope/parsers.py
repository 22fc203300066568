"""How a free answer is read as yes or no: the rules of the scorers in use, by name.

No two of them agree on every answer; `benchmarks.pope` therefore puts the parser's name into the
name of every number.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.base import Ratio
from benchmarks.choices import vqa_punctuation

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PARSERS", "Parser"]


@dataclass(frozen=True)
class Parser:
    """How an answer is read.

    Attributes:
        name: Name under which results are published.
        read: Answer and label -> True (yes), False (no) or None (neither). Only VCD's rule looks
            at the label.
        neither_is_missed: Whether a yes-question answered with neither counts against recall.
        yes_ratio_of_labels: Whether the yes ratio is taken from the labels (lmms-eval).
    """

    name: str
    read: Callable[[str, str], bool | None] = field(repr=False)
    neither_is_missed: bool = True
    yes_ratio_of_labels: bool = False

    @property
    def metrics(self) -> dict[str, Ratio]:
        """The ratios on the counts of `PopeResult`."""
        missed = ("fn", "neither_yes") if self.neither_is_missed else ("fn",)
        said_yes = ("yes_labels",) if self.yes_ratio_of_labels else ("tp", "fp")
        return {
            "accuracy": Ratio(("tp", "tn"), ("answers",)),
            "precision": Ratio(("tp",), ("tp", "fp")),
            "recall": Ratio(("tp",), ("tp", *missed)),
            "f1": Ratio(("tp",), ("tp", "fp", "tp", *missed), 2.0, needs=("tp",)),
            "yes_ratio": Ratio(said_yes, ("answers",)),
            "unparsed": Ratio(("neither_yes", "neither_no"), ("answers",)),
        }


def _official(answer: str, label: str) -> bool:
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.intersection(words)


def _opera(answer: str, label: str) -> bool:
    words = answer.replace(".", "").replace(",", "").split(" ")
    return not any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words)


def _vcd(answer: str, label: str) -> bool:
    answer = answer.lower().strip()
    return "yes" in answer if label == "yes" else "no" not in answer


def _lmms_eval(answer: str, label: str) -> bool | None:
    return {"yes": True, "no": False}.get(answer.lower().strip())


def _vlmevalkit(answer: str, label: str) -> bool | None:
    words = vqa_punctuation(answer.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" in words


def _strict(answer: str, label: str) -> bool | None:
    words = re.findall(r"[^\s.,;:!?]+", answer.lower())
    first = words[0].strip(string.punctuation + "‘’“”") if words else ""
    return {"yes": True, "no": False}.get(first)


PARSERS: dict[str, Parser] = {
    parser.name: parser
    for parser in (
        # Ours: the first word must be yes or no; everything else is reported, not guessed.
        Parser("strict", _strict),
        # AoiDragon/POPE and LLaVA: "NO", "None", "isn't" and the empty answer are yes.
        Parser("official", _official),
        # OPERA and PAI: the whole answer, not only its first sentence.
        Parser("opera", _opera),
        # VCD: "not" and "know" contain a "no".
        Parser("vcd", _vcd),
        # lmms-eval: "No." is neither.
        Parser("lmms-eval", _lmms_eval, neither_is_missed=False, yes_ratio_of_labels=True),
        # VLMEvalKit: yes and no as words; its headline "Overall" is F1.
        Parser("vlmevalkit", _vlmevalkit),
    )
}
