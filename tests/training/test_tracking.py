"""What is written down about a training: numbers, log, figure, trackers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import tracking_toy
import yaml
from jsonargparse import ArgumentParser
from PIL import Image
from tracking_toy import lines
from transformers import PrinterCallback, TrainerCallback

from mmlm.decoding_settings import GenerateSettings
from mmlm.errors import InputError
from training.tracking import Tracking, check, tracked
from training.tracking.figure import draw, main, read_log
from training.tracking.provenance import git_revision, provenance

QUIET = {"progress": "never"}
SHORT = GenerateSettings(max_new_tokens=6)
ROOT = Path(__file__).parents[2]


def train(folder, steps=4, settings=None, *, resume=None, title="training", **arguments):
    trainer = tracking_toy.trainer(folder, steps, **arguments)
    settings = settings or Tracking(**QUIET)
    config = {"recipe": "toy", "seed": 0}
    with tracked(trainer, settings, run_config=config, output=folder, title=title):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps_with(entries, name):
    return [entry["step"] for entry in entries if name in entry]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = train(folder, 4, eval_strategy="steps", eval_steps=2, gradient_accumulation_steps=2)
    return folder, trainer


# --- numbers


def test_every_entry_has_loss_margins_speed_and_memory(run):
    entries = [entry for entry in lines(run[0] / "log.jsonl") if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    for entry in entries:
        rewards = entry["rewards/chosen"] - entry["rewards/rejected"]
        assert entry["rewards/margins"] == pytest.approx(rewards, abs=1e-6)
        assert {"rewards/accuracies", "learning_rate", "grad_norm", "epoch"} <= entry.keys()
        assert entry["tokens_per_second"] > entry["scored_tokens_per_second"] > 0
        assert 0.1 < entry["memory_gib"] < 64


def test_tokens_are_those_of_the_batches(tmp_path):
    """Speed times time gives the tokens: each batch once, without padding, reference left out."""
    trainer = tracking_toy.trainer(tmp_path, 3, gradient_accumulation_steps=2)
    collate, seen = trainer.data_collator, []

    def collator(examples):
        batch = collate(examples)
        seen.append((batch["attention_mask"].sum(), batch["completion_mask"][:, 1:].sum()))
        return batch

    trainer.data_collator = collator
    meter = {}

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **more):
            if "loss" in logs:
                meter[state.global_step] = dict(logs)

    trainer.add_callback(Watch())
    with tracked(trainer, Tracking(**QUIET), run_config={}, output=tmp_path):
        trainer.train()
    seen = seen[:6]  # one more is fetched ahead
    for step, logs in meter.items():
        batches = seen[2 * step - 2 : 2 * step]
        read, scored = (sum(int(pair[i]) for pair in batches) for i in (0, 1))
        seconds = 4 / logs["samples_per_second"]  # two rows in each of two passes
        assert logs["tokens_per_second"] * seconds == pytest.approx(read, rel=1e-6)
        assert logs["scored_tokens_per_second"] * seconds == pytest.approx(scored, rel=1e-6)
    assert meter[3]["num_tokens"] == sum(int(pair[0]) for pair in seen)  # TRL counts the same


def test_time_for_evaluation_and_checkpoints_is_no_training(tmp_path):
    class Slow(TrainerCallback):
        def on_prediction_step(self, args, state, control, **more):
            time.sleep(1.5)

    trainer = tracking_toy.trainer(tmp_path, 2, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(Slow())
    with tracked(trainer, Tracking(**QUIET), run_config={}, output=tmp_path):
        trainer.train()
    last = [entry for entry in lines(tmp_path / "log.jsonl") if "loss" in entry][-1]
    assert last["samples_per_second"] > 2  # a second and a half would leave less than 1.34


def test_the_meter_costs_less_than_a_hundredth(tmp_path):
    """The hook's own time beside that of the passes it watches."""
    from training.tracking.callbacks import Meter

    trainer = tracking_toy.trainer(tmp_path, 3)
    spent = []

    class Timed(Meter):
        def _count(self, module, args, batch):
            began = time.perf_counter()
            super()._count(module, args, batch)
            spent.append(time.perf_counter() - began)

    meter = Timed(trainer)
    trainer.add_callback(meter)
    trainer.train()
    meter.close()
    assert len(spent) == 6  # of the policy and of the reference
    step = 1 / trainer.state.log_history[-2]["samples_per_second"] * 2
    assert min(a + b for a, b in zip(spent[::2], spent[1::2], strict=True)) < 0.01 * step


