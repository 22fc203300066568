"""The reference's log-probabilities of a whole data set, computed once and stored by content.

DPO (arXiv 2305.18290, equation 7) needs log pi_ref(chosen) and log pi_ref(rejected) of every pair.
The reference never changes, so both are numbers: storing them saves one of the two forward passes
of every training step, and a full training need not keep the reference in memory. TRL's own cache
(``precompute_ref_log_probs``) refuses data sets with pictures.

::

    trainer = VLPreferenceTrainer(...)                # precompute_ref_log_probs stays False
    cache = precompute_ref(trainer, output / "reference")      # training.preference.precompute
    use_reference_cache(trainer, cache)
    trainer.train()

A value counts only for the content it was computed from: weights, processor, template, precision,
``ld_alpha``, the bytes of the pictures, the token ids. Anything else raises
:class:`ReferenceCacheMismatch` and names what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import InputError
from mmlm.records import RecordFile, differences, run_record_path
from training.preference.cache_settings import (
    CacheSettingsError,
    check_cache_settings,
    refuse_trl_cache,
)
from training.preference.content import identifier, tokens_hash

__all__ = [
    "CacheSettingsError",
    "CachedReference",
    "ReferenceCache",
    "ReferenceCacheMismatch",
    "check_cache_settings",
    "collated",
    "part_file",
    "refuse_trl_cache",
]

_ADVICE = "Remove the folder to compute the values anew, or choose another one."


class ReferenceCacheMismatch(InputError, RuntimeError):  # noqa: N818  (as the other errors)
    """Stored reference values belong to other content; names what differs."""


class ReferenceCache:
    """Stored values, found by the id of a row and checked against its content.

    Args:
        path: folder of the cache.
        records: by content key: ``id``, the hashes ``images``, ``text`` and ``tokens``, and the
            two sums ``chosen`` and ``rejected`` in nats (None for a row the collator leaves out).
    """

    def __init__(self, path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
        self.path = path
        self.records = dict(records)
        self._by_id: dict[str, list[Mapping[str, Any]]] = {}
        for record in self.records.values():
            self._by_id.setdefault(record["id"], []).append(record)

    @classmethod
    def open(cls, path: Path, key: Mapping[str, Any]) -> ReferenceCache:
        """Reads what is stored; an unfinished last line of a killed run is left out.

        Args:
            path: folder of the cache; may be missing.
            key: see `reference_key`.

        Raises:
            ReferenceCacheMismatch: the values were computed under another key.
        """
        records: dict[str, Mapping[str, Any]] = {}
        for part in sorted(path.glob("part-*.jsonl")):
            _check_key(part, key)
            records |= part_file(part, key).done
        return cls(path, records)

    def __len__(self) -> int:
        """Number of stored rows."""
        return len(self.records)

    def check(self, rows: Sequence[Any], contents: Sequence[Mapping[str, str]]) -> None:
        """Makes sure that every row is stored with the content it has now.

        Args:
            rows: preference rows.
            contents: of the rows, see `row_contents`.

        Raises:
            ReferenceCacheMismatch: a row is missing or has changed; names row and field.
        """
        for row, content in zip(rows, contents, strict=True):
            self._find(identifier(row), content)

    def _find(self, name: str, content: Mapping[str, str]) -> Mapping[str, Any]:
        stored = self._by_id.get(name, [])
        for record in stored:
            if content.items() <= record.items():
                return record
        if not stored:
            raise ReferenceCacheMismatch(
                f"{str(self.path)!r} holds no reference values of row {name!r}",
                advice="Run precompute_ref on these rows; it computes only what is missing.",
            )
        fields = [field for field in content if content[field] != stored[-1][field]]
        raise ReferenceCacheMismatch(
            f"the {' and '.join(fields)} of row {name!r} changed since its reference values in "
            f"{str(self.path)!r} were computed",
            advice="Run precompute_ref again; it computes only what has changed."
            if fields != ["tokens"]
            else f"The collator makes other tokens of the same row. {_ADVICE}",
        )

    def values(self, names: Sequence[str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The two tensors that TRL's loss takes in place of its reference pass.

        Args:
            names: ids of the batch's pairs, in order.
            batch: as the collator made it.

        Returns:
            ``ref_chosen_logps`` and ``ref_rejected_logps``, [B] each, in nats.

        Raises:
            ReferenceCacheMismatch: a row is missing or its tokens are others.
        """
        found = [
            self._find(name, {"tokens": tokens_hash(batch, pair)})
            for pair, name in enumerate(names)
        ]
        return {
            f"ref_{side}_logps": torch.tensor([record[side] for record in found])
            for side in ("chosen", "rejected")
        }


def part_file(part: Path, key: Mapping[str, Any]) -> RecordFile:
    """The file of one process's values, read as far as it is written."""
    return RecordFile(part, key, key="key")


def _check_key(part: Path, key: Mapping[str, Any]) -> None:
    record = run_record_path(part)
    if not record.is_file():
        return  # RecordFile takes care of it
    stored = json.loads(record.read_text(encoding="utf-8"))
    fields = [f"{name} was {old}, now {new}" for name, old, new in differences(stored, dict(key))]
    if fields:
        raise ReferenceCacheMismatch(
            f"the reference values in {str(part.parent)!r} belong to another run: "
            f"{'; '.join(fields)}",
            advice=_ADVICE,
        )


class CachedReference:
    """A collator that adds stored reference values to what another collator makes.

    Args:
        collator: makes TRL's batch of preference rows; may leave rows out, then it names those
            that are in under the key ``ids``.
        cache: with values of all rows.
    """

    def __init__(self, collator: Any, cache: ReferenceCache) -> None:
        self.collator = collator
        self.cache = cache

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Makes a batch.

        Raises:
            ReferenceCacheMismatch: see `ReferenceCache.values`.
        """
        batch, names = collated(self.collator, rows)
        return {**batch, **self.cache.values(names, batch)}


def collated(collator: Any, rows: Sequence[Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Makes a batch.

    Args:
        collator: possibly one that leaves rows out and names the others under ``ids``.
        rows: preference rows.

    Returns:
        The batch without ``ids``, and the ids of the rows that are in it, in order.

    Raises:
        InputError: the collator left rows out and does not say which.
    """
    batch = dict(collator(rows))
    names = batch.pop("ids", None) or [identifier(row) for row in rows]
    if 2 * len(names) != len(batch["input_ids"]):
        raise InputError(
            f"the collator made {len(batch['input_ids'])} sequences of {len(rows)} pairs and does "
            "not say which rows it left out",
            advice="Use VisionPreferenceCollator, or a collator that adds 'ids' to its batches.",
        )
    return batch, list(names)
