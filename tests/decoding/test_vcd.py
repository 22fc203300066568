"""VCD: hand-computed examples, uncached two-pass references, settings, errors.

The numbered tests follow the list of common acceptance tests for logits methods: identity, padding,
cache, beams, cost, composition, clean removal, Qwen2.5-VL.
"""

from __future__ import annotations

import math
import re

import checks
import pytest
import tiny
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from decoding.vcd import VCD, contrast, signal_kept
from decoding.vhr import VHR
from mmlm import attach
from mmlm.engine.combine import edit_logits
from mmlm.errors import LayoutError

SETTINGS = (VCD.pope(), VCD.sampler())


# ---- the equations, by hand ----


def test_noise_schedule_by_loop():
    """abar_500 by the authors' formula, written out as a loop."""
    kept = 1.0
    for s in range(501):
        x = -6 + 12 * s / 999
        beta = 1 / (1 + math.exp(-x)) * (0.5e-2 - 1e-5) + 1e-5
        kept *= 1 - beta
    assert signal_kept(500) == pytest.approx(kept, rel=1e-9)
    assert signal_kept(0) == pytest.approx(1, abs=1e-4)
    assert signal_kept(999) < 0.1


def test_contrast_and_cut_by_hand():
    # z = [2, 1, 0], z' = [1, 2, 0], alpha 0.5: z + 0.5 (z - z') = [2.5, 0.5, 0].
    # Cut at beta = 0.2: tokens below 2 + ln 0.2 = 0.39 under z itself: the third.
    clear, noised = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
    delta = contrast(clear, noised, 0.5)
    assert delta.tolist() == [[0.5, -0.5, 0.0]]
    edited = edit_logits(clear, delta, 0.2, torch.tensor([True]))
    assert edited.tolist() == [[2.5, 0.5, -math.inf]]
    untouched = edit_logits(clear, delta, 0.2, torch.tensor([False]))
    assert torch.equal(untouched, clear)


def test_the_cut_looks_at_the_clear_branch_not_at_the_result():
    clear = torch.tensor([[0.0, -1.0]])
    edited = edit_logits(clear, torch.tensor([[-9.0, 9.0]]), 0.5, torch.tensor([True]))
    assert edited.tolist() == [[-9.0, -math.inf]]


# ---- a naive reference: two full passes per token, no cache, own noise ----


def noised_pixels(inputs, model, method):
    """v' = sqrt(abar) v + sqrt(1 - abar) eps, written for each family's pixel layout."""
    v = inputs["pixel_values"]
    kept = signal_kept(method.noise_step)

    def eps(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(method.seed * 1009))

    if "image_grid_thw" in inputs:  # rows are patches [C, frames, p, p]; both frames are one image
        parts = []
        for t, h, w in inputs["image_grid_thw"].tolist():
            e = eps(t * h * w, 3 * 14 * 14).view(-1, 3, 1, 14, 14).repeat(1, 1, 2, 1, 1)
            parts.append(e.reshape(t * h * w, -1))
        e = torch.cat(parts)
    else:
        e = eps(*v.shape[1:])[None]
    return math.sqrt(kept) * v + math.sqrt(1 - kept) * e