# --- log


def test_evaluations_and_the_summary_are_in_the_log(run):
    entries = lines(run[0] / "log.jsonl")
    assert steps_with(entries, "eval_loss") == [2, 4]
    assert steps_with(entries, "eval_rewards/margins") == [2, 4]
    assert "train_runtime" in entries[-1]
    seconds = [entry["seconds"] for entry in entries]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_the_trainers_own_history_has_the_speed_too(run):
    assert all("tokens_per_second" in e for e in run[1].state.log_history if "loss" in e)


def test_a_resumed_training_drops_the_lines_behind_its_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    train(tmp_path / "a", 4, **saving)
    whole = lines(tmp_path / "a" / "log.jsonl")
    checkpoint = tmp_path / "a" / "checkpoint-2"
    resumed = train(tmp_path / "a", 4, resume=str(checkpoint), **saving)
    again = lines(tmp_path / "a" / "log.jsonl")
    assert resumed.state.global_step == 4
    assert steps_with(again, "loss") == steps_with(whole, "loss") == [1, 2, 3, 4]
    assert again[:2] == whole[:2]  # kept, not written again
    losses = [[entry["loss"] for entry in es if "loss" in entry] for es in (whole, again)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(again))


def test_a_fresh_training_starts_an_empty_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "seconds": 1, "loss": 99.0}\n')
    train(tmp_path, 1)
    assert 99.0 not in [entry.get("loss") for entry in lines(tmp_path / "log.jsonl")]


# --- what is printed


def test_plain_lines_where_there_is_no_terminal(tmp_path, capfd):
    train(tmp_path, 3, Tracking(progress="auto"), title="preference", eval_strategy="steps",
          eval_steps=3)  # fmt: skip
    out, err = capfd.readouterr()
    assert "{'loss'" not in out + err  # transformers' own callbacks are silent
    shown = [line for line in err.splitlines() if line.startswith("preference ")]
    assert len(shown) == 4
    assert re.fullmatch(
        r"preference 2/3  loss \S+  margin \S+  accuracy \S+  lr \S+  tokens/s \S+  "
        r"\d:\d\d:\d\d left",
        shown[1],
    )
    assert re.match(r"preference 3/3  eval_loss \S+  eval_margin", shown[3])


def test_never_prints_nothing(tmp_path, capfd):
    train(tmp_path, 2, Tracking(progress="never"))
    out, err = capfd.readouterr()
    assert "loss" not in out + err


def test_always_draws_the_bar_and_gives_the_cursor_back(tmp_path, capfd):
    train(tmp_path, 2, Tracking(progress="always"), title="preference")
    err = capfd.readouterr().err
    assert "\x1b[?25l" in err  # hidden
    assert err.rindex("\x1b[?25h") > err.rindex("\x1b[?25l")
    assert "2/2" in err
    assert "margin" in err


def test_the_bar_is_taken_down_after_an_exception(tmp_path, capfd):
    alive = []  # so that no bar is taken down by the garbage collector

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            alive.extend(trainer.callback_handler.callbacks)
            raise RuntimeError("stop here")

    trainer = tracking_toy.trainer(tmp_path, 2)
    trainer.add_callback(Fails())
    former = list(trainer.callback_handler.callbacks)
    hooks = len(trainer.model._forward_pre_hooks)
    with (
        pytest.raises(RuntimeError, match="stop here"),
        tracked(trainer, Tracking(progress="always"), run_config={}, output=tmp_path),
    ):
        trainer.train()
    err = capfd.readouterr().err
    assert err.rindex("\x1b[?25h") > err.rindex("\x1b[?25l")
    assert trainer.callback_handler.callbacks == former
    assert any(isinstance(one, PrinterCallback) for one in former)
    assert len(trainer.model._forward_pre_hooks) == hooks


