"""PAI: examples by hand, a reference with full attention matrices and no cache, errors.

The numbered tests follow the list of common acceptance tests for logits methods.
"""

from __future__ import annotations

import importlib
import math
import re

import checks
import pytest
import tiny
import torch
from passes import generate_recomputed, whole_pass

from decoding.pai import PAI, boost, guidance
from mmlm import Anatomy, attach
from mmlm.engine.branches.branch import NoImage

STRONG = PAI(alpha=2.0, gamma=1.5, first_layer=1)
MODULES = {"llava": "llama", "qwen2_5_vl": "qwen2_5_vl"}


# ---- by hand ----


def test_boost_by_hand():
    # alpha 0.5: image keys 0 and 1 with scores 2 and -4 get +1 and +2, the text key nothing.
    s = torch.tensor([[[[2.0, -4.0, -4.0]]]])
    image = torch.tensor([[True, True, False]])
    assert boost(s, image, 0.5).tolist() == [[[[1.0, 2.0, 0.0]]]]


def test_guidance_by_hand():
    # p = [3/4, 1/4], p_txt = [1/2, 1/2], gamma 2: log p' = 2 log p - log p_txt
    # = log [9/16 / 1/2, 1/16 / 1/2] = log [9/8, 1/8]; log p + delta is the same.
    main, text = torch.tensor([[3.0, 1.0]]).log() + 5, torch.tensor([[1.0, 1.0]]).log() - 7
    wanted = torch.tensor([[9 / 8, 1 / 8]]).log()
    torch.testing.assert_close(main.log_softmax(-1) + guidance(main, text, 2.0), wanted)


def test_properties_of_the_guidance():
    """A row's constant changes nothing; gamma = 1 adds nothing."""
    main, text = torch.randn(2, 3, 11)
    assert not guidance(main, text, 1.0).any()
    torch.testing.assert_close(
        guidance(main + 3, text - 4, 1.7), guidance(main, text, 1.7), atol=1e-5, rtol=1e-5
    )


# ---- a naive reference: full matrices, no cache, a second pass without the image ----


