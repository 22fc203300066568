"""Samples while training: that they are made, and that the training does not feel them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import tracking_toy
from tracking_toy import Held, lines

from mmlm.decoding_settings import GenerateSettings
from mmlm.errors import InputError
from mmlm.runner import Request, generate_all
from training.checkpoints import CompleteCheckpoints, open_run
from training.checkpoints import train as train_to_end
from training.tracking import Tracking, tracked
from training.tracking.samples import kept_random_numbers, resting

SHORT = GenerateSettings(max_new_tokens=6)
ROOT = Path(__file__).parents[2]


def train(folder, steps=4, *, resume=None, samples=None, every=2, generate=SHORT, **arguments):
    trainer = tracking_toy.trainer(folder, steps, **arguments)
    settings = Tracking(
        samples=samples, sample_every=every, generate=generate, log_every=1, progress="never"
    )
    with tracked(trainer, settings, run_config={}, output=folder):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def texts(folder):
    """Answers by step and id."""
    found = {}
    for line in lines(folder / "samples.jsonl"):
        found.setdefault(line["step"], {})[line["id"]] = line["text"]
    return found


def learned(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def numbers(folder):
    """Log entries of the training, without times."""
    entries = [entry for entry in lines(folder / "log.jsonl") if "loss" in entry]
    return [
        {k: v for k, v in entry.items() if "second" not in k and k != "memory_gib"}
        for entry in entries
    ]


class Noisy(Held):
    """Draws from every generator wherever it is asked."""

    def requests(self):
        self._draw()
        return super().requests()

    def score(self, texts):
        self._draw()
        return super().score(texts)

    @staticmethod
    def _draw():
        random.random(), np.random.random(), torch.rand(3)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL's own calls
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_bit_for_bit_with_and_without_samples(tmp_path, checkpointing):
    """Dropout draws random numbers in every pass; samples draw too, and must leave no trace."""
    dropout = {"lora_dropout": 0.3, "disable_dropout": False}
    dropout["activation_checkpointing"] = checkpointing
    plain = train(tmp_path / "plain", **dropout)
    sampling = GenerateSettings(max_new_tokens=6, do_sample=True)
    held = Noisy()
    watched = train(tmp_path / "watched", samples=held, generate=sampling, **dropout)
    assert len(held.seen) == 3
    other = learned(watched)
    assert all(torch.equal(value, other[name]) for name, value in learned(plain).items())
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "watched")
    assert len({entry["loss"] for entry in numbers(tmp_path / "plain")}) == 4


def test_rounds_come_at_the_start_every_so_many_steps_and_at_the_end(tmp_path):
    saved = []

    class Watching(Held):
        def score(self, texts):
            saved.append((tmp_path / "checkpoint-5").exists())
            return super().score(texts)

    held = Watching()
    train(tmp_path, 5, samples=held, save_strategy="steps", save_steps=5)
    assert not any(saved)  # whoever has the last checkpoint has the last samples
    found = texts(tmp_path)
    assert list(found) == [0, 2, 4, 5]
    assert list(found.values()) == held.seen
    scores = [entry for entry in lines(tmp_path / "log.jsonl") if "eval_words" in entry]
    assert [entry["step"] for entry in scores] == [0, 2, 4, 5]
    assert scores[-1]["eval_words"] == Held().score(found[5])["words"]
    first = lines(tmp_path / "samples.jsonl")[0]
    assert first.keys() == {"step", "id", "prompt", "text", "n_tokens"}
    assert first["prompt"] == tracking_toy.QUESTION
    assert first["n_tokens"] > 0


@pytest.mark.parametrize("lora", [True, False])
def test_answers_are_those_of_the_model_at_that_step(tmp_path, lora):
    """Through TRL's patched forward, with the adapters on."""
    dropout = {"lora_dropout": 0.5, "disable_dropout": False}  # only while it learns
    trainer = train(tmp_path, 4, samples=Held(), lora=lora, **dropout)
    fresh, processor = tiny.build("llava")

    def plain(model):
        answers = generate_all(model.eval(), processor, Held().requests(), settings=SHORT)
        return {answer.id: answer.text for answer in answers}

    found = texts(tmp_path)
    assert found[0] == plain(fresh)
    assert found[4] == plain(trainer.model)
    assert found[4] != found[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_sampled(tmp_path, family):
    train(tmp_path, 1, samples=Held(), family=family)
    found = lines(tmp_path / "samples.jsonl")
    assert [line["step"] for line in found] == [0, 0, 1, 1]
    assert all("error" not in line for line in found)


def test_a_resumed_training_keeps_its_samples(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, 4, samples=Held(), **saving)
    whole = texts(tmp_path)
    for name in ("log.jsonl", "samples.jsonl"):  # a line that a kill has cut in half
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 4, "text": "cut o')
    held = Held()
    train(tmp_path, 4, samples=held, resume=str(tmp_path / "checkpoint-2"), **saving)
    assert texts(tmp_path) == whole
    assert list(whole) == [0, 2, 4]
    assert len(held.seen) == 1  # only the round after step 2


def test_a_finished_training_is_not_sampled_again(tmp_path):
    former = ""
    for seen in (2, 0):
        trainer = tracking_toy.trainer(tmp_path, 2, save_strategy="steps", save_steps=2)
        trainer.add_callback(CompleteCheckpoints())
        held = Held()
        settings = Tracking(samples=held, generate=SHORT, progress="never")
        with (
            open_run(tmp_path, {}) as run,
            tracked(trainer, settings, run_config={}, output=tmp_path),
        ):
            train_to_end(trainer, run)
        assert len(held.seen) == seen
        text = (tmp_path / "samples.jsonl").read_text()
        assert text == (former or text)
        former = text


def test_the_best_model_is_sampled_at_the_end(tmp_path):
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        # Grows with every step: the first one is the best.
        "metric_for_best_model": "rewards/margins",
        "greater_is_better": False,
    }
    train(tmp_path, 3, samples=Held(), every=1, **best)
    found = lines(tmp_path / "samples.jsonl")
    last = found[-2:]
    assert [line["weights_of_step"] for line in last] == [1, 1]
    by_step = {line["id"]: line["text"] for line in found if line["step"] == 1}
    assert {line["id"]: line["text"] for line in last} == by_step
    assert all("weights_of_step" not in line for line in found[:-2])


