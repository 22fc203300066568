"""DoLa: hand-computed examples, an uncached reference from hidden states, settings, errors."""

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
from decoding.dola import DoLa, bucket_layers, contrast, divergence, premature
from decoding.vcd import VCD
from mmlm import attach

SETTINGS = (
    DoLa(),
    DoLa(bucket="high"),
    DoLa(candidates=(0, 1, 3)),
    DoLa(candidates=(1, 2, 3), exit_norm=False, swapped_divergence=True, strength=0.5),
)


# ---- the equations, by hand ----


def test_buckets_are_the_papers():
    assert bucket_layers(32, "low", tied=False) == (0, 2, 4, 6, 8, 10, 12, 14)
    assert bucket_layers(32, "high", tied=False) == (16, 18, 20, 22, 24, 26, 28, 30)
    assert bucket_layers(40, "low", tied=False) == tuple(range(0, 20, 2))
    assert bucket_layers(40, "high", tied=False) == tuple(range(20, 40, 2))
    assert bucket_layers(60, "low", tied=True) == tuple(range(2, 20, 2))
    assert bucket_layers(60, "high", tied=True) == tuple(range(40, 60, 2))


def test_divergence_by_hand():
    # p = (3/4, 1/4), q = (1/4, 3/4), mixture (1/2, 1/2):
    # KL(p||m) = 3/4 ln(3/2) + 1/4 ln(1/2), and the same for q by symmetry.
    # Swapped: KL(m||p) = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3).
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    js = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(p, q).item() == pytest.approx(js, rel=1e-5)
    assert divergence(p, q, swapped=True).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)


def test_divergence_is_between_zero_and_ln_2_and_symmetric():
    z = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(1)).mul(5).log_softmax(-1)
    d = divergence(z[0], z[1:])
    assert bool(((d >= 0) & (d <= math.log(2) + 1e-6)).all())
    torch.testing.assert_close(d[0], divergence(z[1], z[:1])[0])
    assert divergence(z[0], z[:1]).abs().max() < 1e-6
    far = torch.tensor([[0.0, -1e4]])
    assert divergence(far, far.flip(-1)[None]).item() == pytest.approx(math.log(2))


def test_premature_layer_of_each_row_and_of_the_batch():
    d = torch.tensor([[0.1, 0.6], [0.3, 0.2]])
    assert premature(d, torch.tensor([True, True])).tolist() == [1, 0]
    assert premature(d, torch.tensor([True, True]), whole_batch=True).tolist() == [0, 0]
    assert premature(d, torch.tensor([True, False]), whole_batch=True).tolist() == [1, 1]


def test_contrast_by_hand():
    # z = [ln 3, 0], so p = (3/4, 1/4); early (1/2, 1/2): z' = (ln 3/2, ln 1/2).
    z = torch.tensor([[math.log(3), 0.0]])
    early = torch.full((1, 2), math.log(0.5))
    expected = torch.tensor([[math.log(1.5), math.log(0.5)]])
    torch.testing.assert_close(z + contrast(z, early, 1.0), expected)
    assert contrast(z, early, 0.0).abs().max() == 0


# ---- a naive reference: whole passes that return every hidden state ----


