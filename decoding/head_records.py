"""Files of conflict heads: what a calibration found, and how it was found."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from mmlm.engine.head_maps import Head

__all__ = ["HeadLists", "HeadRecord", "read_record", "write_record"]

FORMAT = "mmlm conflict heads 1"
LEAST_CORRELATION = 0.3


class HeadLists(NamedTuple):
    """Heads of both kinds, the strongest first, and how far they can be trusted."""

    image: tuple[Head, ...]
    memory: tuple[Head, ...]
    removed: dict[str, tuple[Head, ...]]
    """Heads that a list would have had, by the reason why it has not."""
    split_half: dict[str, float]
    """Rank correlation of all heads between the two halves of the samples, by list."""


@dataclass(frozen=True, kw_only=True)
class HeadRecord:
    """What a calibration found about a model; one JSON file.

    Attributes:
        shape: Layers and heads of the model.
        lists: Both lists.
        values: Mean and standard error of all heads, [layer][head], by what was measured.
        samples: How many samples there were, by what became of them.
        settings: How it was measured: form, corruption, seed and so on.
        model: The model's name.
        weights: Its fingerprint.
        methods: Text forms of the methods that were attached meanwhile.
        fraction: The share of all heads that is best pruned, towards either side, if it was tuned.
        sweep: What tuning saw.
    """

    shape: tuple[int, int]
    lists: HeadLists
    values: dict[str, Any]
    samples: dict[str, int]
    settings: dict[str, Any]
    model: str = ""
    weights: str = ""
    methods: tuple[str, ...] = ()
    fraction: dict[str, float] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)

    @property
    def unstable(self) -> bool:
        """Whether the two halves of the samples hardly agree on the heads."""
        return min(self.lists.split_half.values()) < LEAST_CORRELATION


def write_record(path: Path, record: HeadRecord) -> None:
    """Writes a record, whole or not at all; a row of numbers stands on one line."""
    lists = record.lists._asdict()
    values = {f.name: getattr(record, f.name) for f in fields(record) if f.name != "lists"}
    content = {"format": FORMAT, **values, "unstable": record.unstable, **lists}
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[[-+.\deE,\s]+\]", lambda m: re.sub(r"\s+", "", m[0]), text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def read_record(path: Path) -> HeadRecord:
    """Reads a record.

    Raises:
        ValueError: If there is no such file, or it is none of ours.
    """
    advice = "make one with `mmlm calibrate conflict-heads`"
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; {advice}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        content.pop("unstable")
        lists = HeadLists(
            _pairs(content.pop("image")),
            _pairs(content.pop("memory")),
            {reason: _pairs(found) for reason, found in content.pop("removed").items()},
            {name: float(value) for name, value in content.pop("split_half").items()},
        )
        n_layers, n_heads = content.pop("shape")
        methods = tuple(content.pop("methods"))
        return HeadRecord(shape=(n_layers, n_heads), lists=lists, methods=methods, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{str(path)!r} is no file of conflict heads ({error}); {advice}"
        ) from error


def _pairs(heads: Any) -> tuple[Head, ...]:
    return tuple((int(layer), int(head)) for layer, head in heads)
