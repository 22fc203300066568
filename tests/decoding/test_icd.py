"""ICD: an example by hand, uncached references with freshly tokenised prompts, errors.

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

from decoding.icd import CONFUSED, ICD, contrast
from decoding.vhr import VHR
from mmlm import attach
from mmlm.errors import LayoutError
from mmlm.inputs import message

PICTURES = [[tiny.picture(1)], [tiny.picture(2, (90, 60))]]


# ---- by hand ----


def test_contrast_by_hand():
    # z = [2, 1], z_dist = [1, 3], alpha 0.5: (1.5 z - 0.5 z_dist) - z = [0.5, -1].
    main, disturbed = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 3.0]])
    assert contrast(main, disturbed, 0.5).tolist() == [[0.5, -1.0]]
    assert contrast(main, disturbed, 0.5, form="paper").tolist() == [[-0.5, -1.5]]


def test_properties_of_the_contrast():
    """Nothing to contrast, nothing added; the two forms differ by alpha z."""
    main, disturbed = torch.randn(2, 3, 8)
    assert not contrast(main, main, 1.0).any()
    difference = contrast(main, disturbed, 0.7) - contrast(main, disturbed, 0.7, form="paper")
    torch.testing.assert_close(difference, 0.7 * main, atol=1e-5, rtol=1e-5)


# ---- a naive reference: the disturbed prompt is rendered and tokenised anew ----


def rendered(processor, conversations):
    texts = [
        processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        for talk in conversations
    ]
    pictures = [p for own in PICTURES for p in own]
    batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    return dict(batch)


def disturbed_prompt(processor, place, prefix=CONFUSED):
    """Inputs with the instruction as system message, or on a line before the question."""
    if place == "system":
        return rendered(
            processor,
            [[message("system", prefix), message("user", p, 1)] for p in checks.PROMPTS],
        )
    return rendered(processor, [[message("user", f"{prefix}\n{p}", 1)] for p in checks.PROMPTS])


def two_passes(model, inputs, other, method):
    def edit(ids):
        z = whole_pass(model, inputs, ids)
        z_dist = whole_pass(model, inputs, ids, prompt=other)
        a = method.alpha
        edited = (1 + a) * z - a * z_dist if method.form == "code" else z - a * z_dist
        p = z.softmax(-1)
        return edited.masked_fill(p < method.beta * p.amax(-1, keepdim=True), -math.inf)

    return edit


@pytest.mark.parametrize("place", ["system", "question"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_3_cached_equals_uncached(family, place):
    model, processor = tiny.shared(family)
    inputs, other = checks.batch(processor), disturbed_prompt(processor, place)
    for method in (ICD(place=place), ICD(place=place, form="paper", alpha=0.5, beta=0.0)):
        with attach(model, method, processor=processor):
            ours = checks.generate(model, inputs, do_sample=False)
        edit = two_passes(model, inputs, other, method)
        assert torch.equal(ours, generate_recomputed(model, inputs, edit, do_sample=False))
        assert not torch.equal(ours, checks.generate(model, inputs, do_sample=False))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_4_beams_with_coupled_caches_equal_recomputed(family):
    for seed in range(3):
        model, processor = tiny.build(family, seed=seed)
        inputs, other = checks.batch(processor), disturbed_prompt(processor, "system")
        # An uncached pass takes an image token in an answer for one more image.
        options = {"num_beams": 3, "suppress_tokens": [model.config.image_token_id]}
        with attach(model, ICD(), processor=processor):
            ours = checks.generate(model, inputs, do_sample=False, **options)
        edit = two_passes(model, inputs, other, ICD())
        expected = generate_recomputed(model, inputs, edit, do_sample=False, **options)
        assert torch.equal(ours, expected)


# ---- common acceptance tests, by number ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_1_identity(family):
    checks.neutral_is_plain(ICD(), family)


@pytest.mark.parametrize("place", ["system", "question"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
def test_acceptance_2_padded_batch_equals_single_runs(family, place):
    checks.batch_equals_single_rows(ICD(place=place), family)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_5_auxiliary_rows_are_counted_and_the_tower_runs_once(family):
    checks.counted_cost(ICD(), family)
    model, processor = tiny.shared(family)
    calls = []
    tower = model.model.visual if family == "qwen2_5_vl" else model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda m, a: calls.append(1))
    with attach(model, ICD(), processor=processor):
        checks.generate(model, checks.batch(processor), do_sample=False)
    handle.remove()
    assert len(calls) == 1


@torch.no_grad()
def test_acceptance_6_heads_stay_off_under_the_instruction():
    model, processor = tiny.shared("llava")
    inputs, other = checks.batch(processor), disturbed_prompt(processor, "system")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def last(*methods):
        with attach(model, *methods, processor=processor):
            return model(**inputs, position_ids=positions).logits[:, -1]

    z_dist = whole_pass(model, inputs, inputs["input_ids"], prompt=other)
    expected = 2 * last(VHR()) - z_dist
    torch.testing.assert_close(last(VHR(), ICD(beta=0.0)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_7_nothing_remains(family):
    checks.leaves_no_trace(ICD(), family)


# ---- the prompt, by token ids ----


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("place", ["system", "question"])
@torch.no_grad()
def test_the_disturbed_prompt_by_token_ids(family, place):
    """Text positions hold the tokens of the freshly rendered prompt; image positions features."""
    model, processor = tiny.shared(family)
    inputs, other = checks.batch(processor), disturbed_prompt(processor, place)
    table, built = model.get_input_embeddings().weight, []

    class Spy(ICD):
        def begin(self, prompt):
            built.append(self.disturbed.build(prompt.source))

    with attach(model, Spy(place=place), processor=processor):
        checks.next_logits(model, inputs)
    for row, (embeds, mask) in enumerate(zip(built[0].embeds, built[0].mask, strict=True)):
        distance, ids = (embeds[mask][:, None] - table).abs().amax(-1).min(-1)
        ids = ids.masked_fill(distance > 0, model.config.image_token_id)
        assert torch.equal(ids, other["input_ids"][row][other["attention_mask"][row].bool()])


# ---- differs, limits, errors ----

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.role }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@torch.no_grad()
def test_a_template_without_system_message():
    """ "auto" puts the instruction before the question; "system" refuses."""
    model, processor = tiny.build("llava")
    processor.chat_template = NO_SYSTEM
    inputs = checks.batch(processor)
    results = {}
    for place in ("auto", "question"):
        with attach(model, ICD(place=place), processor=processor):
            results[place] = checks.next_logits(model, inputs)
    assert torch.equal(results["auto"], results["question"])
    with (
        attach(model, ICD(place="system"), processor=processor),
        pytest.raises(LayoutError, match="has no system message") as caught,
    ):
        model(**inputs)
    assert "before the question" in caught.value.advice


def test_no_processor():
    model, processor = tiny.build("llava")
    with attach(model, ICD()), pytest.raises(LayoutError, match="no processor is known"):
        model(**checks.batch(processor))


@torch.no_grad()
def test_another_instruction_gives_another_answer():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    found = []
    for prefix in (CONFUSED, "you are a fox ."):
        with attach(model, ICD(prefix=prefix), processor=processor):
            found.append(checks.next_logits(model, inputs))
    assert not torch.allclose(*found, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message_part"),
    [
        ({"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
        ({"beta": 1.5}, "beta must be a finite number >= 0 and <= 1, got 1.5"),
        ({"prefix": "  "}, "prefix must be a text that is not empty, got '  '"),
        ({"place": "end"}, "place must be one of 'auto', 'system', 'question', got 'end'"),
        ({"form": "peer"}, "form must be one of 'code', 'paper', got 'peer'"),
    ],
)
def test_constructor_errors(arguments, message_part):
    with pytest.raises(ValueError, match=re.escape(message_part)):
        ICD(**arguments)


def test_presets():
    assert (ICD.scripts().alpha, ICD.sampler().alpha) == (1.0, 0.5)
