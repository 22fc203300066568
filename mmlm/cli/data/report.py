"""``mmlm data report``: numbers and a page about the output of ``mmlm data sentinel``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import DONE, SOME_FAILED, Command, Terminal

if TYPE_CHECKING:
    from data_tools.records import StageOutput
    from data_tools.sentinel.summary import Summary

__all__ = ["COMMAND", "ReportData", "report_run", "run"]


@dataclass(frozen=True)
class ReportData:
    """Options of ``mmlm data report``.

    Attributes:
        folder: The --output of `mmlm data sentinel`, shards merged.
        examples: Pictures that are shown with their boxes and pairs.
    """

    folder: Path
    examples: int = 12

    def __post_init__(self) -> None:
        """Checks the number.

        Raises:
            ValueError: If it is negative.
        """
        if self.examples < 0:
            raise ValueError(f"examples must be 0 or more, got {self.examples}")


def run(settings: ReportData, terminal: Terminal) -> int:
    """Writes report.html into the folder and shows its numbers.

    Raises:
        InputError: If the folder holds no such output, or a report.html that is not ours.
    """
    from data_tools.sentinel.report import write_report
    from data_tools.sentinel.summary import summarise

    summary = summarise(settings.folder)
    page = write_report(settings.folder, settings.examples, summary)
    terminal.table(_table(summary))
    if terminal.json:
        terminal.emit({"report": str(page), **summary.as_json()})
    terminal.note(f"Report: {page}")
    return DONE


def report_run(folder: Path, output: StageOutput, terminal: Terminal) -> int:
    """Shows what a run came to, and writes the report if it is the whole.

    Args:
        folder: The run's folder.
        output: What this process wrote.
        terminal: Where to show it.

    Returns:
        ``DONE``, or ``SOME_FAILED`` if too many pictures failed.
    """
    from data_tools.sentinel.report import write_report
    from data_tools.sentinel.summary import FAILED_SHARE, OBJECTLESS_SHARE, summarise

    summary = summarise(folder, output.shard)
    if terminal.json:
        terminal.emit({"output": str(folder), **summary.as_json()})
    terminal.table(_table(summary))
    if summary.objectless_share > OBJECTLESS_SHARE:
        terminal.note(
            f"warning: {summary.objectless_share:.0%} of the sentences name no object; is the "
            "model's language English, and the extractor the right one?"
        )
    terminal.note(f"{summary.pairs.total()} pairs in {output.path('pairs')}.")
    if output.shard.count > 1:
        terminal.note(
            f"This is shard {output.shard} only; when all are done: mmlm data merge {folder}, "
            f"then mmlm data report {folder}"
        )
    else:
        terminal.note(f"Report: {write_report(folder, summary=summary)}")
    if summary.failed_share > FAILED_SHARE:
        terminal.error(
            f"{summary.failed_share:.0%} of the pictures failed; at most {FAILED_SHARE:.0%} may.",
            f"See `error` in {output.path('images')}.",
        )
        return SOME_FAILED
    return DONE


def _table(summary: Summary) -> Any:
    from rich.table import Table

    pairs, images = summary.pairs.total(), summary.images.total()
    table = Table(title=f"{pairs} pairs from {images} pictures", title_justify="left", box=None)
    for column in ("", "what", "number"):
        table.add_column(column, justify="right" if column == "number" else "left")
    by_step = sorted(summary.pairs_by_step.items())
    groups: list[tuple[str, dict[str, int]]] = [
        ("pictures", dict(summary.images.most_common())),
        ("pairs", {f"for sentence {step + 1}": count for step, count in by_step}),
        ("candidates", dict(summary.classes.most_common())),
        ("objects", dict(summary.labels.most_common())),
        ("counts", dict(summary.counts.most_common())),
    ]
    for title, counts in groups:
        for name, count in counts.items():
            if count:
                table.add_row(title, name, str(count))
                title = ""
    table.add_row("", "pairs per picture", f"{summary.pairs_per_image:.2f}")
    return table


COMMAND = Command(
    summary="numbers and a page with examples about the output of `mmlm data sentinel`",
    settings=ReportData,
    run=run,
    positional=("folder",),
    example="mmlm data report runs/pairs",
)
