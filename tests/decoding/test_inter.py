"""INTER: golden vectors, an example by hand, uncached four-pass references, the spec's lists."""

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
from passes import generate_recomputed, uniform_noise, whole_pass

from decoding.inter import INTER, calibrate_k, dispersion, dividend, guidance, plausible
from decoding.m3id import M3ID
from decoding.vcd import VCD, signal_kept
from decoding.vhr import VHR
from mmlm import Anatomy, attach
from mmlm.engine.branches.branch import NoText, UniformNoise
from mmlm.engine.combine import edit_logits
from mmlm.errors import IncompatibleMethods, LayoutError

ALWAYS = INTER(k=0.0)


# ---- golden vectors ----


@pytest.mark.golden
@pytest.mark.parametrize("path", golden.golden("inter/inter_*.npz"))
def test_acceptance_1_golden_vectors(path):
    data = np.load(path)
    names = ("logits_nomask", "logits_maskimage", "logits_masktext", "logits_maskall")
    k, beta = float(data["k"]), float(data["cd_beta"])
    for step, expected in enumerate(torch.from_numpy(data["modified_logits"])):
        full, *masked = (torch.from_numpy(data[name][step]) for name in names)
        together = dividend(full, *masked)
        delta = guidance(together, dispersion(together), k, 1.0)
        ours = edit_logits(full, delta, beta, torch.ones(len(full), dtype=torch.bool))
        assert torch.equal(ours, expected)
        mask = torch.from_numpy(data["plausible_mask"][step])
        assert torch.equal(plausible(full, beta), mask)
        assert torch.equal(ours.isfinite(), mask)


# ---- by hand ----


def test_one_step_by_hand():
    # I = [4,2,0] - [1,2,0] - [2,1,0] + [1,1,0] = [2,0,0]; mean 2/3, squares 16/9 + 4/9 + 4/9
    # = 24/9, divisor 2: D = 4/3. k = 1: a key step, z' = [6,2,0].
    # beta = 0.1: tokens below 4 + ln 0.1 = 1.697 are cut: the third.
    full, noimg, notxt, none = (
        torch.tensor([row]) for row in ([4.0, 2, 0], [1.0, 2, 0], [2.0, 1, 0], [1.0, 1, 0])
    )
    together = dividend(full, noimg, notxt, none)
    assert together.tolist() == [[2, 0, 0]]
    spread = dispersion(together)
    assert spread.item() == pytest.approx(4 / 3)
    delta = guidance(together, spread, 1.0, 1.0)
    edited = edit_logits(full, delta, 0.1, torch.tensor([True]))
    assert edited.tolist() == [[6, 2, -math.inf]]
    assert guidance(together, spread, 1.4, 1.0).tolist() == [[0, 0, 0]]
    # Over the survivors [2, 0] alone: mean 1, D = 2.
    among = plausible(full, 0.1)
    assert among.tolist() == [[True, True, False]]
    assert dispersion(together, among).item() == 2
    assert dispersion(together, torch.tensor([[True, False, False]])).item() == 0


def test_the_threshold_itself_is_a_key_step():
    together = torch.tensor([[1.0, -1.0]])  # D = 2
    assert guidance(together, dispersion(together), 2.0, 1.0).tolist() == [[1, -1]]


# ---- properties ----


def test_acceptance_4_additive_logits_have_no_dividend():
    """Logits a(v) + b(p) + c: nothing needs both, so no step is a key step."""
    a, b, c = torch.randn(3, 5, 40)
    method = INTER(k=1e-9, beta=0.0)
    together = dividend(a + b + c, b + c, a + c, c)
    assert together.abs().max() <= 1e-6
    assert dispersion(together).max() <= 1e-9
    z = {"main": a + b + c, method.without_image: b + c, method.without_text: a + c}
    delta = method.logits(None, {**z, method.without_both: c})
    assert torch.equal(delta, torch.zeros_like(delta))


