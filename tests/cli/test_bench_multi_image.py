"""`mmlm bench` and `mmlm score` for benchmarks with several pictures, and for MMBench."""

import json
import sys
from pathlib import Path

import pytest

from mmlm.cli import main

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import multi_image_data as data
import test_mmbench

SHORT = ("--generate.max_new_tokens", "3", "--generate.batch_size", "2", "--quiet")


@pytest.fixture
def bench(tiny_folder, tmp_path):
    def run(name, *arguments, output="out"):
        where = ("--model", str(tiny_folder), "--output", str(tmp_path / output))
        return main(["bench", name, *where, *SHORT, *map(str, arguments)])

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "metric", "count"),
    [
        ("mmmu", "mmmu/validation/last-named", 3),
        ("blink", "blink/val/first-letter", 3),
        ("mantis", "mantis/test/lmms-eval", 2),
    ],
)
def test_from_parquet_to_scores_and_back(bench, tmp_path, capsys, name, metric, count):
    folder = getattr(data, name)(tmp_path / "set")
    assert bench(name, "--data", folder, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["metric"] == metric
    assert scores["counts"]["questions"] == count
    answers = tmp_path / "out" / "answers.jsonl"
    stored = lines(answers)
    kept = tmp_path / "out" / "pictures"
    assert all((kept / picture).is_file() for line in stored for picture in line["images"])
    assert main(["score", name, str(answers), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == scores["metrics"]
    assert again["official"] == scores["official"]


def test_pictures_stand_at_their_marks_in_what_the_model_gets(bench, tmp_path):
    assert bench("mmmu", "--data", data.mmmu(tmp_path / "set")) == 0
    templated = lines(tmp_path / "out" / "answers.jsonl")[1]["templated"]
    assert "Is<image>like<image>? Look at <image 1> again." in templated


def test_interrupted_run_goes_on_with_the_same_bytes(bench, tmp_path):
    folder = data.blink(tmp_path / "set")
    assert bench("blink", "--data", folder, output="whole") == 0
    assert bench("blink", "--data", folder, output="cut") == 0
    whole = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    cut = tmp_path / "cut" / "answers.jsonl"
    cut.write_bytes(whole[: whole.index(b"\n") + 30])
    assert bench("blink", "--data", folder, output="cut") == 0
    assert cut.read_bytes() == whole


def test_another_data_set_is_another_run(bench, tmp_path, capsys):
    folder = data.blink(tmp_path / "set")
    assert bench("blink", "--data", folder) == 0
    assert bench("blink", "--data", folder, "--count", "2") == 2
    assert "belongs to another run: data.questions was" in capsys.readouterr().err


def test_nlvr2_with_pictures_beside_the_data(bench, tmp_path, capsys):
    path = data.nlvr2(tmp_path)
    where = ("--data", path, "--images", tmp_path / "images")
    assert bench("nlvr2", *where, "--prompt", "choice", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "nlvr2/test1/choice"
    answers = str(tmp_path / "out" / "answers.jsonl")
    predictions = tmp_path / "p.csv"
    assert main(["score", "nlvr2", answers, "--export", str(predictions)]) == 0
    assert predictions.read_text().startswith("test1-0-0-0,")
    (tmp_path / "images" / "test1" / "0" / "test1-0-0-img0.png").unlink()
    assert bench("nlvr2", *where, output="other") == 2
    assert "1 pictures are missing" in capsys.readouterr().err


def test_mvbench_frames(bench, tmp_path, capsys):
    folder = data.mvbench(tmp_path)
    where = ("--data", folder, "--images", tmp_path / "video")
    assert bench("mvbench", *where, "--frames", "4", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["metric"] == "mvbench/train/4-frames/first-letter"
    answers = str(tmp_path / "out" / "answers.jsonl")
    assert main(["score", "mvbench", answers, "--parser", "lmms-eval", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"].endswith("4-frames/lmms-eval")
    assert bench("mvbench", *where, "--frames", "0") == 2


def test_mmbench_in_all_orders(bench, tmp_path, capsys):
    path = test_mmbench.table(tmp_path / "MMBench_DEV_EN_V11.tsv", test_mmbench.ROWS)
    assert bench("mmbench", "--data", path, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["metric"] == "mmbench/v1.1-dev-en/circular"
    assert len(lines(tmp_path / "out" / "answers.jsonl")) == 5
    predictions = tmp_path / "predictions.tsv"
    answers = str(tmp_path / "out" / "answers.jsonl")
    assert main(["score", "mmbench", answers, "--export", str(predictions)]) == 0
    capsys.readouterr()
    edition = ("--edition", "v1.1-dev-en", "--json")
    assert main(["score", "mmbench", str(predictions), *edition]) == 0
    again = json.loads(capsys.readouterr().out)
    values = {name: one["value"] for name, one in scores["metrics"].items()}
    assert {name: one["value"] for name, one in again["metrics"].items()} == values
    assert main(["score", "mmbench", str(predictions)]) == 2
    assert "--edition" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mmbench", "mmmu", "blink", "mantis", "nlvr2", "mvbench"])
def test_without_data_the_command_says_what_to_get(bench, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("MMLM_DATA_DIR", str(tmp_path / "empty"))
    assert bench(name) == 2
    official = "mmbench-dev-en-v11" if name == "mmbench" else name
    assert f"mmlm data fetch {official}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fetched_data_are_found(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MMLM_DATA_DIR", str(tmp_path / "fetched"))
    data.mantis(tmp_path / "fetched" / "mantis")
    data.nlvr2(tmp_path / "fetched" / "nlvr2")
    data.mvbench(tmp_path / "fetched" / "mvbench")
    assert [bench(name, output=name) for name in ("mantis", "nlvr2", "mvbench")] == [0, 0, 0]


def test_options_out_of_range(bench, tmp_path, capsys):
    folder = data.blink(tmp_path / "set")
    assert bench("blink", "--data", folder, "--count", "0") == 2
    assert "Ask at least 1 question" in capsys.readouterr().err
    assert bench("blink", "--data", folder, "--images", tmp_path / "nowhere") == 2
    assert "is no folder" in capsys.readouterr().err
    assert bench("blink", "--data", tmp_path / "nowhere") == 2
    assert "There is no --data" in capsys.readouterr().err
