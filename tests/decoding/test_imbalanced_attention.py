"""ImbalancedAttention: golden vectors, a naive reference, the spec's acceptance list by number."""

from __future__ import annotations

import math
import re
from collections import Counter

import checks
import golden
import numpy as np
import pytest
import tiny
import torch
from shapes import largest, record_shapes

from decoding.imbalanced_attention import (
    ImbalancedAttention,
    boost,
    divergence_gain,
    image_mass_gain,
    local_tokens,
    outlier_share,
    summary_tokens,
)
from mmlm import Anatomy, attach
from mmlm.engine.session import Session
from mmlm.errors import LayoutError, UnsupportedModel

WITH_CLS = ("llava", "llava_next", "internvl")


def states_of(model, inputs, method):
    """What the method kept for one prefill, and its logits."""
    with attach(model, method), torch.no_grad():
        z = model(**inputs).logits[:, -1]
        return model._mmlm_session.states[0], z


def one(processor, picture=1, prompt=0, size=(64, 64)):
    return tiny.inputs(
        processor, checks.PROMPTS[prompt : prompt + 1], [[tiny.picture(picture, size)]]
    )


# ---- golden vectors ----


@pytest.fixture(params=golden.golden("imbalanced_attention/imb_*.npz"))
def vectors(request):
    return golden.arrays(request.param)


def golden_sets(v):
    early = v["vit_attn_first"][0, :, 0, 1:].sum(0)[None]
    late = v["vit_attn_penultimate"][0, :, 0, 1:].sum(0)[None]
    summary = summary_tokens(late)
    return local_tokens(early, float(v["params"][2])) & ~summary, summary, late


@pytest.mark.golden
def test_acceptance_1_golden_sets(vectors):
    local, summary, late = golden_sets(vectors)
    assert local[0].nonzero().flatten().tolist() == sorted(vectors["top_tokens"].tolist())
    assert summary[0].nonzero().flatten().tolist() == sorted(vectors["bottom_tokens"].tolist())
    assert float(outlier_share(late)) == float(vectors["bottom_ratio"])


@pytest.mark.golden
def test_acceptance_1_golden_weights(vectors):
    alpha, beta, _ = vectors["params"].tolist()
    pre, n, _, _, d = vectors["layout_pre_N_post_H_hd"].tolist()
    local, summary, _ = golden_sets(vectors)
    s = vectors["query"] @ vectors["key"].transpose(-1, -2) / math.sqrt(d)
    last = s[:, :, -1:]
    strength = torch.zeros(1, 1, s.shape[-1])
    strength[0, 0, pre : pre + n] = alpha * local[0] + beta * summary[0]
    weights = (last + boost(last, strength)).softmax(-1)
    expected = vectors["attn_weights_last"]
    torch.testing.assert_close(weights[:, :, 0], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        last.softmax(-1)[:, :, 0], vectors["attn_weights_plain_last"], rtol=1e-6, atol=1e-9
    )
    output = (weights @ vectors["value"])[:, :, 0].flatten(1)
    torch.testing.assert_close(output, vectors["attn_output_last"], rtol=0, atol=2e-6)
    assert bool(vectors["attn_weights_prev_rows_equal"])


# ---- the pure functions, by hand ----


def test_selection_by_hand():
    # Quartiles of 1..7 and 20 by linear interpolation: Q1 = 2.75, Q3 = 6.25; bound 6.25 + 5.25.
    score = torch.tensor([[5.0, 1, 20, 2, 3, 4, 7, 6]])
    assert outlier_share(score).tolist() == [1 / 8]
    assert summary_tokens(score)[0].nonzero().flatten().tolist() == [2]
    # int(8 * 0.4) = 3 largest: 20, 7, 6.
    assert local_tokens(score, 0.4)[0].nonzero().flatten().tolist() == [2, 6, 7]
    assert local_tokens(score, 0.1).sum() == 0  # int(0.8)


def test_boost_by_hand():
    # alpha 0.5 on column 1, beta 0.25 on column 2; negative scores rise too.
    s = torch.tensor([[[[1.0, -2.0, 4.0]]]])
    strength = torch.tensor([[[0.0, 0.5, 0.25]]])
    assert boost(s, strength).tolist() == [[[[0.0, 1.0, 1.0]]]]


