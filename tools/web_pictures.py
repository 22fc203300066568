"""Takes the pictures of the playground that the documentation shows: docs/images/web-*.png.

    python tools/web_pictures.py               all of them
    python tools/web_pictures.py compare data  only these

Starts `mmlm web` on a free port and drives it with Chromium (Debian: apt-get install chromium), as
a person would, at 1280 and 400 pixels width, light and dark. The same scene, question and methods
each time; only the times below the answers differ between two runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTHS = {"wide": (1280, 900), "phone": (400, 860)}
LONGEST = 1400
"""Pixels of a picture from top to bottom: what is below is cut off."""
SHADES = ("light", "dark")
#: No sandbox: it needs rights that containers lack. The rest keeps the browser itself off the net.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 60_000
"""Milliseconds that anything may take; a model answers on a busy machine."""


@contextlib.contextmanager
def served(*options: str) -> Iterator[str]:
    """Runs ``mmlm web`` on a free port and gives its address."""
    command = [sys.executable, "-m", "mmlm", "web", "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            if not line:
                raise SystemExit("mmlm web did not start; its messages stand above.")
            yield json.loads(line)["address"]
        finally:
            server.terminate()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Starts the system's Chromium, without a window.

    Raises:
        SystemExit: If there is none.
    """
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise SystemExit("There is no Chromium. On Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def tab(page: Page, name: str) -> None:
    """Opens one of the tabs."""
    page.get_by_role("tab", name=name, exact=True).click()


def ask(page: Page, question: str) -> None:
    """Asks a question and waits until every column has its answer."""
    turns = page.locator("#answers .turn").count()
    page.locator("#question textarea, #question input").first.fill(question)
    page.locator("#ask").click()
    page.wait_for_function(
        """turns => {
          const all = document.querySelectorAll('#answers .turn');
          if (all.length <= turns) return false;
          const states = [...all[turns].querySelectorAll('.column')].map(c => c.dataset.state);
          return states.length > 0
            && states.every(s => ['done', 'stopped', 'failed'].includes(s));
        }""",
        arg=turns,
    )
    page.wait_for_selector("#ask", state="visible")  # it is back when the last word is shown


def choose(page: Page, slot: int, method: str) -> None:
    """Chooses a method for a column by its name."""
    field = page.locator(f"#method-{slot} input")
    field.click()
    field.fill(method)
    page.get_by_role("option", name=method, exact=True).click()
    page.wait_for_function(
        "([slot, name]) => document.querySelector(`#method-${slot}-text textarea, "
        "#method-${slot}-text input`)?.value.startsWith(name)",
        arg=[slot, method],
    )


def begin(page: Page) -> None:
    """Waits until the first scene is in view."""
    page.wait_for_selector("#picture img")
    page.wait_for_selector("#truth .chip")


def compare(page: Page) -> None:
    """Plain, VHR and VCD on the first scene, and where they looked at an invented object."""
    begin(page)
    choose(page, 2, "VCD")
    ask(page, "describe the image in detail .")
    page.locator("#answers mark.bad .word").first.click()
    page.wait_for_selector("#answers figure.gaze img")


def effects(page: Page, scenes: int = 60) -> None:
    """CHAIR of plain decoding and VHR."""
    tab(page, "Effects")
    page.locator("#effects-count input[type=number]").fill(str(scenes))
    page.keyboard.press("Tab")
    page.locator("#effects-start").click()
    page.wait_for_selector("#effects-progress [data-state=done]")


def data(page: Page) -> None:
    """Two steps of SENTINEL on the first scene."""
    tab(page, "Data")
    page.locator("#data-start").click()
    page.wait_for_selector("#data-steps [data-step='0']")
    page.locator("#data-next").click()
    page.wait_for_selector("#data-steps [data-step='1']")


SCENES: dict[str, Callable[[Page], None]] = {"compare": compare, "effects": effects, "data": data}


def take(browser: Browser, address: str, name: str) -> None:
    """All pictures of one tab: the page is driven once per width and shade."""
    for width, (across, down) in WIDTHS.items():
        for shade in SHADES:
            context = browser.new_context(
                viewport={"width": across, "height": down},
                color_scheme=shade,  # type: ignore[arg-type]
                device_scale_factor=1,
                reduced_motion="reduce",
            )
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            SCENES[name](page)
            page.mouse.move(0, 0)
            page.evaluate("document.fonts.ready.then(() => window.scrollTo(0, 0))")
            page.wait_for_timeout(500)  # transitions of the page's own
            path = IMAGES / f"web-{name}-{width}-{shade}.png"
            whole = page.evaluate("document.documentElement.scrollHeight")
            part = {"x": 0, "y": 0, "width": across, "height": min(whole, LONGEST)}
            page.screenshot(path=path, full_page=True, clip=part, animations="disabled")
            _shrink(path)
            print(path.relative_to(ROOT), file=sys.stderr)
            context.close()


def _shrink(path: Path) -> None:
    """Stores a picture in 256 colours: a third of the size, and no eye sees it."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main() -> int:
    """Takes the pictures that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SCENES)}; default: all")
    names = parser.parse_args().names or list(SCENES)
    if unknown := set(names) - set(SCENES):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose among {', '.join(SCENES)}")
    with served() as address, chromium() as browser:
        for name in names:
            take(browser, address, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
