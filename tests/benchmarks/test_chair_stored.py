"""CHAIR's stored captions: the common shape, marks, expected pictures, the authors' files."""

import json

import pytest

from benchmarks import chair
from benchmarks.base import Mark
from benchmarks.complete import require_complete
from mmlm.errors import InputError

TRUTH = {1: {"dog", "person"}, 2: {"cat"}, 3: set()}
LINES = [
    {"id": "1", "image_id": 1, "image": "1.png", "prompt": "What?", "caption": "A dog, a bus."},
    {"id": "2", "image_id": 2, "image": "2.png", "prompt": "What?", "caption": "A kitten."},
    {"id": "3", "image_id": 3, "image": "3.png", "prompt": "What?", "caption": "Grass."},
]
FAILED = {"id": "3", "image_id": 3, "image": "3.png", "caption": None, "error": "no such file"}


def test_result_is_a_scored_file():
    result = chair.score_stored(LINES, TRUTH)
    assert result.name == "chair/wordnet"
    assert list(result.directions) == list(result.table.ratios)
    assert next(iter(result.directions)) == "chair_s"
    assert set(result.good) | set(result.bad) <= set(result.table.columns)
    assert "statuses" not in result.as_json(resamples=2)
    first, second, third = result.samples
    assert (first.id, first.image, first.question) == ("1", "1.png", "What?")
    assert (first.answer, first.correct) == ("A dog, a bus.", False)
    assert first.note == "1 found, 1 invented, 1 not named"
    assert [first.answer[mark.start : mark.end] for mark in first.marks] == ["dog", "bus"]
    assert [mark.kind for mark in first.marks] == ["good", "bad"]
    assert (second.correct, third.correct, third.marks) == (True, True, ())


def test_captions_from_elsewhere_have_the_picture_id_as_name():
    sample = chair.score([{"image_id": 2, "caption": "A cat."}], TRUTH).samples[0]
    assert (sample.id, sample.image, sample.question) == ("2", "2", "")


@pytest.mark.parametrize(
    "caption",
    [
        "A Dog and a hot dog.",
        "İİ a Dog, İ a hot DOG.",  # each İ has two characters in lower case
        "ΟΔΟΣ: a Dog “and” a hot dog!",
        'The "Dog" with its hot dog',
    ],
)
def test_marks_stand_in_the_caption_as_it_was_given(caption):
    (scored,) = chair.score([{"image_id": 1, "caption": caption}], TRUTH).per_caption
    marks = scored.marks()
    assert [caption[m.start : m.end].lower() for m in marks] == ["dog", "hot dog"]
    assert [(m.kind, m.title) for m in marks] == [
        ("good", "dog: in the picture"),
        ("bad", "hot dog: invented"),
    ]
    for mark, (start, end, _) in zip(marks, scored.spans(), strict=True):
        assert caption.lower()[start:end] == caption[mark.start : mark.end].lower()


def test_marks_are_those_of_the_report():
    from benchmarks.reports import page

    (scored,) = chair.score([{"image_id": 1, "caption": "A dog."}], TRUTH).per_caption
    assert scored.marks() == (Mark(2, 5, "good", "dog: in the picture"),)
    assert page._marked(scored) == 'A <mark class="good" title="dog: in the picture">dog</mark>.'


def test_metrics_of_one_caption():
    some, right, none = (c.metrics for c in chair.score_stored(LINES, TRUTH).per_caption)
    assert some == pytest.approx(
        {"chair_s": 1.0, "chair_i": 0.5, "recall": 0.5, "precision": 0.5, "f1": 0.5}
    )
    assert right == {"chair_s": 0, "chair_i": 0, "recall": 1, "precision": 1, "f1": 1}
    # No object named and none there: nothing but CHAIR_s exists.
    assert none == {"chair_s": 0, "chair_i": None, "recall": None, "precision": None, "f1": None}
    # Without true objects the official scorer stores neither precision nor F1.
    (alone,) = chair.score([{"image_id": 3, "caption": "A dog."}], TRUTH).per_caption
    assert alone.metrics["precision"] is None
    assert alone.metrics["chair_i"] == 1


