"""`mmlm bench` on the shipped model: shards, batches and launchers change no byte."""

import json

import pytest

from mmlm.cli import main

COMMON = ("bench", "chair", "--count", "12", "--generate.max_new_tokens", "24", "--quiet")


def run(output, *arguments):
    assert main([*COMMON, "--output", str(output), *arguments]) == 0
    return output


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
def test_four_shards_merged_are_one_run(whole, tmp_path, capsys):
    output = tmp_path / "run"
    for shard in ("3/4", "0/4", "2/4"):
        run(output, "--shard", shard)
        assert not (output / "captions.jsonl").exists()
        assert not (output / "scores.json").exists()
    run(output, "--shard", "1/4")
    assert (output / "captions.jsonl").read_bytes() == (whole / "captions.jsonl").read_bytes()
    assert (output / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    # Whoever comes again, as a shard or as a whole, finds everything done.
    stored = (output / "captions.jsonl").stat().st_mtime_ns
    run(output, "--shard", "2/4")
    run(output)
    assert (output / "captions.jsonl").stat().st_mtime_ns == stored


@pytest.mark.slow
def test_processes_of_a_launcher_divide_the_run(whole, tmp_path, monkeypatch):
    output = tmp_path / "run"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        run(output)
    assert (output / "captions.jsonl").read_bytes() == (whole / "captions.jsonl").read_bytes()


@pytest.mark.slow
def test_batch_1_gives_the_answers_of_batch_8(whole, tmp_path):
    single = run(tmp_path / "single", "--generate.batch_size", "1")
    assert lines(single / "captions.jsonl") == lines(whole / "captions.jsonl")


@pytest.mark.slow
def test_questions_of_many_lengths_keep_the_order_of_the_data_set(tmp_path):
    arguments = ("--count", "6", "--generate.max_new_tokens", "2", "--quiet")
    output = tmp_path / "pope"
    assert main(["bench", "pope", "--output", str(output), *arguments]) == 0
    stored = lines(output / "answers.jsonl")
    splits = [line["split"] for line in stored]
    assert splits == sorted(splits, key=["random", "popular", "adversarial"].index)
    numbers = [line["question_id"] for line in stored if line["split"] == "random"]
    assert numbers == sorted(numbers)


def test_the_run_record_names_everything_that_matters(whole):
    record = json.loads((whole / "captions.jsonl.run.json").read_text())
    assert record["command"] == "bench chair"
    assert record["model"]["id"] == "embedded"
    assert {"dtype", "attention"} <= record["model"].keys()
    assert record["generate"]["seed"] == 0
    assert record["generate"]["do_sample"] is False
    assert record["data"]["world"]["split"] == "natural"
    assert record["weights"].startswith("sha256:")
    assert "revision" in record
    information = record["information"]
    assert information["scorer"] == "chair/wordnet"
    assert {"mmlm", "torch", "transformers", "nltk"} <= information["versions"].keys()


def test_a_shard_without_a_request_says_so(tmp_path, capsys):
    output = str(tmp_path / "run")
    code = main([*COMMON, "--output", output, "--count", "1", "--shard", "0/64"])
    other = main([*COMMON, "--output", output, "--count", "1", "--shard", "1/64"])
    assert 2 in (code, other)
    assert "has nothing to do" in capsys.readouterr().err
