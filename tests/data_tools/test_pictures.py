"""Pictures as cameras, scanners and broken disks deliver them."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import picture

from data_tools.pictures import Picture
from mmlm.errors import ImageReadError


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def put(tmp_path):
    def write(content, name="picture.jpg"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def test_identity_and_pixels(put):
    content = encoded(picture(1, (30, 20)), "PNG")
    read = Picture.read("p1", put(content))
    assert (read.id, read.sha256) == ("p1", hashlib.sha256(content).hexdigest())
    assert np.array_equal(np.asarray(read.image), np.asarray(picture(1, (30, 20))))
    assert read == Picture.read("p1", read.path)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "LA", "I;16"])
def test_acceptance_8_other_colours_become_rgb(put, mode):
    source = picture(2, (12, 8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
    else:
        image = source.convert(mode)
    kind = {"CMYK": "TIFF"}.get(mode, "PNG")
    read = Picture.read("p", put(encoded(image, kind)))
    assert (read.image.mode, read.image.size) == ("RGB", (12, 8))
    if mode in ("L", "I;16"):
        grey = np.asarray(source.convert("L"))
        assert np.array_equal(np.asarray(read.image), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (3, (3, 5)), (6, (3, 0)), (8, (0, 5))]
)
def test_acceptance_8_pictures_are_turned_as_exif_says(put, orientation, corner):
    """A white dot in the first corner of the file lies where the camera's record puts it."""
    upright = orientation in (1, 3)
    size = (4, 6) if upright else (6, 4)
    image = Image.new("RGB", size)
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = Picture.read("p", put(encoded(image, "PNG", exif=exif)))
    assert read.image.size == (4, 6)
    assert read.image.getpixel(corner) == (255, 255, 255)


def test_acceptance_8_one_pixel(put):
    read = Picture.read("p", put(encoded(Image.new("RGB", (1, 1), "red"), "PNG")))
    assert (read.image.size, read.image.getpixel((0, 0))) == ((1, 1), (255, 0, 0))


JPEG = encoded(picture(3, (64, 48)), quality=90)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"not a picture at all", "no picture in a known format"),
        (JPEG[: len(JPEG) // 2], "damaged or cut off"),
        (JPEG[:-200], "damaged or cut off"),
        (encoded(picture(3), "PNG")[:200], "damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "known format|damaged"),
    ],
)
def test_acceptance_8_damaged_pictures_are_errors_with_their_path(put, content, reason):
    path = put(content, "broken.jpg")
    with pytest.raises(ImageReadError, match=reason) as error:
        Picture.read("p", path)
    assert "broken.jpg" in str(error.value)


def test_missing_and_folders(tmp_path):
    with pytest.raises(ImageReadError, match="there is no such file"):
        Picture.read("p", tmp_path / "absent.jpg")
    with pytest.raises(ImageReadError, match="no regular file"):
        Picture.read("p", tmp_path)
    with pytest.raises(ImageReadError, match="no regular file"):
        Picture.read("p", Path("/dev/zero"))


def test_too_large_costs_nothing(put):
    bomb = Image.new("1", (30_000, 30_000))
    with pytest.raises(ImageReadError, match="too large"):
        Picture.read("p", put(encoded(bomb, "PNG"), "bomb.png"))
