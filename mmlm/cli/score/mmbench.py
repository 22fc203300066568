"""``mmlm score mmbench``: score stored answers to MMBench."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.bench.mmbench import edition_of
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.judging import JudgeOptions, open_judge
from mmlm.cli.score.common import ScoreOptions, show

if TYPE_CHECKING:
    from typing import Any

    from benchmarks.base import Scores

__all__ = ["COMMAND", "ScoreMmbench"]


@dataclass(frozen=True)
class ScoreMmbench(ScoreOptions):
    """Options of ``mmlm score mmbench``.

    Attributes:
        file: Answers: the output of `mmlm bench mmbench`, or a table of predictions (.tsv) as the
            authors' evaluation writes and reads it.
        edition: Of such a table, as in `v1.1-dev-en`, if its name does not say.
        export: Write the answers as such a table, for the authors' evaluation or their server.
        judge: Asked about replies in which no option is found.
    """

    edition: str = ""
    export: Path | None = None
    judge: JudgeOptions = field(default_factory=JudgeOptions)


def run(settings: ScoreMmbench, terminal: Terminal) -> int:
    """Scores answers to MMBench's questions."""
    from benchmarks import mmbench

    judge = open_judge(settings.judge, terminal)

    def score(path: Path) -> tuple[Scores, int]:
        result = mmbench.score_stored(_lines(path, settings.edition), judge)
        return result, result.statuses.get("failed", 0)

    if settings.export is not None:
        mmbench.write_official(settings.export, _lines(settings.file, settings.edition))
        terminal.note(f"Predictions written to {settings.export}.")
    return show(settings, terminal, score)


def _lines(path: Path, edition: str) -> list[dict[str, Any]]:
    from benchmarks.base import read_records
    from benchmarks.mmbench import read_official

    if ".tsv" in path.suffixes:
        return read_official(path, edition_of(path, edition))
    return read_records(path)


COMMAND = Command(
    summary="score answers to MMBench, circular or vanilla",
    settings=ScoreMmbench,
    run=run,
    positional=("file",),
    example=(
        "mmlm score mmbench bench/mmbench/answers.jsonl --export predictions.tsv\n"
        "mmlm score mmbench predictions.tsv --edition v1.1-dev-en"
    ),
)
