"""ACT: golden vectors, a naive reference with loops, the spec's acceptance list by number."""

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

from decoding.act import ACT, calibrate, column_means, without_first
from mmlm import attach
from mmlm.errors import IncompatibleMethods, LayoutError, UnsupportedModel

HEADS = ((1, (0, 1, 2, 5)), (2, (3, 4, 5, 6, 7)))
STRONG = ACT(heads_by_layer=HEADS, beta=0.1, theta=0.03)


def changed(method, **options):
    return ACT(**{**vars(method), **options})


# ---- golden vectors ----


@pytest.fixture(params=golden.golden("act_zerotuning/act_*.npz"))
def vectors(request):
    return golden.arrays(request.param)


@pytest.mark.golden
def test_acceptance_1_golden(vectors):
    a, head = vectors["attn"], int(vectors["head"])
    means = column_means(a.sum(2))
    torch.testing.assert_close(means[0, head], vectors["column_mean"], atol=1e-6, rtol=0)
    sinks = without_first(means > float(vectors["threshold"]), None)[:, [head], None]
    out = a.clone()
    out[:, [head]] = calibrate(a[:, [head]], sinks, float(vectors["beta"]))
    torch.testing.assert_close(out, vectors["attn_out"], atol=1e-6, rtol=0)


# ---- by hand ----


def test_column_means_by_hand():
    # Rows (1), (1/2, 1/2), (1/4, 1/4, 1/2): column sums 7/4, 3/4, 1/2 over 3, 2 and 1 rows.
    sums = torch.tensor([[[7 / 4, 3 / 4, 1 / 2]]])
    torch.testing.assert_close(column_means(sums), torch.tensor([[[7 / 12, 3 / 8, 1 / 2]]]))


def test_a_row_by_hand():
    # A sink with 0.4 keeps half; the freed 0.2 goes to 0.3 and 0.3 in equal parts.
    a = torch.tensor([[[[0.3, 0.4, 0.3]]]])
    sinks = torch.tensor([[[[False, True, False]]]])
    torch.testing.assert_close(calibrate(a, sinks, 0.5), torch.tensor([[[[0.4, 0.2, 0.4]]]]))


def test_which_sink_is_spared_by_hand():
    sinks = torch.tensor([[[True, False, True, True]], [[False, False, True, True]]])
    detected = without_first(sinks, None)
    assert detected[:, 0].tolist() == [[False, False, True, True], [False, False, False, True]]
    # The second prompt has one padding position.
    placed = without_first(sinks, torch.tensor([0, 1]))
    assert placed[:, 0].tolist() == [[False, False, True, True], [False, False, True, True]]


# ---- the naive reference ----


def by_loops(method, real, copies=1):
    """ACT as an edit of whole matrices: prompt sinks from real rows, one row at a time."""
    real = real.repeat_interleave(copies, 0)
    heads = dict(method.heads_by_layer)

    def edit(layer, x, a):
        for h in heads.get(layer, ()):
            for b in range(a.shape[0]):
                calibrate_by_loops(method, a[b, h], real[b].nonzero().flatten().tolist())

    return edit


def calibrate_by_loops(method, a, positions):
    """One head's matrix, in place; ``positions`` are the real ones of the prompt."""
    start, end = positions[0], positions[-1] + 1
    sinks = []
    for j in positions:
        rows = [i for i in positions if i >= j]
        if sum(float(a[i, j]) for i in rows) / len(rows) > method.theta:
            sinks.append(j)
    spare(method, sinks, start)
    for i in range(start, a.shape[0]):
        own = sinks
        if i >= end and method.detect == "row":
            own = [j for j in range(start, i + 1) if float(a[i, j]) > method.theta]
            spare(method, own, start)
        others = [j for j in range(start, i + 1) if j not in own]
        freed = (1 - method.beta) * a[i, own].sum()
        gain = 1 + freed / a[i, others].sum()
        a[i, own] = a[i, own] * method.beta
        a[i, others] = a[i, others] * gain


def spare(method, sinks, start):
    if method.first == "detected" and sinks:
        sinks.pop(0)
    elif start in sinks:
        sinks.remove(start)


