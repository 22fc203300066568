"""Snapshots of a running stage that survive a kill at any moment, and the log beside them."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmlm.errors import InputError

__all__ = ["Journal", "exclusive", "read_snapshot", "write_atomically", "write_snapshot"]


def write_atomically(path: Path, payload: bytes) -> None:
    """Replaces a file by new content in one step: a reader sees the old or the new one, whole."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def write_snapshot(path: Path, state: dict[str, Any]) -> None:
    """Saves a state of tensors and plain values so that a kill leaves the former or this one."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read_snapshot(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The saved state, None if there is none yet.

    Args:
        path: the snapshot file.
        fingerprint: of the configuration that wants to go on.

    Raises:
        InputError: the snapshot was made with another configuration.
    """
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["fingerprint"] != fingerprint:
        raise InputError(
            f"{path} belongs to another training: its configuration has the hash "
            f"{state['fingerprint']}, the one given has {fingerprint}",
            advice="Choose another --output, or remove that folder to start over.",
        )
    return state


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds a folder for one process; the lock goes with the process, however it ends.

    Raises:
        InputError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is training in {folder}",
                advice="Wait for it, end it, or choose another --output.",
            ) from error
        yield


class Journal:
    """Append-only JSON lines of a stage; lines after the step resumed from are dropped.

    Args:
        path: the file.
        step: steps already made according to the snapshot; 0 starts an empty log.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = []
        if step and path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step(line) <= step]
        write_atomically(path, "".join(line + "\n" for line in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        """Adds one line."""
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _step(line: str) -> float:
    """The step of a log line; a line that a kill cut in half counts as later than any step."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")
