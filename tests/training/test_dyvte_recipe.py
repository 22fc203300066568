"""Training routers as users do: from a configuration, on a tiny LLaVA."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from recipe_files import write_config
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from mmlm import DyVTE, attach, measured
from mmlm.errors import InputError
from mmlm.inputs import load_image, message, prepare, use_chat_template
from training.__main__ import main
from training.exits.labels import ExitRule, LabelFile, exit_shares, read_labels
from training.exits.passes import SharedPass

ROWS = 16
TURNS = [
    ("what is shown here ?", "a cat sits on a red couch ."),
    ("is there a dog ?", "no ."),
    ("describe the image .", "people watch a train in the station ."),
    ("what jumps ?", "the quick brown fox jumps over the lazy dog ."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose picture reaches the text in its first two layers only, and conversations.

    Attention adds nothing in the layers above, so an exit after layer 1 changes nothing at all,
    and one after layer 0 takes away what layer 1 would have copied.
    """
    folder = tmp_path_factory.mktemp("dyvte")
    model, processor = tiny.build("llava")
    use_chat_template(processor, "simple")
    with torch.no_grad():
        for layer in model.get_decoder().layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
        model.get_decoder().layers[1].self_attn.o_proj.weight.mul_(4)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for number in range(ROWS):
        tiny.picture(number).save(folder / f"{number}.png")
    write(folder / "rows.jsonl", range(ROWS - 4))
    write(folder / "unseen.jsonl", range(ROWS - 4, ROWS))
    return folder


def write(path, numbers, *, pictures=1, turns=1):
    lines = []
    for number in numbers:
        spoken = []
        for turn in range(turns):
            question, answer = TURNS[(number + turn) % 4]
            images = "<image>" * pictures + "\n" if not turn else ""
            spoken.append({"from": "human", "value": images + question})
            spoken.append({"from": "gpt", "value": answer})
        images = [f"{(number + k) % ROWS}.png" for k in range(pictures)]
        row = {"id": f"r{number}", "images": images, "conversations": spoken}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return str(path)


def config(folder, output, **changes):
    made = {
        "output": str(output),
        "recipe": {
            "class_path": "training.exits.recipe.DyVTETraining",
            "init_args": {
                "model": {
                    "name": str(folder / "model"),
                    "methods": ["DyVTE(hidden=16)"],
                    "learns": ["methods"],
                },
                "data": {"files": [str(folder / "rows.jsonl")]},
                "exits": {"per_step": 2},
                "optimisation": {
                    "learning_rate": 1e-2,
                    "batch_size": 4,
                    "rows_per_pass": 4,
                    "steps": 4,
                },
                "tracking": {"progress": "never", "log_every": 1},
            },
        },
        "run": {"precision": "no"},
    }
    return write_config(made, output, changes)


def train(folder, output, **changes):
    assert main(["--config", config(folder, output, **changes)]) == 0
    return output


def logged(output, name="loss"):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def short(folder, tmp_path_factory):
    """Four steps, with a checkpoint in the middle."""
    output = tmp_path_factory.mktemp("short") / "out"
    return train(folder, output, saving__every=2, saving__keep=5, export=["model"])


def test_acceptance_9_dyvte_learns_where_an_exit_is_harmless(folder, tmp_path):
    output = train(
        folder,
        tmp_path / "out",
        data__eval_files=[str(folder / "unseen.jsonl")],
        exits__per_step=4,
        optimisation__steps=20,
        optimisation__learning_rate=1e-2,
        saving__every=20,
    )
    assert logged(output)[20] < 0.2 * logged(output)[1]
    assert logged(output, "eval_keep_accuracy")[20] > 0.95
    assert logged(output, "eval_exit_accuracy")[20] > 0.95
    assert logged(output, "eval_layer_00/keep")[20] > 0.95
    shares = exit_shares(read_labels(output), ExitRule())
    assert shares[0][1] < 0.05  # an exit after layer 0 is harmful, a later one is not
    assert [share for _, share in list(shares.values())[1:]] == [1.0] * 3
    from mmlm.model.checkpoint import load

    model, processor = load(str(folder / "model"))
    use_chat_template(processor, "simple")
    method = DyVTE(weights_file=str(output / "routers.safetensors"), hidden=16)
    exits, asked = [], [[message("user", question, 1)] for question, _ in TURNS]
    pictures = [[load_image(folder / f"{ROWS - 4 + n}.png")] for n in range(4)]
    inputs = prepare(processor, asked, pictures)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with attach(model, method):
        ours = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        exits = [record["dyvte"]["exit_layer"] for record in measured(model)]
    assert exits == [1] * 4
    assert torch.equal(ours, plain)


