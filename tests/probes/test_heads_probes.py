"""RetrievalHeads and VisualHeads: a wired model, the rows they see, records, refusals."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn

from decoding.pai import PAI
from mmlm import Anatomy, RetrievalHeads, VisualHeads, attach, measured, parse_method
from mmlm.engine.head_scores import RegionCounts, find_needle, retrieval_scores
from mmlm.errors import InputError
from mmlm.probes.visual_heads import _tokens_of, scored

A, B, C, D = 30, 31, 32, 33
"""Tokens of the wired model: A is followed by B, B by C, C by D."""
AT = {A: 2, B: 3, C: 6, D: 7}
"""Their dimensions: those of a head that rotary positions hardly turn."""
REGION = (3, 4)
PROMPTS = ["describe the image in detail .", "is there a dog ?", "what is shown here now ?"]
PICTURES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)], [tiny.picture(4)]]


class _Seen(nn.Module):
    """A projector whose features are zero but for those of the region, which look like B."""

    def forward(self, states):
        features = states.new_zeros(*states.shape[:2], 64)
        features[..., 40] = 1  # neither B nor nothing, which has no norm
        features[:, list(REGION), 40] = 0
        features[:, list(REGION), AT[B]] = 1
        return features


@pytest.fixture(scope="module")
def wired():
    """One layer; head 0 looks at the token that comes next, and writes it; others at everything."""
    model, processor = tiny.build("llava", layers=1)
    model.model.multi_modal_projector = _Seen()
    layer = model.get_decoder().layers[0]
    attention = layer.self_attn
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words.zero_()
        words[:, 41] = 1
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, dim in AT.items():
            words[token] = 0
            words[token, dim] = 1
            attention.k_proj.weight[dim, dim] = 1
            attention.v_proj.weight[dim, dim] = 1
            attention.o_proj.weight[dim, dim] = 9  # more than what the token itself is
            model.lm_head.weight[token, dim] = 1
        for token, following in ((A, B), (B, C), (C, D)):
            attention.q_proj.weight[AT[following], AT[token]] = 4
    return model, processor


def answers(model, inputs, probe, n=3):
    with attach(model, probe):
        new = model.generate(
            **inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=1
        )
        found = [record[probe.measures] for record in measured(model)]
        return new[:, inputs["input_ids"].shape[1] :], found


def test_probes_acceptance_4_a_head_that_copies_has_score_1_and_another_0(wired):
    model, _ = wired
    ids = torch.tensor([[1, 2, 50, B, C, D, 51, A], [2, 50, 51, 52, B, C, D, A]])
    mask = torch.tensor([[0] + [1] * 7, [1] * 8])  # the first row is padded
    new, records = answers(model, {"input_ids": ids, "attention_mask": mask}, RetrievalHeads())
    assert new.tolist() == [[B, C, D]] * 2
    for row, record in enumerate(records):
        prompt = ids[row][mask[row] > 0]
        span = find_needle(prompt.tolist(), [B, C, D])
        peaks = torch.tensor(record["peaks"])
        score, once = retrieval_scores(peaks, prompt, span, new[row])
        assert score[0, :2].tolist() == once[0, :2].tolist() == [1.0, 0.0]
        # Where it looks: at the needle, token by token.
        assert peaks[:, 0, 0].tolist() == list(range(*span))


def test_probes_acceptance_4_a_head_that_looks_at_the_region_has_hit_rate_1(wired):
    model, processor = wired
    inputs = tiny.inputs(processor, ["a"], [[tiny.picture(1)]])
    last = torch.full((1, 1), A)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], last], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    probe = VisualHeads(regions=((REGION, (0, 1, 2)),), steps=True)
    new, (record,) = answers(model, inputs, probe, n=1)
    assert new.tolist() == [[B]]
    values = RegionCounts.of(scored(record, [(0, 0)])).values()
    assert values["hit_rate"][0, :2].tolist() == [1.0, 0.0]
    assert values["focus"][0, 0] > 0.99 * record["image_tokens"] / len(REGION)
    assert values["focus"][0, 1] == pytest.approx(1)  # even attention
    elsewhere = RegionCounts.of(scored(record, [(0, 1)])).values()
    assert elsewhere["hit_rate"][0, 0] == 0
    assert values["mass"][0, 0] > 0.9
    assert elsewhere["mass"][0, 0] < 0.01


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_probes_acceptance_5_rows_are_those_of_eager_attention(family):
    model, processor = tiny.build(family)
    model.set_attn_implementation("eager")
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    plain = model.generate(
        **inputs, **options, output_attentions=True, return_dict_in_generate=True
    )
    image = torch.isin(
        inputs["input_ids"], inputs["input_ids"].new_tensor(Anatomy(model).image_ids)
    )
    regions = (((0, 2),), ((1, 3),), ((0,),))
    with attach(model, VisualHeads(regions=regions, steps=True), RetrievalHeads()):
        model.generate(**inputs, **options)
        records = measured(model)
    first = inputs["attention_mask"].argmax(-1)
    for row, record in enumerate(records):
        seen, copied = record["visual_heads"], record["retrieval_heads"]
        where = image[row].nonzero()[:, 0]
        for step, attentions in enumerate(plain.attentions):
            rows = torch.stack([a[row, :, -1] for a in attentions])  # [N_l, H, K]
            peaks = rows.argmax(-1)
            assert copied["peaks"][step] == (peaks - first[row]).tolist()
            mass = rows[..., where].sum(-1)
            torch.testing.assert_close(torch.tensor(seen["masses"][step]), mass, atol=1e-6, rtol=0)
            part = rows[..., where[list(regions[row][0])]].sum(-1)
            got = torch.tensor(seen["region_masses"][step])[..., 0]
            torch.testing.assert_close(got, part, atol=1e-6, rtol=0)
            number = torch.where(
                torch.isin(peaks, where), torch.searchsorted(where, peaks.contiguous()), -1
            )
            assert seen["peaks"][step] == number.tolist()


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_probes_acceptance_5_a_padded_batch_is_its_rows(family):
    model, processor = tiny.shared(family)
    together = tiny.inputs(processor, PROMPTS, PICTURES)
    assert (together["attention_mask"] == 0).any()
    for text in ("VisualHeads(steps=True)", "RetrievalHeads()"):
        probe = parse_method(text)
        new, records = answers(model, together, probe)
        for row, record in enumerate(records):
            alone = tiny.inputs(processor, PROMPTS[row : row + 1], PICTURES[row : row + 1])
            same, (own,) = answers(model, alone, probe)
            assert torch.equal(same[0], new[row])
            assert record["peaks"] == own["peaks"]
            for name in {"looks", "mass"} & set(own):
                torch.testing.assert_close(torch.tensor(record[name]), torch.tensor(own[name]))


def answers_of(records, name):
    return [record[name] for record in records]


def test_edits_of_other_methods_are_seen():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[1:2], PICTURES[1:2])
    masses = []
    for methods in ((), (PAI(alpha=2.0),)):
        with attach(model, *methods, VisualHeads()):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            masses.append(torch.tensor(measured(model)[0]["visual_heads"]["mass"]))
    assert masses[1].mean() > masses[0].mean()


def test_means_are_over_the_tokens_that_count():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:2], PICTURES[:2])
    with attach(model, VisualHeads(steps=True)):
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        records = answers_of(measured(model, [4, 2]), "visual_heads")
    assert [r["tokens"] for r in records] == [4, 2] == [len(r["peaks"]) for r in records]
    for r in records:
        expected = torch.tensor(r["masses"]).mean(0)
        torch.testing.assert_close(torch.tensor(r["mass"]), expected)
        looks = (torch.tensor(r["peaks"]) >= 0).float().mean(0)
        torch.testing.assert_close(torch.tensor(r["looks"]), looks)


def test_no_more_tokens_are_measured_than_count_and_ran():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:2], PICTURES[:2])
    with attach(model, VisualHeads(steps=True), RetrievalHeads()):
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        records = measured(model, [9, 1])
    seen, copied = (answers_of(records, name) for name in ("visual_heads", "retrieval_heads"))
    assert [r["tokens"] for r in seen] == [2, 1]
    assert [len(r["peaks"]) for r in seen] == [len(r["peaks"]) for r in copied] == [2, 1]


def test_a_look_at_a_new_token_is_none_at_an_image_that_ends_the_prompt():
    number = torch.tensor([[-1, 0, 1]])
    peaks = torch.tensor([0, 2, 3, 7])[:, None, None, None]
    assert _tokens_of(peaks, number).flatten().tolist() == [-1, 1, -1, -1]


def test_beams_and_copies_repeat_the_regions():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[1:], PICTURES[1:])
    probe = VisualHeads(regions=(((0, 1),), ((2,), (3, 4))))
    with attach(model, probe):
        model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
        records = answers_of(measured(model), "visual_heads")
    assert [r["regions"] for r in records] == [[[0, 1]]] * 2 + [[[2], [3, 4]]] * 2


def test_a_second_turn_begins_anew():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], PICTURES[:1])
    more = torch.tensor([[5, 6, 7]])
    with attach(model, VisualHeads(steps=True), RetrievalHeads()), torch.inference_mode():
        n = inputs["input_ids"].shape[1]
        cache = model(**inputs, use_cache=True).past_key_values
        model(
            input_ids=more,
            attention_mask=torch.ones(1, n + 3, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
        )
        (record,) = measured(model)
    assert record["visual_heads"]["tokens"] == len(record["retrieval_heads"]["peaks"]) == 1


# ---- errors ----


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("VisualHeads(layers=())", "layers must be a non-empty list"),
        ("VisualHeads(regions=3)", "regions must be"),
        ("VisualHeads(regions=(((),),))", "regions must be a non-empty list"),
        ("VisualHeads(regions=(((1, 1),),))", "must be different"),
        ("VisualHeads(steps=2)", "steps must be one of"),
        ("RetrievalHeads(layers=(-1,))", "must be different and >= 0"),
    ],
)
def test_what_is_out_of_range_is_named(text, match):
    with pytest.raises((ValueError, InputError), match=match):
        parse_method(text)


@pytest.mark.parametrize("cls", [VisualHeads, RetrievalHeads])
def test_layers_must_exist(cls):
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match="layer 4 does not exist"), attach(model, cls(layers=(4,))):
        pass


@pytest.mark.parametrize(
    ("regions", "match"),
    [
        ((((0,),),), "regions of 1 rows were given for 2 prompts"),
        ((((99,),), ()), "image token 99"),
        ((((32,),), ()), "image token 32; prompt 0 has 32"),
    ],
)
def test_regions_must_fit_the_prompts(regions, match):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:2], PICTURES[:2])
    with attach(model, VisualHeads(regions=regions)), pytest.raises(InputError, match=match):
        model.generate(**inputs, max_new_tokens=1)


def test_scored_words_need_steps_and_regions():
    record = {"tokens": 2, "regions": [[0]], "image_tokens": 4}
    with pytest.raises(ValueError, match="means only"):
        scored(record, [(0, 0)])
    full = record | {
        "peaks": [[[0]], [[3]]],
        "masses": [[[0.5]], [[0.25]]],
        "region_masses": [[[[0.125]]], [[[0.0]]]],
    }
    found = scored(full, [(1, 0), (0, 0)])
    assert [bool(one.hit) for one in found] == [False, True]
    assert all(bool(one.looks) for one in found)
    assert [float(one.mass) for one in found] == [0, 0.125]
    assert [float(one.image_mass) for one in found] == [0.25, 0.5]
    for word in ((2, 0), (0, 1), (-1, 0)):
        with pytest.raises(ValueError, match="there is no token"):
            scored(full, [word])


def test_a_row_without_an_image_has_no_looks():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, ["what is this ?"], [[]])
    _, (record,) = answers(model, inputs, VisualHeads(steps=True))
    assert record["image_tokens"] == 0
    assert math.fsum(map(sum, record["looks"])) == 0
