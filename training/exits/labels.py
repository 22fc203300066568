"""Whether an exit is harmless: the rule, and exact values on the disk for other rules later."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from training.exits.passes import Outcome

__all__ = ["LABELS", "ExitRule", "LabelFile", "Measured", "exit_shares", "read_labels"]

#: Name of the files of exact values, one per process.
LABELS = "labels-{rank}.jsonl"


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """Exit (label 1) iff ``agree > agree`` and ``ce_without < ratio * ce_with``.

    Attributes:
        agree: share of equal answer tokens that must be exceeded (authors: 0.99, which means all
            of an answer under 100 tokens).
        ratio: by which factor the answer's cross-entropy may grow (authors: 1.03).

    Raises:
        ValueError: a value is out of its range.
    """

    agree: float = 0.99
    ratio: float = 1.03

    def __post_init__(self) -> None:
        if not 0 <= self.agree < 1:
            raise ValueError(f"agree = {self.agree}: a share that can be exceeded, in [0, 1)")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio = {self.ratio}: must be positive and finite")

    def label(self, agree: Tensor, ce_with: Tensor, ce_without: Tensor) -> Tensor:
        """int64 [B]: 1 where an exit is harmless, from exact values [B]."""
        harmless = (agree > self.agree) & (ce_without < self.ratio * ce_with)
        return harmless.long()


@dataclass(frozen=True)
class Measured:
    """The exact values of one row and one exit; see `training.exits.passes.Outcome`."""

    agree: float
    ce_with: float
    ce_without: float


class LabelFile:
    """Exact values of a training, appended as they are computed.

    A run that goes on after a kill may write a value again; it is the same.

    Args:
        folder: of the run.
        rank: of the process; each has a file of its own.
        origin: what the values depend on, e.g. the model's name; first line of a new file.
    """

    def __init__(self, folder: Path, rank: int, origin: Mapping[str, Any]) -> None:
        self._path = folder / LABELS.format(rank=rank)
        if not self._path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"origin": dict(origin)}) + "\n", encoding="utf-8")

    def add(self, ids: Iterable[str], layer: int, outcome: Outcome) -> None:
        """Appends the values of a batch for one exit."""
        columns = (outcome.agree, outcome.ce_with, outcome.ce_without)
        lines = [
            json.dumps({"id": i, "layer": layer, "agree": a, "ce_with": w, "ce_without": o})
            for i, a, w, o in zip(ids, *(c.tolist() for c in columns), strict=True)
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))


def read_labels(
    folder: Path, origin: Mapping[str, Any] | None = None
) -> dict[tuple[str, int], Measured]:
    """The exact values that a training has written, by row and exit layer.

    Args:
        folder: of that training.
        origin: what they must depend on; None for anything.

    Raises:
        InputError: there are none, a file is damaged, or they are of another model.
    """
    found: dict[tuple[str, int], Measured] = {}
    paths = sorted(folder.glob(LABELS.format(rank="*")))
    if not paths:
        raise InputError(
            f"{str(folder)!r} holds no {LABELS.format(rank='N')}.",
            advice="Give the output folder of a training of routers.",
        )
    for path in paths:
        for number, line in _lines(path):
            try:
                given = json.loads(line)
                if number == 1:
                    _check_origin(path, given["origin"], origin)
                    continue
                key = str(given["id"]), int(given["layer"])
                found[key] = Measured(given["agree"], given["ce_with"], given["ce_without"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path}:{number} is damaged: {error}", advice="Remove that line."
                ) from error
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines; a last one that a kill has cut off is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    yield from enumerate(whole.splitlines(), start=1)


def _check_origin(path: Path, stored: Any, wanted: Mapping[str, Any] | None) -> None:
    if wanted is not None and stored != dict(wanted):
        raise InputError(
            f"{path} holds labels of {stored}, this training is of {dict(wanted)}.",
            advice="Leave labels_from out: labels depend on the model.",
        )


def exit_shares(
    labels: Mapping[tuple[str, int], Measured], rule: ExitRule
) -> dict[int, tuple[int, float]]:
    """How many rows were judged per layer, and for which share an exit is harmless.

    Args:
        labels: see `read_labels`.
        rule: any, not only the one that was trained with.
    """
    counts: dict[int, list[int]] = {}
    for (_, layer), one in labels.items():
        harmless = one.agree > rule.agree and one.ce_without < rule.ratio * one.ce_with
        counts.setdefault(layer, []).append(int(harmless))
    return {layer: (len(c), sum(c) / len(c)) for layer, c in sorted(counts.items())}
