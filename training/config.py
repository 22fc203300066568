"""The configuration of a training: a recipe, where to write, and how to run.

    output: runs/world/seed0
    recipe:
      class_path: training.scratch.recipe.FromScratch
      init_args: {...}

`--config FILE` reads it (a shipped file also by its name: `train/world/seed0`), any value can be
overridden on the command line, unknown keys and wrong types are refused with their path, and the
final configuration is written beside the output.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["Recipe", "Run", "RunSettings", "build_parser", "parse"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a training runs; nothing here changes what is learned.

    Attributes:
        threads: threads of this process, at least 1.
        processes: processes that a recipe may start for a stage, each with one thread. On a
            machine that others use too, several processes of one thread that meet once a step are
            faster than one process whose threads meet at every operation.
        precision: "bf16" computes matrix products in bfloat16 under autocast, "no" in float32.
            (It rounds differently, so it is part of the configuration's hash all the same.)
        snapshot_seconds: time between two snapshots; a kill loses no more than that.
        log_every: steps between two lines of the log.
    """

    threads: int = 1
    processes: int = 1
    precision: Literal["bf16", "no"] = "bf16"
    snapshot_seconds: float = 60.0
    log_every: int = 10


@dataclass(frozen=True)
class Run:
    """What a recipe gets to know about the run it is part of.

    Attributes:
        output: folder of everything the run writes.
        seed: of weights and order.
        settings: see `RunSettings`.
        config: everything that changes what is learned: recipe, seed, precision.
        command: arguments that start this program again with the same configuration.
        text: the whole configuration as YAML.
    """

    output: Path
    seed: int
    settings: RunSettings
    config: dict[str, Any]
    command: tuple[str, ...]
    text: str = ""

    def write_config(self) -> None:
        """Writes the configuration beside the output, once it is clear that the folder is ours."""
        from training.launch import is_main_process
        from training.snapshot import write_atomically

        if is_main_process():
            write_atomically(self.output / "config.yaml", self.text.encode())

    @cached_property
    def accelerator(self) -> Any:
        """An `accelerate.Accelerator`: devices, precision, processes.

        Made when it is asked for: a recipe that hands its training to a Trainer must not have one,
        since the library keeps the first one's settings for the whole process. (Its type is not
        named: jsonargparse would import it, and torch with it, for every --help.)
        """
        import torch
        from accelerate import Accelerator

        return Accelerator(
            mixed_precision=self.settings.precision, cpu=not torch.cuda.is_available()
        )

    def fingerprint(self, without: Collection[str] = ()) -> str:
        """Hash of the configuration; a snapshot goes on only under the one it was made with.

        Args:
            without: arguments of the recipe that do not matter, such as those of later stages.
        """
        arguments = self.config["recipe"].get("init_args", {})
        kept = {key: value for key, value in arguments.items() if key not in without}
        learned = {**self.config, "recipe": {**self.config["recipe"], "init_args": kept}}
        return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]


class Recipe(ABC):
    """What is trained, on what, and in which stages. A recipe is named by its class path."""

    @abstractmethod
    def run(self, run: Run, only: str | None) -> None:
        """Trains to the end, going on where an earlier run was cut off.

        Args:
            run: where and how.
            only: one stage by name, None for all of them.
        """


def build_parser() -> ArgumentParser:
    """The parser of `python -m training` and of `mmlm train`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="training", description="Train a model as a configuration file says."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_argument("--output", type=str, required=True, help="folder for all that is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order")
    parser.add_subclass_arguments(Recipe, "recipe", required=True, help="what is trained, and how")
    parser.add_class_arguments(RunSettings, "run")
    parser.add_argument("--only", type=str, default=None, help="run one stage of the recipe")
    # The deepspeed launcher appends it; accelerate reads the environment instead.
    parser.add_argument("--local_rank", type=int, default=-1, help="set by launchers")
    return parser


def parse(arguments: Sequence[str]) -> tuple[Recipe, Run, str | None]:
    """Reads the configuration, and builds the recipe.

    Args:
        arguments: of the command line, without the program.

    Returns:
        The recipe, the run it is part of, and the one stage asked for, if any.

    Raises:
        InputError: a value is out of its range. (An unknown key or a wrong type ends the process
            with exit code 2, as any misuse of the command line.)
    """
    from mmlm.cli.configs import with_config_paths

    parser = build_parser()
    config = parser.parse_args(with_config_paths(arguments))
    # Only now: `mmlm train --help` must not wait for torch.
    import torch

    try:
        built = parser.instantiate(config)
    except ValueError as error:
        # The parser wraps what a constructor says about a value into its own, longer text.
        raise InputError(
            f"the configuration cannot be used: {error.__cause__ or error}",
            advice="Change that value in the file, or on the command line after --config.",
        ) from error
    settings = built.run
    torch.set_num_threads(settings.threads)
    written = json.loads(parser.dump(config, format="json", skip_unset=False))
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    run = Run(
        output=output,
        seed=config.seed,
        settings=settings,
        config={
            "recipe": written["recipe"],
            "seed": config.seed,
            "precision": settings.precision,
        },
        command=tuple(arguments),
        text=parser.dump(config, skip_unset=False),
    )
    return built.recipe, run, config.only
