"""Path patching and attribution of heads, against a model whose parts are held by hooks.

The numbered tests are those of the specification of PH3.
"""

from __future__ import annotations

import functools

import checks
import pytest
import tiny
import torch
from torch import nn

from mmlm import Anatomy, attach
from mmlm.engine.head_effects import (
    attribution,
    contributions,
    frozen_scale,
    look,
    patched_logits,
)
from mmlm.errors import UnsupportedModel

FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl", "gemma3")
"""Llama; Qwen2 with biases and grouped heads, twice; norms behind attention and MLP."""


def in_float64(norm):
    """The library's RMS norms compute in float32, whatever they get."""
    gain = norm.weight + (1 if "Gemma" in type(norm).__name__ else 0)
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


@functools.cache
def setting(family):
    """A tiny model in float64, a prompt with a picture, and the same with another picture."""
    model, processor = tiny.build(family)
    model.double()
    for module in model.get_decoder().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = in_float64(module)
    both = [tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(seed)]]) for seed in (1, 2)]
    for inputs in both:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    return (model, *both)


def held(model, inputs, plain, layer, head, value, *, mlps):
    """Logits of a whole pass with every attention held at its values but for one head."""
    anatomy, handles = Anatomy(model), []

    def hold(values):
        def hook(module, args, output):
            x = (output[0] if isinstance(output, tuple) else output).clone()
            x[:, -1] = values
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    def patch(module, args):
        y = anatomy.split_heads(args[0]).clone()
        y[:, -1] = plain.heads[layer]
        y[:, -1, head] = value
        return (y.flatten(-2),)

    follows = [*plain.entering[1:], plain.final]
    for at in range(anatomy.n_layers):
        if at == layer:
            handles.append(anatomy.o_proj(at).register_forward_pre_hook(patch))
        else:
            handles.append(anatomy.attended(at).register_forward_hook(hold(plain.added[at])))
        if mlps:
            values = follows[at] - plain.entering[at] - plain.added[at]
            handles.append(anatomy.mlp(at).register_forward_hook(hold(values)))
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("form", ["mlp_recomputed", "direct"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ph3_acceptance_02_both_forms_equal_the_reference_for_every_head(family, form):
    model, inputs, donor = setting(family)
    anatomy = Anatomy(model)
    plain, other = look(anatomy, inputs), look(anatomy, donor)
    vocabulary = torch.arange(model.get_output_embeddings().weight.shape[0])[None]
    ours = patched_logits(anatomy, plain, other, vocabulary, form)
    with torch.no_grad():
        before = model(**inputs).logits[:, -1]
    moved = 0
    for layer in range(anatomy.n_layers):
        for head in range(anatomy.n_heads):
            value = other.heads[layer][:, head]
            expected = held(model, inputs, plain, layer, head, value, mlps=form == "direct")
            torch.testing.assert_close(ours[:, layer, head], expected, atol=1e-10, rtol=1e-10)
            moved += not torch.allclose(expected, before, atol=1e-6)
    # A window that is shorter than the prompt does not reach the picture in its first layer.
    differ = int((plain.heads != other.heads).any(-1).sum())
    assert moved == differ >= anatomy.n_heads * (anatomy.n_layers - 1)


def test_the_two_forms_differ():
    model, inputs, donor = setting("llava")
    anatomy = Anatomy(model)
    plain, other = look(anatomy, inputs), look(anatomy, donor)
    tokens = torch.tensor([[5, 9]])
    a, b = (patched_logits(anatomy, plain, other, tokens, f) for f in ("mlp_recomputed", "direct"))
    assert not torch.allclose(a, b, atol=1e-4)
    assert torch.equal(a, patched_logits(anatomy, plain, other, tokens))


def test_ph3_acceptance_03_counted_rows_of_mlps(monkeypatch):
    model, inputs, donor = setting("llava")
    anatomy = Anatomy(model)
    plain, other = look(anatomy, inputs), look(anatomy, donor)
    rows, original = [], Anatomy.feed_forward

    def count(self, layer, x):
        rows.append(x.shape[:-1].numel())
        return original(self, layer, x)

    monkeypatch.setattr(Anatomy, "feed_forward", count)
    patched_logits(anatomy, plain, other, torch.tensor([[5, 9]]))
    h, n = anatomy.n_heads, anatomy.n_layers
    assert sum(rows) == h * n * (n + 1) // 2 + n - 1
    rows.clear()
    patched_logits(anatomy, plain, other, torch.tensor([[5, 9]]), "direct")
    assert not rows


@pytest.mark.parametrize("family", FAMILIES)
def test_ph3_acceptance_04_attribution_adds_up_to_the_difference_of_the_logits(family):
    model, inputs, _ = setting(family)
    anatomy = Anatomy(model)
    found = attribution(anatomy, look(anatomy, inputs), torch.tensor([[5, 9]]))
    with torch.no_grad():
        z = model(**inputs).logits[0, -1]
    together = found.heads.sum() + found.mlps.sum() + found.biases.sum() + found.embedding.sum()
    torch.testing.assert_close(together, z[5] - z[9], atol=1e-8, rtol=0)
    assert found.heads.abs().min() > 0
    assert bool((found.biases.abs() > 1e-9).any()) == (anatomy.o_proj(0).bias is not None)


def test_attribution_of_a_head_is_its_column_times_the_unembedding():
    model, inputs, _ = setting("llava")
    anatomy = Anatomy(model)
    run = look(anatomy, inputs)
    found = attribution(anatomy, run, torch.tensor([[5, 9]])).heads[0]
    scale = torch.rsqrt(run.final[0].square().mean() + anatomy.norm.variance_epsilon)
    says = (anatomy.head.weight[5] - anatomy.head.weight[9]) * anatomy.norm.weight * scale
    d = run.heads.shape[-1]
    for layer in range(anatomy.n_layers):
        for head in range(anatomy.n_heads):
            column = anatomy.o_proj(layer).weight[:, head * d : head * d + d]
            expected = says @ (column @ run.heads[layer, 0, head])
            torch.testing.assert_close(found[layer, head], expected, atol=1e-10, rtol=0)


def test_ph3_acceptance_06_the_same_pass_patches_nothing():
    model, inputs, _ = setting("llava")
    anatomy = Anatomy(model)
    plain, again = look(anatomy, inputs), look(anatomy, inputs)
    tokens = torch.tensor([[5, 9]])
    with torch.no_grad():
        z = anatomy.exit_logits(plain.final)[:, [5, 9]]
    for form in ("mlp_recomputed", "direct"):
        patched = patched_logits(anatomy, plain, again, tokens, form)
        assert torch.equal(patched, z[:, None, None].expand_as(patched))


@pytest.mark.parametrize("form", ["mlp_recomputed", "direct"])
def test_ph3_acceptance_08_a_batch_equals_single_prompts(form):
    model, processor = tiny.shared("llava")
    anatomy = Anatomy(model)
    tokens = torch.tensor([[5, 9], [11, 4]])
    together = [
        tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(a)], [tiny.picture(b, (90, 60))]])
        for a, b in ((1, 2), (3, 4))
    ]
    batch = [look(anatomy, inputs) for inputs in together]
    patched = patched_logits(anatomy, *batch, tokens, form)
    said = attribution(anatomy, batch[0], tokens).heads
    for row, size in enumerate(((64, 64), (90, 60))):
        pictures = [[tiny.picture((1, 2)[row], size)], [tiny.picture((3, 4)[row], size)]]
        alone = [
            look(anatomy, tiny.inputs(processor, checks.PROMPTS[row : row + 1], [p]))
            for p in pictures
        ]
        own = patched_logits(anatomy, *alone, tokens[row : row + 1], form)
        torch.testing.assert_close(patched[row], own[0], atol=1e-4, rtol=1e-4)
        own = attribution(anatomy, alone[0], tokens[row : row + 1]).heads
        torch.testing.assert_close(said[row], own[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_looking_gives_the_models_own_states_and_leaves_nothing_behind(family):
    model, processor = tiny.shared(family)
    anatomy, inputs = Anatomy(model), checks.batch(processor)
    checks.next_logits(model, inputs)
    before = checks._footprint(model)
    run = look(anatomy, inputs)
    assert checks._footprint(model) == before
    assert run.length == inputs["input_ids"].shape[1]
    logits = checks.next_logits(model, inputs)
    torch.testing.assert_close(anatomy.exit_logits(run.final), logits, atol=1e-4, rtol=1e-4)
    assert run.heads.shape[:3] == (anatomy.n_layers, 2, anatomy.n_heads)
    tokens = torch.tensor([[5, 9], [5, 9]])
    patched_logits(anatomy, run, run, tokens)  # this family's layers are attention and MLP alone


@pytest.mark.parametrize("text_branch", ["plain", "lockstep"])
def test_what_attached_methods_do_is_seen(text_branch):
    """Rows that ride along in the same pass are not among those that are kept."""
    from decoding.vhr import VHR

    model, processor = tiny.shared("llava")
    anatomy, inputs = Anatomy(model), checks.batch(processor)
    plain = look(anatomy, inputs)
    with attach(model, VHR(alpha=3.0, text_branch=text_branch)):
        edited, logits = look(anatomy, inputs), checks.next_logits(model, inputs)
    assert [len(x[0]) for x in (edited.heads, edited.added, edited.entering)] == [2, 2, 2]
    assert not torch.allclose(plain.heads[1], edited.heads[1], atol=1e-4)
    torch.testing.assert_close(anatomy.exit_logits(edited.final), logits, atol=1e-4, rtol=1e-4)


def test_contributions_leave_the_bias_out():
    model, inputs, _ = setting("llava")
    anatomy = Anatomy(model)
    run = look(anatomy, inputs)
    projection = anatomy.o_proj(0)
    projection.bias = nn.Parameter(torch.ones(anatomy.width, dtype=torch.float64))
    try:
        parts = contributions(anatomy, 0, run.heads[0])
    finally:
        projection.bias = None
    expected = run.heads[0].flatten(-2) @ projection.weight.T
    torch.testing.assert_close(parts.sum(1), expected, atol=1e-12, rtol=0)


def test_a_norm_that_is_no_rms_norm_is_refused():
    x = torch.randn(2, 8)
    with pytest.raises(UnsupportedModel, match="LayerNorm is no RMS norm"):
        frozen_scale(nn.LayerNorm(8), x + 1)
    scale = frozen_scale(nn.RMSNorm(8, eps=1e-6), x)
    torch.testing.assert_close(scale * x, nn.RMSNorm(8, eps=1e-6)(x), atol=1e-5, rtol=1e-5)


def test_layers_that_add_more_than_attention_and_mlp_are_refused(monkeypatch):
    model, inputs, donor = setting("llava")
    anatomy = Anatomy(model)
    plain, other = look(anatomy, inputs), look(anatomy, donor)
    original = Anatomy.feed_forward
    monkeypatch.setattr(Anatomy, "feed_forward", lambda s, n, x: original(s, n, x) * 1.5)
    with pytest.raises(UnsupportedModel, match=r"miss its own by .* %"):
        patched_logits(anatomy, plain, other, torch.tensor([[5, 9]]))
    patched_logits(anatomy, plain, other, torch.tensor([[5, 9]]), "direct")
