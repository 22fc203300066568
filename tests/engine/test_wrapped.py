"""Models in a PEFT wrapper, in lower precision, and in training mode."""

import checks
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import attach

METHODS = [VHR(), VCD(), VHR(text_branch="lockstep")]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_a_peft_model_equals_the_model_inside(family, method):
    model, processor = tiny.build(family)
    inputs = checks.batch(processor)
    with attach(model, method):
        expected = checks.generate(model, inputs, do_sample=False)
    # Fresh LoRA matrices are zero on one side: the wrapped model computes the same.
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"])).eval()
    before = checks._footprint(model)
    with attach(wrapped, method) as same:
        assert same is wrapped
        assert torch.equal(checks.generate(wrapped, inputs, do_sample=False), expected)
    assert checks._footprint(model) == before


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
@torch.no_grad()
def test_bfloat16_runs_and_gives_its_dtype(method):
    model, processor = tiny.build("llava")
    model = model.to(torch.bfloat16)
    inputs = checks.batch(processor)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    plain = checks.next_logits(model, inputs)
    with attach(model, method):
        edited = checks.next_logits(model, inputs)
        checks.generate(model, inputs, do_sample=False)
    assert edited.dtype == plain.dtype == torch.bfloat16
    assert not torch.equal(edited, plain)


def test_gradients_flow_through_reinforced_heads():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    model(**inputs).logits[:, -1].float().logsumexp(-1).sum().backward()
    weight = model.get_decoder().layers[2].self_attn.v_proj.weight
    plain = weight.grad.clone()
    model.zero_grad()
    with attach(model, VHR()):
        model(**inputs).logits[:, -1].float().logsumexp(-1).sum().backward()
    assert weight.grad.isfinite().all()
    assert not torch.allclose(weight.grad, plain)
