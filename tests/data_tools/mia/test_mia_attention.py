"""Shares of attention: hand-made maps, three ways to the same numbers, batches, memory."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

import mmlm
from benchmarks.memory import peak_bytes
from data_tools.mia.attention import image_sums, key_attention, shares
from data_tools.mia.forced import force, with_responses
from data_tools.mia.perplexity import perplexity
from mmlm import ImageAttention, attach, measured
from mmlm.probes.image_attention import central_layer

PROMPTS = ["describe the image in detail .", "is there a dog ?", "what is shown here ?"]
PICTURES = [
    [tiny.picture(1), tiny.picture(2, (90, 60))],
    [tiny.picture(3), tiny.picture(4)],
    [tiny.picture(5), tiny.picture(6), tiny.picture(7)],
]
LENGTHS = [7, 4, 6]
"""New tokens of each row; the batch runs on to the longest."""


def by_hand(*weights, heads=1, rows=2):
    """Rows [H, R, K] with the same weights in all of them."""
    return torch.tensor(weights, dtype=torch.float64).expand(heads, rows, -1)


def blocks(*sizes):
    """Positions of images of so many keys, side by side."""
    return list(torch.arange(sum(sizes)).split(list(sizes)))


# ---- acceptance tests by number ----


def test_acceptance_2_hand_made_map():
    rows = by_hand(*[0.1] * 4, *[0.05] * 4, 0.4)  # the rest of the mass is elsewhere
    sums = image_sums(key_attention([rows], 9), blocks(4, 4))
    assert sums == pytest.approx([0.8, 0.4])  # two rows
    assert shares(sums) == pytest.approx([0.666667, 0.333333], abs=1e-6)
    halved = image_sums(key_attention([rows * 0.5], 9), blocks(4, 4))
    assert shares(halved) == pytest.approx(shares(sums))
    equal = key_attention([by_hand(*[0.1] * 6)], 6)
    assert shares(image_sums(equal, blocks(2, 2, 2))) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("family", tiny.ALL)
def test_acceptance_3_decoding_forcing_and_eager_give_the_same(family):
    model, processor = tiny.shared(family)
    inputs, responses, decoded = answers(model, processor)
    forced = force(model, processor, inputs, responses)
    expected = eager_sums(model, processor, inputs, responses)
    for row, (a, b) in enumerate(zip(decoded, forced, strict=True)):
        assert a["keys"] == b.attention["keys"]
        assert a["queries"] == b.attention["queries"] == LENGTHS[row] - 1
        assert a["images"] == pytest.approx(expected[row], rel=1e-5, abs=1e-5)
        assert b.attention["images"] == pytest.approx(expected[row], rel=1e-5, abs=1e-5)
        assert shares(b.attention["images"]) == pytest.approx(shares(a["images"]), abs=1e-5)


def test_acceptance_3_in_a_layer_with_a_sliding_window():
    """The window of 12 has passed most images, whose keys must then count for nothing."""
    model, processor = tiny.shared("gemma3")
    inputs, responses, decoded = answers(model, processor, layer=1)
    forced = force(model, processor, inputs, responses, layer=1)
    expected = eager_sums(model, processor, inputs, responses, layer=1)
    for row, (a, b) in enumerate(zip(decoded, forced, strict=True)):
        assert a["images"] == pytest.approx(expected[row], rel=1e-5, abs=1e-5)
        assert b.attention["images"] == pytest.approx(expected[row], rel=1e-5, abs=1e-5)
    assert forced[2].attention["images"][0] == 0.0


@pytest.mark.parametrize("family", tiny.ALL)
def test_acceptance_3_a_padded_batch_equals_its_rows_alone(family):
    model, processor = tiny.shared(family)
    inputs, responses, _ = answers(model, processor)
    together = force(model, processor, inputs, responses, maps=True)
    for row, whole in enumerate(together):
        own = tiny.inputs(processor, PROMPTS[row : row + 1], PICTURES[row : row + 1])
        (alone,) = force(model, processor, own, responses[row : row + 1], maps=True)
        for part, lone in zip(whole.attention["maps"], alone.attention["maps"], strict=True):
            assert part == pytest.approx(lone, rel=1e-5, abs=1e-6)
        assert whole.log_probs == pytest.approx(alone.log_probs, abs=2e-5)


def test_acceptance_4_unequal_numbers_of_keys():
    sums = image_sums(key_attention([by_hand(*[0.05] * 20)], 20), blocks(4, 16))
    assert shares(sums) == pytest.approx([0.2, 0.8])
    assert shares(sums, [4, 16]) == pytest.approx([0.5, 0.5])


def test_acceptance_5_a_tenth_of_the_memory():
    from tools.mia_scoring_memory import ways

    ratios, peaks = {}, {}
    # 3,000 tokens of five pictures and their question, 100 of response; 4 layers, 8 heads.
    for name, run in ways(layers=4, width=64).items():
        peaks[name] = peak_bytes(lambda name=name, run=run: ratios.update({name: run()}), "cpu")
    assert ratios["scored"] == pytest.approx(ratios["eager"], abs=1e-5)
    assert ratios["early"] == pytest.approx(ratios["eager"], abs=1e-5)
    assert peaks["scored"] < peaks["eager"] / 10
    assert peaks["early"] < peaks["eager"] / 10


# ---- failures ----


def test_failure_no_attention_on_any_image_has_no_share():
    assert shares([0.0, 0.0]) is None
    assert shares([math.nan, 1.0]) is None
    assert shares([math.inf, 1.0]) is None


def test_failure_a_response_of_one_token_has_no_rows():
    with pytest.raises(ValueError, match="single token"):
        key_attention([], 4)


def test_failure_attention_that_cannot_be_seen_names_the_layer(monkeypatch):
    """A model whose attention does not go through the library's interface."""
    model, processor = tiny.build("llava")
    module = mmlm.Anatomy(model).attention(2)

    def closed(hidden_states, **kwargs):
        return hidden_states, None

    monkeypatch.setattr(module, "forward", closed)
    inputs = tiny.inputs(processor, PROMPTS[:1], PICTURES[:1])
    with pytest.raises(NotImplementedError, match="Layer 2"):
        force(model, processor, inputs, [[5, 6, 7]], probabilities=False)


