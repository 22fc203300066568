"""VAR: golden vectors, a naive reference with loops, the spec's acceptance list by number."""

from __future__ import annotations

import math
import re

import checks
import golden
import pytest
import tiny
import torch
from shapes import largest, record_shapes
from transformers import LogitsProcessorList
from whole_matrix import Recompute, edited, whole_pass

from decoding import var
from decoding.act import ACT
from decoding.var import (
    VAR,
    find_sink_dims,
    image_centric,
    known_sink_dims,
    mark,
    masses,
    massive_dims,
    phi,
    redistribute,
)
from mmlm import Anatomy, attach
from mmlm.errors import IncompatibleMethods, LayoutError, UnsupportedModel

DIMS = (2, 7)
#: Every head with any sink, and a setting in which the head test says yes and no.
EVERY = VAR(move_fraction=0.9, min_nonsink_ratio=0.0, min_visual_mass=0.0, tau=0.9, sink_dims=DIMS)
SOME = VAR(move_fraction=0.7, min_nonsink_ratio=0.45, min_visual_mass=0.3, tau=1.1, sink_dims=DIMS)


# ---- golden vectors ----


@pytest.fixture(params=golden.golden("var/var_*.npz"))
def vectors(request):
    return golden.arrays(request.param)


def golden_marks(v):
    tau, *_ = v["params_tau_rho_summ_p"].tolist()
    im, vis, post, _, _ = v["layout_im_vis_post_H_D"].tolist()
    visual = torch.zeros(1, im + vis + post, dtype=torch.bool)
    visual[:, im : im + vis] = True
    sinks = phi(v["hidden_states"], v["sink_dims"].tolist()) > tau
    return visual, sinks


@pytest.mark.golden
def test_acceptance_1_golden_sinks(vectors):
    found = phi(vectors["hidden_states"], vectors["sink_dims"].tolist())
    torch.testing.assert_close(found, vectors["phi"], atol=1e-6, rtol=0)
    _, sinks = golden_marks(vectors)
    assert sinks[0].nonzero().flatten().tolist() == sorted(vectors["sink_indices"].tolist())


@pytest.mark.golden
def test_acceptance_1_golden_rows(vectors):
    stored = [rows for rows in ("prefill", "step0", "step1") if f"attn_{rows}" in vectors]
    assert "prefill" in stored  # sets differ in their number of steps
    for rows in stored:
        check_golden_rows(vectors, rows)


def check_golden_rows(vectors, rows):
    _, rho, summ, kept = vectors["params_tau_rho_summ_p"].tolist()
    im, vis, *_ = vectors["layout_im_vis_post_H_D"].tolist()
    visual, sinks = golden_marks(vectors)
    a, marks = vectors[f"attn_{rows}"], mark(visual, sinks)
    mass = masses(a, marks)
    selected = image_centric(mass, torch.tensor([[vis]]), summ, 1 - rho)
    selected &= bool((visual & sinks).any())
    assert selected.nonzero().tolist() == sorted(vectors[f"heads_{rows}"].tolist())
    if rows == "prefill":
        selected[:, :, : im + vis] = False
    out = redistribute(a, marks, mass, selected, 1 - kept)
    torch.testing.assert_close(out, vectors[f"attn_{rows}_out"], atol=1e-6, rtol=0)


# ---- by hand ----


def test_a_row_by_hand():
    # Keys: text sink 0.4, visual 0.1, visual sink 0.2, visual 0.1, text 0.2. Half is moved:
    # Omega = 0.5 * (0.4 + 0.2) = 0.3, spread over 0.1 + 0.1, so both grow to 0.1 + 0.15.
    a = torch.tensor([[[[0.4, 0.1, 0.2, 0.1, 0.2]]]])
    visual = torch.tensor([[False, True, True, True]])
    sinks = torch.tensor([[True, False, True, False]])
    marks = mark(visual, sinks)
    mass = masses(a, marks)
    torch.testing.assert_close(mass[0, 0, 0], torch.tensor([0.2, 0.2, 0.4]))
    # The image has 0.4, half of it on its sink: rho up to 0.5 selects, mass up to 0.4.
    n = torch.tensor([[3]])
    for rho, least, expected in ((0.49, 0.39, True), (0.51, 0.39, False), (0.49, 0.41, False)):
        assert image_centric(mass, n, least, rho).item() is expected
    out = redistribute(a, marks, mass, torch.ones(1, 1, 1, dtype=torch.bool), 0.5)
    torch.testing.assert_close(out, torch.tensor([[[[0.2, 0.25, 0.1, 0.25, 0.2]]]]))
    same = redistribute(a, marks, mass, torch.zeros(1, 1, 1, dtype=torch.bool), 0.5)
    assert torch.equal(same, a)