def test_acceptance_5_the_dividend_and_its_parts_sum_to_the_full_logits():
    full, noimg, notxt, none = torch.randn(4, 6, 50)
    rebuilt = dividend(full, noimg, notxt, none) + noimg + notxt - none
    torch.testing.assert_close(rebuilt, full, atol=1e-6, rtol=1e-6)


def test_the_dispersion_ignores_constants_and_equals_the_naive_sum():
    together = torch.randn(3, 30)
    naive = []
    for row in together.tolist():
        mean = sum(row) / 30
        naive.append(sum((x - mean) ** 2 for x in row) / 29)
    torch.testing.assert_close(dispersion(together), torch.tensor(naive))
    torch.testing.assert_close(dispersion(together + 7), dispersion(together), atol=1e-4, rtol=0)
    everything = torch.ones_like(together, dtype=torch.bool)
    torch.testing.assert_close(dispersion(together, everything), dispersion(together))


# ---- a naive reference: four full passes per token ----


def four_passes(model, processor, inputs, method, prompts=checks.PROMPTS):
    """(ids) -> edited logits, by four uncached passes; the wordless prompt is tokenised anew."""
    pictures = [[tiny.picture(1)], [tiny.picture(2, (90, 60))]][: len(prompts)]
    wordless = tiny.inputs(processor, [""] * len(prompts), pictures)
    noise = uniform_noise(inputs, method.seed)

    def edit(ids):
        full = whole_pass(model, inputs, ids)
        noimg = whole_pass(model, inputs, ids, pixels=noise)
        notxt = whole_pass(model, inputs, ids, prompt=wordless)
        none = whole_pass(model, inputs, ids, prompt=wordless, pixels=noise)
        together = full - noimg - notxt + none
        key = (together.var(-1) >= method.k)[:, None]
        edited = full + method.w * torch.where(key, together, 0)
        p = full.softmax(-1)
        return edited.masked_fill(p < method.beta * p.amax(-1, keepdim=True), -math.inf)

    return edit


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_equals_four_uncached_passes(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    edit = four_passes(model, processor, inputs, ALWAYS)
    with attach(model, ALWAYS, processor=processor):
        ours = checks.generate(model, inputs, do_sample=False)
    assert torch.equal(ours, generate_recomputed(model, inputs, edit, do_sample=False))
    assert not torch.equal(ours, checks.generate(model, inputs, do_sample=False))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_key_steps_only(family):
    """With k between the two rows' D, one row is edited and the other is plain."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    spread = measured(model, processor, inputs, INTER())[1]
    method = INTER(k=float(spread.mean()), beta=0.0)
    plain = checks.next_logits(model, inputs)
    with attach(model, method, processor=processor):
        edited = checks.next_logits(model, inputs)
    key = int(spread.argmax())
    assert not torch.equal(edited[key], plain[key])
    assert torch.equal(edited[1 - key], plain[1 - key])


def measured(model, processor, inputs, method):
    """I and D of the next token."""
    found = []

    class Look(INTER):
        def logits(self, state, z):
            found.append(self.interaction(z))

    with attach(model, Look(seed=method.seed, image_mask=method.image_mask), processor=processor):
        checks.next_logits(model, inputs)
    return found[0]


# ---- the spec's acceptance list, by number ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_2_identity(family):
    checks.neutral_is_plain(INTER(), family)


@torch.no_grad()
def test_acceptance_2_identity_of_the_scores():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    for mode in ({"num_beams": 3}, {"do_sample": True}, {}):
        torch.manual_seed(1)
        plain = model.generate(**inputs, **options, **mode)
        torch.manual_seed(1)
        with attach(model, INTER(w=0.0, beta=0.0), processor=processor):
            ours = model.generate(**inputs, **options, **mode)
        assert torch.equal(ours.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.scores, plain.scores, strict=True))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_3_no_key_step_is_greedy_as_without(family):
    """The cut never removes the likeliest token; a large finite k runs the branches for nothing."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    plain = checks.generate(model, inputs, do_sample=False)
    for k in (math.inf, 1e30):
        with attach(model, INTER(k=k), processor=processor):
            assert torch.equal(checks.generate(model, inputs, do_sample=False), plain)
            cut = checks.next_logits(model, inputs).isinf()
        assert 0 < int(cut.sum()) < cut.numel()
    assert INTER(k=math.inf).branches == ()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
@torch.no_grad()
def test_acceptance_6_four_rows_of_unequal_length_equal_four_runs(family):
    model, processor = tiny.shared(family)
    prompts = ["what ?", *checks.PROMPTS, "the quick brown fox jumps over the lazy dog ?"]
    pictures = [[tiny.picture(i, (64 + 16 * i, 64))] for i in range(4)]
    inputs = tiny.inputs(processor, prompts, pictures)
    with attach(model, ALWAYS, processor=processor):
        together = checks.generate(model, inputs, do_sample=False)
        logits = checks.next_logits(model, inputs)
        for row, prompt in enumerate(prompts):
            alone = tiny.inputs(processor, [prompt], [pictures[row]])
            single = checks.next_logits(model, alone)[0]
            torch.testing.assert_close(single, logits[row], atol=1e-4, rtol=1e-4)
            assert torch.equal(checks.generate(model, alone, do_sample=False)[0], together[row])


def beams_equal_recomputed(method, family, seeds=(0, 1, 2)):
    """Beams with coupled caches give the tokens of beams that recompute all four passes."""
    for seed in seeds:
        model, processor = tiny.build(family, seed=seed)
        inputs = checks.batch(processor)
        edit = four_passes(model, processor, inputs, method)
        with attach(model, method, processor=processor):
            ours = checks.generate(model, inputs, do_sample=False, num_beams=3)
        expected = generate_recomputed(model, inputs, edit, do_sample=False, num_beams=3)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_7_beams_with_coupled_caches_equal_recomputed(family):
    beams_equal_recomputed(ALWAYS, family)


def counted(model, inputs, **options):
    """Calls of vision tower and decoder, and rows per decoder call, while generating."""
    calls, rows = Counter(), []
    tower = next(
        getattr(model.model, name)
        for name in ("vision_tower", "visual")
        if hasattr(model.model, name)
    )
    handles = [
        tower.register_forward_pre_hook(lambda m, a: calls.update(["tower"])),
        model.get_decoder().register_forward_pre_hook(
            lambda m, a, k: rows.append(k["inputs_embeds"].shape[0]), with_kwargs=True
        ),
    ]
    checks.generate(model, inputs, do_sample=False, **options)
    for handle in handles:
        handle.remove()
    return calls["tower"], rows


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("mask", "towers"),
    [("uniform_noise", 2), ("zeros", 2), ("mean", 2), ("columns", 1), ("drop", 1)],
)
@torch.no_grad()
def test_acceptance_8_passes_are_counted(family, mask, towers):
    """One forward pass per step in all: the three branches ride with the main rows."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    method = INTER(image_mask=mask)
    with attach(model, method, processor=processor):
        tower, rows = counted(model, inputs)
    assert tower == towers
    main, *rest = rows
    prefill = rest[: -(checks.NEW - 1)]
    assert main == 2
    assert sum(prefill) == 2 * method.cost.prompt == 6
    assert (
        len(prefill) == {"uniform_noise": 2, "zeros": 2, "mean": 2, "columns": 2, "drop": 3}[mask]
    )
    assert rest[-(checks.NEW - 1) :] == [2 * (1 + method.cost.token)] * (checks.NEW - 1)


@torch.no_grad()
def test_acceptance_8_one_auxiliary_pass_per_step_with_another_kind_of_cache():
    """Where the rows cannot be laid into the main cache, all three still are one batch."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, INTER(), processor=processor):
        _, rows = counted(model, inputs, cache_implementation="static", disable_compile=True)
    steps = rows[-2 * (checks.NEW - 1) :]
    assert steps == [2, 6] * (checks.NEW - 1)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