def whole_pass(model, inputs, ids, pixels):
    """Raw last-position logits of a full pass over prompt and answer, left padding respected."""
    grown = ids.shape[1] - inputs["input_ids"].shape[1]
    repeat = ids.shape[0] // inputs["input_ids"].shape[0]
    mask = inputs["attention_mask"].repeat_interleave(repeat, 0)
    mask = torch.cat([mask, mask.new_ones(len(ids), grown)], dim=1)
    more = {"input_ids": ids, "attention_mask": mask}
    if "image_grid_thw" in inputs:
        counts = inputs["image_grid_thw"].prod(-1).tolist()
        parts = [p for p in pixels.split(counts) for _ in range(repeat)]
        more["pixel_values"] = torch.cat(parts)
        more["image_grid_thw"] = inputs["image_grid_thw"].repeat_interleave(repeat, 0)
        kinds = inputs["mm_token_type_ids"].repeat_interleave(repeat, 0)
        more["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(len(ids), grown)], dim=1)
    else:
        more["pixel_values"] = pixels.repeat_interleave(repeat, 0)
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(**more, use_cache=False).logits[:, -1]


class TwoPasses(LogitsProcessor):
    """VCD in the papers' manner, but recomputed without any cache at every step."""

    def __init__(self, model, inputs, method):
        self.model, self.inputs, self.method = model, inputs, method
        self.noised = noised_pixels(inputs, model, method)

    def __call__(self, ids, scores):
        z = whole_pass(self.model, self.inputs, ids, self.inputs["pixel_values"])
        z_noised = whole_pass(self.model, self.inputs, ids, self.noised)
        a, b = self.method.alpha, self.method.beta
        edited = (1 + a) * z - a * z_noised
        if b > 0:
            edited[z.softmax(-1) < b * z.softmax(-1).amax(-1, keepdim=True)] = -math.inf
        scores = edited.log_softmax(-1)
        # Every sequence is asked to go on; generate() forbids the end after the normalisation.
        scores[:, 3] = -math.inf
        return scores


def reference(model, inputs, method, **options):
    """Plain ``generate`` with the recomputing processor in it."""
    processors = LogitsProcessorList([TwoPasses(model, inputs, method)])
    return checks.generate(model, inputs, logits_processor=processors, **options)


# ---- common acceptance tests, by number ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_1_identity(family):
    checks.neutral_is_plain(VCD(), family)


@pytest.mark.parametrize("method", SETTINGS, ids=repr)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_2_padded_batch_equals_single_runs(family, method):
    checks.batch_equals_single_rows(method, family)


@pytest.mark.parametrize("method", SETTINGS, ids=repr)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_3_cached_equals_uncached(family, method):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    with attach(model, method):
        ours = checks.generate(model, inputs, do_sample=False)
    assert torch.equal(ours, reference(model, inputs, method, do_sample=False))
    assert not torch.equal(ours, checks.generate(model, inputs, do_sample=False))


def beams_equal_recomputed(method, family, seeds=(0, 1, 2)):
    """Beams with coupled caches give the tokens of beams that recompute both passes."""
    for seed in seeds:
        model, processor = tiny.build(family, seed=seed)
        inputs = checks.batch(processor)
        with attach(model, method):
            ours = checks.generate(model, inputs, do_sample=False, num_beams=3)
        assert torch.equal(ours, reference(model, inputs, method, do_sample=False, num_beams=3))


@pytest.mark.parametrize("method", SETTINGS, ids=repr)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_4_beams_with_coupled_caches_equal_recomputed(family, method):
    beams_equal_recomputed(method, family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_5_auxiliary_rows_are_counted(family):
    checks.counted_cost(VCD(), family)
    assert VCD().cost.token == 1
    assert VCD().neutral().cost.token == 0


@torch.no_grad()
def test_acceptance_6_two_methods_are_the_sum_of_their_deltas():
    """Two contrasts: deltas of the same main logits add, and the larger cut is applied once."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    a, b = VCD(alpha=1.0, beta=0.0), VCD(alpha=0.5, beta=0.0, noise_step=900)
    plain = checks.next_logits(model, inputs)
    results = []
    for methods in ((a,), (b,), (a, b)):
        with attach(model, *methods):
            results.append(checks.next_logits(model, inputs))
    expected = results[0] + results[1] - plain
    torch.testing.assert_close(results[2], expected, atol=1e-5, rtol=1e-5)
    with attach(model, a, VCD(alpha=0.5, beta=0.3, noise_step=900)):
        cut = checks.next_logits(model, inputs)
    small = plain.softmax(-1) < 0.3 * plain.softmax(-1).amax(-1, keepdim=True)
    assert torch.equal(cut == -math.inf, small)


@torch.no_grad()
def test_acceptance_6_heads_stay_off_in_the_noised_branch():
    """With VHR the main branch is reinforced and the noised branch is plain."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    method = VCD(alpha=1.0, beta=0.0)
    with attach(model, VHR()):
        main = checks.next_logits(model, inputs)
    z_noised = whole_pass(model, inputs, inputs["input_ids"], noised_pixels(inputs, model, method))
    # A plain call without position ids counts padding too, in both branches alike.
    with attach(model, VHR(), method):
        more = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        both = model(**inputs, position_ids=more).logits[:, -1]
    with attach(model, VHR()):
        main = model(**inputs, position_ids=more).logits[:, -1]
    torch.testing.assert_close(both, 2 * main - z_noised, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_7_nothing_remains(family):
    checks.leaves_no_trace(VCD(), family)


def test_equal_branches_run_once():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"].shape[0]), with_kwargs=True
    )
    with attach(model, VCD(alpha=0.3), VCD(alpha=0.7)), torch.no_grad():
        model(**inputs)
    handle.remove()
    assert seen == [2, 2]


# ---- sampling, return sequences, cache hand-back ----


@torch.no_grad()
def test_sampling_and_return_sequences_equal_the_reference():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    options = {"do_sample": True, "num_return_sequences": 2, "top_k": 0}
    torch.manual_seed(5)
    with attach(model, VCD()):
        ours = checks.generate(model, inputs, **options)
    torch.manual_seed(5)
    assert torch.equal(ours, reference(model, inputs, VCD(), **options))


@torch.no_grad()
def test_the_returned_cache_has_the_callers_rows_only():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, VCD()):
        result = model.generate(
            **inputs,
            max_new_tokens=3,
            min_new_tokens=3,
            return_dict_in_generate=True,
            output_hidden_states=True,
            output_logits=True,
        )
    cache = result.past_key_values
    assert cache.layers[0].keys.shape[0] == 2
    assert "reorder_cache" not in vars(cache)
    assert all(h.shape[0] == 2 for step in result.hidden_states for h in step)
    assert all(z.shape[0] == 2 for z in result.logits)


@torch.no_grad()
def test_output_logits_are_the_edited_ones():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, VCD()):
        edited = checks.next_logits(model, inputs)
        result = model.generate(
            **inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
        )
    assert torch.equal(result.logits[0].isinf(), edited.isinf())


