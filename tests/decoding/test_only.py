"""ONLY: hand-computed examples, a reference with whole attention matrices, settings, errors."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import checks
import pytest
import tiny
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import mmlm
from decoding.only import (
    ONLY,
    contrast_or_collaborate,
    distance,
    drop_outliers,
    entropy,
    entropy_ratio,
    textual_heads,
)
from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import attach

#: Both sides of the decision, and another layer.
SETTINGS = (ONLY(gamma=2.0), ONLY(gamma=0.0), ONLY(layer=1, gamma=0.6, residual_share=0.5))


# ---- the equations, by hand ----


def test_outliers_of_one_modality_by_hand():
    # Columns 1, 2, 3: weights .1 .2 .6, mean .3, deviation sqrt((.04 + .01 + .09) / 2) = .2646;
    # only .6 is above .5646. Column 0 is larger than that, but of no modality.
    a = torch.tensor([[[0.7, 0.1, 0.2, 0.6]]])
    kept = drop_outliers(a, torch.tensor([[False, True, True, True]]))
    assert torch.equal(kept, torch.tensor([[[0.7, 0.1, 0.2, 0.0]]]))


def test_entropy_by_hand():
    # Renormalised over two columns of weight .2 each: ln 2; over one column: 0; over none: given.
    a = torch.tensor([[[0.6, 0.2, 0.2, 0.0]]])
    assert entropy(a, torch.tensor([[False, True, True, False]]), if_empty=9.0).item() == (
        pytest.approx(math.log(2), abs=1e-5)
    )
    assert entropy(a, torch.tensor([[True, False, False, False]]), if_empty=9.0).item() == 0
    assert entropy(a, torch.tensor([[False, False, False, True]]), if_empty=9.0).item() == 9


def test_ratio_and_heads_by_hand():
    # Head 0: text even over two, image even over four: ln 2 / ln 4 = 1/2. Head 1: text on one
    # column: 0. Mean 1/4: head 0 stays.
    text = torch.tensor([[True, True, False, False, False, False]])
    a = torch.tensor([[[0.3, 0.3, 0.1, 0.1, 0.1, 0.1], [0.6, 0.0, 0.1, 0.1, 0.1, 0.1]]])
    ratio = entropy_ratio(a, text, ~text)
    torch.testing.assert_close(ratio, torch.tensor([[0.5, 0.0]]), atol=1e-5, rtol=0)
    assert textual_heads(ratio).tolist() == [[True, False]]
    blind = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]]])  # no weight left on the image
    assert entropy_ratio(blind, text, ~text).item() == 0


def test_distance_by_hand():
    # p = (3/4, 1/4) against (1/4, 3/4): 1. The second row is equal: 0.
    z = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    other = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    torch.testing.assert_close(distance(z, other), torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(distance(z, other, whole_batch=True), torch.tensor([[1.0], [1.0]]))


def test_both_sides_of_the_decision_by_hand():
    z, textual = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.5, 2.0], [0.5, 2.0]])
    d = torch.tensor([[0.1], [0.3]])
    delta = contrast_or_collaborate(z, textual, d, gamma=0.2, collaborate=3.0, contrast=1.0)
    # z + 3 z~ = (2.5, 6); 2 z - z~ = (1.5, -2)
    torch.testing.assert_close(z + delta, torch.tensor([[2.5, 6.0], [1.5, -2.0]]))


def test_properties_of_the_distance_and_of_the_masks():
    g = torch.Generator().manual_seed(2)
    z, other = torch.randn(5, 7, generator=g) * 4, torch.randn(5, 7, generator=g) * 4
    d = distance(z, other)
    assert bool(((d >= 0) & (d <= 2)).all())
    torch.testing.assert_close(d, distance(other, z))
    a = torch.rand(2, 3, 8, generator=g).softmax(-1)
    columns = torch.rand(2, 8, generator=g) > 0.4
    kept = drop_outliers(a, columns)
    others = ~columns[:, None].expand_as(a)
    assert torch.equal(kept[others], a[others])
    assert bool(((kept == a) | (kept == 0)).all())


# ---- a naive reference: an eager model, whole matrices, one row at a time ----


def textual_logits(model, inputs, b, answer, method):
    """Logits of the model and of its textual version after an answer."""
    real = inputs["attention_mask"][b].bool()
    ids = torch.cat([inputs["input_ids"][b][real], answer])
    more = {"input_ids": ids[None]}
    if "image_grid_thw" in inputs:
        sizes = inputs["image_grid_thw"].prod(-1).tolist()
        more["pixel_values"] = inputs["pixel_values"].split(sizes)[b]
        more["image_grid_thw"] = inputs["image_grid_thw"][b : b + 1]
        kinds = inputs["mm_token_type_ids"][b][real]
        more["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(answer)])[None]
    else:
        more["pixel_values"] = inputs["pixel_values"][b : b + 1]
    layers, values = model.get_decoder().layers, []
    attention = layers[method.layer].self_attn
    handle = attention.v_proj.register_forward_hook(lambda m, i, o: values.append(o[0]))
    out = model(**more, use_cache=False, output_attentions=True, output_hidden_states=True)
    handle.remove()
    a = out.attentions[method.layer][0, :, -1].float()
    heads, width = a.shape[0], attention.head_dim
    v = values[0].view(len(ids), -1, width).repeat_interleave(heads // 2, dim=1)
    placeholders = mmlm.Anatomy(model).image_ids
    prompt = ids[: len(ids) - len(answer)].tolist()
    visual = [i for i, token in enumerate(prompt) if token in placeholders]
    text = [i for i in range(len(ids)) if i not in visual][1:]
    ratios = []
    for h in range(heads):
        for columns in (text, visual):
            part = a[h, columns]
            a[h, columns] = torch.where(part > part.mean() + part.std(), 0, part)
        parts = [a[h, columns] / a[h, columns].sum() for columns in (text, visual)]
        of_text, of_image = (-(p * (p + 1e-6).log()).sum() for p in parts)
        ratios.append(of_text / of_image)
    mean = sum(ratios) / heads
    y = [a[h] @ v[:, h] * float(ratios[h] >= mean) for h in range(heads)]
    carried = attention.o_proj(torch.cat(y))
    last = layers[-1]
    x = method.residual_share * out.hidden_states[-2][0, -1] + last.input_layernorm(carried)
    x = x + last.mlp(last.post_attention_layernorm(x))
    return out.logits[0, -1], model.lm_head(model.get_decoder().norm(x))


class Naive(LogitsProcessor):
    """ONLY by the reference above, recomputed at every step."""

    def __init__(self, model, inputs, method):
        self.model, self.inputs, self.method = model, inputs, method

    def __call__(self, ids, scores):
        beams, rows, m = len(ids) // len(self.inputs["input_ids"]), [], self.method
        for i, answer in enumerate(ids[:, self.inputs["input_ids"].shape[1] :]):
            z, textual = textual_logits(self.model, self.inputs, i // beams, answer, m)
            d = (z.softmax(-1) - textual.softmax(-1)).abs().sum()
            edited = (
                z + m.collaborate * textual
                if d < m.gamma
                else (1 + m.contrast) * z - m.contrast * textual
            )
            rows.append(edited.masked_fill(z.softmax(-1) < m.beta * z.softmax(-1).max(), -math.inf))
        scores = torch.stack(rows).log_softmax(-1)
        scores[:, 3] = -math.inf  # every sequence is asked to go on
        return scores


def naive(model, inputs, method, **options):
    processors = LogitsProcessorList([Naive(model, inputs, method)])
    model.set_attn_implementation("eager")
    return checks.generate(model, inputs, logits_processor=processors, **options)


# ---- common acceptance tests, by number ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_1_identity(family):
    checks.neutral_is_plain(ONLY(), family)


@pytest.mark.parametrize("method", SETTINGS, ids=repr)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_acceptance_2_padded_batch_equals_single_runs(family, method):
    checks.batch_equals_single_rows(method, family)


@pytest.mark.parametrize("method", SETTINGS, ids=repr)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_3_cached_equals_uncached(family, method):
    model, processor = tiny.build(family)
    inputs = checks.batch(processor)
    plain = checks.generate(model, inputs, do_sample=False)
    with attach(model, method):
        ours = checks.generate(model, inputs, do_sample=False)
    assert torch.equal(ours, naive(model, inputs, method, do_sample=False))
    assert not torch.equal(ours, plain)


@torch.no_grad()
def test_acceptance_4_beams_equal_recomputed():
    model, processor = tiny.build("llava", seed=2)
    inputs = checks.batch(processor)
    with attach(model, SETTINGS[2]):
        ours = checks.generate(model, inputs, do_sample=False, num_beams=3)
    assert torch.equal(ours, naive(model, inputs, SETTINGS[2], do_sample=False, num_beams=3))


def test_acceptance_5_no_row_is_added():
    checks.counted_cost(ONLY(), "llava")
    assert ONLY().cost.token == ONLY().cost.prompt == 0


@torch.no_grad()
def test_acceptance_6_two_methods_are_the_sum_of_their_deltas():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    a, b = ONLY(beta=0.0), VCD(alpha=1.0, beta=0.0)
    plain = checks.next_logits(model, inputs)
    results = []
    for methods in ((a,), (b,), (a, b)):
        with attach(model, *methods):
            results.append(checks.next_logits(model, inputs))
    torch.testing.assert_close(results[2], results[0] + results[1] - plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_acceptance_6_gains_on_heads_do_not_reach_the_textual_output():
    """VHR in the same layer is measured and applied once, in the model's own pass."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    reinforced = VHR(layers=(0,))
    with attach(model, reinforced):
        main = checks.next_logits(model, inputs)
    with attach(model, reinforced, ONLY(gamma=0.0, contrast=1e-12, beta=0.0)):
        beside = checks.next_logits(model, inputs)
    torch.testing.assert_close(beside, main, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_7_nothing_remains(family):
    checks.leaves_no_trace(ONLY(), family)


# ---- differs, limits, errors ----


@torch.no_grad()
def test_the_distance_of_a_row_does_not_depend_on_its_neighbours():
    """The sum over the batch, the authors' switch, makes rows disagree that agree by themselves."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, ONLY(gamma=0.0, beta=0.0)):
        contrasted = checks.next_logits(model, inputs)
    plain = checks.next_logits(model, inputs)
    d = distance(plain, 2 * plain - contrasted)[:, 0]
    gamma = (float(d.max()) + min(float(d.sum()), 2.0)) / 2
    assert float(d.max()) < gamma < float(d.sum())
    with attach(model, ONLY(gamma=gamma, beta=0.0)):
        own = checks.next_logits(model, inputs)
    with attach(model, ONLY(gamma=gamma, beta=0.0, distance_over_batch=True)):
        common = checks.next_logits(model, inputs)
    assert torch.allclose(common, contrasted)
    assert not torch.allclose(own, contrasted)


@torch.no_grad()
def test_the_first_text_position_belongs_to_no_modality(monkeypatch):
    seen = []
    original = ONLY.begin

    def begin(self, prompt):
        state = original(self, prompt)
        seen.append((prompt.layout, state))
        return state

    monkeypatch.setattr(ONLY, "begin", begin)
    model, processor = tiny.shared("llava")
    with attach(model, ONLY()):
        checks.next_logits(model, checks.batch(processor))
    layout, state = seen[0]
    for row in range(2):
        first = int((layout.real & ~layout.visual)[row].long().argmax())
        assert not state.text[row, first]
        assert not state.visual[row, first]
        assert not bool(state.text[row, :first].any())
        known = state.text[row] | state.visual[row]
        assert int(known.sum()) == int(layout.real[row].sum()) - 1


def test_presets():
    assert ONLY.pope() == ONLY(gamma=0.2)
    assert ONLY.chair() == ONLY(gamma=0.25)
    assert ONLY.mme_instructblip() == ONLY(beta=0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 2.5}, "gamma must be a finite number >= 0 and <= 2, got 2.5"),
        ({"beta": -0.1}, "beta must be a finite number >= 0 and <= 1, got -0.1"),
        ({"collaborate": math.nan}, "collaborate must be a finite number >= 0, got nan"),
        ({"contrast": -1}, "contrast must be a finite number >= 0, got -1"),
        ({"residual_share": -1}, "residual_share must be a finite number >= 0, got -1"),
        ({"layer": -1}, "layer must be an integer >= 0, got -1"),
        ({"distance_over_batch": 3}, "distance_over_batch must be one of True, False, got 3"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ONLY(**arguments)


def test_the_last_layer_cannot_be_the_one_computed_twice():
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match="below the last layer, 3, got 3"):
        attach(model, replace(ONLY(), layer=3)).__enter__()
