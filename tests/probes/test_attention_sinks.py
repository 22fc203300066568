"""AttentionSinks: the authors' numbers, an eager pass, pictures' places, answers, refusals."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from golden import arrays, golden
from shapes import assert_no_square, record_shapes

import mmlm
from mmlm import AttentionSinks, attach, measured, parse_method
from mmlm.engine.column_means import Columns, causal_baseline, sink_percent, sink_set
from mmlm.errors import IncompatibleMethods
from mmlm.probes.attention_sinks import REGIONS, agreement

PROMPTS = ["describe the image in detail .", "is there a dog ?"]
PICTURES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)]]
#: Random tiny models have no strong sinks: thresholds at which some keys are some.
PROBE = AttentionSinks(eps=0.05, factor=1.3)
SINKS = {"eps": 0.3, "factor": 10.0, "min_queries": 8}


def in_chunks(a, size):
    """Sums over all rows of whole matrices, handed on as the engine does it."""
    parts = a.split(size, dim=2)
    columns = [Columns.of(p, torch.ones(len(p), p.shape[2], dtype=torch.bool)) for p in parts]
    return sum(columns[1:], columns[0])


def causal(n, heads=1, seed=0):
    scores = torch.randn(1, heads, n, n, generator=torch.Generator().manual_seed(seed))
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def naive(a, real, img, probe):
    """One layer of one row by loops: a [H, N, N], real and img [N]."""
    own = [i for i, there in enumerate(real) if there]
    first_sinks, counts = [], []
    masses = {"first": [], "text": [], "image": []}
    for head in a:
        marks, taken = [], dict.fromkeys(masses, 0.0)
        for k, key in enumerate(own):
            seeing = [q for q in own if float(a[:, q, key].max()) > 0]
            alpha = sum(float(head[q, key]) for q in seeing) / len(seeing)
            even = sum(1 / int((a[:, q].amax(0) > 0).sum()) for q in seeing) / len(seeing)
            if k == 0:
                first_sinks.append(alpha)
            sink = alpha > probe.eps or alpha > probe.factor * even
            if not (sink and len(seeing) >= probe.min_queries):
                continue
            region = "first" if k == 0 else ("image" if img[key] >= 0 else "text")
            taken[region] += sum(float(head[q, key]) for q in own) / len(own)
            if region == "image":
                marks.append(key)
        counts.append(marks)
        for region, value in taken.items():
            masses[region].append(value)
    return first_sinks, counts, masses


def records_of(model, inputs, *methods, new=4, tokens=None):
    with attach(model, *methods):
        model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return [row["attention_sinks"] for row in measured(model, tokens)]


# ---- the authors' metric ----------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("attention_sink/sink_*.npz"))
def test_probes_acceptance_9_golden(path):
    data = arrays(path)
    samples, layers, heads, n, _ = data["attn"].shape
    columns = in_chunks(data["attn"].flatten(0, 1), 5)
    means = columns.means.view(samples, layers, heads, n)
    assert torch.allclose(means, data["importance"].float(), rtol=0, atol=1e-6)
    for eps, expected in zip(data["epsilon"].tolist(), data["sink_percent"], strict=True):
        found = sink_percent(means, eps)
        assert torch.allclose(found, expected.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 12, 64])
def test_probes_acceptance_9_even_attention_has_no_sinks(n):
    even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    columns = in_chunks(even.expand(2, 3, n, n), 7)
    excess = columns.means / columns.baseline[:, None]
    assert torch.allclose(excess, torch.ones_like(excess), rtol=0, atol=1e-6)
    assert torch.allclose(columns.baseline[0].double(), causal_baseline(n), rtol=0, atol=1e-6)
    assert torch.equal(columns.queries[0], torch.arange(n, 0, -1).float())


def test_the_first_key_of_even_attention():
    assert float(causal_baseline(64)[0]) == pytest.approx(0.074, abs=5e-4)
    assert float(causal_baseline(12)[0]) == pytest.approx(0.26, abs=2e-3)
    assert causal_baseline(2).tolist() == [0.75, 0.5]


def test_probes_acceptance_9_a_planted_key():
    n, key = 64, 20
    even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    even[key:] *= 0.5
    even[key:, key] = 0
    even[key:, key] = 0.5
    even[key:, 0] += 1 - even[key:].sum(-1)  # what the key had before
    columns = in_chunks(even[None, None], 64)
    assert float(columns.means[0, 0, key]) == pytest.approx(0.5)
    found = sink_set(columns.means, columns.baseline[:, None], columns.queries[:, None], **SINKS)
    assert found[0, 0].nonzero()[:, 0].tolist() == [key]


def test_probes_acceptance_9_the_last_keys_never():
    n = 40
    own = torch.eye(n)[None, None]  # every query looks at itself alone: the last mean is 1
    own = own * 0.999 + 0.001 * torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    columns = in_chunks(own, n)
    found = sink_set(
        columns.means,
        columns.baseline[:, None],
        columns.queries[:, None],
        eps=0.01,
        factor=1.001,
        min_queries=8,
    )
    assert found[0, 0, -8]
    assert not found[0, 0, -7:].any()


def test_sinks_relative_to_an_even_share():
    n, key = 400, 100
    a = causal(n) * 0.9
    a[..., key:, key] += 0.1
    columns = in_chunks(a, 64)
    found = sink_set(columns.means, columns.baseline[:, None], columns.queries[:, None], **SINKS)
    assert float(columns.means[0, 0, key]) < 0.3
    assert found[0, 0].nonzero()[:, 0].tolist() == [key]


def test_windows_and_padding_are_read_from_the_rows():
    n, window, pad = 30, 6, 4
    seen = torch.ones(n, n).tril() - torch.ones(n, n).tril(-window)
    seen[:, :pad] = 0
    even = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    even[:pad] = 1 / n  # a row of padding sees nothing, so that it becomes uniform
    counted = (torch.arange(n) >= pad)[None]
    columns = Columns.of(even[None, None], counted)
    assert columns.queries[0].tolist() == [0] * pad + [6] * (n - pad - 5) + [5, 4, 3, 2, 1]
    excess = (columns.means[0] / columns.baseline)[0, pad:]
    assert torch.allclose(excess, torch.ones(n - pad))
    assert float(columns.rows) == n - pad
    assert float(columns.shares.sum()) == pytest.approx(1)


def test_a_mean_at_the_bound_is_not_above_it():
    means = torch.tensor([[0.25, 0.5]])
    assert sink_percent(means, 0.25).tolist() == [0, 100]
    given = {"baseline": torch.zeros(1, 2) + 1, "queries": torch.full((1, 2), 8)}
    found = sink_set(means, **given, eps=0.25, factor=10.0, min_queries=8)
    assert found.tolist() == [[False, True]]


def test_a_weight_that_vanished_in_one_head_is_not_masked():
    a = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.5]]]])  # the first head's first weight is too small
    columns = Columns.of(a, torch.ones(1, 1, dtype=torch.bool))
    assert columns.queries.tolist() == [[1, 1]]
    assert columns.even.tolist() == [[0.5, 0.5]]
    assert columns.means[0].tolist() == [[0, 1], [0.5, 0.5]]


# ---- on models --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_eager_pass_gives_the_same(family):
    model, processor = tiny.build(family)
    model.set_attn_implementation("eager")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    with torch.inference_mode():
        out = model(**inputs, output_attentions=True)
    visual = torch.isin(inputs["input_ids"], torch.tensor(mmlm.Anatomy(model).image_ids))
    real = inputs["attention_mask"].bool()
    for row, record in enumerate(records_of(model, inputs, PROBE)):
        assert record["queries"] == int(real[row].sum())
        assert sum(record["keys"]) == int(visual[row].sum())
        own = visual[row].nonzero()[:, 0].tolist()
        for number, layer in enumerate(record["layers"]):
            a = out.attentions[layer][row].float()
            img = torch.where(visual[row], 0, -1)
            means, marks, masses = naive(a, real[row].tolist(), img.tolist(), PROBE)
            assert record["map"][number] == pytest.approx(means, abs=1e-5)
            assert record["profile"][number] == sum(m > 0.05 for m in means) / len(means)
            for eps in ("0.1", "0.2", "0.3"):
                above = sum(m > float(eps) for m in means) / len(means)
                assert record["first_above"][eps][number] == above
            assert record["image_map"][number] == [len(keys) for keys in marks]
            for region, expected in masses.items():
                assert record[f"{region}_mass"][number] == pytest.approx(expected, abs=1e-5)
            expected = {}
            for keys in marks:
                for key in keys:
                    expected[own.index(key)] = expected.get(own.index(key), 0) + 1
            found, start = {}, 0
            for pairs, size in zip(record["sinks"][number], record["keys"], strict=True):
                found |= {start + k: heads for k, heads in pairs}
                start += size
            assert found == expected
        assert sum(map(sum, record["image_map"]))  # the thresholds find some


def test_the_rate_is_the_papers_number():
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    inputs = tiny.inputs(processor, PROMPTS[:1], PICTURES[:1])
    with torch.inference_mode():
        out = model(**inputs, output_attentions=True)
    (record,) = records_of(model, inputs, PROBE)
    a = torch.stack(out.attentions)[:, 0]
    n = a.shape[-1]
    means = a.sum(2) / torch.arange(n, 0, -1)
    expected = (means[..., :10] > 0.05).float().mean((0, 1)) * 100
    assert record["rate"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert 0 < expected.max()
    assert expected.min() < 100


def test_positions_are_sinks_of_many_heads():
    model, processor = tiny.shared("llava")
    (record,) = records_of(model, tiny.inputs(processor, PROMPTS[:1], PICTURES[:1]), PROBE)
    heads = {}
    for layer in record["sinks"]:
        for image, pairs in enumerate(layer):
            for number, count in pairs:
                heads[image, number] = heads.get((image, number), 0) + count
    often = {place for place, count in heads.items() if count >= 0.25 * 4 * 8}
    assert {(i, k) for i, found in enumerate(record["positions"]) for k in found} == often
    assert often
    assert len(often) < len(heads)


def test_probes_acceptance_10_padding_and_batches_change_nothing():
    model, processor = tiny.shared("llava")
    prompts, pictures = [*PROMPTS, "what is this ?"], [*PICTURES, []]
    together = records_of(model, tiny.inputs(processor, prompts, pictures), PROBE)
    for row, (prompt, own) in enumerate(zip(prompts, pictures, strict=True)):
        (alone,) = records_of(model, tiny.inputs(processor, [prompt], [own]), PROBE)
        assert alone.keys() == together[row].keys()
        for name, value in alone.items():
            if name == "map" or name.endswith("_mass"):
                found = torch.tensor(together[row][name])
                assert torch.allclose(found, torch.tensor(value), rtol=0, atol=1e-6)
            else:
                assert together[row][name] == value, name


@pytest.mark.slow
def test_probes_acceptance_10_long_prompts_need_no_square():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, ["what is shown here ? " * 580], [[tiny.picture(1)]])
    n = inputs["input_ids"].shape[1]
    assert n >= 4096
    with torch.no_grad(), attach(model, AttentionSinks(layers=(1,))), record_shapes() as shapes:
        model(**inputs)
        record = measured(model)[0]["attention_sinks"]
    assert record["queries"] == n
    assert_no_square(shapes, 2048)


def test_generated_tokens_as_queries():
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    probe = AttentionSinks(queries="generated", eps=0.05, factor=1.3, min_queries=2)
    with attach(model, probe):
        out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        records = measured(model, [5, 3])
    with torch.inference_mode():
        whole = {**inputs, "input_ids": out}
        whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, 5).long()], 1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            whole.pop(name, None)
        attentions = model(**whole, output_attentions=True).attentions
    n = inputs["input_ids"].shape[1]
    for row, (record, tokens) in enumerate(
        zip(map(dict, [r["attention_sinks"] for r in records]), (5, 3), strict=True)
    ):
        assert record["queries"] == tokens - 1
        first = int(inputs["attention_mask"][row].argmax())
        for number in range(4):
            a = attentions[number][row, :, n : n + tokens - 1]
            assert record["map"][number] == pytest.approx(a[..., first].mean(1).tolist(), abs=1e-5)
        above = torch.stack(
            [x[row, :, n : n + tokens - 1, first : first + 10].mean(1) for x in attentions]
        )
        expected = (above > 0.05).double().mean((0, 1)) * 100
        assert record["rate"] == pytest.approx(expected.tolist())


def test_a_picture_that_comes_first_gives_its_first_token_away():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[1:], PICTURES[1:])
    image = torch.isin(inputs["input_ids"][0], torch.tensor(mmlm.Anatomy(model).image_ids))
    start = int(image.int().argmax())
    for name in ("input_ids", "attention_mask"):
        inputs[name] = inputs[name][:, start:]
    with attach(model, AttentionSinks(eps=1e-6, min_queries=1)), torch.inference_mode():
        model(**inputs)
        (record,) = [row["attention_sinks"] for row in measured(model)]
    for (pairs,) in record["sinks"]:
        assert [number for number, _ in pairs] == list(range(1, record["keys"][0]))
    for parts in zip(*(record[f"{name}_mass"] for name in REGIONS), strict=True):
        assert sum(map(torch.tensor, parts)).tolist() == pytest.approx([1.0] * 8, abs=1e-5)


def test_a_second_answer_begins_anew():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[1:], PICTURES[1:])
    seen, queries = inputs["input_ids"].shape[1], []
    with attach(model, AttentionSinks(queries="generated")), torch.inference_mode():
        cache = model(**inputs, use_cache=True).past_key_values
        for new in (1, 3, 1):  # a token of the answer, another question, a token of its answer
            seen += new
            model(
                input_ids=torch.full((1, new), 5),
                attention_mask=torch.ones(1, seen, dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
            )
            queries.append(measured(model)[0]["attention_sinks"]["queries"])
    assert queries == [1, 0, 1]


def test_an_answer_of_one_token_has_no_query():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    probe = AttentionSinks(queries="generated")
    long, short = records_of(model, inputs, probe, tokens=[4, 1])
    assert (long["queries"], short["queries"]) == (3, 0)
    assert "map" in long
    assert "map" not in short
    alone = records_of(model, inputs, probe, new=1)
    assert [record["queries"] for record in alone] == [0, 0]


def test_features_that_do_not_enter_are_no_sinks():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    records = records_of(model, inputs, parse_method("ClsPruner(keep=5)"), AttentionSinks(eps=1e-6))
    for record, images in zip(records, (2, 1), strict=True):
        assert len(record["keys"]) == images
        assert min(record["keys"]) > 5
        for layer in record["sinks"]:
            assert [len(pairs) for pairs in layer] == [5] * images
            assert all(
                number < size
                for pairs, size in zip(layer, record["keys"], strict=True)
                for number, _ in pairs
            )


def test_an_edited_row_is_what_is_seen():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    probe = AttentionSinks(queries="generated", eps=0.05, layers=(3,), min_queries=2)
    plain = records_of(model, inputs, probe)
    edited = records_of(model, inputs, parse_method("PAI(alpha=5.0)"), probe)
    assert plain[0]["map"] != edited[0]["map"]


def test_layers_are_chosen():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    every = records_of(model, inputs, PROBE)
    some = records_of(model, inputs, AttentionSinks(eps=0.05, factor=1.3, layers=(3, 1)))
    for one, all_of_them in zip(some, every, strict=True):
        assert one["layers"] == [1, 3]
        for name in ("map", "sinks", "image_map", "profile", "text_mass"):
            assert one[name] == [all_of_them[name][1], all_of_them[name][3]]


def test_agreement_with_hidden_states():
    attention = {"layers": [1, 2], "sinks": [[[[0, 3], [4, 1]]], [[[4, 2]]]]}
    states = {"layers": [0, 2, 1], "sinks": [[[9]], [[4]], [[0]]]}
    assert agreement(attention, states) == 5 / 6
    assert agreement(attention, {"layers": [0], "sinks": [[[0]]]}) is None
    assert agreement({"layers": [1], "queries": 0}, states) is None


def test_agreement_of_two_records():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    with attach(model, PROBE, mmlm.VisualSinks(sink_dims=(2, 7), tau=1.5, layers=(1, 2, 3))):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        for row in measured(model):
            assert 0 <= agreement(row["attention_sinks"], row["visual_sinks"]) <= 1


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ({"eps": 0.0}, "> 0 and <= 1"),
        ({"eps": 1.0}, "below 1"),
        ({"eps": math.nan}, "> 0"),
        ({"factor": 1.0}, "> 1"),
        ({"min_queries": 0}, ">= 1"),
        ({"queries": "all"}, "'prompt', 'generated'"),
        ({"layers": ()}, "non-empty"),
    ],
)
def test_error_values_out_of_range(wrong, allowed):
    with pytest.raises(ValueError, match=f"(?s){next(iter(wrong))}.*{allowed}"):
        AttentionSinks(**wrong)


def test_error_a_prompt_that_is_too_short():
    model, processor = tiny.shared("llava")
    ids = processor.tokenizer("is it ?", return_tensors="pt").input_ids
    n = ids.shape[1]
    with (
        pytest.raises(
            ValueError, match=rf"has {n} tokens and min_queries is {n}; at least {n + 1}"
        ),
        attach(model, AttentionSinks(min_queries=n)),
    ):
        model(input_ids=ids)
    both = torch.cat([torch.cat([torch.ones_like(ids), ids], 1), ids.repeat(1, 2)])
    mask = torch.tensor([[0] * n + [1] * n, [1] * 2 * n])  # the shorter one is too short
    with (
        attach(model, AttentionSinks(min_queries=n)),
        pytest.raises(ValueError, match=f"has {n} tokens"),
    ):
        model(input_ids=both, attention_mask=mask)
    with attach(model, AttentionSinks(min_queries=n - 1)):
        model(input_ids=ids)
        assert measured(model)[0]["attention_sinks"]["queries"] == n


def test_a_layer_that_is_not_there_is_refused():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match="AttentionSinks: layer 9 does not exist"),
        attach(model, AttentionSinks(layers=(9,))),
    ):
        pass


def test_all_rows_need_all_positions():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(IncompatibleMethods, match=r"attention rows \(weights\) of layer 3, whose"),
        attach(model, AttentionSinks(), parse_method("DyVTE(exit_layer=1)")),
    ):
        pass
