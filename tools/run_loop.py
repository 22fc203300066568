"""The loop: pairs from the embedded model, one preference training, fewer invented objects?

    python tools/run_loop.py              everything that is not there yet
    python tools/run_loop.py --list       the steps, and which of them are done
    python tools/run_loop.py --only NAME  one step

Every step is a command that a user would type (`--list` shows them), its output lies under
runs/loop, and a step that is done is skipped: a killed loop goes on with the same command, and so
do the commands themselves. At the end docs/results/loop.json is written, and `tools/loop_page.py`
makes the tables of docs/loop.md and the figure from it.

Three sets of pictures, none of which the embedded model was trained on: pairs are made from one,
settings were chosen on the second (by hand, see docs/loop.md), and the third is measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loop_page
import loop_pairs

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
PAIR_SCENES, PAIR_SEED = 640, 60
UNSEEN_SCENES, UNSEEN_SEED = 1200, 62
POLLED_SCENES = 200
BEFORE = "before"
TRAININGS: dict[str, tuple[str, ...]] = {
    "c_dpo": (),
    "c_dpo_half": ("--recipe.init_args.data.share", "0.5"),
    "c_dpo_quarter": ("--recipe.init_args.data.share", "0.25"),
    "whole_captions": ("--config", "train/world/preference_whole"),
}
"""Name of the training: what its command has besides the main configuration."""
CHILD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # two processes of one thread, see docs/embedded-model.md
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    # Without it a machine with a GPU would train there, and other numbers would come out.
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
}


@dataclass(frozen=True)
class Step:
    """Commands whose output is one part of the loop.

    Attributes:
        name: of the step.
        title: what it does, for people.
        at_once: commands that run beside each other.
        after: what this process does when they are finished.
        needs: steps whose output it reads.
    """

    name: str
    title: str
    at_once: tuple[tuple[str, ...], ...] = ()
    after: Callable[[], None] | None = None
    needs: tuple[str, ...] = field(default=())


def steps(output: Path) -> list[Step]:
    """All of them, in their order."""
    pairs = output / "pairs"
    found = [
        Step(
            "pairs",
            f"SENTINEL pairs from {PAIR_SCENES} scenes",
            _sharded(
                "data", "sentinel", "--config", "data/world_loop", "--output", str(pairs),
                "--world.count", str(PAIR_SCENES), "--world.seed", str(PAIR_SEED),
            ),
            after=lambda: _merge(pairs),
        ),
        Step(
            "whole",
            "the same pairs as whole captions",
            after=lambda: loop_pairs.write(pairs, output / "whole.jsonl"),
            needs=("pairs",),
        ),
    ]  # fmt: skip
    for name, more in TRAININGS.items():
        found.append(
            Step(
                f"train_{name}",
                f"preference training: {name}",
                (_training(output, name, more),),
                needs=("whole" if name == "whole_captions" else "pairs",),
            )
        )
    for name in (BEFORE, *TRAININGS):
        found += _measuring(output, name)
    return found


def _training(output: Path, name: str, more: Sequence[str]) -> tuple[str, ...]:
    config = () if "--config" in more else ("--config", "train/world/preference")
    files = output / ("whole.jsonl" if name == "whole_captions" else "pairs/pairs.jsonl")
    return (
        "deepspeed", "--num_gpus", str(PROCESSES), "--module", "training", *config, *more,
        "--output", str(output / "training" / name),
        "--recipe.init_args.data.files", json.dumps([str(files)]),
    )  # fmt: skip


def _measuring(output: Path, name: str) -> list[Step]:
    model = "embedded" if name == BEFORE else str(output / "training" / name / "model")
    needs = () if name == BEFORE else (f"train_{name}",)
    common = ("--model", model, "--split", "natural", "--seed", str(UNSEEN_SEED))
    chair = (
        "bench", "chair", *common, "--count", str(UNSEEN_SCENES),
        "--generate.max_new_tokens", "84", "--generate.batch_size", "25",
        "--output", str(output / "chair" / name),
    )  # fmt: skip
    pope = (
        "bench", "pope", *common, "--count", str(POLLED_SCENES),
        "--generate.max_new_tokens", "4", "--generate.batch_size", "50",
        "--output", str(output / "pope" / name),
    )  # fmt: skip
    return [
        Step(f"chair_{name}", f"captions: {name}", _sharded(*chair), needs=needs),
        Step(f"pope_{name}", f"yes/no questions: {name}", _sharded(*pope), needs=needs),
    ]


def _sharded(*words: str) -> tuple[tuple[str, ...], ...]:
    return tuple(("mmlm", *words, "--shard", f"{i}/{PROCESSES}") for i in range(PROCESSES))


def _merge(folder: Path) -> None:
    from data_tools.merging import merge_shards

    merge_shards(folder)


class Loop:
    """The folder of a loop, and which of its steps are done.

    Args:
        output: the folder.
        chosen: the steps to carry out.
    """

    def __init__(self, output: Path, chosen: Sequence[Step]) -> None:
        self.output, self.chosen = output, chosen
        self.notes = output / "steps"

    def done(self, step: Step) -> bool:
        """Whether a step was finished by the very commands that it has now.

        Raises:
            SystemExit: it was finished by others; says which folder to remove.
        """
        note = self._note(step)
        if not note.get("finished"):
            return False
        if note["commands"] != _texts(step):
            raise SystemExit(
                f"error: {step.name} was carried out by other commands than it has now.\n"
                f"Remove {self.output} to begin anew, or give another --output."
            )
        return True

    def run(self, step: Step, number: int) -> None:
        """Carries a step out; time of earlier sittings is added.

        Raises:
            SystemExit: a command failed; says which, and where its output is.
        """
        _say(f"[{number}/{len(self.chosen)}] {step.title}")
        note, began = self._note(step), time.monotonic()
        finished = False
        try:
            self._carry_out(step)
            finished = True
        finally:
            seconds = note.get("seconds", 0.0) + time.monotonic() - began
            record = {"commands": _texts(step), "seconds": round(seconds, 1), "finished": finished}
            self._write_note(step, record)
        _say(f"    {seconds:.0f} s")

    def _carry_out(self, step: Step) -> None:
        logs = self.output / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        running = []
        for part, words in enumerate(step.at_once):
            log = logs / f"{step.name}.{part}.log"
            with log.open("ab") as stream:
                process = subprocess.Popen(
                    _executable(words), cwd=ROOT, env=os.environ | CHILD_ENVIRONMENT,
                    stdout=stream, stderr=subprocess.STDOUT,
                )  # fmt: skip
            running.append((process, words, log))
        failed = [(p.returncode, words, log) for p, words, log in running if p.wait()]
        for code, words, log in failed:
            tail = log.read_text(errors="replace").splitlines()[-15:]
            print("\n".join(tail), file=sys.stderr)
            raise SystemExit(
                f"error: exit code {code} of: {shlex.join(words)}\n"
                f"Its output is in {log}. The same command goes on from here."
            )
        if step.after is not None:
            step.after()

    def seconds(self) -> dict[str, float]:
        """How long each step took."""
        return {step.name: self._note(step).get("seconds", 0.0) for step in self.chosen}

    def _note(self, step: Step) -> dict[str, Any]:
        path = self.notes / f"{step.name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _write_note(self, step: Step, note: dict[str, Any]) -> None:
        self.notes.mkdir(parents=True, exist_ok=True)
        path = self.notes / f"{step.name}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(note, indent=1) + "\n")
        temporary.replace(path)


def _executable(words: Sequence[str]) -> list[str]:
    """The command with this environment's interpreter and launcher."""
    if words[0] == "mmlm":
        return [sys.executable, "-m", "mmlm", *words[1:]]
    with socket.socket() as free:  # two loops on one machine must not meet
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).with_name(words[0])
    return [sys.executable, str(launcher), "--master_port", str(port), *words[1:]]


