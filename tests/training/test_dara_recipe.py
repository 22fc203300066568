"""Training DARA on episodes, run as users run it, on a tiny LLaVA."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from recipe_files import write_config
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import mmlm
from data_tools.micl import TASKS, episodes
from data_tools.micl.export import episode_line
from mmlm import DARA, attach
from mmlm.inputs import use_chat_template
from mmlm.model.checkpoint import load
from training.__main__ import main
from training.dara.episodes import by_set, read_episodes, split
from training.dara.learning import WrongParameters, refuse_images, refuse_others
from training.dara.trainer import calm

RECIPE = "training.dara.recipe.DARATraining"
METHOD = "DARA(images=3)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stored model, and episodes of two tasks with two demonstrations each."""
    folder = tmp_path_factory.mktemp("dara")
    model, processor = tiny.build("llava", layers=2)
    use_chat_template(processor, "simple")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    with (folder / "episodes.jsonl").open("w") as file:
        for task in ("operator", "sudoku"):
            for number, one in enumerate(episodes(TASKS[task], 2, 10, 0, split="support")):
                line = episode_line(one, f"{task}-{number}", folder)
                file.write(json.dumps(line) + "\n")
    return folder


def _config(folder, output, **changes):
    made = {
        "output": str(output),
        "recipe": {
            "class_path": RECIPE,
            "init_args": {
                "model": {
                    "name": str(folder / "model"), "methods": [METHOD], "learns": ["methods"],
                },
                "data": {"files": [str(folder / "episodes.jsonl")], "sets": "joint"},
                "optimisation": {
                    "learning_rate": 1e-2, "batch_size": 4, "rows_per_pass": 4, "steps": 4,
                },
                "rates": [1e-2],
                "saving": {"every": 2, "best": "loss"},
                "tracking": {"progress": "never", "log_every": 1},
            },
        },
        "run": {"precision": "no"},
    }  # fmt: skip
    return write_config(made, output, changes)


def _train(folder, output, **changes):
    assert main(["--config", _config(folder, output, **changes)]) == 0
    return output


def _refused(capsys, folder, output, *expected, **changes):
    assert main(["--config", _config(folder, output, **changes)]) == 2
    said = capsys.readouterr().err
    for text in expected:
        assert text in said
    assert not list(output.glob("**/checkpoint-*"))


def _losses(output):
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_a_rate_is_chosen_for_each_task_and_its_factors_are_what_attach_reads(folder, tmp_path):
    output = _train(
        folder, tmp_path / "out", data__sets="task", rates=[1e-4, 3e-2], optimisation__steps=2
    )
    for task in ("operator", "sudoku"):
        about = json.loads((output / f"{task}.json").read_text())
        losses = about["held_out_loss_by_rate"]
        assert set(losses) == {"0.0001", "0.03"}
        best = min(losses, key=losses.get)
        assert about["held_out_loss"] == losses[best]
        assert about["folder"] == f"{task}/{best}"
        assert about["learning_parameters"] == 1 * 8 * 3
        expected = {
            "base_model": str(folder / "model"), "tasks": [task], "n_shots": 2, "layers": [0],
            "heads": 8, "images": 3, "mode": "score",
        }  # fmt: skip
        assert mmlm.parse_method(about.pop("method")) == DARA(images=3)
        assert {name: about[name] for name in expected} == expected
        stored = (output / f"{task}.safetensors").read_bytes()
        assert stored == (output / about["folder"] / "factors.safetensors").read_bytes()
    model = LlavaForConditionalGeneration.from_pretrained(folder / "model").eval()
    inputs = tiny.inputs(
        tiny.shared("llava")[1], ["describe"], [[tiny.picture(n) for n in range(3)]]
    )
    with torch.no_grad():
        plain = model(**inputs).logits
        with attach(model, DARA(images=3, weights_file=str(output / "sudoku.safetensors"))):
            learned = model(**inputs).logits
    assert not torch.equal(plain, learned)


@pytest.fixture(scope="module")
def joint(folder):
    """One finished run of a joint set: its folder."""
    return _train(folder, folder / "joint", export=["model"], saving__keep=9)


