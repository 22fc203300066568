"""Conversations as token ids with labels, and their pictures as the processor's tensors.

The processor itself expands the image placeholders and says where it did so; the answers' spans are
moved along, and a token is learned if any of its characters lies in a span. So a token that begins
before an answer and reaches into it counts as answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from mmlm.answers import prompt_is_apart
from mmlm.errors import InputError
from mmlm.inputs import render
from training.expansion import PictureText
from training.sft.documents import IGNORED, TOKEN_TYPES, Document
from training.sft.labels import EndToken, Rendered, Renderer
from training.sft.rows import Conversation
from training.turns import ROLES, Turns, roles_of_spans

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = ["Encoder"]


class Encoder:
    """Turns conversations and their pictures into documents and tensors.

    Args:
        processor: A Hugging Face processor with a chat template and a fast tokenizer.
        end_token: See `training.sft.labels.EndToken`.
        turns: What the model's methods must know about turns (`training.turns`).

    Raises:
        InputError: If the tokenizer cannot say where its tokens stand in the text, or there is no
            chat template.
    """

    def __init__(
        self, processor: Any, end_token: EndToken = "template", *, turns: Turns = "unread"
    ) -> None:
        if not processor.tokenizer.is_fast:
            raise InputError(
                f"{type(processor.tokenizer).__name__} does not say which characters a token "
                "stands for: labels would not be exact.",
                advice="Use the fast tokenizer of this model (package tokenizers).",
            )
        if _appends(processor.tokenizer):
            raise InputError(
                "The tokenizer puts an end token of its own behind every text, which nobody says.",
                advice="Load it with add_eos_token=False.",
            )
        self._processor = processor
        self._apart = prompt_is_apart(processor)
        self._pictures = PictureText(processor)
        # PaliGemma's processor writes the end token itself.
        self._renderer = Renderer(
            processor, "none" if self._apart else end_token, headers=turns == "needed"
        )
        self._turns = turns
        if turns != "unread" and self._apart:
            raise InputError(
                "PaliGemma reads its whole prompt both ways; its rows have no turns to tell apart.",
                advice="Train it without methods that open its attention.",
            )

    @property
    def pad_token_id(self) -> int:
        """The id that fills rows up; the end token where the tokenizer has none."""
        tokenizer = self._processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def rendered(self, row: Conversation) -> Rendered:
        """The text of a row, its placeholders counted.

        Raises:
            InputError: As `training.sft.labels.Renderer`, with the row's place; or if the text has
                more or fewer placeholders than the row has pictures.
        """
        try:
            text = self._renderer(row.messages)
        except InputError as error:
            raise InputError(f"{row.place}: {error}", advice=error.advice) from error
        token = getattr(self._processor, "image_token", None)
        n_placeholders = text.text.count(token) if token else 0
        if n_placeholders != len(row.images):
            raise InputError(
                f"{row.place}: row {row.id!r} has {len(row.images)} pictures, and its text "
                f"{n_placeholders} times {token!r}.",
                advice="Take the image token out of the row's words, or check the chat template.",
            )
        return text

    def __call__(
        self, rows: Sequence[Conversation], pictures: Sequence[Sequence[Image.Image]]
    ) -> tuple[list[Document], dict[str, Tensor]]:
        """Encodes rows.

        Args:
            rows: Conversations.
            pictures: The pictures of each row.

        Returns:
            One document per row, and the pixel tensors of all pictures, in their order.

        Raises:
            InputError: As `rendered`; or if a row has nothing to learn, or the model cannot be
                trained on it.
        """
        documents: dict[int, Document] = {}
        pixels: dict[str, Tensor] = {}
        # Apart: processors disagree about rows without pictures beside rows with some.
        for seen in (True, False):
            chosen = [n for n, own in enumerate(pictures) if bool(own) is seen]
            if not chosen:
                continue
            made, tensors = self._same_kind(
                [rows[n] for n in chosen], [list(pictures[n]) for n in chosen] if seen else None
            )
            documents |= dict(zip(chosen, made, strict=True))
            pixels |= tensors
        return [documents[n] for n in range(len(rows))], pixels

    def _same_kind(
        self, rows: Sequence[Conversation], pictures: list[list[Image.Image]] | None
    ) -> tuple[list[Document], dict[str, Tensor]]:
        """Rows that all have pictures, or all have none."""
        texts = [self.rendered(row) for row in rows]
        if self._apart:
            batch = self._prefix_and_suffix(rows, texts, pictures)
        else:
            batch = self._processor(
                text=[one.text for one in texts],
                images=pictures,
                add_special_tokens=_adds_special_tokens(self._processor, texts[0].text),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
            moved = _moved(batch, texts, seen=pictures is not None)
            batch["labels"] = _labels(batch, [spans for spans, _ in moved])
            if self._turns != "unread":
                batch[ROLES] = _roles(batch, moved)
        lengths = batch.pop("attention_mask").sum(dim=1).tolist()
        ids, labels = batch.pop("input_ids"), batch.pop("labels")
        for name in ("offset_mapping", "text_replacement_offsets"):
            batch.pop(name, None)
        types = {name: batch.pop(name) for name in (*TOKEN_TYPES, ROLES) if name in batch}
        if "token_type_ids" not in self._processor.model_input_names or not _says_anything(types):
            # Many fast tokenizers make them, and most models refuse them.
            types.pop("token_type_ids", None)
        documents = [
            Document(
                ids[n, :length],
                labels[n, :length],
                len(pictures[n]) if pictures else 0,
                {name: values[n, :length] for name, values in types.items()},
            )
            for n, length in enumerate(lengths)
        ]
        for row, document in zip(rows, documents, strict=True):
            _check(self._processor.tokenizer, row, document)
        return documents, dict(batch)

    def _prefix_and_suffix(
        self,
        rows: Sequence[Conversation],
        texts: Sequence[Rendered],
        pictures: list[list[Image.Image]] | None,
    ) -> Any:
        """PaliGemma (arXiv 2407.07726): a prefix that is read both ways, and the answer behind it.

        Its processor writes the prefix's end, the end token and the labels.
        """
        parts = [self._prefix(row, text) for row, text in zip(rows, texts, strict=True)]
        return self._processor(
            text=[prefix for prefix, _ in parts],
            suffix=[suffix for _, suffix in parts],
            images=pictures,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )

    def _prefix(self, row: Conversation, text: Rendered) -> tuple[str, str]:
        """The prompt as it is at inference, and the answer without an end token."""
        if not row.images or len(text.spans) != 1:
            raise InputError(
                f"{row.place}: row {row.id!r} has {len(row.images)} pictures and "
                f"{len(text.spans)} answers; PaliGemma reads its whole prompt both ways, so a row "
                "must have a picture and exactly one answer.",
                advice="Split the row into one row per question, or use another model.",
            )
        return render(self._processor, row.messages[:-1]), row.messages[-1]["content"][0][
            "text"
        ].strip()

    def count(self, row: Conversation, sizes: tuple[tuple[int, int], ...]) -> int:
        """The length of a row's document, without its pixels.

        Args:
            row: A conversation.
            sizes: Width and height of its pictures.

        Raises:
            InputError: As `rendered`.
        """
        text = self.rendered(row)
        tokenizer = self._processor.tokenizer
        if self._apart:
            prefix, suffix = self._prefix(row, text)
            prompt = self._pictures.expanded(prefix, sizes)
            ids = tokenizer([prompt + "\n", suffix], add_special_tokens=False)["input_ids"]
            return len(ids[0]) + len(ids[1]) + 2  # BOS, EOS
        special = _adds_special_tokens(self._processor, text.text)
        expanded = self._pictures.expanded(text.text, sizes)
        return len(tokenizer(expanded, add_special_tokens=special)["input_ids"])

    def image_tokens(self, sizes: tuple[tuple[int, int], ...]) -> int:
        """Tokens that the processor writes for pictures of these sizes, separators included."""
        text = self._pictures.expanded(self._processor.image_token * len(sizes), sizes)
        return len(self._processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _adds_special_tokens(processor: Any, text: str) -> bool:
    """Whether the tokenizer shall add its own special tokens: not if the template wrote BOS."""
    bos = processor.tokenizer.bos_token
    return bos is None or not text.startswith(bos)


def _appends(tokenizer: Any) -> bool:
    """Whether the tokenizer ends every text with a special token."""
    plain, whole = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    return whole[-1] != plain[-1]


def _says_anything(types: dict[str, Tensor]) -> bool:
    return any(bool(values.any()) for values in types.values())


_Spans: TypeAlias = list[tuple[int, int]]


def _moved(
    batch: Any, texts: Sequence[Rendered], *, seen: bool
) -> list[tuple[_Spans, list[tuple[int, int] | None]]]:
    """Answers and headers of each text, where they are once the placeholders are expanded."""
    expanded = batch["text_replacement_offsets"] if seen else [[]] * len(texts)

    def moved(span: tuple[int, int], placeholders: Sequence[Any]) -> tuple[int, int]:
        # Neither answers nor headers hold pictures, so both ends move alike.
        by = sum(
            (one["new_span"][1] - one["new_span"][0]) - (one["span"][1] - one["span"][0])
            for one in placeholders
            if one["span"][1] <= span[0]
        )
        return span[0] + by, span[1] + by

    return [
        (
            [moved(span, own) for span in text.spans],
            [span and moved(span, own) for span in text.headers],
        )
        for text, own in zip(texts, expanded, strict=True)
    ]


def _labels(batch: Any, spans: Sequence[_Spans]) -> Tensor:
    """Ids where a token's characters overlap an answer, `IGNORED` elsewhere [B, L]."""
    import torch

    ids, offsets = batch["input_ids"], batch["offset_mapping"]
    labels = torch.full_like(ids, IGNORED)
    for row, own in enumerate(spans):
        token_start, token_end = offsets[row].unbind(-1)
        for start, end in own:
            inside = (token_start < end) & (token_end > start)
            labels[row, inside] = ids[row, inside]
    return labels


def _roles(batch: Any, moved: Sequence[tuple[_Spans, list[tuple[int, int] | None]]]) -> Tensor:
    """What methods read about the turns of each text [B, L]."""
    import torch

    return torch.stack(
        [
            roles_of_spans(batch["offset_mapping"][row], batch["labels"][row], spans, headers)
            for row, (spans, headers) in enumerate(moved)
        ]
    )


def _check(tokenizer: Any, row: Conversation, document: Document) -> None:
    ids = document.ids.tolist()
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise InputError(
            f"{row.place}: the row begins with two {tokenizer.bos_token!r}.",
            advice="Take it out of the row's words, or out of the chat template.",
        )
    if not bool((document.labels[1:] != IGNORED).any()):
        raise InputError(
            f"{row.place}: no token of row {row.id!r} would be learned.",
            advice="Check that its answers are not empty.",
        )
