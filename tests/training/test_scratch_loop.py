import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mmlm.errors import InputError
from tests.training.toy import accelerator, settings
from training.scratch.loop import Stage, StageSettings, run_stage
from training.scratch.schedule import warmup_cosine
from training.snapshot import Journal, exclusive, read_snapshot, write_snapshot


class Line(Stage):
    """Fits a line; the batch of a step is drawn from the step's number."""

    name = "line"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.seen = []

    def batch(self, step, rank, world_size):
        self.seen.append(step)
        generator = torch.Generator().manual_seed(step)
        return {"x": torch.randn(8, 4, generator=generator)[rank::world_size]}

    def forward(self, x):
        return {"loss": (self.layer(x) - x[:, :3]).square().mean()}


def go(stage, folder, steps=12, **values):
    values = {"fingerprint": "f", "log_every": 1, **values}
    return run_stage(stage, settings(steps), folder, accelerator(), **values)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in lines(folder)]


def test_schedule_by_hand():
    values = [warmup_cosine(step, 7, 2, 0.1) for step in range(7)]
    # warm-up 1/2, 1; then 0.1 + 0.9 * (1 + cos(pi p)) / 2 at p = 0, 1/4, 1/2, 3/4, 1
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * p / 4)) for p in range(5)]
    assert values == pytest.approx([0.5, 1.0, *cosine])
    assert values[-1] == pytest.approx(0.1)
    assert warmup_cosine(0, 1, 0, 0.02) == 1.0


def test_learning_rates_reach_the_groups(tmp_path):
    stage = Line()
    stage.rate = lambda name: 0.3 if name.endswith("weight") else 1.0
    rates = []
    original = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(sorted(group["lr"] for group in self.param_groups))
        assert [g["weight_decay"] for g in self.param_groups] == [0.02, 0.0]
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        go(stage, tmp_path, steps=3)
    want = [1e-2 * warmup_cosine(s, 3, 2, 0.02) for s in range(3)]
    assert rates == [pytest.approx([0.3 * lr, lr]) for lr in want]


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    whole = Line()
    go(whole, tmp_path / "whole")
    first = Line()
    go(first, tmp_path / "parts", stop_after=5)
    second = Line()
    go(second, tmp_path / "parts")
    assert first.seen == [0, 1, 2, 3, 4]
    assert second.seen == list(range(5, 12))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    torch.testing.assert_close(whole.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(whole.layer.weight, Line().layer.weight)
    torch.testing.assert_close(whole.frozen.weight, Line().frozen.weight, rtol=0, atol=0)


def test_a_finished_stage_gives_back_its_weights_without_a_step(tmp_path):
    trained = Line()
    go(trained, tmp_path)
    again = Line()
    go(again, tmp_path)
    assert again.seen == []
    torch.testing.assert_close(again.state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert len(losses(tmp_path)) == 12


def test_another_configuration_is_refused(tmp_path):
    go(Line(), tmp_path, stop_after=2)
    with pytest.raises(InputError, match=r"another training.*hash f, the one given has g"):
        go(Line(), tmp_path, fingerprint="g")


def test_a_folder_belongs_to_one_process(tmp_path):
    with exclusive(tmp_path):
        with pytest.raises(InputError, match="another process is training"):
            go(Line(), tmp_path)
    go(Line(), tmp_path, stop_after=1)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_snapshot(tmp_path):
    go(Line(), tmp_path, stop_after=3)
    stage = Line()
    stage.batch = lambda step, rank, world_size: {"x": torch.full((8, 4), torch.nan)}
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        go(stage, tmp_path)
    assert read_snapshot(tmp_path / "snapshot.pt", "f")["step"] == 3


def test_a_batch_must_be_shared_equally(tmp_path):
    several = accelerator()
    several.state.num_processes = 3
    with pytest.raises(InputError, match="batch_size = 4 cannot be shared by 3"):
        run_stage(Line(), settings(), tmp_path, several, fingerprint="f")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"warmup_steps": 6}, r"warmup_steps = 6: must be in \[0, steps = 6\)"),
        ({"learning_rate": math.nan}, "learning_rate = nan"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        StageSettings(
            **{"steps": 6, "batch_size": 4, "learning_rate": 1.0, "warmup_steps": 0, **values}
        )


def test_journal_drops_what_the_snapshot_does_not_know(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Journal(path, 2).write({"step": 3, "loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    Journal(path, 0)
    assert path.read_text() == ""


def test_a_failed_write_leaves_the_former_snapshot(tmp_path):
    path = tmp_path / "snapshot.pt"
    write_snapshot(path, {"fingerprint": "f", "step": 1})
    with pytest.raises(AttributeError):
        write_snapshot(path, {"fingerprint": "f", "step": 2, "bad": lambda: None})
    assert read_snapshot(path, "f")["step"] == 1


CHILD = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.training.test_scratch_loop import Line, accelerator, settings
from training.scratch.loop import run_stage
run_stage(Line(), settings(100_000), Path({folder!r}), accelerator(), fingerprint="f",
          snapshot_seconds=0.0, log_every=1)
"""


def test_kill_9_loses_no_snapshot(tmp_path):
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(root=root, folder=str(tmp_path))],
        stderr=subprocess.DEVNULL,
    )
    snapshot = tmp_path / "snapshot.pt"
    deadline = time.monotonic() + 120
    while not snapshot.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    state = read_snapshot(snapshot, "f")
    stage = Line()
    run_stage(
        stage, settings(100_000), tmp_path, accelerator(), fingerprint="f", log_every=1,
        stop_after=state["step"] + 3,
    )  # fmt: skip
    assert stage.seen == list(range(state["step"], state["step"] + 3))
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, state["step"] + 4))