def test_phi_by_hand():
    # x = (3, 4, 0, 0): RMS = sqrt(25 / 4) = 2.5. Never above sqrt(D): one dimension alone gives 2.
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]])
    torch.testing.assert_close(phi(x, (1, 2)), torch.tensor([1.6, 2.0]))
    torch.testing.assert_close(phi(x, (2,)), torch.tensor([0.0, 0.0]))


# ---- the naive reference ----


def by_loops(method, layout, n_layers, copies=1):
    """VAR as an edit of whole matrices: one row of one head at a time."""
    visual = layout.visual.repeat_interleave(copies, 0)
    real = layout.real.repeat_interleave(copies, 0)
    last = n_layers - 1 if method.include_last_layer else n_layers - 2

    def edit(layer, x, a):
        if not 2 <= layer <= last:
            return
        batch, heads, n, _ = a.shape
        prompt = visual.shape[1]
        for b in range(batch):
            sinks = []
            for j in range(prompt):  # generated tokens never become sinks
                rms = math.sqrt(float((x[b, j] ** 2).mean()) + 1e-6)
                far = max(abs(float(x[b, j, d])) for d in method.sink_dims) / rms
                if real[b, j] and far > method.tau:
                    sinks.append(j)
            image = visual[b].nonzero().flatten().tolist()
            rest = [j for j in image if j not in sinks]
            inside = [j for j in image if j in sinks]
            if not inside or not rest:
                continue
            for i in range(max(image) + 1, n):
                for h in range(heads):
                    row = a[b, h, i]
                    seen, sunk = float(row[image].sum()), float(row[inside].sum())
                    share = sunk / (seen + 1e-6 * len(image))
                    if seen < method.min_visual_mass or share > 1 - method.min_nonsink_ratio:
                        continue
                    omega = method.move_fraction * row[sinks].sum()
                    gain = 1 + omega / row[rest].sum()
                    row[sinks] = row[sinks] * (1 - method.move_fraction)
                    row[rest] = row[rest] * gain

    return edit


def layout_of(model, inputs):
    with attach(model, EVERY), torch.no_grad():
        model(**inputs)
        return model._mmlm_session.layout


def reference(model, inputs, method, copies=1):
    return by_loops(method, layout_of(model, inputs), len(model.get_decoder().layers), copies)


@pytest.mark.parametrize("method", [EVERY, SOME], ids=["every", "some"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_acceptance_7_equals_whole_eager_matrices(family, method):
    """Grouped queries too: the tiny models have 8 heads and 2 key/value heads."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    with edited(model, reference(model, inputs, method)):
        expected = whole_pass(model, inputs)
    with attach(model, method):
        found = whole_pass(model, inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, whole_pass(model, inputs), atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_acceptance_8_cache_and_beams_equal_recomputing(options):
    """A setting whose head test says no at times, strong enough to change tokens."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    method = VAR(**{**vars(SOME), "move_fraction": 1.0, "include_last_layer": True})
    with attach(model, method):
        ours = checks.generate(model, inputs, do_sample=False, **options)
    edit = reference(model, inputs, method, copies=options.get("num_beams", 1))
    processors = LogitsProcessorList([Recompute(model, inputs, edit)])
    naive = checks.generate(model, inputs, do_sample=False, logits_processor=processors, **options)
    assert torch.equal(ours, naive)
    assert not torch.equal(ours, checks.generate(model, inputs, do_sample=False, **options))


# ---- the rest of the acceptance list ----


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_2_nothing_moved_is_plain(family):
    checks.neutral_is_plain(EVERY, family)
    checks.neutral_is_plain(VAR(), family)


def random_rows(seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 5, 7, 24, generator=g).mul(2).softmax(-1)
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[0, 3:14] = visual[1, 6:12] = True
    sinks = torch.rand(2, 20, generator=g) < 0.3
    sinks[:, 8] = True
    return a, visual, sinks


@pytest.mark.parametrize("seed", range(5))
def test_acceptance_3_rows_sum_to_one_and_the_rest_keeps_its_bits(seed):
    a, visual, sinks = random_rows(seed)
    marks = mark(visual, sinks)
    mass = masses(a, marks)
    selected = image_centric(mass, visual.sum(-1, keepdim=True), 0.2, 0.5)
    assert selected.any()
    assert not selected.all()
    out = redistribute(a, marks, mass, selected, 0.4)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, 5, 7), atol=1e-6, rtol=0)
    assert (out >= 0).all()
    assert torch.equal(out[~selected], a[~selected])