def test_a_picture_that_cannot_be_read_costs_only_its_own_answer(tmp_path):
    class Broken(Held):
        def requests(self):
            broken = Request("bad", (str(tmp_path / "none.png"),), "what is it ?")
            return [broken, *super().requests()]

    held = Broken()
    train(tmp_path, 1, samples=held)
    assert [set(seen) for seen in held.seen] == [{"h0", "h1"}, {"h0", "h1"}]
    bad = next(line for line in lines(tmp_path / "samples.jsonl") if line["id"] == "bad")
    assert "no such file" in bad["error"]


def test_a_score_that_fails_ends_the_training_before_its_first_step(tmp_path):
    class Empty(Held):
        def score(self, texts):
            raise InputError("There is no caption.", advice="Give one.")

    with pytest.raises(InputError, match="no caption"):
        train(tmp_path, 1, samples=Empty())
    assert lines(tmp_path / "log.jsonl") == []


# --- nothing is left behind


def test_resting_restores_the_mode_of_every_module():
    model, _ = tiny.build("llava")
    model.train()
    model.model.vision_tower.eval()  # as a frozen tower may be
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    with contextlib.suppress(RuntimeError), resting(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


def test_random_numbers_are_kept_also_after_an_exception():
    def draw():
        return random.random(), np.random.random(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with contextlib.suppress(RuntimeError), kept_random_numbers():
        draw()
        raise RuntimeError
    assert draw() == expected


# --- several processes

SCRIPT = """
import sys
import mmlm
from training.launch import leave, start_deepspeed
start_deepspeed()
from pathlib import Path
import json, tracking_toy
from mmlm.decoding_settings import GenerateSettings
from training.tracking import Tracking, tracked
output = Path(sys.argv[1])
deepspeed = json.loads(Path(sys.argv[2]).read_text())
trainer = tracking_toy.trainer(output, 2, deepspeed=deepspeed)
settings = Tracking(samples=tracking_toy.Held(3), sample_every=1, log_every=1, progress="auto",
    gather_for_samples=sys.argv[3] == "gather",
    generate=GenerateSettings(max_new_tokens=6, batch_size=2))
with tracked(trainer, settings, run_config={}, output=output):
    trainer.train()
leave()
"""


def launched(output, deepspeed, gather):
    output.mkdir()
    script = output / "script.py"
    script.write_text(SCRIPT)
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(output),
        deepspeed,
        gather,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=output, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("alone")
    generate = GenerateSettings(max_new_tokens=6, batch_size=2)
    train(output, 2, samples=Held(3), every=1, generate=generate, per_device_train_batch_size=4)
    return output


ZERO = str(ROOT / "configs" / "deepspeed" / "zero{}.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deepspeed", "gather"),
    [
        (ZERO.format(2), "gather"),
        (ZERO.format(3), "gather"),
        (ZERO.format(3), "apart"),
    ],
    ids=["zero2", "zero3", "zero3_not_gathered"],
)
def test_two_processes_log_and_sample_as_one(tmp_path, alone, deepspeed, gather):
    """Three questions for two processes: the shares are uneven."""
    done = launched(tmp_path / "run", deepspeed, gather)
    output = tmp_path / "run"
    assert texts(output) == texts(alone)
    assert [line["id"] for line in lines(output / "samples.jsonl")] == ["h0", "h1", "h2"] * 3
    entries = [[e for e in lines(o / "log.jsonl") if "loss" in e] for o in (output, alone)]
    for mine, theirs in zip(*entries, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        tokens = [e["tokens_per_second"] / e["samples_per_second"] for e in (mine, theirs)]
        assert tokens[0] == pytest.approx(tokens[1], rel=1e-4)
    shown = [line for line in done.stderr.splitlines() if line.startswith("training ")]
    assert len(shown) == 2 + 3  # once, not from both
    assert json.loads((output / "provenance.json").read_text())["world_size"] == 2
