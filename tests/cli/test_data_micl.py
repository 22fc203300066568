"""``mmlm data micl`` from making episodes to a score."""

import json

from mmlm.cli import main


def test_from_episodes_to_a_score(tmp_path, tiny_folder, capsys):
    folder = tmp_path / "micl"
    command = ["data", "micl", "--output", str(folder), "--task", "operator", "--task", "outlier"]
    assert main([*command, "--n", "3", "--shots", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 6
    answers = tmp_path / "answers.jsonl"
    generate = ["generate", "--model", str(tiny_folder), "--input", str(folder / "episodes.jsonl")]
    assert main([*generate, "--output", str(answers), "--generate.max_new_tokens", "4"]) == 0
    stored = [json.loads(line) for line in answers.read_text().splitlines()]
    # Every picture stands before its own question, the query's last.
    assert all(line["templated"].count("<image>") == 3 for line in stored)
    assert all(
        line["templated"].index("<image>") < line["templated"].index("Answer") for line in stored
    )
    capsys.readouterr()
    assert main(["score", "micl", str(answers), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["metric"] == "micl/exact"
    assert set(record["metrics"]) == {"with_latent", "all_tasks", "operator", "outlier"}


def test_misuse(tmp_path, capsys):
    output = ["data", "micl", "--output", str(tmp_path / "m")]
    assert main([*output, "--task", "chess"]) == 2
    assert "tasks must be among operator" in capsys.readouterr().err
    assert main([*output, "--shots", "35"]) == 2
    assert "shots must be from 0 to 32" in capsys.readouterr().err
    assert main([*output, "--task", "count", "--n", "2", "--shots", "2"]) in (0, 2)
    assert main([*output, "--task", "clock", "--n", "2"]) == 2
    assert "belongs to another run" in capsys.readouterr().err


def test_a_question_whose_mark_is_no_truth_value_is_refused(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"id": "1", "images": [], "prompt": "hi", "marked": "yes"}))
    arguments = ["generate", "--input", str(path), "--output", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 2
    assert "`marked` must be true or false" in capsys.readouterr().err
