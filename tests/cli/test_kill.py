"""kill -9 in the middle of `mmlm generate` loses and doubles nothing: with a real SIGKILL."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mmlm.cli import main
from mmlm.records import RecordFile, read_lines

OPTIONS = ("--generate.max_new_tokens", "24", "--generate.batch_size", "2", "--quiet")
# Imports once, then runs each command line in a forked process of its own: the process that is
# killed is a real one, but does not spend ten seconds on importing.
STARTER = """
import json, os, sys
from mmlm.cli import generate, main
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def kill_when(monkeypatch):
    """Runs `mmlm` in a process and kills it at the first moment at which a condition holds."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(arguments, reached):
        print(json.dumps(arguments), file=starter.stdin, flush=True)
        child = int(starter.stdout.readline())
        give_up = time.monotonic() + 180
        while not reached() and time.monotonic() < give_up:
            pass
        with contextlib.suppress(ProcessLookupError):  # it may have ended by then
            os.kill(child, signal.SIGKILL)
        assert int(starter.stdout.readline()) in (-signal.SIGKILL, 0)

    yield run
    starter.stdin.close()
    starter.stdout.close()
    starter.wait()


@pytest.mark.slow
def test_killed_three_times(tiny_folder, write_questions, tmp_path, kill_when):
    questions = [
        {"id": f"q{n}", "image": f"{n % 4}.png", "prompt": f"what is this {n} ?"} for n in range(80)
    ]
    source = write_questions(questions)
    output = tmp_path / "killed.jsonl"
    record = tmp_path / "killed.jsonl.run.json"
    common = ["generate", "--model", str(tiny_folder), "--input", str(source), *OPTIONS]
    arguments = [*common, "--output", str(output)]

    def size():
        both = (output, output.with_name("killed.jsonl.early"))
        return sum(path.stat().st_size for path in both if path.exists())

    kill_when(arguments, record.exists)  # before, or while, the first answer is written
    kill_when(arguments, lambda: size() > 0)  # right after a first batch
    reached = size() + 1500  # some batches later, wherever it is by then
    kill_when(arguments, lambda: size() > reached)

    survived = [line for line in output.read_bytes().splitlines(keepends=True) if b"\n" in line]
    assert size() > 0
    assert len(survived) < len(questions)
    assert [json.loads(line)["id"] for line in survived] == [
        question["id"] for question in questions[: len(survived)]
    ]
    # The fourth start ends it; nobody holds the lock of a killed process.
    assert main(arguments) == 0
    assert output.read_bytes().startswith(b"".join(survived))
    assert [line["id"] for line in read_lines(output)] == [q["id"] for q in questions]
    assert main([*common, "--output", str(tmp_path / "whole.jsonl")]) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_a_benchmark_killed_at_a_random_moment(tmp_path, kill_when):
    """On the shipped model: killed three times and resumed, or not: the same bytes."""
    chosen = random.Random()  # any moment must do, so it is another one every time
    common = ["bench", "chair", "--count", "30", *OPTIONS]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = [*common, "--output", str(killed)]
    record = killed / "captions.jsonl.run.json"
    for _ in range(3):
        wait, found = chosen.uniform(0.0, 1.5), []

        def reached(wait=wait, found=found):
            if not found and record.exists():
                found.append(time.monotonic())
            return bool(found) and time.monotonic() > found[0] + wait

        kill_when(arguments, reached)
    assert main(arguments) == 0
    assert main([*common, "--output", str(whole)]) == 0
    for name in ("captions.jsonl", "scores.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


WRITER = """
import sys
from pathlib import Path
from mmlm.records import RecordFile

with RecordFile(Path(sys.argv[1]), {"run": 1}) as records:
    number = len(records.done)
    while True:
        records.append([{"id": number + n, "text": "x" * 20_000} for n in range(3)])
        number += 3
"""


def test_a_writer_killed_at_many_moments(tmp_path):
    """Large records and no pause between them, so that kills fall into writes as well."""
    path = tmp_path / "out.jsonl"
    seen = 0
    for attempt in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        before = path.stat().st_size if path.exists() else 0
        kill_when_grown(writer, path, before, pause=0.0007 * attempt)
        records = RecordFile(path, {"run": 1})
        assert list(records.done) == list(range(len(records.done)))
        assert len(records.done) >= seen
        assert all(len(record["text"]) == 20_000 for record in records.done.values())
        seen = len(records.done)
    assert seen > 0


def kill_when_grown(process, path, before, pause):
    give_up = time.monotonic() + 180
    while not path.exists() or path.stat().st_size <= before:
        assert process.poll() is None
        assert time.monotonic() < give_up
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.wait()
