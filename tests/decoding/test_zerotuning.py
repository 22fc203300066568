"""ZeroTuning: golden vectors, a naive reference, the spec's acceptance list by number."""

from __future__ import annotations

import math
import re

import checks
import golden
import pytest
import tiny
import torch
from transformers import LogitsProcessorList
from whole_matrix import Recompute, edited, whole_pass

from decoding.zerotuning import ZeroTuning, first_key_bias, scale_first
from mmlm import attach
from mmlm.errors import IncompatibleMethods, LayoutError, UnsupportedModel

HEADS = ((1, (0, 1, 2, 5)), (2, (3, 4, 6, 7)))
STRONG = ZeroTuning(gamma=20.0, heads_by_layer=HEADS)
SHARP = ZeroTuning(gamma=0.02, heads_by_layer=HEADS)


# ---- golden vectors ----


@pytest.fixture(params=golden.golden("act_zerotuning/zerotuning_*.npz"))
def vectors(request):
    return golden.arrays(request.param)


@pytest.mark.golden
def test_acceptance_1_golden(vectors):
    a, gamma = vectors["attn"], float(vectors["gamma"])
    chosen = torch.zeros(a.shape[1], dtype=torch.bool)
    chosen[vectors["heads"]] = True
    first = torch.zeros(a.shape[0], dtype=torch.long)
    out = scale_first(a, first, chosen, gamma)
    torch.testing.assert_close(out, vectors["attn_out"], atol=1e-6, rtol=0)
    # What the method does: a bias on the scores.
    biased = (a.log() + first_key_bias(first, chosen, a.shape[-1], gamma)).softmax(-1)
    torch.testing.assert_close(biased, vectors["attn_out"], atol=1e-6, rtol=0)


# ---- by hand ----


