"""`mmlm bench amber` and `mmlm score amber` from end to end, with a tiny random model."""

import json

import pytest
from PIL import Image

from mmlm.cli import main

SHORT = ("--generate.max_new_tokens", "2", "--quiet")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "image"
    folder.mkdir()
    for number in (1, 2):
        Image.new("RGB", (40, 30), (number * 30, 90, 60)).save(folder / f"AMBER_{number}.jpg")
    return folder


@pytest.fixture
def bench(tiny_folder, images, tmp_path):
    def run(output, *arguments):
        command = ["bench", "amber", "--model", str(tiny_folder), "--images", str(images)]
        return main([*command, "--output", str(tmp_path / output), *SHORT, *arguments])

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_run_score_and_export(bench, tmp_path, capsys):
    assert bench("out", "--count", "2", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    stored = lines(tmp_path / "out" / "answers.jsonl")
    assert scores["metric"] == "amber/exact/normalised"
    assert scores["counts"]["images"] == 2
    assert [line["question_id"] for line in stored][:3] == [1, 2, 1005]
    assert all(line["prompt"] == line["question"] for line in stored)
    record = json.loads((tmp_path / "out" / "answers.jsonl.run.json").read_text())
    assert record["data"]["questions"].startswith("sha256:")
    answers, exported = tmp_path / "out" / "answers.jsonl", tmp_path / "responses.json"
    assert main(["score", "amber", str(answers), "--json", "--export", str(exported)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == scores["metrics"]
    assert again["official"] == scores["official"]
    raw = ["score", "amber", str(exported), "--answers", "raw", "--json"]
    assert main(raw) == 2
    assert "answers are missing" in capsys.readouterr().err
    assert main([*raw, "--partial"]) == 0
    assert json.loads(capsys.readouterr().out)["official"] == scores["official"]
    assert main(["score", "amber", str(answers), "--evaluation", "de", "--json"]) == 0
    existence = json.loads(capsys.readouterr().out)
    assert list(existence["official"]) == ["Exsitence"]
    assert list(scores["official"]).index("Exsitence") == 2


def test_interrupted_run_ends_like_an_uninterrupted_one(bench, tmp_path):
    arguments = ("--count", "1", "--evaluation", "d", "--generate.batch_size", "3")
    assert bench("whole", *arguments) == 0
    assert bench("cut", *arguments) == 0
    whole = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    cut = tmp_path / "cut" / "answers.jsonl"
    cut.write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 20])
    assert bench("cut", *arguments) == 0
    assert cut.read_bytes() == whole


def test_suffix_belongs_to_the_run(bench, tmp_path, capsys):
    arguments = ("--count", "1", "--evaluation", "dr")
    assert bench("out", *arguments, "--suffix", " yes or no ?") == 0
    stored = lines(tmp_path / "out" / "answers.jsonl")
    assert all(line["prompt"] == line["question"] + " yes or no ?" for line in stored)
    assert bench("out", *arguments) == 2
    assert "belongs to another run: data.suffix was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "1002 of 1004 pictures are missing"),
        (("--count", "0"), "--count is 0"),
        (("--data", "absent"), "absent holds no annotations.json"),
        (("--similarity", "spacy"), "needs spaCy"),
        (("--evaluation", "x"), "--evaluation does not take 'x'"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    bench, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    if arguments and arguments[0] == "--similarity":
        arguments = (*arguments, "--count", "1")
    assert bench("out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "advice: " in error
    assert not (tmp_path / "out").exists()


def test_pictures_must_be_named(capsys):
    assert main(["bench", "amber"]) == 2
    error = capsys.readouterr().err
    assert "--images is missing" in error
    assert "github.com/junyangwang0410/AMBER" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'[{"id": 1, "response": "\xff"}]', "is not UTF-8 text"),
        (b'[{"id": 1, "response": NaN}]', "not a text"),
        (b"[]", "holds no records"),
        (b'[{"id": 1, "response": "A dog."}', "not valid JSON"),
    ],
)
def test_damaged_files_of_answers(tmp_path, capsys, content, message):
    path = tmp_path / "responses.json"
    path.write_bytes(content)
    assert main(["score", "amber", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_export_needs_its_folder(tmp_path, capsys):
    path = tmp_path / "responses.json"
    path.write_text('[{"id": 1, "response": "A dog."}]')
    export = str(tmp_path / "absent" / "x.json")
    assert main(["score", "amber", str(path), "--partial", "--export", export]) == 2
    assert "There is no folder" in capsys.readouterr().err
