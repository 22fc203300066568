"""Downloading official files: resumable, checked, and whole or not at all.

A file is first ``NAME.part`` beside its place. What interrupts a download (Ctrl-C, a lost
connection, a kill) leaves that part, and the next start asks the server for the rest, provided that
the server says it is still the same file. Only what has the published checksum moves into place,
which :mod:`pooch` sees to. Where nobody published a checksum, the SHA-256 of the first download
is written to ``NAME.sha256`` (as ``sha256sum --check`` reads it) and a later change is refused.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from benchmarks.official import data_folder, entry, instructions
from benchmarks.official.download import Progress, download, partial_file
from benchmarks.official.remote import RemoteFile, Snapshot
from benchmarks.official.unpack import unpack
from mmlm.errors import InputError
from mmlm.records import locked

__all__ = ["Evidence", "Fetched", "fetch"]

Evidence: TypeAlias = Literal["published", "recorded", "none", "unchecked"]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Fetched:
    """What became of one file or snapshot.

    Attributes:
        path: The file, or the folder of a snapshot.
        result: What benchmarks read: ``path``, or the folder it was unpacked to.
        state: "downloaded" now, or "present" before.
        evidence: What it was checked against: "published" checksum or pinned revision, "recorded"
            at an earlier download, "none": this was the first time, and its hash is on record from
            now on; "unchecked": somebody's unpacked copy without its archive.
        digest: ``sha256:...`` of the file, or the commit of a snapshot; "" if unchecked.
    """

    path: Path
    result: Path
    state: Literal["downloaded", "present"]
    evidence: Evidence
    digest: str


def fetch(
    name: str,
    data_dir: str | Path | None = None,
    *,
    progress: Progress | None = None,
    pause: float = 1.0,
) -> list[Fetched]:
    """Brings official files onto this machine; what is there already is checked instead.

    Args:
        name: A name of the table.
        data_dir: Where to; by default the data folder (``benchmarks.official.data_folder``).
        progress: Called while bytes come in.
        pause: Seconds before a broken download goes on; doubled each time.

    Returns:
        One entry per file or snapshot of the table's row.

    Raises:
        InputError: If there is no network, the server refuses, the disk is too small, or what is
            there or comes is not the official file. Says what to do by hand.
    """
    folder = data_folder(data_dir)
    by_hand = instructions(name, data_dir)
    done = []
    for part in entry(name).parts:
        with locked(folder / part.path):
            if isinstance(part, Snapshot):
                done.append(_snapshot(part, folder, by_hand, progress or _silent))
            else:
                done.append(_file(part, folder, by_hand, progress or _silent, pause))
    return done


def _silent(what: str, done: int, total: int | None) -> None:
    """Shows nothing."""


def _file(
    part: RemoteFile, folder: Path, by_hand: str, progress: Progress, pause: float
) -> Fetched:
    """Downloads or checks one file, and unpacks it if it is an archive."""
    path = folder / part.path
    result = folder / part.result
    record = path.with_name(path.name + ".sha256")
    recorded = record.read_text().split()[0] if record.exists() else None
    if not path.exists() and part.unpack and result.is_dir():
        # The archive was deleted to save space, or was never here.
        kept: Evidence = "published" if part.checksum else "recorded"
        digest = f"sha256:{recorded}" if recorded else ""
        return Fetched(path, result, "present", kept if recorded else "unchecked", digest)
    state: Literal["downloaded", "present"] = "present" if path.exists() else "downloaded"
    if state == "present":
        _check(path, part, recorded, progress)
    else:
        _room(folder, part, by_hand)
        _download(part, path, recorded, by_hand, progress, pause)
    digest = recorded or _digest(path, "sha256", progress)
    if recorded is None:
        record.write_text(f"{digest}  {path.name}\n")
    if part.unpack and not result.is_dir():
        unpack(path, result, progress)
    evidence: Evidence = "recorded" if recorded else "none"
    if part.checksum:
        evidence = "published"
    return Fetched(path, result, state, evidence, f"sha256:{digest}")


def _digest(path: Path, algorithm: str, progress: Progress) -> str:
    total, done, state = path.stat().st_size, 0, hashlib.new(algorithm)
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            state.update(block)
            done += len(block)
            progress(f"checking {path.name}", done, total)
    return state.hexdigest()


def _check(path: Path, part: RemoteFile, recorded: str | None, progress: Progress) -> None:
    """Refuses a file on disk that is not what was published or downloaded."""
    wanted = part.checksum or (f"sha256:{recorded}" if recorded else None)
    if wanted is None:
        return
    algorithm, _, expected = wanted.partition(":")
    found = _digest(path, algorithm, progress)
    if found != expected:
        whose = "published" if part.checksum else "recorded when it was downloaded"
        raise InputError(
            f"{path} is not the file that it should be: its {algorithm} is {found}, {whose} was "
            f"{expected}.",
            advice=f"Move it away and fetch it again, or get it yourself from {part.url}.",
        )


def _room(folder: Path, part: RemoteFile, by_hand: str) -> None:
    """Refuses a download that cannot fit on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    needed = (part.size or 0) * (2 if part.unpack else 1)
    partial = partial_file(folder / part.path)
    needed -= partial.stat().st_size if partial.exists() else 0
    if needed > free:
        raise InputError(
            f"{part.path} needs {needed / 1e9:.1f} GB on the disk of {folder} (unpacked content "
            f"included), where {free / 1e9:.1f} GB are free.",
            advice=f"Choose another folder with --data DIR. {by_hand}",
        )


