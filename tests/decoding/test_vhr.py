"""VHR: hand-computed examples, a naive reference, and the spec's acceptance list by number."""

from __future__ import annotations

import math
import re

import checks
import pytest
import tiny
import torch
from torch import nn

from decoding.vhr import (
    VHR,
    divergence,
    drop_negative_outliers,
    select_heads,
    text_activation,
    total,
)
from mmlm import Anatomy, TokenLayout, attach
from mmlm.errors import IncompatibleMethods, LayoutError, UnsupportedModel

LAYERS = (1, 2, 3)  # of the tiny models' four


def record_gains(model, method, inputs):
    """The heads that one prefill chose: layer -> bool [B, H]."""
    found = {}
    original = VHR.begin

    def begin(self, prompt):
        found["state"] = original(self, prompt)
        return found["state"]

    VHR.begin = begin
    try:
        with attach(model, method), torch.no_grad():
            model(**inputs)
    finally:
        VHR.begin = original
    return found["state"].heads


# ---- a naive reference: loops over heads, eager attention, no cache, no hooks ----


def _rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


def naive_layer(layer, x, cos, sin, scale_heads):
    """One Llama layer for one unpadded row [N, D]; ``scale_heads(outputs [N, H, d]) -> same``."""
    attention = layer.self_attn
    n, d = x.shape[0], attention.head_dim
    h = layer.input_layernorm(x)
    q = attention.q_proj(h).view(n, -1, d)
    k = attention.k_proj(h).view(n, -1, d)
    v = attention.v_proj(h).view(n, -1, d)
    group = q.shape[1] // k.shape[1]
    outputs = []
    for head in range(q.shape[1]):
        q_i = _rotate(q[:, head], cos, sin)
        k_i = _rotate(k[:, head // group], cos, sin)
        scores = q_i @ k_i.T / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ v[:, head // group])
    mixed = scale_heads(torch.stack(outputs, dim=1)).flatten(1)
    x = x + attention.o_proj(mixed)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def naive_vhr(model, embeds, visual, alpha, layers, *, lockstep=False):
    """Algorithm 1 for one row: last-position logits and the chosen heads of each layer."""
    text = model.get_decoder()
    keep = [i for i in range(len(visual)) if not visual[i]]
    full, short = embeds, embeds[keep]
    chosen = {}
    for index, layer in enumerate(text.layers):
        grids = [text.rotary_emb(x[None], torch.arange(len(x))[None]) for x in (full, short)]
        (cos, sin), (cos_t, sin_t) = ((c[0], s[0]) for c, s in grids)
        seen = {}

        def look(y, seen=seen):
            seen["without"] = y[-1]
            return y

        naive_layer(layer, short, cos_t, sin_t, look)

        def scale(y, seen=seen, index=index):
            if index not in layers:
                return y
            heads = range(y.shape[1])
            vhd = [float((y[-1, i] - seen["without"][i]).norm()) for i in heads]
            act = [float(seen["without"][i].pow(2).sum()) for i in heads]

            def high(values):
                mean = sum(values) / len(values)
                var = sum((u - mean) ** 2 for u in values) / (len(values) - 1)
                return [u > mean + math.sqrt(var) for u in values]

            out = [a and b for a, b in zip(high(vhd), high(act), strict=True)]
            vhd = [0.0 if o else u for u, o in zip(vhd, out, strict=True)]
            median = sorted(vhd)[(len(vhd) - 1) // 2]
            chosen[index] = [u > median for u in vhd]
            gains = torch.tensor([alpha if c else 1.0 for c in chosen[index]])
            return y * gains[None, :, None]

        def same_gain(y, index=index):
            if not lockstep or index not in layers:
                return y
            gains = torch.tensor([alpha if c else 1.0 for c in chosen[index]])
            return y * gains[None, :, None]

        full = naive_layer(layer, full, cos, sin, scale)
        short = naive_layer(layer, short, cos_t, sin_t, same_gain)
    return model.lm_head(text.norm(full[-1])), chosen


def merged_embeds(model, inputs):
    """Text embeddings with the image features in place, one row."""
    ids = inputs["input_ids"][0]
    embeds = model.get_input_embeddings()(ids).clone()
    visual = ids == model.config.image_token_id
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    embeds[visual] = torch.cat(list(features))
    return embeds, visual.tolist()


@pytest.mark.parametrize("lockstep", [False, True])
@torch.no_grad()
def test_equals_the_naive_reference(lockstep):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    embeds, visual = merged_embeds(model, inputs)
    expected, heads = naive_vhr(model, embeds, visual, 2.0, LAYERS, lockstep=lockstep)
    method = VHR(layers=LAYERS, text_branch="lockstep" if lockstep else "plain")
    chosen = record_gains(model, method, inputs)
    assert {k: v[0].tolist() for k, v in chosen.items()} == heads
    with attach(model, method):
        torch.testing.assert_close(model(**inputs).logits[0, -1], expected, atol=1e-4, rtol=0)


# ---- the equations, by hand ----


def test_divergence_by_hand():
    # Eq. 4: head 0 moves by (3, 4) -> 5; head 1 does not move; head 2 moves by rounding only.
    with_image = torch.tensor([[[4.0, 6.0], [1.0, 1.0], [1.0, 1.0]]])
    without = torch.tensor([[[1.0, 2.0], [1.0, 1.0], [1.0, 1.0 + 1e-7]]])
    assert divergence(with_image, without).tolist() == [[5.0, 0.0, 0.0]]
    # Numbers that were computed in half precision are off by more.
    near = with_image + torch.tensor([[[0.0, 0.0], [0.0, 1e-3], [0.0, 1.0]]])
    half = divergence(with_image, near, torch.bfloat16)
    assert half.tolist() == [[0.0, 0.0, 1.0]]
    assert float(divergence(with_image, near)[0, 1]) == pytest.approx(1e-3, rel=1e-3)


def test_text_activation_by_hand():
    assert text_activation(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])).tolist() == [[25.0, 4.0]]


def test_total_by_hand():
    # Eq. 5 with k = 2: layer 0 gives 4 + 3, layer 1 gives 9 + 1.
    vhd = torch.tensor([[[1.0, 4.0, 3.0]], [[9.0, 1.0, 0.0]]])
    assert total(vhd, 2).tolist() == [17.0]


def test_deviation_convention_changes_outliers():
    # Mean 2, squares sum to 8: deviation 2 with divisor H, 2.31 with H - 1; bounds 4 and 4.31.
    vhd = torch.tensor([[1.0, 1.0, 4.2, 1.8]])
    activation = torch.tensor([[0.0, 0.0, 9.0, 0.0]])
    biased = drop_negative_outliers(vhd, activation, unbiased=False)
    unbiased = drop_negative_outliers(vhd, activation, unbiased=True)
    bound = vhd.mean() + vhd.std(correction=0)
    assert bound < 4.2
    assert biased.tolist()[0][2] == 0.0
    assert (unbiased[0, 2] == 0.0) == bool(vhd.mean() + vhd.std() < 4.2)


# ---- acceptance tests of the specification, by number ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_acceptance_01_alpha_one_is_bit_equal(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    plain = model(**inputs).logits
    with attach(model, VHR(alpha=1.0)):
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_acceptance_02_a_head_that_ignores_the_image_is_never_chosen():
    model, processor = tiny.build("llava", layers=1)
    attention = model.get_decoder().layers[0].self_attn
    d = attention.head_dim
    # Eight query heads share two value heads: heads 0-3 read value head 0, which becomes zero.
    attention.v_proj.weight[:d] = 0
    inputs = checks.batch(processor)
    chosen = record_gains(model, VHR(layers=(0,)), inputs)[0]
    assert not chosen[:, :4].any()
    assert chosen[:, 4:].any()
    attention.v_proj.weight.zero_()
    plain = model(**inputs).logits
    assert not record_gains(model, VHR(layers=(0,)), inputs)[0].any()
    with attach(model, VHR(layers=(0,))):
        assert torch.equal(model(**inputs).logits, plain)


def test_acceptance_03_selection_by_hand():
    vhd = torch.tensor([[0.3, 0.1, 0.8, 0.2, 0.7, 0.4, 0.6, 0.5]])
    quiet = torch.ones_like(vhd)
    kept = drop_negative_outliers(vhd, quiet)
    assert select_heads(kept)[0].nonzero().flatten().tolist() == [2, 4, 6, 7]
    vhd = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 100]])
    activation = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 50]])
    kept = drop_negative_outliers(vhd, activation)
    assert kept.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]
    # Lower median of 0 1 2 3 4 5 6 7 is 3: heads with 4, 5, 6 and 7.
    assert select_heads(kept)[0].nonzero().flatten().tolist() == [3, 4, 5, 6]


