"""Scenes and pictures of the embedded world: tables, determinism, truth, placement."""

import dataclasses
import hashlib
import math
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from data_tools.world import (
    CATEGORIES,
    NAMES,
    SPLITS,
    THEMES,
    WorldConfig,
    render,
    scene,
    scenes,
    sprites,
    theme_classes,
)
from data_tools.world.categories import BIG, SMALL, SUPERCATEGORIES, size_group
from data_tools.world.themes import BY_NAME, swapped

TRAIN = SPLITS["train"]

DIGEST_PROGRAM = """
import hashlib, numpy
from data_tools.world import SPLITS, caption, questions, render, scene
digest = hashlib.sha256()
for split, config in SPLITS.items():
    for index in range(12):
        truth = scene(config, 5, index, split)
        digest.update(render(truth).image.tobytes())
        rng = numpy.random.default_rng(index)
        digest.update(repr((truth.instances, caption(truth, rng), questions(truth, rng))).encode())
print(digest.hexdigest())
"""


def test_categories_are_those_of_coco():
    ids = [i for i, _ in CATEGORIES]
    assert len(set(NAMES)) == 80
    assert ids == sorted(ids)
    missing = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids that COCO never gave out
    assert set(range(1, 91)) - set(ids) == missing
    spot = {1: "person", 13: "stop sign", 44: "bottle", 62: "chair", 72: "tv", 90: "toothbrush"}
    assert spot.items() <= dict(CATEGORIES).items()
    assert [first for _, first, _ in SUPERCATEGORIES[1:]] == [e for _, _, e in SUPERCATEGORIES[:-1]]


def test_size_groups_name_existing_classes_once():
    assert set(NAMES) >= BIG | SMALL
    assert not BIG & SMALL
    assert (len(BIG), len(SMALL)) == (25, 35)
    assert size_group("skateboard") == "medium"


def test_theme_tables():
    assert len(THEMES) == len(BY_NAME) == 16
    for theme in THEMES:
        assert set(theme.classes) <= set(NAMES)
        assert all(0 < p < 1 for p in theme.classes.values())
        assert swapped(swapped(theme)) == theme != swapped(theme)
    used = set().union(*(t.classes for t in THEMES))
    assert used == set(NAMES)
    assert theme_classes("savanna") == {
        "elephant", "giraffe", "zebra", "bird", "bear", "truck", "person",
    }  # fmt: skip
    with pytest.raises(ValueError, match="unknown theme 'moon'"):
        theme_classes("moon")


@pytest.mark.parametrize("style", sprites.styles())
def test_every_class_can_be_drawn_in_every_style_and_size(style):
    for category, name in enumerate(NAMES):
        pictures = sprites.boxes(style)[category]
        assert pictures, name
        for number, (_, _, width, height) in enumerate(pictures):
            assert max(width, height) == 48
            for long_side in (2, 8, 19, 40):
                ratio = long_side / 48
                size = max(1, round(width * ratio)), max(1, round(height * ratio))
                colour, transparency, solid = sprites.sprite(style, category, number, *size)
                assert colour.shape == (size[1], size[0], 3)
                assert solid.sum() >= (4 if long_side >= 8 else 1), (name, number)
                assert (colour <= 255 * (1 - transparency) + 1).all(), "not premultiplied"


def test_pictures_of_a_class_differ_and_the_sheets_stay_small():
    assert sum(p.stat().st_size for p in sprites.SHEETS.iterdir()) < 1_000_000
    seen = Counter()
    for style in sprites.styles():
        for category, pictures in enumerate(sprites.boxes(style)):
            for number, box in enumerate(pictures):
                pixels = sprites.sprite(style, category, number, box[2], box[3]).colour
                seen[hashlib.sha256(pixels.tobytes()).hexdigest()] += 1
    assert max(seen.values()) == 1


def test_unknown_style():
    with pytest.raises(ValueError, match="unknown art style 'cubism'"):
        sprites.boxes("cubism")


