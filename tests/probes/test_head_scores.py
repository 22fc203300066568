"""Scores of retrieval heads and visual heads, and maps of heads: golden vectors, by hand, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden import arrays, golden

from mmlm.engine.head_maps import HeadMap, random_heads
from mmlm.engine.head_scores import (
    Region,
    RegionCounts,
    find_needle,
    retrieval_hits,
    retrieval_scores,
)
from mmlm.engine.selections import by_layer


def regions(rows, span, boxes):
    """Every scored step of a run, written plainly."""
    start, end = span
    image = rows[..., start:end]
    for step in range(len(rows)):
        where = boxes[step]
        if where.any():
            peak = rows[step].argmax(-1) - start
            looks = (peak >= 0) & (peak < end - start)
            hit = looks & where[peak.clamp(0, end - start - 1)]
            yield Region(
                int(where.sum()),
                end - start,
                hit,
                looks,
                image[step][..., where].sum(-1),
                image[step].sum(-1),
            )


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("retrieval_head/retrieval_*.npz"))
def test_probes_acceptance_1_retrieval_scores_are_the_authors(path):
    data = arrays(path)
    span = tuple(data["needle_span"].tolist())
    peaks = data["rows"].argmax(-1)
    score, once = retrieval_scores(peaks, data["prompt_ids"], span, data["generated_ids"])
    torch.testing.assert_close(score, data["score"], atol=1e-9, rtol=0)
    assert once.max() <= 1
    assert (once <= score + 1e-12).all()


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("retrieval_head/visual_*.npz"))
def test_probes_acceptance_2_visual_scores_are_the_authors(path):
    data = arrays(path)
    found = RegionCounts.of(regions(data["rows"], data["visual_span"].tolist(), data["boxes"]))
    values = found.values()
    torch.testing.assert_close(values["authors"], data["score"], atol=1e-9, rtol=0)
    assert found.steps == int(data["boxes"].any(-1).sum())
    assert values["hit_rate"].min() >= 0
    assert values["hit_rate"].max() <= 1
    assert (values["hit_rate"] <= values["looks"]).all()


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("retrieval_head/needle_span_*.json"))
def test_probes_acceptance_3_needles_are_found_exactly_or_not_at_all(path):
    cases = json.loads(path.read_text())
    found = 0
    for case in cases:
        span = tuple(case["true_span"])
        prompt, needle = case["prompt_ids"], case["needle_ids"]
        if prompt[span[0] : span[1]] == needle:
            assert find_needle(prompt, needle) == span
            found += 1
        else:
            with pytest.raises(ValueError, match="do not stand in the"):
                find_needle(prompt, needle)
    assert 0 < found <= len(cases)


def test_retrieval_by_hand():
    prompt = torch.tensor([9, 5, 6, 9, 5])
    peaks = torch.tensor([[[1, 4]], [[2, 2]], [[1, 7]]])  # 3 steps, 1 layer, 2 heads
    produced = torch.tensor([5, 6, 5])
    hits = retrieval_hits(peaks, prompt, (1, 3), produced)
    # The second head finds the right word outside of the needle first, and a new token last.
    assert hits[:, 0].tolist() == [[True, False], [True, True], [True, False]]
    score, once = retrieval_scores(peaks, prompt, (1, 3), produced)
    assert score.tolist() == [[1.5, 0.5]]
    assert once.tolist() == [[1.0, 0.5]]
    # Right behind the needle is outside.
    behind = retrieval_hits(torch.tensor([[[3, 0]]]), prompt, (1, 3), torch.tensor([9]))
    assert behind.tolist() == [[[False, False]]]


def test_needles_at_both_ends_and_none():
    assert find_needle([1, 2, 3], [1, 2, 3]) == (0, 3)
    assert find_needle([1, 2, 3], [3]) == (2, 3)
    for needle in ([], [1, 2, 3, 4], [3, 2]):
        with pytest.raises(ValueError, match="do not stand"):
            find_needle([1, 2, 3], needle)


def one(size, hit, looks, mass, image_mass):
    return Region(
        size,
        8,
        torch.tensor([[hit]]),
        torch.tensor([[looks]]),
        torch.tensor([[mass]]),
        torch.tensor([[image_mass]]),
    )


def test_regions_by_hand():
    steps = [one(2, True, True, 0.2, 0.4), one(4, False, False, 0.0, 0.0)]
    values = {k: float(v) for k, v in RegionCounts.of(steps).values().items()}
    assert values == pytest.approx(
        {
            "hit_rate": 0.5,
            "hit_excess": 0.5 - (2 / 8 + 4 / 8) / 2,
            "mass": 0.1,
            "focus": (0.2 / 0.4) / (2 / 8),  # the other step had nothing on the image
            "looks": 0.5,
            "authors": 0.5,
        }
    )


def test_even_attention_has_focus_1_and_a_random_look_no_excess():
    steps = [one(2, k < 2, True, 0.1, 0.4) for k in range(8)]
    values = RegionCounts.of(steps).values()
    assert float(values["focus"]) == pytest.approx(1)
    assert float(values["hit_excess"]) == pytest.approx(0)


def test_counts_of_pictures_add_up():
    steps = [one(2, True, True, 0.2, 0.4), one(4, False, True, 0.3, 0.6), one(1, True, True, 0, 0)]
    whole = RegionCounts.of(steps).values()
    parts = RegionCounts.of(steps[:1]).add(RegionCounts.of(steps[1:])).values()
    for name, value in whole.items():
        assert torch.equal(value, parts[name])


def test_no_scored_step_is_an_error():
    with pytest.raises(ValueError, match="whose place is known"):
        RegionCounts().values()


# ---- maps ----


def head_map(score, **others):
    return HeadMap(kind="text", values={"set_score": score, **others}, rank="set_score")


def test_probes_acceptance_15_maps_survive_a_file(tmp_path):
    score = torch.rand(3, 4, dtype=torch.float64)
    odd = torch.full((3, 4), math.nan, dtype=torch.float64)
    odd[1, 2] = 0.1
    before = HeadMap(
        kind="visual",
        values={"hit_rate": score, "focus": odd},
        rank="hit_rate",
        threshold=0.2,
        counted={"steps": 60},
        facts={"model": "embedded", "seed": 3},
    )
    before.save(tmp_path / "heads.json")
    after = HeadMap.load(tmp_path / "heads.json")
    for name, value in before.values.items():
        assert torch.equal(after.values[name].nan_to_num(7), value.nan_to_num(7))
    assert after.as_json() == before.as_json()
    assert (after.heads, after.few, after.shape) == (before.heads, False, (3, 4))


def test_heads_are_above_the_threshold_and_above_chance():
    score = torch.tensor([[0.05, 0.3], [0.2, 0.9]], dtype=torch.float64)
    assert head_map(score).heads == ((1, 1), (0, 1), (1, 0))
    assert head_map(score, hit_excess=score - 0.25).heads == ((1, 1), (0, 1))
    assert head_map(score * 0).heads == ()


def test_at_the_threshold_and_at_chance_is_not_above():
    score = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    assert head_map(score).heads == ((0, 2), (0, 1))
    assert head_map(score, hit_excess=score - 0.2).heads == ((0, 2),)


def test_fewer_than_fifty_steps_are_few():
    score = torch.rand(2, 2, dtype=torch.float64)
    found = [
        HeadMap(kind="text", values={"s": score}, rank="s", counted={"steps": n}) for n in (49, 50)
    ]
    assert [one.few for one in found] == [True, False]


def test_one_head_without_a_number_cannot_be_ranked():
    score = torch.tensor([[0.1, math.nan]], dtype=torch.float64)
    with pytest.raises(ValueError, match="no head was measured"):
        head_map(score).top(1)


def test_top_ranks_and_refuses():
    found = head_map(torch.tensor([[0.1, 0.3], [0.3, 0.2]], dtype=torch.float64))
    assert found.top(3) == ((0, 1), (1, 0), (1, 1))  # of equal heads the first
    for k in (0, 5):
        with pytest.raises(ValueError, match="of 2 x 2; give 1 to 4"):
            found.top(k)
    assert (found.fraction(0.01), found.fraction(0.5)) == (1, 2)


def test_nothing_counted_is_no_number_and_ranks_nothing(tmp_path):
    empty = head_map(torch.full((2, 2), math.nan, dtype=torch.float64))
    assert empty.heads == ()
    with pytest.raises(ValueError, match="no sample counted"):
        empty.top(1)
    empty.save(tmp_path / "empty.json")
    assert HeadMap.load(tmp_path / "empty.json").score.isnan().all()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}'])
def test_damaged_files_are_refused(text, tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no map of heads"):
        HeadMap.load(path)
    with pytest.raises(ValueError, match="there is no file"):
        HeadMap.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2, 3]}, "values of another shape"),
        ({"rank": "score"}, "the ranked value is missing"),
    ],
)
def test_files_that_contradict_themselves_are_refused(change, message, tmp_path):
    path = tmp_path / "heads.json"
    head_map(torch.rand(2, 2, dtype=torch.float64)).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"is no map of heads .{message}"):
        HeadMap.load(path)


def test_files_of_another_format_are_refused(tmp_path):
    path = tmp_path / "heads.json"
    head_map(torch.rand(2, 2, dtype=torch.float64)).save(path)
    path.write_text(path.read_text().replace("mmlm head map 1", "mmlm head map 2"))
    with pytest.raises(ValueError, match="another format"):
        HeadMap.load(path)


def test_probes_acceptance_8_random_heads_are_others_of_the_same_layers():
    score = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)).double()
    top = head_map(score).top(80)
    seen = set()
    for seed in range(40):
        drawn = random_heads(top, (40, 40), seed)
        assert drawn == random_heads(top, (40, 40), seed)
        assert not set(drawn) & set(top)
        assert len(set(drawn)) == 80
        counts = {layer: len(heads) for layer, heads in by_layer(drawn)}
        assert counts == {layer: len(heads) for layer, heads in by_layer(top)}
        seen |= set(drawn)
    assert {layer for layer, _ in seen} == {layer for layer, _ in top}
    assert {head for _, head in seen} == set(range(40))  # also those from 32 on
    assert max(layer for layer, _ in seen) >= 32
    assert random_heads(top, (40, 40), 0) != random_heads(top, (40, 40), 1)


def test_random_heads_need_room():
    with pytest.raises(ValueError, match="too few for a control"):
        random_heads(((1, 0), (1, 1), (1, 2)), (2, 4), 0)
