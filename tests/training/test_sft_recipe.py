"""The recipe of supervised fine-tuning, run as users run it, on a tiny LLaVA."""

import json
import math
import os
import subprocess
import sys

import pytest
import tiny
import torch
from recipe_files import write_config
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmlm.inputs import load_image, message, prepare, use_chat_template
from training.__main__ import main

TURNS = [
    ("what is shown here ?", "a cat sits on a red couch ."),
    ("is there a dog ?", "no ."),
    ("describe the image .", "people watch a train in the station ."),
    ("what jumps ?", "the quick brown fox jumps over the lazy dog ."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stored model, and conversations about one, no and two pictures."""
    folder = tmp_path_factory.mktemp("sft")
    model, processor = tiny.build("llava", layers=2)
    use_chat_template(processor, "simple")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for number in range(8):
        tiny.picture(number).save(folder / f"{number}.png")
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(8):
            n_images = (1, 1, 0, 2)[number % 4]
            question, answer = TURNS[number % 4]
            names = [f"{(number + k) % 8}.png" for k in range(n_images)]
            value = "<image>" * n_images + f"\n{question}"
            turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
            row = {"id": str(number), "images": names, "conversations": turns}
            file.write(json.dumps(row) + "\n")
    return folder


def _config(folder, output, **changes):
    made = {
        "output": str(output),
        "recipe": {
            "class_path": "training.sft.recipe.SFT",
            "init_args": {
                "model": {"name": str(folder / "model")},
                "data": {"files": [str(folder / "rows.jsonl")]},
                "optimisation": {"learning_rate": 3e-3, "batch_size": 4, "rows_per_pass": 4},
                "tracking": {"progress": "never", "log_every": 1},
            },
        },
        "run": {"precision": "no"},
    }
    return write_config(made, output, changes)


def _train(folder, output, **changes):
    assert main(["--config", _config(folder, output, **changes)]) == 0
    return output


def _losses(output):
    """The loss of every step, from the log of the last checkpoint."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def _changed(before, after):
    return {n for n, p in after.items() if not torch.equal(before[n], p)}


def _weights(path):
    return LlavaForConditionalGeneration.from_pretrained(path).state_dict()


def test_a_tiny_model_learns_its_conversations_by_heart(folder, tmp_path):
    output = _train(
        folder, tmp_path / "out", optimisation__epochs=30.0, optimisation__group_by_length=True
    )
    losses = _losses(output)
    assert len(losses) == 60
    assert losses[0] > 4
    assert losses[-1] < 0.05
    model = LlavaForConditionalGeneration.from_pretrained(output / "model").eval()
    processor = AutoProcessor.from_pretrained(output / "model")
    question, answer = TURNS[0]
    inputs = prepare(processor, [[message("user", question, 1)]], [[load_image(folder / "0.png")]])
    said = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    text = processor.tokenizer.decode(said[inputs["input_ids"].shape[1] :])
    assert text.strip() == answer + "</s>"  # it has learned to stop, too


def test_stage_one_changes_the_projector_and_nothing_else(folder, tmp_path):
    output = _train(folder, tmp_path / "out", model__learns=["projector"])
    changed = _changed(_weights(folder / "model"), _weights(output / "model"))
    assert changed
    assert all("multi_modal_projector" in name for name in changed)


def test_full_tuning_changes_language_model_head_and_projector(folder, tmp_path):
    output = _train(folder, tmp_path / "out", model__learns=["language", "projector"])
    changed = _changed(_weights(folder / "model"), _weights(output / "model"))
    parts = {"vision_tower", "multi_modal_projector", "language_model", "lm_head"}
    assert {p for p in parts for n in changed if p in n} == parts - {"vision_tower"}


def test_adapters_beside_a_projector_with_a_rate_of_its_own(folder, tmp_path):
    output = _train(
        folder,
        tmp_path / "out",
        model__learns=["language", "projector"],
        model__lora={"r": 4, "alpha": 8},
        optimisation__projector_learning_rate=1e-4,
        optimisation__activation_checkpointing=True,
        optimisation__warmup=0.0,
        optimisation__schedule="constant",
        export=["adapter", "merged"],
    )
    state = torch.load(output / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert {group["lr"] for group in state["param_groups"]} == {3e-3, 1e-4}
    slow = [group for group in state["param_groups"] if group["lr"] == 1e-4]
    assert sum(len(group["params"]) for group in slow) == 4  # two weights, two biases
    before, after = _weights(folder / "model"), _weights(output / "merged")
    changed = _changed(before, after)
    assert {n.split(".")[-2] for n in changed if "language_model" in n} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    projector = {n for n in changed if "multi_modal_projector" in n}
    assert len(projector) == 4
    assert not any("vision_tower" in n or "lm_head" in n for n in changed)
    # Two steps of Adam move every weight by about twice the rate.
    moved = max(float((after[n] - before[n]).abs().max()) for n in projector)
    assert 0.5e-4 < moved < 2.5e-4


def test_packed_training_is_unpacked_training(folder, tmp_path):
    """The same rows in one step: the same loss and, in float32, the same weights after it."""
    options = {"optimisation__epochs": 1.0, "optimisation__batch_size": 8,
               "optimisation__rows_per_pass": 4, "optimisation__max_grad_norm": 1.0}  # fmt: skip
    plain = _train(folder, tmp_path / "plain", **options)
    options |= {"optimisation__batch_size": 1, "optimisation__rows_per_pass": 1}
    packed = _train(
        folder, tmp_path / "packed", data__packing=True, data__max_length=1000, **options
    )
    assert len(_losses(packed)) == len(_losses(plain)) == 1
    assert math.isclose(_losses(packed)[0], _losses(plain)[0], abs_tol=1e-5)


def test_a_resumed_run_makes_the_steps_of_an_uninterrupted_one(folder, tmp_path):
    options = {"optimisation__epochs": 3.0, "optimisation__group_by_length": True,
               "saving__every": 3, "saving__keep": 5}  # fmt: skip
    whole = _train(folder, tmp_path / "whole", **options)
    want = _losses(whole)
    assert len(want) == 6
    # As after a kill in the second epoch: the last checkpoint and all that came later is gone.
    for path in [*whole.glob("checkpoint-6"), whole / "model"]:
        subprocess.run(["rm", "-r", str(path)], check=True)
    (whole / "finished.json").unlink()
    _train(folder, whole, **options)
    assert _losses(whole) == pytest.approx(want, abs=1e-6)


def test_what_cannot_be_used_is_said_before_any_step(folder, tmp_path, capsys):
    config = _config(folder, tmp_path / "long", data__max_length=25)
    assert main(["--config", config]) == 2
    error = capsys.readouterr().err
    assert "max_length is 25" in error
    assert "overlong: drop" in error
    config = _config(folder, tmp_path / "end", model__chat_template=str(folder / "bare.jinja"))
    (folder / "bare.jinja").write_text(tiny._TEMPLATE.replace("IMAGE_TOKENS", "<image>"))
    assert main(["--config", config]) == 2
    assert "writes no end token" in capsys.readouterr().err
    config = _config(folder, tmp_path / "pack", data__packing=True)
    assert main(["--config", config]) == 2
    assert "packing needs max_length" in capsys.readouterr().err
    config = _config(folder, tmp_path / "rate", optimisation__projector_learning_rate=1e-4)
    assert main(["--config", config]) == 2
    assert "`learns` has no projector" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/checkpoint-*"))


def test_weights_that_would_learn_in_float16_are_refused(folder, tmp_path, capsys):
    half = str(tmp_path / "half")
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float16)
    model.save_pretrained(half)
    AutoProcessor.from_pretrained(folder / "model").save_pretrained(half)
    assert main(["--config", _config(folder, tmp_path / "full", model__name=half)]) == 2
    assert "tensors learn in float16" in capsys.readouterr().err
    _train(folder, tmp_path / "lora", model__name=half, model__lora={"r": 4}, export=["adapter"])
    _train(folder, tmp_path / "single", model__name=half, model__dtype="float32")


def test_rows_that_are_left_out_are_counted(folder, tmp_path, capsys):
    _train(folder, tmp_path / "out", data__max_length=70, data__overlong="drop")
    assert "train: 2 of 8 conversations left out: too long" in capsys.readouterr().err


def test_the_best_checkpoint_is_what_the_training_ends_with(folder, tmp_path):
    """At such a rate the second step makes everything worse."""
    output = _train(
        folder,
        tmp_path / "out",
        data__eval_files=[str(folder / "rows.jsonl")],
        saving__best="loss",
        saving__every=1,
        optimisation__steps=3,
        optimisation__schedule="constant",
        optimisation__learning_rate=0.3,
    )
    state = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())
    evaluated = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    best = min(evaluated, key=evaluated.get)
    assert best < 3
    assert state["best_metric"] == evaluated[best]
    assert not _changed(_weights(output / f"checkpoint-{best}"), _weights(output / "model"))
    assert _changed(_weights(output / "checkpoint-3"), _weights(output / "model"))


@pytest.mark.slow
def test_two_processes_share_out_the_tower_and_one_has_no_picture(folder, tmp_path):
    """ZeRO-3: without a dummy picture one process would wait for the tower's weights for ever."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    # Sorted by length the picture comes first, and the other process begins with a text.
    text_only = [row for row in rows if not row["images"]]
    chosen = [rows[0], *text_only, {**text_only[0], "id": "again"}]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    options = {
        "data__files": [str(folder / "two.jsonl")],
        "model__learns": ["language", "projector"],
        "optimisation__batch_size": 4,
        "optimisation__rows_per_pass": 1,
        "optimisation__epochs": 2.0,
        "optimisation__group_by_length": True,
    }
    single = tmp_path / "single"
    configs = {
        (): _config(folder, single, **options),
        ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"): _config(
            folder, tmp_path / "double", **options, deepspeed="zero3"
        ),
    }
    # Both in processes of their own: nothing that earlier tests left behind takes part.
    for launcher, config in configs.items():
        run = subprocess.run(
            [sys.executable, "-m", *launcher, "training", "--config", config],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
    assert _losses(tmp_path / "double") == pytest.approx(_losses(single), abs=1e-4)