class Layers(LogitsProcessor):
    """DoLa from the hidden states of whole passes, recomputed without a cache, row by row."""

    def __init__(self, model, inputs, method):
        self.model, self.inputs, self.method = model, inputs, method

    def row(self, b, answer):
        real = self.inputs["attention_mask"][b].bool()
        more = {"input_ids": torch.cat([self.inputs["input_ids"][b][real], answer])[None]}
        if "image_grid_thw" in self.inputs:
            sizes = self.inputs["image_grid_thw"].prod(-1).tolist()
            more["pixel_values"] = self.inputs["pixel_values"].split(sizes)[b]
            more["image_grid_thw"] = self.inputs["image_grid_thw"][b : b + 1]
            kinds = self.inputs["mm_token_type_ids"][b][real]
            more["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(answer)])[None]
        else:
            more["pixel_values"] = self.inputs["pixel_values"][b : b + 1]
        out = self.model(**more, use_cache=False, output_hidden_states=True)
        z, method = out.logits[0, -1].float(), self.method
        anatomy = mmlm.Anatomy(self.model)
        p_n, best = z.softmax(-1), None
        for layer in method.chosen_layers(anatomy):
            h = out.hidden_states[layer][0, -1]
            early = anatomy.head(anatomy.norm(h) if method.exit_norm else h).float()
            p_l = early.softmax(-1)
            m = (p_n + p_l) / 2
            if method.swapped_divergence:
                js = (m * (m / p_n).log() + m * (m / p_l).log()).sum() / 2
            else:
                js = (p_n * (p_n / m).log() + p_l * (p_l / m).log()).sum() / 2
            if best is None or js > best[0]:
                best = (js, early.log_softmax(-1))
        edited = z + method.strength * (z.log_softmax(-1) - best[1] - z)
        return edited.masked_fill(p_n < method.relative_top * p_n.max(), -math.inf)

    def __call__(self, ids, scores):
        beams = len(ids) // len(self.inputs["input_ids"])
        answers = ids[:, self.inputs["input_ids"].shape[1] :]
        rows = torch.stack([self.row(i // beams, answer) for i, answer in enumerate(answers)])
        scores = rows.log_softmax(-1)
        scores[:, 3] = -math.inf  # every sequence is asked to go on
        return scores


def reference(model, inputs, method, **options):
    processors = LogitsProcessorList([Layers(model, inputs, method)])
    return checks.generate(model, inputs, logits_processor=processors, **options)


# ---- common acceptance tests, by number ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_1_identity(family):
    checks.neutral_is_plain(DoLa(), family)


@pytest.mark.parametrize("method", SETTINGS, ids=repr)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
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


@pytest.mark.parametrize("method", SETTINGS[:3], ids=repr)
@torch.no_grad()
def test_acceptance_4_beams_equal_recomputed(method):
    model, processor = tiny.build("llava", seed=5)
    inputs = checks.batch(processor)
    with attach(model, method):
        ours = checks.generate(model, inputs, do_sample=False, num_beams=3)
    assert torch.equal(ours, reference(model, inputs, method, do_sample=False, num_beams=3))


def test_acceptance_5_no_row_is_added():
    checks.counted_cost(DoLa(), "llava")
    assert DoLa().cost.token == DoLa().cost.prompt == 0


@torch.no_grad()
def test_acceptance_6_two_methods_are_the_sum_of_their_deltas():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    a, b = DoLa(relative_top=0.0), VCD(alpha=1.0, beta=0.0)
    plain = checks.next_logits(model, inputs)
    results = []
    for methods in ((a,), (b,), (a, b)):
        with attach(model, *methods):
            results.append(checks.next_logits(model, inputs))
    torch.testing.assert_close(results[2], results[0] + results[1] - plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_7_nothing_remains(family):
    checks.leaves_no_trace(DoLa(), family)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_an_exit_after_the_last_layer_is_the_models_own_head(family):
    """Norm, head and bound of the logits as the family has them."""
    model, processor = tiny.build(family)
    model.config.get_text_config().final_logit_softcapping = 0.5
    caught = []
    handle = (
        model.get_decoder()
        .layers[-1]
        .register_forward_hook(
            lambda module, args, output: caught.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    )
    z = checks.next_logits(model, checks.batch(processor))
    handle.remove()
    torch.testing.assert_close(mmlm.Anatomy(model).exit_logits(caught[0][:, -1]), z)


# ---- differs, limits, errors ----


@torch.no_grad()
def test_one_layer_per_batch_depends_on_the_neighbours_and_ours_does_not():
    """In a batch whose rows choose different layers, the authors' switch overrides one of them."""
    found = 0
    for seed in range(6):
        model, processor = tiny.build("llava", seed=seed)
        inputs = checks.batch(processor)
        method = DoLa(candidates=(0, 1, 2, 3), relative_top=0.0)
        shared = replace(method, one_layer_per_batch=True)
        with attach(model, method):
            own = checks.next_logits(model, inputs)
        with attach(model, shared):
            common = checks.next_logits(model, inputs)
        differ = [not torch.allclose(own[b], common[b], atol=1e-4) for b in (0, 1)]
        assert sum(differ) < 2  # at least one row keeps the layer it would choose itself
        found += sum(differ)
    assert found


@pytest.mark.parametrize("name", ["exit_norm", "swapped_divergence"])
@torch.no_grad()
def test_parity_switches_change_something(name):
    model, processor = tiny.build("llava", seed=3)
    inputs = checks.batch(processor)
    method = DoLa(candidates=(0, 1, 2, 3))
    with attach(model, method):
        ours = checks.next_logits(model, inputs)
    switched = replace(method, **{name: not getattr(method, name)})
    if name == "swapped_divergence":  # changes the choice of layers, if it changes anything
        p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
        q = torch.tensor([[[0.05, 0.3, 0.15, 0.5]], [[0.69, 0.3, 0.009, 0.001]]]).log()
        assert not torch.allclose(divergence(p, q), divergence(p, q, swapped=True), atol=1e-4)
        return
    with attach(model, switched):
        assert not torch.allclose(checks.next_logits(model, inputs), ours, atol=1e-3)


def test_presets():
    model, _ = tiny.build("llava", layers=8)
    assert DoLa.for_model(mmlm.Anatomy(model)).candidates == (0, 2)
    assert DoLa.for_model(mmlm.Anatomy(model), "high").candidates == (4, 6)
    assert DoLa.long_answers() == DoLa(bucket="low")
    assert DoLa.short_answers() == DoLa(bucket="high")
    code = DoLa.authors_code()
    assert (code.exit_norm, code.swapped_divergence, code.one_layer_per_batch) == (
        False,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1}, "strength must be a finite number >= 0, got -1"),
        ({"relative_top": 1.5}, "relative_top must be a finite number >= 0 and <= 1, got 1.5"),
        ({"bucket": "middle"}, "bucket must be one of 'low', 'high', got 'middle'"),
        ({"candidates": ()}, "candidates must be a non-empty list of integers, got ()"),
        ({"candidates": (1, 1)}, "candidates must be different and >= 0, got (1, 1)"),
        ({"candidates": (-1,)}, "candidates must be different and >= 0, got (-1,)"),
        ({"candidates": (1.5,)}, "candidates must be a non-empty list of integers"),
        ({"exit_norm": "no"}, "exit_norm must be one of True, False, got 'no'"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DoLa(**arguments)


def test_a_candidate_that_does_not_exist_is_refused_when_attaching():
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match="below the number of layers, 4"):
        attach(model, DoLa(candidates=(4,))).__enter__()


def test_an_empty_bucket_is_refused_when_attaching():
    model, _ = tiny.build("llava", layers=2)
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="low bucket of a model of 2 layers is empty"):
        attach(model, DoLa()).__enter__()