def test_gains_by_hand():
    # Scores ln 1, ln 3 on an image and a text key: masses 1/4; the other head 3/4; ratio 1/3.
    s = torch.tensor([[[0.0, math.log(3), 9.0], [math.log(3), 0.0, 9.0]]])
    visual, real = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(image_mass_gain(s, visual, real), torch.tensor([[1 / 3, 1.0]]))
    a, b = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]), torch.zeros(1, 2, 2)
    torch.testing.assert_close(divergence_gain(a, b), torch.tensor([[1.0, 0.2]]))
    assert divergence_gain(b, b).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("n", "count", "kept"),
    [(49, 1, 0), (47, 3, 2), (161, 1, 0), (576, 1, 1), (576, 90, 90), (729, 1, 0)],
)
def test_rounding_of_the_outlier_count_follows_the_code(n, count, kept):
    """int(n (count / n)) can be one below the count."""
    score = torch.zeros(1, n)
    score[0, :count] = 1 + torch.arange(count)
    assert int(n * (count / n)) == kept
    assert int(summary_tokens(score).sum()) == kept


def test_properties_of_the_selection():
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        score = torch.rand(3, 36, generator=generator) ** 6
        order = torch.randperm(36, generator=generator)
        for choose in (summary_tokens, lambda x: local_tokens(x, 0.3)):
            assert torch.equal(choose(score)[:, order], choose(score[:, order]))
            assert torch.equal(choose(score), choose(score * 4))


# ---- a naive reference: eager, loops over rows and heads, no cache ----


