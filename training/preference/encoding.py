"""Preference rows as token ids, and their pictures as the processor's tensors.

The processor reads prompt and begun answer once, with the pictures, and expands the placeholders.
Each answer is then tokenised behind the same text, in one piece, and the place where it begins is
known from the characters. (SENTINEL's code, arXiv 2507.12455, searches the context's ids in the
sequence instead; tokenised alone it may have other ids, and the first hit may lie in the question.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mmlm.answers import prompt_is_apart
from mmlm.errors import InputError
from training.errors import EqualResponses, ImageTokenMismatch
from training.expansion import PictureText, Sizes
from training.preference.rows import PreferenceRow
from training.preference.texts import EndToken, PairText, PairWriter
from training.turns import ROLES, Turns, roles_of_ids

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["EncodedPair", "Length", "PairEncoder", "Side"]

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What processors say about every token: of a picture or not; of PaliGemma's prefix or not."""


@dataclass(frozen=True)
class Side:
    """One answer behind its prompt.

    Attributes:
        ids: Token ids [n] of prompt, context and answer.
        start: Where the answer begins; every token from there on is scored.
        types: The processor's token types by name, each [n].
    """

    ids: list[int]
    start: int
    types: dict[str, list[int]]


class EncodedPair(NamedTuple):
    """A row, ready for a model.

    Attributes:
        chosen: The better answer behind its prompt.
        rejected: The worse one; its prompt is the same but for tokens that an answer's first
            characters change.
    """

    chosen: Side
    rejected: Side


class Length(NamedTuple):
    """Tokens of a row.

    Attributes:
        tokens: Of its longer side.
        image_tokens: How many of them the processor counts as its pictures'.
    """

    tokens: int
    image_tokens: int