def test_same_seed_same_bytes_in_two_processes():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST_PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1
    assert len(digests.pop()) == 65


def test_seed_split_and_index_each_change_the_scene():
    base = scene(TRAIN, 0, 0, "train")
    others = [
        scene(TRAIN, 1, 0, "train"),
        scene(TRAIN, 0, 1, "train"),
        scene(TRAIN, 0, 0, "natural"),
    ]
    for other in others:
        assert other.instances != base.instances
        assert not np.array_equal(render(other).image, render(base).image)


def test_pictures_do_not_depend_on_the_sprite_cache():
    numbers = range(30)
    sprites.clear_cache()
    alone = []
    for i in numbers:
        sprites.clear_cache()
        alone.append(render(scene(TRAIN, 3, i)).image)
    for i in reversed(range(200)):
        render(scene(TRAIN, 4, i))
    assert sprites.cache_info()["currsize"] > 200
    for i in reversed(numbers):
        np.testing.assert_array_equal(render(scene(TRAIN, 3, i)).image, alone[i])


def test_cached_sprites_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        sprites.sprite("noto", 0, 0, 10, 10).colour[:] = 0


@pytest.mark.parametrize("split", SPLITS)
def test_truth_is_what_the_class_map_shows(split):
    for i in range(300):
        truth = scene(SPLITS[split], 1, i, split)
        picture = render(truth)
        assert picture.image.shape == (80, 80, 3)
        assert picture.image.dtype == picture.class_map.dtype == np.uint8
        shown = {NAMES[c - 1] for c in np.unique(picture.class_map) if c}
        assert shown == truth.classes
        for number, instance in enumerate(truth.instances, start=1):
            y, x = np.nonzero(picture.instance_map == number)
            assert y.size >= 4
            assert x.min() >= instance.x
            assert x.max() < instance.x + instance.width
            assert y.min() >= instance.y
            assert y.max() < instance.y + instance.height
            assert (picture.class_map[y, x] == instance.category + 1).all()


def test_dropped_objects_leave_picture_and_truth(monkeypatch):
    before = [scene(TRAIN, 1, i) for i in range(200)]
    monkeypatch.setattr(scenes, "DROP_OVERLAP", 0.0)
    after = [scene(TRAIN, 1, i) for i in range(200)]
    lost = sum(len(b.classes - a.classes) for b, a in zip(before, after, strict=True))
    assert lost > 20
    for truth in after:
        assert {NAMES[c - 1] for c in np.unique(render(truth).class_map) if c} == truth.classes


def test_placement_rules():
    for i in range(400):
        truth = scene(TRAIN, 2, i)
        assert 1 <= len(truth.instances) <= 9
        areas = [a.width * a.height for a in truth.instances]
        assert areas == sorted(areas, reverse=True)
        for k, a in enumerate(truth.instances):
            low, high = {"big": (22, 34), "medium": (15, 24), "small": (8, 14)}[size_group(a.name)]
            assert low <= max(a.width, a.height) <= high
            assert a.x >= 0 <= a.y
            assert a.x + a.width <= 80 >= a.y + a.height
            assert a.name not in BIG or a.y >= 12
            for b in truth.instances[:k]:
                w = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
                h = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
                assert max(w, 0) * max(h, 0) <= 0.45 * a.width * a.height


def test_overlap_by_hand():
    # boxes 10 x 10 at (0, 0) and 4 x 20 at (8, 5): x 8..10, y 5..10 -> 10 pixels;
    # the second placed box shares 3 x 3 = 9 with it.
    placed = [
        scenes.Instance(0, 0, 0, 0, 10, 10, False),
        scenes.Instance(0, 0, 9, 22, 10, 10, False),
    ]
    assert scenes._largest_overlap(placed, 8, 5, 4, 20) == 10
    assert scenes._largest_overlap(placed, 20, 0, 5, 5) == 0