def test_acceptance_3_rows_before_the_image_keep_the_kernels_bits():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    seen = []
    part = model.get_decoder().layers[2].self_attn.o_proj
    for methods in ((), (EVERY,)):
        handle = part.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
        with attach(model, *methods):
            whole_pass(model, inputs)
        handle.remove()
    plain, ours = seen
    end = layout_of(model, inputs).last_image_end()
    for b in range(2):
        assert torch.equal(plain[b, : end[b] + 1], ours[b, : end[b] + 1])
        assert not torch.equal(plain[b, end[b] + 1 :], ours[b, end[b] + 1 :])


@torch.no_grad()
def test_acceptance_4_without_a_visual_sink_bit_identical_even_with_text_sinks():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    layout = layout_of(model, inputs)
    found = {}

    def look(layer, x, a):
        found[layer] = x.clone()

    with edited(model, look):
        whole_pass(model, inputs)
    # A dimension and tau such that layer 2 (the only one that acts) has sinks in the text only.
    for d in range(64):
        values = phi(found[2], (d,)).masked_fill(~layout.real, 0)
        top_image = values[layout.visual].max()
        top_text = values[~layout.visual].max()
        if top_text > top_image + 0.1:
            break
    method = VAR(tau=float(top_image + 0.05), sink_dims=(d,), min_visual_mass=0.0)
    with attach(model, method):
        edit = whole_pass(model, inputs)
        state = model._mmlm_session.states[0].layers[2]
        assert state.sinks.any()
        assert not state.acts
    assert torch.equal(edit, whole_pass(model, inputs))


def test_acceptance_4_row_by_row():
    """Beside a row with a visual sink, one with a sink in its text only stays as it is."""
    visual = torch.tensor([[False, False, True, True, False]]).expand(2, -1)
    x = torch.ones(2, 5, 64)
    x[:, 0, 2] = x[0, 2, 2] = 100.0
    everything = torch.ones(2, 5, dtype=torch.bool)
    state = var._State(visual, everything, visual.sum(-1, keepdim=True), None, (2,))
    method = VAR(tau=5.0, sink_dims=(2,), min_visual_mass=0.0)
    method.layer_in(state, 2, x)
    assert method.acts_now(state, 2)
    a = torch.rand(2, 3, 1, 6).softmax(-1)
    out = method.weights(state, 2, torch.tensor([[5], [5]]), a)
    assert torch.equal(out[1], a[1])
    assert not torch.equal(out[0], a[0])


@pytest.mark.parametrize("seed", range(5))
def test_acceptance_5_the_images_mass_never_decreases(seed):
    a, visual, sinks = random_rows(seed)
    marks = mark(visual, sinks)
    mass = masses(a, marks)
    every = torch.ones(2, 5, 7, dtype=torch.bool)
    after = masses(redistribute(a, marks, mass, every, 0.4), marks)
    assert (after[..., :2].sum(-1) >= mass[..., :2].sum(-1) - 1e-6).all()


