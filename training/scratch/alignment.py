"""Stage A: tower, projector and language model together, two texts behind each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.scratch.attention import DENSE, PACKED
from training.scratch.batches import Buckets
from training.scratch.language import answer_loss, decode
from training.scratch.loop import Stage
from training.scratch.packing import Text, encode, pad
from training.scratch.source import Source
from training.scratch.vision import normalise, patch_labels, patch_loss

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

__all__ = ["AlignmentStage", "ProjectorStage", "RefinementStage"]


class AlignmentStage(Stage):
    """Caption loss plus weighted question loss, everything trained.

    A row is `<bos> user : IMAGE | caption round | question round` (see `training.scratch.packing`).

    Args:
        model: trained in place.
        tokenizer: of the texts.
        source: of pictures and texts.
        batch_size: pictures a step.
        max_tokens: longest text behind the image.
        question_tokens: longest question round.
        question_weight: factor on the question loss.
        tower_rate: factor on the tower's learning rate.
        pixel_mean: see `training.scratch.vision.normalise`.
        pixel_std: likewise.
        residual_dtype: precision of the language model's residual stream under autocast.
        seed: of the order of batches.
        patch_head: goes on naming the patches beside the texts, None for texts alone. The tower
            then keeps learning to see from a hundred labels a picture, which costs almost nothing:
            its states are computed anyway.
        patch_weight: factor on the patch loss.
        emphasis: how much the source's content words count beside the others. Most words of a
            caption only say how a sentence was phrased, which is random; they drown the few that
            depend on the picture.
    """

    name: ClassVar[str] = "alignment"
    trained: ClassVar[Literal["all", "projector"]] = "all"

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        source: Source,
        batch_size: int,
        *,
        max_tokens: int,
        question_tokens: int,
        question_weight: float,
        tower_rate: float,
        pixel_mean: float,
        pixel_std: float,
        residual_dtype: torch.dtype,
        seed: int,
        patch_head: nn.Module | None = None,
        patch_weight: float = 0.0,
        emphasis: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.patch_head, self._patch_weight = model, patch_head, patch_weight
        self._tokenizer, self._source = tokenizer, source
        self._max_tokens, self._question_tokens = max_tokens, question_tokens
        self._question_weight, self._tower_rate = question_weight, tower_rate
        self._pixels, self._residual_dtype = (pixel_mean, pixel_std), residual_dtype
        prefix = tokenizer("<bos> user :", add_special_tokens=False)["input_ids"]
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)
        self.register_buffer("word_weight", None, persistent=False)
        if emphasis != 1.0:
            self.word_weight = torch.ones(len(tokenizer))
            content = tokenizer.convert_tokens_to_ids(source.content_words())
            self.word_weight[content] = emphasis
        self._buckets = Buckets(self._draw, lambda pair: len(pair[0].ids), batch_size, seed)
        model.requires_grad_(self.trained == "all")
        model.model.multi_modal_projector.requires_grad_(True)
        # Behind the state that LLaVA reads; no gradient reaches it.
        model.model.vision_tower.post_layernorm.requires_grad_(False)
        model.set_attn_implementation({"text_config": PACKED, "vision_config": DENSE})

    def rate(self, parameter_name: str) -> float:
        """The tower learns more slowly."""
        return self._tower_rate if ".vision_tower." in parameter_name else 1.0

    def batch(self, step: int, rank: int, world_size: int) -> dict[str, Any]:
        """Pixels, and ids and labels of both texts."""
        drawn = self._buckets.batch(step, rank, world_size)
        captions, questions = zip(*(texts for _, texts in drawn), strict=True)
        caption_ids, caption_labels = pad(captions, self._tokenizer.pad_token_id)
        question_ids, question_labels = pad(questions, self._tokenizer.pad_token_id)
        pictures, maps, _ = zip(*(self._source.picture(i) for i, _ in drawn), strict=True)
        return {
            "pixels": normalise(np.stack(pictures), *self._pixels),
            **self._patches(np.stack(maps)),
            "caption_ids": caption_ids,
            "caption_labels": caption_labels,
            "question_ids": question_ids,
            "question_labels": question_labels,
        }

    def forward(
        self,
        pixels: Tensor,
        caption_ids: Tensor,
        caption_labels: Tensor,
        question_ids: Tensor,
        question_labels: Tensor,
        patch_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses and their weighted sum."""
        model = self.model
        seen = model.get_image_features(pixels)
        features = torch.stack(list(seen.pooler_output))  # [B, P, D]
        embed = model.get_input_embeddings()
        prefix = embed(self.prefix).expand(len(pixels), -1, -1)
        parts = [prefix, features, embed(caption_ids), embed(question_ids)]
        embedded = torch.cat([part.to(self._residual_dtype) for part in parts], 1)
        segments = [
            prefix.shape[1] + features.shape[1],
            caption_ids.shape[1],
            question_ids.shape[1],
        ]
        states = decode(model.model.language_model, embedded, segments)
        _, described, answered = states.split(segments, 1)
        weight = self.word_weight
        caption, caption_plain = answer_loss(model.lm_head, described, caption_labels, weight)
        question, question_plain = answer_loss(model.lm_head, answered, question_labels, weight)
        losses = {
            "loss": caption + self._question_weight * question,
            "caption_loss": caption_plain,
            "question_loss": question_plain,
        }
        if self.patch_head is not None:
            patch, accuracy = patch_loss(
                self.patch_head, seen.last_hidden_state[:, 1:], patch_labels
            )
            losses["loss"] = losses["loss"] + self._patch_weight * patch
            losses |= {"patch_loss": patch, "patch_accuracy": accuracy}
        return losses

    def _patches(self, maps: NDArray[np.uint8]) -> dict[str, Tensor]:
        if self.patch_head is None:
            return {}
        patch = self.model.config.vision_config.patch_size
        return {"patch_labels": patch_labels(maps, patch, self._source.n_classes)}

    def _draw(self, index: int) -> tuple[Text, Text]:
        described, asked = self._source.texts(index)
        [caption] = encode(self._tokenizer, [described], self._max_tokens)
        [questions] = encode(self._tokenizer, [asked], self._question_tokens)
        return caption, questions


class ProjectorStage(AlignmentStage):
    """The same losses with the projector alone trained, so that it finds the words first."""

    name: ClassVar[str] = "projector"
    trained: ClassVar[Literal["all", "projector"]] = "projector"


class RefinementStage(AlignmentStage):
    """A second period of the same, usually with a patch head and the tower at full rate."""

    name: ClassVar[str] = "refinement"