def _texts(step: Step) -> list[str]:
    return [shlex.join(words) for words in step.at_once]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Carries out what is missing, then writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/loop"), help="folder of the loop")
    parser.add_argument("--only", help="carry out this step alone; needs those before it")
    parser.add_argument("--list", action="store_true", help="show the steps, do nothing")
    options = parser.parse_args()
    os.chdir(ROOT)
    every = steps(options.output)
    loop = Loop(options.output, every)
    if options.list:
        for step in every:
            print(f"{'done   ' if loop.done(step) else 'missing'} {step.name}: {step.title}")
            print("".join(f"        {text}\n" for text in _texts(step)), end="")
        return 0
    if options.only and options.only not in {step.name for step in every}:
        raise SystemExit(f"error: there is no step {options.only!r}; --list shows them.")
    finished = {step.name for step in every if loop.done(step)}
    for number, step in enumerate(every, start=1):
        if step.name in finished or (options.only and step.name != options.only):
            continue
        if missing := [name for name in step.needs if name not in finished]:
            raise SystemExit(f"error: {step.name} needs {', '.join(missing)} before it.")
        loop.run(step, number)
        finished.add(step.name)
    if len(finished) == len(every):
        loop_page.store(options.output, [BEFORE, *TRAININGS], loop.seconds())
        loop_page.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
