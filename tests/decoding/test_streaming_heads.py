"""StreamingHeads: the authors' window and outputs, a masked reference, heads from files, errors."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from golden import arrays, golden

import mmlm
from decoding.streaming_heads import in_window, streamed
from mmlm import StreamingHeads, attach
from mmlm.engine.head_maps import HeadMap
from mmlm.errors import UnsupportedModel

PROMPTS = ["describe the image in detail .", "is there a dog ?"]
PICTURES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)]]
SOME = ((1, (0, 1, 2, 5)), (3, (3, 4, 5, 6, 7)))
EVERY = tuple((layer, tuple(range(8))) for layer in range(4))


def logits_of(model, inputs, *methods):
    with attach(model, *methods), torch.no_grad():
        return model(**inputs).logits[:, -1]


def generated(model, inputs, *methods, **options):
    with attach(model, *methods):
        return model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options
        )


def attention_of(model, inputs, *methods):
    """What an eager model says that its weights are, methods included."""
    with attach(model, *methods), torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


def saved(folder, name, values, shape=None, threshold=0.1):
    """A file of heads whose scores are given."""
    score = torch.zeros(shape or (4, 8), dtype=torch.float64)
    for (layer, head), value in values.items():
        score[layer, head] = value
    path = folder / name
    HeadMap(
        kind="text",
        values={"score": score},
        rank="score",
        threshold=threshold,
        counted={"steps": 99},
    ).save(path)
    return str(path)


# ---- the rule ---------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("duo_attention/duo_*.npz"))
def test_ring_acceptance_2_golden(path):
    data = arrays(path)
    cases = sorted({name.split("_")[0] for name in data})
    for case in cases:
        n, sink, recent = data[f"{case}_seq_sink_recent"].tolist()
        index = torch.arange(n)
        causal = index <= index[:, None]
        inside = in_window(index[:, None], index, sink=sink, recent=recent)
        assert torch.equal(causal & inside, data[f"{case}_mask"].bool())
        q, k, v = (data[f"{case}_{name}"].transpose(1, 2).float() for name in "qkv")
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        s = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        a = s.masked_fill(~causal, -torch.inf).softmax(-1)
        out = (streamed(a, inside[None, None]) @ v).transpose(1, 2)
        assert torch.allclose(out, data[f"{case}_out"].float(), rtol=0, atol=1e-6)


def test_a_window_by_hand():
    key = torch.arange(7)
    seen = in_window(torch.tensor(6), key, sink=1, recent=2)
    assert seen.tolist() == [True, False, False, False, False, True, True]
    a = torch.tensor([0.1, 0.2, 0.2, 0.1, 0.1, 0.1, 0.2])[None, None, None]
    edited = streamed(a, seen[None, None, None])
    assert edited.flatten().tolist() == pytest.approx([0.25, 0, 0, 0, 0, 0.25, 0.5])


def test_rows_without_anything_to_lose_keep_their_bits():
    a = torch.rand(2, 3, 4, 9).softmax(-1)
    assert torch.equal(streamed(a, torch.ones(2, 1, 4, 9, dtype=torch.bool)), a)
    only = torch.zeros(1, 1, 1, 4)
    only[..., 1] = 1.0
    outside = torch.tensor([True, False, True, True])[None, None, None]
    assert torch.equal(streamed(only, outside), only)


# ---- on models --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("keep_image", [False, True])
def test_weights_are_those_of_a_masked_row(family, keep_image):
    model, processor = tiny.build(family)
    model.set_attn_implementation("eager")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    method = StreamingHeads(
        sink=2, recent=5, keep_image=keep_image, heads_by_layer=((1, (0, 1, 2, 5)),)
    )
    plain = attention_of(model, inputs)[1]
    edited = attention_of(model, inputs, method)[1]
    visual = torch.isin(inputs["input_ids"], torch.tensor(mmlm.Anatomy(model).image_ids))
    real, n = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    for row in range(2):
        first = int(real[row].int().argmax())
        for i in range(first, n):
            keys = [
                j for j in range(n) if j - first < 2 or i - j < 5 or (keep_image and visual[row, j])
            ]
            expected = torch.zeros(8, n)
            expected[:, keys] = plain[row, :, i, keys].float()
            expected /= expected.sum(-1, keepdim=True)
            for head in range(8):
                wanted = expected[head] if head in (0, 1, 2, 5) else plain[row, head, i].float()
                assert torch.allclose(edited[row, head, i].float(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_ring_acceptance_2_a_long_window_changes_no_bit(family):
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    n = inputs["input_ids"].shape[1]
    method = StreamingHeads(sink=4, recent=n + 2, heads_by_layer=EVERY)  # six new tokens come
    assert torch.equal(logits_of(model, inputs), logits_of(model, inputs, method))
    assert torch.equal(generated(model, inputs), generated(model, inputs, method))


def test_a_window_that_ends_in_the_answer_changes_nothing_before():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    n = inputs["input_ids"].shape[1]
    method = StreamingHeads(sink=1, recent=n - 1, heads_by_layer=EVERY)
    assert torch.equal(logits_of(model, inputs), logits_of(model, inputs, method))
    shorter = StreamingHeads(sink=1, recent=n - 2, heads_by_layer=EVERY)
    assert not torch.equal(logits_of(model, inputs), logits_of(model, inputs, shorter))


@pytest.mark.parametrize("start", ["prompt", "answer"])
def test_ring_acceptance_2_batches_are_singles(start):
    model, processor = tiny.shared("llava")
    method = StreamingHeads(sink=1, recent=6, start=start, heads_by_layer=SOME)
    prompts, pictures = [*PROMPTS, "what is this ?"], [*PICTURES, []]
    together = tiny.inputs(processor, prompts, pictures)
    with attach(model, method):
        out = model.generate(
            **together,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for row in range(3):
        alone = tiny.inputs(processor, prompts[row : row + 1], pictures[row : row + 1])
        with attach(model, method):
            one = model.generate(
                **alone,
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        for a, b in zip(out.logits, one.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=0)


def test_ring_acceptance_2_prompts_without_an_image_are_plain():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, ["what is shown here ? " * 3], [[]])
    method = StreamingHeads(sink=1, recent=3, heads_by_layer=EVERY)
    assert torch.equal(logits_of(model, inputs), logits_of(model, inputs, method))


def test_ring_acceptance_2_says_that_it_saves_no_memory():
    text = " ".join(StreamingHeads.__doc__.split())
    assert "saves no memory" in text.split("Paper:")[0]


def test_answers_stream_only_if_so_wanted():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    method = StreamingHeads(sink=1, recent=4, start="answer", heads_by_layer=EVERY)
    assert torch.equal(logits_of(model, inputs), logits_of(model, inputs, method))
    with attach(model, method):
        out = model.generate(
            **inputs,
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    plain = model.generate(
        **inputs,
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.logits[0], plain.logits[0])
    assert not torch.allclose(out.logits[1], plain.logits[1], atol=1e-4)


def test_cached_is_one_pass_over_everything():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    method = StreamingHeads(sink=1, recent=6, heads_by_layer=SOME)
    with attach(model, method):
        out = model.generate(
            **inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    more = torch.ones(2, 5, dtype=torch.long)
    whole = inputs | {
        "input_ids": out.sequences[:, :-1],
        "attention_mask": torch.cat([inputs["attention_mask"], more], dim=1),
    }
    torch.testing.assert_close(logits_of(model, whole, method), out.logits[-1], atol=1e-4, rtol=0)


# ---- heads from files -------------------------------------------------------------------------


def test_heads_that_no_file_names_stream(tmp_path):
    visual = saved(tmp_path, "visual.json", {(0, 1): 0.9, (2, 3): 0.5, (3, 3): 0.05})
    text = saved(tmp_path, "text.json", {(0, 1): 0.3, (1, 7): 0.8})
    method = StreamingHeads(heads_files=(visual, text))
    full = {(0, 1), (2, 3), (1, 7)}
    assert {(n, h) for n, heads in method.streaming for h in heads} == {
        (n, h) for n in range(4) for h in range(8)
    } - full
    best = StreamingHeads(heads_files=visual, top=1)
    assert (0, tuple(h for h in range(8) if h != 1)) == best.streaming[0]
    assert sum(len(heads) for _, heads in best.streaming) == 31
    assert mmlm.parse_method(method.text) == method


def test_a_file_acts_as_its_heads_do(tmp_path):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    method = StreamingHeads(
        heads_files=saved(tmp_path, "a.json", {(0, 1): 0.9, (2, 3): 0.5}), sink=1, recent=4
    )
    same = StreamingHeads(heads_by_layer=method.streaming, sink=1, recent=4)
    assert torch.equal(logits_of(model, inputs, method), logits_of(model, inputs, same))


def test_a_file_that_names_every_head_leaves_none_to_stream(tmp_path):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    named = {(layer, head): 0.9 for layer in range(4) for head in range(8)}
    method = StreamingHeads(heads_files=saved(tmp_path, "all.json", named), sink=1, recent=4)
    assert method.streaming == ()
    assert torch.equal(logits_of(model, inputs), logits_of(model, inputs, method))


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"sink": -1},
        {"recent": 0},
        {"keep_image": 2},
        {"start": "decode"},
        {"top": 0, "heads_files": ("x.json",)},
        {"top": 3},
        {"heads_by_layer": ()},
        {"heads_by_layer": ((0, (1, 1)),)},
        {"heads_by_layer": ((0, (1,)),), "heads_files": ("x.json",)},
    ],
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match=f"StreamingHeads.*({next(iter(wrong))}|heads must be)"):
        StreamingHeads(**wrong)


def test_no_heads_are_refused():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(UnsupportedModel, match="no heads are given; `mmlm calibrate heads"),
        attach(model, StreamingHeads()),
    ):
        pass


def test_a_head_that_is_not_there_is_refused():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match="StreamingHeads: layer 1 has heads 0 to 7, got 8"),
        attach(model, StreamingHeads(heads_by_layer=((1, (8,)),))),
    ):
        pass


def test_a_missing_file_is_refused():
    with pytest.raises(ValueError, match="StreamingHeads: there is no file"):
        StreamingHeads(heads_files=("nowhere.json",))


def test_a_file_without_heads_is_refused(tmp_path):
    name = saved(tmp_path, "weak.json", {(0, 0): 0.01})
    with pytest.raises(ValueError, match="no head is above the threshold"):
        StreamingHeads(heads_files=(name,))
    with pytest.raises(ValueError, match=re.escape("33 heads of 4 x 8")):
        StreamingHeads(heads_files=(name,), top=33)


def test_files_of_two_models_are_refused(tmp_path):
    one = saved(tmp_path, "one.json", {(0, 0): 0.9})
    other = saved(tmp_path, "other.json", {(0, 0): 0.9}, shape=(2, 4))
    with pytest.raises(ValueError, match="the files are of different models"):
        StreamingHeads(heads_files=(one, other))


def test_a_file_of_another_model_is_refused(tmp_path):
    model, _ = tiny.shared("llava")
    other = saved(tmp_path, "other.json", {(0, 0): 0.9}, shape=(2, 4))
    with (
        pytest.raises(ValueError, match="is for 2 layers of 4 heads; the model has 4 of 8"),
        attach(model, StreamingHeads(heads_files=(other,))),
    ):
        pass
