"""Anatomy: parts of every family, the old hub layout, refusals."""

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

import checks
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Anatomy, Method, attach
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


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_part_is_there(family):
    a = Anatomy(tiny.shared(family)[0])
    parts = a.parts()
    assert [reason for _, reason in parts.values()] == [""] * len(parts)
    assert len(a.tower_blocks) == 3
    assert a.tower_has_cls == (family in ("llava", "llava_next", "internvl"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_mlp_is_what_is_added_to_the_residual(family):
    """Layer output minus layer input is the attention's part and what ``mlp`` gives, no more."""
    model, processor = tiny.shared(family)
    a, seen = Anatomy(model), {}
    block = a.layers[1]
    norm = "pre_feedforward_layernorm" if family == "gemma3" else "post_attention_layernorm"
    handles = [
        a.mlp(1).register_forward_hook(lambda m, args, out: seen.update(mlp=out)),
        getattr(block, norm).register_forward_pre_hook(lambda m, args: seen.update(mid=args[0])),
        block.register_forward_hook(lambda m, args, out: seen.update(out=out)),
    ]
    model(**checks.batch(processor))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen["mid"] + seen["mlp"], seen["out"], atol=1e-6, rtol=1e-6)


def _without(path):
    """A LLaVA of an unknown type that lacks one attribute."""
    model, _ = tiny.build("llava")
    model.config.model_type = "brand_new_vl"
    owner, _, name = path.rpartition(".")
    delattr(model.get_submodule(owner), name)
    return model


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("model", "LlavaForConditionalGeneration.*no inner model: tried model"),
        ("model.language_model.layers", "LlamaModel.*no decoder layers: tried layers, h, blocks"),
        ("model.language_model.norm", "LlamaModel.*no last norm: tried norm, final_layernorm"),
    ],
)
def test_a_model_without_a_part_that_all_methods_need_is_refused(path, words):
    model = _without(path)
    text = model.get_decoder() if path != "model" else nn.Module()
    model.get_decoder = lambda: text
    with pytest.raises(UnsupportedModel, match=words) as caught:
        Anatomy(model)
    assert caught.value.advice


@pytest.mark.parametrize(
    ("part", "path", "words"),
    [
        ("vision tower", "model.vision_tower", "no vision tower: tried vision_tower, visual, "),
        ("tower blocks", "model.vision_tower.encoder", "no tower blocks: tried encoder.layers, "),
        ("projector", "model.multi_modal_projector", "no projector: tried multi_modal_projector, "),
        ("attention", "model.language_model.layers.0.self_attn", "no self-attention: tried self_"),
        (
            "output projection",
            "model.language_model.layers.0.self_attn.o_proj",
            "no output projection: tried self_attn.o_proj, self_attn.out_proj, .*It has: ",
        ),
        ("MLP", "model.language_model.layers.0.mlp", "no MLP: tried post_feedforward_layernorm, "),
    ],
)
def test_a_part_that_some_methods_need_is_named_with_what_was_tried(part, path, words):
    found, reason = Anatomy(_without(path)).parts()[part]
    assert found is None
    assert re.search(words, reason)


@dataclass(frozen=True, kw_only=True)
class _OnMlp(Method):
    """Acts on the MLP."""

    def neutral(self):
        return self

    def mlp(self, state, layer, y):
        return None


def test_a_method_without_its_part_is_refused_by_name_of_the_part():
    model = _without("model.language_model.layers.0.mlp")
    assert Anatomy(model).supports(VHR()) == []
    with pytest.raises(UnsupportedModel, match=r"_OnMlp.*no MLP: tried"), attach(model, _OnMlp()):
        pass


def test_a_model_without_a_head_is_refused():
    model, _ = tiny.build("llava")
    model.get_output_embeddings = lambda: None
    with pytest.raises(UnsupportedModel, match=r"no language-modelling head: tried get_output"):
        Anatomy(model)


def test_an_odd_configuration_is_refused_by_what_it_lacks():
    model, _ = tiny.build("llava")
    model.config.get_text_config = lambda: SimpleNamespace(hidden_size=64)
    with pytest.raises(UnsupportedModel, match=r"no number of heads: tried num_attention_heads"):
        Anatomy(model)


def test_an_unknown_family_is_found_by_common_names():
    """Aya Vision has no row in the table: parts are found, and methods without branches run."""
    from transformers import (
        AyaVisionConfig,
        AyaVisionForConditionalGeneration,
        LlamaConfig,
        SiglipVisionConfig,
    )

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    text = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**tower, vision_use_head=False),
        text_config=LlamaConfig(**text),
        image_token_index=39,
        downsample_factor=2,
    )
    model = AyaVisionForConditionalGeneration(config).eval()
    a = Anatomy(model)
    assert a.family_name == "aya_vision"
    assert a.image_ids == (39,)
    assert all(reason == "" for _, reason in a.parts().values())
    ids = torch.tensor([[5, 39, 39, 39, 39, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(1, 3, 56, 56)
    plain = checks.next_logits(model, inputs)
    with attach(model, VHR()):
        assert not torch.allclose(checks.next_logits(model, inputs), plain)
    assert "aya_vision" in a.supports(VCD())[0]


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
