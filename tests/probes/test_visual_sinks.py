"""VisualSinks: which positions, how much attention on them, and refusals as VAR's."""

from __future__ import annotations

import pytest
import tiny
import torch

import mmlm
from mmlm import VisualSinks, attach, measured, parse_method
from mmlm.engine.sinks import phi
from mmlm.errors import UnsupportedModel

PROMPTS = ["describe the image in detail .", "is there a dog ?"]
PICTURES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)]]
PROBE = VisualSinks(sink_dims=(2, 7), tau=1.5, layers=(1, 2, 3))


def records_of(model, inputs, *methods):
    with attach(model, *methods):
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return [row["visual_sinks"] for row in measured(model)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sinks_and_their_attention_by_an_eager_pass(family):
    model, processor = tiny.build(family)
    model.set_attn_implementation("eager")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    states = []  # what enters each layer, deep-stacked features included
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for block in mmlm.Anatomy(model).layers
    ]
    with torch.inference_mode():
        out = model(**inputs, output_attentions=True)
    for handle in handles:
        handle.remove()
    visual = torch.isin(inputs["input_ids"], torch.tensor(mmlm.Anatomy(model).image_ids))
    real = inputs["attention_mask"].bool()
    with attach(model, PROBE):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        records = [row["visual_sinks"] for row in measured(model)]
    for row, record in enumerate(records):
        assert record["queries"] == 1
        for number, layer in enumerate(record["layers"]):
            values = phi(states[layer][row], (2, 7))
            sinks = (values > 1.5) & real[row]
            own = visual[row].nonzero()[:, 0]
            flat, start = [], 0
            for found, keys in zip(record["sinks"][number], record["keys"], strict=True):
                flat += [start + i for i in found]
                start += keys
            assert own[flat].tolist() == (sinks & visual[row]).nonzero()[:, 0].tolist()
            assert record["phi"][number] == pytest.approx(
                float(values[visual[row]].max()), rel=1e-4
            )
            a = out.attentions[layer][row, :, -1].float().mean(0)
            for kind, keys in {
                "visual": visual[row],
                "visual_sink": visual[row] & sinks,
                "text_sink": ~visual[row] & sinks,
            }.items():
                expected = float(a[keys].sum())
                assert record["attention"][kind][number] == pytest.approx(expected, abs=1e-5)


def test_a_sink_dimension_that_is_massive_makes_a_sink():
    model, processor = tiny.build("llava")
    inputs = tiny.inputs(processor, PROMPTS[1:], PICTURES[1:])
    plain = records_of(model, inputs, VisualSinks(sink_dims=(2,), tau=6.0))
    assert plain[0]["sinks"][0] == [[]]
    where = int(
        torch.isin(inputs["input_ids"], torch.tensor(model.config.image_token_id)).int().argmax()
    )

    def massive(_, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        if x.shape[1] > 1:
            x = x.clone()
            x[0, where + 3, 2] = 500.0
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    block = mmlm.Anatomy(model).layers[2]
    handle = block.register_forward_pre_hook(massive, with_kwargs=True)
    (record,) = records_of(model, inputs, VisualSinks(sink_dims=(2,), tau=6.0))
    handle.remove()
    assert record["layers"] == [2, 3]
    assert record["sinks"][0] == [[3]]
    assert record["phi"][0] > 6
    share = record["attention"]
    assert 0 < share["visual_sink"][0] < share["visual"][0] <= 1


def test_attention_is_the_mean_over_the_answer():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    with attach(model, PROBE, mmlm.AttentionMap(layers=PROBE.layers)):
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        rows = measured(model, [4, 2])
    for row, n in zip(rows, (4, 2), strict=True):
        assert row["visual_sinks"]["queries"] == n
        shares = torch.tensor(row["attention_map"]["shares"]).sum(-1).mean(-1)
        assert row["visual_sinks"]["attention"]["visual"] == pytest.approx(
            shares.tolist(), abs=1e-6
        )


@pytest.mark.parametrize("text", ["ClsPruner(keep=5)", "DyVTE(exit_layer=2)"])
def test_what_left_is_no_sink(text):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    probe = VisualSinks(sink_dims=(2, 7), tau=0.01, layers=(3,))
    records = records_of(model, inputs, parse_method(text), probe)
    left = 5 if "Cls" in text else 0
    for record, images in zip(records, (2, 1), strict=True):
        assert sum(len(found) for found in record["sinks"][0]) == left * images


def test_models_without_known_dimensions_are_refused():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(UnsupportedModel, match=r"no sink dimensions are known.*calibrate sink-dims"),
        attach(model, VisualSinks()),
    ):
        pass


def test_a_tau_that_nothing_reaches_is_refused():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(UnsupportedModel, match="phi never exceeds"),
        attach(model, VisualSinks(sink_dims=(2,), tau=100)),
    ):
        pass


@pytest.mark.parametrize(
    "wrong", [{"tau": 0}, {"sink_dims": ()}, {"sink_dims": (-1,)}, {"layers": (-1,)}]
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VisualSinks(**wrong)


def test_a_dimension_that_is_not_there_is_refused():
    model, _ = tiny.shared("llava")
    width = mmlm.Anatomy(model).width
    for dimension in (width, 9999):
        with (
            pytest.raises(ValueError, match="VisualSinks: sink_dims must be below"),
            attach(model, VisualSinks(sink_dims=(dimension,), tau=2.0)),
        ):
            pass
    with attach(model, VisualSinks(sink_dims=(width - 1,), tau=2.0)):
        pass
