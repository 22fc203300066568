"""The world's truth as a detector: exact, wrong at the rates that were asked, refused elsewhere."""

from __future__ import annotations

import json
import shutil

import pytest

from data_tools.detectors.world import WorldTruth
from data_tools.pictures import Picture
from data_tools.world import NAMES, SPLITS, scene, theme_classes
from data_tools.world.export import file_name, write_split
from mmlm.errors import InputError

COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("world")
    write_split(made, "natural", COUNT, seed=5, progress=False)
    return made


@pytest.fixture(scope="module")
def pictures(folder):
    paths = [folder / "images" / file_name(index) for index in range(COUNT)]
    return [Picture.read(path.stem, path) for path in paths]


def truth_of(index):
    return scene(SPLITS["natural"], seed=5, index=index, split="natural")


def seen(detector, picture):
    return {name for name, one in detector.detect(picture, NAMES).items() if one.accepted}


def test_without_errors_it_is_the_truth(pictures):
    for index, picture in enumerate(pictures):
        truth = truth_of(index)
        findings = WorldTruth().detect(picture, NAMES)
        assert {name for name, one in findings.items() if one.accepted} == truth.classes
        boxes = {
            (box.left, box.top, box.right - box.left, box.bottom - box.top)
            for one in findings.values()
            for box in one.boxes
        }
        assert boxes == {instance.box for instance in truth.instances}


def test_words_for_an_object_and_words_for_none(pictures):
    picture = next(p for i, p in enumerate(pictures) if "person" in truth_of(i).classes)
    found = WorldTruth().detect(picture, ["man", "person", "kitchen", "orange", "unicorn"])
    assert found["man"] == found["person"]
    assert found["man"].accepted
    assert found["kitchen"] is None
    assert found["unicorn"] is None
    assert found["orange"] is not None
    assert WorldTruth().vocabulary == set(NAMES)


def test_errors_come_at_their_rates_and_differ_between_seeds(pictures):
    detectors = [WorldTruth(misses=0.3, false_alarms=0.1, seed=seed) for seed in (0, 1)]
    missed = invented = present = absent = differ = 0
    for index, picture in enumerate(pictures):
        truth = truth_of(index).classes
        first, second = (seen(detector, picture) for detector in detectors)
        missed += len(truth - first)
        invented += len(first - truth)
        present += len(truth)
        absent += len(NAMES) - len(truth)
        differ += len(first ^ second)
    # Three standard deviations of a binomial count.
    assert abs(missed / present - 0.3) < 3 * (0.3 * 0.7 / present) ** 0.5
    assert abs(invented / absent - 0.1) < 3 * (0.1 * 0.9 / absent) ** 0.5
    # Independent errors: each pair disagrees with probability 2 p (1 - p).
    expected = present * 2 * 0.3 * 0.7 + absent * 2 * 0.1 * 0.9
    assert abs(differ - expected) < 4 * expected**0.5


def test_errors_depend_on_the_picture_and_the_object_alone(pictures):
    detector = WorldTruth(misses=0.3, false_alarms=0.1, seed=7)
    every = detector.detect(pictures[0], NAMES)
    for name in NAMES:
        assert detector.detect(pictures[0], [name])[name] == every[name]
    more = WorldTruth(misses=0.5, false_alarms=0.3, seed=7)
    for index, picture in enumerate(pictures):
        truth = truth_of(index).classes
        assert truth & seen(more, picture) <= truth & seen(detector, picture)
        assert seen(detector, picture) - truth <= seen(more, picture) - truth


def test_certain_errors(pictures):
    for index, picture in enumerate(pictures[:5]):
        truth = truth_of(index).classes
        assert seen(WorldTruth(misses=1.0), picture) == set()
        assert seen(WorldTruth(false_alarms=1.0), picture) == set(NAMES)
        typical = seen(WorldTruth(false_alarms=1.0, typical_only=True), picture)
        assert typical == truth | theme_classes(truth_of(index).theme)


def test_invented_boxes_lie_in_the_picture(pictures):
    for finding in WorldTruth(false_alarms=1.0).detect(pictures[0], NAMES).values():
        for box in finding.boxes:
            assert 0 <= box.left < box.right <= pictures[0].image.width
            assert 0 <= box.top < box.bottom <= pictures[0].image.height


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("misses", 1.5, "misses must be within 0 and 1, got 1.5"),
        ("misses", float("nan"), "misses must be within 0 and 1"),
        ("false_alarms", -0.1, "false_alarms must be within 0 and 1, got -0.1"),
        ("seed", -1, "seed must not be negative"),
    ],
)
def test_impossible_settings(field, value, message):
    with pytest.raises(ValueError, match=message):
        WorldTruth(**{field: value})


def test_names_and_facts_tell_two_of_them_apart():
    assert WorldTruth().name == "WorldTruth"
    noisy = WorldTruth(misses=0.1), WorldTruth(misses=0.1, seed=1)
    assert noisy[0].name != noisy[1].name
    assert noisy[0].facts != noisy[1].facts


def test_a_picture_of_no_world(make_picture):
    with pytest.raises(InputError, match="holds no world") as error:
        WorldTruth().detect(make_picture(), ["dog"])
    assert "mmlm data world" in error.value.advice


def test_a_strange_picture_in_a_world(folder, tmp_path, make_picture):
    world = tmp_path / "world"
    shutil.copytree(folder, world)
    other = world / "images" / "other.png"
    shutil.copy(make_picture().path, other)
    with pytest.raises(InputError, match=r"other\.png' is not one of the world"):
        WorldTruth().detect(Picture.read("x", other), ["dog"])
    shutil.copy(other, world / "images" / file_name(0))
    with pytest.raises(InputError, match="has not the size"):
        WorldTruth().detect(Picture.read("x", world / "images" / file_name(0)), ["dog"])


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"categories": [], "images": [{}]})])
def test_a_damaged_world(folder, tmp_path, content):
    world = tmp_path / "world"
    shutil.copytree(folder, world)
    (world / "instances.json").write_text(content)
    with pytest.raises(InputError, match="is damaged"):
        WorldTruth().detect(Picture.read("x", world / "images" / file_name(0)), ["dog"])
