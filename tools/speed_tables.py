"""Writes the tables of docs/speed.md from the JSON files in benchmarks/results and docs/results.

    python tools/speed_tables.py            rewrite the tables
    python tools/speed_tables.py --check    exit code 1 if the page is not up to date

The text between the tables is written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from embedded_tables import MARKED, ROOT, page_command, table

from benchmarks.memory import grown
from benchmarks.speed import short

RESULTS = ROOT / "benchmarks" / "results"
TRAINING = ROOT / "docs" / "results" / "training_speed.json"
DOCUMENT = ROOT / "docs" / "speed.md"
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Bar:
    """A limit that was set beforehand.

    Attributes:
        method: Short label of the method.
        what: What is compared.
        limit: The ratio that must not be exceeded.
        ratio: Takes the ratio from the figures of plain, ours and naive.
    """

    method: str
    what: str
    limit: float
    ratio: Callable[[Rows], float]


def _token(rows: Rows) -> float:
    return float(rows["ours"]["token"] / rows["plain"]["token"])


def _token_to_naive(rows: Rows) -> float:
    return float(rows["ours"]["token"] / rows["naive"]["token"])


BARS = (
    Bar("VAR", "token, to plain", 1.15, _token),
    Bar("PAI(gamma=1.0)", "token, to plain", 1.15, _token),
    Bar("ImbalancedAttention", "token, to plain", 1.15, _token),
    Bar("ZeroTuning", "token, to plain", 1.15, _token),
    Bar("INTER", "token, to naive", 0.6, _token_to_naive),
    Bar("OPERA", "token, to naive", 0.5, _token_to_naive),
)


def load(pattern: str) -> list[dict[str, Any]]:
    """The stored runs whose file names match."""
    paths = sorted(RESULTS.glob(pattern))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def machines() -> str:
    """What ran what."""
    head = ("device", "dtype", "batch", "tokens", "rounds", "threads", "versions", "commits")
    rows = []
    for run in load("speed-*.json"):
        setting, results = run["setting"], run["results"].values()
        batches = sorted({batch for groups in results for batch in groups})
        commits = sorted({group["commit"] for groups in results for group in groups.values()})
        machine = setting["machine"]
        versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
        rows.append(
            (
                machine["name"], setting["dtype"], ", ".join(batches), str(setting["tokens"]),
                str(setting["rounds"]), str(machine["threads"]), versions, ", ".join(commits),
            )
        )  # fmt: skip
    return table(head, rows)


def bars() -> str:
    """The limits, and what was measured."""
    runs = list(_runs())
    head = ("method", "compared", "limit", *(f"{dtype}, batch {b}" for dtype, b, _ in runs))
    rows = []
    for bar in BARS:
        cells = []
        for _, _, groups in runs:
            group = groups.get(bar.method)
            cells.append(_judged(bar.ratio(group), bar.limit) if group else "")
        rows.append((bar.method, bar.what, f"{bar.limit:.2f}", *cells))
    return table(head, rows)


def _judged(ratio: float, limit: float) -> str:
    return f"{ratio:.2f} met" if ratio <= limit else f"**{ratio:.2f} missed**"


def times() -> str:
    """Ratios to plain decoding of ours and of the naive run."""
    head = (
        "dtype, batch", "method", "prefill", "token", "total", "naive: prefill", "token", "total",
        "ours / naive",
    )  # fmt: skip
    rows = []
    for dtype, batch, groups in _runs():
        for name, group in groups.items():
            plain, ours, naive = (group[key] for key in ("plain", "ours", "naive"))
            cells = [
                f"{run[key] / plain[key]:.2f}"
                for run in (ours, naive)
                for key in ("prefill", "token", "total")
            ]
            against = f"{ours['total'] / naive['total']:.2f}"
            rows.append((f"{dtype}, {batch}", name, *cells, against))
    return table(head, rows)


def passes() -> str:
    """What goes through the model, counted at batch 1; it does not depend on the machine."""
    head = (
        "method", "positions in the prefill", "naive", "positions per token", "naive",
        "decoder passes per token", "naive", "pictures through the tower", "naive",
        "peak memory, to plain", "naive",
    )  # fmt: skip
    keys = ("prompt_positions", "token_positions", "token_passes", "pictures")
    rows = []
    for dtype, batch, groups in _runs():
        if (dtype, batch) != ("float32", "1"):
            continue
        for name, group in groups.items():
            cells = [f"{group[who][key]:g}" for key in keys for who in ("ours", "naive")]
            plain = group["plain"]["peak_bytes"]
            cells += [f"{group[who]['peak_bytes'] / plain:.2f}" for who in ("ours", "naive")]
            rows.append((name, *cells))
    return table(head, rows)


def memory() -> str:
    """How the peak grows with the number of image tokens."""
    rows, head = [], ("method",)
    for run in load("memory-*.json"):
        for name, peaks in run["peaks"].items():
            by_length = {int(n): b for n, b in peaks.items()}
            head = ("method", *(f"{n} tokens, MiB" for n in by_length), "exponent")
            cells = [f"{b / 2**20:.0f}" for b in by_length.values()]
            rows.append((short(name), *cells, f"{grown(by_length):.2f}"))
    return table(head, rows)


def training() -> str:
    """Preference training beside TRL's own, as `tools/training_speed.py` measured it."""
    stored = json.loads(TRAINING.read_text(encoding="utf-8"))
    head = ("variant", "CPU s per step", "lowest, highest", "times as fast as TRL")
    rows = []
    for name, seconds in stored["cpu_seconds"].items():
        steps, times = stored["all_cpu_seconds"][name], stored["faster_than_trl"][name]
        spread = f"{min(steps):.2f}, {max(steps):.2f}"
        rows.append((name, f"{seconds:.2f}", spread, f"{times:.2f}"))
    return table(head, rows)


def _runs() -> list[tuple[str, str, dict[str, Rows]]]:
    """(dtype, batch, figures by short label) of every stored run."""
    found = []
    for run in load("speed-*.json"):
        batches = sorted({batch for groups in run["results"].values() for batch in groups})
        for batch in batches:
            groups = {
                short(label): groups[batch]
                for label, groups in sorted(run["results"].items())
                if batch in groups
            }
            dtype = run["setting"]["dtype"]
            if run["setting"]["preset"] != "small":
                dtype = f"{run['setting']['preset']} {dtype}"
            found.append((dtype, batch, groups))
    return sorted(found, key=lambda run: (run[1], run[0] != "float32"))


TABLES = {make.__name__: make for make in (machines, bars, times, passes, memory, training)}


def main() -> int:
    """Rewrites or checks the page."""
    return page_command(__doc__, DOCUMENT, MARKED, TABLES)


if __name__ == "__main__":
    sys.exit(main())
