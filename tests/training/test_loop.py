"""The loop's own parts: whole captions from pairs of sentences, and the steps."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def candidate(text, **more):
    return {"text": text, "class": "agnostic", "objects": [], "drawn": 1, **more}


PICTURE = {
    "image_id": "7",
    "path": "world/images/7.png",
    "question": "describe the image .",
    "steps": [
        {"candidates": [candidate("a park .")], "ended": 0, "next": 0},
        {"candidates": [candidate("a dog ."), candidate("a cat .")], "ended": 0, "next": 0},
        {"candidates": [candidate("a tree ."), candidate("a cow .")], "ended": 0, "next": 0},
        {"candidates": [candidate("a bench .")], "ended": 9, "next": None},
    ],
}


def pair(step, number, chosen, rejected):
    return {
        "id": f"7-{step}-{number}",
        "image_id": "7",
        "chosen": chosen,
        "rejected": rejected,
        "context": "",
    }


PAIRS = [
    pair(1, 0, "a dog .", "a cat ."),
    pair(2, 0, "a tree .", "a cow ."),
    pair(2, 1, "a bush .", "a car ."),
]


def test_whole_captions_hold_every_pair_once_and_the_contexts_sentences_elsewhere():
    from loop_pairs import whole_captions

    first, second = whole_captions(PICTURE, PAIRS)
    assert first["chosen"] == "a park . a dog . a tree ."
    assert first["rejected"] == "a park . a cat . a cow ."
    assert second["chosen"] == "a park . a dog . a bush ."
    assert second["rejected"] == "a park . a dog . a car ."
    assert [row["pairs"] for row in (first, second)] == [2, 1]
    assert first["id"] != second["id"]
    assert first["is_final"]
    assert first["context"] == ""


def test_whole_captions_are_rows_that_the_training_reads(tmp_path):
    from loop_pairs import write

    from training.preference.rows import read_rows

    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    (folder / "images.jsonl").write_text(json.dumps(PICTURE) + "\n")
    write(folder, tmp_path / "whole.jsonl")
    rows = read_rows([str(tmp_path / "whole.jsonl")])
    assert [row.chosen_ends and row.rejected_ends for row in rows] == [True, True]
    assert rows[0].images == (str(folder / "world/images/7.png"),)


def test_steps_are_skipped_when_done_and_refused_when_their_commands_changed(tmp_path):
    from dataclasses import replace

    from run_loop import Loop, Step

    made = []
    step = Step("one", "a step", (("mmlm", "methods", "--json"),), after=lambda: made.append(1))
    loop = Loop(tmp_path, [step])
    assert not loop.done(step)
    loop.run(step, 1)
    assert loop.done(step)
    assert made == [1]
    with pytest.raises(SystemExit, match="other commands"):
        loop.done(replace(step, at_once=(("mmlm", "methods"),)))


def test_a_failed_command_is_named_with_its_log_and_not_taken_for_done(tmp_path):
    from run_loop import Loop, Step

    step = Step("two", "a step", (("mmlm", "no-such-command"),))
    loop = Loop(tmp_path, [step])
    with pytest.raises(SystemExit, match=r"no-such-command\n.*two\.0\.log"):
        loop.run(step, 1)
    assert not loop.done(step)


def test_every_training_is_measured_behind_it_and_no_two_steps_share_a_name(tmp_path):
    from run_loop import TRAININGS, steps

    every = steps(tmp_path)
    names = [step.name for step in every]
    assert len(set(names)) == len(names)
    for name in TRAININGS:
        assert names.index(f"train_{name}") < names.index(f"chair_{name}")
        assert names.index(f"train_{name}") < names.index(f"pope_{name}")
    for step in every:
        assert set(step.needs) <= set(names[: names.index(step.name)])


def test_pairs_and_measured_scenes_differ():
    from run_loop import PAIR_SEED, UNSEEN_SEED

    assert len({PAIR_SEED, UNSEEN_SEED, 0}) == 3  # 0: the scenes of docs/effects.md