# --- what is not scored ---------------------------------------------------------------------------


def test_failed_and_missing_captions_are_counted():
    result = chair.score_stored([*LINES[:1], FAILED], TRUTH, expected=TRUTH.keys())
    assert result.statuses == {"failed": 1, "missing": 1}
    assert result.counts["captions"] == 1
    assert result.as_json(resamples=2)["statuses"] == {"failed": 1, "missing": 1}
    with pytest.raises(InputError, match="chair/wordnet is not complete: 1 failed; 1 missing"):
        require_complete(result)


def test_complete_file_passes_the_strict_mode():
    result = chair.score_stored(LINES, TRUTH, expected=TRUTH.keys())
    assert result.statuses == {}
    require_complete(result)


def test_strict_refuses_what_the_official_scorers_crash_on():
    result = chair.score_stored(LINES[2:], TRUTH)
    with pytest.raises(InputError, match="undefined: chair_i, recall, precision, f1"):
        require_complete(result)


def test_captions_of_other_pictures_are_refused():
    with pytest.raises(InputError, match="2 of the 3 captioned pictures are not among the 2"):
        chair.score_stored(LINES, TRUTH, expected=[1, 7])


def test_nothing_but_errors():
    with pytest.raises(InputError, match="All 1 lines hold errors"):
        chair.score_stored([FAILED], TRUTH)
    with pytest.raises(InputError, match="no captions"):
        chair.score_stored([], TRUTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": float("nan")}, "record 1: no caption .field 'caption' is nan"),
        ({"caption": None}, "record 1: no caption"),
        ({"caption": ["A dog."]}, "record 1: no caption"),
        ({"image_id": float("nan")}, "image_id must be a whole number, found nan"),
        ({"image_id": 5.0}, "image_id must be a whole number, found 5.0"),
        ({"image_id": None}, "image_id must be a whole number, found None"),
    ],
)
def test_bad_lines(change, message):
    with pytest.raises(InputError, match=message):
        chair.score_stored([LINES[0] | change], TRUTH)


def test_double_lines():
    with pytest.raises(InputError, match="record 2: id '1' occurs twice"):
        chair.score_stored([LINES[0], LINES[0]], TRUTH)


# --- the authors' files ---------------------------------------------------------------------------


def official_reading(path):
    """Captions as the authors' scripts load them: by the ending of the name."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(row) for row in text.splitlines()]


def official_totals(records):
    """CHAIR with the counters of the authors' scripts, on objects read by our words."""
    words = wrong = captions_wrong = found = true = 0
    for record in records:
        named = chair.node_words(record["caption"])
        truth = TRUTH[record["image_id"]]
        invented = [word for word in named if word not in truth]
        words += len(named)
        wrong += len(invented)
        captions_wrong += bool(invented)
        found += len(truth.intersection(named))
        true += len(truth)
    return {
        "chair_s": captions_wrong / len(records),
        "chair_i": wrong / words,
        "recall": found / true,
    }


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl"])
def test_exported_captions_give_the_official_scripts_our_numbers(tmp_path, name):
    lines = [*LINES[:2], FAILED, {"id": "4", "text": "A “cat”\nand a dog.", "image_id": 2}]
    path = tmp_path / "out" / name
    chair.write_official(path, lines)
    records = official_reading(path)
    assert [set(record) for record in records] == [{"image_id", "caption"}] * 3
    ours = chair.score_stored(lines, TRUTH).metrics
    for metric, value in official_totals(records).items():
        assert ours[metric] == pytest.approx(value, abs=1e-12)
    assert chair.score(chair.read_captions(path), TRUTH).metrics == ours


def test_nothing_to_export(tmp_path):
    with pytest.raises(InputError, match="no captions to export"):
        chair.write_official(tmp_path / "out" / "x.json", [FAILED])
    assert not (tmp_path / "out").exists()
