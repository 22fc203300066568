"""``mmlm data fetch``: downloads and checks official files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.progress import transfers

if TYPE_CHECKING:
    from benchmarks.official.fetch import Fetched

__all__ = ["COMMAND", "FetchData", "run"]


@dataclass(frozen=True)
class FetchData:
    """Options of ``mmlm data fetch``.

    Attributes:
        name: What to download; `mmlm data list` shows the names.
        data: Where to; by default $MMLM_DATA_DIR, or a folder in your cache.
    """

    name: str
    data: Path | None = None


def run(settings: FetchData, terminal: Terminal) -> int:
    """Downloads what is missing and checks what is there.

    Raises:
        InputError: If it cannot be had, or is not the official file.
    """
    from benchmarks.official import entry, locate
    from benchmarks.official.fetch import fetch

    wanted = entry(settings.name)
    terminal.note(f"{settings.name}: {wanted.purpose}. Licence: {wanted.licence}.")
    if wanted.about:
        terminal.note(wanted.about)
    with transfers(terminal.progress) as progress:
        fetched = fetch(settings.name, settings.data, progress=progress)
    place = locate(settings.name, settings.data)
    if terminal.json:
        terminal.emit(
            {"name": settings.name, "path": str(place), "files": list(map(_row, fetched))}
        )
        return DONE
    for one in fetched:
        terminal.note(_sentence(one))
    terminal.say(str(place))
    return DONE


def _row(one: Fetched) -> dict[str, str]:
    return {
        "path": str(one.path),
        "becomes": str(one.result),
        "state": one.state,
        "checked": one.evidence,
        "digest": one.digest,
    }


def _sentence(one: Fetched) -> str:
    meaning = {
        "published": "equal to what was published",
        "recorded": "equal to what was first downloaded; nobody published a checksum",
        "none": "nobody published a checksum, so nothing could be compared; it is on record now, "
        "and a later change will be refused",
        "unchecked": "an unpacked copy without its archive, which cannot be compared",
    }
    known = f" ({one.digest})" if one.digest else ""
    return f"{one.result}: {one.state}{known}: {meaning[one.evidence]}."


COMMAND = Command(
    summary="download official files, checked and resumable",
    settings=FetchData,
    run=run,
    positional=("name",),
    example="mmlm data fetch coco-val2014\nmmlm data fetch mmbench-dev-en --data /data/mmlm",
)