def _download(
    part: RemoteFile,
    path: Path,
    recorded: str | None,
    by_hand: str,
    progress: Progress,
    pause: float,
) -> None:
    """Downloads one file through pooch, which compares the checksum and moves it into place."""
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")  # our progress says it

    def bring(url: str, output: str | Path, _: object) -> None:
        partial = download(url, path, part.size, progress, pause)
        partial.replace(output)

    known = part.checksum or (f"sha256:{recorded}" if recorded else None)
    try:
        pooch.retrieve(part.url, known, path.name, path.parent, downloader=bring)
    except requests.HTTPError as error:
        status = f"{error.response.status_code} {error.response.reason}"
        raise InputError(f"{part.url} answered: {status}.", advice=by_hand) from error
    except requests.RequestException as error:
        raise InputError(
            f"{part.url} cannot be reached or breaks off again and again: {_reason(error)}. What "
            "came so far is kept and continued next time.",
            advice=by_hand,
        ) from error
    except ValueError as error:  # how pooch reports a wrong checksum
        raise InputError(
            f"What {part.url} sent is not the official file: {error}",
            advice=f"Try again later, or look whether there is a new version. {by_hand}",
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost reason of a network error; the outer ones repeat the address."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


def _snapshot(part: Snapshot, folder: Path, by_hand: str, progress: Progress) -> Fetched:
    """Downloads a data set's files at one commit; the hub's client resumes and checks them."""
    path = folder / part.path
    record = path.with_name(path.name + ".revision")
    recorded = record.read_text().strip() if record.exists() else None
    revision = part.revision or recorded
    evidence: Evidence = "recorded" if recorded else "none"
    if part.revision:
        evidence = "published"
    # The record is written after the last file was complete.
    if path.is_dir() and recorded is not None and recorded == revision:
        return Fetched(path, path, "present", evidence, recorded)
    commit = _from_hub(part, revision, path, by_hand)
    for archive in sorted(path.rglob("*.zip")) if part.archives else ():
        content = archive.with_suffix("")
        if not content.is_dir():  # unpacked before an interruption, and then fetched again
            unpack(archive, content, progress, keep_wrapper=True)
        archive.unlink()
    record.write_text(f"{commit}\n")
    return Fetched(path, path, "downloaded", evidence, commit)


def _from_hub(part: Snapshot, revision: str | None, path: Path, by_hand: str) -> str:
    """Asks the hub which commit a revision is, and downloads its files."""
    import httpx2  # what the hub's client speaks
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Asked first: without a network this fails at once, the download after half a minute.
        commit = HfApi().dataset_info(part.repo, revision=revision, timeout=20).sha
        snapshot_download(
            part.repo,
            repo_type="dataset",
            revision=commit,
            local_dir=path,
            allow_patterns=list(part.patterns) or None,
        )
    except (httpx2.HTTPError, OSError) as error:
        raise InputError(
            f"The data set {part.repo} cannot be had from the hub: {_reason(error)}.",
            advice=by_hand,
        ) from error
    return str(commit)
