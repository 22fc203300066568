"""Launched as users launch it: several processes, DeepSpeed's stages, two nodes, a lost process.

Everything runs on the CPU over gloo. One small preference training is run in one process first; all
others must log its losses.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.training import preference_toy as toy

pytestmark = pytest.mark.slow
PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]
STEPS = 4


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(command, **environment):
    return subprocess.Popen(
        command,
        cwd=toy.ROOT,
        env={**os.environ, **toy.ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process, timeout=240):
    """The exit code and all that was printed; nothing is left running."""
    try:
        text, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, text


def deepspeed(configuration, *more):
    return [
        *(PYTHON, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"),
        *("--master_port", free_port(), "--module", "training", "--config", str(configuration)),
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy.write_pairs(folder)
    toy.write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def single(folder):
    """The training in one process, uninterrupted: what it logged."""
    path = toy.configuration(folder, folder / "single", steps=STEPS)
    code, text = finished(start([PYTHON, "-m", "training", "--config", str(path)]))
    assert code == 0, text
    return toy.logged(folder / "single")


def assert_equal(losses, expected, tolerance=1e-6):
    assert losses.keys() == expected.keys()
    for step, loss in expected.items():
        assert losses[step] == pytest.approx(loss, abs=tolerance), step


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def stage(request, folder):
    """A stage of DeepSpeed, and an uninterrupted run of two processes under it."""
    output = folder / request.param
    options = {"deepspeed": request.param, "export": ["adapter"]}
    path = toy.configuration(folder, output, steps=STEPS, **options)
    code, text = finished(start(deepspeed(path)))
    assert code == 0, text
    return request.param


def test_two_processes_of_deepspeed_log_the_losses_of_one(folder, single, stage):
    assert_equal(toy.logged(folder / stage), single, 2e-6)
    assert (folder / stage / "adapter" / "adapter_model.safetensors").exists()


def test_acceptance_13_two_nodes_log_the_metrics_of_one_process(folder, single):
    """Two agents of torchrun that meet on the loopback device, one process each; DDP."""
    output = folder / "nodes"
    path = toy.configuration(folder, output, steps=STEPS)
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    command = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *meeting, "--rdzv-id", "toy"]
    nodes = [start([*command, "-m", "training", "--config", str(path)]) for _ in range(2)]
    results = [finished(node) for node in nodes]
    assert [code for code, _ in results] == [0, 0], results
    assert_equal(toy.logged(output), single)
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen", "num_tokens"):
        assert_equal(toy.logged(output, name), toy.logged(folder / "single", name), 1e-4)


def test_acceptance_13_a_process_with_text_rows_only_does_not_hang(tmp_path):
    """All rows of the second process are text: with equal lengths the order is the file's."""
    toy.write_pairs(tmp_path, count=8, texts_only=(2, 3, 6, 7))
    toy.write_model(tmp_path / "model")
    optimisation = {"learning_rate": 1e-2, "steps": 2, "batch_size": 4, "rows_per_pass": 2}
    paths = {}
    for name in ("single", "two"):
        paths[name] = toy.configuration(
            tmp_path, tmp_path / name, optimisation={**optimisation, "shuffle": False}, export=[]
        )
    code, text = finished(start([PYTHON, "-m", "training", "--config", str(paths["single"])]))
    assert code == 0, text
    several = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "training"]
    code, text = finished(start([*several, "--config", str(paths["two"])]))
    assert code == 0, text
    assert_equal(toy.logged(tmp_path / "two"), toy.logged(tmp_path / "single"))


def test_mixed_rows_under_zero3_are_refused(tmp_path):
    toy.write_pairs(tmp_path, count=8, texts_only=(2,))
    toy.write_model(tmp_path / "model")
    path = toy.configuration(tmp_path, tmp_path / "out", deepspeed="zero3")
    code, text = finished(start([PYTHON, "-m", "training", "--config", str(path)]))
    assert code == 2, text
    assert "1 of 8 pairs have no picture" in text
    assert "zero2" in text


def test_a_killed_process_ends_the_others_and_the_run_goes_on(folder, stage):
    """kill -9 of one rank: the others end with a message, the rest is as if nothing had been."""
    output = folder / f"killed-{stage}"
    path = toy.configuration(folder, output, steps=STEPS, every=1, deepspeed=stage, export=[])
    process = start(deepspeed(path))
    victim, deadline = None, time.monotonic() + 200
    while not (output / "checkpoint-2" / "complete.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for pid in os.listdir("/proc"):
        if pid.isdigit() and _is_rank(pid, 1, str(path)):
            victim = int(pid)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    code, text = finished(process, timeout=60)
    assert code != 0
    assert "lost its connection" in text or "Killing subprocess" in text, text
    code, text = finished(start(deepspeed(path)))
    assert code == 0, text
    assert "Going on from" in text
    assert_equal(toy.logged(output), toy.logged(folder / stage))


def _is_rank(pid, rank, configuration):
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read().split(b"\0")
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = file.read().split(b"\0")
    except OSError:
        return False
    return f"RANK={rank}".encode() in environment and configuration.encode() in command
