"""Detectors of transformers: Grounding DINO and OWLv2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_tools.detectors import Finding
from data_tools.detectors.grounding import ENCODER_TOKENS, GroundingEngine, Rules
from data_tools.detectors.neural import (
    Engine,
    NeuralDetector,
    PictureFeatures,
    boxes_in,
    not_too_thin,
)
from data_tools.pictures import Picture
from mmlm.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["BOX_THRESHOLDS", "HFDetector"]

BOX_THRESHOLDS = {"grounding-dino": 0.35, "owlv2": 0.1}
"""Default confidence by type of model: SENTINEL's for Grounding DINO (arXiv 2507.12455); for OWLv2
the default of transformers' own post-processing. Nobody published one for OWLv2 in this pipeline;
0.1 to 0.3 are in use."""


@dataclass(frozen=True, kw_only=True)
class HFDetector(NeuralDetector):
    """Grounding DINO (arXiv 2303.05499) or OWLv2 (arXiv 2306.09683) by transformers.

    Attributes:
        model: Folder or hub identifier, e.g. ``IDEA-Research/grounding-dino-base`` or
            ``google/owlv2-base-patch16-ensemble``.
        box_threshold: Least confidence of a box; None for the model's entry in `BOX_THRESHOLDS`.
        text_threshold: Grounding DINO: least confidence of a token that belongs to a box's phrase.
        substring_match: Grounding DINO: the authors' rule; see `labels_to_findings`.
        max_text_tokens: Grounding DINO: room of a caption; at most 254.
        prompt: OWLv2: what is asked per name, {} standing for it; CLIP's usual one.
        names_at_once: Most names in a caption (Grounding DINO) or forward pass (OWLv2); None for
            as many as fit into a caption, and 64 for OWLv2. A caption's names influence each other
            a little, those of OWLv2 do not.
        captions_at_once: Grounding DINO: captions per forward pass.
        pictures_kept: For how many pictures image features are kept.
        device: ``auto`` (a GPU if there is one), or torch's name of a device.
        dtype: ``float32``, or autocast in ``bfloat16`` or ``float16``.
    """

    model: str
    box_threshold: float | None = None
    text_threshold: float = 0.25
    substring_match: bool = False
    max_text_tokens: int = 200
    prompt: str = "a photo of a {}"
    names_at_once: int | None = None
    captions_at_once: int = 4
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
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt must contain {{}} once, got {self.prompt!r}")

    @property
    def facts(self) -> Mapping[str, Any]:
        """Weights, thresholds, and how names are given to the model."""
        engine = self.engine
        if isinstance(engine, _OwlEngine):
            return self._facts(
                model_type="owlv2", box_threshold=engine.box_threshold, prompt=self.prompt
            )
        return self._facts(
            model_type="grounding-dino",
            box_threshold=self._threshold("grounding-dino"),
            text_threshold=self.text_threshold,
            substring_match=self.substring_match,
            max_text_tokens=self.max_text_tokens,
            names_at_once=self.names_at_once,
        )

    def _threshold(self, model_type: str) -> float:
        return BOX_THRESHOLDS[model_type] if self.box_threshold is None else self.box_threshold

    def _load(self) -> Engine:
        from mmlm.runner import fingerprint

        device = self.torch_device()
        model, processor = _pretrained(self.model)
        weights = fingerprint(model)
        model.to(device).eval()
        build = self._grounding if model.config.model_type == "grounding-dino" else self._owl
        return build(model, processor, weights)

    def _grounding(self, model: Any, processor: Any, weights: str) -> Engine:
        def pixels(image: Image.Image) -> tuple[Any, ...]:
            made = processor.image_processor(not_too_thin(image), return_tensors="pt")
            return made["pixel_values"].to(model.device), made["pixel_mask"].to(model.device)

        def forward(
            arguments: tuple[Any, ...], captions: list[str]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            text = processor.tokenizer(
                captions, padding=True, return_token_type_ids=True, return_tensors="pt"
            )
            values, mask = (one.expand(len(captions), *one.shape[1:]) for one in arguments)
            found = model(pixel_values=values, pixel_mask=mask, **text.to(model.device))
            return found.logits, found.pred_boxes

        rules = Rules(
            self._threshold("grounding-dino"),
            self.text_threshold,
            self.substring_match,
            self.max_text_tokens,
            self.names_at_once,
            self.captions_at_once,
        )
        features = PictureFeatures(model.model.backbone, pixels, self.pictures_kept)
        return GroundingEngine(forward, processor.tokenizer, features, weights, rules)

    def _owl(self, model: Any, processor: Any, weights: str) -> Engine:
        return _OwlEngine(
            model, processor, weights, self._threshold("owlv2"), self.prompt,
            self.names_at_once or 64, self.pictures_kept,
        )  # fmt: skip


class _OwlEngine:
    """OWLv2: every name has a confidence of its own at every place of the picture."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        weights: str,
        box_threshold: float,
        prompt: str,
        names_at_once: int,
        kept: int,
    ) -> None:
        self.weights = weights
        self.box_threshold = box_threshold
        self._model = model
        self._processor = processor
        self._prompt = prompt
        self._names_at_once = names_at_once
        self.features = PictureFeatures(model.owlv2.vision_model, self._pixels, kept)

    def _pixels(self, image: Image.Image) -> tuple[Any, ...]:
        made = self._processor.image_processor(not_too_thin(image), return_tensors="pt")
        return (made["pixel_values"].to(self._model.device),)

    def find(self, picture: Picture, names: Sequence[str]) -> dict[str, Finding | None]:
        """Looks for names; None for one that is too long for the text encoder."""
        room = self._model.config.text_config.max_position_embeddings
        ids = self._processor.tokenizer([self._prompt.format(name) for name in names])["input_ids"]
        readable = [name for name, own in zip(names, ids, strict=True) if len(own) <= room]
        found: dict[str, Finding | None] = dict.fromkeys(names)
        for start in range(0, len(readable), self._names_at_once):
            found |= self._findings(picture, readable[start : start + self._names_at_once], room)
        return found

    def _findings(self, picture: Picture, names: Sequence[str], room: int) -> dict[str, Finding]:
        (pixels,) = self.features.show(picture)
        text = self._processor.tokenizer(
            [self._prompt.format(name) for name in names],
            padding="max_length",
            max_length=room,
            return_tensors="pt",
        ).to(self._model.device)
        output = self._model(
            pixel_values=pixels,
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
        )
        scores = output.logits[0].float().sigmoid().cpu()
        places = output.pred_boxes[0].float().cpu()
        # The processor lays pictures into the upper left corner of a square.
        side = float(max(picture.image.size))
        findings = {}
        for column, name in enumerate(names):
            own = scores[:, column]
            kept = (own > self.box_threshold).nonzero().flatten().tolist()
            kept.sort(key=lambda place: -float(own[place]))
            found = [(places[place].tolist(), float(own[place]), name) for place in kept]
            boxes = tuple(boxes_in(picture.image, (side, side), found))
            findings[name] = Finding(bool(boxes), boxes[0].score if boxes else None, boxes)
        return findings


def _pretrained(name: str) -> tuple[Any, Any]:
    """A zero-shot detector and its processor, completely filled."""
    from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

    from mmlm.errors import raise_for

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in BOX_THRESHOLDS:
            raise InputError(
                f"{name!r} is a {config.model_type!r} model; HFDetector knows "
                f"{' and '.join(BOX_THRESHOLDS)}.",
                advice="Choose one of them, or write a detector of your own: docs/data.md.",
            )
        model, info = AutoModelForZeroShotObjectDetection.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"The detector {name!r} cannot be read: {str(error).splitlines()[0]}",
            advice="Check the folder or identifier; download the model while you are online.",
        ) from error
    mismatched = [key if isinstance(key, str) else str(key[0]) for key in info["mismatched_keys"]]
    raise_for(
        {
            "missing": sorted(set(info["missing_keys"]) - set(mismatched)),
            "unexpected": sorted(info["unexpected_keys"]),
            "of another shape": sorted(mismatched),
        },
        f"the checkpoint {name!r} does not fit its model",
        "The files do not belong together or are incomplete; download them again.",
    )
    return model, processor