@torch.no_grad()
def test_acceptance_9_noise_repeats_with_its_seed_and_differs_between_rows(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)

    def painted(seed):
        branch, grid = UniformNoise(seed=seed), inputs.get("image_grid_thw")
        return branch.repaint(Anatomy(model), inputs["pixel_values"], grid)

    noise = painted(1)
    assert torch.equal(noise, painted(1))
    assert not torch.equal(noise, painted(2))
    assert 0 <= float(noise.min()) < float(noise.max()) < 1
    n = int(inputs["image_grid_thw"][0].prod()) if "image_grid_thw" in inputs else 1
    first, second = noise[:n].flatten(), noise[n:].flatten()
    shorter = min(len(first), len(second))
    assert not torch.equal(first[:shorter], second[:shorter])


@torch.no_grad()
def test_acceptance_9_a_rows_noise_does_not_depend_on_its_batch():
    """LLaVA-NeXT pads pictures with few tiles; the padding stays zero and draws nothing."""
    model, processor = tiny.shared("llava_next")
    wide = tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(1)], [tiny.picture(2, (120, 60))]])
    alone = tiny.inputs(processor, checks.PROMPTS[1:], [[tiny.picture(2, (120, 60))]])
    anatomy = Anatomy(model)
    batch = UniformNoise(seed=3).repaint(anatomy, wide["pixel_values"], None)[1]
    single = UniformNoise(seed=3).repaint(anatomy, alone["pixel_values"], None)[0]
    assert torch.equal(batch[: len(single)], single)
    assert not batch[len(single) :].any()