# --- figure


def test_the_figure_is_written_at_the_end(run):
    with Image.open(run[0] / "training.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 600


def test_a_cut_off_training_has_its_figure_too(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = tracking_toy.trainer(tmp_path, 3)
    trainer.add_callback(Fails())
    with (
        pytest.raises(KeyboardInterrupt),
        tracked(trainer, Tracking(**QUIET), run_config={}, output=tmp_path),
    ):
        trainer.train()
    assert (tmp_path / "training.png").exists()


def entry(step, **values):
    return {"step": step, "loss": 0.6, "learning_rate": 1e-6, **values}


def panels_drawn(entries, path, monkeypatch):
    from matplotlib.axes import Axes

    titles, plotted = [], []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **more: titles.append(title))
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **more: (plotted.append((list(x), list(y))),
                                                  plot(self, x, y, **more))[1],
    )  # fmt: skip
    draw(entries, path, "title")
    return titles, plotted


def test_the_figure_draws_what_the_log_has(tmp_path, monkeypatch):
    preference = [
        entry(1, **{"rewards/margins": 0.1, "rewards/accuracies": 0.5, "mean_token_accuracy": 0}),
        {"step": 2, "eval_loss": 0.5, "eval_rewards/margins": 0.2, "eval_chair_i": 0.25},
        entry(2, **{"rewards/margins": 0.3, "rewards/accuracies": 0.7, "mean_token_accuracy": 0}),
    ]
    titles, plotted = panels_drawn(preference, tmp_path / "a.png", monkeypatch)
    assert titles == [
        "Loss",
        "Reward margin, chosen minus rejected",
        "Reward accuracy",
        "Learning rate",
        "Held-out captions",
    ]
    assert ([1, 2], [0.6, 0.6]) in plotted
    assert ([2], [0.5]) in plotted  # the evaluation
    assert ([1, 2], [0.1, 0.3]) in plotted
    assert ([2], [0.25]) in plotted
    sft = [entry(1, mean_token_accuracy=0.3), entry(2, mean_token_accuracy=0.4)]
    assert panels_drawn(sft, tmp_path / "b.png", monkeypatch)[0] == [
        "Loss", "Token accuracy", "Learning rate",
    ]  # fmt: skip


def test_many_entries_get_a_running_mean(tmp_path, monkeypatch):
    entries = [{"step": n, "loss": float(n % 2)} for n in range(80)]
    _, plotted = panels_drawn(entries, tmp_path / "a.png", monkeypatch)
    assert len(plotted) == 2
    assert plotted[1][1][40] == pytest.approx(4 / 9)  # steps 36 to 44
    rates = [{"step": n, "learning_rate": float(n % 2)} for n in range(80)]
    assert len(panels_drawn(rates, tmp_path / "a.png", monkeypatch)[1]) == 1


def test_the_figure_of_a_running_training(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6}\n{"step": 3, "lo')
    command = [sys.executable, "-m", "training.tracking.figure", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == str(tmp_path / "training.png")
    assert (tmp_path / "training.png").exists()
    assert [e["step"] for e in read_log(log)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "no entry with a loss"),
        ('{"step": 1}\n', "no entry with a loss"),
        ('not a log\n{"step": 1, "loss": 0.5}\n', "line 1 is no log entry"),
        ('{"loss": 0.5}\n{"step": 1, "loss": 0.5}\n', "line 1 is no log entry"),
    ],
)
def test_files_that_are_no_log_are_refused(tmp_path, capsys, text, message):
    log = tmp_path / "log.jsonl"
    if text is not None:
        log.write_text(text)
    assert main([str(log)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "training.png").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["a", "b", "c"]])
