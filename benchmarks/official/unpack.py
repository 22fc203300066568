"""Unpacking zip archives: whole or not at all, and nowhere else."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.official.download import Progress

__all__ = ["unpack"]

_CHUNK = 1 << 20


def unpack(archive: Path, folder: Path, progress: Progress, *, keep_wrapper: bool = False) -> None:
    """Unpacks a zip archive into a folder that appears only when it is complete.

    What macOS adds to archives is left out.

    Args:
        archive: The archive.
        folder: Where its content goes; must not exist.
        progress: Called for every file.
        keep_wrapper: Keep a single folder around everything, which is left out otherwise.

    Raises:
        InputError: If the archive is damaged, or a file in it would leave the folder.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of an unpacking that was interrupted
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [
                (info, PurePosixPath(info.filename))
                for info in opened.infolist()
                if not info.is_dir()
                and "__MACOSX" not in info.filename
                and not info.filename.endswith(".DS_Store")
            ]
            _refuse_escapes(archive, [name for _, name in members])
            total, done = sum(info.file_size for info, _ in members), 0
            heads = {name.parts[0] for _, name in members if len(name.parts) > 1}
            lone = len(heads) == 1 and all(len(name.parts) > 1 for _, name in members)
            first = 1 if lone and not keep_wrapper else 0
            for info, name in members:
                target = temporary.joinpath(*name.parts[first:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(info) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, _CHUNK)
                done += info.file_size
                progress(f"unpacking {archive.name}", done, total)
    except (zipfile.BadZipFile, EOFError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{archive} is no complete zip archive: {error}.",
            advice="Move it away with its .sha256 file, and fetch it again.",
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)  # an archive without files
    os.replace(temporary, folder)


def _refuse_escapes(archive: Path, names: list[PurePosixPath]) -> None:
    """Refuses an archive that would write outside its folder."""
    for name in names:
        if name.is_absolute() or ".." in name.parts:
            raise InputError(
                f"{archive} holds a file that leaves its folder: {str(name)!r}.",
                advice="This is no archive of a benchmark's authors; delete it.",
            )
