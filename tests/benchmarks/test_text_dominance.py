"""MDI and AEI of stored runs: by hand, against a naive reference, properties, bad input."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest

from benchmarks.base import read_records
from benchmarks.text_dominance import NOTE, rebalanced, score_stored
from benchmarks.text_dominance.records import Masses
from mmlm.engine.stages import stage_layers
from mmlm.errors import InputError

LAYERS = [0, 1, 3, 4, 6, 7]


def record(text, visual, **changes):
    """A record of a model of 8 layers; numbers stand for all six layers."""
    spread = {"text": text, "visual": visual, "instruction": 0.0, "first_token": 0.0}
    lists = {k: v if isinstance(v, list) else [v] * 6 for k, v in (spread | changes).items()}
    fixed = {
        "layers": LAYERS,
        "n_layers": 8,
        "queries": 4,
        "queries_from": "generated",
        "n_text": 10,
        "n_visual": 90,
        "n_instruction": 5,
        "first": "text",
    }
    return (
        fixed
        | {k: v for k, v in lists.items() if k in spread}
        | {k: v for k, v in changes.items() if k in fixed}
    )


def line(number, *arguments, **changes):
    return {
        "id": str(number),
        "image": f"{number}.png",
        "prompt": "what is this ?",
        "text": "a dog",
        "n_tokens": 5,
        "text_dominance": record(*arguments, **changes),
    }


def some_lines(count=12, seed=0):
    draw = random.Random(seed)
    return [
        line(
            number,
            [draw.uniform(0.5, 2) for _ in LAYERS],
            [draw.uniform(0.1, 2) for _ in LAYERS],
            instruction=[draw.uniform(0.1, 0.5) for _ in LAYERS],
            first_token=[draw.uniform(0.1, 0.4) for _ in LAYERS],
            n_text=draw.randint(8, 30),
            n_visual=draw.randint(50, 576),
            queries=draw.randint(1, 50),
            first=draw.choice(["text", "visual"]),
        )
        for number in range(count)
    ]


# ---- numbers ----


def test_by_hand():
    """Two answers; 10 text and 90 visual tokens: uniform attention would be 1 to 9."""
    stored = [line(1, 1.0, 3.0), line(2, [1.0, 1.0, 2.0, 2.0, 1.0, 1.0], 2.0)]
    metrics = score_stored(stored).metrics
    # (1 / 10) / (3 / 90) = 3; (1 / 10) / (2 / 90) = 4.5; (2 / 10) / (2 / 90) = 9
    assert metrics["mdi_early"] == pytest.approx((3 + 4.5) / 2)
    assert metrics["mdi_middle"] == pytest.approx((3 + 9) / 2)
    assert metrics["mdi_late"] == pytest.approx((3 + 4.5) / 2)
    # (1 / 4) / 0.1 = 2.5 and (2 / 4) / 0.1 = 5; (3 / 4) / 0.9 and (2 / 4) / 0.9
    assert metrics["aei_text_middle"] == pytest.approx((2.5 + 5) / 2)
    assert metrics["aei_image_middle"] == pytest.approx((0.75 + 0.5) / 0.9 / 2)
    # Four queries each.
    assert metrics["attention_text_middle"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert metrics["attention_image_early"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert metrics["text_tokens"] == 10
    assert metrics["image_tokens"] == 90


def test_ratio_of_sums_by_hand():
    stored = [line(1, 1.0, 3.0), line(2, 1.0, 1.0, n_visual=10)]
    details = score_stored(stored).details
    assert details["note"] == NOTE
    early = details["variants"]["all"]["early"]
    # Two layers each: A_T = 4, A_O = 8, |T| = 40, |O| = 200.
    assert early["sums"] == {"A_T": 4.0, "A_O": 8.0, "|T|": 40, "|O|": 200}
    assert early["ratio_of_sums"]["mdi"] == pytest.approx((4 / 40) / (8 / 200))
    assert early["mean_of_ratios"]["mdi"] == pytest.approx((3 + 1) / 2)
    assert early["undefined"] == 0


def test_without_the_first_token_and_for_the_instruction_by_hand():
    stored = [line(1, 2.0, 3.0, instruction=0.6, first_token=0.5)]
    assert score_stored(stored).metrics["mdi_late"] == pytest.approx((2 / 10) / (3 / 90))
    without = score_stored(stored, first_token=False)
    assert without.metrics["mdi_late"] == pytest.approx((1.5 / 9) / (3 / 90))
    assert without.name == "text-dominance/all/without-first"
    instruction = score_stored(stored, "instruction")
    assert instruction.metrics["mdi_late"] == pytest.approx((0.6 / 5) / (3 / 90))
    assert instruction.name == "text-dominance/instruction"
    both = score_stored(stored, "instruction", False)  # the first token is not in the instruction
    assert both.metrics["mdi_late"] == instruction.metrics["mdi_late"]
    visual = [line(1, 2.0, 3.0, instruction=0.6, first_token=0.5, first="visual")]
    assert score_stored(visual, first_token=False).metrics["mdi_late"] == pytest.approx(
        (2 / 10) / (2.5 / 89)
    )
    assert score_stored(visual, "instruction", False).metrics["mdi_late"] == pytest.approx(
        (0.6 / 5) / (2.5 / 89)
    )


@pytest.mark.parametrize("text", ["all", "instruction"])
@pytest.mark.parametrize("first_token", [True, False])
def test_equals_a_naive_reference_and_its_own_details(text, first_token):
    stored = some_lines()
    scores = score_stored(stored, text, first_token)
    found = {kind: {} for kind in ("mdi", "aei_text", "aei_image")}
    for stage, layers in stage_layers(8).items():
        values = {kind: [] for kind in found}
        for raw in (stored_line["text_dominance"] for stored_line in stored):
            for layer in layers:
                i = LAYERS.index(layer)
                t, n_t = (
                    (raw["text"][i], raw["n_text"])
                    if text == "all"
                    else (raw["instruction"][i], raw["n_instruction"])
                )
                o, n_o = raw["visual"][i], raw["n_visual"]
                if not first_token and raw["first"] == "visual":
                    o, n_o = max(o - raw["first_token"][i], 0), n_o - 1
                elif not first_token and text == "all":
                    t, n_t = t - raw["first_token"][i], n_t - 1
                if o:
                    values["mdi"].append(t / n_t * n_o / o)
                values["aei_text"].append(t / (t + o) * (n_t + n_o) / n_t)
                values["aei_image"].append(o / (t + o) * (n_t + n_o) / n_o)
        for kind, numbers in values.items():
            found[kind][stage] = sum(numbers) / len(numbers)
    for kind, by_stage in found.items():
        for stage, value in by_stage.items():
            assert scores.metrics[f"{kind}_{stage}"] == pytest.approx(value, rel=1e-12)
            variant = scores.details["variants"][scores.name.removeprefix("text-dominance/")]
            mean = variant[stage]["mean_of_ratios"][kind]
            assert mean == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("masses", [Masses(0, 0, 3, 4), Masses(1, 1, 0, 4), Masses(1, 0, 3, 0)])
def test_undefined_ratios_are_none(masses):
    assert masses.mdi is None
    assert masses.aei_text is None
    assert masses.aei_image is None


def test_no_attention_on_text_is_an_mdi_of_zero():
    assert Masses(0.0, 1.0, 10, 90).mdi == 0


# ---- what is not plainly scored ----


def test_layers_that_see_nothing_of_the_picture_are_exited_not_infinite():
    stored = [line(1, 1.0, 3.0), line(2, 1.0, [3.0, 3.0, 3.0, 3.0, 0.0, 0.0])]
    scores = score_stored(stored)
    assert scores.statuses["exited layers"] == 2
    assert scores.metrics["mdi_late"] == pytest.approx(3)  # of the other answer alone
    assert scores.table.sums()["late.mdi.n"] == 2
    assert scores.metrics["attention_image_late"] == pytest.approx(3 / 4 / 2)
    assert scores.details["variants"]["all"]["late"]["undefined"] == 2
    everywhere = score_stored([line(1, 1.0, 0.0)])
    assert everywhere.metrics["mdi_late"] is None
    assert everywhere.metrics["aei_text_late"] == pytest.approx(1 / 0.1)
    assert everywhere.as_json()["metrics"]["mdi_late"]["undefined"] is True
    assert "no MDI" in everywhere.samples[0].note


def test_answers_without_a_picture_are_counted_and_left_out():
    stored = [line(1, 1.0, 3.0), line(2, 2.0, 0.0, n_visual=0)]
    scores = score_stored(stored)
    assert scores.statuses["without a picture"] == 1
    assert scores.statuses["exited layers"] == 0
    assert scores.metrics == pytest.approx(score_stored(stored[:1]).metrics)
    assert scores.samples[1].note == "no picture"
    alone = score_stored(stored[1:])
    assert set(alone.metrics.values()) == {None}


def test_prompts_without_instruction_are_counted():
    scores = score_stored([line(1, 1.0, 3.0, n_instruction=0)], "instruction")
    assert scores.statuses["without such text"] == 1
    assert scores.metrics["mdi_early"] is None


def test_answers_of_one_token_are_flagged():
    stored = [line(1, 0.25, 0.5, queries=1, queries_from="last prompt row"), line(2, 1.0, 3.0)]
    scores = score_stored(stored)
    assert scores.statuses["last prompt row"] == 1
    assert scores.samples[0].note.endswith("measured at the prompt's last row")
    assert scores.table.sums()["answers"] == 2


def test_lines_with_errors_are_counted():
    failed = {"id": "3", "image": "3.png", "prompt": "?", "text": None, "error": "no such file"}
    stored = [line(1, 1.0, 3.0), failed]
    scores = score_stored(stored)
    assert scores.statuses["failed"] == 1
    assert len(scores.samples) == 1
    with pytest.raises(InputError, match="All 1 lines hold errors"):
        score_stored([failed])


def test_given_answers_have_a_name_of_their_own():
    scores = score_stored([line(1, 1.0, 3.0, queries_from="answer")])
    assert scores.name == "text-dominance/all/answer"


def test_captions_of_other_benchmarks_are_read():
    stored = [{**line(1, 1.0, 3.0), "caption": "a cat"}]
    del stored[0]["text"]
    assert score_stored(stored).samples[0].answer == "a cat"


# ---- properties ----


def test_order_and_repetition_change_nothing():
    stored = some_lines()
    scores = score_stored(stored)
    mixed = random.Random(1).sample(stored, len(stored))
    assert score_stored(mixed).as_json()["metrics"] == scores.as_json()["metrics"]
    doubled = stored + [{**copy.deepcopy(x), "id": f"again-{x['id']}"} for x in stored]
    assert score_stored(doubled).metrics == pytest.approx(scores.metrics)


def test_scaling_both_masses_changes_no_ratio():
    stored = some_lines()
    scaled = copy.deepcopy(stored)
    for x in scaled:
        for name in ("text", "visual", "instruction", "first_token"):
            x["text_dominance"][name] = [3 * v for v in x["text_dominance"][name]]
    before, after = score_stored(stored).metrics, score_stored(scaled).metrics
    for name, value in before.items():
        factor = 3 if name.startswith("attention") else 1
        assert after[name] == pytest.approx(factor * value)


# ---- what a fall of MDI means ----


def pruned(stored, *, keep_mass):
    """The same runs with a tenth of the visual tokens and all or a tenth of their attention."""
    changed = copy.deepcopy(stored)
    for x in changed:
        raw = x["text_dominance"]
        raw["n_visual"] = raw["n_visual"] // 10
        if not keep_mass:
            raw["visual"] = [v / 5 for v in raw["visual"]]
    return changed


def test_a_fall_by_arithmetic_is_not_called_rebalanced():
    stored = some_lines(60)
    before = score_stored(stored)
    fewer = score_stored(pruned(stored, keep_mass=False))
    assert fewer.metrics["mdi_middle"] < before.metrics["mdi_middle"]
    assert set(rebalanced(before, fewer).values()) == {"less attention on the picture"}
    kept = score_stored(pruned(stored, keep_mass=True))
    assert set(rebalanced(before, kept).values()) == {"rebalanced"}
    assert set(rebalanced(before, before).values()) == {"no clear fall of MDI"}
    assert set(rebalanced(kept, before).values()) == {"no clear fall of MDI"}


def test_runs_on_other_pictures_cannot_be_compared():
    stored = some_lines(6)
    with pytest.raises(InputError, match="needs the same images"):
        rebalanced(score_stored(stored[:4]), score_stored(stored))


# ---- bad input ----


def broken(**changes):
    stored = [line(1, 1.0, 3.0)]
    for name, value in changes.items():
        if value is None:
            del stored[0]["text_dominance"][name]
        else:
            stored[0]["text_dominance"][name] = value
    return stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_text": -1}, "n_text must be an integer >= 0, found -1"),
        ({"n_visual": 3.5}, "n_visual must be an integer"),
        ({"n_layers": 0}, "n_layers must be an integer >= 1"),
        ({"queries": 0}, "queries must be an integer >= 1"),
        ({"queries": True}, "queries must be an integer >= 1"),
        ({"n_instruction": None}, "n_instruction must be an integer >= 0, found None"),
        ({"first": "bos"}, "first must be 'text' or 'visual'"),
        ({"queries_from": "prompt"}, "queries_from is 'prompt'"),
        ({"layers": 3}, "layers must be a list of integers"),
        ({"layers": [[0], 1, 3, 4, 6, 7]}, "layers must be a list of integers"),
        ({"layers": [0, 1, 3, 3, 6, 7]}, "a layer stands twice"),
        ({"layers": [0, 1, 3, 4, 5, 6]}, r"layers \[7\] were not measured"),
        ({"text": [1.0] * 5}, "text must hold one number for each of 6 layers"),
        ({"visual": None}, "visual must hold one number"),
        ({"visual": [math.nan] * 6}, "visual holds something else than finite numbers"),
        ({"visual": [math.inf] * 6}, "visual holds something else"),
        ({"instruction": [-1.0] * 6}, "instruction holds something else"),
        ({"first_token": ["1"] * 6}, "first_token holds something else"),
    ],
)
def test_broken_records_are_errors_that_name_the_line(changes, message):
    with pytest.raises(InputError, match=message) as error:
        score_stored(broken(**changes))
    assert "Line 1 (id '1')" in str(error.value)


def test_other_bad_lines():
    good = line(1, 1.0, 3.0)
    with pytest.raises(InputError, match=r"Line 1 .id '2'. has no 'text_dominance' record"):
        score_stored([{"id": "2", "text": "a dog", "prompt": "?"}])
    with pytest.raises(InputError, match="Line 2 has no id"):
        score_stored([good, {k: v for k, v in good.items() if k != "id"}])
    with pytest.raises(InputError, match="'1' is there twice"):
        score_stored([good, good])
    for text in (None, math.nan, 3):
        with pytest.raises(InputError, match="has no answer that is text"):
            score_stored([{**good, "text": text}])
    with pytest.raises(InputError, match=r"measured in different ways: 8 layers .answer"):
        score_stored([good, line(2, 1.0, 3.0, queries_from="answer")])
    with pytest.raises(InputError, match="There are no lines to score"):
        score_stored([])
    with pytest.raises(ValueError, match="text must be one of all, instruction"):
        score_stored([good], "question")


def test_bad_files(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        read_records(path)
    path.write_bytes(json.dumps(line(1, 1.0, 3.0)).encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_records(path)
