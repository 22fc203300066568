"""Makes the pictures of docs/inspect.md: docs/images/inspect-*.webp.

    python tools/inspect_pictures.py

Runs `mmlm inspect` on one scene of the embedded world, takes its figures over, and photographs the
page with Chromium (Debian: apt-get install chromium).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image
from web_pictures import chromium

from mmlm.cli import main as mmlm

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
COMMAND = ("inspect", "--scene", "3", "--method", "VHR(alpha=2.0)", "--quiet")
#: No token of the embedded model has massive activations; these are its largest dimensions.
SINKS = ("inspect", "--scene", "3", "--quiet", "--probe", "VisualSinks(tau=6, sink_dims=(71, 151))")
WIDEST = 1200
"""Pixels; as wide as the documentation shows them on a sharp screen."""


def run() -> None:
    """Makes all of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for command, figures in ((COMMAND, ("words", "layers", "heads")), (SINKS, ("sinks",))):
            output = folder / figures[0]
            if code := mmlm([*command, "--output", str(output)]):
                sys.exit(code)
            for figure in figures:
                keep(output / f"{figure}.png", IMAGES / f"inspect-{figure}.webp")
        photograph(folder / "words" / "index.html", folder / "page.png")
        keep(folder / "page.png", IMAGES / "inspect-page.webp")


def photograph(page: Path, target: Path) -> None:
    """The upper part of a page, as it looks in a window."""
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1100, "height": 1180})
        tab.goto(page.as_uri())
        tab.screenshot(path=target)


def keep(source: Path, target: Path) -> None:
    """A picture at most as wide as it is shown, as WebP: maps over noise are large as PNG."""
    with Image.open(source) as picture:
        small = picture.convert("RGB")
        small.thumbnail((WIDEST, 2 * WIDEST), Image.Resampling.LANCZOS)
        small.save(target, "WEBP", quality=88, method=6)
    print(f"{target.name}: {target.stat().st_size // 1024} kB")


if __name__ == "__main__":
    run()