def test_acceptance_6_the_extremes_of_the_head_test():
    a, visual, sinks = random_rows()
    mass = masses(a, mark(visual, sinks))
    n = visual.sum(-1, keepdim=True)
    assert (mass[..., 1] > 0).all()
    assert not image_centric(mass, n, 0.0, 1.0).any()
    expected = mass[..., :2].sum(-1) >= 0.4
    assert torch.equal(image_centric(mass, n, 0.4, 0.0), expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_8_left_padding_equals_single_runs(family):
    checks.batch_equals_single_rows(SOME, family)


def test_acceptance_9_the_last_layer_is_left_alone_unless_included():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    part = model.get_decoder().layers[3].self_attn
    # With the layer's input forced to be the plain one, only its own attention can differ.
    given, seen = [], []
    block = model.get_decoder().layers[3]

    def force(module, args, kwargs):
        given.append(args[0].clone())
        return (given[0], *args[1:]), kwargs

    with_plain_input = block.register_forward_pre_hook(force, with_kwargs=True)
    handle = part.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    for methods in ((), (EVERY,), (VAR(**{**vars(EVERY), "include_last_layer": True}),)):
        with attach(model, *methods):
            whole_pass(model, inputs)
    handle.remove()
    with_plain_input.remove()
    assert not torch.equal(given[0], given[1])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_acceptance_10_long_prompts_need_no_square():
    n, tail, heads = 4096, 32, 4
    visual = torch.zeros(1, n, dtype=torch.bool)
    visual[:, 8 : n - tail] = True
    sinks = torch.arange(n)[None] % 97 == 0
    a = torch.randn(1, heads, tail, n).softmax(-1)
    with record_shapes() as seen:
        marks = mark(visual, sinks)
        mass = masses(a, marks)
        selected = image_centric(mass, visual.sum(-1, keepdim=True), 0.2, 0.5)
        redistribute(a, marks, mass, selected, 0.4)
    assert largest(seen) <= heads * tail * n
    assert largest(seen) < n * n


def test_acceptance_10_in_the_model():
    checks.no_square_tensor(EVERY, "llava")


# ---- several images, later turns ----


@torch.no_grad()
def test_text_between_images_acts_only_if_asked():
    """The row between two pictures sees the first only: the reference is a prompt cut there."""
    model, processor = tiny.shared("llava")
    a, b = tiny.picture(1), tiny.picture(2)
    image = processor.tokenizer.image_token
    texts = [f"user: {image} what is shown here ? {image} describe the image in detail ."]
    both = processor(text=texts, images=[[a, b]], return_tensors="pt")
    end = (both["input_ids"][0] == processor.tokenizer.image_token_id).nonzero().flatten()
    gap = int((end.diff() > 1).nonzero()[0]) + 1
    cut = int(end[gap])  # the second picture begins here
    first = {
        "input_ids": both["input_ids"][:, :cut],
        "attention_mask": both["attention_mask"][:, :cut],
        "pixel_values": both["pixel_values"][:1],
    }
    per_image = VAR(**{**vars(SOME), "per_image_tail": True})
    outputs = {}
    for name, method in (("tail", SOME), ("per_image", per_image)):
        with attach(model, method):
            outputs[name] = model(**both, output_hidden_states=True).hidden_states[3][0]
            outputs[name, "cut"] = model(**first, output_hidden_states=True).hidden_states[3][0]
    plain = model(**both, output_hidden_states=True).hidden_states[3][0]
    between = slice(int(end[gap - 1]) + 1, cut)
    assert torch.equal(outputs["tail"][between], plain[between])
    assert not torch.allclose(outputs["per_image"][between], plain[between], atol=1e-4)
    torch.testing.assert_close(
        outputs["per_image"][between], outputs["per_image", "cut"][between], atol=1e-5, rtol=1e-4
    )
    assert torch.equal(outputs["per_image"][: between.start], plain[: between.start])
    # One picture: rows between pictures do not exist, both settings are the same.
    torch.testing.assert_close(
        outputs["tail", "cut"], outputs["per_image", "cut"], atol=1e-6, rtol=1e-5
    )


@torch.no_grad()
def test_a_later_turn_brings_new_sinks():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    n = inputs["input_ids"].shape[1]
    more = processor.tokenizer(" user : what is shown here ?", return_tensors="pt")["input_ids"]
    with attach(model, EVERY):
        cache = model(**inputs, use_cache=True).past_key_values
        token = more[:, :1]
        model(input_ids=token, past_key_values=cache, use_cache=True)
        later = model(input_ids=more, past_key_values=cache, use_cache=True).logits[:, -1]
        kept = model._mmlm_session.states[0].layers[2]
    assert kept.seen == n + 1 + more.shape[1]
    assert kept.sinks.shape[1] == kept.seen
    assert not kept.sinks[0, n]  # a token that came alone
    assert kept.sinks[0, n + 1 :].any()
    assert torch.isfinite(later).all()


def test_padding_is_never_a_sink():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    with torch.no_grad():  # a fresh model's padding is all zero, a trained one's may be anything
        model.get_input_embeddings().weight[processor.tokenizer.pad_token_id] = 3.0
    with attach(model, VAR(**{**vars(EVERY), "tau": 1e-6})), torch.no_grad():
        model(**inputs)
        state = model._mmlm_session.states[0]
    pad = inputs["attention_mask"] == 0
    assert pad.any()
    assert not state.layers[2].sinks[pad].any()
    assert state.layers[2].sinks[~pad].all()


# ---- differs ----


def test_differs_rho_of_the_code_is_one_minus_ours():
    mass = torch.tensor([[[[0.3, 0.2, 0.0]]]])  # 40 % of the image's attention is on sinks
    n = torch.tensor([[10]])
    assert image_centric(mass, n, 0.2, 1 - 0.45).all()  # code: share <= rho = 0.45
    assert not image_centric(mass, n, 0.2, 1 - 0.35).any()


def test_differs_sinks_are_found_per_row():
    """Each row of a batch has the sinks it has alone; the authors' code pools them."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, EVERY), torch.no_grad():
        whole_pass(model, inputs)
        sinks = model._mmlm_session.states[0].layers[2].sinks
        for row, prompt in enumerate(checks.PROMPTS):
            picture = [[tiny.picture(1)], [tiny.picture(2, (90, 60))]][row]
            alone = tiny.inputs(processor, [prompt], [picture])
            whole_pass(model, alone)
            single = model._mmlm_session.states[0].layers[2].sinks[0]
            assert torch.equal(sinks[row, -len(single) :], single)


def test_differs_a_row_without_other_visual_tokens_is_left_alone():
    a = torch.tensor([[[[0.5, 0.2, 0.3]]]])
    marks = mark(torch.tensor([[True, True, False]]), torch.tensor([[True, True, False]]))
    mass = masses(a, marks)
    out = redistribute(a, marks, mass, torch.ones(1, 1, 1, dtype=torch.bool), 0.4)
    assert torch.equal(out, a)


def test_differs_a_sink_is_strictly_above_tau():
    x = torch.zeros(1, 1, 64)
    x[..., 2] = 1.0
    value, yes = float(phi(x, (2,))), torch.ones(1, 1, dtype=torch.bool)
    for tau, expected in ((value, False), (value * 0.999, True)):
        state = var._State(yes, yes, torch.ones(1, 1, dtype=torch.long), None, (2,))
        VAR(tau=tau, sink_dims=(2,)).layer_in(state, 2, x)
        assert state.layers[2].sinks.item() is expected


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"move_fraction": 1.1}, "move_fraction must be a finite number >= 0 and <= 1, got 1.1"),
        ({"min_nonsink_ratio": -0.1}, "min_nonsink_ratio must be a finite number >= 0 and <= 1"),
        ({"min_visual_mass": math.nan}, "min_visual_mass must be a finite number >= 0 and <= 1"),
        ({"tau": 0}, "tau must be a finite number > 0, got 0"),
        ({"sink_dims": ()}, "sink_dims must be a non-empty list of integers, got ()"),
        ({"sink_dims": (1, 1)}, "sink_dims must be different and >= 0, got (1, 1)"),
        ({"sink_dims": (-1,)}, "sink_dims must be different and >= 0, got (-1,)"),
        ({"sink_dims": (1.5,)}, "sink_dims must be a non-empty list of integers, got (1.5,)"),
        ({"include_last_layer": 2}, "include_last_layer must be one of True, False, got 2"),
        ({"per_image_tail": "no"}, "per_image_tail must be one of True, False, got 'no'"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VAR(**arguments)


def test_error_unknown_model_names_the_calibration():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(UnsupportedModel, match=r"mmlm calibrate sink-dims.*find_sink_dims"),
        attach(model, VAR(tau=2.0)),
    ):
        pass


def test_error_dimension_beyond_the_width():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match=r"sink_dims must be below the model's width 64, got \(64,"),
        attach(model, VAR(sink_dims=(64,), tau=2.0)),
    ):
        pass


def test_error_a_tau_that_nothing_can_exceed():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(UnsupportedModel, match=r"tau is 20, but phi never exceeds 8\.0"),
        attach(model, VAR(sink_dims=(1,))),
    ):
        pass


def test_error_right_padding_is_refused():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    inputs["attention_mask"] = inputs["attention_mask"].flip(-1)
    with attach(model, EVERY), pytest.raises(LayoutError, match="padded on the right"):
        model(**inputs)


def test_error_chunked_prefill_is_refused():
    model, processor = tiny.shared("llava")
    with attach(model, EVERY), pytest.raises(IncompatibleMethods, match="chunked prefill"):
        model.generate(**checks.batch(processor), max_new_tokens=2, prefill_chunk_size=4)


@torch.no_grad()
def test_attention_that_is_asked_for_is_the_modified_one():
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    inputs = checks.batch(processor)
    plain = model(**inputs, output_attentions=True).attentions
    with attach(model, EVERY):
        edited_ = model(**inputs, output_attentions=True).attentions
    assert torch.equal(plain[1], edited_[1])
    assert not torch.allclose(plain[2][:, :, -1], edited_[2][:, :, -1], atol=1e-3)
    torch.testing.assert_close(edited_[2][:, :, -1].sum(-1), torch.ones(2, 8), atol=1e-5, rtol=0)


def test_two_rewriting_methods_warn():
    model, _ = tiny.shared("llava")
    act = ACT(heads_by_layer=((2, (0,)),))
    with pytest.warns(UserWarning, match=r"VAR.*then ACT"), attach(model, EVERY, act):
        pass


# ---- presets and sink dimensions ----


def named(model, name, width):
    """A model's anatomy under another name and width, as a checkpoint of that name has."""
    anatomy = Anatomy(model)
    anatomy.width = width
    anatomy.config = type("Named", (), {"name_or_path": name, "get_text_config": lambda s: s})()
    return anatomy


@pytest.mark.parametrize(
    ("name", "width", "dims"),
    [
        ("llava-hf/llava-1.5-7b-hf", 4096, (1415, 2533)),
        ("lmsys/vicuna-7b-v1.5", 4096, (1415, 2533)),
        ("/models/llava-1.5-13b-hf", 5120, (2100, 4743)),
        ("meta-llama/Llama-2-13b-hf", 5120, (2100, 4743)),
        ("Qwen/Qwen2-VL-7B-Instruct", 3584, (458, 2570)),
        ("OpenGVLab/InternVL2-8B", 4096, (3584,)),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 3584, None),  # not the paper's claim
        ("llava-hf/llava-1.5-7b-hf", 64, None),  # something else under that name
        ("", 4096, None),
    ],
)
def test_known_sink_dims(name, width, dims):
    model, _ = tiny.build("llava")
    anatomy = named(model, name, width)
    assert known_sink_dims(anatomy) == dims
    if dims is None:
        with pytest.raises(ValueError, match="mmlm calibrate sink-dims"):
            VAR.for_model(anatomy)
        return
    assert VAR.for_model(anatomy) == VAR(sink_dims=dims)
    assert VAR.for_model(anatomy, "general") == VAR(sink_dims=dims, min_nonsink_ratio=0.8)
    assert VAR().unsupported(anatomy) == []