SETTINGS = (STRONG, changed(STRONG, detect="row"), changed(STRONG, first="detected"))


@pytest.mark.parametrize("method", SETTINGS, ids=["ours", "row", "detected"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_equals_whole_eager_matrices(family, method):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    with edited(model, by_loops(method, inputs["attention_mask"])):
        expected = whole_pass(model, inputs)
    with attach(model, method):
        found = whole_pass(model, inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, whole_pass(model, inputs), atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("method", SETTINGS[:2], ids=["ours", "row"])
@torch.no_grad()
def test_cache_and_beams_equal_recomputing(method, options):
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, method):
        ours = checks.generate(model, inputs, do_sample=False, **options)
    edit = by_loops(method, inputs["attention_mask"], copies=options.get("num_beams", 1))
    processors = LogitsProcessorList([Recompute(model, inputs, edit)])
    naive = checks.generate(model, inputs, do_sample=False, logits_processor=processors, **options)
    assert torch.equal(ours, naive)
    assert not torch.equal(ours, checks.generate(model, inputs, do_sample=False, **options))


# ---- the acceptance list ----


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_2_beta_1_is_bit_identical(family):
    checks.neutral_is_plain(STRONG, family)
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    with attach(model, changed(STRONG, beta=1.0)):
        assert torch.equal(checks.next_logits(model, inputs), plain)


def causal_rows(seed):
    g = torch.Generator().manual_seed(seed)
    s = torch.randn(2, 3, 12, 12, generator=g).mul(2)
    return s.masked_fill(~torch.ones(12, 12).tril().bool(), -math.inf).softmax(-1)


@pytest.mark.parametrize("seed", range(5))
def test_acceptance_3_rows_sum_to_one_and_stay_causal(seed):
    a = causal_rows(seed)
    sinks = without_first(column_means(a.sum(2)) > 0.1, torch.tensor([0, 0]))
    assert sinks.any()
    out = calibrate(a, sinks[:, :, None], 0.4)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 3, 12), atol=1e-6, rtol=0)
    assert (out >= 0).all()
    assert (out.triu(1) == 0).all()
    assert torch.equal(out[:, :, 0], a[:, :, 0])  # the first row sees itself only


@pytest.mark.parametrize("seed", range(3))
def test_sinks_lose_and_everything_else_gains(seed):
    a = causal_rows(seed)
    sinks = without_first(column_means(a.sum(2)) > 0.1, torch.tensor([0, 0]))[:, :, None]
    out = calibrate(a, sinks, 0.4)
    torch.testing.assert_close(out[sinks.expand_as(a)], 0.4 * a[sinks.expand_as(a)])
    others = ~sinks.expand_as(a)
    assert (out[others] >= a[others]).all()


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
    differs = (seen[0] != seen[1]).any(-1).any(1).any(0)
    chosen = [h in dict(HEADS)[1] for h in range(8)]
    assert not any(d and not c for d, c in zip(differs.tolist(), chosen, strict=True))
    assert differs.any()


@torch.no_grad()
def test_acceptance_4_no_sink_but_the_first_changes_nothing():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    plain = whole_pass(model, inputs)
    tokens = checks.generate(model, inputs, do_sample=False)
    method = changed(STRONG, theta=1.0)
    with attach(model, method):
        assert torch.equal(whole_pass(model, inputs), plain)
        assert model._mmlm_session.states[0].acts == {1: False, 2: False}
        assert torch.equal(checks.generate(model, inputs, do_sample=False), tokens)
    # The first token alone above theta: it is spared.
    a = torch.tensor([[[[1.0, 0.0], [0.95, 0.05]]]])
    sinks = without_first(column_means(a.sum(2)) > 0.1, torch.tensor([0]))
    assert torch.equal(calibrate(a, sinks[:, :, None], 0.4), a)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_5_left_padding_equals_single_runs(family):
    checks.batch_equals_single_rows(STRONG, family)
    checks.batch_equals_single_rows(changed(STRONG, first="detected"), family)


