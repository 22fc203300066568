"""Frames of video clips as pictures, at the positions that MVBench's authors take.

A clip is a folder of frames, a GIF, or a video file, which needs PyAV or OpenCV. Chosen frames of
videos are written as PNG files, without loss: eight frames of 4,000 clips are some gigabytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from PIL import Image

    from benchmarks.multi_image.rows import Pictures

__all__ = ["Bounds", "frame_files", "is_clip", "positions"]

Bounds = tuple[float, float] | None
"""Start and end of the part that is asked about, in seconds; None for the whole clip."""

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
_FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
_FOLDER_RATE = 3.0  # frames per second of TVQA's folders
_GIF_RATE = 25.0


def is_clip(path: Path) -> bool:
    """Whether a path is a video, a GIF, or a folder with frames directly in it."""
    if path.is_dir():
        return any(one.suffix.lower() in _FRAME_SUFFIXES for one in path.iterdir())
    return path.suffix.lower() in (*VIDEO_SUFFIXES, ".gif")


def positions(
    count: int, last: int, rate: float, bounds: Bounds = None, first: int = 0
) -> list[int]:
    """Which frames stand for a clip: the middles of ``count`` parts of equal length.

    Args:
        count: How many frames; >= 1.
        last: Number of the last frame.
        rate: Frames per second.
        bounds: The part that is asked about.
        first: Number of the first frame.
    """
    start, end = first, last
    if bounds is not None:
        # A part that begins behind the clip's end leaves its last frame.
        start = max(first, round(bounds[0] * rate))
        end = max(min(round(bounds[1] * rate), last), start)
    length = (end - start) / count
    return [min(int(start + length / 2 + round(length * part)), last) for part in range(count)]


def frame_files(clip: Path, count: int, bounds: Bounds, pictures: Pictures) -> tuple[Path, ...]:
    """The files of a clip's chosen frames; those of a video are written once.

    Args:
        clip: The clip.
        count: How many frames.
        bounds: The part that is asked about.
        pictures: Where frames are written.

    Raises:
        InputError: If the clip cannot be read, or nothing is installed that could.
    """
    if clip.is_dir():
        frames = sorted(one for one in clip.iterdir() if one.suffix.lower() in _FRAME_SUFFIXES)
        chosen = positions(count, len(frames), _FOLDER_RATE, bounds, first=1)
        return tuple(frames[number - 1] for number in chosen)
    part = f"{clip.name}|{clip.stat().st_size}|{bounds}|{count}"
    key = hashlib.sha256(part.encode()).hexdigest()[:16]
    names = [f"{clip.stem}-{key}-{number:02d}.png" for number in range(count)]
    known = [pictures.kept / name for name in names]
    if all(path.is_file() for path in known):
        return tuple(known)
    return tuple(
        pictures.write(name, _png(picture))
        for name, picture in zip(names, _chosen(clip, count, bounds), strict=True)
    )


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "PNG", compress_level=1)
    return stream.getvalue()


@dataclass(frozen=True)
class _Video:
    rate: float
    count: int
    frames: Callable[[], Iterator[Image.Image]]


def _chosen(clip: Path, count: int, bounds: Bounds) -> Sequence[Image.Image]:
    video = _open(clip)
    total = video.count
    while total > 0:
        wanted = positions(count, total - 1, video.rate, bounds)
        found, seen = {}, 0
        for seen, frame in enumerate(video.frames(), start=1):
            if seen - 1 in wanted:
                found[seen - 1] = frame
            if seen > wanted[-1]:
                break
        if found.keys() == set(wanted):
            return [found[number] for number in wanted]
        total = seen  # the header promised more frames than there are
    raise InputError(f"The clip {str(clip)!r} has no frames.", advice="Download it again.")


def _open(clip: Path) -> _Video:
    if clip.suffix.lower() == ".gif":
        return _gif(clip)
    if importlib.util.find_spec("av") is not None:
        return _with_av(clip)
    if importlib.util.find_spec("cv2") is not None:
        return _with_opencv(clip)
    raise InputError(
        f"Nothing is installed that could read the video {str(clip)!r}.",
        advice="Install one: pip install av. Or give folders of frames instead of videos.",
    )


def _gif(clip: Path) -> _Video:
    from PIL import Image, ImageSequence

    try:
        picture = Image.open(clip)
    except OSError as error:
        raise _damaged(clip, str(error)) from error
    with picture:
        count = getattr(picture, "n_frames", 1)

    def frames() -> Iterator[Image.Image]:
        with Image.open(clip) as opened:
            for frame in ImageSequence.Iterator(opened):
                yield frame.convert("RGB")

    return _Video(_GIF_RATE, count, frames)


def _with_av(clip: Path) -> _Video:
    import av

    def frames() -> Iterator[Image.Image]:
        with av.open(str(clip)) as container:
            for frame in container.decode(video=0):
                yield frame.to_image()

    try:
        with av.open(str(clip)) as container:
            stream = container.streams.video[0]
            rate, count = float(stream.average_rate or 0), stream.frames
    except (av.FFmpegError, IndexError) as error:
        raise _damaged(clip, str(error)) from error
    return _Video(rate, count or sum(1 for _ in frames()), frames)


def _with_opencv(clip: Path) -> _Video:
    import cv2
    from PIL import Image

    def frames() -> Iterator[Image.Image]:
        opened = cv2.VideoCapture(str(clip))
        try:
            while True:
                there, frame = opened.read()
                if not there:
                    return
                yield Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        finally:
            opened.release()

    opened = cv2.VideoCapture(str(clip))
    try:
        if not opened.isOpened():
            raise _damaged(clip, "OpenCV cannot open it")
        rate, count = opened.get(cv2.CAP_PROP_FPS), int(opened.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        opened.release()
    return _Video(rate, count if count > 0 else sum(1 for _ in frames()), frames)


def _damaged(clip: Path, reason: str) -> InputError:
    return InputError(f"The clip {str(clip)!r} cannot be read: {reason}.", advice="Get it again.")
