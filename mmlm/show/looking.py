"""Where a model looked while it wrote each word of an answer.

Everything comes from the one run that wrote the answer: `mmlm.AttentionMap` noted the attention on
every image token, and :mod:`mmlm.token_places` knows which part of the picture a token shows.

    with AnswerStream(model, processor, inputs, [AttentionMap()]) as stream:
        for piece in stream: ...
    look = looking.of_stream(stream, pictures)
    look.of_span(10, 13)        # the map of answer[10:13] over the first picture
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, UnsupportedModel

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from mmlm.streaming import AnswerStream

__all__ = ["Look", "look", "of_stream", "prepared_otherwise", "token_spans"]


@dataclass(frozen=True, eq=False)
class Look:
    """An answer and, for each of its tokens, attention over the pictures.

    Attributes:
        text: The answer.
        spans: Per token its first character in the answer and the one behind its last, blanks
            around it left out; an empty span for tokens that are no text (the end).
        maps: Per picture fp32 [tokens, rows, columns]: attention on each part of the whole
            picture, mean over heads and layers. A map's sum is at most the share: what lies on
            padding or on row ends has no place in the picture.
        shares: fp32 [tokens, pictures]; attention on each picture as a whole, in [0, 1].
        layers: The decoder layers that were measured.
        layer_shares: fp32 [layers, tokens, pictures].
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    maps: tuple[np.ndarray, ...]
    shares: np.ndarray
    layers: tuple[int, ...]
    layer_shares: np.ndarray

    def tokens_of(self, start: int, end: int) -> tuple[int, ...]:
        """Numbers of the tokens that wrote any of ``text[start:end]``."""
        return tuple(i for i, (a, b) in enumerate(self.spans) if a < b and a < end and start < b)

    def of_span(self, start: int, end: int, image: int = 0) -> np.ndarray:
        """The map of a word: the mean over its tokens, fp32 [rows, columns].

        Args:
            start: Its first character in the answer.
            end: The character behind its last one.
            image: Number of the picture.

        Raises:
            InputError: If no token wrote any of these characters, or there is no such picture.
        """
        return self._mean(self._map(image), start, end)

    def share_of_span(self, start: int, end: int, image: int = 0) -> float:
        """How much of the attention a picture got while a word was written, in [0, 1]."""
        self._map(image)
        return float(self._mean(self.shares[:, image], start, end))

    def overall(self, image: int = 0) -> np.ndarray:
        """The mean over all tokens of the answer, fp32 [rows, columns]."""
        return self._map(image).mean(0)

    def as_json(self, digits: int = 4) -> dict[str, Any]:
        """Everything in plain JSON, numbers with so many significant digits."""
        return {
            "text": self.text,
            "spans": [list(span) for span in self.spans],
            "layers": list(self.layers),
            "shares": _rounded(self.shares, digits),
            "layer_shares": _rounded(self.layer_shares, digits),
            "maps": [_rounded(map_, digits) for map_ in self.maps],
        }

    def _map(self, image: int) -> np.ndarray:
        if not 0 <= image < len(self.maps):
            raise InputError(
                f"There is no picture {image}: the prompt has {len(self.maps)}.",
                advice="Pictures are numbered from 0, in the order of the prompt.",
            )
        return self.maps[image]

    def _mean(self, values: np.ndarray, start: int, end: int) -> np.ndarray:
        tokens = self.tokens_of(start, end)
        if not tokens:
            raise InputError(
                f"No token wrote the characters {start} to {end} of an answer of "
                f"{len(self.text)} characters.",
                advice="Ask for a word: mmlm.show.words.words(look.text) lists their places.",
            )
        return values[list(tokens)].mean(0)


def of_stream(stream: AnswerStream, pictures: Sequence[Image.Image]) -> Look:
    """What a finished stream with `mmlm.AttentionMap` among its methods saw.

    Args:
        stream: Read to its end.
        pictures: Those of the prompt, in its order.

    Raises:
        InputError: If nothing was measured.
        UnsupportedModel: As `look` does.
    """
    from mmlm.probes.attention_map import AttentionMap

    if AttentionMap.measures not in stream.records:
        raise InputError(
            "The stream has measured no attention over its pictures.",
            advice="Give AnswerStream the method mmlm.AttentionMap(), and read it to its end.",
        )
    record = stream.records[AttentionMap.measures]
    return look(stream.model, stream.processor, pictures, stream.token_ids, record)