@pytest.mark.parametrize("other", [VHR(), "PAI(gamma=1.0, alpha=3.0)"], ids=str)
@torch.no_grad()
def test_acceptance_10_branches_do_not_feel_other_methods(other):
    """Head outputs and logits of the auxiliary rows are those of INTER alone."""
    import mmlm

    other = mmlm.parse_method(other) if isinstance(other, str) else other
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    method = INTER(k=0.0)

    def heads(*methods):
        found = []
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda m, args: found.append(args[0].clone())
            )
            for layer in model.get_decoder().layers
        ]
        with attach(model, *methods, processor=processor):
            # The same tokens whatever the methods say, so that the branches' inputs are the same.
            model.generate(
                **inputs, max_new_tokens=3, prefix_allowed_tokens_fn=lambda row, ids: [7]
            )
        for handle in handles:
            handle.remove()
        passes = [
            torch.stack([x[:, -1] for x in found[i : i + 4]]) for i in range(0, len(found), 4)
        ]
        steps = [x for x in passes if x.shape[1] == 8]  # four layers, two main rows and six below
        prefill = passes[: -len(steps)]
        while sum(x.shape[1] for x in prefill) > 6:  # the main prefill and what came before it
            prefill = prefill[1:]
        return [torch.cat(prefill, dim=1), *(x[:, 2:] for x in steps)], steps[0][:, :2]

    alone, plain_main = heads(method)
    together, main = heads(other, method)
    assert len(alone) == 3
    for a, b in zip(alone, together, strict=True):
        assert a.shape[1] == 6
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(main, plain_main, atol=1e-4)


# ---- the prompts, by token ids ----