def test_responses_that_cannot_be_forced_are_refused():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], PICTURES[:1])
    with pytest.raises(ValueError, match="two tokens"):
        force(model, processor, inputs, [[5]])
    with pytest.raises(ValueError, match="image token"):
        force(model, processor, inputs, [[5, model.config.image_token_id, 6]])


# ---- properties ----


def test_rows_in_chunks_equal_rows_at_once():
    rows = torch.rand(3, 10, 20)
    chunks = rows.split(3, dim=1)
    torch.testing.assert_close(key_attention(chunks, 16), key_attention([rows], 16))
    expected = rows[..., :16].double().mean(0).sum(0)  # heads are averaged, rows are added
    torch.testing.assert_close(key_attention([rows], 16), expected)


def test_chunks_of_the_engine_do_not_show(monkeypatch):
    model, processor = tiny.shared("llava")
    inputs, responses, _ = answers(model, processor)
    whole = force(model, processor, inputs, responses)
    monkeypatch.setattr("mmlm.engine.attention.editor._CHUNK", 1)  # one row at a time
    for a, b in zip(whole, force(model, processor, inputs, responses), strict=True):
        assert a.attention["images"] == pytest.approx(b.attention["images"], rel=1e-6)


def test_an_early_end_changes_nothing_and_runs_no_later_layer():
    model, processor = tiny.shared("llava")
    inputs, responses, _ = answers(model, processor)
    ran = []
    anatomy = mmlm.Anatomy(model)
    handles = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(anatomy.layers)
    ]
    early = force(model, processor, inputs, responses, probabilities=False)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]  # layer 2 is left behind its attention
    whole = force(model, processor, inputs, responses)
    assert [one.attention for one in early] == [one.attention for one in whole]
    assert early[0].log_probs is None


