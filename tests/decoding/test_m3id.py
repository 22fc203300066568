"""M3ID: an example by hand, uncached two-pass references, both re-implementations, errors.

The numbered tests follow the list of common acceptance tests for logits methods.
"""

from __future__ import annotations

import math
import re

import checks
import pytest
import tiny
import torch
from passes import generate_recomputed, whole_pass

from decoding.m3id import M3ID, confident, contrast, weight
from decoding.vhr import VHR
from mmlm import attach
from mmlm.engine.branches.branch import NoImage
from mmlm.errors import LayoutError

FAST = M3ID(decay=0.3, first_step=1)
GATED = M3ID(decay=0.3, first_step=1, gate=0.3, beta=0.0)


# ---- by hand ----


def test_weight_by_hand():
    # g_t = exp(-0.02 t): t = 0: (1 - 1) / 1 = 0; t = 50: e^1 - 1.
    assert weight(0, 0.02) == 0
    assert weight(50, 0.02) == pytest.approx(math.e - 1)
    g = math.exp(-0.02 * 7)
    assert weight(7, 0.02) == pytest.approx((1 - g) / g, rel=1e-12)
    assert weight(1, 1e-12) == pytest.approx(1e-12)  # expm1: no digits lost


def test_weight_stays_a_number():
    assert math.isfinite(float(torch.tensor(weight(10**6, 0.5)) * 100))


def test_contrast_and_gate_by_hand():
    # z = [2, 0], z_noimg = [1, 1], factor e - 1: delta = (e - 1) [1, -1].
    # p(first) = 1 / (1 + e^-2) = 0.88: confident at 0.8, not at 0.9.
    main, without = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    factor = weight(50, 0.02)
    expected = torch.tensor([[factor, -factor]])
    torch.testing.assert_close(contrast(main, without, factor), expected)
    assert confident(main, 0.8).tolist() == [[True]]
    assert confident(main, 0.9).tolist() == [[False]]