def test_acceptance_5_padding_is_not_counted():
    """The sinks of a padded row are those of the row alone."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, STRONG), torch.no_grad():
        whole_pass(model, inputs)
        sinks = model._mmlm_session.states[0].sinks[1]
        pad = inputs["attention_mask"] == 0
        assert pad.any()
        assert not sinks.transpose(1, 2)[pad].any()
        for row, prompt in enumerate(checks.PROMPTS):
            picture = [[tiny.picture(1)], [tiny.picture(2, (90, 60))]][row]
            whole_pass(model, tiny.inputs(processor, [prompt], [picture]))
            single = model._mmlm_session.states[0].sinks[1][0]
            assert torch.equal(sinks[row][:, -single.shape[1] :], single)


def test_prefill_needs_no_square():
    checks.no_square_tensor(STRONG, "llava")


# ---- differs ----


def test_differs_a_first_token_below_theta_costs_the_code_a_real_sink():
    sums = torch.tensor([[[0.2, 1.5, 0.3, 0.4]]])
    sinks = column_means(sums) > 0.3
    assert sinks.tolist() == [[[False, True, False, True]]]
    assert without_first(sinks, torch.tensor([0])).tolist() == [[[False, True, False, True]]]
    assert without_first(sinks, None).tolist() == [[[False, False, False, True]]]


def test_differs_a_row_on_sinks_alone_is_left_alone():
    a = torch.tensor([[[[0.0, 1.0]]]])
    sinks = torch.tensor([[[[False, True]]]])
    assert torch.equal(calibrate(a, sinks, 0.4), a)


@torch.no_grad()
def test_differs_new_tokens_use_the_prompts_sinks():
    """Prompt and row detection agree at the prefill and part at the first new token."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    results = []
    for method in SETTINGS[:2]:
        with attach(model, method):
            result = model.generate(
                **inputs,
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        results.append(result.logits)
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.allclose(results[0][1], results[1][1], atol=1e-5)


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"theta": -0.1}, "theta must be a finite number >= 0 and <= 1, got -0.1"),
        ({"theta": 1.1}, "theta must be a finite number >= 0 and <= 1, got 1.1"),
        ({"beta": -0.1}, "beta must be a finite number >= 0 and <= 1, got -0.1"),
        ({"beta": math.nan}, "beta must be a finite number >= 0 and <= 1, got nan"),
        ({"detect": "rows"}, "detect must be one of 'prompt', 'row', got 'rows'"),
        ({"first": "bos"}, "first must be one of 'position', 'detected', got 'bos'"),
        ({"heads_by_layer": 3}, "heads_by_layer must be ((layer, (head, ...)), ...), got 3"),
        ({"heads_by_layer": "x"}, "heads_by_layer must be ((layer, (head, ...)), ...), got 'x'"),
        ({"heads_by_layer": ((1, (0.5,)),)}, "heads_by_layer must be ((layer, (head, ...)), ...)"),
        ({"heads_by_layer": ()}, "layers and heads must be >= 0 and not empty, got ()"),
        ({"heads_by_layer": ((1, ()),)}, "layers and heads must be >= 0 and not empty"),
        ({"heads_by_layer": ((-1, (0,)),)}, "layers and heads must be >= 0 and not empty"),
        ({"heads_by_layer": ((1, (0, 0)),)}, "must name every layer and head once"),
        ({"heads_by_layer": ((1, (0,)), (1, (2,)))}, "must name every layer and head once"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ACT(**arguments)


def test_heads_are_sorted_and_may_be_a_mapping():
    given = ACT(heads_by_layer={2: [7, 3], 1: [0]})
    assert given == ACT(heads_by_layer=((1, (0,)), (2, (3, 7))))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (((1, (8,)),), "layer 1 has heads 0 to 7, got 8"),
        (((4, (0,)),), "layer 4 does not exist; the model has layers 0 to 3"),
    ],
)
def test_error_head_out_of_range(heads, message):
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match=message), attach(model, ACT(heads_by_layer=heads)):
        pass


def test_error_no_heads_names_the_calibration():
    model, _ = tiny.shared("llava")
    with pytest.raises(UnsupportedModel, match="mmlm calibrate heads"), attach(model, ACT()):
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
