"""Preference rows as token ids, and their pictures as the processor's tensors.

The processor reads prompt and begun answer once, with the pictures, and expands the placeholders.
Each answer is then tokenised behind the same text, in one piece, and the place where it begins is
known from the characters (arXiv 2507.12455 masks the context by searching its ids in the sequence;
tokenised alone it may have other ids, and the first hit may lie in the question).

The text is the one of generation (`mmlm.inputs.prepare` with ``begun=``): prompt, the template's
joiner, the context, one blank, the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from mmlm.answers import answer_frame, prompt_is_apart
from mmlm.errors import InputError
from mmlm.inputs import use_chat_template
from training.errors import (
    EqualResponses,
    ImageTokenMismatch,
    PictureCountMismatch,
    UnusableResponse,
)
from training.preference.rows import PreferenceRow, check_row

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["EncodedPair", "EndToken", "Length", "PairEncoder", "Side"]

EndToken: TypeAlias = Literal["own", "never", "always"]
"""Where an end token is learned: behind answers that end the turn, nowhere, behind every answer."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What processors say about every token: of a picture or not; of PaliGemma's prefix or not."""

Sizes: TypeAlias = tuple[tuple[int, int], ...]


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


@dataclass(frozen=True)
class EncodedPair:
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
        image_tokens: How many of them stand for pictures.
    """

    tokens: int
    image_tokens: int


class _Texts(NamedTuple):
    """A row as text.

    Attributes:
        prompt: What the processor is given; placeholders are not expanded.
        begun: What is tokenised in one piece with an answer: prompt and context, or in PaliGemma,
            whose prompts are texts of their own, the context.
        answers: The two, each with what stands before it and, if it ends the turn, its end.
    """

    prompt: str
    begun: str
    answers: tuple[str, str]


class PairEncoder:
    """Turns rows into ids.

    Args:
        processor: A Hugging Face processor with a chat template and a fast tokenizer.
        end_token: See `EndToken`.

    Raises:
        InputError: If the tokenizer cannot say which characters a token stands for, or there is no
            chat template.
        ValueError: If `end_token` is none of the three.
    """

    def __init__(self, processor: Any, end_token: EndToken = "own") -> None:
        if end_token not in ("own", "never", "always"):
            raise ValueError(f"end_token must be own, never or always, got {end_token!r}")
        if not processor.tokenizer.is_fast:
            raise InputError(
                f"{type(processor.tokenizer).__name__} does not say which characters a token "
                "stands for, so it would not be known where an answer begins.",
                advice="Use the fast tokenizer of this model (package tokenizers).",
            )
        use_chat_template(processor, "model")
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._end_token = end_token
        self._apart = prompt_is_apart(processor)
        self._image_ids = _image_ids(processor)
        self._bos = [] if self._apart else _beginning(processor.tokenizer)
        # Many rows have pictures of the same sizes.
        self._expansions = lru_cache(maxsize=65536)(self._ask_for_expansions)

    @property
    def pad_token_id(self) -> int:
        """The id that fills rows up; the end token where the tokenizer has none."""
        tokenizer = self._tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    # ---- text ------------------------------------------------------------------------------------

    def _texts(self, row: PreferenceRow) -> _Texts:
        """A row as text, checked.

        Raises:
            PictureCountMismatch: If the rendered prompt has more or fewer places for pictures.
            UnusableResponse: If an answer is empty or holds an image token.
            InputError: See `check_row`; or if PaliGemma is given a prompt without a picture.
        """
        check_row(row)
        if self._apart and not row.images:
            raise InputError(
                f"row {row.id!r} has no picture, and PaliGemma's prompts must have one.",
                advice="Leave the row out, or use another model.",
            )
        prompt, joiner, closing = answer_frame(self._processor, row.prompt)
        context = row.context.rstrip()
        begun, blank = (f"{joiner}{context}", " ") if context else ("", joiner)
        token = getattr(self._processor, "image_token", None)
        if token and (found := prompt.count(token)) != len(row.images):
            raise PictureCountMismatch(
                f"row {row.id!r} has {len(row.images)} pictures, and its prompt {found} times "
                f"{token!r}.",
                advice="Take the image token out of the row's words, or check the chat template.",
            )
        for name in ("context", "chosen", "rejected"):
            if token and token in getattr(row, name):
                raise UnusableResponse(
                    f"row {row.id!r}: `{name}` holds {token!r}, which the model takes for a "
                    "picture.",
                    advice="Remove it.",
                )
        answers = []
        for answer, ends in ((row.chosen, row.chosen_ends), (row.rejected, row.rejected_ends)):
            wanted = ends if self._end_token == "own" else self._end_token == "always"
            if wanted and not closing:
                raise InputError(
                    f"row {row.id!r}: no end token is known; the template writes none, and the "
                    "tokenizer has none.",
                    advice="Give end_token: never, or set the tokenizer's eos_token.",
                )
            answers.append(f"{blank}{answer.strip()}{closing if wanted else ''}")
        chosen, rejected = answers
        if self._apart:
            return _Texts(prompt, begun, (chosen, rejected))
        return _Texts(prompt + begun, prompt + begun, (chosen, rejected))

    def _joint(self, texts: _Texts) -> tuple[list[int], list[tuple[list[int], int]]]:
        """Ids of the begun text alone, and of both whole texts with the place of the answer."""
        alone = self._ids(texts.begun)
        whole = []
        for answer in texts.answers:
            encoded = self._tokenizer(
                texts.begun + answer, add_special_tokens=False, return_offsets_mapping=True
            )
            ends = [end for _, end in encoded["offset_mapping"]]
            # A token that straddles the boundary belongs to the answer.
            start = next((i for i, end in enumerate(ends) if end > len(texts.begun)), len(ends))
            whole.append((list(encoded["input_ids"]), start))
        return alone, whole

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    # ---- with pictures ---------------------------------------------------------------------------

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
            InputError: As `_texts`.
        """
        texts = [self._texts(row) for row in rows]
        pairs: dict[int, EncodedPair] = {}
        pixels: dict[str, Any] = {}
        # Apart: processors disagree about rows without pictures beside rows with some.
        for seen in (True, False):
            chosen = [n for n, own in enumerate(pictures) if bool(own) is seen]
            if not chosen:
                continue
            given = [list(pictures[n]) for n in chosen] if seen else None
            prompts, tensors = self._process([texts[n].prompt for n in chosen], given)
            pixels |= tensors
            for n, (ids, types) in zip(chosen, prompts, strict=True):
                sizes = tuple(one.size for one in pictures[n])
                self._check_image_tokens(rows[n], ids, sizes)
                pairs[n] = self._pair(rows[n], texts[n], ids, types)
        return [pairs[n] for n in range(len(rows))], pixels

    def _process(
        self, texts: list[str], pictures: list[list[Image.Image]] | None
    ) -> tuple[list[tuple[list[int], dict[str, list[int]]]], dict[str, Any]]:
        """Ids and token types of each text, and the tensors of the pictures."""
        batch = self._processor(
            text=list(texts),
            images=pictures,
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
        self, row: PreferenceRow, texts: _Texts, prompt: list[int], types: dict[str, list[int]]
    ) -> EncodedPair:
        alone, whole = self._joint(texts)
        bos = self._bos if prompt[: len(self._bos)] != self._bos else []
        if self._apart:
            prompt = prompt + alone
        if self._bos and prompt[:2] == 2 * self._bos:
            raise InputError(
                f"row {row.id!r} begins with two {self._tokenizer.bos_token!r}.",
                advice="Take it out of the row's words, or out of the chat template.",
            )
        sides = []
        for ids, start in whole:
            same = min(_n_common(alone, ids), start)
            dropped = len(alone) - same
            kept = len(prompt) - dropped
            if prompt[kept:] != alone[same:]:
                raise InputError(
                    f"row {row.id!r}: {type(self._processor).__name__} tokenises the end of a "
                    "prompt otherwise than its tokenizer does.",
                    advice="Preference training needs a processor that leaves text as it is.",
                )
            full = [*bos, *prompt[:kept], *ids[same:]]
            sides.append(
                Side(full, len(bos) + kept + start - same, self._types(types, len(bos), len(full)))
            )
        pair = EncodedPair(*sides)
        if _same_answers(row, pair):
            raise EqualResponses(
                f"row {row.id!r}: `chosen` and `rejected` are equal.", advice="Remove the row."
            )
        return pair

    def _types(self, types: dict[str, list[int]], lead: int, length: int) -> dict[str, list[int]]:
        """Token types of a whole row: behind the prompt 0 is text; PaliGemma's answers are 1."""
        made = {}
        for name, values in types.items():
            behind = int(self._apart and name == "token_type_ids")
            own = ([0] * lead + values)[:length]
            made[name] = own + [behind] * (length - len(own))
        return made

    def _check_image_tokens(self, row: PreferenceRow, ids: list[int], sizes: Sizes) -> None:
        found = sum(token in self._image_ids for token in ids)
        wanted = self._n_image_tokens(sizes)
        if found != wanted:
            raise ImageTokenMismatch(
                f"row {row.id!r} has {found} image tokens, and its {len(sizes)} pictures need "
                f"{wanted}.",
                advice="The tokenizer must not cut texts off (truncation, model_max_length).",
            )

    # ---- without pixels --------------------------------------------------------------------------

    def length(self, row: PreferenceRow, sizes: Sizes) -> Length:
        """The length of a row, without its pixels.

        Args:
            row: The row.
            sizes: Width and height of its pictures.

        Raises:
            InputError: As calling the encoder.
        """
        texts = self._texts(row)
        text = self._expanded(texts.prompt, sizes)
        if self._apart:  # its processor puts BOS behind the pictures and a line end at the end
            pictures, token, question = text.rpartition(self._processor.image_token)
            ids = [*self._ids(pictures + token), self._tokenizer.bos_token_id]
            ids += self._ids(question + "\n")
        else:
            ids = self._ids(text)
        pair = self._pair(row, texts, ids, {})
        longer = max(len(pair.chosen.ids), len(pair.rejected.ids))
        return Length(longer, self._n_image_tokens(sizes))

    def _n_image_tokens(self, sizes: Sizes) -> int:
        text = "".join(self._expansions(sizes)) if sizes else ""
        return sum(token in self._image_ids for token in self._ids(text))

    def _expanded(self, text: str, sizes: Sizes) -> str:
        if not sizes:
            return text
        around = text.split(self._processor.image_token)
        places = zip(self._expansions(sizes), around[1:], strict=True)
        return around[0] + "".join(one + behind for one, behind in places)

    def _ask_for_expansions(self, sizes: Sizes) -> tuple[str, ...]:
        """What the processor writes for pictures of these sizes in one row: asked with blank ones.

        Together, because some cut a picture into tiles only where it is alone.
        """
        from PIL import Image

        batch = self._processor(
            text=[self._processor.image_token * len(sizes)],
            images=[[Image.new("RGB", size) for size in sizes]],
            return_text_replacement_offsets=True,
        )
        return tuple(one["replacement"] for one in batch["text_replacement_offsets"][0])


def _image_ids(processor: Any) -> frozenset[int]:
    """Ids that stand for features of pictures."""
    ids = getattr(processor, "image_token_ids", None) or [processor.image_token_id]
    return frozenset(one for one in ids if one is not None)


def _beginning(tokenizer: Any) -> list[int]:
    """BOS, if the tokenizer puts it before every text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []


def _n_common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _same_answers(row: PreferenceRow, pair: EncodedPair) -> bool:
    """Also if they differ in unknown words only, all of which are the same token."""
    chosen, rejected = pair.chosen, pair.rejected
    same = chosen.ids[chosen.start :] == rejected.ids[rejected.start :]
    return same or row.chosen.strip() == row.rejected.strip()