# ---- differs, limits, errors ----


def test_the_seed_changes_the_noise_and_one_seed_repeats_it():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)

    def logits(seed):
        with attach(model, VCD(beta=0.0, seed=seed)):
            return checks.next_logits(model, inputs)

    assert torch.equal(logits(1), logits(1))
    assert not torch.allclose(logits(1), logits(2), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha must be a finite number >= 0, got -0.1"),
        ({"beta": 1.5}, "beta must be a finite number >= 0 and <= 1, got 1.5"),
        ({"beta": math.nan}, "beta must be a finite number >= 0 and <= 1, got nan"),
        ({"noise_step": 1000}, "noise_step must be an integer >= 0 and <= 999, got 1000"),
        ({"noise_step": 1.5}, "noise_step must be an integer >= 0 and <= 999, got 1.5"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VCD(**arguments)


@torch.no_grad()
def test_encoded_images_instead_of_pictures_are_refused():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    pixels = inputs.pop("pixel_values")
    encoded = {"image": model.get_image_features(pixels, return_dict=True)}
    with attach(model, VCD()), pytest.raises(LayoutError, match="mm_encoder_outputs"):
        model.generate(**inputs, mm_encoder_outputs=encoded, max_new_tokens=2)
    with attach(model, VCD()), pytest.raises(LayoutError, match="needs pixel_values"):
        model(**inputs, mm_encoder_outputs=encoded)


@torch.no_grad()
def test_a_tuple_output_is_refused():
    model, processor = tiny.shared("llava")
    with attach(model, VCD()), pytest.raises(LayoutError, match="returned a tuple"):
        model(**checks.batch(processor), return_dict=False)