class PairEncoder:
    """Turns rows into ids.

    Args:
        processor: A Hugging Face processor with a chat template and a fast tokenizer.
        end_token: See `EndToken`.
        turns: What the model's methods must know about turns (`training.turns`).

    Raises:
        InputError: If the tokenizer cannot say which characters a token stands for, or there is no
            chat template.
        ValueError: If `end_token` is none of the three.
    """

    def __init__(
        self, processor: Any, end_token: EndToken = "own", *, turns: Turns = "unread"
    ) -> None:
        if not processor.tokenizer.is_fast:
            raise InputError(
                f"{type(processor.tokenizer).__name__} does not say which characters a token "
                "stands for, so it would not be known where an answer begins.",
                advice="Use the fast tokenizer of this model (package tokenizers).",
            )
        self._processor, self._turns = processor, turns
        self._tokenizer = processor.tokenizer
        self._text = PairWriter(processor, end_token)
        self._pictures = PictureText(processor)
        self._apart = prompt_is_apart(processor)
        # PaliGemma's processor writes BOS itself, behind the pictures.
        self._bos = [] if self._apart else _beginning(processor.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """The id that fills rows up; the end token where the tokenizer has none."""
        tokenizer = self._tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __call__(
        self, rows: Sequence[PreferenceRow], pictures: Sequence[Sequence[Image.Image]]
    ) -> tuple[list[EncodedPair], dict[str, Any]]:
        """Encodes rows.

        Args:
            rows: The rows.
            pictures: The pictures of each.

        Returns:
            One pair per row, and the processor's other tensors of all pictures, once and in order.

        Raises:
            ImageTokenMismatch: If a row has another number of image tokens than the processor
                writes for pictures of these sizes.
            EqualResponses: If both answers have the same tokens.
            InputError: See `PairWriter`; or if the processor cannot be used.
        """
        texts = [self._text(row) for row in rows]
        pairs: dict[int, EncodedPair] = {}
        pixels: dict[str, Any] = {}
        # Apart: processors disagree about rows without pictures beside rows with some.
        for seen in (True, False):
            places = [n for n, own in enumerate(pictures) if bool(own) is seen]
            if not places:
                continue
            given = [list(pictures[n]) for n in places] if seen else None
            prompts, tensors = self._process([texts[n].prompt for n in places], given)
            pixels |= tensors
            for n, (ids, types) in zip(places, prompts, strict=True):
                self._check_image_tokens(rows[n], ids, tuple(one.size for one in pictures[n]))
                pairs[n] = self._pair(rows[n], texts[n], ids, types)
        return [pairs[n] for n in range(len(rows))], pixels

    def length(self, row: PreferenceRow, sizes: Sizes) -> Length:
        """The length of a row, without its pixels.

        Args:
            row: The row.
            sizes: Width and height of its pictures.

        Raises:
            EqualResponses: If both answers have the same tokens.
            InputError: See `PairWriter`.
        """
        texts = self._text(row)
        text = self._pictures.expanded(texts.prompt, sizes)
        if self._apart:  # its processor puts BOS behind the pictures and a line end at the end
            pictures, token, question = text.rpartition(self._processor.image_token)
            ids = [*self._ids(pictures + token), self._tokenizer.bos_token_id]
            ids += self._ids(question + "\n")
        else:
            ids = self._ids(text)
        pair = self._pair(row, texts, ids, {})
        longer = max(len(pair.chosen.ids), len(pair.rejected.ids))
        return Length(longer, self._pictures.n_tokens(sizes))

    def _process(
        self, texts: list[str], pictures: list[list[Image.Image]] | None
    ) -> tuple[list[tuple[list[int], dict[str, list[int]]]], dict[str, Any]]:
        """Ids and token types of each text, and the tensors of the pictures."""
        batch = self._processor(
            text=texts,
            images=pictures,
            # BOS is added here, and what some tokenizers put behind every text is not wanted.
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        batch.pop("labels", None)  # PaliGemma's processor makes them for prompts too
        ids = batch.pop("input_ids")
        lengths = batch.pop("attention_mask").sum(dim=1).tolist()
        types = {name: batch.pop(name) for name in TOKEN_TYPES if name in batch}
        if "token_type_ids" in self._tokenizer.model_input_names:
            types.pop("token_type_ids", None)  # says nothing, and most models refuse it
        prompts = [
            (
                ids[n, :length].tolist(),
                {name: values[n, :length].tolist() for name, values in types.items()},
            )
            for n, length in enumerate(lengths)
        ]
        return prompts, dict(batch)

    def _pair(
        self, row: PreferenceRow, texts: PairText, prompt: list[int], types: dict[str, list[int]]
    ) -> EncodedPair:
        """Puts the answers behind a prompt whose placeholders are expanded."""
        if self._bos and prompt[:2] == 2 * self._bos:
            raise InputError(
                f"row {row.id!r} begins with two {self._tokenizer.bos_token!r}.",
                advice="Take it out of the row's words, or out of the chat template.",
            )
        bos = self._bos if prompt[: len(self._bos)] != self._bos else []
        alone = self._ids(texts.begun)
        if self._apart:
            prompt = prompt + alone
        sides = []
        for answer in (texts.chosen, texts.rejected):
            ids, start = self._joint(texts.begun, answer)
            same = min(_n_common(alone, ids), start)
            kept = len(prompt) - (len(alone) - same)
            if prompt[kept:] != alone[same:]:
                raise InputError(
                    f"row {row.id!r}: {type(self._processor).__name__} tokenises the end of a "
                    "prompt otherwise than its tokenizer does.",
                    advice="Preference training needs a processor that leaves text as it is.",
                )
            whole = [*bos, *prompt[:kept], *ids[same:]]
            own = self._types(types, len(bos), len(bos) + kept, len(whole))
            begins = len(bos) + kept + start - same
            if self._turns != "unread":
                own[ROLES] = self._roles(row, whole, begins)
            sides.append(Side(whole, begins, own))
        pair = EncodedPair(*sides)
        if _same_answers(row, pair):
            raise EqualResponses(
                f"row {row.id!r}: `chosen` and `rejected` are equal.", advice="Remove the row."
            )
        return pair

    def _roles(self, row: PreferenceRow, ids: list[int], start: int) -> list[int]:
        try:
            return roles_of_ids(
                self._processor, ids, start, image_ids=self._pictures.image_ids, turns=self._turns
            )
        except InputError as error:
            raise InputError(f"row {row.id!r}: {error}", advice=error.advice) from error

    def _joint(self, begun: str, answer: str) -> tuple[list[int], int]:
        """Ids of both texts in one piece, and which is the first of the answer."""
        encoded = self._tokenizer(
            begun + answer, add_special_tokens=False, return_offsets_mapping=True
        )
        ends = [end for _, end in encoded["offset_mapping"]]
        # A token that straddles the boundary belongs to the answer.
        start = next((i for i, end in enumerate(ends) if end > len(begun)), len(ends))
        return list(encoded["input_ids"]), start

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _types(
        self, types: dict[str, list[int]], lead: int, kept: int, length: int
    ) -> dict[str, list[int]]:
        """Token types of a whole row: behind the prompt all is text, which is 0.

        In PaliGemma 0 is the prefix, which is read both ways, and 1 all behind it.
        """
        made = {}
        for name, values in types.items():
            behind = int(self._apart and name == "token_type_ids")
            own = ([0] * lead + values)[:kept]
            made[name] = own + [behind] * (length - len(own))
        return made

    def _check_image_tokens(self, row: PreferenceRow, ids: list[int], sizes: Sizes) -> None:
        found = sum(token in self._pictures.image_ids for token in ids)
        wanted = self._pictures.n_tokens(sizes)
        if found != wanted:
            raise ImageTokenMismatch(
                f"row {row.id!r} has {found} image tokens, and its {len(sizes)} pictures need "
                f"{wanted}.",
                advice="The tokenizer must not cut texts off (truncation, model_max_length).",
            )


def _beginning(tokenizer: Any) -> list[int]:
    """BOS, if the tokenizer puts it before every text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []


def _n_common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _same_answers(row: PreferenceRow, pair: EncodedPair) -> bool:
    """Also if they differ in unknown words only, all of which are the same token."""
    chosen, rejected = pair
    same = chosen.ids[chosen.start :] == rejected.ids[rejected.start :]
    return same or row.chosen.strip() == row.rejected.strip()
