"""Findings on the disk, so that no run asks a detector the same thing twice.

    FOLDER/GroundingDINO-1f0c6a93d2b4/facts.json          what the findings depend on
    FOLDER/GroundingDINO-1f0c6a93d2b4/3f/3fa9...c1.jsonl  one picture: a line per question

One small file per picture, named by the picture's hash, rather than one database: nothing is
loaded at the start, memory stays flat over millions of pictures, shards on several machines (which
work on different pictures) never write to the same file, and no lock is needed that a network file
system would have to provide. Should two processes append to one file all the same, both lines
stay; a damaged line is as good as none, and its names are asked again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.detectors import Box, Detector, Finding
from data_tools.pictures import Picture
from mmlm.errors import InputError
from mmlm.records import write_json

__all__ = ["CachedDetector"]


@dataclass(frozen=True)
class CachedDetector(Detector):
    """A detector that asks another one only what it was not asked before.

    The other one's name, vocabulary and facts are its own: a cache changes no finding. The score
    of a phrase-grounding detector depends a little on the names it was asked together with, and
    the first answer stays; see `names_at_once` of such detectors.

    Attributes:
        inner: The detector.
        folder: Where the findings are kept; shared by all detectors and runs.
    """

    inner: Detector
    folder: Path

    @property
    def name(self) -> str:
        """The inner detector's."""
        return self.inner.name

    @property
    def vocabulary(self) -> frozenset[str] | None:
        """The inner detector's."""
        return self.inner.vocabulary

    @property
    def facts(self) -> Mapping[str, Any]:
        """The inner detector's."""
        return self.inner.facts

    def load(self) -> None:
        """Loads the inner detector and makes the folder.

        Raises:
            InputError: If the inner detector cannot be loaded, or the folder cannot be written.
        """
        self.inner.load()
        try:
            self._own_folder.mkdir(parents=True, exist_ok=True)
            write_json(self._own_folder / "facts.json", dict(self.facts))
        except OSError as error:
            raise InputError(
                f"The cache {str(self.folder)!r} cannot be written: {error.strerror}.",
                advice="Choose another folder, or run without a cache.",
            ) from error

    @functools.cached_property
    def _own_folder(self) -> Path:
        text = json.dumps(self.facts, sort_keys=True, ensure_ascii=False, allow_nan=False)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.folder / f"{self.name}-{digest}"

    def detect(self, picture: Picture, names: Sequence[str]) -> dict[str, Finding | None]:
        """Answers from the disk, and asks the inner detector for the rest.

        Raises:
            OSError: If the disk is full.
        """
        path = self._own_folder / picture.sha256[:2] / f"{picture.sha256}.jsonl"
        known = _read(path)
        if missing := [name for name in dict.fromkeys(names) if name not in known]:
            new = self.inner.detect(picture, missing)
            path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps(
                {name: None if one is None else asdict(one) for name, one in new.items()},
                ensure_ascii=False,
                allow_nan=False,
            )
            with path.open("ab", buffering=0) as stream:
                # The line before may have been cut off by a kill: it must not swallow this one.
                stream.write(f"\n{line}\n".encode())
            known |= new
        return {name: known[name] for name in dict.fromkeys(names)}


def _read(path: Path) -> dict[str, Finding | None]:
    findings: dict[str, Finding | None] = {}
    if not path.exists():
        return findings
    for line in path.read_bytes().splitlines():
        try:
            new = {name: _finding(value) for name, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
            continue  # cut off or damaged: as if it had never been asked
        for name, finding in new.items():
            findings.setdefault(name, finding)
    return findings


def _finding(value: Any) -> Finding | None:
    """Reads a finding; raises ValueError, TypeError or KeyError for anything else."""
    if value is None:
        return None
    boxes = tuple(Box(**box) for box in value["boxes"])
    finding = Finding(value["accepted"], value["score"], boxes)
    numbers = [finding.score] if finding.score is not None else []
    numbers += [n for box in boxes for n in (box.left, box.top, box.right, box.bottom, box.score)]
    if not isinstance(finding.accepted, bool) or not all(map(math.isfinite, numbers)):
        raise ValueError("no finding")
    if not all(isinstance(box.label, str) for box in boxes):
        raise ValueError("no label")
    return finding
