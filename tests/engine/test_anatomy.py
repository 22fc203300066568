"""Anatomy: parts of every family, the old hub layout, refusals."""

import json

import checks
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Anatomy, attach
from mmlm.errors import UnsupportedModel


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_of_every_family(family):
    model, _ = tiny.shared(family)
    a = Anatomy(model)
    assert a.family_name == family
    assert a.text is model.get_decoder()
    assert a.n_layers == len(a.layers) == 4
    assert (a.n_heads, a.n_kv_heads) == (8, 2)
    assert a.head is model.lm_head
    assert a.tower is not a.projector
    assert isinstance(a.o_proj(3), nn.Linear)
    assert model.config.image_token_id in a.image_ids
    assert a.supports(VHR()) == a.supports(VCD()) == []


def test_qwen_frames_are_known_by_id():
    model, processor = tiny.shared("qwen2_5_vl")
    tok = processor.tokenizer
    expected = {tok.vision_start_token_id, tok.vision_end_token_id}
    assert set(Anatomy(model).wrapper_ids) == expected


def _to_old_hub_layout(folder):
    """Key names as in the checkpoints on the hub from before version 5 of the library."""
    path = folder / "model.safetensors"
    renamed = {}
    for key, value in load_file(path).items():
        # The library itself still writes the old names of the text model, not of the tower.
        inner = "vision_tower." in key and "vision_model." not in key
        new = key.replace("vision_tower.", "vision_tower.vision_model.") if inner else key
        renamed[new.removeprefix("model.")] = value.clone()
    save_file(renamed, path, metadata={"format": "pt"})
    return set(renamed)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@torch.no_grad()
def test_old_hub_layout_loads_and_runs(family, tmp_path):
    model, processor = tiny.build(family)
    model.save_pretrained(tmp_path)
    keys = _to_old_hub_layout(tmp_path)
    assert "language_model.lm_head.weight" in keys
    assert any(k.startswith("vision_tower.vision_model.") for k in keys)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = checks.batch(processor)
    for method in (VHR(), VCD()):
        with attach(model, method):
            expected = checks.next_logits(model, inputs)
        with attach(loaded.eval(), method):
            assert torch.equal(checks.next_logits(loaded, inputs), expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_saved_and_loaded_again_gives_the_same(family, tmp_path):
    model, processor = tiny.build(family)
    with VHR()(model):
        model.save_pretrained(tmp_path)
    assert "mmlm" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = type(model).from_pretrained(tmp_path).eval()
    inputs = checks.batch(processor)
    assert torch.equal(checks.next_logits(model, inputs), checks.next_logits(loaded, inputs))


def test_a_plain_module_is_refused():
    with pytest.raises(UnsupportedModel, match="not a Hugging Face generation model") as caught:
        Anatomy(nn.Linear(1, 1))
    assert "AutoModelForImageTextToText" in caught.value.advice


def test_a_missing_part_names_part_class_and_what_was_tried():
    model, _ = tiny.build("llava")
    del model.model.multi_modal_projector
    with pytest.raises(UnsupportedModel, match=r"LlavaModel.*no projector: tried multi_modal"):
        _ = Anatomy(model).projector


def test_a_text_model_is_refused():
    model, _ = tiny.build("llava")
    model.config.image_token_id = None
    with pytest.raises(UnsupportedModel, match="no visual placeholder token"):
        Anatomy(model)


def test_an_unknown_family_says_why_branches_cannot_be_built():
    model, _ = tiny.build("llava")
    model.config.model_type = "brand_new_vl"
    reasons = Anatomy(model).supports(VCD())
    assert any("brand_new_vl" in r and "family table" in r for r in reasons)
    assert Anatomy(model).supports(VHR()) == []
    with pytest.raises(UnsupportedModel, match="cannot run on this model"), attach(model, VCD()):
        pass
