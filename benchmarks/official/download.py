"""One file over HTTP, continued where it broke off.

Beside the unfinished ``NAME.part`` stands ``NAME.part.etag``: what the server called the version of
the file. A server that offers another version when asked for the rest sends everything anew
(``If-Range``), so parts of two versions are never joined.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mmlm.errors import InputError

if TYPE_CHECKING:
    import requests

__all__ = ["ATTEMPTS", "Progress", "download", "partial_file"]

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""Called with what is being done, bytes so far, and bytes in all (None if unknown)."""

ATTEMPTS = 4
"""Failures in a row, without a new byte in between, after which a download is given up."""
TIMEOUT = (20.0, 60.0)
"""Seconds to wait for a connection, and for the next bytes."""
_CHUNK = 1 << 16
"""Bytes at a time; at most so many are lost when a connection breaks."""
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def partial_file(path: Path) -> Path:
    """Where the unfinished download of a file stands."""
    return path.with_name(path.name + ".part")


def download(
    url: str, path: Path, size: int | None, progress: Progress, pause: float = 1.0
) -> Path:
    """Downloads a file beside its place and goes on after interruptions, of earlier runs too.

    Args:
        url: Where it comes from.
        path: Its final place; nothing is written there.
        size: Its size in bytes, if known.
        progress: Called for every piece.
        pause: Seconds before the first new attempt; doubled with each.

    Returns:
        The complete file, `partial_file` of ``path``.

    Raises:
        InputError: If the server sends a web page instead of a file.
        requests.RequestException: If the server refuses, or after `ATTEMPTS` failures without a
            new byte.
    """
    import requests

    partial = partial_file(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    failures, reached = 0, _size(partial)
    while True:
        try:
            _stream(url, partial, size, progress)
        except requests.RequestException as error:
            refused = error.response is not None and error.response.status_code < 500
            failures = 1 if _size(partial) > reached else failures + 1
            reached = _size(partial)
            if refused or failures >= ATTEMPTS:
                raise
            time.sleep(pause * 2 ** (failures - 1))
        else:
            _version_file(partial).unlink(missing_ok=True)
            return partial


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _version_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".etag")


def _stream(url: str, partial: Path, size: int | None, progress: Progress) -> None:
    """One request: the whole file, or the rest of what is there."""
    import requests

    version = _version_file(partial)
    start = _size(partial) if version.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # compressed, its length would say nothing
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text()}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if start and response.status_code == requests.codes.requested_range_not_satisfiable:
            # Either everything is there already, or the part is longer than the file now is.
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return
            version.unlink()
            raise requests.ConnectionError("the part on the disk does not fit the file any more")
        response.raise_for_status()
        _refuse_page(url, response)
        start = _start(response, start)
        _remember(response, version)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else size
        with partial.open("ab" if start else "wb") as sink:
            done = start
            for piece in response.iter_content(_CHUNK):
                sink.write(piece)
                done += len(piece)
                progress(partial.stem, done, total)
    if total is not None and done < total:
        raise requests.ConnectionError(f"the connection ended after {done} of {total} bytes")


def _start(response: requests.Response, asked: int) -> int:
    """Where the bytes of a response begin: where we asked for, or at the very beginning."""
    import requests

    if response.status_code != requests.codes.partial_content:
        return 0
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != asked:
        raise requests.ConnectionError("the server sent another part of the file than asked for")
    return asked


def _remember(response: requests.Response, version: Path) -> None:
    """Notes the version, if the server names one that proves equality byte for byte."""
    etag = response.headers.get("ETag", "")
    known = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    if known:
        version.write_text(known)
    else:
        version.unlink(missing_ok=True)


def _refuse_page(url: str, response: requests.Response) -> None:
    """A page instead of the file: Google Drive's quota, a login, a captive network."""
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise InputError(
            f"{url} sent a web page instead of the file (a quota, a login, or a moved file).",
            advice="Open the address in a browser, and put the file where it goes: see "
            "`mmlm data list`.",
        )
