"""Grounding DINO as its authors released it: groundingdino-py with their ``.pth`` checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.detectors.grounding import ENCODER_TOKENS, GroundingEngine, Rules
from data_tools.detectors.groundingdino_package import (
    build,
    fill,
    quiet,
    read_checkpoint,
)
from data_tools.detectors.neural import NeuralDetector, PictureFeatures, not_too_thin

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["GroundingDINO"]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class GroundingDINO(NeuralDetector):
    """Grounding DINO (Liu et al., arXiv 2303.05499) by groundingdino-py.

    Every caption is a forward pass of its own: in a batch the package repeats the masks of names
    per attention head in another order than torch reads them, so that captions would get each
    other's. The scores of names depend a little on the names beside them in a caption. They are
    sorted, so that a set of names always gives the same findings.

    Attributes:
        checkpoint: The released file, e.g. ``groundingdino_swinb_cogcoor.pth``.
        config: ``SwinB``, ``SwinT_OGC``, or the path of a configuration of the package's kind. It
            must be the one the checkpoint was trained with.
        text_encoder: BERT's folder or hub identifier. Only its tokenizer and configuration are
            read: its weights are in the checkpoint.
        box_threshold: Least confidence of a box; 0.35 by SENTINEL's authors (arXiv 2507.12455).
        text_threshold: Least confidence of a token that belongs to a box's phrase; 0.25 by them.
        substring_match: Their rule of matching phrases with names; see `labels_to_findings`.
        max_text_tokens: Room of a caption; 200 by them, who cut off the rest. At most 254.
        names_at_once: Most names in a caption; None for as many as fit. With 1, findings do not
            depend on what else is asked, at the price of one pass per name.
        shortest_side: Pictures are scaled so that their shorter side has so many pixels ...
        longest_side: ... unless the longer one would have more than these. 800 and 1333 in the
            released code.
        pictures_kept: For how many pictures image features are kept, about 50 MB each at 800 x
            1333.
        device: ``auto`` (a GPU if there is one), or torch's name of a device.
        dtype: ``float32``, or autocast in ``bfloat16`` or ``float16``.
    """

    checkpoint: str
    config: str = "SwinB"
    text_encoder: str = "bert-base-uncased"
    box_threshold: float = 0.35
    text_threshold: float = 0.25
    substring_match: bool = False
    max_text_tokens: int = 200
    names_at_once: int | None = None
    shortest_side: int = 800
    longest_side: int = 1333
    pictures_kept: int = 16
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuses values that cannot be; raises ValueError."""
        super().__post_init__()
        if self.max_text_tokens > ENCODER_TOKENS:
            raise ValueError(
                f"max_text_tokens must be at most {ENCODER_TOKENS}, got {self.max_text_tokens}"
            )
        if not 32 <= self.shortest_side <= self.longest_side:
            raise ValueError(
                "shortest_side must be at least 32 and at most longest_side, got "
                f"{self.shortest_side} and {self.longest_side}"
            )

    @property
    def facts(self) -> Mapping[str, Any]:
        """Weights, thresholds, and how pictures and names are given to the model."""
        return self._facts(
            config=Path(self.config).name,
            box_threshold=self.box_threshold,
            text_threshold=self.text_threshold,
            substring_match=self.substring_match,
            max_text_tokens=self.max_text_tokens,
            names_at_once=self.names_at_once,
            sides=[self.shortest_side, self.longest_side],
        )

    def _load(self) -> GroundingEngine:
        from mmlm.runner import fingerprint

        device = self.torch_device()
        state = read_checkpoint(Path(self.checkpoint))
        model = build(self.config, self.text_encoder)
        fill(model, state, self.checkpoint)
        model.to(device).eval()
        features = PictureFeatures(
            model.backbone, lambda image: self._pixels(image, device), self.pictures_kept
        )

        def forward(
            arguments: tuple[Any, ...], captions: list[str]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            (pixels,) = arguments
            batch = type(pixels)(
                *(t.expand(len(captions), *t.shape[1:]) for t in pixels.decompose())
            )
            with quiet():
                found = model(batch, captions=captions)
            return found["pred_logits"], found["pred_boxes"]

        rules = Rules(
            self.box_threshold,
            self.text_threshold,
            self.substring_match,
            self.max_text_tokens,
            self.names_at_once,
            captions_at_once=1,
        )
        return GroundingEngine(forward, model.tokenizer, features, fingerprint(model), rules)

    def _pixels(self, image: Image.Image, device: torch.device) -> tuple[Any, ...]:
        with quiet():
            import groundingdino.datasets.transforms as transforms
            from groundingdino.util.misc import nested_tensor_from_tensor_list

        steps = transforms.Compose(
            [
                transforms.RandomResize([self.shortest_side], max_size=self.longest_side),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        )
        pixels, _ = steps(not_too_thin(image), None)
        return (nested_tensor_from_tensor_list([pixels.to(device)]),)
