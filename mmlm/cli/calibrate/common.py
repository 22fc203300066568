"""What calibrations share: pictures with a question each, and the configuration they write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.pictures import WORLD_PROMPT
from mmlm.errors import InputError

if TYPE_CHECKING:
    from mmlm.engine.method import Method
    from mmlm.runner import Request

__all__ = ["PromptOptions", "check_output", "model_inputs", "requests", "write_config"]

_MARK = "# Made by `mmlm calibrate`"


@dataclass(frozen=True)
class PromptOptions:
    """Which pictures are shown, and what is asked about them.

    Attributes:
        input: JSON lines with `image` or `images` and `prompt`, as for `mmlm generate`. Without
            it, pictures of the embedded world are drawn.
        split: Split of the world, see `mmlm data world`.
        count: Number of prompts; of a file the first ones.
        seed: Seed of the world's pictures.
        prompt: Question about the world's pictures.
    """

    input: Path | None = field(default=None, metadata={"alias": "--input"})
    split: str = field(default="train", metadata={"alias": "--split"})
    count: int = field(default=32, metadata={"alias": "--count"})
    seed: int = field(default=0, metadata={"alias": "--seed"})
    prompt: str = WORLD_PROMPT

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: If one is out of range.
        """
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def requests(options: PromptOptions) -> list[Request]:
    """The prompts that were asked for; pictures of the world stay in memory.

    Raises:
        InputError: If the file is missing or damaged, or there is no such split.
    """
    from mmlm.runner import Request

    if options.input is not None:
        from mmlm.cli.generate import as_request, read_requests

        lines = read_requests(options.input)[: options.count]
        return [as_request(line, options.input.parent) for line in lines]
    from PIL import Image

    from data_tools.world import SPLITS, render, scene

    if options.split not in SPLITS:
        raise InputError(
            f"There is no split {options.split!r}.", advice=f"Choose one of {', '.join(SPLITS)}."
        )
    scenes = (
        scene(SPLITS[options.split], options.seed, index, options.split)
        for index in range(options.count)
    )
    return [
        Request(str(truth.index), (Image.fromarray(render(truth).image),), options.prompt)
        for truth in scenes
    ]


def model_inputs(
    model: Any, processor: Any, prompts: Sequence[Request], batch_size: int = 1
) -> Iterator[dict[str, Any]]:
    """The prompts as inputs of the model, in batches.

    Raises:
        ImageReadError: If a picture cannot be read.
        InputError: If the processor refuses a prompt.
    """
    from mmlm.inputs import load_image, message, prepare

    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        yield prepare(
            processor,
            [[message("user", one.prompt, len(one.images))] for one in batch],
            [[load_image(source) for source in one.images] for one in batch],
            device=model.device,
            dtype=model.dtype,
        )


def check_output(
    path: Path,
    read: Callable[[Path], Any] | None = None,
    foreign: str = "was not written by `mmlm calibrate`",
) -> None:
    """Refuses to write where something else stands; before any work.

    Args:
        path: Where a calibration is to be written.
        read: Reads such a file, and raises ValueError for any other. None: a configuration, which
            is known by its first line.
        foreign: What is to be said of another file.

    Raises:
        InputError: If there is no such folder, or a file that no calibration wrote.
    """
    if not path.parent.is_dir():
        raise InputError(
            f"There is no folder {str(path.parent)!r} for the output.",
            advice="Create it, or choose another --output.",
        )
    if not path.exists():
        return
    try:
        (read or _read_config)(path)
    except ValueError as error:
        raise InputError(
            f"The output {str(path)!r} exists and {foreign}.",
            advice="Choose another --output; nothing was changed.",
        ) from error


def _read_config(path: Path) -> None:
    if not (path.is_file() and path.read_text("utf-8", errors="replace").startswith(_MARK)):
        raise ValueError(f"{str(path)!r} has not our first line")


def write_config(path: Path, remarks: Sequence[str], methods: Sequence[Method]) -> None:
    """Writes a configuration for ``mmlm generate --config``, whole or not at all.

    Args:
        path: The file.
        remarks: Lines above it: what was measured, and how to make it again.
        methods: The methods with the measured values.
    """
    import yaml

    lines = [_MARK, *(f"# {remark}" if remark else "#" for remark in remarks)]
    content: Mapping[str, Any] = {"methods": [method.text for method in methods]}
    text = "\n".join(lines) + "\n" + yaml.safe_dump(content, width=10**6, sort_keys=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