@torch.no_grad()
def test_acceptance_04_sdpa_and_eager_choose_the_same_heads():
    model, processor = tiny.build("qwen2_5_vl")
    inputs = checks.batch(processor)
    results = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        heads = record_gains(model, VHR(), inputs)
        with attach(model, VHR()):
            results.append((heads, model(**inputs).logits[:, -1]))
    (heads_a, logits_a), (heads_b, logits_b) = results
    assert all(torch.equal(heads_a[k], heads_b[k]) for k in heads_a)
    torch.testing.assert_close(logits_a, logits_b, atol=1e-4, rtol=0)


def fixed(heads):
    """The chosen heads of a one-row prompt as a fixed setting."""
    return tuple(
        (layer, tuple(chosen[0].nonzero().flatten().tolist())) for layer, chosen in heads.items()
    )


@torch.no_grad()
def test_acceptance_05_cached_equals_uncached():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    with attach(model, VHR()):
        cached = checks.generate(model, inputs, do_sample=False)
    method = VHR(heads_by_layer=fixed(record_gains(model, VHR(), inputs)))
    ids, tokens = inputs["input_ids"], []
    for _ in range(checks.NEW):
        with attach(model, method):
            row = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            z = model(**row, use_cache=False).logits[0, -1]
        z[3] = -math.inf  # generate() was told to go on
        tokens.append(z.argmax())
        ids = torch.cat([ids, tokens[-1].view(1, 1)], dim=1)
    assert torch.stack(tokens).tolist() == cached[0].tolist()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_acceptance_06_padded_rows_choose_as_alone(family):
    model, processor = tiny.shared(family)
    together = record_gains(model, VHR(), checks.batch(processor))
    pictures = [tiny.picture(1), tiny.picture(2, (90, 60))]
    for row, prompt in enumerate(checks.PROMPTS):
        alone = record_gains(model, VHR(), tiny.inputs(processor, [prompt], [[pictures[row]]]))
        for layer, chosen in alone.items():
            assert torch.equal(chosen[0], together[layer][row])
    checks.batch_equals_single_rows(VHR(), family)


