"""Makes the picture in the README from a report of `mmlm demo`.

    mmlm demo
    python tools/demo_picture.py demo/report.html docs/images/demo.png

Needs Chromium or Chrome. Shows the findings and the first pictures of the report; the rest of the
page is hidden, nothing is redrawn.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1200, 2400
MARGIN = 28
COLOURS = 160
HIDE = """
header { padding-top: 1.4rem } main > section { display: none } footer { display: none }
main > section.gallery-part:not(.gallery-part ~ .gallery-part) { display: block }
.gallery-part .card:nth-child(n + 4) { display: none }
h2 { margin-top: 1.4rem }
"""


def main() -> int:
    """Takes the picture and says how large it became."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"No browser found; install one of {', '.join(BROWSERS)}.", file=sys.stderr)
        return 2
    picture = crop(screenshot(browser, arguments.report.read_text(encoding="utf-8")))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(arguments.output, optimize=True)
    print(f"{arguments.output}: {picture.size}, {arguments.output.stat().st_size / 1000:.0f} kB")
    return 0


def screenshot(browser: str, page: str) -> Image.Image:
    """The page with everything hidden that the picture does not need."""
    with tempfile.TemporaryDirectory() as folder:
        source, shot = Path(folder, "page.html"), Path(folder, "shot.png")
        source.write_text(page.replace("</head>", f"<style>{HIDE}</style></head>", 1), "utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}", source.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=180)
        with Image.open(shot) as image:
            return image.convert("RGB")


def crop(image: Image.Image) -> Image.Image:
    """Cuts off the empty page below the last line."""
    pixels = np.asarray(image)
    rows = np.flatnonzero((pixels != pixels[-1, -1]).any(axis=(1, 2)))
    return image.crop((0, 0, image.width, min(int(rows[-1]) + MARGIN, image.height)))


if __name__ == "__main__":
    sys.exit(main())