def test_a_row_by_hand():
    # a = (1/2, 1/4, 1/4), gamma 3: D = 1 + 2/2 = 2, so (3/4, 1/8, 1/8); head 1 is not chosen.
    a = torch.tensor([[[[0.5, 0.25, 0.25]], [[0.5, 0.25, 0.25]]]])
    chosen = torch.tensor([True, False])
    out = scale_first(a, torch.tensor([0]), chosen, 3.0)
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([0.75, 0.125, 0.125]))
    assert torch.equal(out[0, 1], a[0, 1])
    bias = first_key_bias(torch.tensor([1]), chosen, 3, math.e)
    assert bias.tolist() == [[[[0.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]]]


# ---- the naive reference: multiply and renormalise whole matrices ----


def by_loops(methods, real, copies=1):
    """The multiply-and-renormalise form, row after row; gammas of several methods multiply."""
    firsts = real.repeat_interleave(copies, 0).argmax(-1).tolist()

    def edit(layer, x, a):
        for method in methods:
            for h in dict(method.heads_by_layer).get(layer, ()):
                for b, j in enumerate(firsts):
                    for row in a[b, h, j:]:
                        row[j] = method.gamma * row[j]
                        row[:] = row / row.sum()

    return edit


@pytest.mark.parametrize("method", [STRONG, SHARP], ids=["up", "down"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_equals_whole_eager_matrices(family, method):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    with edited(model, by_loops([method], inputs["attention_mask"])):
        expected = whole_pass(model, inputs)
    with attach(model, method):
        found = whole_pass(model, inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, whole_pass(model, inputs), atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_cache_and_beams_equal_recomputing(options):
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    method = ZeroTuning(gamma=500.0, heads_by_layer=tuple((n, tuple(range(8))) for n in range(4)))
    with attach(model, method):
        ours = checks.generate(model, inputs, do_sample=False, **options)
    edit = by_loops([method], inputs["attention_mask"], copies=options.get("num_beams", 1))
    processors = LogitsProcessorList([Recompute(model, inputs, edit)])
    naive = checks.generate(model, inputs, do_sample=False, logits_processor=processors, **options)
    assert torch.equal(ours, naive)
    assert not torch.equal(ours, checks.generate(model, inputs, do_sample=False, **options))


# ---- the acceptance list ----


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_2_gamma_1_is_bit_identical(family):
    checks.neutral_is_plain(STRONG, family)
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    with attach(model, ZeroTuning(gamma=1.0, heads_by_layer=HEADS)):
        assert torch.equal(checks.next_logits(model, inputs), plain)


@pytest.mark.parametrize("gamma", [0.1, 0.9, 3.0])
def test_acceptance_3_rows_sum_to_one_and_stay_causal(gamma):
    s = torch.randn(2, 3, 9, 9).masked_fill(~torch.ones(9, 9).tril().bool(), -math.inf)
    a = s.softmax(-1)
    chosen = torch.tensor([True, False, True])
    out = scale_first(a, torch.tensor([0, 0]), chosen, gamma)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3, 9), atol=1e-6, rtol=0)
    assert (out.triu(1) == 0).all()
    assert torch.equal(out[:, 1], a[:, 1])
    # Every other key keeps its share among the others; the first one moves with gamma.
    others = out[..., 1:] / out[..., 1:].sum(-1, keepdim=True).clamp(min=1e-9)
    before = a[..., 1:] / a[..., 1:].sum(-1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(others, before, atol=1e-5, rtol=1e-5)
    moved = out[:, chosen, 1:, 0] > a[:, chosen, 1:, 0]
    assert bool(moved.all()) is (gamma > 1)


def test_acceptance_3_other_heads_keep_the_kernels_bits():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    seen = []
    part = model.get_decoder().layers[1].self_attn.o_proj
    for methods in ((), (STRONG,)):
        handle = part.register_forward_pre_hook(
            lambda m, args: seen.append(args[0].unflatten(-1, (8, -1)).clone())
        )
        with attach(model, *methods):
            whole_pass(model, inputs)
        handle.remove()
    differs = (seen[0] != seen[1]).any(-1).any(1).any(0).tolist()
    assert differs == [h in dict(HEADS)[1] for h in range(8)]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_5_left_padding_equals_single_runs(family):
    checks.batch_equals_single_rows(STRONG, family)


@pytest.mark.parametrize("gamma", [0.02, 0.5, 1.5, 40.0])
def test_acceptance_6_bias_equals_multiply_and_renormalise(gamma):
    s = torch.randn(3, 4, 5, 11)
    first, chosen = torch.tensor([0, 2, 5]), torch.tensor([True, True, False, True])
    biased = (s + first_key_bias(first, chosen, 11, gamma)).softmax(-1)
    scaled = scale_first(s.softmax(-1), first, chosen, gamma)
    torch.testing.assert_close(biased, scaled, atol=1e-6, rtol=0)


def test_prefill_needs_no_square():
    checks.no_square_tensor(STRONG, "llava")


# ---- differs ----


def test_differs_the_first_real_token_not_padding():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, STRONG), torch.no_grad():
        model(**inputs)
        bias = model._mmlm_session.states[0][1][:, 0, 0]
    first = inputs["attention_mask"].argmax(-1)
    assert first.tolist() != [0, 0]
    assert torch.equal(bias.argmax(-1), first)
    assert ((bias != 0).sum(-1) == 1).all()


def test_differs_two_groups_are_two_methods():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    up = ZeroTuning(gamma=20.0, heads_by_layer=((1, (0, 1)),))
    down = ZeroTuning(gamma=0.05, heads_by_layer=((1, (1, 2)), (2, (4,))))
    with edited(model, by_loops([up, down], inputs["attention_mask"])):
        expected = whole_pass(model, inputs)
    with attach(model, up, down):
        found = whole_pass(model, inputs)
    with attach(model, down, up):
        assert torch.equal(whole_pass(model, inputs), found)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0}, "gamma must be a finite number > 0, got 0"),
        ({"gamma": -1.0}, "gamma must be a finite number > 0, got -1.0"),
        ({"gamma": math.inf}, "gamma must be a finite number > 0, got inf"),
        ({"heads_by_layer": 1}, "heads_by_layer must be ((layer, (head, ...)), ...), got 1"),
        ({"heads_by_layer": ((0, (-1,)),)}, "layers and heads must be >= 0 and not empty"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ZeroTuning(**arguments)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (((1, (8,)),), "layer 1 has heads 0 to 7, got 8"),
        (((4, (0,)),), "layer 4 does not exist; the model has layers 0 to 3"),
    ],
)
def test_error_head_out_of_range(heads, message):
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match=message),
        attach(model, ZeroTuning(heads_by_layer=heads)),
    ):
        pass


def test_error_no_heads_names_the_calibration():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(UnsupportedModel, match="mmlm calibrate heads"),
        attach(model, ZeroTuning()),
    ):
        pass


def test_error_chunked_prefill_is_refused():
    model, processor = tiny.shared("llava")
    with attach(model, STRONG), pytest.raises(IncompatibleMethods, match="chunked prefill"):
        model.generate(**checks.batch(processor), max_new_tokens=2, prefill_chunk_size=4)


def test_error_right_padding_is_refused():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    inputs["attention_mask"] = inputs["attention_mask"].flip(-1)
    with attach(model, STRONG), pytest.raises(LayoutError, match="padded on the right"):
        model(**inputs)
