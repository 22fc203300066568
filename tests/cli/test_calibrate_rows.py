"""``mmlm calibrate sink-dims`` and ``heads``: what they measure is what they write."""

import json

import pytest
import torch
import yaml
from tiny import build

import mmlm
from decoding.var import find_sink_dims
from mmlm.cli import main
from mmlm.cli.calibrate.head_trials import choose_act, choose_zerotuning
from mmlm.cli.calibrate.questions import is_right
from mmlm.inputs import load_image, message, prepare


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A tiny model whose prompts begin with a massive activation in dimension 11."""
    folder = tmp_path_factory.mktemp("planted") / "model"
    model, processor = build("llava")
    first = processor.tokenizer("user")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[first, 11] = 400.0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class TestSinkDims:
    def test_writes_a_configuration_that_generate_reads(
        self, planted, write_questions, questions, tmp_path, capsys
    ):
        source, output = write_questions(questions[:3]), tmp_path / "var.yaml"
        command = ["calibrate", "sink-dims", "--model", str(planted), "--input", str(source)]
        assert main([*command, "--tau", "5", "--output", str(output), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["sink_dims"] == [11]
        assert report["largest"][0]["dim"] == 11
        assert report["limit"] == 8.0
        (text,) = yaml.safe_load(output.read_text())["methods"]
        assert mmlm.parse_method(text) == mmlm.VAR(sink_dims=(11,), tau=5.0)
        generate = ["generate", "--config", str(output), "--model", str(planted)]
        answers = ["--input", str(source), "--output", str(tmp_path / "out.jsonl")]
        assert main([*generate, *answers, "--generate.max_new_tokens", "2"]) == 0
        assert main([*command, "--tau", "5", "--output", str(output)]) == 0  # ours: written again
        assert "Sink dimensions (11,)" in capsys.readouterr().out

    def test_measures_what_the_function_measures(
        self, planted, write_questions, questions, tmp_path, capsys
    ):
        source = write_questions(questions[:2])
        command = ["calibrate", "sink-dims", "--model", str(planted), "--input", str(source)]
        assert main([*command, "--tau", "5", "--output", str(tmp_path / "v.yaml"), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        model, processor = mmlm.load(planted)
        inputs = [
            prepare(
                processor,
                [[message("user", q["prompt"], 1)]],
                [[load_image(tmp_path / q["image"])]],
            )
            for q in questions[:2]
        ]
        found = find_sink_dims(model, inputs, tau=5.0)
        assert report["sink_dims"] == list(found.dims)
        median = found.ratio.flatten(0, 1).median(0).values[11]
        assert report["largest"][0]["median"] == pytest.approx(float(median), abs=1e-3)

    def test_the_embedded_model_has_none_and_it_says_so(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["calibrate", "sink-dims", "--count", "2"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "No dimension of the first token is massive at tau 20" in shown
        assert "cannot exceed 13.9" in shown
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (("--tau", "0"), "tau must be above 0"),
            (("--share", "1.5"), "share must be above 0 and at most 1"),
            (("--count", "0"), "count must be at least 1"),
            (("--seed", "-1"), "seed must not be negative"),
            (("--split", "nowhere"), "There is no split 'nowhere'"),
            (("--output", "nowhere/var.yaml"), "There is no folder 'nowhere'"),
        ],
    )
    def test_bad_options_are_refused(self, options, part, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["calibrate", "sink-dims", *options]) == 2
        assert part in capsys.readouterr().err

    def test_a_foreign_file_is_not_overwritten(self, tmp_path, capsys):
        path = tmp_path / "mine.yaml"
        path.write_text("methods: []\n")
        assert main(["calibrate", "sink-dims", "--output", str(path)]) == 2
        assert "was not written by `mmlm calibrate`" in capsys.readouterr().err
        assert path.read_text() == "methods: []\n"


class TestHeads:
    @pytest.fixture
    def ask(self, tiny_folder, write_questions, questions, tmp_path):
        """Runs the command on questions that the plain model answers right, but for the last."""
        model, processor = mmlm.load(tiny_folder)
        write_questions([])
        lines = []
        for q in questions:
            inputs = prepare(
                processor,
                [[message("user", q["prompt"], 1)]],
                [[load_image(tmp_path / q["image"])]],
            )
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :])
            lines.append({"image": q["image"], "prompt": q["prompt"], "label": text.strip()})
        lines[4]["label"] = "nothing of the kind"
        source = write_questions(lines, "labelled.jsonl")
        output = tmp_path / "heads.yaml"

        def run(method, *options):
            command = ["calibrate", "heads", method, "--model", str(tiny_folder)]
            files = ["--questions", str(source), "--output", str(output)]
            code = main([*command, *files, "--max_new_tokens", "4", "--json", *options])
            return code, output

        return run

    def test_act_keeps_heads_under_which_accuracy_does_not_fall(self, ask, capsys):
        code, output = ask("ACT", "--theta", "0.03", "--beta", "0.0")
        assert code == 0
        report = json.loads(capsys.readouterr().out)
        assert report["questions"] == 7
        assert report["held_out"]["questions"] == 2
        assert report["held_out"]["plain"] == 1.0
        assert report["plain"] == pytest.approx(6 / 7)
        assert len(report["trials"]) == 8  # layer 2 only: not the first two, not the last
        kept = [name for name, value in report["trials"].items() if value >= report["plain"]]
        assert 0 < len(kept) <= 8
        (text,) = yaml.safe_load(output.read_text())["methods"]
        method = mmlm.parse_method(text)
        alone = {
            mmlm.ACT(heads_by_layer=((2, (head,)),), theta=0.03, beta=0.0).label
            for head in method.heads_by_layer[0][1]
        }
        assert alone == set(kept)

    def test_a_run_that_was_stopped_goes_on(self, ask, tmp_path, capsys):
        assert ask("ACT", "--theta", "0.03")[0] == 0
        whole = json.loads(capsys.readouterr().out)
        path = tmp_path / "heads.yaml.trials.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        assert len(lines) == 9
        path.write_text("".join(lines[:3]) + lines[3][:20])
        assert ask("ACT", "--theta", "0.03")[0] == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out) == whole
        assert "3 of 9 trials were done" in shown.err
        assert path.read_text() == "".join(lines)
        # Another questionnaire is another run.
        assert ask("ACT", "--theta", "0.03", "--data.held_out", "0.5")[0] == 2
        assert "belongs to another run" in capsys.readouterr().err

    def test_zerotuning_tries_both_directions(self, ask, capsys):
        code, output = ask("ZeroTuning", "--layer", "1", "--gamma", "50")
        assert code == 0
        report = json.loads(capsys.readouterr().out)
        assert len(report["trials"]) == 16
        gammas = {mmlm.parse_method(name).gamma for name in report["trials"]}
        assert gammas == {50.0, 0.02}
        assert output.exists() is bool(report["methods"])

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (("ACT", "--gamma", "0.9"), "gamma must be above 1"),
            (("ACT", "--gain", "-0.1"), "gain must be at least 0"),
            (("ACT", "--data.held_out", "1"), "data.held_out must be between 0 and 1"),
            (("ACT", "--count", "1"), "count must be at least 2"),
            (("ACT", "--seed", "-2"), "seed must not be negative"),
            (("ACT", "--batch_size", "0"), "batch_size must be at least 1"),
            (("ACT", "--layer", "9"), "Layers [9] were asked for"),
            (("ACT", "--count", "2", "--data.held_out", "0.9"), "2 would be held out"),
            (("VHR",), "VHR"),
        ],
    )
    def test_bad_options_are_refused(self, ask, options, part, capsys):
        code, output = ask(*options)
        assert code == 2
        assert part in capsys.readouterr().err
        assert not output.exists()

    def test_a_question_without_a_label_is_refused(self, tmp_path, capsys):
        path = tmp_path / "q.jsonl"
        path.write_text('{"image": "a.png", "text": "what ?"}\n')
        command = ["calibrate", "heads", "ACT", "--questions", str(path)]
        assert main([*command, "--output", str(tmp_path / "o.yaml")]) == 2
        assert "question 1: `label` must be text, got None" in capsys.readouterr().err


def test_answers_are_compared_by_their_first_words():
    assert is_right("Yes, there is a dog.", "yes")
    assert is_right("no", "No.")
    assert is_right("two dogs and a cat", "Two dogs")
    assert not is_right("yesterday", "yes")
    assert not is_right("", "yes")
    assert not is_right("there is no dog", "no")


def test_choices_by_hand():
    a, b, c = (0, 0), (0, 1), (1, 0)
    accuracy = {"plain": 0.5, "a": 0.6, "b": 0.5, "c": 0.4, "A": 0.55, "B": 0.7, "C": 0.4}
    names = {a: "a", b: "b", c: "c"}
    assert choose_act(accuracy, names, 0.0) == [a, b]
    assert choose_act(accuracy, names, 0.05) == [a]
    inverse = {a: "A", b: "B", c: "C"}
    assert choose_zerotuning(accuracy, names, inverse, 0.0) == ([a], [b])
    assert choose_zerotuning(accuracy, names, inverse, 0.15) == ([], [b])
