"""Recipes as files and as classes: what ships, what is read, what is refused before any work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmlm.errors import InputError
from tests.training.preference_toy import configuration, logged, write_model, write_pairs
from training.__main__ import main
from training.arguments import deepspeed_file, trainer_arguments
from training.config import Run, RunSettings, build_parser
from training.launch import watch_for_lost_processes
from training.preference.recipe import PreferenceData
from training.preference.rows import read_rows
from training.settings import LoraSettings, ModelSettings, Optimisation

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "train"
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if not path.stem.startswith("seed"))
WHOLE = [path for path in RECIPES if "recipe:\n  class_path" in path.read_text()]


@pytest.fixture
def toy(tmp_path):
    write_pairs(tmp_path, count=8)
    write_model(tmp_path / "model")
    return tmp_path


def recipe(path):
    parser = build_parser()
    return parser.instantiate(parser.parse_args(["--config", str(path)])).recipe


def name(path):
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


@pytest.mark.parametrize("path", WHOLE, ids=name)
def test_every_recipe_is_read_and_says_how_to_launch_it(path):
    built = recipe(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(line.lstrip("# ") for line in header)
    assert re.search(rf"--config (configs/)?{re.escape(name(path))}(\.yaml)?\b", text), text
    assert "--module training" in text or "mmlm train" in text
    assert "emory" in text
    assert "GB" in text
    if built.deepspeed is not None:
        assert deepspeed_file(built.deepspeed).is_file()
    several = (1, 2, 8)
    if "world" in str(path):  # two processes where the header says so, and says nothing else
        several = (1, 2) if "--num_gpus 2" in text and "rows_per_pass" not in text else (1,)
    for processes in several:
        built.optimisation.accumulation(processes)


@pytest.mark.parametrize(
    ("path", "rate", "more"),
    [
        ("sentinel/llava15_7b", 2e-6, {}),
        ("sentinel/llava15_13b", 3e-6, {}),
        ("sentinel/llava16_7b", 2e-6, {}),
        ("sentinel/llava16_13b", 3e-6, {}),
        ("sentinel/qwen2_vl_2b", 2e-6, {}),
        ("sentinel/qwen2_vl_7b", 2e-6, {}),
        ("sentinel/qwen25_vl_7b", 3e-6, {}),
        ("mia/llava15", 5e-5, {"schedule": "linear", "warmup": 0.1, "epochs": 3}),
        ("mia/llava15_safe", 5e-6, {"schedule": "linear", "warmup": 0.1, "epochs": 3}),
    ],
)
def test_presets_have_the_papers_values(path, rate, more):
    built = recipe(FOLDER / f"{path}.yaml")
    given = built.optimisation
    wanted = {"schedule": "cosine", "warmup": 0, "epochs": 1, "batch_size": 64, "weight_decay": 0}
    assert given.learning_rate == rate
    for key, value in {**wanted, **more}.items():
        assert getattr(given, key) == value, key
    assert built.model.lora == LoraSettings(r=128, alpha=256, dropout=0.05)
    assert built.model.learns == ("language",)
    assert built.loss.beta == 0.1
    mia = path.startswith("mia")
    assert built.loss.types == (("sigmoid", "sft") if mia else ("sigmoid",))
    assert built.loss.weights == ((1.0, 0.1) if mia else None)
    assert built.deepspeed == "zero2"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")),
                         ids=lambda path: path.stem)  # fmt: skip
def test_deepspeed_files(path):
    content = json.loads(path.read_text())
    zero = content["zero_optimization"]
    assert zero["stage"] == int(path.stem[4])
    assert ("offload_optimizer" in zero) == path.stem.endswith("offload")
    # Without it ZeRO-3 writes no weights that others can read.
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)


def test_an_unknown_deepspeed_configuration_names_those_that_ship():
    with pytest.raises(InputError, match="no DeepSpeed configuration 'zero9'") as caught:
        deepspeed_file("zero9")
    assert "zero2" in caught.value.advice


def _run(folder):
    return Run(folder, 3, RunSettings(precision="no"), {"recipe": {}, "seed": 3}, ())


def test_settings_reach_the_trainer(tmp_path):
    from transformers import TrainingArguments

    given = Optimisation(
        learning_rate=2e-3, schedule="linear", warmup=0.1, epochs=2, batch_size=12,
        rows_per_pass=3, weight_decay=0.1, betas=(0.8, 0.9), max_grad_norm=0.5,
        activation_checkpointing=True, group_by_length=True,
    )  # fmt: skip
    made = trainer_arguments(TrainingArguments, _run(tmp_path), given, deepspeed=None)
    assert made.gradient_accumulation_steps == 4
    assert made.per_device_train_batch_size == 3
    assert (made.learning_rate, made.lr_scheduler_type.value) == (2e-3, "linear")
    assert made.get_warmup_steps(100) == 10
    assert (made.num_train_epochs, made.max_steps, made.seed) == (2, -1, 3)
    assert (made.weight_decay, made.adam_beta1, made.adam_beta2) == (0.1, 0.8, 0.9)
    assert made.max_grad_norm == 0.5
    assert made.gradient_checkpointing
    assert made.train_sampling_strategy == "group_by_length"
    assert not made.bf16
    files = replace(given, group_by_length=False, shuffle=False, steps=7)
    made = trainer_arguments(TrainingArguments, _run(tmp_path), files, deepspeed=None)
    assert (made.train_sampling_strategy, made.max_steps) == ("sequential", 7)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setenv("WORLD_SIZE", "4")
    given = Optimisation(learning_rate=1e-3, batch_size=12, rows_per_pass=2)
    with pytest.raises(InputError, match=r"12 is no multiple of .* 2 x 4 = 8"):
        trainer_arguments(TrainingArguments, _run(tmp_path), given, deepspeed=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimisation(learning_rate=0), "learning_rate = 0"),
        (lambda: Optimisation(learning_rate=float("inf")), "learning_rate = inf"),
        (lambda: Optimisation(learning_rate=1, projector_learning_rate=-1), "projector_learning"),
        (lambda: Optimisation(learning_rate=1, warmup=1.0), "warmup = 1.0"),
        (lambda: Optimisation(learning_rate=1, epochs=0), "epochs = 0"),
        (lambda: Optimisation(learning_rate=1, steps=0), "steps = 0"),
        (lambda: Optimisation(learning_rate=1, batch_size=0), "batch_size = 0"),
        (
            lambda: Optimisation(learning_rate=1, shuffle=False, group_by_length=True),
            "order of its own",
        ),
        (lambda: LoraSettings(r=0), "r = 0"),
        (lambda: LoraSettings(dropout=1.0), "dropout = 1.0"),
        (lambda: ModelSettings(learns=()), "learns is empty"),
        (lambda: ModelSettings(learns=("projector",), lora=LoraSettings()), "add language"),
        (lambda: PreferenceData(files=()), "files is empty"),
        (lambda: PreferenceData(files=("a",), share=0), "share = 0"),
        (lambda: PreferenceData(files=("a",), share=1.5), "share = 1.5"),
        (lambda: PreferenceData(files=("a",), max_length=0), "max_length = 0"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_larger_share_holds_every_smaller_one(tmp_path):
    rows = read_rows([str(write_pairs(tmp_path, count=16))])
    shares = [PreferenceData(files=("a",), share=s).taken(rows) for s in (0.25, 0.5, 1.0)]
    assert [len(some) for some in shares] == [4, 8, 16]
    ids = [[row.id for row in some] for some in shares]
    assert set(ids[0]) < set(ids[1]) < set(ids[2])
    order = [row.id for row in rows]
    assert all(some == sorted(some, key=order.index) for some in ids)
    assert ids[1] != order[:8]
    shuffled = PreferenceData(files=("a",), share=0.5).taken(rows[::-1])
    assert {row.id for row in shuffled} == set(ids[1])
    with pytest.raises(InputError, match="is none"):
        PreferenceData(files=("a",), share=0.01).taken(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--only", "vision"], "this recipe has one stage"),
        (["--recipe.init_args.data.files", "[nothing.jsonl]"], "nothing.jsonl"),
        (["--recipe.init_args.saving.best", "loss"], "nothing to evaluate on"),
        (["--recipe.init_args.loss.types", "[sigmod]"], "sigmod"),
        (["--recipe.init_args.loss.beta", "0"], "beta must be a finite number > 0"),
        (["--recipe.init_args.loss.weights", "[1.0, 2.0]"], "2 loss weights"),
        (["--recipe.init_args.extra_losses", "[Nothing()]"], "Nothing"),
        (["--recipe.init_args.extra_losses", "[AuxiliarySFT()]"], "give both or none"),
        (["--recipe.init_args.deepspeed", "zero9"], "zero9"),
        (
            ["--recipe.init_args.optimisation.projector_learning_rate", "1e-3"],
            "preference training has one rate",
        ),
        (["--recipe.init_args.model.name", "no/where"], "no/where"),
        (["--recipe.init_args.optimisation.rows_per_pass", "3"], "no multiple"),
        (["--recipe.init_args.data.max_length", "20"], "20"),
        (["--recipe.init_args.fast", "[quick]"], "quick"),
    ],
)
def test_what_is_refused_before_the_first_step(toy, change, message, capsys):
    path = configuration(toy, toy / "out")
    try:
        code = main(["--config", str(path), *change])
    except SystemExit as exit_:  # misuse of the command line
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list((toy / "out").glob("checkpoint-*"))
    # What is refused starts no group of processes, which later ones would inherit.
    assert not torch.distributed.is_initialized()
    assert "RANK" not in os.environ


def test_an_export_of_adapters_needs_adapters(toy, capsys):
    path = configuration(toy, toy / "out", model={"name": str(toy / "model")})
    assert main(["--config", str(path)]) == 2
    assert "export = ['merged'] needs adapters" in capsys.readouterr().err


def test_rows_that_stand_in_both_files_are_refused(toy, capsys):
    path = configuration(toy, toy / "out")
    both = ["--recipe.init_args.data.eval_files", f"[{toy / 'pairs.jsonl'}]"]
    assert main(["--config", str(path), *both]) == 2
    assert "8 pairs stand in `files` and in `eval_files`" in capsys.readouterr().err


def test_a_training_from_its_file_to_a_model_that_loads(toy, capsys):
    """One process, evaluation, the best checkpoint, export; then once more: nothing is left."""
    from mmlm.model.checkpoint import load

    evaluation = write_pairs(toy / "evaluation", count=4)
    lines = [json.loads(line) for line in evaluation.read_text().splitlines()]
    text = "".join(json.dumps({**line, "id": f"e{line['id']}"}) + "\n" for line in lines)
    evaluation.write_text(text)
    data = {"files": [str(toy / "pairs.jsonl")], "eval_files": [str(evaluation)]}
    path = configuration(
        toy, toy / "out", steps=4, data=data, export=["adapter", "merged"],
        saving={"every": 2, "best": "loss", "patience": 3},
        fast=["features_once", "shared_prefix"], reference_cache=True,
        optimisation={
            "learning_rate": 1e-2, "steps": 4, "batch_size": 4, "rows_per_pass": 2,
            "group_by_length": True,
        },
    )  # fmt: skip
    assert main(["--config", str(path)]) == 0
    out = toy / "out"
    assert "parameters learn" in capsys.readouterr().err
    assert list(logged(out, "eval_loss")) == [2, 4]
    assert logged(out)[1] == pytest.approx(0.693147, abs=1e-5)
    trained, _ = load(out / "merged")
    start, _ = load(toy / "model")
    before, after = start.state_dict(), trained.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("language_model.layers" in key for key in changed)
    assert (out / "adapter" / "adapter_config.json").exists()
    assert (out / "training.png").stat().st_size > 10_000
    assert main(["--config", str(path)]) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    before = (out / "config.yaml").read_text()
    other = ["--recipe.init_args.optimisation.learning_rate", "0.5"]
    assert main(["--config", str(path), *other]) == 2
    assert "learning_rate was 0.01, now 0.5" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == before
    assert "learning_rate: 0.01" in before
    card = (out / "merged" / "README.md").read_text()
    assert f"Base model: `{toy / 'model'}`" in card
    assert str(toy / "pairs.jsonl") in card


def test_mmlm_train_takes_shipped_names():
    command = [sys.executable, "-m", "mmlm", "train", "--config", "train/sentinel/llava15_7"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert "train/sentinel/llava15_7b" in result.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_lost_connection_is_explained(tmp_path, monkeypatch, capsys, processes):
    from training import launch

    ended = []
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(launch.os, "_exit", ended.append)
    error = RuntimeError("[pair.cc:537] Read error: Connection reset by peer. More")
    if processes == 1:
        with pytest.raises(RuntimeError), watch_for_lost_processes(tmp_path):
            raise error
        assert not ended
        return
    with watch_for_lost_processes(tmp_path):
        raise error
    assert ended == [1]
    assert "process 0 of 2 lost its connection" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shape"), watch_for_lost_processes(tmp_path):
        raise RuntimeError("shape mismatch")


def test_one_process_beside_several_gpus_is_refused(monkeypatch):
    from training.launch import refuse_idle_devices

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="One process sees 4 GPUs") as caught:
        refuse_idle_devices()
    assert "--num_gpus 4" in caught.value.advice
    monkeypatch.setenv("RANK", "0")
    refuse_idle_devices()
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuse_idle_devices()


def test_the_program_leaves_its_group_of_processes(toy, monkeypatch, capsys):
    """Else a finished process now and then aborts at its exit."""
    from training import __main__ as program

    class Meeting:
        def run(self, run, only):
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            assert torch.distributed.is_initialized()
            if only:
                raise InputError("after the meeting", advice="none")

    for only, code in ((None, 0), ("stage", 2)):
        monkeypatch.setattr(program, "parse", lambda given, only=only: (Meeting(), None, only))
        assert program.main([]) == code
        assert not torch.distributed.is_initialized()