def test_misuse_of_the_figure_prints_its_usage(capsys, arguments):
    assert main(arguments) == 2
    assert "usage: python -m training.tracking.figure LOG" in capsys.readouterr().err


def test_without_matplotlib_the_training_ends_well_and_says_so(tmp_path, monkeypatch, capsys):
    from training.tracking import figure

    monkeypatch.setattr(figure, "find_spec", lambda name: None)
    train(tmp_path, 1)
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "training.png").exists()


# --- provenance


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def test_revision_and_changes_of_the_code(tmp_path):
    assert git_revision(tmp_path) is None  # no repository
    git(tmp_path, "init", "-q")
    assert git_revision(tmp_path) is None  # no commit
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    assert git_revision(tmp_path) == {
        "revision": git(tmp_path, "rev-parse", "HEAD"),
        "dirty": False,
    }
    (tmp_path / "new.txt").write_text("not tracked")
    assert git_revision(tmp_path)["dirty"] is False
    (tmp_path / "inner" / "code.py").write_text("2")
    assert git_revision(tmp_path)["dirty"] is True
    assert git_revision(tmp_path / "inner") is None  # some package inside another repository


def test_provenance_names_versions_and_the_number_of_processes(monkeypatch):
    import torch

    monkeypatch.setenv("WORLD_SIZE", "4")
    facts = provenance()
    assert facts["packages"]["torch"] == torch.__version__
    assert {"transformers", "trl", "peft", "accelerate", "deepspeed"} <= facts["packages"].keys()
    assert facts["world_size"] == 4


def test_provenance_lies_beside_the_log(run):
    stored = yaml.safe_load((run[0] / "provenance.json").read_text())
    assert stored["packages"] == provenance()["packages"]


# --- settings