def test_properties_of_the_delta():
    """Linear in the factor, and no row's constant changes what it does to other rows."""
    main, without = torch.randn(2, 4, 9)
    torch.testing.assert_close(
        contrast(main, without, 3.0), 3 * contrast(main, without, 1.0), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(contrast(main, main, 2.0), torch.zeros_like(main))


# ---- a naive reference ----


def imageless(model, inputs):
    """The same prompt with its image hidden as padding in the middle: the same as closing up."""
    config = model.config
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    gone = torch.isin(
        inputs["input_ids"],
        torch.tensor([i for name in names if (i := getattr(config, name, None)) is not None]),
    )
    return {
        "input_ids": inputs["input_ids"].masked_fill(gone, 1),
        "attention_mask": inputs["attention_mask"] * ~gone,
    }


def two_passes(model, inputs, method):
    """(ids) -> edited logits, both passes without any cache."""
    start, hidden = inputs["input_ids"].shape[1], imageless(model, inputs)

    def edit(ids):
        z = whole_pass(model, inputs, ids)
        blind = whole_pass(model, inputs, ids, prompt=hidden)
        t = method.first_step + ids.shape[1] - start
        g = math.exp(-method.decay * t)
        delta = (1 - g) / g * (z - blind)
        p = z.softmax(-1)
        top = p.amax(-1, keepdim=True)
        if method.gate is not None:
            delta = torch.where(top < method.gate, delta, 0)
        return (z + delta).masked_fill(p < method.beta * top, -math.inf)

    return edit


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_1_identity(family):
    checks.neutral_is_plain(M3ID(), family)


@pytest.mark.parametrize("method", [FAST, GATED], ids=["only", "gated"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
def test_acceptance_2_padded_batch_equals_single_runs(family, method):
    checks.batch_equals_single_rows(method, family)


@pytest.mark.parametrize("method", [FAST, GATED], ids=["only", "gated"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_3_cached_equals_uncached(family, method):
    """With a gate the auxiliary cache advances also at steps that are left alone."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    with attach(model, method, processor=processor):
        ours = checks.generate(model, inputs, do_sample=False)
    edit = two_passes(model, inputs, method)
    assert torch.equal(ours, generate_recomputed(model, inputs, edit, do_sample=False))
    assert not torch.equal(ours, checks.generate(model, inputs, do_sample=False))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_4_beams_with_coupled_caches_equal_recomputed(family):
    for seed in range(3):
        model, processor = tiny.build(family, seed=seed)
        inputs = checks.batch(processor)
        with attach(model, FAST, processor=processor):
            ours = checks.generate(model, inputs, do_sample=False, num_beams=3)
        edit = two_passes(model, inputs, FAST)
        expected = generate_recomputed(model, inputs, edit, do_sample=False, num_beams=3)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_5_auxiliary_rows_are_counted(family):
    checks.counted_cost(M3ID(), family)
    assert (M3ID().cost.prompt, M3ID().cost.token) == (1, 1)
    assert M3ID().neutral().cost.token == 0


@torch.no_grad()
def test_acceptance_6_heads_stay_off_without_the_image():
    """With VHR the main logits are reinforced and the prompt without its image is plain."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    method = M3ID(decay=0.5, first_step=1, beta=0.0)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def last(*methods):
        with attach(model, *methods, processor=processor):
            return model(**inputs, position_ids=positions).logits[:, -1]

    main = last(VHR())
    blind = whole_pass(model, inputs, inputs["input_ids"], prompt=imageless(model, inputs))
    expected = main + math.expm1(0.5) * (main - blind)
    torch.testing.assert_close(last(VHR(), method), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_7_nothing_remains(family):
    checks.leaves_no_trace(FAST, family)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_the_prompt_without_image_keeps_the_chat_template_by_token_ids(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    table, built = model.get_input_embeddings().weight, []

    class Spy(M3ID):
        def begin(self, prompt):
            built.append(NoImage().build(prompt.source))
            return super().begin(prompt)

    with attach(model, Spy(), processor=processor):
        checks.next_logits(model, inputs)
    hidden = imageless(model, inputs)
    for row, (embeds, mask) in enumerate(zip(built[0].embeds, built[0].mask, strict=True)):
        distance, ids = (embeds[mask][:, None] - table).abs().amax(-1).min(-1)
        assert not distance.any()
        assert torch.equal(ids, hidden["input_ids"][row][hidden["attention_mask"][row].bool()])
        spelled = processor.decode(ids).split()
        assert spelled == f"user: {checks.PROMPTS[row]} assistant:".split()


# ---- differs: the two re-implementations ----


@torch.no_grad()
def test_only_leaves_the_first_token_alone_and_mitigv_does_not():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    with attach(model, M3ID.only(), processor=processor):
        first = checks.next_logits(model, inputs)
    kept = first.isfinite()
    assert torch.equal(first[kept], plain[kept])
    assert not kept.all()
    with attach(model, M3ID.mitigv(), processor=processor):
        edited = checks.next_logits(model, inputs)
    assert edited.isfinite().all()
    assert not torch.equal(edited, plain)


@torch.no_grad()
def test_the_gate_is_per_row():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    top = plain.softmax(-1).amax(-1)
    gate = float(top.mean())
    with attach(model, M3ID(first_step=1, gate=gate, beta=0.0), processor=processor):
        edited = checks.next_logits(model, inputs)
    sure = int(top.argmax())
    assert torch.equal(edited[sure], plain[sure])
    assert not torch.equal(edited[1 - sure], plain[1 - sure])


@torch.no_grad()
def test_a_second_prompt_counts_from_the_start():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, FAST, processor=processor):
        first = checks.generate(model, inputs, do_sample=False)
        assert torch.equal(checks.generate(model, inputs, do_sample=False), first)


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": -0.1}, "decay must be a finite number >= 0, got -0.1"),
        ({"gate": 0.0}, "gate must be a finite number > 0 and <= 1, got 0.0"),
        ({"gate": 1.5}, "gate must be a finite number > 0 and <= 1, got 1.5"),
        ({"first_step": -1}, "first_step must be an integer >= 0, got -1"),
        ({"beta": 2.0}, "beta must be a finite number >= 0 and <= 1, got 2.0"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        M3ID(**arguments)


def test_a_prompt_of_nothing_but_an_image():
    model, processor = tiny.shared("llava")
    image = model.config.image_token_id
    ids = torch.full((1, 16), image)
    pixels = checks.batch(processor)["pixel_values"][:1]
    with attach(model, M3ID()), pytest.raises(LayoutError, match="nothing but images"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
