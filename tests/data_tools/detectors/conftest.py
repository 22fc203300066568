"""Detectors, and pictures for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny
import tiny_detectors

from data_tools.detectors.groundingdino_package import quiet
from data_tools.detectors.huggingface import HFDetector
from data_tools.pictures import Picture


@pytest.fixture(scope="session")
def make_picture(tmp_path_factory):
    """Writes and reads a random picture of a size and, if wanted, of another mode."""
    folder = tmp_path_factory.mktemp("pictures")

    def make(width: int = 72, height: int = 64, seed: int = 0, mode: str = "RGB") -> Picture:
        path = folder / f"{width}x{height}-{seed}-{mode}.png"
        if not path.exists():
            tiny.picture(seed, (width, height)).convert(mode).save(path)
        return Picture.read(path.stem, path)

    return make


@pytest.fixture(scope="session")
def groundingdino_arguments(tmp_path_factory):
    """Arguments of `GroundingDINO` for a tiny checkpoint, small pictures and low thresholds."""
    with quiet():
        from groundingdino.models.GroundingDINO.backbone import backbone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "build_swin_transformer", tiny_detectors.tiny_swin)
        made = tiny_detectors.save_groundingdino(tmp_path_factory.mktemp("groundingdino"))
        yield {**made, "shortest_side": 64, "longest_side": 128, "max_text_tokens": 20}


@pytest.fixture(scope="session")
def hf_grounding(tmp_path_factory) -> Path:
    return tiny_detectors.save_hf_grounding(tmp_path_factory.mktemp("hf") / "grounding")


@pytest.fixture(scope="session")
def hf_owl(tmp_path_factory) -> Path:
    return tiny_detectors.save_owl(tmp_path_factory.mktemp("hf") / "owl")


@pytest.fixture(scope="session")
def loaded(groundingdino_arguments, hf_grounding, hf_owl, make_picture):
    """The detectors with weights, by name; their thresholds let about half of the names pass."""
    from data_tools.detectors.groundingdino import GroundingDINO

    owl = HFDetector(model=str(hf_owl), box_threshold=0.01, prompt="{}", names_at_once=7)
    names = tiny_detectors.NAMES[:24]
    scores = sorted(one.score for one in owl.detect(make_picture(), names).values())
    return {
        "groundingdino": GroundingDINO(
            **groundingdino_arguments, box_threshold=0.9, text_threshold=0.75
        ),
        "hf-grounding": HFDetector(
            model=str(hf_grounding), box_threshold=0.8, text_threshold=0.75, max_text_tokens=20
        ),
        "hf-owl": dataclasses.replace(owl, box_threshold=(scores[11] + scores[12]) / 2),
    }