def test_a_model_is_known_by_the_name_of_its_language_model():
    model, _ = tiny.build("llava")
    anatomy = named(model, "somebody/my-llava", 4096)
    text = type("Text", (), {"name_or_path": "lmsys/vicuna-7b-v1.5"})()
    anatomy.config = type("Whole", (), {"name_or_path": "x", "get_text_config": lambda s: text})()
    assert known_sink_dims(anatomy) == (1415, 2533)


def test_presets_by_task():
    ratios = {"general": 0.8, "hallucination": 0.5, "vision_centric": 0.9}
    for task, ratio in ratios.items():
        assert VAR.for_task(task).min_nonsink_ratio == ratio
    with pytest.raises(ValueError, match="task must be one of general, hallucination"):
        VAR.for_task("captions")


def test_massive_dims_need_their_share():
    ratio = torch.ones(10, 2, 5)
    ratio[:, :, 1] = 30
    ratio[:9, :, 3] = 25
    assert massive_dims(ratio, 20, 0.9) == (1, 3)
    assert massive_dims(ratio, 20, 0.95) == (1,)
    assert massive_dims(ratio, 40) == ()


def test_find_sink_dims_finds_planted_ones():
    """A dimension made massive at the first token of every prompt, padding or not."""
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    bos = processor.tokenizer.bos_token_id
    first = inputs["attention_mask"].argmax(-1)
    inputs["input_ids"][torch.arange(2), first] = bos
    with torch.no_grad():
        model.get_input_embeddings().weight[bos, 11] = 400.0
    found = find_sink_dims(model, [inputs], tau=5.0)
    assert found.dims == (11,)
    assert found.layers == (1, 2)
    assert found.ratio.shape == (2, 2, 64)
    with pytest.raises(ValueError, match="no prompts were given"):
        find_sink_dims(model, [])
    with pytest.raises(ValueError, match="layers must be within 0 to 3"):
        find_sink_dims(model, [inputs], layers=(9,))