def texts_of(model, processor, inputs, branch):
    """Each row's token ids in a branch's prompt, found again by their embeddings."""
    table = model.get_input_embeddings().weight
    source = {}

    class Spy(M3ID):
        def begin(self, prompt):
            source["it"] = prompt.source
            return super().begin(prompt)

    with attach(model, Spy(), processor=processor):
        checks.next_logits(model, inputs)
    prompt = branch.build(source["it"])
    rows = []
    for embeds, mask in zip(prompt.embeds, prompt.mask, strict=True):
        distance, ids = (embeds[mask][:, None] - table).abs().amax(-1).min(-1)
        rows.append(ids.masked_fill(distance > 0, -1))  # -1: an image feature
    return rows


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_masked_prompts_keep_the_chat_template_by_token_ids(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    ids = inputs["input_ids"]
    pictures = [[tiny.picture(1)], [tiny.picture(2, (90, 60))]]
    wordless = tiny.inputs(processor, ["", ""], pictures)
    image = model.config.image_token_id
    dropped = INTER(image_mask="drop")
    for row in range(2):
        real = wordless["attention_mask"][row].bool()
        expected = wordless["input_ids"][row][real]
        got = texts_of(model, processor, inputs, dropped.without_text)[row]
        assert torch.equal(got.masked_fill(got == -1, image), expected)
        template = texts_of(model, processor, inputs, dropped.without_both)[row]
        assert processor.decode(template).split() == ["user:", "assistant:"]
        text = texts_of(model, processor, inputs, dropped.without_image)[row]
        assert processor.decode(text).split() == f"user: {checks.PROMPTS[row]} assistant:".split()
    noisy = texts_of(model, processor, inputs, INTER().without_image)
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        assert torch.equal(noisy[row].masked_fill(noisy[row] == -1, image), ids[row][real])


@torch.no_grad()
def test_masked_columns_keep_their_positions_and_nobody_looks_at_them():
    """ "columns" is the main prompt under an attention mask with holes, positions as they were."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    seen = mask * (ids != model.config.image_token_id)
    expected = model(
        input_ids=ids.masked_fill(ids == model.config.image_token_id, 5),
        attention_mask=seen,
        position_ids=positions,
    ).logits[:, -1]
    found = {}

    class Look(INTER):
        def logits(self, state, z):
            found.update(z)

    method = Look(image_mask="columns")
    with attach(model, method, processor=processor):
        model(**inputs, position_ids=positions)
    torch.testing.assert_close(found[method.without_image], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_words_of_earlier_turns_are_masked_too():
    model, processor = tiny.shared("llava")
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat ."}]},
        {"role": "user", "content": [{"type": "text", "text": "is it red ?"}]},
    ]
    text = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    inputs = dict(processor(text=[text], images=[tiny.picture(1)], return_tensors="pt"))
    (got,) = texts_of(model, processor, inputs, NoText())
    words = processor.decode(got[got >= 0]).split()
    assert words == ["user:", "assistant:", "a", "cat", ".", "user:", "assistant:"]


def video_inputs(processor, words):
    """One prompt with a video of four frames."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 56, 56, 3), dtype=np.uint8)
    text = f"user: <|vision_start|><|video_pad|><|vision_end|>{words} assistant:"
    options = {"do_sample_frames": False, "cap_pixels_per_frame": False}
    batch = processor(text=[text], videos=[frames], videos_kwargs=options, return_tensors="pt")
    return dict(batch)


@pytest.mark.parametrize("mask", ["columns", "drop"])
@torch.no_grad()
def test_videos_keep_their_features_and_three_axis_positions(mask):
    """Without the question: what the model says about a video prompt that has no words."""
    model, processor = tiny.shared("qwen2_5_vl")
    expected = checks.next_logits(model, video_inputs(processor, ""))
    found = {}

    class Look(INTER):
        def logits(self, state, z):
            found.update(z)

    method = Look(image_mask=mask)
    with attach(model, method, processor=processor):
        checks.generate(model, video_inputs(processor, "what is shown here ?"), do_sample=False)
        first = dict(found)
        checks.next_logits(model, video_inputs(processor, "what is shown here ?"))
    assert set(first) == {"main", *method.branches}
    torch.testing.assert_close(found[method.without_text], expected, atol=1e-4, rtol=1e-4)


def test_masks_of_pixels_refuse_videos():
    model, processor = tiny.shared("qwen2_5_vl")
    with (
        attach(model, INTER(), processor=processor),
        pytest.raises(LayoutError, match="works on pictures"),
    ):
        model(**video_inputs(processor, "what is shown here ?"))


# ---- the error table ----


def test_error_1_no_image_in_some_row():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(1)], []])
    with (
        attach(model, INTER(), processor=processor),
        pytest.raises(LayoutError, match="there is none in row 1") as caught,
    ):
        model(**inputs)
    assert isinstance(caught.value, ValueError)
    assert "allow_text_only=True" in caught.value.advice
    checks.image_free_row_is_unchanged(INTER(k=0.0, allow_text_only=True), "llava")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": -1.0}, "k must be a finite number >= 0, got -1.0"),
        ({"k": math.nan}, "k must be a finite number >= 0, got nan"),
        ({"beta": 1.1}, "beta must be a finite number >= 0 and <= 1, got 1.1"),
        ({"beta": -0.1}, "beta must be a finite number >= 0 and <= 1, got -0.1"),
        ({"w": math.inf}, "w must be a finite number >= 0, got inf"),
        ({"image_mask": "blur"}, "image_mask must be one of 'uniform_noise', 'zeros'"),
        ({"scope": "all"}, "scope must be one of 'vocabulary', 'plausible', got 'all'"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"allow_text_only": "yes"}, "allow_text_only must be one of True, False, got 'yes'"),
    ],
)
def test_error_2_parameters_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        INTER(**arguments)


