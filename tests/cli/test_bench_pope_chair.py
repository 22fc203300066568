"""`mmlm bench pope` with shipped questions and conversations, exports, strict scoring."""

import json
import random

import pytest
from PIL import Image

from benchmarks import chair, pope
from mmlm.cli import main

SHORT = ("--generate.max_new_tokens", "3", "--quiet")
VERSION = "coco-2023-11"


@pytest.fixture
def tiny(tiny_folder):
    return str(tiny_folder)


def bench(model, output, *arguments, kind="pope"):
    return main(["bench", kind, "--model", model, "--output", str(output), *SHORT, *arguments])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def pictures(tmp_path):
    """The two pictures of the shipped questions that `--count 2` chooses."""
    everything = pope.published(VERSION).values()
    names = list(dict.fromkeys(q.image for questions in everything for q in questions))
    folder = tmp_path / "val2014"
    folder.mkdir()
    for name in random.Random(0).sample(names, 2):
        Image.new("RGB", (12, 9), (len(name), 90, 60)).save(folder / name)
    return folder


def shipped(pictures, *arguments):
    return ("--version", VERSION, "--images", str(pictures), "--count", "2", *arguments)


def test_shipped_questions_about_some_pictures(tiny, pictures, tmp_path, capsys):
    assert bench(tiny, tmp_path / "out", *shipped(pictures, "--json")) == 0
    scores = json.loads(capsys.readouterr().out)
    # A part is not comparable with the whole, and its name says so.
    assert scores["metric"] == f"pope/{VERSION}-2of500/strict"
    stored = lines(tmp_path / "out" / "answers.jsonl")
    assert len(stored) == 36
    asked = {(q.text, q.image) for qs in pope.published(VERSION).values() for q in qs}
    assert {(line["question"], line["image"]) for line in stored} <= asked
    record = json.loads((tmp_path / "out" / "answers.jsonl.run.json").read_text())
    assert set(record["data"]["questions"]) == set(pope.KINDS)


def test_missing_pictures_are_refused_before_the_model_loads(pictures, tmp_path, capsys):
    arguments = ("--version", VERSION, "--images", str(pictures))
    assert bench("absent/model", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert f"498 of 500 pictures are not in '{pictures}', e.g. COCO_val2014_" in error
    assert "the pictures of COCO val2014" in error
    assert not (tmp_path / "out").exists()
    gqa = ("--version", "gqa", "--images", str(pictures))
    assert bench("absent/model", tmp_path / "out", *gqa) == 2
    assert "the pictures of GQA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--version", "coco"), "--version does not take 'coco'"),
        (("--version", VERSION), "--images is"),
        (("--version", VERSION, "--images", "absent"), "--images is 'absent'"),
        (("--version", VERSION, "--questions", "q.jsonl"), "--version and --questions are both"),
        (("--version", VERSION, "--images", ".", "--count", "0"), "--count is 0"),
        (("--version", VERSION, "--images", ".", "--count", "501"), "has 500 pictures"),
        (("--version", VERSION, "--images", ".", "--annotations", "i.json"), "--annotations is"),
    ],
)
def test_impossible_requests(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "pope", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_conversations_whatever_the_batch_and_the_interruption(tiny, pictures, tmp_path, capsys):
    four = shipped(pictures, "--chat", "--generate.batch_size", "4")
    assert bench(tiny, tmp_path / "whole", *four, "--json") == 0
    assert json.loads(capsys.readouterr().out)["metric"] == f"pope/{VERSION}-2of500/chat/strict"
    file = tmp_path / "whole" / "answers.jsonl"
    whole = file.read_bytes()
    stored = lines(file)
    assert len(stored) == 6
    assert all(len(line["turns"]) == len(line["questions"]) == 6 for line in stored)
    assert all(line["text"] == line["turns"][0]["text"] for line in stored)
    one = shipped(pictures, "--chat", "--generate.batch_size", "1")
    assert bench(tiny, tmp_path / "one", *one) == 0
    assert (tmp_path / "one" / "answers.jsonl").read_bytes() == whole
    cut = tmp_path / "one" / "answers.jsonl"
    cut.write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 50])  # lines and a half one
    assert bench(tiny, tmp_path / "one", *one) == 0
    assert cut.read_bytes() == whole


def test_conversations_and_single_questions_are_different_runs(tiny, pictures, tmp_path, capsys):
    assert bench(tiny, tmp_path / "out", *shipped(pictures)) == 0
    assert bench(tiny, tmp_path / "out", *shipped(pictures, "--chat")) == 2
    assert "data.chat was None, now True" in capsys.readouterr().err


