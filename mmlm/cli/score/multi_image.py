"""``mmlm score mmmu``, ``blink``, ``mantis``, ``nlvr2`` and ``mvbench``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.base import Scores

__all__ = ["COMMANDS", "ScoreBlink", "ScoreMmmu", "ScoreMultiImage", "ScoreMvbench", "ScoreNlvr2"]


@dataclass(frozen=True)
class ScoreMultiImage(ScoreOptions):
    """Options of ``mmlm score mantis``.

    Attributes:
        file: The output of `mmlm bench`.
    """


@dataclass(frozen=True)
class ScoreMmmu(ScoreOptions):
    """Options of ``mmlm score mmmu``.

    Attributes:
        file: The output of `mmlm bench mmmu`.
        seed: Of the options that are drawn where a reply names none.
        export: Write the answers for MMMU's own evaluation.
    """

    seed: int = 0
    export: Path | None = None


@dataclass(frozen=True)
class ScoreBlink(ScoreOptions):
    """Options of ``mmlm score blink``.

    Attributes:
        file: The output of `mmlm bench blink`.
        parser: How a reply is read; part of the metric's name. `first-letter`: its first letter,
            even of a word; `stated-letter`: lmms-eval 0.7.3.
        export: Write the answers for BLINK's evaluation server.
    """

    parser: Literal["first-letter", "stated-letter"] = "first-letter"
    export: Path | None = None


@dataclass(frozen=True)
class ScoreNlvr2(ScoreOptions):
    """Options of ``mmlm score nlvr2``.

    Attributes:
        file: The output of `mmlm bench nlvr2`.
        export: Write the predictions for the authors' metrics.py.
    """

    export: Path | None = None


@dataclass(frozen=True)
class ScoreMvbench(ScoreOptions):
    """Options of ``mmlm score mvbench``.

    Attributes:
        file: The output of `mmlm bench mvbench`.
        parser: How a reply is read; part of the metric's name. `first-letter`: its first letter;
            `lmms-eval`: the first single letter.
    """

    parser: Literal["first-letter", "lmms-eval"] = "first-letter"


def run_mmmu(settings: ScoreMmmu, terminal: Terminal) -> int:
    """Scores answers to MMMU."""
    from benchmarks.multi_image import mmmu

    _export(settings, terminal, lambda p, lines: mmmu.write_official(p, lines, seed=settings.seed))
    return _show(settings, terminal, lambda lines: mmmu.score_stored(lines, seed=settings.seed))


def run_blink(settings: ScoreBlink, terminal: Terminal) -> int:
    """Scores answers to BLINK."""
    from benchmarks.multi_image import blink

    parser = settings.parser
    _export(settings, terminal, lambda path, lines: blink.write_official(path, lines, parser))
    return _show(settings, terminal, lambda lines: blink.score_stored(lines, parser))


def run_mantis(settings: ScoreMultiImage, terminal: Terminal) -> int:
    """Scores answers to Mantis-Eval."""
    from benchmarks.multi_image import mantis

    return _show(settings, terminal, mantis.score_stored)


def run_nlvr2(settings: ScoreNlvr2, terminal: Terminal) -> int:
    """Scores answers to NLVR2."""
    from benchmarks.multi_image import nlvr2

    _export(settings, terminal, nlvr2.write_official)
    return _show(settings, terminal, nlvr2.score_stored)


def run_mvbench(settings: ScoreMvbench, terminal: Terminal) -> int:
    """Scores answers to MVBench."""
    from benchmarks.multi_image import mvbench

    return _show(settings, terminal, lambda lines: mvbench.score_stored(lines, settings.parser))


def _show(settings: ScoreOptions, terminal: Terminal, score: Callable[[Any], Scores]) -> int:
    from benchmarks.base import read_records

    def counted(path: Path) -> tuple[Scores, int]:
        result = score(read_records(path))
        return result, result.statuses.get("failed", 0)

    return show(settings, terminal, counted)


def _export(
    settings: ScoreMmmu | ScoreBlink | ScoreNlvr2,
    terminal: Terminal,
    write: Callable[[Path, Sequence[Mapping[str, Any]]], None],
) -> None:
    """Writes the answers in the authors' format, if asked for."""
    from benchmarks.base import read_records

    path = settings.export
    if path is None:
        return
    if not path.parent.is_dir():
        raise InputError(
            f"There is no folder {str(path.parent)!r} for --export.",
            advice="Create it, or choose another file.",
        )
    write(path, read_records(settings.file))
    terminal.note(f"Answers written to {path}.")


def _command(name: str, summary: str, settings: type, run: Any, more: str = "") -> Command:
    example = f"mmlm score {name} bench/{name}/answers.jsonl{more}"
    return Command(summary, settings, run, positional=("file",), example=example)


COMMANDS = {
    "mmmu": _command(
        "mmmu", "score answers to MMMU", ScoreMmmu, run_mmmu, " --export answers.json"
    ),
    "blink": _command(
        "blink", "score answers to BLINK", ScoreBlink, run_blink, " --parser stated-letter"
    ),
    "mantis": _command("mantis", "score answers to Mantis-Eval", ScoreMultiImage, run_mantis),
    "nlvr2": _command(
        "nlvr2", "score answers to NLVR2", ScoreNlvr2, run_nlvr2, " --export predictions.csv"
    ),
    "mvbench": _command(
        "mvbench", "score answers to MVBench", ScoreMvbench, run_mvbench, " --parser lmms-eval"
    ),
}
