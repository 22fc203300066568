"""What can be fetched: a file at an address, a data set of the Hugging Face hub, both by name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Official", "RemoteFile", "Snapshot"]


@dataclass(frozen=True)
class RemoteFile:
    """One file at one address.

    Attributes:
        path: Where it goes, relative to the data folder.
        url: Where it comes from.
        checksum: ``sha256:...`` or ``md5:...`` as published; None if nobody published one.
        size: Size in bytes; None if unknown.
        unpack: For a zip archive: the folder, relative to the data folder, that gets its content.
            A single folder around everything in the archive is left out.
    """

    path: str
    url: str
    checksum: str | None = None
    size: int | None = None
    unpack: str | None = None

    @property
    def result(self) -> str:
        """What is there when all is done, relative to the data folder."""
        return self.unpack or self.path


@dataclass(frozen=True)
class Snapshot:
    """Files of a data set on the Hugging Face hub at one revision.

    Attributes:
        path: Folder, relative to the data folder.
        repo: ``owner/name`` of the data set.
        revision: Commit of the data set; None takes the newest one and notes which it was.
        patterns: Which files; by default all.
        archives: Whether zip archives among them are unpacked where they lie, and deleted.
        checksum: Unused, for symmetry with :class:`RemoteFile`.
    """

    path: str
    repo: str
    revision: str | None = None
    patterns: tuple[str, ...] = ()
    archives: bool = False
    checksum: None = None

    @property
    def url(self) -> str:
        """Page of the data set."""
        page = f"https://huggingface.co/datasets/{self.repo}"
        return f"{page}/tree/{self.revision}" if self.revision else page

    @property
    def size(self) -> None:
        """Unknown before the hub is asked."""
        return None

    @property
    def result(self) -> str:
        """What is there when all is done, relative to the data folder."""
        return self.path


@dataclass(frozen=True)
class Official:
    """What one benchmark needs, under the name that ``mmlm data fetch`` takes.

    Attributes:
        purpose: What it is and which benchmark reads it.
        parts: The files.
        target: What a benchmark is given, relative to the data folder.
        licence: Terms of use, as their owners state them.
        source: Page of the owners.
        about: What one should know before downloading.
    """

    purpose: str
    parts: tuple[RemoteFile | Snapshot, ...]
    target: str
    licence: str
    source: str
    about: str = ""

    @property
    def size(self) -> int | None:
        """Bytes to download in all; None if a part's size is unknown."""
        sizes = [part.size for part in self.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def verified(self) -> bool:
        """Whether every part can be checked against something published."""
        return all(part.checksum or getattr(part, "revision", None) for part in self.parts)
