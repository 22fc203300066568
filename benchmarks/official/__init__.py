"""Finding official files on this machine, or saying what to download and where it goes.

Benchmarks call :func:`locate`. It never downloads: that takes gigabytes and is the user's decision
(``mmlm data fetch NAME``, which is :func:`benchmarks.official.fetch.fetch`).
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from benchmarks.official.files import OFFICIAL
from benchmarks.official.remote import Official
from mmlm.errors import InputError

__all__ = ["OFFICIAL", "data_folder", "entry", "instructions", "locate", "search_path"]

VARIABLE = "MMLM_DATA_DIR"
"""Environment variable that names the data folder."""


def data_folder(data_dir: str | Path | None = None) -> Path:
    """Where official files go.

    Args:
        data_dir: What the user asked for; None takes ``$MMLM_DATA_DIR``, or a folder in the user's
            cache.
    """
    if data_dir is not None:
        return Path(data_dir).expanduser()
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    import pooch

    return Path(pooch.os_cache("mmlm")) / "data"


def entry(name: str) -> Official:
    """The table's row of a name.

    Raises:
        InputError: If there is none; lists what there is.
    """
    if name not in OFFICIAL:
        near = difflib.get_close_matches(name, OFFICIAL, n=1)
        raise InputError(
            f"There are no official files {name!r}; there are: {', '.join(OFFICIAL)}.",
            advice=f"Did you mean {near[0]!r}?" if near else "See: mmlm data list",
        )
    return OFFICIAL[name]


def search_path(name: str, data_dir: str | Path | None = None) -> list[Path]:
    """Where :func:`locate` looks, in this order.

    A local copy is found under its place in the table (``DIR/coco/val2014``) or directly in
    ``data_dir`` under its own name (``DIR/val2014``).
    """
    target = Path(entry(name).target)
    places = []
    if data_dir is not None:
        own = Path(data_dir).expanduser()
        places += [own / target, own / target.name]
    places.append(data_folder() / target)
    return places


def locate(name: str, data_dir: str | Path | None = None) -> Path:
    """Finds official files on this machine.

    Args:
        name: A name of the table, e.g. ``coco-val2014``.
        data_dir: A folder with local copies, looked at first.

    Returns:
        The file or folder that a benchmark reads.

    Raises:
        InputError: If it is nowhere; says which file to download from where, and where it goes.
    """
    places = search_path(name, data_dir)
    for place in places:
        if place.exists():
            return place
    looked = ", ".join(str(place) for place in places)
    raise InputError(
        f"The official files {name!r} ({entry(name).purpose}) are not on this machine; looked for "
        f"{looked}.",
        advice=instructions(name, data_dir),
    )


def instructions(name: str, data_dir: str | Path | None = None) -> str:
    """What to download and where it goes, for people with and without a network."""
    wanted = entry(name)
    folder = data_folder(data_dir)
    steps = []
    for part in wanted.parts:
        step = f"{part.url} -> {folder / part.path}"
        unpack = getattr(part, "unpack", None)
        steps.append(f"{step}, unpacked to {folder / unpack}" if unpack else step)
    option = f" --data {data_dir}" if data_dir is not None else ""
    return (
        f"Run `mmlm data fetch {name}{option}`, or without a network here bring "
        f"{'; '.join(steps)}. Source: {wanted.source} Licence: {wanted.licence}."
    )
