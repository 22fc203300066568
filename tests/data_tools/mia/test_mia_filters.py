"""Which answers become pairs."""

import json
import math
import random

import pytest
from golden import golden

from data_tools.mia.filters import (
    REASONS,
    Filter,
    Thresholds,
    UnknownNumber,
    check_numbers,
    measured,
    reason,
    records_to_refilter,
)
from data_tools.mia.records import ALLOWED, FILTER
from data_tools.mia.texts import edit_distance, length_ratio, levenshtein
from data_tools.records import StageOutput
from data_tools.stages import run_stage
from mmlm.errors import InputError


def record(**changed):
    fields = {
        "id": "r1",
        "format": "sequence",
        "n_images": 2,
        "images": ["a.png", "b.png"],
        "target_index": 2,
        "prompt_segments": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}],
        "answer": "a red car",
        "response": "a blue boat",
        "ratio": 0.5,
        "ratios": [0.5, 0.5],
        "ppl": 1.3,
        "layer": 16,
        "model": "m",
        "corrupt_target": None,
        "decode": {"do_sample": False},
    }
    return fields | changed


def verdict(thresholds=None, **changed):
    return reason(measured(record(**changed)), thresholds or Thresholds())


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("mia_dpo*/decisions.json"))
def test_acceptance_1_decisions(path):
    cases = json.loads(path.read_text())
    parity = Thresholds(parity=True)
    for case in cases:
        answer = case["gt"] if "gt" in case else "x" * case["gt_chars"]
        made = verdict(
            parity,
            format=case["format"],
            n_images=case["n_images"],
            target_index=case["target"],
            answer=answer,
            response=case["response"],
            ratio=case["ratio"],
            ppl=case["ppl"],
        )
        assert (made == "") == bool(case["kept"]), (case, made)
    assert {bool(case["kept"]) for case in cases} == {True, False}


@pytest.mark.parametrize(
    ("format", "limits", "at_limit"),
    [
        ("sequence", {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6}, ""),
        ("grid", {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3}, "looked_at_target"),
        ("pip", {2: 0.8}, "looked_at_target"),
    ],
)
def test_table_of_the_code(format, limits, at_limit):
    for n_images, limit in limits.items():
        kind = {"format": format, "n_images": n_images}
        assert verdict(**kind, ratio=limit) == at_limit  # <= for sequences, < for the others
        assert verdict(**kind, ratio=math.nextafter(limit, 0)) == ""
        assert verdict(**kind, ratio=math.nextafter(limit, 1)) == "looked_at_target"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"answer": ""}, "empty_answer"),
        ({"response": ""}, "empty_response"),
        ({"answer": "x" * 512}, "long_answer"),
        ({"answer": "a " * 255 + "x"}, "length_ratio"),  # 511 characters are few enough
        ({"response": "a red car"}, "dropped_equal"),
        ({"response": " A red CAR "}, "dropped_equal"),
        ({"ratio": None}, "no_attention"),
        ({"ratio": math.nan}, "no_attention"),
        ({"ppl": 1.1}, "low_perplexity"),
        ({"ppl": None}, "low_perplexity"),
        ({"ppl": 1.1000001}, ""),
        ({"ratio": 0.81}, "looked_at_target"),
        ({"response": " ".join("a" * 15)}, ""),  # 15 words for 3: exactly 5
        ({"response": " ".join("a" * 16)}, "length_ratio"),
        ({"answer": "a b c d e", "response": "x"}, ""),  # exactly 1 for 5
        ({"answer": "a b c d e f", "response": "x"}, "length_ratio"),
        ({"answer": "a" * 40, "response": "a" * 39 + "b"}, "edit_distance"),  # 1 / 40
        ({"answer": "a" * 20, "response": "a" * 19 + "b"}, ""),  # 1 / 20 is exactly 0.05
    ],
)
def test_every_filter(changed, expected):
    assert verdict(**changed) == expected
    assert expected in ("", *REASONS)


def test_parity_switches_our_filters_off():
    parity = Thresholds(parity=True)
    for changed in (
        {"response": " A red CAR "},
        {"response": " ".join("a" * 99)},
        {"answer": "a" * 40, "response": "a" * 39 + "b"},
    ):
        assert verdict(**changed) != ""
        assert verdict(parity, **changed) == ""
    assert verdict(parity, response="a red car") == "dropped_equal"


def test_acceptance_9_thresholds_are_configuration():
    strict = Thresholds(sequence={2: 0.3, 4: 0.9}, ppl=2.0)
    assert verdict(strict, ppl=2.5) == "looked_at_target"
    assert verdict(strict, ppl=2.5, ratio=0.3) == ""
    assert verdict(strict, n_images=4, ratio=0.9, ppl=2.5) == ""


