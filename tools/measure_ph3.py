"""Measures what pruned memory heads and pruned image heads change on the embedded model.

    python tools/measure_ph3.py             everything that is not there yet
    python tools/measure_ph3.py --page      rewrite the table in docs/effects.md
    python tools/measure_ph3.py --check     exit code 1 if the table is not up to date

The settings stand in configs/effects/ph3.yaml; records are those of `measure_effects.py`. Changes
are paired over the pictures, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import sys

from effects_page import CAPTIONS, HEAD, change_cell, difference, load, plain_cells
from embedded_tables import marked, rewrite, table
from measure_effects import (
    PLAIN,
    ROOT,
    Setting,
    identity,
    is_there,
    measure,
    store_measured,
)
from measure_embedded import SPLIT, Pictures

import mmlm
from mmlm.cli.configs import effect_settings

DOCUMENT = ROOT / "docs" / "effects.md"
MARKED = marked("ph3")


def settings() -> list[Setting]:
    """Plain, then both directions."""
    texts = effect_settings("ph3")["PH3"]
    return [Setting(PLAIN, PLAIN, 0), *(Setting("PH3", text, i) for i, text in enumerate(texts))]


def effects() -> str:
    """The table of the page."""
    plain, *rest = load(settings())
    rows = [["", "", *plain_cells(plain)[1:]]]
    for effect in rest:
        (method,) = effect.setting.methods
        assert isinstance(method, mmlm.PH3)
        heads = ", ".join(f"{layer}.{head}" for layer, own in method.pruned for head in own)
        kind = "memory" if method.towards == "image" else "image"
        cells = [f"{kind} heads {heads}", f"{method.fraction:.0%}"]
        for name in CAPTIONS:
            change = difference(plain.captions, effect.captions, name)
            cells.append(change_cell(change, 1 if name == "mean_length" else 100))
        for asked, answers in effect.polls.items():
            cells.append(change_cell(difference(plain.polls[asked], answers, "accuracy"), 100))
        rows.append([*cells, effect.changed(plain)])
    return table(("pruned", "share of heads", *HEAD[1:]), rows)


def main() -> int:
    """Measures what is missing, or makes the page's table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300, help="pictures to caption")
    parser.add_argument("--page", action="store_true", help="only rewrite the table")
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.page or arguments.check:
        return rewrite(DOCUMENT, MARKED, lambda _: effects(), check=arguments.check)
    torch.set_num_threads(arguments.threads)
    model, processor = mmlm.load("embedded")
    pictures = Pictures(SPLIT, arguments.images)
    for setting in settings():
        who = identity(model, setting, pictures)
        if not is_there(setting.path, who):
            record = measure(model, processor, setting, pictures)
            store_measured(setting, who, record, arguments.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