def test_nothing_of_the_model_changes_and_a_whole_export_carries_dara(folder, joint):
    output = joint / "joint" / "0.01"
    before = LlavaForConditionalGeneration.from_pretrained(folder / "model").state_dict()
    after = LlavaForConditionalGeneration.from_pretrained(output / "model").state_dict()
    assert all(torch.equal(before[name], x) for name, x in after.items())
    model, _ = load(str(output / "model"))
    factors = model.mmlm_methods.DARA.factors().detach()
    assert bool((factors != 1).all())
    assert float((factors - 1).abs().max()) < 0.05  # four steps of Adam at 0.01


def test_the_answer_to_the_query_is_all_that_is_learned(folder, tmp_path, monkeypatch):
    seen = {}

    from training.dara.trainer import CalmTrainer

    original = CalmTrainer.compute_loss

    def look(self, model, inputs, *args, **more):
        seen["labels"], seen["ids"] = inputs["labels"].clone(), inputs["input_ids"].clone()
        loss = original(self, model, inputs, *args, **more)
        if torch.is_grad_enabled():  # and not in an evaluation
            seen.setdefault("training", []).extend(m for m in model.modules() if m.training)
        return loss

    monkeypatch.setattr(CalmTrainer, "compute_loss", look)
    _train(folder, tmp_path / "out", optimisation__steps=2)
    assert seen["training"] == []
    rows = {row.conversation.messages[1]["content"][0]["text"]: row for row in
            read_episodes([str(folder / "episodes.jsonl")])}  # fmt: skip
    _, processor = load(str(folder / "model"))
    for ids, labels in zip(seen["ids"], seen["labels"], strict=True):
        learned = processor.tokenizer.decode(ids[labels != -100])
        assert learned.strip().removesuffix("</s>").strip() in rows


def test_a_resumed_run_makes_the_steps_of_an_uninterrupted_one(folder, joint, tmp_path):
    """Cut off behind the second step of four: losses and factors are those of the whole run."""
    output = tmp_path / "cut"
    shutil.copytree(joint, output)
    part, whole = output / "joint" / "0.01", joint / "joint" / "0.01"
    for path in (part / "checkpoint-4", part / "model"):
        shutil.rmtree(path)
    for path in (part / "factors.safetensors", part / "finished.json", output / "joint.json"):
        path.unlink()
    _train(folder, output, export=["model"], saving__keep=9)
    assert _losses(part) == pytest.approx(_losses(whole), abs=1e-7)
    files = (part / "factors.safetensors", output / "joint.safetensors")
    want = load_file(whole / "factors.safetensors")["offsets.0"]
    assert all(torch.equal(load_file(file)["offsets.0"], want) for file in files)


def test_adapters_take_the_same_course_and_say_their_size(folder, tmp_path):
    """Their random start is the run's own, whatever rate was tried before."""
    options = {
        "model__methods": [], "model__learns": ["language"], "train_only_dara": False,
        "model__lora": {"r": 1, "alpha": 1, "targets": ["q_proj"], "layers": [0], "dropout": 0.0},
        "optimisation__steps": 2,
    }  # fmt: skip
    output = _train(folder, tmp_path / "out", **options, export=["adapter"])
    about = json.loads((output / "joint.json").read_text())
    assert about["learning_parameters"] == 64 + 64
    assert "method" not in about
    assert not (output / "joint.safetensors").exists()
    assert (output / about["folder"] / "adapter" / "adapter_model.safetensors").exists()
    second = _train(folder, tmp_path / "second", **options, rates=[1e-3, 1e-2])
    losses = json.loads((second / "joint.json").read_text())["held_out_loss_by_rate"]
    assert losses["0.01"] == pytest.approx(about["held_out_loss"], abs=1e-7)
    assert losses["0.001"] != losses["0.01"]


def test_activation_checkpointing_gives_the_same_losses(folder, joint, tmp_path):
    saving = _train(folder, tmp_path / "saving", optimisation__activation_checkpointing=True)
    plain = _losses(joint / "joint" / "0.01")
    assert _losses(saving / "joint" / "0.01") == pytest.approx(plain, abs=1e-5)


def test_only_layers_that_recompute_stay_in_training_mode():
    model, _ = tiny.build("llava", layers=2)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    calm(model)
    training = {type(m).__name__ for m in model.modules() if m.training}
    assert "LlamaDecoderLayer" in training
    assert "LlamaAttention" not in training


# ---- errors ----


