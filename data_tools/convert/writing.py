"""Writes preference records: whole, or not at all."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_tools.convert import FORMS, TRL_TEXT, WRITERS
from data_tools.convert.formats import llama_factory
from data_tools.convert.preference import PreferenceRecord
from data_tools.convert.tables import write_folder, write_parquet
from mmlm.errors import InputError
from mmlm.records import write_json

__all__ = ["form_of", "write"]

RowOf = Callable[[PreferenceRecord], Mapping[str, Any]]


def form_of(target: str, output: Path) -> str:
    """What kind of file is written, by the ending of its name; a folder has none.

    Raises:
        InputError: If there is no such format, or it is not written to such a file.
    """
    if target not in FORMS:
        raise InputError(
            f"There is no format {target!r} to write.", advice=f"Formats: {', '.join(FORMS)}."
        )
    form = output.suffix.removeprefix(".").lower() or "folder"
    if form not in FORMS[target]:
        allowed = " or ".join("a folder" if one == "folder" else f".{one}" for one in FORMS[target])
        raise InputError(
            f"{target} is written to {allowed}, not to {output.name!r}.",
            advice="Choose another --output.",
        )
    return form


def write(
    records: Iterable[PreferenceRecord],
    target: str,
    output: Path,
    *,
    row_of: RowOf | None = None,
    overwrite: bool = False,
) -> int:
    """Writes records in a format; at any moment the old output or the new one is there, whole.

    Args:
        records: The records.
        target: Name of the format.
        output: A file or a folder; see `form_of`.
        row_of: For ``trl-text``: `data_tools.convert.formats.trl_text.Renderer.row`.
        overwrite: Replace what is there.

    Returns:
        How many records were written; if there are none, no file is.

    Raises:
        InputError: If the output is there, or a record cannot be expressed; nothing is written
            then.
    """
    form = form_of(target, output)
    if output.exists() and not overwrite:
        raise InputError(
            f"{str(output)!r} is there already.", advice="Choose another --output, or --overwrite."
        )
    if row_of is None:
        if target == TRL_TEXT:
            raise InputError(f"{TRL_TEXT} is written for a model.", advice="Give --model.")
        row_of = WRITERS[target].row
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    rows: Iterator[Mapping[str, Any]] = (row_of(record) for record in records)
    first = next(rows, None)
    if first is None:
        return 0
    rows = itertools.chain([first], rows)
    writers = {
        "jsonl": _write_lines,
        "json": _write_array,
        "parquet": write_parquet,
        "folder": write_folder,
    }
    if target == "mmlm":
        rows = (_beside(row, output.parent) for row in rows)
    try:
        count = writers[form](rows, temporary)
        _replace(temporary, output)
    finally:
        _remove(temporary)
    if target == "llama-factory":
        _register(output)
    return count


def _beside(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Our own files name pictures relative to themselves if they lie beside or below."""
    base = folder.absolute()
    paths = [Path(path) for path in row["images"]]
    return {
        **row,
        "images": [
            path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
            for path in paths
        ],
    }


def _text(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _write_lines(rows: Iterator[Mapping[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(_text(row) + "\n")
            count += 1
    return count


def _write_array(rows: Iterator[Mapping[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write((",\n" if count else "[\n") + _text(row))
            count += 1
        stream.write("\n]\n")
    return count


def _replace(temporary: Path, output: Path) -> None:
    if output.is_dir():  # a folder is not replaced by another in one step
        old = output.with_name(f".{output.name}.{os.getpid()}.old")
        output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old)
    else:
        temporary.replace(output)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _register(output: Path) -> None:
    """Adds the file to LLaMA-Factory's list of data sets, beside it."""
    path = output.with_name("dataset_info.json")
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**known, output.stem: llama_factory.dataset_info(output.name)})
