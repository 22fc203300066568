"""What is stored about the attention of one answer, read strictly, and the ratios of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmlm.engine.stages import measured_layers
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["RECORD", "Masses", "Record", "Text", "answer_of", "read_record"]

#: Field of a stored line in which `mmlm.TextDominance` leaves its record.
RECORD = "text_dominance"
Text = Literal["all", "instruction"]


@dataclass(frozen=True)
class Masses:
    """Attention in one layer, and the tokens it is paid to.

    Attributes:
        text: A_T, added up over the queries.
        visual: A_O, likewise.
        n_text: |T|.
        n_visual: |O|.
    """

    text: float
    visual: float
    n_text: int
    n_visual: int

    @property
    def mdi(self) -> float | None:
        """Attention per text token over attention per visual token; None if undefined."""
        if not (self.n_text and self.n_visual and self.visual):
            return None
        return (self.text / self.n_text) / (self.visual / self.n_visual)

    @property
    def aei_text(self) -> float | None:
        """Share of the attention on text over the text's share of the tokens."""
        return self._efficiency(self.text, self.n_text)

    @property
    def aei_image(self) -> float | None:
        """The same of visual tokens."""
        return self._efficiency(self.visual, self.n_visual)

    def _efficiency(self, mass: float, count: int) -> float | None:
        attention, tokens = self.text + self.visual, self.n_text + self.n_visual
        if not (attention and self.n_text and self.n_visual):
            return None
        return (mass / attention) / (count / tokens)


@dataclass(frozen=True)
class Record:
    """One answer's record, checked.

    Attributes:
        n_layers: Decoder layers of the model.
        queries: Rows in the sums.
        queries_from: "generated", "answer" or "last prompt row".
        raw: As it is stored.
    """

    n_layers: int
    queries: int
    queries_from: str
    raw: Mapping[str, Any]

    def masses(self, text: Text, first: bool) -> dict[int, Masses]:
        """Per layer; ``first`` False leaves the prompt's first token out on its own side."""
        raw, found = self.raw, {}
        lead = raw["first"] if not first else ""
        drop = lead == "text" and text == "all"  # the instruction never holds the first token
        for i, layer in enumerate(raw["layers"]):
            word = raw["text" if text == "all" else "instruction"][i]
            seen, top = raw["visual"][i], raw["first_token"][i]
            found[layer] = Masses(
                text=max(word - top, 0.0) if drop else word,
                visual=max(seen - top, 0.0) if lead == "visual" else seen,
                n_text=raw["n_text" if text == "all" else "n_instruction"] - drop,
                n_visual=raw["n_visual"] - (lead == "visual"),
            )
        return found


def answer_of(line: Mapping[str, Any]) -> str | None:
    """The answer of a stored line; captions stand in a field of their own."""
    found = line.get("text", line.get("caption"))
    return found if isinstance(found, str) else None


def read_record(line: Mapping[str, Any], number: int) -> Record:
    """The record of one stored line.

    Args:
        line: The line; it holds an answer.
        number: Its number, for messages.

    Raises:
        InputError: If the answer is no text, or the record is missing or broken.
    """
    place = f"Line {number} (id {line['id']!r})"
    if answer_of(line) is None:
        raise InputError(f"{place} has no answer that is text.", advice="Repeat the run.")
    raw = line.get(RECORD)
    if not isinstance(raw, dict):
        raise InputError(
            f"{place} has no {RECORD!r} record.",
            advice="Run `mmlm bench text-dominance`, or any benchmark with `TextDominance()` "
            "attached.",
        )
    broken = next(_flaws(raw), None)
    if broken is not None:
        raise InputError(f"{place}: {broken}.", advice="Repeat the run; records are not edited.")
    return Record(raw["n_layers"], raw["queries"], raw["queries_from"], raw)


def _flaws(raw: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a record."""
    least = {"n_layers": 1, "queries": 1, "n_text": 0, "n_visual": 0, "n_instruction": 0}
    for name, low in least.items():
        if type(raw.get(name)) is not int or raw[name] < low:
            yield f"{name} must be an integer >= {low}, found {raw.get(name)!r}"
    if raw.get("first") not in ("text", "visual"):
        yield f"first must be 'text' or 'visual', found {raw.get('first')!r}"
    if raw.get("queries_from") not in ("generated", "answer", "last prompt row"):
        yield f"queries_from is {raw.get('queries_from')!r}"
    layers = raw.get("layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        yield f"layers must be a list of integers, found {layers!r}"
        return
    if len(set(layers)) != len(layers):
        yield f"a layer stands twice in {layers}"
    missing = sorted(set(measured_layers(raw["n_layers"])) - set(layers))
    if missing:
        yield f"layers {missing} were not measured, which early, middle or late layers need"
    for name in ("text", "visual", "instruction", "first_token"):
        values = raw.get(name)
        if not isinstance(values, list) or len(values) != len(layers):
            yield f"{name} must hold one number for each of {len(layers)} layers"
        elif not all(_is_mass(value) for value in values):
            yield f"{name} holds something else than finite numbers >= 0"


def _is_mass(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0