def test_score_and_export_conversations(tiny, pictures, tmp_path, capsys):
    assert bench(tiny, tmp_path / "out", *shipped(pictures, "--chat")) == 0
    capsys.readouterr()
    file, export = str(tmp_path / "out" / "answers.jsonl"), tmp_path / "official"
    arguments = ["score", "pope", file, "--parser", "official", "--json"]
    assert main([*arguments, "--export", str(export)]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in export.iterdir()) == sorted(
        f"{part}_{kind}.jsonl" for part in ("answers", "questions") for kind in pope.KINDS
    )
    answers, questions = (str(export / f"{p}_random.jsonl") for p in ("answers", "questions"))
    again = ["score", "pope", answers, "--questions", questions, "--parser", "official", "--json"]
    assert main(again) == 0
    official = json.loads(capsys.readouterr().out)
    assert official["splits"]["all"]["counts"] == scores["splits"]["random"]["counts"]
    assert main([*again, "--export", "x"]) == 2
    assert "--export is given with --questions" in capsys.readouterr().err


def test_answers_to_shipped_questions_by_name(tmp_path, capsys):
    questions = pope.published("coco-legacy")["random"]
    answers = tmp_path / "answers.jsonl"
    rows = [json.dumps({"question": q.text, "answer": q.label}) + "\n" for q in questions]
    answers.write_text("".join(rows))
    arguments = ["score", "pope", str(answers), "--json", "--questions"]
    assert main([*arguments, "coco-legacy/random"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["splits"]["random"]["metric"] == "pope/coco-legacy/strict"
    assert scores["means"]["mean_accuracy"]["value"] == 1
    assert main([*arguments, "coco-legacy/hard"]) == 2
    assert "no questions of the kind 'hard'" in capsys.readouterr().err
    assert main([*arguments, "coco-2023-11/random"]) == 2
    assert "2910 answers for 3000 questions" in capsys.readouterr().err


def test_strict_scoring_of_part_of_a_run(tmp_path, capsys):
    stored = [
        {
            "id": f"random-{q.question_id}",
            "split": "random",
            "version": VERSION,
            "image": q.image,
            "question_id": q.question_id,
            "question": q.text,
            "label": q.label,
            "text": q.label,
        }
        for q in pope.published(VERSION)["random"]
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in stored[:-6]))
    assert main(["score", "pope", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statuses"] == {"missing": 6}
    assert main(["score", "pope", str(file), "--strict"]) == 2
    assert "is not complete: 6 missing" in capsys.readouterr().err
    file.write_text("".join(json.dumps(line) + "\n" for line in stored))
    assert main(["score", "pope", str(file), "--strict"]) == 0


# --- CHAIR ----------------------------------------------------------------------------------------


def captions(path, images):
    rows = [{"image_id": image, "caption": "A dog beside a bus."} for image in images]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_subset_must_be_captioned_whole(tmp_path, capsys):
    images = chair.subset_ids("opera500")
    part = captions(tmp_path / "part.jsonl", images[:20])
    arguments = ["score", "chair", part, "--subset", "opera500"]
    assert main([*arguments, "--json"]) == 0
    done = capsys.readouterr()
    assert json.loads(done.out)["statuses"] == {"missing": 480}
    assert "480 of 500 pictures have no caption" in done.err
    assert main([*arguments, "--strict"]) == 2
    assert "is not complete: 480 missing" in capsys.readouterr().err
    other = next(image for image in chair.truth_of_val2014() if image not in images)
    foreign = captions(tmp_path / "foreign.jsonl", [*images[:20], other])
    assert main(["score", "chair", foreign, "--subset", "opera500"]) == 2
    assert "1 of the 21 captioned pictures are not among the 500" in capsys.readouterr().err


def test_captions_cut_from_a_run_are_noticed(tiny, tmp_path, capsys):
    assert bench(tiny, tmp_path / "out", "--count", "4", kind="chair") == 0
    file = tmp_path / "out" / "captions.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:3]))
    capsys.readouterr()
    assert main(["score", "chair", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statuses"] == {"missing": 1}


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl"])
def test_exported_captions_score_alike(tmp_path, capsys, name):
    file = captions(tmp_path / "own.jsonl", chair.subset_ids("opera500")[:5])
    export = tmp_path / name
    assert main(["score", "chair", file, "--export", str(export), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)
    assert main(["score", "chair", str(export), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == ours["metrics"]
