"""ImageAttention and Confidence: no bit of any output changes; settings; records."""

from __future__ import annotations

import pytest
import tiny
import torch

import mmlm
from decoding.pai import PAI
from decoding.vhr import VHR
from mmlm import Confidence, ImageAttention, attach, measured, parse_method
from mmlm.errors import IncompatibleMethods
from mmlm.probes.confidence import log_max
from mmlm.probes.image_attention import image_marks, key_sums

PROBES = (ImageAttention(), ImageAttention(layer=0, maps=True), Confidence())
PROMPTS = ["describe the image in detail .", "is there a dog ?", "what is shown here ?"]
PICTURES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)], []]


def generate(model, inputs, *methods, **options):
    with attach(model, *methods):
        output = model.generate(
            **inputs,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return output, measured(model) if methods else []


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.label)
def test_no_bit_changes(family, probe):
    model, processor = tiny.shared(family)
    prompts, pictures = (PROMPTS[:2], PICTURES[:2]) if family == "idefics3" else (PROMPTS, PICTURES)
    inputs = tiny.inputs(processor, prompts, pictures)
    plain, _ = generate(model, inputs)
    looked, _ = generate(model, inputs, probe)
    assert torch.equal(plain.sequences, looked.sequences)
    for a, b in zip(plain.logits, looked.logits, strict=True):
        assert torch.equal(a, b)


def test_no_bit_changes_beside_methods():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:2], PICTURES[:2])
    methods = (VHR(alpha=3.0), PAI())
    edited, _ = generate(model, inputs, *methods)
    looked, records = generate(model, inputs, *methods, ImageAttention(), Confidence())
    for a, b in zip(edited.logits, looked.logits, strict=True):
        assert torch.equal(a, b)
    _, plain = generate(model, inputs, ImageAttention())
    # Edits of other methods are seen.
    assert records[0]["image_attention"]["images"] != plain[0]["image_attention"]["images"]


def test_images_count_by_row_and_maps_add_up():
    model, processor = tiny.shared("llava_next")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    _, sums = generate(model, inputs, ImageAttention())
    _, maps = generate(model, inputs, ImageAttention(maps=True))
    assert [len(row["image_attention"]["images"]) for row in sums] == [2, 1, 0]
    for a, b in zip(sums, maps, strict=True):
        a, b = a["image_attention"], b["image_attention"]
        assert [len(part) for part in b["maps"]] == a["keys"] == b["keys"]
        assert a["images"] == pytest.approx(b["images"], rel=1e-6)
        assert [sum(part) for part in b["maps"]] == pytest.approx(b["images"], rel=1e-6)
        assert a["queries"] == 4  # the last of five tokens was never fed back
        assert sum(a["images"]) <= a["queries"]


def test_answers_of_one_token_have_no_query():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], PICTURES[:1])
    with attach(model, ImageAttention(), Confidence()):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        (row,) = measured(model, [1])
    assert row["image_attention"]["queries"] == 0
    assert row["image_attention"]["images"] == [0.0, 0.0]
    assert row["confidence"]["tokens"] == 1


def test_confidence_is_the_mean_of_the_models_own_logits():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:2], PICTURES[:2])
    plain, _ = generate(model, inputs)
    with attach(model, Confidence()):
        model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        records = measured(model, [5, 3])
    for row, n in enumerate((5, 3)):
        expected = torch.stack([z[row].log_softmax(-1).max() for z in plain.logits[:n]]).mean()
        assert records[row]["confidence"]["log_max"] == pytest.approx(float(expected), abs=1e-5)


def test_text_of_a_second_turn_is_no_query():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], PICTURES[:1])
    probe = ImageAttention()
    more = torch.tensor([[5, 6, 7]])
    with attach(model, probe), torch.inference_mode():
        n = inputs["input_ids"].shape[1]
        past = model(**inputs, use_cache=True).past_key_values
        for new in (torch.tensor([[8]]), more, torch.tensor([[9]])):
            n += new.shape[1]
            mask = torch.ones(1, n, dtype=torch.long)
            model(input_ids=new, attention_mask=mask, past_key_values=past, use_cache=True)
        (row,) = measured(model)
    assert row["image_attention"]["queries"] == 2  # one token before, one behind the new text


def test_sums_by_hand():
    a = torch.tensor([[[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], [[0.4, 0.1, 0.5], [0.0, 0.5, 0.5]]]])
    assert key_sums(a, None, 2)[0].tolist() == pytest.approx([0.6, 0.6])
    assert key_sums(a, torch.tensor([[True, False]]), 2)[0].tolist() == pytest.approx([0.3, 0.2])
    z = torch.log(torch.tensor([[0.5, 0.3, 0.2]])) + 4
    assert log_max(z).exp().tolist() == pytest.approx([0.5])


def test_marks_are_those_of_the_layout():
    layout = mmlm.TokenLayout.from_ids(
        torch.tensor([[1, 9, 9, 2, 9, 3], [0, 1, 9, 2, 3, 4]]),
        torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]),
        image_ids=(9,),
    )
    marks = image_marks(layout)
    assert marks.shape == (2, 6, 2)
    assert marks[0].T.tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert marks[1].T.tolist() == [[0, 0, 1, 0, 0, 0], [0] * 6]


@pytest.mark.parametrize("wrong", [{"layer": -1}, {"queries": "all"}, {"maps": 2}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageAttention(**wrong)


def test_a_layer_that_is_not_there_is_refused():
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match="layer"), attach(model, ImageAttention(layer=4)):
        pass


def test_numbers_of_tokens_must_be_one_per_row():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:2], PICTURES[:2])
    for probe in (ImageAttention(), Confidence()):
        with attach(model, probe):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            with pytest.raises(ValueError, match="2 rows"):
                measured(model, [2])


def test_text_form():
    for probe in PROBES:
        assert parse_method(probe.text) == probe
    with pytest.raises(IncompatibleMethods, match="both measure"):
        with attach(tiny.shared("llava")[0], ImageAttention(), ImageAttention(layer=1)):
            pass
