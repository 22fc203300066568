"""Every exported probe, in every family: it changes no bit, and looks at needed rows only."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import mmlm
from mmlm import attach, measured, parse_method
from mmlm.errors import HiddenAttention, IncompatibleMethods
from mmlm.probes.layer_probe import check_shown

#: Settings under which each probe is tried; a new probe without a row fails.
PROBES = {
    "AttentionMap": ("AttentionMap()", "AttentionMap(layers=(1, 3), by_layer=True)"),
    "AttentionSinks": ("AttentionSinks()", "AttentionSinks(queries='generated', layers=(1, 2))"),
    "Confidence": ("Confidence()",),
    "HeadDivergence": ("HeadDivergence()", "HeadDivergence(layers=(2,))"),
    "ImageAttention": ("ImageAttention()",),
    "QueryNorms": ("QueryNorms()", "QueryNorms(layers=(1,))"),
    "RetrievalHeads": ("RetrievalHeads()", "RetrievalHeads(layers=(0, 2))"),
    "TextDominance": ("TextDominance()",),
    "VisualHeads": ("VisualHeads()", "VisualHeads(layers=(1, 3), steps=True)"),
    "VisualSinks": ("VisualSinks(sink_dims=(2, 7), tau=1.5)",),
}
SETTINGS = [text for texts in PROBES.values() for text in texts]
PROMPTS = ["describe the image in detail .", "is there a dog ?"]
PICTURES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)]]
BESIDE = ("VHR(alpha=3.0)", "PAI()", "VHR(alpha=3.0, text_branch='lockstep')", "ClsPruner(keep=8)")


def generate(model, inputs, *methods, **options):
    with attach(model, *map(parse_method, methods)):
        output = model.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return output, measured(model) if methods else []


def assert_equal(one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


def test_every_exported_probe_is_here():
    assert set(PROBES) == set(mmlm._PROBES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("text", SETTINGS)
def test_probes_acceptance_15_no_bit_changes(family, text):
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    plain, _ = generate(model, inputs)
    looked, records = generate(model, inputs, text)
    assert_equal(plain, looked)
    assert len(records) == 2
    assert json.loads(json.dumps(records, allow_nan=False)) == records  # a file keeps them
    again, _ = generate(model, inputs)  # nothing is left behind
    assert_equal(plain, again)


@pytest.mark.parametrize("method", BESIDE)
@pytest.mark.parametrize("text", SETTINGS)
def test_no_bit_changes_beside_a_method(text, method):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    if parse_method(text).needs_all_visual and "Pruner" in method:
        with pytest.raises(IncompatibleMethods, match="needs all image positions"):
            generate(model, inputs, method, text)
        return
    edited, _ = generate(model, inputs, method)
    looked, _ = generate(model, inputs, method, text)
    assert_equal(edited, looked)


@pytest.mark.parametrize("text", SETTINGS)
def test_rows_without_a_picture_have_a_record_too(text):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, [*PROMPTS, "what is this ?"], [*PICTURES, []])
    _, records = generate(model, inputs, text)
    assert len(records) == 3
    (alone,) = generate(model, tiny.inputs(processor, ["what is this ?"], [[]]), text)[1]
    assert alone.keys() == records[2].keys()


@pytest.mark.parametrize("text", SETTINGS)
def test_one_row_of_attention_per_pass(text, monkeypatch):
    method = parse_method(text)
    if "weights" not in method.sites:
        return
    seen = []
    real = type(method).weights

    def weights(self, state, layer, rows, a):
        seen.append((a.shape[2], a.shape[3]))
        return real(self, state, layer, rows, a)

    monkeypatch.setattr(type(method), "weights", weights)
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    generate(model, inputs, text)
    n = inputs["input_ids"].shape[1]
    # Whoever wants the prompt's own rows gets them once, and none of an answer.
    every = method.rows == "all"
    assert {rows for rows, _ in seen} == {n if every else 1}
    assert not every or {keys for _, keys in seen} == {n}


@pytest.mark.parametrize("text", SETTINGS)
def test_a_pass_more_only_where_the_cost_says_so(text):
    model, processor = tiny.shared("llava")
    passes = []
    handle = mmlm.Anatomy(model).text.register_forward_pre_hook(lambda *_: passes.append(1))
    generate(model, tiny.inputs(processor, PROMPTS, PICTURES), text)
    handle.remove()
    assert len(passes) == 4 + parse_method(text).cost.prompt


@pytest.mark.parametrize("text", SETTINGS)
def test_beams_are_refused_unless_only_the_prompt_is_measured(text):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    if not parse_method(text).rewinds:
        with pytest.raises(IncompatibleMethods, match="beam search"):
            generate(model, inputs, text, num_beams=2)
        return
    _, alone = generate(model, inputs, text)
    with attach(model, parse_method(text)):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2)
        records = measured(model, [4, 4])
    for one, other in zip(alone, records, strict=True):
        assert one == other


def test_a_layer_whose_attention_never_came_is_named():
    check_shown((0, 2), {0: [], 2: []})
    with pytest.raises(HiddenAttention, match="Layer 2 does not hand its queries and keys"):
        check_shown((0, 2), {0: []})


@pytest.mark.parametrize("text", SETTINGS)
def test_numbers_of_tokens_must_be_one_per_row(text):
    model, processor = tiny.shared("llava")
    with attach(model, parse_method(text)):
        model.generate(**tiny.inputs(processor, PROMPTS, PICTURES), max_new_tokens=2)
        # What is known of a prompt is that of all its beams, so it may be asked for once.
        for n in (3,) if parse_method(text).rewinds else (1, 3):
            with pytest.raises(ValueError, match=f"{n} numbers of tokens for 2 rows"):
                measured(model, [2] * n)