def test_nothing_but_the_routers_learns(folder, short):
    before = LlavaForConditionalGeneration.from_pretrained(folder / "model").state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(short / "model").state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    routers = load_file(short / "routers.safetensors")
    assert sorted(routers) == [f"{n}.{w}.weight" for n in range(4) for w in ("w1", "w2")]
    stored = load_file(short / "model" / "methods.safetensors")
    assert all(torch.equal(stored[f"DyVTE.{n}"], x) for n, x in routers.items())
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.weights import make
    from mmlm.model.checkpoint import load

    model, _ = load(str(folder / "model"))
    fresh = make(Anatomy(model), [DyVTE(hidden=16)])["DyVTE"].state_dict()
    assert all(not torch.equal(fresh[n], x) for n, x in routers.items())


def test_a_resumed_training_makes_the_same_steps(folder, short, tmp_path):
    """As after a kill behind step 2."""
    again = tmp_path / "again"
    shutil.copytree(short, again)
    for path in (again / "checkpoint-4", again / "model"):
        shutil.rmtree(path)
    for name in ("finished.json", "routers.safetensors"):
        (again / name).unlink()
    # The folder was moved: the configuration says where the run belongs.
    train(folder, again, saving__every=2, saving__keep=5, export=["model"])
    assert logged(again) == pytest.approx(logged(short), abs=1e-6)
    first, second = (load_file(run / "routers.safetensors") for run in (short, again))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_exact_labels_are_kept_and_serve_another_rule(folder, short, tmp_path, monkeypatch):
    labels = read_labels(short)
    assert len(labels) > ROWS
    lines = (short / "labels-0.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4 * 4 * 2  # the origin; steps, rows, exits
    assert json.loads(lines[0]) == {"origin": {"model": str(folder / "model")}}

    def fails(self, layer):
        raise AssertionError("an exit was judged again")

    monkeypatch.setattr(SharedPass, "outcome", fails)
    same = train(folder, tmp_path / "same", exits__labels_from=str(short))
    assert logged(same) == pytest.approx(logged(short), abs=1e-6)
    other = train(
        folder,
        tmp_path / "other",
        exits__labels_from=str(short),
        exits__rule={"agree": 0.0, "ratio": 1000.0},
    )
    assert set(logged(other, "exit_share").values()) == {1.0}
    assert min(logged(short, "exit_share").values()) < 1.0


def test_what_is_logged(short):
    log = [json.loads(line) for line in (short / "log.jsonl").read_text().splitlines()]
    first = next(line for line in log if line.get("step") == 1 and "loss" in line)
    layers = {name.split("/")[0] for name in first if name.startswith("layer_")}
    assert len(layers) == 2  # exits of this step
    for name, value in first.items():
        if "/" in name or name.endswith("_accuracy"):
            assert 0 <= value <= 1, name


def test_rows_without_a_picture_are_left_out(folder, tmp_path, capsys):
    mixed = tmp_path / "mixed.jsonl"
    lines = Path(write(folder / "text.jsonl", range(3), pictures=0))
    mixed.write_text((folder / "rows.jsonl").read_text() + lines.read_text())
    train(
        folder,
        tmp_path / "out",
        data__files=[str(mixed)],
        data__image_folder=str(folder),
        optimisation__steps=1,
    )
    assert "train: 3 of 15 rows left out: no picture" in capsys.readouterr().err


def test_the_last_of_several_answers_is_judged(folder, tmp_path, capsys):
    file = write(folder / "turns.jsonl", range(4), turns=2)
    output = train(folder, tmp_path / "out", data__files=[file], optimisation__steps=1)
    assert len(read_labels(output)) == 8
    apart = train(
        folder,
        tmp_path / "apart",
        data__files=[file],
        exits__several_answers="apart",
        optimisation__steps=2,
    )
    assert {row for row, _ in read_labels(apart)} == {f"r{n}#{k}" for n in range(4) for k in (1, 2)}
    bad = config(folder, tmp_path / "bad", data__files=[file], exits__several_answers="error")
    assert main(["--config", bad]) == 2
    assert "row 'r0' has 2 answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exits__per_step": 5}, "per_step = 5, but DyVTE(hidden=16) has routers at 4 layers"),
        ({"exits__per_step": 0}, "per_step = 0: must be at least 1"),
        ({"exits__class_weights": [1.0, 0.0]}, "two positive numbers"),
        ({"data__packing": True, "data__max_length": 500}, "exits are per prompt"),
        ({"model__methods": []}, "routers are trained alone"),
        ({"model__learns": ["methods", "projector"]}, "routers are trained alone"),
        ({"model__methods": ["DyVTE(exit_layer=1)"]}, "no methods with weights"),
        ({"model__methods": ["DyVTE(gate_layers=())"]}, "no methods with weights"),
        ({"model__methods": ["DyVTE(hidden=16)", "VHR()"]}, "VHR acts at heads"),
        ({"exits__labels_from": "/nowhere"}, "'/nowhere' holds no labels-N.jsonl"),
    ],
)
def test_what_cannot_be_trained_is_said_before_any_step(folder, tmp_path, capsys, changes, words):
    assert main(["--config", config(folder, tmp_path / "bad", **changes)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*/checkpoint-*"))


def test_only_texts_are_refused(folder, tmp_path, capsys):
    file = write(folder / "only.jsonl", range(3), pictures=0)
    assert main(["--config", config(folder, tmp_path / "bad", data__files=[file])]) == 2
    assert "None of the 3 rows (train) has a picture" in capsys.readouterr().err


def test_labels_of_another_model_or_damaged_ones_are_refused(folder, short, tmp_path):
    with pytest.raises(InputError, match="holds labels of"):
        read_labels(short, {"model": "another"})
    LabelFile(tmp_path, 0, {"model": "m"})
    path = tmp_path / "labels-0.jsonl"
    whole = (
        path.read_text() + '{"id": "a", "layer": 0, "agree": 1, "ce_with": 1, "ce_without": 1}\n'
    )
    path.write_text(whole + '{"id": "a", "lay')  # a kill cut it off
    assert list(read_labels(tmp_path)) == [("a", 0)]
    path.write_text(whole + '{"id": "a"}\n')
    with pytest.raises(InputError, match=r"labels-0\.jsonl:3 is damaged"):
        read_labels(tmp_path)


@pytest.mark.slow
def test_two_processes_of_deepspeed_train_and_resume(folder, tmp_path):
    """The losses of one process; then the second half again, as after a kill."""
    options = {
        "optimisation__rows_per_pass": 1,
        "optimisation__shuffle": False,
        "saving__every": 2,
        "saving__keep": 5,
    }
    single = train(folder, tmp_path / "single", **options)
    output = tmp_path / "two"
    path = config(folder, output, **options, deepspeed="zero2")

    def launch():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        run = subprocess.run(
            [*command, "--nproc-per-node", "2", "-m", "training", "--config", path],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        return run.stderr + run.stdout

    launch()
    assert logged(output, "exit_share") == pytest.approx(logged(single, "exit_share"), abs=1e-6)
    assert logged(output) == pytest.approx(logged(single), abs=1e-5)
    routers = load_file(output / "routers.safetensors")
    expected = load_file(single / "routers.safetensors")
    assert all(torch.allclose(routers[n], expected[n], atol=1e-4) for n in expected)
    assert read_labels(output).keys() == read_labels(single).keys()
    shutil.rmtree(output / "checkpoint-4")
    for name in ("finished.json", "routers.safetensors"):
        (output / name).unlink()
    assert "Going on from" in launch()
    assert logged(output) == pytest.approx(logged(single), abs=1e-5)
    again = load_file(output / "routers.safetensors")
    assert all(torch.allclose(again[n], routers[n], atol=1e-6) for n in routers)


def test_zero3_is_refused(folder):
    from types import SimpleNamespace

    from training.exits.recipe import _refuse_sharded

    with pytest.raises(InputError, match="ZeRO-3 cannot follow"):
        _refuse_sharded(SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)))
    _refuse_sharded(SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2)))