def _logits(method, **changed):
    keys = ("main", *method.branches)
    z = {key: torch.zeros(2, 7) for key in keys}
    return {**z, **{keys[int(name[1:])]: value for name, value in changed.items()}}


def test_error_3_another_vocabulary():
    method = INTER()
    z = _logits(method, z2=torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match=re.escape("gave logits (2, 8), the main one (2, 7)")):
        INTER.interaction(method, z)


@torch.no_grad()
def test_error_4_no_cache():
    model, processor = tiny.shared("llava")
    with (
        attach(model, INTER(), processor=processor),
        pytest.raises(IncompatibleMethods, match="use_cache=False"),
    ):
        model.generate(**checks.batch(processor), max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["z0", "z3"])
def test_error_5_numbers_that_are_not_finite(bad, where):
    method = INTER()
    z = _logits(method, **{where: torch.full((2, 7), bad)})
    with pytest.raises(RuntimeError, match="not finite"):
        method.logits(None, z)


@torch.no_grad()
def test_error_6_beams_couple_the_caches_by_themselves():
    """Nothing has to be passed; what the user passes filled is refused."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    filled = model(**inputs, use_cache=True).past_key_values
    with attach(model, INTER(), processor=processor):
        checks.generate(model, inputs, do_sample=False, num_beams=3)
        with pytest.raises(IncompatibleMethods, match="filled before"):
            model.generate(**inputs, max_new_tokens=2, past_key_values=filled)
        with pytest.raises(IncompatibleMethods, match="assisted decoding"):
            model.generate(**inputs, max_new_tokens=2, assistant_model=model)


@torch.no_grad()
def test_error_7_a_second_prompt_starts_afresh():
    model, processor = tiny.shared("llava")
    first = checks.batch(processor)
    second = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(7)]])
    with attach(model, ALWAYS, processor=processor):
        expected = checks.generate(model, second, do_sample=False)
    with attach(model, ALWAYS, processor=processor):
        checks.generate(model, first, do_sample=False)
        assert torch.equal(checks.generate(model, second, do_sample=False), expected)


@torch.no_grad()
def test_error_no_processor_and_a_prompt_of_another_template():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    with attach(model, INTER()), pytest.raises(LayoutError, match="no processor is known"):
        model(**inputs)
    image = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    strange = dict(
        processor(text=[f"Q: {image} what ? A:"], images=[tiny.picture(1)], return_tensors="pt")
    )
    with (
        attach(model, INTER(), processor=processor),
        pytest.raises(LayoutError, match="was not written by the chat template"),
    ):
        model(**strange)


# ---- differs, parameters ----


@torch.no_grad()
def test_every_image_mask_gives_another_result_and_runs_with_beams():
    model, processor = tiny.shared("qwen2_5_vl")
    inputs = checks.batch(processor)
    found = []
    for mask in ("uniform_noise", "zeros", "mean", "columns", "drop"):
        with attach(model, INTER(k=0.0, beta=0.0, image_mask=mask), processor=processor):
            found.append(checks.next_logits(model, inputs))
            checks.generate(model, inputs, do_sample=False, num_beams=2)
    for i, one in enumerate(found):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in found[:i])


@pytest.mark.parametrize("mask", ["zeros", "mean", "columns", "drop"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
def test_every_image_mask_is_right_with_padding_and_caches(family, mask):
    method = INTER(k=0.0, image_mask=mask)
    checks.batch_equals_single_rows(method, family)
    checks.cache_paths_agree(method, family)
    checks.beams_equal_static_beams(method, family)


@torch.no_grad()
def test_differs_dispersion_is_the_same_in_beam_search():
    """The engine hands raw logits in every mode: the first D of a beam equals greedy's."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)

    def first(**options):
        found = []

        class Look(INTER):
            def logits(self, state, z):
                found.append(self.interaction(z)[1])

        with attach(model, Look(), processor=processor):
            checks.generate(model, inputs, **options)
        return found[0]

    greedy = first(do_sample=False)
    beams = first(do_sample=False, num_beams=3)
    torch.testing.assert_close(beams, greedy.repeat_interleave(3), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_plausible_scope_decides_by_the_survivors():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    together, over_all = measured(model, processor, inputs, INTER())
    among = plausible(checks.next_logits(model, inputs), 0.1)
    survivors = dispersion(together, among)
    low, high = sorted([float(over_all[0]), float(survivors[0])])
    k = (low + high) / 2
    plain = checks.next_logits(model, inputs)[0]
    with attach(model, INTER(k=k, scope="vocabulary"), processor=processor):
        whole = checks.next_logits(model, inputs)[0]
    with attach(model, INTER(k=k, scope="plausible"), processor=processor):
        narrow = checks.next_logits(model, inputs)[0]
    edited, left = (whole, narrow) if over_all[0] > survivors[0] else (narrow, whole)
    kept = left.isfinite()
    assert torch.equal(left[kept], plain[kept])
    assert not torch.equal(edited[kept], plain[kept])


# ---- calibration ----


@torch.no_grad()
def test_calibration_is_the_quantile_of_the_dispersion_over_greedy_steps():
    model, processor = tiny.shared("llava")
    batches = [
        checks.batch(processor),
        tiny.inputs(processor, ["what ?"], [[tiny.picture(5)]]),
    ]
    naive = []
    for batch, prompts, pictures in (
        (batches[0], checks.PROMPTS, [[tiny.picture(1)], [tiny.picture(2, (90, 60))]]),
        (batches[1], ["what ?"], [[tiny.picture(5)]]),
    ):
        wordless = tiny.inputs(processor, [""] * len(prompts), pictures)
        noise, ids = uniform_noise(batch, 0), batch["input_ids"]
        over = torch.zeros(len(ids), dtype=torch.bool)
        for _ in range(8):
            full = whole_pass(model, batch, ids)
            together = (
                full
                - whole_pass(model, batch, ids, pixels=noise)
                - whole_pass(model, batch, ids, prompt=wordless)
                + whole_pass(model, batch, ids, prompt=wordless, pixels=noise)
            )
            naive.append(together.var(-1)[~over])
            token = full.argmax(-1).masked_fill(over, 1)
            ids = torch.cat([ids, token[:, None]], dim=1)
            over = over | (token == 3)
    naive = torch.cat(naive)
    for quantile in (0.0, 0.5, 0.9):
        k = calibrate_k(model, batches, quantile, processor=processor, max_new_tokens=8)
        assert k == pytest.approx(float(naive.quantile(quantile)), rel=1e-3)


def test_calibration_counts_no_step_behind_an_answers_end():
    from decoding.inter import _counts

    class Model:
        class generation_config:
            eos_token_id = [3, 9]

    answers = torch.tensor([[5, 3, 1, 1], [5, 6, 7, 9], [5, 6, 7, 8]])
    assert _counts(answers, Model).tolist() == [
        [True, True, False, False],
        [True, True, True, True],
        [True, True, True, True],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": [], "quantile": 0.5}, "no inputs were given"),
        ({"inputs": [{}], "quantile": 1.5}, "quantile must be >= 0 and <= 1, got 1.5"),
    ],
)
def test_calibration_errors(arguments, message):
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match=re.escape(message)):
        calibrate_k(model, **arguments)