def test_settings_come_from_yaml():
    parser = ArgumentParser()
    parser.add_class_arguments(Tracking, "tracking")
    given = yaml.safe_load(
        """
        tracking:
          to: [wandb, tensorboard]
          sample_every: 50
          generate: {max_new_tokens: 64}
          samples:
            class_path: mmlm.cli.held_out.ChairHeldOut
            init_args:
              data: {count: 3, split: counterfactual}
        """
    )
    settings = parser.instantiate(parser.parse_object(given)).tracking
    assert settings.to == ("wandb", "tensorboard")
    assert settings.generate.max_new_tokens == 64
    assert type(settings.samples).__name__ == "ChairHeldOut"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"log_every": 0}, "log_every = 0"),
        ({"sample_every": 0}, "sample_every = 0"),
        ({"to": ("wandb", "wandb")}, "once"),
        ({"project": ""}, "project is empty"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Tracking(**values)


def test_settings_import_nothing_heavy():
    code = (
        "import sys, training.tracking;"
        "print([n for n in ('torch', 'transformers', 'trl', 'wandb', 'PIL') if n in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


# --- trackers


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    from training.tracking import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'trackio', which is not installed") as caught:
        check(Tracking(to=("trackio",)))
    assert "mmlm[track]" in caught.value.advice


@pytest.mark.parametrize("mode", ["online", "offline", None])
def test_wandb_without_a_login_is_refused_unless_offline(tmp_path, mode):
    code = (
        "from training.tracking import Tracking, check\n"
        "from mmlm.errors import InputError\n"
        "try: check(Tracking(to=('wandb',))); print('accepted')\n"
        "except InputError as error: print('refused:', error, error.advice)"
    )
    own = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment = {**own, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    if mode is not None:
        environment["WANDB_MODE"] = mode
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment,
        check=True,
    )  # fmt: skip
    answer = done.stdout.strip().splitlines()[-1]
    if mode == "offline":
        assert answer == "accepted"
    else:
        assert "nobody is logged in" in answer
        assert "WANDB_MODE=offline" in answer


def records(folder):
    """What wandb's own file of a run holds: records in blocks of 32 KiB, as LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # no header fits into the rest of a block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline_gets_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    held = tracking_toy.Held()
    settings = Tracking(
        to=("wandb",), project="p", name="n", samples=held, sample_every=2, generate=SHORT, **QUIET
    )
    train(tmp_path / "out", 2, settings, report_to=["wandb"])
    import wandb

    assert wandb.run is None  # closed: the next training opens its own
    config, history, run = {}, {}, None
    for record in records(tmp_path):
        if record.HasField("run"):
            run = record.run
            config |= {item.key: item.value_json for item in run.config.update}
        for item in record.history.item:
            history.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
    assert (run.project, run.display_name) == ("p", "n")
    assert run.run_id == (tmp_path / "out" / "wandb_run_id").read_text().strip()
    assert '"recipe":"toy"' in config["run"].replace(" ", "")
    assert '"torch"' in config["provenance"]
    assert {
        "train/loss", "train/rewards/margins", "train/rewards/accuracies", "train/learning_rate",
        "train/tokens_per_second", "train/scored_tokens_per_second", "train/memory_gib",
        "eval/words",
    } <= history.keys()  # fmt: skip
    assert len(history["train/tokens_per_second"]) == 2
    [files] = tmp_path.glob("wandb/offline-run-*/files/media")
    assert len(list(files.rglob("*.png"))) == 4  # two pictures in two rounds
    texts = "".join(path.read_text() for path in files.rglob("*.table.json"))
    assert all(f'"{name}"' in texts for name in ("h0", "h1"))


def test_a_resumed_training_goes_on_in_the_same_run_of_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "files"))
    (tmp_path / "files").mkdir()
    settings = Tracking(to=("wandb",), **QUIET)
    for _ in range(2):
        train(tmp_path / "out", 1, settings)
        time.sleep(1.1)  # wandb names its folders by the second
    paths = list((tmp_path / "files").glob("wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2
    assert len({path.name for path in paths}) == 1


@pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="needs tensorboard: pip install 'mmlm[track]'"
)
def test_tensorboard_gets_everything(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = Tracking(
        to=("tensorboard",), samples=tracking_toy.Held(), sample_every=2, generate=SHORT, **QUIET
    )
    train(tmp_path, 2, settings)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/rewards/margins", "train/tokens_per_second", "eval/words"} <= set(
        tags["scalars"]
    )
    assert [point.step for point in events.Scalars("eval/words")] == [0, 2]
    assert {"samples/h0", "samples/h1"} <= set(tags["images"])
    assert {"run/text_summary", "samples/h0/text_summary"} <= set(tags["tensors"])


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio: pip install 'mmlm[track]'")
def test_trackio_gets_everything(tmp_path):
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import mmlm, tracking_toy\n"
        "from pathlib import Path\n"
        "from mmlm.decoding_settings import GenerateSettings\n"
        "from training.tracking import Tracking, tracked\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "output = Path(sys.argv[1])\n"
        "settings = Tracking(to=('trackio',), project='p', name='n', sample_every=2,\n"
        "    samples=tracking_toy.Held(), generate=GenerateSettings(max_new_tokens=6))\n"
        "trainer = tracking_toy.trainer(output, 2)\n"
        "with tracked(trainer, settings, run_config={'recipe': 'toy'}, output=output):\n"
        "    trainer.train()\n"
        "rows = SQLiteStorage.get_logs('p', 'n')\n"
        "print(sorted({key for row in rows for key in row}))\n"
        "print(SQLiteStorage.get_run_config('p', 'n')['run'])\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    tests = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), *tests],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    keys, config = done.stdout.strip().splitlines()[-2:]
    assert all(f"'{key}'" in keys for key in ("train/loss", "train/tokens_per_second", "samples"))
    assert "toy" in config
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 4  # two pictures, twice
