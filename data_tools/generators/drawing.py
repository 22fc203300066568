"""How a token is drawn, and where a sentence ends: one rule for every generator with a model.

A request's random numbers come from its own seed, in the order (token, sample), and a token is the
one whose share of the cumulated distribution holds the number. What is drawn for a request thus
depends on its seed and its prompt and on nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_tools.generators import Sample

__all__ = ["SENTENCE_END", "Stops", "Uniforms", "draw"]

SENTENCE_END = r"(?<![0-9])[.!?]\n*$"
"""Tokens whose text matches end a sentence: ``.``, ``!``, ``?`` at their end, line breaks behind.

Also ``word.`` and ``...`` where a vocabulary has them. Not ``3.``: a digit before the mark tells
that a number may go on. Where digit and mark are two tokens nothing tells, and the mark ends the
sentence, as in the authors' code.
"""


@dataclass(frozen=True, eq=False)
class Stops:
    """Tokens that end a sample.

    Attributes:
        sentence: Ids of tokens that end a sentence; they are part of it.
        caption: Ids of tokens that end the caption; they are not.
    """

    sentence: frozenset[int]
    caption: frozenset[int]

    @classmethod
    def of(cls, model: Any, processor: Any) -> Stops:
        """Reads a vocabulary, token by token.

        Args:
            model: A Hugging Face model; its generation configuration names the end tokens.
            processor: Its processor.
        """
        tokenizer = processor.tokenizer
        ends = model.generation_config.eos_token_id
        caption = {ends} if isinstance(ends, int) else set(ends or ())
        if tokenizer.eos_token_id is not None:
            caption.add(tokenizer.eos_token_id)
        special = caption | set(tokenizer.all_special_ids)
        ids = [i for i in range(len(tokenizer)) if i not in special]
        texts = tokenizer.batch_decode([[i] for i in ids])
        pattern = re.compile(SENTENCE_END)
        sentence = {i for i, text in zip(ids, texts, strict=True) if pattern.search(text)}
        return cls(frozenset(sentence), frozenset(caption))

    def __contains__(self, token: int) -> bool:
        """Whether a token ends a sample."""
        return token in self.sentence or token in self.caption

    def sample(self, tokenizer: Any, ids: Sequence[int]) -> Sample:
        """What was drawn, as a sample.

        A sample that was cut before it ended is no sentence: its text is "", and it is not
        finished.
        """
        if not ids or ids[-1] not in self:
            return Sample("", finished=False)
        finished = ids[-1] in self.caption
        words = ids[:-1] if finished else ids
        return Sample(tokenizer.decode(words, skip_special_tokens=True).strip(), finished)


class Uniforms:
    """The random numbers of one request, in [0, 1).

    Args:
        seed: The request's; any whole number >= 0.
        n: Samples.
    """

    _BLOCK = 16

    def __init__(self, seed: int, n: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._n = n
        self._drawn = np.empty((0, n))

    def at(self, step: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The numbers of all samples for their token number ``step``, float64 [n]."""
        while step >= len(self._drawn):
            more = self._generator.random((self._BLOCK, self._n))
            self._drawn = np.concatenate([self._drawn, more])
        numbers: np.ndarray[Any, np.dtype[np.float64]] = self._drawn[step]
        return numbers


def draw(
    logits: Float[Tensor, "M V"],
    uniforms: Float[Tensor, "M k"],
    temperature: float,
    never: Int[Tensor, "x"],
) -> Int[Tensor, "M k"]:
    """Tokens by inversion of the cumulated distribution, in the order of their ids.

    Args:
        logits: Of the next token; computed with in fp32.
        uniforms: Random numbers in [0, 1), several draws from one distribution.
        temperature: > 0.
        never: Tokens that are never drawn (placeholders of pictures).
    """
    z = (logits.float() / temperature).index_fill(1, never, float("-inf"))
    # Sums of many small fp32 shares in double: the end of a large vocabulary counts too.
    cumulated = z.softmax(-1).cumsum(-1, dtype=torch.float64)
    wanted = uniforms.to(cumulated) * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, wanted, right=True)
    return found.clamp(max=logits.shape[1] - 1)
