"""Batches of preference rows, with exactly the keys of TRL 1.16's own vision collator."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import ImageReadError, InputError
from training.errors import EqualResponses, PreferenceTooLong
from training.pictures import read_pictures
from training.preference.encoding import EncodedPair, Length, PairEncoder, Side
from training.preference.rows import PreferenceRow, as_row
from training.preference.texts import EndToken
from training.preference.usable import UsableRows, usable_rows
from training.turns import Turns

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BadRow", "UsableRows", "VisionPreferenceCollator", "usable_rows"]

BadRow = Literal["error", "drop"]
"""What happens to a row that cannot be used as it is: the training is refused, or goes without."""

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_log = logging.getLogger(__name__)


class VisionPreferenceCollator:
    """Turns preference rows into a batch for TRL's DPOTrainer.

    Takes the place of ``DataCollatorForVisionPreference``, which cannot express a begun answer,
    drops BOS, cuts pictures, and trains on answers that were cut away. Rows are
    ``[chosen x B; rejected x B]``:

    * ``input_ids``, ``attention_mask``, ``completion_mask`` [2B, L], padded on the right;
      ``completion_mask`` is 1 on tokens of the answer: context and prompt are read, not scored
      (C-DPO, arXiv 2507.12455, equation 6).
    * The processor's tensors: the pictures of all rows, twice. They are prepared once.
    * ``mm_token_type_ids``, ``token_type_ids`` [2B, L] where the processor makes them.
    * ``ref_chosen_logps``, ``ref_rejected_logps`` [B] if all rows have them.

    Nothing is ever cut off. A row that has to be left out is counted; `usable_rows` finds such rows
    before training, so that no batch gets smaller or empty on the way.

    Args:
        processor: A Hugging Face processor with a chat template and a fast tokenizer.
        max_length: Most tokens of a row, pictures included; None for no limit.
        overlong: What a longer row is.
        end_token: Where an end token is learned; see `training.preference.texts.EndToken`.
        on_bad_image: What a row with an unreadable picture is.
        pad_to_multiple_of: L is a multiple of it.
        with_ids: Adds ``ids``, the names of the rows in the batch. TRL's trainer would hand them
            to the model, so a wrapper that needs them must take them out.
        turns: What the model's methods must know about turns (`training.turns`).

    Attributes:
        dropped: How many rows were left out, by reason.

    Raises:
        ValueError: If an option is none of its values, or a number is less than 1.
        InputError: See `PairEncoder`.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        overlong: BadRow = "error",
        end_token: EndToken = "own",
        on_bad_image: BadRow = "error",
        pad_to_multiple_of: int | None = None,
        with_ids: bool = False,
        turns: Turns = "unread",
    ) -> None:
        for name, choice in (("overlong", overlong), ("on_bad_image", on_bad_image)):
            if choice not in ("error", "drop"):
                raise ValueError(f"{name} must be error or drop, got {choice!r}")
        for name, number in (
            ("max_length", max_length),
            ("pad_to_multiple_of", pad_to_multiple_of),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {number}")
        self.processor = processor
        self.max_length = max_length
        self.overlong = overlong
        self.end_token = end_token
        self.on_bad_image = on_bad_image
        self.pad_to_multiple_of = pad_to_multiple_of
        self.with_ids = with_ids
        self.dropped: Counter[str] = Counter()
        self.encoder = PairEncoder(processor, end_token, turns=turns)

    def __call__(self, examples: Sequence[PreferenceRow | Mapping[str, Any]]) -> dict[str, Any]:
        """Makes a batch.

        Args:
            examples: Rows, or mappings with their fields (`as_row`).

        Raises:
            PreferenceTooLong: Under ``overlong="error"``; with id, tokens, image tokens, limit.
            ImageReadError: Under ``on_bad_image="error"``.
            InputError: If no row is left (a batch without rows would be a step without loss), or a
                row is wrong; see `as_row` and `PairEncoder`.
        """
        readable, pictures, places = [], [], []
        for place, example in enumerate(examples):
            row = as_row(example)
            try:
                own = read_pictures(row.images, f"row {row.id!r}")
            except ImageReadError as error:
                if self.on_bad_image == "error":
                    raise
                self._drop(row, "unreadable picture", error)
                continue
            readable.append(row)
            pictures.append(own)
            places.append(place)
        kept, (pairs, pixels) = self._encoded(readable, pictures, len(examples))
        rows = [readable[n] for n in kept]
        batch = {**self._padded(pairs), **{name: _twice(value) for name, value in pixels.items()}}
        batch |= _reference([examples[places[n]] for n in kept])
        if self.with_ids:
            batch["ids"] = [row.id for row in rows]
        return batch

    def length(self, row: PreferenceRow, sizes: Sequence[tuple[int, int]]) -> Length:
        """Tokens of a row, without its pixels.

        Args:
            row: The row.
            sizes: Width and height of its pictures.

        Raises:
            PreferenceTooLong: If it is longer than `max_length`, whatever `overlong` is.
            InputError: See `PairEncoder`.
        """
        length = self.encoder.length(row, tuple(sizes))
        if self.max_length is not None and length.tokens > self.max_length:
            raise PreferenceTooLong(
                f"row {row.id!r} has {length.tokens} tokens, {length.image_tokens} of them of its "
                f"{len(row.images)} pictures; max_length is {self.max_length}.",
                advice="Raise max_length (nothing is ever cut off), or set overlong: drop.",
                id=row.id,
                n_tokens=length.tokens,
                n_image_tokens=length.image_tokens,
                max_length=self.max_length,
            )
        return length

    def _encoded(
        self, rows: Sequence[PreferenceRow], pictures: Sequence[Sequence[Any]], n_given: int
    ) -> tuple[list[int], tuple[list[EncodedPair], dict[str, Any]]]:
        """The numbers of the rows that can be used, and these rows encoded."""
        kept = list(range(len(rows)))
        try:
            encoded = self.encoder(rows, pictures) if rows else ([], {})
            longest = max((len(side.ids) for pair in encoded[0] for side in pair), default=0)
            all_fit = self.max_length is None or longest <= self.max_length
        except EqualResponses:
            all_fit = False
        if not all_fit:
            kept = [n for n, row in enumerate(rows) if self._fits(row, pictures[n])]
            encoded = self.encoder([rows[n] for n in kept], [pictures[n] for n in kept])
        if not kept:
            raise InputError(
                f"None of the {n_given} rows of a batch can be used.",
                advice="Have usable_rows leave such rows out before training, or raise max_length.",
            )
        return kept, encoded

    def _fits(self, row: PreferenceRow, pictures: Sequence[Any]) -> bool:
        """Whether a row may be in the batch; counts it if it is left out."""
        try:
            self.length(row, [one.size for one in pictures])
        except PreferenceTooLong as error:
            if self.overlong == "error":
                raise
            return self._drop(row, "too long", error)
        except EqualResponses as error:
            return self._drop(row, "equal answers", error)
        return True

    def _drop(self, row: PreferenceRow, reason: str, error: InputError | ImageReadError) -> bool:
        self.dropped[reason] += 1
        _log.warning("Row %r left out: %s", row.id, error)
        return False

    def _padded(self, pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
        import torch

        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(side.ids) for side in sides) // multiple) * multiple

        def filled(rows: Sequence[Sequence[int]], filling: int) -> Tensor:
            whole = torch.full((len(rows), length), filling, dtype=torch.long)
            for n, row in enumerate(rows):
                whole[n, : len(row)] = torch.tensor(row, dtype=torch.long)
            return whole

        names = dict.fromkeys(name for side in sides for name in side.types)
        return {
            "input_ids": filled([side.ids for side in sides], self.encoder.pad_token_id),
            "attention_mask": filled([[1] * len(side.ids) for side in sides], 0),
            "completion_mask": filled([_scored(side) for side in sides], 0),
            **{name: filled([side.types.get(name, []) for side in sides], 0) for name in names},
        }


def _scored(side: Side) -> list[int]:
    return [0] * side.start + [1] * (len(side.ids) - side.start)


def _twice(value: Any) -> Any:
    """Pictures of the chosen rows, then the same of the rejected ones."""
    import torch

    return torch.cat([value, value]) if isinstance(value, torch.Tensor) else [*value, *value]


def _reference(examples: Sequence[Any]) -> dict[str, Tensor]:
    """Stored values of the reference, if the rows bring them."""
    import torch

    given = [one for one in examples if isinstance(one, Mapping)]
    return {
        name: torch.tensor([one[name] for one in given])
        for name in _REFERENCE
        if len(given) == len(examples) and all(one.get(name) is not None for one in given)
    }
