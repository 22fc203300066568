"""`mmlm data convert` and `mmlm data merge`: options, messages, exit codes."""

import json

import datasets
import pytest

from data_tools.records import Outcome, StageOutput
from mmlm.cli import main
from mmlm.sharding import Shard


@pytest.fixture
def source(write_questions):
    def write(rows=5, wrong=0):
        good = {"question": "What?", "chosen": "A dog.", "rejected": "A cat.", "image": "0.png"}
        lines = [{**good, "idx": str(n)} for n in range(rows - wrong)]
        lines += [{**good, "idx": str(n), "chosen": ""} for n in range(rows - wrong, rows)]
        return write_questions(lines, "rlaif.jsonl")

    return write


def run(capsys, *arguments):
    code = main(["data", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_from_rlaif_v_to_a_table(source, tmp_path, capsys):
    output = tmp_path / "table"
    code, out, _ = run(capsys, "convert", source(), "--to", "trl", "--output", output)
    assert code == 0
    assert "5 records, 0 left out" in out
    table = datasets.load_from_disk(str(output))
    assert table.column_names == ["id", "images", "prompt", "chosen", "rejected"]
    assert table[0]["images"][0].size == (64, 64)


@pytest.mark.parametrize(("wrong", "code"), [(1, 0), (2, 3), (5, 3)])
def test_what_was_left_out_is_said(source, tmp_path, capsys, wrong, code):
    output = tmp_path / "out.jsonl"
    found = run(
        capsys,
        *("convert", source(wrong=wrong), "--from", "rlaif-v", "--to", "mmlm"),
        *("--output", output, "--show", 1),
    )
    assert found[0] == code
    assert f"{5 - wrong} records, {wrong} left out" in found[1]
    assert f"rlaif.jsonl, line {6 - wrong}: `chosen` is empty" in found[2]
    assert (f"and {wrong - 1} more" in found[2]) is (wrong > 1)
    assert output.exists() is (wrong < 5)


def test_json(source, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    arguments = ("convert", source(wrong=1), "--to", "mmlm", "--output", output, "--json")
    code, out, _ = run(capsys, *arguments)
    value = json.loads(out)
    assert code == 0
    assert (value["written"], value["left_out"]) == (4, 1)
    assert value["problems"][0]["reason"] == "`chosen` is empty"


def test_raw_strings_for_the_embedded_model(source, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    code, _, _ = run(
        capsys,
        *("convert", source(), "--to", "trl-text", "--model", "embedded", "--output", output),
    )
    assert code == 0
    row = json.loads(output.read_text().splitlines()[0])
    assert "What?" in row["prompt"]
    assert row["chosen"].strip().startswith("A dog.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "coco"), "no format 'coco'"),
        (("--to", "trl-text"), "rendered with a model's chat template"),
        (("--to", "trl", "--model", "embedded"), "written without a model"),
        (("--to", "llava"), "written to .json or .jsonl"),
        (("--to", "trl", "--from", "coco"), "no format 'coco' to read"),
        (("--to", "trl", "--from", "sentinel"), ""),
    ],
)
def test_refused_before_any_work(source, tmp_path, capsys, options, message):
    output = tmp_path / ("out" if "llava" in options else "new.jsonl")
    output = tmp_path / "out.parquet" if "llava" in options else output
    code, _, err = run(capsys, "convert", source(), *options, "--output", output)
    assert code == (3 if "sentinel" in options else 2)
    assert message in err
    assert not output.exists()


def test_merge(tmp_path, capsys):
    def shard(index):
        with StageOutput(tmp_path, {}, ("pairs",), Shard(index, 2), total=6) as output:
            for one in "abcdef":
                if Shard(index, 2).owns(one):
                    output.write([Outcome(one, "ok", {"pairs": [{"id": one}]})])

    shard(0)
    code, _, err = run(capsys, "merge", tmp_path)
    assert code == 2
    assert "lacks the shards 1/2" in err
    shard(1)
    code, out, err = run(capsys, "merge", tmp_path)
    assert code == 0
    assert "pairs.jsonl: 6 lines" in out
    assert "6 records, sorted by id" in err
    code, out, _ = run(capsys, "merge", tmp_path, "--json")
    assert json.loads(out) == {"output": str(tmp_path), "records": 6, "lines": {"pairs": 6}}