def _frequencies(config, split, count):
    """Included classes per theme before anything is dropped, and their instance counts."""
    found = {theme.name: Counter() for theme in THEMES}
    shown = Counter()
    copies = Counter()
    for i in range(count):
        truth = scene(config, 11, i, split)
        shown[truth.theme] += 1
        found[truth.theme].update(truth.classes)
        table = theme_classes(swapped(BY_NAME[truth.theme]).name if config.swap_themes
                              else truth.theme)  # fmt: skip
        copies.update(n for name, n in Counter(x.name for x in truth.instances).items()
                      if name in table)  # fmt: skip
        found[truth.theme]["outside"] += len(truth.classes - table)
    return shown, found, copies


@pytest.mark.parametrize(("split", "factor"), [("train", 1.0), ("counterfactual", 0.5)])
def test_empirical_frequencies(monkeypatch, split, factor):
    monkeypatch.setattr(scenes, "MAX_INSTANCES", 99)
    monkeypatch.setattr(scenes, "DROP_OVERLAP", math.inf)
    count = 6000
    config = SPLITS[split]
    shown, found, copies = _frequencies(config, split, count)
    for theme in THEMES:
        n = shown[theme.name]
        assert abs(n - count / 16) < 5 * math.sqrt(count / 16)
        # A scene without any class is drawn again, so frequencies are conditional on one.
        none = (1 - config.surprise) * math.prod(1 - p * factor for p in theme.classes.values())
        expected = {name: p * factor / (1 - none) for name, p in theme.classes.items()}
        expected["outside"] = config.surprise / (1 - none)
        for name, p in expected.items():
            error = abs(found[theme.name][name] / n - p) / math.sqrt(p * (1 - p) / n)
            assert error < 4.5, (theme.name, name, found[theme.name][name] / n, p)
    total = sum(copies.values())
    for k, p in ((1, 0.80), (2, 0.15), (3, 0.05)):
        assert abs(copies[k] / total - p) < 4.5 * math.sqrt(p * (1 - p) / total)


def test_means_agree_with_the_specification():
    drawn = [scene(TRAIN, 9, i) for i in range(3000)]
    assert np.mean([len(s.instances) for s in drawn]) == pytest.approx(5.8, abs=0.15)
    assert np.mean([len(s.classes) for s in drawn]) == pytest.approx(4.7, abs=0.1)
    styles = Counter(s.style for s in drawn)
    assert set(styles) == {"noto", "fluent_flat", "fluent_3d"}
    assert min(styles.values()) > 880


def test_swapped_split_shows_one_theme_and_holds_another():
    for i in range(300):
        truth = scene(SPLITS["swapped"], 0, i, "swapped")
        other = swapped(BY_NAME[truth.theme])
        assert len(truth.classes - set(other.classes)) <= 1
    own = [
        len(truth.classes & theme_classes(truth.theme)) / len(truth.classes)
        for truth in (scene(SPLITS["swapped"], 0, i, "swapped") for i in range(300))
    ]
    assert np.mean(own) < 0.25


def test_held_out_style_is_never_trained_on():
    held_out = {scene(SPLITS["heldout_style"], 0, i, "heldout_style").style for i in range(50)}
    assert held_out == {"twemoji"}
    assert "twemoji" not in TRAIN.styles


def test_flip_mirrors_an_object():
    config = dataclasses.replace(TRAIN, noise_sigma=0.0)
    truth = scene(config, 0, 0)
    car = next(i for i in truth.instances)
    x = (80 - car.width) // 2
    pictures = [
        render(dataclasses.replace(truth, instances=(car._replace(x=x, flip=flip),)))
        for flip in (False, True)
    ]
    part = slice(x, x + car.width)
    left, right = (p.class_map[:, part] for p in pictures)
    np.testing.assert_array_equal(left, right[:, ::-1])
    assert not np.array_equal(left, right)


