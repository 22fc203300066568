"""Which named objects are there: what detectors say, turned into three labels.

*Factual*: accepted. *Hallucinated*: rejected. *Uncertain*: the detectors differ, or none of them
can tell; an uncertain object keeps its sentence out of both sides of a pair (paper, section 3.1:
counting it as either costs up to six points of Object HalBench).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from data_tools.detectors import Finding
from data_tools.sentinel.objects import ObjectMention

__all__ = [
    "LABELS",
    "Findings",
    "Knowledge",
    "Label",
    "OutOfVocabulary",
    "cross_check",
    "detectors_asked",
]

Label: TypeAlias = Literal["factual", "uncertain", "hallucinated"]
LABELS: tuple[Label, ...] = ("factual", "uncertain", "hallucinated")
OutOfVocabulary: TypeAlias = Literal["accept", "abstain"]
Findings: TypeAlias = Mapping[str, Mapping[str, Finding | None]]
"""What each detector, by its name in the run, says about names; None: outside its vocabulary."""

SINGLE = "single:"


def detectors_asked(policy: str, names: Sequence[str]) -> list[str]:
    """The detectors that a policy needs.

    Args:
        policy: ``both``, ``vote`` or ``single:NAME``.
        names: Names of the run's detectors.

    Raises:
        ValueError: If there is no such policy or detector.
    """
    if policy in ("both", "vote"):
        return list(names)
    wanted = policy.removeprefix(SINGLE)
    if policy == wanted or wanted not in names:
        allowed = ", ".join(["both", "vote", *(SINGLE + name for name in names)])
        raise ValueError(f"cross_check must be one of {allowed}, got {policy!r}")
    return [wanted]


def cross_check(
    names: Sequence[str],
    findings: Findings,
    policy: str = "both",
    out_of_vocabulary: OutOfVocabulary = "abstain",
) -> dict[str, Label]:
    """Labels names by what the detectors found.

    Args:
        names: The names.
        findings: By detector, then by name; every detector answers every name.
        policy: ``both``: factual if all that vote accept, hallucinated if all reject, else
            uncertain. ``vote``: the majority; a draw is uncertain. ``single:NAME``: that detector
            alone.
        out_of_vocabulary: What a detector does about a name outside its vocabulary: ``accept`` it
            (as the authors' YOLO does: then only names it knows can be hallucinated), or
            ``abstain``, so that the others decide; a name on which all abstain is uncertain.

    Raises:
        ValueError: If the policy or the rule is unknown.
    """
    if out_of_vocabulary not in ("accept", "abstain"):
        raise ValueError(
            f"out_of_vocabulary must be 'accept' or 'abstain', got {out_of_vocabulary!r}"
        )
    asked = detectors_asked(policy, list(findings))
    labels: dict[str, Label] = {}
    for name in names:
        votes = []
        for detector in asked:
            finding = findings[detector][name]
            if finding is not None:
                votes.append(finding.accepted)
            elif out_of_vocabulary == "accept":
                votes.append(True)
        labels[name] = _decide(votes, majority=policy == "vote")
    return labels


def _decide(votes: Sequence[bool], *, majority: bool) -> Label:
    for_it = sum(votes)
    against = len(votes) - for_it
    if majority and for_it != against:
        return "factual" if for_it > against else "hallucinated"
    if not votes or (for_it and against):
        return "uncertain"
    return "factual" if for_it else "hallucinated"


@dataclass
class Knowledge:
    """What is known about the objects of one picture.

    A name is asked once per picture; names with the same canonical form are one object, so that
    "puppy" is known when "dog" was asked.

    Attributes:
        labels: Label by canonical name, in the order asked.
        asked: The name that the detectors were asked, by canonical name.
        findings: By detector, then by canonical name.
    """

    labels: dict[str, Label] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    findings: dict[str, dict[str, Finding | None]] = field(default_factory=dict)

    def unknown(self, mentions: Sequence[ObjectMention]) -> dict[str, str]:
        """Objects that were not asked before: canonical name -> name to ask, as first mentioned."""
        new: dict[str, str] = {}
        for mention in mentions:
            if mention.canonical not in self.labels:
                new.setdefault(mention.canonical, mention.lemma)
        return new

    def learn(
        self,
        asked: Mapping[str, str],
        findings: Findings,
        policy: str,
        out_of_vocabulary: OutOfVocabulary,
    ) -> None:
        """Adds what the detectors say about objects.

        Args:
            asked: Canonical name -> the name that was asked.
            findings: By detector, then by the name that was asked. An object that some detector
                gives no answer for, because it failed, is uncertain.
            policy: See `cross_check`.
            out_of_vocabulary: See `cross_check`.
        """
        answered = [
            name for name in asked.values() if all(name in found for found in findings.values())
        ]
        labels = cross_check(answered, findings, policy, out_of_vocabulary)
        for canonical, name in asked.items():
            self.labels[canonical] = labels.get(name, "uncertain")
            self.asked[canonical] = name
            for detector, found in findings.items():
                if name in found:
                    self.findings.setdefault(detector, {})[canonical] = found[name]

    def of(self, label: Label) -> list[str]:
        """Canonical names with a label, sorted."""
        return sorted(name for name, own in self.labels.items() if own == label)

    def rejected_by(self) -> dict[str, list[str]]:
        """Canonical names that each detector rejects, sorted."""
        return {
            detector: rejected
            for detector, found in self.findings.items()
            if (rejected := sorted(n for n, one in found.items() if one and not one.accepted))
        }

    def nothing_found(self) -> bool:
        """Whether objects were asked for, and no detector that knows them accepts a single one."""
        known = [one for found in self.findings.values() for one in found.values() if one]
        return bool(known) and not any(one.accepted for one in known)

    def boxes(self) -> dict[str, dict[str, list[list[float]]]]:
        """Where accepted objects are: canonical name -> detector -> boxes, for drawing."""
        places: dict[str, dict[str, list[list[float]]]] = {}
        for detector, found in self.findings.items():
            for name, one in found.items():
                if one and one.accepted and one.boxes:
                    places.setdefault(name, {})[detector] = [
                        [round(float(v), 3) for v in (b.left, b.top, b.right, b.bottom, b.score)]
                        for b in one.boxes
                    ]
        return places