@torch.no_grad()
def test_acceptance_07_beams_equal_fixed_heads():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    method = VHR(heads_by_layer=fixed(record_gains(model, VHR(), inputs)))
    outputs = []
    for m in (VHR(), method):
        with attach(model, m):
            outputs.append(checks.generate(model, inputs, do_sample=False, num_beams=3))
    assert torch.equal(*outputs)
    plain = checks.generate(model, inputs, do_sample=False, num_beams=3)
    assert not torch.equal(plain, outputs[0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_08_nothing_remains(family):
    checks.leaves_no_trace(VHR(), family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_acceptance_09_one_extra_forward_without_the_image(family):
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    lengths, last = [], []
    hooks = [
        model.get_decoder().register_forward_pre_hook(
            lambda m, a, k: lengths.append(k["inputs_embeds"].shape[1]), with_kwargs=True
        ),
        model.get_decoder().layers[-1].mlp.register_forward_hook(lambda *a: last.append(1)),
    ]
    with attach(model, VHR(layers=(1, 2))):
        checks.generate(model, inputs, do_sample=False)
    for hook in hooks:
        hook.remove()
    anatomy = Anatomy(model)
    layout = TokenLayout.from_ids(
        inputs["input_ids"],
        None,
        image_ids=anatomy.image_ids,
        wrapper_ids=anatomy.wrapper_ids,
        framing=anatomy.family.framing,
    )
    n = layout.length
    removed = int((layout.visual | layout.frame).sum())
    assert removed > 0
    assert lengths == [n - removed, n] + [1] * (checks.NEW - 1)
    assert len(last) == checks.NEW  # the text-only pass ended after layer 2


def test_acceptance_10_evaluation_reports_text_quality():
    """Mean length and duplicate-sentence share stand beside CHAIR (alpha = 4 shows why)."""
    from benchmarks import chair

    captions = [{"image_id": 1, "caption": "A dog. A dog. A cat."}]
    metrics = chair.score(captions, {1: {"dog"}}, variant="pattern").metrics
    assert metrics["duplicate_sentence_share"] == pytest.approx(1 / 3)
    assert metrics["mean_length"] == 9


# ---- one test per line under "Differs" and per error ----


@torch.no_grad()
def test_rows_without_image_are_left_alone():
    checks.image_free_row_is_unchanged(VHR(), "qwen2_5_vl")


def test_layers_follow_the_papers_rule_and_scale_with_depth():
    assert VHR().chosen_layers(32) == (1, *range(18, 32))
    assert VHR(include_layer_1=False).chosen_layers(32) == tuple(range(18, 32))
    assert VHR().chosen_layers(8) == (1, 4, 5, 6, 7)
    assert VHR().chosen_layers(1) == ()  # round(0.4375) is no layer at all


def test_presets_follow_the_papers_table():
    model, _ = tiny.shared("llava")
    anatomy = Anatomy(model)
    assert VHR.for_model(anatomy).layers == VHR().chosen_layers(anatomy.n_layers)
    anatomy.n_layers = 32
    assert VHR.for_model(anatomy).layers == (1, *range(18, 32))
    anatomy.family_name = "instructblip"
    assert VHR.for_model(anatomy).layers == tuple(range(14, 32))


@torch.no_grad()
def test_composes_with_an_image_branch_edit():
    """Heads are measured with the other methods active in the image branch only."""
    from decoding.vcd import VCD

    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    alone = record_gains(model, VHR(), inputs)
    with attach(model, VHR(), VCD()):
        with_vcd = record_and_run(model, inputs)
    assert all(torch.equal(alone[k], with_vcd[k]) for k in alone)


def record_and_run(model, inputs):
    model(**inputs)
    return model._mmlm_session.states[0].heads


@torch.no_grad()
def test_embeddings_only_need_a_layout():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    embeds, _ = merged_embeds(model, inputs)
    with attach(model, VHR()):
        expected = model(**inputs).logits[:, -1]
    with attach(model, VHR()), pytest.raises(ValueError, match="inputs_embeds only"):
        model(inputs_embeds=embeds[None])
    anatomy = Anatomy(model)
    layout = TokenLayout.from_ids(inputs["input_ids"], None, image_ids=anatomy.image_ids)
    with attach(model, VHR(), layout=layout):
        torch.testing.assert_close(model(inputs_embeds=embeds[None]).logits[:, -1], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, "alpha must be a finite number > 0, got 0"),
        ({"alpha": math.nan}, "alpha must be a finite number > 0, got nan"),
        ({"alpha": True}, "alpha must be a finite number"),
        ({"layers": ()}, "layers must be a non-empty list"),
        ({"layers": (1, 1)}, "layers must be different and >= 0"),
        ({"layers": (-1,)}, "layers must be different and >= 0"),
        ({"layers": ("a",)}, "layers must be a non-empty list"),
        ({"text_branch": "other"}, "text_branch must be one of 'plain', 'lockstep'"),
        ({"heads_by_layer": ((0, ()),)}, "not empty"),
        ({"heads_by_layer": 3}, "heads_by_layer must be"),
        ({"heads_by_layer": ((0, (1,)),), "layers": (0,)}, "not both"),
        ({"outliers": "yes"}, "outliers must be one of True, False"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VHR(**arguments)


def test_a_layer_out_of_range_names_the_range():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match="layer 9 does not exist; the model has layers 0 to 3"),
        attach(model, VHR(layers=(9,))),
    ):
        pass
    with (
        pytest.raises(ValueError, match="heads 0 to 7, got 8"),
        attach(model, VHR(heads_by_layer=((0, (8,)),))),
    ):
        pass


def test_a_model_without_output_projection_is_refused_by_name():
    model, _ = tiny.build("llava")
    for layer in model.get_decoder().layers:
        layer.self_attn.fused = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    with (
        pytest.raises(TypeError, match=r"no output projection.*self_attn\.fused"),
        attach(model, VHR()),
    ):
        pass


def test_a_width_that_is_no_multiple_of_the_heads_is_refused():
    model, _ = tiny.build("llava")
    anatomy = Anatomy(model)
    with pytest.raises(UnsupportedModel, match="not a multiple of its 8 heads"):
        anatomy.split_heads(torch.zeros(1, 1, 63))


def test_nested_use_is_a_runtime_error():
    model, _ = tiny.shared("llava")
    with attach(model, VHR()), pytest.raises(RuntimeError, match="already attached"), VHR()(model):
        pass


@torch.no_grad()
def test_nothing_but_an_image_is_refused():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    ids = torch.full((1, 16), model.config.image_token_id)
    with attach(model, VHR()), pytest.raises(LayoutError, match="nothing but images"):
        model(input_ids=ids, pixel_values=inputs["pixel_values"])


def test_lockstep_refuses_a_static_cache():
    model, processor = tiny.shared("llava")
    with (
        attach(model, VHR(text_branch="lockstep")),
        pytest.raises(IncompatibleMethods, match="static cache"),
    ):
        model.generate(
            **checks.batch(processor),
            max_new_tokens=2,
            cache_implementation="static",
            disable_compile=True,
        )


@torch.no_grad()
def test_works_with_a_quantised_style_projection():
    """The hook needs the projection's input only, so any module in its place will do."""

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    with attach(model, VHR()):
        expected = model(**inputs).logits[:, -1]
    for layer in model.get_decoder().layers:
        layer.self_attn.o_proj = Wrapped(layer.self_attn.o_proj)
    with attach(model, VHR()):
        assert torch.equal(model(**inputs).logits[:, -1], expected)
