"""How long a person waits for the playground, from typing `mmlm web` on.

    python tools/web_start.py            three starts, the median last

Three moments of each start, in seconds: the address is printed, the first scene is in view, and the
first question has its answers in all columns (plain and VHR). Chromium is started before.
"""

from __future__ import annotations

import argparse
import statistics
import time

from web_pictures import ask, begin, chromium, served


def start() -> tuple[float, float, float]:
    """Seconds until address, picture and answers."""
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto("about:blank")
        before = time.perf_counter()
        with served() as address:
            printed = time.perf_counter()
            page.goto(address)
            begin(page)
            shown = time.perf_counter()
            ask(page, "describe the image in detail .")
            answered = time.perf_counter()
    return printed - before, shown - before, answered - before


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=3)
    rows = [start() for _ in range(parser.parse_args().starts)]
    print("address  picture  answers")
    for row in [*rows, tuple(map(statistics.median, zip(*rows, strict=True)))]:
        print("  ".join(f"{seconds:7.1f}" for seconds in row))


if __name__ == "__main__":
    main()
