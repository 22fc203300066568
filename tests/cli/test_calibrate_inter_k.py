"""``mmlm calibrate inter-k``: what it measures is what it writes, and generate reads it."""

import json

import pytest
import torch
import yaml

import mmlm
from decoding.inter import calibrate_k
from mmlm.cli import main
from mmlm.inputs import load_image, message, prepare


@pytest.fixture
def asked(tiny_folder, write_questions, questions, tmp_path):
    """Runs the command on four questions; returns (exit code, output file)."""

    def ask(*options):
        source, output = write_questions(questions[:4]), tmp_path / "inter.yaml"
        code = main(
            [
                *("calibrate", "inter-k", "--model", str(tiny_folder), "--output", str(output)),
                *("--input", str(source), "--max_new_tokens", "3", "--batch_size", "2", *options),
            ]
        )
        return code, output

    return ask


def test_writes_the_quantile_as_a_configuration(asked, questions, tiny_folder, tmp_path, capsys):
    code, output = asked("--quantile", "0.75", "--json")
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    model, processor = mmlm.load(tiny_folder)
    batches = [
        prepare(
            processor,
            [[message("user", q["prompt"], 1)] for q in questions[start : start + 2]],
            [[load_image(tmp_path / q["image"])] for q in questions[start : start + 2]],
        )
        for start in (0, 2)
    ]
    with torch.no_grad():
        k = calibrate_k(model, batches, 0.75, max_new_tokens=3)
    assert report["k"] == pytest.approx(k, rel=1e-3)
    assert report["steps"] <= 4 * 3
    (text,) = yaml.safe_load(output.read_text())["methods"]
    assert mmlm.parse_method(text) == mmlm.INTER(k=report["k"])
    answers = tmp_path / "out.jsonl"
    generate = ["generate", "--config", str(output), "--model", str(tiny_folder)]
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(answers)]
    assert main([*generate, *files, "--generate.max_new_tokens", "2"]) == 0
    assert len(answers.read_text().splitlines()) == 4


def test_a_table_for_people(asked, capsys):
    code, output = asked("--image_mask", "columns", "--scope", "plausible")
    assert code == 0
    assert "variance D" in capsys.readouterr().out
    assert "image_mask='columns', scope='plausible'" in output.read_text()


@pytest.mark.parametrize(
    ("options", "message_part"),
    [
        (("--quantile", "1.5"), "quantile must be between 0 and 1"),
        (("--batch_size", "0"), "batch_size must be at least 1"),
        (("--image_mask", "blur"), "image_mask"),
    ],
)
def test_bad_options_are_refused_before_any_work(asked, options, message_part, capsys):
    code, output = asked(*options)
    assert code == 2
    assert message_part in capsys.readouterr().err
    assert not output.exists()
