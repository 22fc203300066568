"""`mmlm bench text-dominance` and `mmlm score text-dominance` from end to end, on a tiny model."""

import json

import pytest

from mmlm.cli import main

SHORT = ("--generate.max_new_tokens", "5", "--quiet", "--count", "4")


@pytest.fixture
def bench(tiny_folder, tmp_path):
    def run(name, *arguments):
        folder = tmp_path / name
        where = ("--model", str(tiny_folder), "--output", str(folder))
        return main(["bench", "text-dominance", *where, *SHORT, *arguments]), folder

    return run


def lines(folder):
    text = (folder / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_records_are_stored_with_the_answers_and_scored_again(bench, capsys):
    code, folder = bench("out", "--json")
    assert code == 0
    scores = json.loads(capsys.readouterr().out)
    stored = lines(folder)
    assert [line["id"] for line in stored] == ["1", "2", "3", "4"]
    for line in stored:
        record = line["text_dominance"]
        assert record["n_layers"] == 4
        assert record["queries"] == max(line["n_tokens"] - 1, 1)
        assert record["n_visual"] == 16
    assert scores["metric"] == "text-dominance/all"
    assert scores["metrics"]["mdi_middle"]["value"] > 0
    assert scores["methods"] == ["TextDominance(layers=None, queries='generated')"]
    assert json.loads((folder / "scores.json").read_text())["counts"] == scores["counts"]
    assert main(["score", "text-dominance", str(folder / "answers.jsonl"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == scores["metrics"]


def test_batches_and_interruptions_change_nothing(bench):
    _, whole = bench("whole", "--generate.batch_size", "1")
    _, batched = bench("batched", "--generate.batch_size", "4")
    for a, b in zip(lines(whole), lines(batched), strict=True):
        assert a["text"] == b["text"]
        one, other = a["text_dominance"], b["text_dominance"]
        sums = ("text", "visual", "instruction", "first_token")
        assert {k: v for k, v in one.items() if k not in sums} == {
            k: v for k, v in other.items() if k not in sums
        }
        for name in sums:
            assert one[name] == pytest.approx(other[name], rel=1e-5)
    path = whole / "answers.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2])  # whole lines and a half
    _, again = bench("whole", "--generate.batch_size", "1")
    assert (again / "answers.jsonl").read_bytes() == complete


def test_a_method_beside_the_probe_and_what_the_change_means(bench, capsys):
    _, plain = bench("plain")
    code, edited = bench("edited", "--method", "PAI(gamma=1.0)")
    assert code == 0
    assert lines(plain)[0]["text_dominance"] != lines(edited)[0]["text_dominance"]
    capsys.readouterr()
    files = [str(folder / "answers.jsonl") for folder in (edited, plain)]
    code = main(["score", "text-dominance", files[0], "--baseline", files[1], "--json"])
    assert code == 0
    given = capsys.readouterr()
    assert "mdi_middle" in json.loads(given.out)["change"]
    assert "Say 'rebalanced' only if" in given.err
    assert "middle layers: " in given.err


def test_variants_have_names_of_their_own(bench, capsys):
    _, folder = bench("out", "--text", "instruction", "--first_token", "false")
    recorded = json.loads((folder / "answers.jsonl.run.json").read_text())
    assert recorded["information"]["scorer"] == "text-dominance/instruction/without-first"
    capsys.readouterr()
    command = ["score", "text-dominance", str(folder / "answers.jsonl"), "--json"]
    assert main([*command, "--text", "instruction"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "text-dominance/instruction"


def test_beam_search_is_refused_before_the_model_is_loaded(bench, capsys):
    code, folder = bench("out", "--generate.num_beams", "2")
    assert code == 2
    assert "cannot be measured under beam search" in capsys.readouterr().err
    assert not folder.exists()


def test_a_run_that_was_not_measured_says_what_to_do(tiny_folder, tmp_path, capsys):
    where = ("--model", str(tiny_folder), "--output", str(tmp_path / "chair"))
    assert main(["bench", "chair", *where, *SHORT]) == 0
    code = main(["score", "text-dominance", str(tmp_path / "chair" / "captions.jsonl")])
    assert code == 2
    assert "Run `mmlm bench text-dominance`" in capsys.readouterr().err