class FullMatrices:
    """An attention function in the authors' manner; edits rows from ``start`` on."""

    def __init__(self, method, image, start):
        self.method, self.image, self.start, self.on = method, image, start, True

    def __call__(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        s = query @ key.transpose(-1, -2) * scaling
        layer = getattr(module, "layer_idx", None)  # the vision tower's attention has none
        if self.on and layer is not None and layer >= self.method.first_layer:
            for row in range(self.start, s.shape[2]):
                for column in range(self.image.shape[1]):
                    add = self.method.alpha * s[:, :, row, column].abs()
                    s[:, :, row, column] += torch.where(self.image[:, None, column], add, 0)
        if attention_mask is not None:
            s = s + attention_mask[..., : s.shape[-1]]
        a = s.softmax(-1, dtype=torch.float32)
        return (a @ value).transpose(1, 2).contiguous(), a


def reference(family, monkeypatch, method, inputs, model):
    """(ids) -> edited log-probabilities; ``model`` runs eager attention."""
    visual = inputs["input_ids"] == model.config.image_token_id
    start = inputs["input_ids"].shape[1] - 1
    module = f"transformers.models.{MODULES[family]}.modeling_{MODULES[family]}"
    wrappers = ("vision_start_token_id", "vision_end_token_id")
    gone = visual | torch.isin(
        inputs["input_ids"],
        torch.tensor([i for n in wrappers if (i := getattr(model.config, n, None)) is not None]),
    )
    hidden = {
        "input_ids": inputs["input_ids"].masked_fill(gone, 1),
        "attention_mask": inputs["attention_mask"] * ~gone,
    }

    def edit(ids):
        image = visual.repeat_interleave(len(ids) // len(visual), 0)
        attention = FullMatrices(method, image, start)
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module(module), "eager_attention_forward", attention)
            z = whole_pass(model, inputs, ids)
            attention.on = False
            text = whole_pass(model, inputs, ids, prompt=hidden)
        p, p_text = z.log_softmax(-1), text.log_softmax(-1)
        edited = method.gamma * (p - p_text) + p_text
        return edited.masked_fill(p < math.log(method.beta) + p.amax(-1, keepdim=True), -math.inf)

    return edit


@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_acceptance_3_and_4_equal_full_matrices_without_cache(family, beams, monkeypatch):
    model, processor = tiny.build(family)
    inputs = checks.batch(processor)
    options = {"do_sample": False, "num_beams": beams}
    plain = checks.generate(model, inputs, **options)
    with attach(model, STRONG, processor=processor):
        ours = checks.generate(model, inputs, **options)
    model.set_attn_implementation("eager")
    edit = reference(family, monkeypatch, STRONG, inputs, model)
    assert torch.equal(ours, generate_recomputed(model, inputs, edit, **options))
    assert not torch.equal(ours, plain)


@torch.no_grad()
def test_acceptance_3_logits_of_the_prompt_equal_the_reference(monkeypatch):
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with attach(model, STRONG, processor=processor):
        ours = model(**inputs, position_ids=positions).logits[:, -1]
    model.set_attn_implementation("eager")
    expected = reference("llava", monkeypatch, STRONG, inputs, model)(inputs["input_ids"])
    assert torch.equal(ours.isinf(), expected.isinf())
    kept = ours.isfinite()
    ours = ours.log_softmax(-1) + expected.logsumexp(-1, keepdim=True)  # the row's constant
    torch.testing.assert_close(ours[kept], expected[kept], atol=1e-4, rtol=1e-4)


# ---- common acceptance tests, by number ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_1_identity(family):
    checks.neutral_is_plain(PAI(), family)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
def test_acceptance_2_padded_batch_equals_single_runs(family):
    checks.batch_equals_single_rows(STRONG, family)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_5_auxiliary_rows_are_counted(family):
    checks.counted_cost(PAI(), family)
    checks.counted_cost(PAI(gamma=1.0), family)
    assert PAI(gamma=1.0).cost.token == 0


@torch.no_grad()
def test_acceptance_6_parts_compose_and_the_text_alone_is_not_boosted():
    """Boost alone gives z; boost and guidance give z + (gamma - 1) (log p - log p_txt)."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    found = {}

    class Look(PAI):
        def logits(self, state, z):
            found.update(z)
            return super().logits(state, z)

    with attach(model, PAI(alpha=2.0, gamma=1.0), processor=processor):
        boosted = checks.next_logits(model, inputs)
    with attach(model, Look(alpha=2.0, gamma=1.5, beta=0.0), processor=processor):
        both = checks.next_logits(model, inputs)
    text = found[NoImage()]
    torch.testing.assert_close(both, boosted + guidance(boosted, text, 1.5), atol=1e-5, rtol=1e-5)
    with attach(model, Look(alpha=0.0, gamma=1.5), processor=processor):
        checks.next_logits(model, inputs)
    torch.testing.assert_close(found[NoImage()], text)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_7_nothing_remains(family):
    checks.leaves_no_trace(PAI(), family)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_the_text_branch_keeps_the_chat_template_by_token_ids(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    table, built = model.get_input_embeddings().weight, []

    class Spy(PAI):
        def begin(self, prompt):
            built.append(self.branches[0].build(prompt.source))
            return super().begin(prompt)

    with attach(model, Spy(), processor=processor):
        checks.next_logits(model, inputs)
    for row, (embeds, mask) in enumerate(zip(built[0].embeds, built[0].mask, strict=True)):
        distance, ids = (embeds[mask][:, None] - table).abs().amax(-1).min(-1)
        assert not distance.any()
        spelled = processor.decode(ids).split()
        assert spelled == f"user: {checks.PROMPTS[row]} assistant:".split()


# ---- settings, differs, errors ----


@torch.no_grad()
def test_only_the_chosen_layers_are_boosted():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    anatomy = Anatomy(model)
    method = PAI(alpha=2.0, gamma=1.0, first_layer=1, last_layer=2)
    assert [layer for layer in range(4) if method.acts_in(anatomy, layer)] == [1, 2]
    assert [layer for layer in range(4) if PAI().acts_in(anatomy, layer)] == [2, 3]
    assert not any(PAI(alpha=0.0).acts_in(anatomy, layer) for layer in range(4))
    results = []
    for one in (method, PAI(alpha=2.0, gamma=1.0, first_layer=1)):
        with attach(model, one):
            results.append(checks.next_logits(model, inputs))
    assert not torch.allclose(*results, atol=1e-4)


@torch.no_grad()
def test_without_guidance_there_is_no_cut():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, PAI(gamma=1.0, beta=0.5)):
        assert checks.next_logits(model, inputs).isfinite().all()
    with attach(model, PAI(gamma=1.1, beta=0.5)):
        assert checks.next_logits(model, inputs).isinf().any()


def test_presets():
    assert (PAI.readme().alpha, PAI.readme().gamma) == (0.2, 1.1)
    assert (PAI.argparse().alpha, PAI.argparse().gamma) == (0.2, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha must be a finite number >= 0, got -0.1"),
        ({"gamma": -1.0}, "gamma must be a finite number >= 0, got -1.0"),
        ({"beta": 1.5}, "beta must be a finite number >= 0 and <= 1, got 1.5"),
        ({"first_layer": -1}, "first_layer must be an integer >= 0, got -1"),
        ({"last_layer": 1}, "last_layer must be an integer >= 2, got 1"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PAI(**arguments)


def test_a_layer_that_does_not_exist():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match="layer 9 does not exist"),
        attach(model, PAI(last_layer=9)),
    ):
        pass