def test_later_objects_cover_earlier_ones():
    truth = scene(TRAIN, 0, 0)
    first, second = (
        scenes.Instance(c, 0, 20, 20, 20, 20, False) for c in (NAMES.index("stop sign"), 2)
    )
    top = render(dataclasses.replace(truth, instances=(first, second)))
    assert top.class_map[30, 30] == 3
    under = render(dataclasses.replace(truth, instances=(second, first)))
    assert under.class_map[30, 30] == NAMES.index("stop sign") + 1


def test_background_and_clutter():
    config = dataclasses.replace(TRAIN, noise_sigma=0.0)
    upper, lower, without = [], [], 0
    for i in range(500):
        truth = scene(config, 0, i)
        image = render(dataclasses.replace(truth, instances=())).image.astype(float)
        rows = np.median(image, axis=1)  # clutter covers less than half of any row
        theme = BY_NAME[truth.theme]
        for channel, (top, bottom) in enumerate(zip(theme.upper, theme.lower, strict=True)):
            if 45 < min(top, bottom) and max(top, bottom) < 210:  # no clipping
                upper.append(rows[0, channel] - top)
                lower.append(rows[-1, channel] - bottom)
        cluttered = np.abs(image - rows[:, None]).max(axis=(1, 2)) > 0
        without += not cluttered.any()
        jump = np.abs(np.diff(rows, axis=0)).sum(axis=1)
        if np.sort(jump)[-2] < 5 < jump.max():
            assert abs((jump.argmax() + 1) / 80 - theme.horizon) <= 0.13
    assert len(upper) > 400
    # Jitter sigma 10 and a uniform tilt of 12: sqrt(10 ** 2 + 12 ** 2 / 3) = 12.2.
    for colours in (upper, lower):
        assert abs(np.mean(colours)) < 2
        assert np.std(colours) == pytest.approx(12.2, rel=0.1)
    assert np.corrcoef(upper, lower)[0, 1] == pytest.approx(-48 / 148, abs=0.15), "no tilt"
    assert without / 500 == pytest.approx(0.25, abs=0.07)


def test_size_scale_and_noise():
    large = WorldConfig(size=96, object_scale=0.5, noise_sigma=0.0)
    truth = scene(large, 0, 3)
    assert render(truth).image.shape == (96, 96, 3)
    assert max(max(i.width, i.height) for i in truth.instances) <= round(34 * 1.2 * 0.5)
    noisy = render(dataclasses.replace(truth, config=dataclasses.replace(large, noise_sigma=5.0)))
    difference = noisy.image.astype(float) - render(truth).image
    inner = np.abs(difference) < 100
    assert inner.all()
    assert difference.std() == pytest.approx(5.0, rel=0.1)
    grey = difference[(render(truth).image > 25).all(-1) & (render(truth).image < 230).all(-1)]
    assert np.abs(grey - grey.mean(-1, keepdims=True)).max() < 1.5, "noise is not grey"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 8}, "size = 8"),
        ({"styles": ()}, "styles = "),
        ({"styles": ("noto", "cubism")}, "cubism"),
        ({"inclusion_factor": 0.0}, "above 0"),
        ({"inclusion_factor": 1.1}, "inclusion_factor = 1.1"),
        ({"surprise": -0.1}, "surprise = -0.1"),
        ({"label_noise": float("nan")}, "label_noise = nan"),
        ({"noise_sigma": -1.0}, "noise_sigma"),
        ({"object_scale": 0.0}, "above 0"),
        ({"object_scale": 2.0}, "object_scale = 2.0"),
    ],
)
def test_configuration_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**arguments)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_seed_or_index(seed, index):
    with pytest.raises(ValueError, match="neither may be negative"):
        scene(TRAIN, seed, index)


def test_truth_has_not_drifted():
    """The shipped model was trained on these scenes; a change here needs a new model."""
    digest = hashlib.sha256()
    for split, config in SPLITS.items():
        for index in range(20):
            truth = scene(config, 0, index, split)
            digest.update(repr((truth.theme, truth.style, truth.instances)).encode())
    assert digest.hexdigest()[:16] == "a247bbc1cce7669e"
