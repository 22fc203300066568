"""AttentionMap against the library's own attentions; what left; batches; turns; settings."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn.functional import pad

import mmlm
from mmlm import AttentionMap, attach, measured, parse_method

PROMPTS = ["describe the image in detail .", "is there a dog ?"]
PICTURES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)]]
N = 4


def generate(model, inputs, *methods, **options):
    with attach(model, *methods):
        output = model.generate(
            **inputs,
            max_new_tokens=N,
            min_new_tokens=N,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
        return output, [row["attention_map"] for row in measured(model)] if methods else []


def flat(images):
    return [x for image in images for x in image]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_maps_are_what_an_eager_model_returns(family):
    model, processor = tiny.build(family)
    model.set_attn_implementation("eager")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    output, _ = generate(model, inputs, output_attentions=True)
    _, records = generate(model, inputs, AttentionMap(by_layer=True))
    visual = torch.isin(inputs["input_ids"], torch.tensor(mmlm.Anatomy(model).image_ids))
    length = inputs["input_ids"].shape[1]
    for row, record in enumerate(records):
        for step in range(N):
            rows = [a[row, :, -1, :].float().mean(0) for a in output.attentions[step]]
            # A window has forgotten what is before it.
            rows = torch.stack([pad(a, (length + step - len(a), 0)) for a in rows])
            expected = rows[:, :length][:, visual[row]]
            found = [flat(layer[step]) for layer in record["layer_maps"]]
            torch.testing.assert_close(torch.tensor(found), expected, atol=2e-5, rtol=1e-3)
            mean = torch.tensor(flat(record["maps"][step]))
            torch.testing.assert_close(mean, expected.mean(0), atol=2e-5, rtol=1e-3)


def test_shapes_and_shares():
    model, processor = tiny.shared("llava_next")
    _, records = generate(model, tiny.inputs(processor, PROMPTS, PICTURES), AttentionMap())
    assert [len(record["keys"]) for record in records] == [2, 1]
    for record in records:
        assert record["layers"] == [0, 1, 2, 3]
        assert len(record["maps"]) == N
        assert "layer_maps" not in record
        shares = torch.tensor(record["shares"])  # [layers, tokens, images]
        assert shares.shape == (4, N, len(record["keys"]))
        assert bool((shares >= 0).all())
        assert bool((shares.sum(-1) <= 1).all())
        for step in range(N):
            assert [len(part) for part in record["maps"][step]] == record["keys"]
            sums = torch.tensor([sum(part) for part in record["maps"][step]])
            torch.testing.assert_close(sums, shares[:, step].mean(0), atol=1e-6, rtol=1e-5)


def test_a_batch_is_measured_as_its_rows_alone():
    model, processor = tiny.shared("llava")
    _, together = generate(model, tiny.inputs(processor, PROMPTS, PICTURES), AttentionMap())
    for row in range(2):
        one = tiny.inputs(processor, PROMPTS[row : row + 1], PICTURES[row : row + 1])
        ((alone),) = generate(model, one, AttentionMap())[1]
        for a, b in zip(together[row]["maps"], alone["maps"], strict=True):
            assert flat(a) == pytest.approx(flat(b), abs=1e-5)


def test_edits_of_other_methods_are_seen():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    _, plain = generate(model, inputs, AttentionMap())
    _, edited = generate(model, inputs, parse_method("PAI(alpha=2.0)"), AttentionMap())
    assert edited[1]["shares"][3][0][0] > plain[1]["shares"][3][0][0]


@pytest.mark.parametrize("text", ["ClsPruner(keep=5)", "RandomPruner(keep=5)"])
def test_positions_that_never_enter_have_no_attention(text):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    _, (_, record) = generate(model, inputs, parse_method(text), AttentionMap())
    _, (_, plain) = generate(model, inputs, AttentionMap())
    assert record["keys"] == plain["keys"]
    for maps in record["maps"]:
        assert sum(x > 0 for x in maps[0]) == 5


def test_positions_that_leave_between_layers_have_no_attention_behind():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    _, records = generate(model, inputs, parse_method("DyVTE(exit_layer=2)"), AttentionMap())
    shares = torch.tensor(records[1]["shares"])
    assert bool((shares[:3] > 0).all())
    assert bool((shares[3:] == 0).all())


def test_answers_end_where_they_end():
    model, processor = tiny.shared("llava")
    with attach(model, AttentionMap()):
        inputs = tiny.inputs(processor, PROMPTS, PICTURES)
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        long, short = (row["attention_map"] for row in measured(model, [4, 2]))
        everything = measured(model)[1]["attention_map"]
    assert (len(long["maps"]), len(short["maps"])) == (4, 2)
    assert short["maps"] == everything["maps"][:2]


def test_a_later_turn_begins_its_own_answer():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[1:], PICTURES[1:])
    with attach(model, AttentionMap()), torch.inference_mode():
        n = inputs["input_ids"].shape[1]
        past = model(**inputs, use_cache=True).past_key_values
        for new in (torch.tensor([[8]]), torch.tensor([[5, 6, 7]]), torch.tensor([[9]])):
            n += new.shape[1]
            mask = torch.ones(1, n, dtype=torch.long)
            model(input_ids=new, attention_mask=mask, past_key_values=past, use_cache=True)
        (row,) = measured(model)
    record = row["attention_map"]
    assert len(record["maps"]) == 2  # the row at the turn's end, and one token
    shares = torch.tensor(record["shares"]).mean(0)[:, 0]
    sums = [sum(maps[0]) for maps in record["maps"]]
    assert sums == pytest.approx(shares.tolist(), rel=1e-5)  # nothing is left of what was before


@pytest.mark.parametrize("wrong", [{"layers": (-1,)}, {"layers": ()}, {"by_layer": 2}])
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AttentionMap(**wrong)


def test_a_layer_that_is_not_there_is_refused():
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match="layer 4"), attach(model, AttentionMap(layers=(4,))):
        pass