def test_error_more_than_dara_would_learn(folder, tmp_path, capsys):
    _refused(
        capsys, folder, tmp_path / "out", "train_only_dara is set, but", "other parameters",
        "multi_modal_projector.linear_1.weight", " ...", model__learns=["methods", "projector"],
    )  # fmt: skip
    model, _ = tiny.build("llava", layers=2)
    with pytest.raises(
        ValueError, match=r"but \d+ other parameters would learn: \S+, \S+, \S+ ..."
    ):
        refuse_others(model, train_only_dara=True)


def test_error_nothing_learns():
    model, _ = tiny.build("llava", layers=2)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Nothing learns: .* 0 parameters"):
        refuse_others(model, train_only_dara=False)


def test_error_dara_shall_learn_and_is_not_there(folder, tmp_path, capsys):
    _refused(capsys, folder, tmp_path / "out", "no methods with weights", model__methods=[])


def test_error_images_without_a_slot(folder, tmp_path, capsys):
    _refused(
        capsys, folder, tmp_path / "out", "has 3 images", "factors for S = 2",
        model__methods=["DARA(images=2)"],
    )  # fmt: skip
    row = read_episodes([str(folder / "episodes.jsonl")])[0].conversation
    with pytest.raises(WrongParameters, match=r"episodes\.jsonl:1: the episode 'operator-0'"):
        refuse_images(DARA(images=5), [row])
    refuse_images(DARA(images=5, align="query_last"), [row])
    refuse_images(None, [row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": [0.0]}, "different and positive"),
        ({"rates": [0.1, 0.1]}, "different and positive"),
        ({"saving__best": "rewards/margins"}, "give loss"),
        ({"data__held_out": 0.0}, "a share in (0, 1)"),
        ({"data__held_out": 0.01}, "leaves 10 to learn from and 0 to stop by"),
        ({"data__tasks": ["clock"]}, "no episodes of clock; there are some of operator, sudoku"),
        ({"data__tasks": []}, "tasks is empty"),
        ({"data__files": []}, "files is empty"),
        ({"data__files": ["/nowhere.jsonl"]}, "cannot be read"),
        ({"data__workers": -1}, "workers = -1"),
    ],
)
def test_error_settings(folder, tmp_path, capsys, changes, message):
    _refused(capsys, folder, tmp_path / "out", message, **changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is no JSON"),
        ("[]", "an episode is an object"),
        ('{"id": "a"}', "'task' is None"),
        (
            '{"id": "a", "task": "t", "prompt": "what ?", "answer": "5", "images": ["a.png"]}',
            "has no marks",
        ),
    ],
)
def test_error_lines_that_are_no_episode(tmp_path, line, message):
    from mmlm.errors import InputError

    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        read_episodes([str(tmp_path / "bad.jsonl")])
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(InputError, match="There are no episodes"):
        read_episodes([str(tmp_path / "none.jsonl")])


def test_episodes_are_shared_out_by_task(folder):
    rows = read_episodes([str(folder / "episodes.jsonl")])
    assert {row.shots for row in rows} == {2}
    assert list(by_set(rows, ["sudoku"], joint=False)) == ["sudoku"]
    joint = by_set(rows, None, joint=True)["joint"]
    parts = split(joint, 0.2)
    assert [row.id for row in parts["eval"]] == [
        "operator-8", "operator-9", "sudoku-8", "sudoku-9",
    ]  # fmt: skip
    assert len(parts["train"]) == 16


@pytest.mark.slow
def test_two_processes_of_deepspeed_log_the_losses_of_one(folder, joint, tmp_path):
    """Gradients of the few factors come through frozen (under ZeRO-3 shared out) weights."""
    single = joint / "joint" / "0.01"
    config = _config(folder, tmp_path / "double", deepspeed="zero3", optimisation__rows_per_pass=2)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training"]
    run = subprocess.run(
        [sys.executable, "-m", *command, "--config", config],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    double = tmp_path / "double" / "joint" / "0.01"
    assert _losses(double) == pytest.approx(_losses(single), abs=1e-4)
    found, expected = (load_file(one / "factors.safetensors") for one in (double, single))
    torch.testing.assert_close(found["offsets.0"], expected["offsets.0"], atol=1e-3, rtol=0)
    assert float(expected["offsets.0"].abs().max()) > 1e-2