def test_probabilities_are_those_of_decoding():
    model, processor = tiny.shared("llava")
    inputs, responses, _ = answers(model, processor)
    with attach(model, mmlm.Confidence()):
        model.generate(**inputs, max_new_tokens=7, min_new_tokens=7, do_sample=False)
        noted = [row["confidence"]["log_max"] for row in measured(model, LENGTHS)]
    for one, expected in zip(force(model, processor, inputs, responses), noted, strict=True):
        assert math.fsum(one.log_max) / len(one.log_max) == pytest.approx(expected, abs=1e-5)
        assert perplexity(one.log_probs) >= perplexity(one.log_max) - 1e-9


def test_padding_gets_exactly_nothing():
    """What all keys of a row get adds up to less than one per query, and padding to nothing."""
    model, processor = tiny.shared("llava")
    inputs, responses, _ = answers(model, processor)
    seen = {}

    class Watching(ImageAttention):
        def weights(self, state, layer, rows, a):
            seen["a"] = a
            return super().weights(state, layer, rows, a)

    grown = with_responses(inputs, responses, 1)
    padding = grown["attention_mask"] == 0
    assert bool(padding.any())
    with attach(model, Watching()), torch.inference_mode():
        model(**grown, use_cache=False)
    a = seen["a"]
    assert float(a[padding[:, None, None].expand_as(a)].abs().max()) == 0.0


def test_responses_stand_at_the_right_and_padding_at_the_left():
    inputs = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "token_type_ids": torch.tensor([[0, 1, 0], [1, 1, 0]]),
        "pixel_values": torch.zeros(2, 3),
    }
    grown = with_responses(inputs, [[11, 12, 13], [14, 15]], pad=0)
    assert grown["input_ids"].tolist() == [[5, 6, 11, 12], [7, 8, 9, 14]]
    assert grown["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert grown["token_type_ids"].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert grown["pixel_values"] is inputs["pixel_values"]


@pytest.mark.parametrize(("layers", "expected"), [(32, 16), (28, 14), (8, 4), (1, 0), (3, 2)])
def test_the_layer_of_other_depths(layers, expected):
    assert central_layer(layers) == expected


# ---- help ----


def answers(model, processor, layer=None):
    """Inputs of the batch, greedy responses cut to their lengths, what was measured meanwhile."""
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    banned = [[token] for token in mmlm.Anatomy(model).image_ids]
    with attach(model, ImageAttention(layer=layer), processor=processor):
        ids = model.generate(
            **inputs,
            max_new_tokens=7,
            min_new_tokens=7,
            do_sample=False,
            bad_words_ids=banned,
        )
        decoded = [row["image_attention"] for row in measured(model, LENGTHS)]
    new = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return inputs, [row[:n] for row, n in zip(new, LENGTHS, strict=True)], decoded


def eager_sums(model, processor, inputs, responses, layer=None):
    """Sums per image from whole eager matrices of generate(), by the token ids."""
    anatomy = mmlm.Anatomy(model)
    banned = [[token] for token in anatomy.image_ids]
    with attach(model, ImageAttention(), processor=processor):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        keys = [row["image_attention"]["keys"] for row in measured(model)]
    model.set_attn_implementation("eager")
    try:
        output = model.generate(
            **inputs,
            max_new_tokens=7,
            min_new_tokens=7,
            do_sample=False,
            bad_words_ids=banned,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    finally:
        model.set_attn_implementation("sdpa")
    layer = central_layer(anatomy.n_layers) if layer is None else layer
    n, sums = inputs["input_ids"].shape[1], []
    for row, response in enumerate(responses):
        assert output.sequences[row, n : n + len(response)].tolist() == response
        total = torch.zeros(n)
        for t, step in enumerate(output.attentions[1 : len(response)], start=1):
            weights = step[layer][row, :, -1].mean(0)
            # A cache with a sliding window has dropped the first keys.
            total += torch.nn.functional.pad(weights, (n + t - len(weights), 0))[:n]
        visual = torch.isin(inputs["input_ids"][row], torch.tensor(anatomy.image_ids))
        where = visual.nonzero()[:, 0].split(keys[row])
        sums.append([float(total[own].sum()) for own in where])
    return sums
