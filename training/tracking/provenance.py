"""Which code made a run: revision, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["git_revision", "provenance"]

PACKAGES = (
    "mmlm",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "open_clip_torch",
)


def provenance() -> dict[str, Any]:
    """Code, versions and machine of this process.

    Returns:
        `git` (None outside a repository, else `revision` and `dirty`), `packages` with their
        versions, `python`, `platform`, `world_size`, and `device`.
    """
    import torch

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # what is not installed has no part in the run
    cuda = torch.cuda.is_available()
    return {
        "git": git_revision(Path(__file__).parents[2]),
        "packages": found,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def git_revision(root: Path) -> dict[str, Any] | None:
    """Commit of a working tree and whether tracked files differ from it.

    Args:
        root: top folder of the repository. A folder somewhere inside another repository, such as
            an installed package in a project's virtual environment, has no revision.

    Returns:
        `revision` (40 hexadecimal digits) and `dirty`, or None.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        revision = git("rev-parse", "HEAD")
        return {"revision": revision, "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no repository, or no commit yet
