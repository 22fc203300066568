"""Stage L: the language model learns the captions' language, without any image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from training.scratch.attention import PACKED
from training.scratch.batches import Buckets
from training.scratch.loop import Stage
from training.scratch.packing import IGNORED, Text, block_mask, encode, pad, positions
from training.scratch.source import Source

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["LanguageStage", "answer_loss", "decode"]


def decode(text_model: nn.Module, embedded: Tensor, segments: list[int]) -> Tensor:
    """Last hidden states [B, L, D] of a Llama-like decoder on packed rows.

    Args:
        text_model: the decoder without its head, its attention set to `PACKED` or any other.
        embedded: inputs [B, L, D]; their precision is that of the residual stream.
        segments: lengths of the prefix and the texts, L in all.
    """
    # The library takes a ready-made 4-D mask as it is; `segments` travels down to the attention.
    return text_model(
        inputs_embeds=embedded,
        attention_mask=block_mask(segments, embedded.dtype).to(embedded.device),
        position_ids=positions(segments).to(embedded.device),
        use_cache=False,
        segments=segments,
    ).last_hidden_state


def answer_loss(
    head: nn.Module, states: Tensor, labels: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the labelled tokens, each predicted from the place before it.

    Only labelled places go through the head.

    Args:
        head: hidden state to logits.
        states: [B, T, D] of one segment.
        labels: [B, T], `IGNORED` where there is no loss; never at the first place.
        weight: [V], how much each word counts; None counts all alike.

    Returns:
        The weighted mean, to be minimised, and the plain mean, to be compared.
    """
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    logits = head(states[:, :-1][labelled]).float()
    losses = nn.functional.cross_entropy(logits, targets[labelled], reduction="none")
    plain = losses.mean()
    if weight is None:
        return plain, plain
    weights = weight[targets[labelled]]
    return (losses * weights).sum() / weights.sum(), plain.detach()


class LanguageStage(Stage):
    """Next-token loss on captions behind their question.

    Args:
        language: trained in place.
        tokenizer: of the texts.
        source: of the texts.
        batch_size: captions a step.
        max_tokens: longest text.
        residual_dtype: precision of the residual stream under autocast.
        seed: of the order of batches.
    """

    name: ClassVar[str] = "language"

    def __init__(
        self,
        language: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        source: Source,
        batch_size: int,
        *,
        max_tokens: int,
        residual_dtype: torch.dtype,
        seed: int,
    ) -> None:
        super().__init__()
        self.language = language
        self._tokenizer, self._source, self._max_tokens = tokenizer, source, max_tokens
        self._residual_dtype = residual_dtype
        self._prefix = tokenizer("<bos> user :", add_special_tokens=False)["input_ids"]
        self._buckets = Buckets(self._draw, lambda text: len(text.ids), batch_size, seed)
        language.set_attn_implementation(PACKED)

    def batch(self, step: int, rank: int, world_size: int) -> dict[str, Any]:
        """Captions behind `<bos> user :`, padded on the right."""
        texts = [text for _, text in self._buckets.batch(step, rank, world_size)]
        head = self._prefix
        rows = [Text(head + t.ids, [IGNORED] * len(head) + t.labels) for t in texts]
        ids, labels = pad(rows, self._tokenizer.pad_token_id)
        return {"ids": ids, "labels": labels}

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The caption loss."""
        embedded = self.language.get_input_embeddings()(ids).to(self._residual_dtype)
        states = decode(self.language.get_decoder(), embedded, [ids.shape[1]])
        loss, _ = answer_loss(self.language.lm_head, states, labels)
        return {"loss": loss}

    def _draw(self, index: int) -> Text:
        described, _ = self._source.texts(index)
        return encode(self._tokenizer, [described], self._max_tokens)[0]