def test_acceptance_9_an_unknown_number_is_an_error():
    with pytest.raises(UnknownNumber, match="no threshold for a sequence of 3 pictures") as caught:
        verdict(Thresholds(sequence={2: 0.8}), n_images=3)
    assert isinstance(caught.value, ValueError)
    assert "sequence 2" in str(caught.value)
    assert "grid 9" in str(caught.value)
    # Before any work, whatever else would have dropped the record.
    with pytest.raises(UnknownNumber):
        check_numbers([record(), record(n_images=3, response="")], Thresholds(sequence={2: 0.8}))
    check_numbers([record(), record(format="grid", n_images=9)], Thresholds())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": {5: 0.5}}, "grid is made of 2, 3, 4, 6, 9 pictures, got 5"),
        ({"pip": {2: 0.0}}, "thresholds of pip must be in"),
        ({"sequence": {2: 1.5}}, "thresholds of sequence must be in"),
        ({"ppl": 0.9}, "ppl must be at least 1"),
        ({"ppl": math.nan}, "ppl must be at least 1"),
        ({"max_answer": 0}, "max_answer must be at least 1"),
        ({"min_len_ratio": 6.0}, "min_len_ratio <= max_len_ratio"),
        ({"edit_distance": 1.1}, "edit_distance must be in"),
    ],
)
def test_wrong_thresholds(options, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(**options)


def test_lines_hold_everything_kept_or_dropped():
    kept, dropped = Filter(Thresholds()).process([record(), record(id="r2", ppl=1.0)])
    assert (kept.status, list(kept.lines)) == ("ok", ["pairs"])
    assert (dropped.status, list(dropped.lines)) == ("low_perplexity", ["dropped"])
    (pair,), (other,) = kept.lines["pairs"], dropped.lines["dropped"]
    assert other["reason"] == "low_perplexity"
    assert pair.keys() == other.keys() - {"reason"}
    assert (other["ratio"], other["ppl"], other["rejected"]) == (0.5, 1.0, "a blue boat")
    assert pair["chosen"] == "a red car"
    assert pair["len_ratio"] == 1.0
    assert pair["prompt"] == record()["prompt_segments"]
    assert pair["meta"] == {
        "model": "m",
        "layer": 16,
        "corrupt_target": None,
        "decode": {"do_sample": False},
        "thresholds": {
            "ratio": 0.8, "ppl": 1.1, "max_answer": 512, "len_ratio": [0.2, 5.0],
            "edit_distance": 0.05,
        },
    }  # fmt: skip


def many(count=300):
    draw = random.Random(3)
    for number in range(count):
        format = draw.choice(list(ALLOWED))
        yield record(
            id=f"r{number}",
            format=format,
            n_images=draw.choice(ALLOWED[format]),
            ratio=draw.choice([None, *(round(draw.random(), 2) for _ in range(9))]),
            ppl=draw.choice([None, 1.0, 1.05, 1.2, 1.5, 3.0]),
            response=draw.choice(["", "a red car", "A red car", "a blue boat", "x " * 20]),
        )


def filtered(folder, records, thresholds):
    with_settings = StageOutput(folder, {"filter": repr(thresholds)}, FILTER.kinds)
    counts = run_stage(Filter(thresholds), records, with_settings)
    return counts, {name: (folder / f"{name}.jsonl").read_bytes() for name in FILTER.kinds}


@pytest.mark.parametrize(
    "other",
    [
        Thresholds(ppl=1.4),
        Thresholds(parity=True),
        Thresholds(sequence={2: 0.1, 3: 0.9, 4: 0.5, 5: 0.5}, edit_distance=0.9),
    ],
)
def test_refilter_equals_a_fresh_run(tmp_path, other):
    records = sorted(many(), key=lambda one: one["id"])
    first, _ = filtered(tmp_path / "filter", records, Thresholds())
    fresh, expected = filtered(tmp_path / "fresh", records, other)
    again, made = filtered(tmp_path / "again", records_to_refilter(tmp_path), other)
    assert made == expected
    assert again == fresh != first
    assert first.total() == 300
    assert len(first) >= 6


def test_refilter_needs_a_filtered_run(tmp_path):
    with pytest.raises(InputError, match="no finished records"):
        records_to_refilter(tmp_path)


def naive_levenshtein(one, other):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        new = [i]
        for j, b in enumerate(other, start=1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (a != b)))
        row = new
    return row[-1]


def test_levenshtein_by_hand_and_against_the_definition():
    assert levenshtein("kitten", "sitting") == 3
    assert levenshtein("", "abc") == 3
    assert levenshtein("", "") == 0
    draw = random.Random(0)
    for _ in range(300):
        one, other = ("".join(draw.choices("abcé", k=draw.randrange(9))) for _ in range(2))
        assert levenshtein(one, other) == naive_levenshtein(one, other)


def test_edit_distance_and_length_ratio():
    assert edit_distance("a red car.", "A red car") == 0.1  # 1 of 10 letters
    assert edit_distance("  YES", "yes ") == 0
    assert edit_distance("", "") == 0
    assert edit_distance("", "ab") == 1
    assert length_ratio("one two", "one two three four") == 0.5
    assert length_ratio("", "one") is None
    assert length_ratio("one", " ") is None
