"""Scoring of the procedural tasks: `micl/exact`."""

import pytest

from benchmarks.micl import normalised, right, score_stored
from mmlm.errors import InputError


def line(identifier, task="operator", text="5", answer="5", **more):
    fields = {"compare": "number", "has_latent": task != "sudoku", "condition": "full"}
    return {"id": identifier, "task": task, "text": text, "answer": answer, **fields, **more}


@pytest.mark.parametrize(
    ("text", "answer", "compare", "expected"),
    [
        ("5", "5", "number", True),
        (" The result is 12.", "12", "number", True),
        ("12 or 13", "13", "number", False),  # the first number counts
        ("-3", "3", "number", False),  # a sign is part of the number
        ("-3", "-3", "number", True),
        ("007", "7", "number", True),
        ("15\n5", "5", "number", False),  # only the first line is read
        ("I see.\n5", "5", "number", False),
        ("none", "5", "number", False),
        ("", "5", "number", False),
        ("388, 390, 389", "388, 390, 389", "number", True),
        ("388 390 389 and 7", "388, 390, 389", "number", True),
        ("388, 389, 390", "388, 390, 389", "number", False),
        ("Red.", "red", "word", True),
        ("Red. It is the odd one", "red", "word", True),
        ("red circle", "red", "word", False),
        ('"Dax"', "Dax", "word", True),
        ("", "dax", "word", False),
    ],
)
def test_answers(text, answer, compare, expected):
    assert right(text, answer, compare) is expected


def test_what_is_compared():
    assert normalised("  It is 4. Or 5\nor 6", "number") == "4"
    assert normalised("A Star!\nno", "word") == "a star"


def test_accuracies_by_hand():
    lines = [
        line("a"),
        line("b", text="4"),
        line("c", "clock", "20", "20"),
        line("d", "sudoku", "7", "7"),
        line("e", "sudoku", "7", "7"),
        line("f", text="", error="no picture"),
    ]
    scores = score_stored(lines)
    assert scores.metrics == {
        "with_latent": (0.5 + 1.0) / 2,
        "all_tasks": (0.5 + 1.0 + 1.0) / 3,
        "operator": 0.5,
        "clock": 1.0,
        "sudoku": 1.0,
    }
    assert scores.statuses == {"failed": 1}
    assert scores.counts["right"] == 4
    assert [sample.correct for sample in scores.samples] == [True, False, True, True, True]
    assert scores.table.measure("operator", resamples=200).interval is not None


def test_pattern_tasks_alone_have_no_mean_with_latent():
    assert list(score_stored([line("a", "sudoku")]).metrics) == ["all_tasks", "sudoku"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no answer to score"),
        ([line("a", error="no")], "no answer to score"),
        ([{"id": "a", "text": "5"}], "no answer to an episode: 'has_latent' is None"),
        ([line("a", text=None)], "'text' is None"),
        ([line("a", compare="image")], "compare = 'image'"),
    ],
)
def test_bad_lines(lines, message):
    with pytest.raises(InputError, match=message):
        score_stored(lines)
