"""Labels against names: by hand, and as SENTINEL's authors matched them."""

from __future__ import annotations

import json

import pytest
from golden import golden

from data_tools.detectors import Box
from data_tools.detectors.matching import class_of, classes_to_findings, labels_to_findings


def accepted(names, labels, **options):
    return [
        n for n, found in labels_to_findings(names, labels, **options).items() if found.accepted
    ]


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["car"], ["carrot"], []),
        (["car"], ["a red car"], ["car"]),
        (["car"], ["cars"], ["car"]),
        (["knives"], ["knife"], ["knives"]),
        (["dog", "hot dog"], ["hot dog"], ["hot dog"]),
        (["dog"], ["hot dog"], ["dog"]),
        (["dog", "hot dog"], ["hot dog dog"], ["dog", "hot dog"]),
        (["traffic", "traffic light"], ["traffic light"], ["traffic light"]),
        (["dining table"], ["table"], []),
        (["table", "dining table"], ["dining", "table"], ["table"]),
        (["t-shirt"], ["t - shirt"], ["t-shirt"]),
        (["man"], ["woman"], []),
        (["dog"], ["puppy"], []),
        (["dog"], ["", "  ", "."], []),
        ([], ["dog"], []),
    ],
)
def test_whole_phrases_in_dictionary_form(names, labels, expected):
    assert accepted(names, labels) == expected


@pytest.mark.parametrize(
    ("name", "label", "expected"),
    [("car", "carrot", True), ("man", "woman", True), ("cars", "car", False), ("dog", "dog", True)],
)
def test_substring_rule_of_the_authors(name, label, expected):
    assert bool(accepted([name], [label], substring=True)) is expected


def test_boxes_come_best_first_and_each_once():
    boxes = [
        Box(0, 0, 1, 1, 0.4, "dog dog"),
        Box(0, 0, 2, 2, 0.9, "dog"),
        Box(0, 0, 3, 3, 1, "cat"),
    ]
    found = labels_to_findings(["dog", "bus"], boxes)
    assert found["dog"].boxes == (boxes[1], boxes[0])
    assert found["dog"].score == 0.9
    assert found["bus"].score is None


def test_classes_are_found_by_their_words():
    vocabulary = {"dining table", "dog", "person", "orange"}
    found = classes_to_findings(
        ["table", "puppy", "dog", "man", "orange", "counter"],
        ["dining table", Box(0, 0, 1, 1, 0.5, "dog")],
        vocabulary,
    )
    assert {name: one and one.accepted for name, one in found.items()} == {
        "table": True,
        "puppy": True,
        "dog": True,
        "man": False,
        "orange": False,
        "counter": None,
    }
    assert found["puppy"].score == 0.5
    assert class_of("counter", vocabulary) is None


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("sentinel*/cases*.json"))
def test_golden_scenes(path):
    """Every name a scene's detectors were asked ends in the authors' sets."""
    cases = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = frozenset(cases["yolo_vocabulary"])
    asked = 0
    for scene in cases["scenes"]:
        for step in scene["steps"]:
            names = step["dino_queried"]
            asked += len(names)
            dino = labels_to_findings(names, scene["dino_labels"], substring=True)
            yolo = classes_to_findings(names, scene["yolo_labels_detected"], vocabulary)
            for name in names:
                # The authors count what YOLO does not know as accepted.
                votes = {dino[name].accepted, (one := yolo[name]) is None or one.accepted}
                label = "uncertain" if len(votes) == 2 else "factual"
                label = "hallucinated" if votes == {False} else label
                assert name in step["state_after"][label]
    assert asked