def look(
    model: Any,
    processor: Any,
    pictures: Sequence[Image.Image],
    token_ids: Sequence[int],
    record: Mapping[str, Any],
) -> Look:
    """Puts an answer's tokens and what `mmlm.AttentionMap` measured onto the pictures.

    Args:
        model: The model that wrote the answer.
        processor: Its processor.
        pictures: Those of the prompt, in its order.
        token_ids: The new tokens, the end token included.
        record: What `mmlm.measured` gave for this row under ``attention_map``.

    Raises:
        InputError: If pictures, tokens and record do not belong together.
        UnsupportedModel: If it is not known which token of this model shows which part of a
            picture.
    """
    import numpy as np

    keys = record["keys"]
    if len(keys) != len(pictures) or len(record["maps"]) != len(token_ids):
        raise InputError(
            f"{len(pictures)} pictures and {len(token_ids)} tokens were given, but the record is "
            f"of {len(keys)} pictures and {len(record['maps'])} tokens.",
            advice="Give everything of one answer; for a batch call mmlm.measured(model, lengths).",
        )
    text, spans = token_spans(processor, token_ids)
    maps = tuple(
        _on_picture(model, processor, picture.size, [step[i] for step in record["maps"]], keys[i])
        for i, picture in enumerate(pictures)
    )
    shape = (len(record["layers"]), len(token_ids), len(pictures))
    layer_shares = np.asarray(record["shares"], np.float32).reshape(shape)
    return Look(
        text=text,
        spans=spans,
        maps=maps,
        shares=layer_shares.mean(0),
        layers=tuple(record["layers"]),
        layer_shares=layer_shares,
    )


def _on_picture(
    model: Any, processor: Any, size: tuple[int, int], steps: list[list[float]], keys: int
) -> np.ndarray:
    """Attention [tokens, positions of a picture] on the picture itself."""
    import torch

    from mmlm.token_places import footprints

    places = footprints(model, processor, size)
    if places.tokens != keys:
        raise prepared_otherwise(places.tokens, keys)
    values = torch.tensor(steps, dtype=torch.float32).reshape(len(steps), keys)
    spread: np.ndarray = places.spread(values).numpy()
    return spread


def prepared_otherwise(alone: int, together: int) -> UnsupportedModel:
    """The error for pictures that take another number of tokens in a prompt than alone."""
    return UnsupportedModel(
        f"What takes {alone} image tokens alone takes {together} in this prompt, so it is not "
        "known which of them shows which part of a picture.",
        advice="Ask about one picture at a time: this model prepares several in another way.",
    )


def token_spans(
    processor: Any, token_ids: Sequence[int]
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """An answer's text as the streams give it, and where in it each token stands.

    Tokens are decoded together, as tokenizers join words in ways of their own; bytes of one
    character that are several tokens share its place.
    """

    def decoded(n: int) -> str:
        text: str = processor.decode(token_ids[:n], skip_special_tokens=True)
        return text

    whole = decoded(len(token_ids))
    text = whole.strip()
    offset = len(whole) - len(whole.lstrip())
    spans: list[tuple[int, int]] = []
    begin = 0
    for n in range(1, len(token_ids) + 1):
        end = _common(decoded(n), whole)
        if end > begin:
            part = whole[begin:end]
            lead, trail = len(part) - len(part.lstrip()), len(part) - len(part.rstrip())
            a, b = begin + lead - offset, end - trail - offset
            a = min(max(a, 0), len(text))
            spans.append((a, max(a, b)))
            begin = end
        else:  # the first bytes of a character, or no text at all
            spans.append((-1, -1))
    return text, _filled(spans, len(text))


def _common(part: str, whole: str) -> int:
    """Length of the common beginning of two texts."""
    if whole.startswith(part):
        return len(part)
    pairs = zip(part + "\0", whole + "\1", strict=False)
    return next(i for i, (a, b) in enumerate(pairs) if a != b)


def _filled(spans: list[tuple[int, int]], end: int) -> tuple[tuple[int, int], ...]:
    """Tokens that alone are no text get the place of what they became part of."""
    filled: list[tuple[int, int]] = []
    following = (end, end)
    for span in reversed(spans):
        if span[0] >= 0:
            following = span
        filled.append(span if span[0] >= 0 else following)
    return tuple(reversed(filled))


def _rounded(values: np.ndarray, digits: int) -> Any:
    def short(x: Any) -> Any:
        return [short(part) for part in x] if isinstance(x, list) else float(f"{x:.{digits}g}")

    return short(values.tolist())