def _rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def naive_selection(model, pixels, method):
    """The two sets of one picture, from full attention matrices of an eager tower."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    attentions = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    f = attentions[0][0].sum(0)[0, 1:].tolist()
    g = attentions[-2][0].sum(0)[0, 1:].tolist()
    n = len(f)
    low, high = np.percentile(g, 25), np.percentile(g, 75)
    outliers = sum(x > high + 1.5 * (high - low) for x in g) / n
    order_f = sorted(range(n), key=lambda i: -f[i])
    order_g = sorted(range(n), key=lambda i: -g[i])
    summary = set(order_g[: int(n * outliers)])
    return set(order_f[: int(n * method.local_ratio)]) - summary, summary


def naive_logits(model, ids, inputs, method):
    """Last-position logits of prompt and answer; every row that was a last row is boosted."""
    text = model.get_decoder()
    image = (ids == model.config.image_token_id).nonzero().flatten().tolist()
    local, summary = naive_selection(model, inputs["pixel_values"], method)
    strength = {image[i]: method.alpha for i in local} | {image[i]: method.beta for i in summary}
    x = model.get_input_embeddings()(ids).clone()
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    x[image] = torch.cat(list(features))
    n, first = len(ids), inputs["input_ids"].shape[1] - 1
    cos, sin = (c[0] for c in text.rotary_emb(x[None], torch.arange(n)[None]))
    for number, layer in enumerate(text.layers):
        attention = layer.self_attn
        d = attention.head_dim
        h = layer.input_layernorm(x)
        q = attention.q_proj(h).view(n, -1, d)
        k = attention.k_proj(h).view(n, -1, d)
        v = attention.v_proj(h).view(n, -1, d)
        group, outputs = q.shape[1] // k.shape[1], []
        for head in range(q.shape[1]):
            key = _rotate(k[:, head // group], cos, sin)
            s = _rotate(q[:, head], cos, sin) @ key.T / math.sqrt(d)
            if number in method.chosen_layers(len(text.layers)):
                for row in range(first, n):
                    for j, w in strength.items():
                        s[row, j] = s[row, j] + w * s[row, j].abs()
            s = s.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
            outputs.append(s.softmax(-1) @ v[:, head // group])
        x = x + attention.o_proj(torch.cat(outputs, dim=-1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(text.norm(x[-1]))


@pytest.mark.parametrize(
    "method",
    [ImbalancedAttention(), ImbalancedAttention(alpha=2.0, beta=1.0, local_ratio=0.5, layers=(1,))],
    ids=lambda m: m.label,
)
@torch.no_grad()
def test_equals_the_naive_reference(method):
    """Every step of cached decoding with two key/value heads (acceptance 6: repeated keys)."""
    model, processor = tiny.shared("llava")
    inputs = one(processor, picture=2)
    ids = inputs["input_ids"][0]
    with attach(model, method):
        z = model(**inputs).logits[0, -1]
        tokens = checks.generate(model, inputs, do_sample=False, suppress_tokens=[3])[0]
    torch.testing.assert_close(naive_logits(model, ids, inputs, method), z, atol=1e-4, rtol=0)
    for token in tokens:
        z = naive_logits(model, ids, inputs, method)
        z[3] = -math.inf
        assert z.argmax() == token
        ids = torch.cat([ids, token[None]])


@torch.no_grad()
def test_some_picture_has_summary_tokens():
    """Otherwise the reference above would never have tried them."""
    model, processor = tiny.shared("llava")
    local, summary = naive_selection(
        model, one(processor, 2)["pixel_values"], ImbalancedAttention()
    )
    assert local
    assert summary


# ---- acceptance tests of the specification, by number (1: golden, above) ----


@pytest.mark.parametrize("family", WITH_CLS)
@torch.no_grad()
def test_acceptance_2_no_strength_is_the_plain_model(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    plain, tokens = model(**inputs).logits, checks.generate(model, inputs, do_sample=False)
    with attach(model, ImbalancedAttention(alpha=0.0, beta=0.0)):
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(checks.generate(model, inputs, do_sample=False), tokens)


def test_acceptance_3_sets_are_disjoint_and_bounded():
    flat = torch.linspace(0, 1, 36)[None]
    assert summary_tokens(flat).sum() == 0
    model, processor = tiny.shared("llava")
    for picture in range(6):
        state, _ = states_of(model, one(processor, picture), ImbalancedAttention())
        assert set(state.strength.unique().tolist()) <= {0.0, 0.5, float(torch.tensor(0.3))}
        assert (state.strength == 0.5).sum() <= int(16 * 0.25)


@torch.no_grad()
def test_acceptance_4_rows_sum_to_one_and_the_mass_does_not_fall():
    generator = torch.Generator().manual_seed(1)
    s = torch.randn(2, 4, 1, 30, generator=generator)
    chosen = torch.rand(2, 1, 30, generator=generator) < 0.4
    s = torch.where(chosen[:, :, None], s.abs(), s)
    after = (s + boost(s, chosen * 0.7)).softmax(-1)
    before = s.softmax(-1)
    torch.testing.assert_close(after.sum(-1), torch.ones(2, 4, 1), atol=1e-6, rtol=0)
    mass = [(a * chosen[:, :, None]).sum(-1) for a in (before, after)]
    assert bool((mass[1] >= mass[0]).all())
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    with attach(model, ImbalancedAttention()):
        attentions = model(**checks.batch(processor), output_attentions=True).attentions
    for a in attentions:
        torch.testing.assert_close(a[:, :, -1].sum(-1), torch.ones(2, 8), atol=1e-6, rtol=0)


@torch.no_grad()
def test_acceptance_5_earlier_rows_keep_every_bit():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    kept = []
    handle = (
        model.get_decoder()
        .layers[2]
        .self_attn.o_proj.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    )
    model(**inputs)
    with attach(model, ImbalancedAttention()):
        model(**inputs)
    handle.remove()
    plain, edited = kept
    assert torch.equal(plain[:, :-1], edited[:, :-1])
    assert not torch.allclose(plain[:, -1], edited[:, -1], atol=1e-5)


@pytest.mark.parametrize("family", WITH_CLS)
def test_acceptance_6_sdpa_equals_eager(family):
    checks.sdpa_equals_eager(ImbalancedAttention(), family)


@pytest.mark.parametrize("family", WITH_CLS)
def test_acceptance_7_padded_rows_equal_single_rows(family):
    checks.batch_equals_single_rows(ImbalancedAttention(), family)


@torch.no_grad()
def test_acceptance_8_no_tensor_grows_with_the_square_of_the_length():
    model, processor = tiny.shared("llava")
    sizes = []
    for times in (20, 60):
        prompt = " ".join([checks.PROMPTS[0]] * times)
        inputs = tiny.inputs(processor, [prompt], [[tiny.picture(1)]])
        n = inputs["input_ids"].shape[1]
        with attach(model, ImbalancedAttention(head_gain="image_mass")), record_shapes() as seen:
            model(**inputs, logits_to_keep=1)
        assert largest(seen) < n * n
        sizes.append(largest(seen) / n)
    assert sizes[1] < 1.1 * sizes[0]


def test_acceptance_9_evaluation_reports_duplicate_sentences():
    from benchmarks import chair

    captions = [{"image_id": 1, "caption": "A dog. A dog. A cat. A dog."}]
    metrics = chair.score(captions, {1: {"dog"}}, variant="pattern").metrics
    assert metrics["duplicate_sentence_share"] == pytest.approx(0.5)
    assert metrics["mean_length"] == 12


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("family", WITH_CLS)
def test_the_contract_holds_for_the_class_token(family, check):
    """The matrix runs the other score, which more towers can give."""
    check(ImbalancedAttention(), family)


@pytest.mark.parametrize("gain", ["image_mass", "divergence"])
@pytest.mark.parametrize(
    "check",
    [
        checks.changes_logits,
        checks.batch_equals_single_rows,
        checks.cache_paths_agree,
        checks.beams_equal_static_beams,
        checks.image_free_row_is_unchanged,
        checks.counted_cost,
        checks.sdpa_equals_eager,
        checks.no_square_tensor,
    ],
    ids=lambda c: c.__name__,
)
def test_the_contract_holds_with_gains_per_head(check, gain):
    check(ImbalancedAttention(alpha=1.5, head_gain=gain), "llava")


# ---- one test per line under "Differs" ----


@torch.no_grad()
def test_selection_is_per_tile_and_per_picture():
    model, processor = tiny.shared("llava")
    a, b = tiny.picture(4), tiny.picture(5)
    both, _ = states_of(
        model, tiny.inputs(processor, checks.PROMPTS[:1], [[a, b]]), ImbalancedAttention()
    )
    alone = []
    for picture in (a, b):
        inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[picture]])
        state, _ = states_of(model, inputs, ImbalancedAttention())
        alone.append(state.strength[state.visual])
    assert torch.equal(both.strength[both.visual], torch.cat(alone))
    model, processor = tiny.shared("llava_next")
    state, _ = states_of(model, one(processor, size=(56, 112)), ImbalancedAttention(beta=0.0))
    assert int((state.strength > 0).sum()) > 16 * 0.25  # more than one tile's share


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@torch.no_grad()
def test_row_ends_are_never_selected(family):
    model, processor = tiny.shared(family)
    inputs = one(processor, size=(90, 60))
    kept = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: kept.append(k["inputs_embeds"]), with_kwargs=True
    )
    method = ImbalancedAttention(local_ratio=1.0, tower_score="column_mean")
    state, _ = states_of(model, inputs, method)
    handle.remove()
    ends = torch.isclose(kept[0], model.model.image_newline).all(-1)
    assert ends.any()
    assert bool((state.strength[ends] == 0).all())
    assert bool((state.strength[state.visual & ~ends] > 0).all())


@torch.no_grad()
def test_scores_of_merged_patches_are_averaged():
    model, processor = tiny.shared("internvl")
    inputs = one(processor)
    entering = []
    handle = (
        Anatomy(model).tower_blocks[0].register_forward_pre_hook(lambda m, a: entering.append(a[0]))
    )
    state, _ = states_of(model, inputs, ImbalancedAttention(beta=0.0, local_ratio=0.25))
    handle.remove()
    from mmlm.engine.vision.tower import class_attention

    f = class_attention(Anatomy(model), 0, entering[0]).sum(1)
    tiles = f.shape[0]
    grid = f.view(tiles, 2, 2, 2, 2).mean((2, 4)).view(tiles, 4)  # [T, row, in row, column, ...]
    best = torch.zeros_like(grid).scatter(1, grid.argmax(1, keepdim=True), 0.5)
    assert torch.equal(state.strength[state.visual].view(tiles, 4), best)


@torch.no_grad()
def test_the_late_block_makes_the_features():
    model, processor = tiny.build("llava")
    inputs = one(processor, 2)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    attentions = tower(inputs["pixel_values"], output_attentions=True).attentions
    found = []
    for layer in (-2, -1):
        model.config.vision_feature_layer = layer
        state, _ = states_of(model, inputs, ImbalancedAttention(alpha=0.0, beta=1.0))
        expected = summary_tokens(attentions[layer][:, :, 0, 1:].sum(1))
        assert torch.equal(state.strength[state.visual] > 0, expected[0])
        found.append(expected)
    assert not torch.equal(*found)


@torch.no_grad()
def test_half_of_a_resized_token_counts(monkeypatch):
    model, processor = tiny.build("llava_onevision")
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_1"
    inputs = one(processor, size=(112, 112))
    kept = []
    original = Session.place

    def place(self, marks):
        kept.append(original(self, marks))
        return kept[0]

    monkeypatch.setattr(Session, "place", place)
    method = ImbalancedAttention(local_ratio=0.5, beta=0.0, tower_score="column_mean")
    state, _ = states_of(model, inputs, method)
    share = kept[0][..., 0]
    assert bool(((share > 0) & (share < 0.5)).any())
    assert torch.equal(state.strength > 0, share >= 0.5)


@torch.no_grad()
def test_image_mass_is_measured_before_the_boost_with_earlier_layers_boosted():
    model, processor = tiny.build("llava")
    inputs = one(processor, 2)
    state, _ = states_of(model, inputs, ImbalancedAttention(head_gain="image_mass"))
    model.set_attn_implementation("eager")
    plain = model(**inputs, output_attentions=True).attentions
    with attach(model, ImbalancedAttention(head_gain="image_mass", layers=(2,))):
        boosted = model(**inputs, output_attentions=True).attentions
    for layer, source in ((2, plain), (3, boosted)):
        mass = (source[layer][0, :, -1] * state.visual[0]).sum(-1)
        torch.testing.assert_close(state.gain[layer][0], mass / mass.max(), atol=1e-5, rtol=1e-4)
    assert set(state.gain) == {2, 3}


@torch.no_grad()
def test_divergence_is_measured_on_the_plain_model():
    model, processor = tiny.shared("llava")
    inputs = one(processor, 2)
    state, _ = states_of(model, inputs, ImbalancedAttention(head_gain="divergence", alpha=5.0))
    weak, _ = states_of(model, inputs, ImbalancedAttention(head_gain="divergence", alpha=0.1))
    assert all(torch.equal(state.gain[i], weak.gain[i]) for i in (2, 3))
    assert all(float(g.max()) == 1 and float(g.min()) >= 0 for g in state.gain.values())


@torch.no_grad()
def test_a_gain_of_one_is_the_papers_method(monkeypatch):
    from decoding import imbalanced_attention

    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    _, expected = states_of(model, inputs, ImbalancedAttention())
    _, gained = states_of(model, inputs, ImbalancedAttention(head_gain="image_mass"))
    assert not torch.allclose(gained, expected, atol=1e-5)
    monkeypatch.setattr(
        imbalanced_attention, "image_mass_gain", lambda s, *_: torch.ones(s.shape[:2])
    )
    _, ones = states_of(model, inputs, ImbalancedAttention(head_gain="image_mass"))
    assert torch.equal(ones, expected)


def test_layers_start_at_two_in_every_depth():
    assert ImbalancedAttention().chosen_layers(32) == tuple(range(2, 32))
    assert ImbalancedAttention().chosen_layers(40) == tuple(range(2, 40))
    assert ImbalancedAttention().chosen_layers(4) == (2, 3)
    assert ImbalancedAttention().chosen_layers(2) == (1,)
    assert ImbalancedAttention().chosen_layers(1) == (0,)


def test_the_authors_setting():
    method = ImbalancedAttention.paper_setting()
    assert (method.alpha, method.beta, method.local_ratio) == (0.7, 0.3, 0.25)
    assert ImbalancedAttention() == ImbalancedAttention(alpha=0.5, beta=0.3, local_ratio=0.25)


@torch.no_grad()
def test_the_guidance_of_pai_composes_to_the_authors_runs():
    """Boost here, guidance there: PAI with alpha = 0 adds its logits part alone."""
    from decoding.pai import PAI

    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    _, boosted = states_of(model, inputs, ImbalancedAttention())
    guidance = PAI(alpha=0.0, gamma=1.1)
    plain = checks.next_logits(model, inputs)
    with attach(model, guidance):
        guided = checks.next_logits(model, inputs)
    with attach(model, ImbalancedAttention(), guidance):
        both = checks.next_logits(model, inputs)
    # gamma log p - (gamma - 1) log p_txt + ...: the text branch is the same plain one in both.
    kept = both.isfinite() & guided.isfinite()
    log_text = (plain.log_softmax(-1) * 1.1 - guided.log_softmax(-1)) / 0.1
    expected = boosted.log_softmax(-1) * 1.1 - 0.1 * log_text
    difference = (both - expected).masked_fill(~kept, math.nan)
    for row in difference:  # equal up to a constant, which no softmax sees
        row = row[~row.isnan()]
        assert len(row) > 1
        torch.testing.assert_close(row, row.mean().expand_as(row), atol=1e-3, rtol=0)


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha must be a finite number >= 0, got -0.1"),
        ({"beta": -1}, "beta must be a finite number >= 0, got -1"),
        ({"alpha": math.nan}, "alpha must be a finite number >= 0, got nan"),
        ({"local_ratio": 0}, "local_ratio must be a finite number > 0 and <= 1, got 0"),
        ({"local_ratio": 1.1}, "local_ratio must be a finite number > 0 and <= 1, got 1.1"),
        ({"spatial_ratio": 0.1}, "spatial_ratio must be 0: the spatial set's scores are row sums"),
        ({"tower_score": "mean"}, "tower_score must be one of 'cls', 'column_mean'"),
        ({"head_gain": True}, "head_gain must be one of 'none', 'image_mass', 'divergence'"),
        ({"layers": ()}, "layers must be a non-empty list"),
        ({"layers": (1, 1)}, "layers must be different and >= 0, got (1, 1)"),
        ({"layers": (-1,)}, "layers must be different and >= 0, got (-1,)"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ImbalancedAttention(**arguments)


def test_a_layer_out_of_range_names_the_range():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match="layer 9 does not exist; the model has layers 0 to 3"),
        attach(model, ImbalancedAttention(layers=(9,))),
    ):
        pass


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("llava_onevision", "no class token.*tower_score='column_mean' chooses"),
        ("qwen2_5_vl", "rotate their queries and keys by position"),
    ],
)
def test_towers_that_cannot_give_the_score_are_refused(family, message):
    model, _ = tiny.shared(family)
    with pytest.raises(UnsupportedModel, match=message), attach(model, ImbalancedAttention()):
        pass
    with attach(model, ImbalancedAttention().neutral()):
        pass


@torch.no_grad()
def test_features_that_do_not_fit_the_placeholders_are_refused():
    model, processor = tiny.shared("llava")
    inputs = one(processor)
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == model.config.image_token_id).nonzero()[0]] = 5
    with (
        attach(model, ImbalancedAttention()),
        pytest.raises(LayoutError, match="16 features but the prompts hold 15 placeholders"),
    ):
        model(**{**inputs, "input_ids": ids})


@torch.no_grad()
def test_features_that_were_encoded_elsewhere_are_refused():
    model, processor = tiny.shared("llava")
    inputs = one(processor)
    encoded = {"image": model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    with (
        attach(model, ImbalancedAttention()),
        pytest.raises(LayoutError, match="not encoded inside this block"),
    ):
        model(**inputs, mm_encoder_outputs=encoded)


@torch.no_grad()
def test_a_row_without_picture_is_no_error():
    checks.image_free_row_is_unchanged(ImbalancedAttention(), "llava_next")


def test_only_two_blocks_are_looked_at(monkeypatch):
    from decoding import imbalanced_attention

    calls = Counter()
    original = imbalanced_attention.class_attention

    def counted(anatomy, block, x):
        calls[block] += 1
        return original(anatomy, block, x)

    monkeypatch.setattr(imbalanced_attention, "class_attention", counted)
    model, processor = tiny.shared("llava")
    with attach(model, ImbalancedAttention()):
        checks.generate(model, checks.batch(processor), do_sample=False, num_beams=3)
    assert calls == {0: 1, 1: 1}