# ---- composition ----


@torch.no_grad()
def test_three_methods_are_the_sum_of_their_deltas_under_one_cut():
    """INTER + M3ID + VCD against five uncached passes; five rows, equal branches once."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    inter, vcd = INTER(k=0.0, beta=0.1), VCD(alpha=0.5, beta=0.2, noise_step=500)
    m3id = M3ID(decay=0.3, first_step=1, beta=0.05)
    pictures = [[tiny.picture(1)], [tiny.picture(2, (90, 60))]]
    wordless = tiny.inputs(processor, ["", ""], pictures)
    noise = uniform_noise(inputs, inter.seed)
    kept = signal_kept(500)
    generator = torch.Generator().manual_seed(vcd.seed * 1009)
    eps = torch.randn(inputs["pixel_values"].shape[1:], generator=generator)
    noised = math.sqrt(kept) * inputs["pixel_values"] + math.sqrt(1 - kept) * eps
    is_image = inputs["input_ids"] == model.config.image_token_id
    hidden = {  # without the image, as padding in the middle: the same as closing up
        "input_ids": inputs["input_ids"].masked_fill(is_image, 1),
        "attention_mask": inputs["attention_mask"] * ~is_image,
    }
    start = inputs["input_ids"].shape[1]

    def edit(ids):
        z = whole_pass(model, inputs, ids)
        together = (
            z
            - whole_pass(model, inputs, ids, pixels=noise)
            - whole_pass(model, inputs, ids, prompt=wordless)
            + whole_pass(model, inputs, ids, prompt=wordless, pixels=noise)
        )
        blurred = 0.5 * (z - whole_pass(model, inputs, ids, pixels=noised))
        factor = math.exp(0.3 * (1 + ids.shape[1] - start)) - 1
        blind = factor * (z - whole_pass(model, inputs, ids, prompt=hidden))
        p = z.softmax(-1)
        return (z + together + blurred + blind).masked_fill(
            p < 0.2 * p.amax(-1, keepdim=True), -math.inf
        )

    with attach(model, inter, m3id, vcd, processor=processor):
        ours = checks.generate(model, inputs, do_sample=False)
        tower, rows = counted(model, inputs)
    assert torch.equal(ours, generate_recomputed(model, inputs, edit, do_sample=False))
    assert tower == 3  # clear, uniform noise, diffusion noise
    assert sum(rows[: -(checks.NEW - 1)]) == 2 * 6
    assert rows[-(checks.NEW - 1) :] == [2 * 6] * (checks.NEW - 1)
    with attach(model, INTER(image_mask="drop"), m3id, vcd, processor=processor):
        tower, rows = counted(model, inputs)
    assert tower == 2
    assert rows[-1] == 2 * 5  # M3ID's prompt without image is INTER's too
