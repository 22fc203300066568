"""Measures what every method changes on the embedded model, for docs/effects.md.

    python tools/measure_effects.py                      everything that is not there yet
    python tools/measure_effects.py --methods VHR VAR    only these
    python tools/measure_effects.py --shard 0/2          every second setting, for a second machine

The settings stand in configs/effects/embedded.yaml; the recommended ones of all methods come first.
Every setting is one file under docs/results/effects with the counts of every picture, written at
once when the setting is finished: a killed run loses the setting that was running, the same command
goes on behind it. `tools/effects_page.py` makes the page from the files. Greedy decoding, 84 new
tokens, 300 captions and 600 yes/no questions of each kind, the pictures of `mmlm demo`'s split.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure_embedded import QUESTION, SPLIT, Pictures, asked, captions

import mmlm
from benchmarks import chair
from benchmarks.base import CountTable
from data_tools.world import theme_classes
from mmlm.cli.configs import effect_label, effect_settings
from mmlm.runner import fingerprint

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "effects"
PLAIN = "plain"
BEAMS = "plain, 5 beams"
"""Beam search without a method: what a method that searches has to be compared with."""
ANSWER_TOKENS = 2
"""Of a yes/no answer: its first word decides."""
BATCH = 60


@dataclass(frozen=True)
class Setting:
    """One way of decoding.

    Attributes:
        group: name of the method, or "plain".
        text: the method's text form, "plain", or "plain, 5 beams".
        rank: 0 for the recommended setting of its group.
    """

    group: str
    text: str
    rank: int

    @property
    def methods(self) -> tuple[mmlm.Method, ...]:
        """The method to attach, if there is one."""
        return () if self.group == PLAIN else (mmlm.parse_method(self.text),)

    @property
    def num_beams(self) -> int:
        """Beams of ``generate`` itself."""
        return 5 if self.text == BEAMS else 1

    @property
    def label(self) -> str:
        """The text form for tables."""
        return effect_label(self.text)

    @property
    def path(self) -> Path:
        """Where the result is stored."""
        return RESULTS / f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.label).strip('-')}.json"


def settings() -> list[Setting]:
    """Every setting: plain, all that are recommended, the other strengths, beam search."""
    methods = [
        Setting(name, text, rank)
        for name, texts in effect_settings("embedded").items()
        for rank, text in enumerate(texts)
    ]
    methods.sort(key=lambda setting: setting.rank)
    return [Setting(PLAIN, PLAIN, 0), *methods, Setting(PLAIN, BEAMS, 1)]


def measure(model: Any, processor: Any, setting: Setting, pictures: Pictures) -> dict[str, Any]:
    """The counts of every picture under one setting."""
    began = time.monotonic()
    scenes, methods = pictures.scenes(), setting.methods
    texts = captions(
        model, processor, scenes, methods, batch_size=BATCH, num_beams=setting.num_beams
    )
    scored = chair.score(texts, {s.index: s.classes for s in scenes})
    themes = {s.index: theme_classes(s.theme) for s in scenes}
    polled = asked(
        model, processor, scenes, methods, tokens=ANSWER_TOKENS, num_beams=setting.num_beams
    )
    return {
        "group": setting.group,
        "rank": setting.rank,
        "captions": counts(scored.table),
        "theme": counts(chair.theme_share(scored, themes)),
        "texts": [zlib.crc32(record["caption"].encode()) for record in texts],
        "examples": [record["caption"] for record in texts[:3]],
        "pope": {kind: counts(result.table) for kind, result in polled.items()},
        "seconds": round(time.monotonic() - began, 1),
    }


def identity(model: Any, setting: Setting, pictures: Pictures) -> dict[str, Any]:
    """Everything that determines the counts but the code."""
    return {
        "setting": setting.text,
        "model": fingerprint(model),
        "split": pictures.split,
        "seed": pictures.seed,
        "pictures": pictures.count,
        "question": QUESTION,
    }


def counts(table: CountTable) -> dict[str, Any]:
    """A table in JSON: one list of numbers per column, in the order of the pictures."""
    columns = [
        [int(value) if value == int(value) else round(value, 4) for value in column]
        for column in table.counts.T.tolist()
    ]
    return {
        "images": list(table.images),
        "columns": dict(zip(table.columns, columns, strict=True)),
    }


def store(path: Path, record: dict[str, Any]) -> None:
    """Writes a record whole or not at all, a list of numbers on one line."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[[-+.\deE,\s]+\]", lambda m: re.sub(r"\s+", "", m[0]), text)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def is_there(path: Path, who: dict[str, Any]) -> bool:
    """Whether a setting was measured, on these pictures or more."""
    if not path.exists():
        return False
    stored = json.loads(path.read_text(encoding="utf-8"))["identity"]
    enough: bool = stored["pictures"] >= who["pictures"]
    return enough and stored == {**who, "pictures": stored["pictures"]}


def store_measured(
    setting: Setting, who: dict[str, Any], record: dict[str, Any], threads: int
) -> None:
    """Writes what was measured beside what it was measured with, and says how long it took."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    information = {"commit": commit(), "threads": threads, **versions}
    store(setting.path, {"identity": who, **record, "information": information})
    print(f"{setting.text}: {record['seconds']:.0f} s", file=sys.stderr, flush=True)


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _chosen(arguments: argparse.Namespace) -> Iterator[Setting]:
    shard, of = (int(part) for part in arguments.shard.split("/"))
    known = settings()
    unknown = set(arguments.methods or ()) - {setting.group for setting in known}
    if unknown:
        raise SystemExit(f"no settings for {', '.join(sorted(unknown))} in configs/effects")
    for number, setting in enumerate(known):
        wanted = not arguments.methods or setting.group in arguments.methods
        if wanted and number % of == shard and (setting.rank == 0 or not arguments.recommended):
            yield setting


def main() -> int:
    """Measures what is missing."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="names of methods, or plain; default: all")
    parser.add_argument("--images", type=int, default=300, help="pictures to caption")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th setting from the i-th")
    parser.add_argument("--recommended", action="store_true", help="only recommended settings")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = mmlm.load("embedded")
    pictures = Pictures(SPLIT, arguments.images)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for setting in _chosen(arguments):
        who = identity(model, setting, pictures)
        if arguments.again or not is_there(setting.path, who):
            record = measure(model, processor, setting, pictures)
            store_measured(setting, who, record, arguments.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
