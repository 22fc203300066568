"""``mmlm data list``: the official files that benchmarks read, and which of them are here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import DONE, Command, Terminal

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["COMMAND", "ListData", "run"]


@dataclass(frozen=True)
class ListData:
    """Options of ``mmlm data list``.

    Attributes:
        name: Show one entry in full: addresses, checksums, places, terms.
        data: A folder with local copies; by default $MMLM_DATA_DIR, or a folder in your cache.
    """

    name: str = ""
    data: Path | None = None


def run(settings: ListData, terminal: Terminal) -> int:
    """Shows the table of official files.

    Raises:
        InputError: If there is no entry of that name.
    """
    from benchmarks.official import OFFICIAL, data_folder, entry

    names = [settings.name] if settings.name else list(OFFICIAL)
    rows = [_describe(name, settings.data) for name in names if entry(name)]
    if terminal.json:
        terminal.emit({"folder": str(data_folder(settings.data)), "files": rows})
    elif settings.name:
        terminal.say(_in_full(rows[0]))
    else:
        terminal.table(_table(rows))
        terminal.say(f"Data folder: {data_folder(settings.data)} (--data or $MMLM_DATA_DIR).")
        terminal.say("One in full: mmlm data list NAME   Download: mmlm data fetch NAME")
    return DONE


def _describe(name: str, data: Path | None) -> dict[str, Any]:
    from benchmarks.official import data_folder, entry, search_path

    wanted = entry(name)
    here = next((place for place in search_path(name, data) if place.exists()), None)
    folder = data_folder(data)
    return {
        "name": name,
        "purpose": wanted.purpose,
        "bytes": wanted.size,
        "verified": wanted.verified,
        "licence": wanted.licence,
        "source": wanted.source,
        "about": wanted.about,
        "here": str(here) if here else None,
        "parts": [
            {
                "url": part.url,
                "goes_to": str(folder / part.path),
                "becomes": str(folder / part.result),
                "bytes": part.size,
                "checksum": part.checksum,
                "revision": getattr(part, "revision", None),
            }
            for part in wanted.parts
        ],
    }


def _size(size: int | None) -> str:
    return f"{size / 1e9:.2f} GB" if size else "not known"


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("name", "what", "download", "checksum", "licence", "here")
    for row in rows:
        table.add_row(
            row["name"],
            row["purpose"],
            _size(row["bytes"]),
            "published" if row["verified"] else "at first download",
            row["licence"],
            "yes" if row["here"] else "no",
        )
    return table


def _in_full(row: dict[str, Any]) -> str:
    lines = [
        f"{row['name']}: {row['purpose']}",
        f"  licence: {row['licence']}",
        f"  source:  {row['source']}",
        f"  here:    {row['here'] or 'no'}",
    ]
    if row["about"]:
        lines.append(f"  note:    {row['about']}")
    for part in row["parts"]:
        lines += [
            f"  from     {part['url']}",
            f"    to       {part['goes_to']}",
            f"    becomes  {part['becomes']}",
            f"    size     {_size(part['bytes'])}",
            f"    checked  {part['checksum'] or part['revision'] or 'nothing published'}",
        ]
    return "\n".join(lines)


COMMAND = Command(
    summary="the official files that benchmarks read, with licence, size and place",
    settings=ListData,
    run=run,
    positional=("name",),
    example="mmlm data list\nmmlm data list coco-val2014",
)
