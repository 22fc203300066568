"""The contact sheet shows what the model is shown, the target outlined."""

import numpy as np
from PIL import Image, ImageColor

from data_tools.mia.planning import ComposeSettings
from data_tools.mia.records import COMPOSE, joined
from data_tools.mia.sheet import CARD, CHOSEN, GAP, REJECTED, TARGET, pick, sheet


def has(image, colour):
    return (np.asarray(image) == ImageColor.getrgb(colour)).all(axis=2)


def test_every_kind_comes_before_any_comes_again():
    lines = [
        {"id": f"{format}{n}-{k}", "format": format, "n_images": n}
        for format, n in (("sequence", 2), ("grid", 4), ("pip", 2))
        for k in range(5)
    ]
    kinds = [(line["format"], line["n_images"]) for line in pick(lines, 6)]
    assert set(kinds[:3]) == set(kinds[3:]) == {("sequence", 2), ("grid", 4), ("pip", 2)}
    assert pick(lines, 6) == pick(lines[::-1], 6)
    assert len(pick(lines, 99)) == 15
    assert pick([], 3) == []


def test_the_target_is_outlined(tmp_path, make_sources, run_compose):
    settings = ComposeSettings(
        formats={"sequence": 1.0, "grid": 1.0, "pip": 1.0}, sequence={2: 1}, grid={4: 1}
    )
    run_compose(tmp_path, make_sources(5), settings)
    lines = pick(joined(tmp_path, (COMPOSE,)), 3)
    drawn = sheet(lines, tmp_path, columns=2)
    assert drawn.width == 2 * CARD + 3 * GAP
    for line in lines:
        card = sheet([line], tmp_path, columns=1)
        rows, columns = np.nonzero(has(card, TARGET))
        assert len(rows) > 300
        assert has(card, CHOSEN).any()
        assert not has(card, REJECTED).any()
        if line["format"] == "grid":
            # A 2 x 2 collage in the middle of the card: the outline is in the target's quarter.
            left = line["target_index"] % 2 == 1
            assert (columns.mean() < card.width / 2) == left


def test_pairs_show_both_answers_and_numbers(tmp_path, make_sources, run_compose):
    run_compose(tmp_path, make_sources(3), ComposeSettings(formats={"pip": 1.0}))
    line = joined(tmp_path, (COMPOSE,))[0]
    pair = {**line, "prompt": line["prompt_segments"], "chosen": "a " * 400, "rejected": "b",
            "ratio": None, "ppl": 1.25}  # fmt: skip
    card = sheet([pair], tmp_path, columns=1)
    assert has(card, CHOSEN).any()
    assert has(card, REJECTED).any()
    assert card.height < 700  # a long answer is cut
    assert isinstance(card, Image.Image)
