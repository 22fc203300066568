"""Writes the tables of docs/embedded-model.md from the JSON files that measure_embedded.py made.

    python tools/embedded_tables.py            rewrite the tables
    python tools/embedded_tables.py --check    exit code 1 if the document is not up to date

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the rest of the document is
written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
DOCUMENT = ROOT / "docs" / "embedded-model.md"
KINDS = ("random", "popular", "adversarial")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def marked(kind: str) -> re.Pattern[str]:
    """What stands between ``<!-- kind: name -->`` and ``<!-- kind end -->``: start, name, end."""
    return re.compile(rf"(<!-- {kind}: (\w+) -->\n).*?(<!-- {kind} end -->)", re.DOTALL)


def rewrite(
    document: Path, pattern: re.Pattern[str], make: Callable[[str], str], *, check: bool
) -> int:
    """Puts tables between the marks of a page, or compares them with what stands there.

    Args:
        document: The page.
        pattern: Its marks: `MARKED`, or `marked`.
        make: Makes a table by its name.
        check: Whether to compare only.

    Returns:
        1 if a comparison fails, else 0.
    """
    before = document.read_text(encoding="utf-8")
    after = pattern.sub(lambda m: f"{m[1]}{make(m[2])}{m[3]}", before)
    if check:
        return int(before != after)
    document.write_text(after, encoding="utf-8")
    return 0


def page_command(
    about: str, document: Path, pattern: re.Pattern[str], tables: Mapping[str, Callable[[], str]]
) -> int:
    """What a tool that only writes the tables of a page does: rewrite them, or compare.

    Args:
        about: its docstring, of which the first line is shown.
        document: the page.
        pattern: its marks.
        tables: makes each table.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    return rewrite(document, pattern, lambda name: tables[name](), check=check)


def captions(records: dict[str, Any]) -> str:
    """CHAIR, length, repetition and the captions without an image: one row a model and split."""
    head = (
        "model", "split", "CHAIR_s", "CHAIR_i", "recall", "words", "duplicate sentences",
        "CHAIR_i without image",
    )  # fmt: skip
    rows = []
    for name, split, result in _runs(records):
        metrics = result["metrics"]
        rows.append(
            (
                name, split, *(_percent(metrics[m]) for m in ("chair_s", "chair_i", "recall")),
                f"{metrics['mean_length']['value']:.1f}",
                _share(metrics["duplicate_sentence_share"]),
                _percent(result["no_image"]["metrics"]["chair_i"]),
            )
        )  # fmt: skip
    return table(head, rows)


def priors(records: dict[str, Any]) -> str:
    """Where in the caption objects are invented, and which part of them belongs to the theme."""
    head = (
        "model", "split", "invented: first third", "middle", "last", "theme share of invented",
        "by chance",
    )  # fmt: skip
    rows = []
    for name, split, result in _runs(records):
        thirds = [_share(measure) for measure in result["hallucination_by_third"]]
        theme = result["theme"]
        rows.append((name, split, *thirds, _percent(theme["theme_share"]), _share(theme["chance"])))
    return table(head, rows)


def polls(records: dict[str, Any]) -> str:
    """POPE accuracy, with F1 and the share of yes on the adversarial questions."""
    head = ("model", "split", *KINDS, "F1 adversarial", "yes adversarial")
    rows = []
    for name, split, result in _runs(records):
        asked = result["pope"]
        hard = asked["adversarial"]["metrics"]
        accuracy = [_percent(asked[kind]["metrics"]["accuracy"]) for kind in KINDS]
        rows.append((name, split, *accuracy, _share(hard["f1"]), _share(hard["yes_ratio"])))
    return table(head, rows)


def precision(records: dict[str, Any]) -> str:
    """Captions that equal those of 32-bit weights."""
    record = records["precision"]
    rows = [(name, f"{same} of {record['pictures']}") for name, same in record["identical"].items()]
    return table(("weights", "identical captions"), rows)


def speed(records: dict[str, Any]) -> str:
    """Captions per second by batch size."""
    record = records["speed"]
    rates = record["captions_per_second"]
    rows = [[f"{record['threads']}", *(f"{rate:.1f}" for rate in rates.values())]]
    return table(("threads", *(f"batch {size}" for size in rates)), rows)


def heads(records: dict[str, Any]) -> str:
    """One row a layer: spread over the heads."""
    record = records["heads"]
    head = (
        "layer", "relative VHD: smallest head", "median", "largest", "attention on the image",
        "sink rate",
    )  # fmt: skip
    columns = (record["relative_vhd"], record["attention_on_image"], record["sink_rate"])
    rows = []
    for layer, (vhd, share, sinks) in enumerate(zip(*columns, strict=True)):
        spread = (f"{f(vhd):.3f}" for f in (min, statistics.median, max))
        means = (f"{statistics.mean(values):.2f}" for values in (share, sinks))
        rows.append((str(layer), *spread, *means))
    return table(head, rows)


TABLES = {make.__name__: make for make in (captions, priors, polls, precision, speed, heads)}


def _runs(records: dict[str, Any]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """(model, split, result) of every scores file, by name."""
    for name, record in sorted(records.items()):
        for split, result in record.get("splits", {}).items():
            yield name, split, result


def _percent(measure: dict[str, Any]) -> str:
    low, high = measure["interval"]
    return f"{_share(measure)} [{100 * low:.1f}, {100 * high:.1f}]"


def _share(measure: dict[str, Any]) -> str:
    return "undefined" if measure["value"] is None else f"{100 * measure['value']:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> int:
    """Rewrites or checks the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    records = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    return rewrite(DOCUMENT, MARKED, lambda name: TABLES[name](records), check=check)


if __name__ == "__main__":
    sys.exit(main())
