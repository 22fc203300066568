"""Detectors of transformers: equal to the library's own post-processing, and their failures."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_detectors import NAMES
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from data_tools.detectors.grounding import caption
from data_tools.detectors.huggingface import HFDetector
from mmlm.errors import InputError, MissingTensors

SIZE = (110, 70)


def library(folder, picture, text, **options):
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=picture.image, text=text, return_tensors="pt", **options)
    with torch.inference_mode():
        return processor, model(**inputs), inputs


def places(boxes):
    return [[box.left, box.top, box.right, box.bottom] for box in boxes]


def clipped(boxes, size=SIZE):
    limits = torch.tensor([*size, *size], dtype=torch.float32)
    return [torch.minimum(box.clamp(min=0), limits).tolist() for box in boxes]


def test_grounding_dino_is_the_library_s(loaded, hf_grounding, make_picture):
    picture, names = make_picture(*SIZE), sorted(NAMES[:8])
    processor, output, inputs = library(hf_grounding, picture, caption(names))
    (expected,) = processor.post_process_grounded_object_detection(
        output, inputs["input_ids"], 0.8, 0.75, target_sizes=[SIZE[::-1]]
    )
    with torch.inference_mode():
        (boxes,) = loaded["hf-grounding"].engine._boxes(picture, [names])
    assert boxes
    assert [box.score for box in boxes] == pytest.approx(expected["scores"].tolist(), abs=1e-5)
    labels = [
        text.replace("[SEP]", "").replace(".", "").split() for text in expected["text_labels"]
    ]
    assert [box.label.split() for box in boxes] == labels
    for own, box in zip(places(boxes), clipped(expected["boxes"]), strict=True):
        assert own == pytest.approx(box, abs=0.02)


@pytest.mark.parametrize("size", [SIZE, SIZE[::-1]], ids=["wide", "high"])
def test_owl_is_the_library_s(size, hf_owl, make_picture):
    """With one name the library's choice of the best name per place is no choice."""
    picture = make_picture(*size)
    detector = HFDetector(model=str(hf_owl), box_threshold=0.4, prompt="{}")
    found = 0
    for name in NAMES[:4]:
        processor, output, _ = library(hf_owl, picture, [[name]], max_length=24)
        (expected,) = processor.post_process_grounded_object_detection(
            output, threshold=0.4, target_sizes=[size[::-1]]
        )
        own = detector.detect(picture, [name])[name].boxes
        found += len(own)
        order = expected["scores"].argsort(descending=True).tolist()
        inside = [i for i in order if _inside(expected["boxes"][i], size)]
        scores = expected["scores"][inside].tolist()
        assert [box.score for box in own] == pytest.approx(scores, abs=1e-5)
        for mine, box in zip(places(own), clipped(expected["boxes"][inside], size), strict=True):
            assert mine == pytest.approx(box, abs=0.02)
    assert found


def _inside(box, size):
    return box[0] < size[0] and box[1] < size[1] and box[2] > 0 and box[3] > 0


def test_names_of_owl_do_not_influence_each_other(loaded, make_picture):
    detector, picture = loaded["hf-owl"], make_picture()
    together = detector.detect(picture, NAMES[:20])
    for name in NAMES[:20]:
        alone = detector.detect(picture, [name])[name]
        assert alone.accepted == together[name].accepted


def test_the_prompt_reaches_owl(hf_owl, make_picture):
    found = [
        HFDetector(model=str(hf_owl), box_threshold=0.01, prompt=prompt).detect(
            make_picture(), ["dog"]
        )
        for prompt in ("{}", "my {}")
    ]
    assert found[0] != found[1]
    with pytest.raises(ValueError, match="prompt must contain"):
        HFDetector(model="x", prompt="a photo")


def test_default_thresholds_by_type_of_model(hf_grounding, hf_owl):
    assert HFDetector(model=str(hf_grounding)).facts["box_threshold"] == 0.35
    assert HFDetector(model=str(hf_owl)).facts["box_threshold"] == 0.1
    assert HFDetector(model=str(hf_owl), box_threshold=0.2).facts["box_threshold"] == 0.2


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        HFDetector(model=str(tmp_path / "absent")).load()


def test_a_model_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="'bert' model; HFDetector knows grounding-dino and owlv2"):
        HFDetector(model=str(tmp_path)).load()


def test_a_folder_without_weights(hf_owl, tmp_path):
    shutil.copytree(hf_owl, tmp_path / "owl")
    (tmp_path / "owl" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        HFDetector(model=str(tmp_path / "owl")).load()


def test_tensors_out_of_place_are_named(hf_owl, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(hf_owl, tmp_path / "owl")
    path = tmp_path / "owl" / "model.safetensors"
    state = load_file(path)
    state["class_head.other.weight"] = state.pop("class_head.dense0.weight")
    save_file(state, path, {"format": "pt"})
    with pytest.raises(MissingTensors, match=r"missing: class_head\.dense0\.weight") as error:
        HFDetector(model=str(tmp_path / "owl")).load()
    assert "unexpected: class_head.other.weight" in str(error.value)
