"""The program that times scorers: what it scores is what it says; times themselves are no test."""

import json

import pytest

from benchmarks import pope, scoring_speed


def test_made_up_answers_fit_their_questions(tmp_path):
    task = pope.task({"random": pope.published("gqa")["random"][:6]}, tmp_path)
    lines = scoring_speed.lines_of(task, ("Yes", "No"))
    assert [line["id"] for line in lines] == [item.request.id for item in task.items]
    assert {line["text"] for line in lines} == {"Yes", "No"}
    assert lines == scoring_speed.lines_of(task, ("Yes", "No"))
    assert pope.score_stored(lines).splits["random"].counts["answers"] == 6


def test_the_smallest_round_counts(monkeypatch):
    clock = iter([0.0, 5.0, 6.0, 10.0, 12.0, 12.5])
    monkeypatch.setattr(scoring_speed.time, "perf_counter", lambda: next(clock))

    class Result:
        def as_json(self):
            return {}

    assert scoring_speed.measure(Result, rounds=2) == {"scoring": 2.0, "intervals": 0.5}


@pytest.mark.slow
def test_the_program_names_what_it_scored(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring_speed, "measure", lambda score: {"scoring": 1.0, "intervals": 0.0})
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"image_id": 42, "caption": "a dog"}) + "\n")
    output = tmp_path / "out.json"
    assert scoring_speed.main(["--captions", str(captions), "--output", str(output)]) == 0
    named = list(json.loads(output.read_text())["seconds"])
    assert named[:4] == [
        "14216 answers, amber/exact/normalised",
        "9000 answers, pope/strict",
        "1 captions, chair/wordnet",
        "1 captions, chair/pattern",
    ]
    assert capsys.readouterr().out.count("1.00 s") == len(named)
