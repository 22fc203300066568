"""What every detector keeps, whatever is behind it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_detectors import NAMES

from data_tools.detectors import DETECTORS, Box, parse_detector
from data_tools.detectors.cache import CachedDetector
from data_tools.detectors.groundingdino import GroundingDINO
from data_tools.detectors.huggingface import HFDetector
from data_tools.detectors.neural import NeuralDetector
from data_tools.detectors.scripted import ScriptedDetector
from data_tools.detectors.world import WorldTruth
from data_tools.pictures import Picture
from data_tools.world.export import write_split

ASKED = NAMES[:24]
NEURAL = ("groundingdino", "hf-grounding", "hf-owl")
KINDS = (*NEURAL, "world", "scripted", "scripted-closed")
SIZES = {"wide": (150, 40), "high": (30, 90), "row": (90, 1), "column": (1, 70), "dot": (1, 1)}
# Scaled to the models' sizes these would have no height, or no width, at all.
SIZES |= {"line": (300, 1), "thread": (1, 300)}


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_split(folder, "natural", 4, progress=False)
    return folder


@pytest.fixture(params=[*KINDS, *(f"cached {kind}" for kind in KINDS)])
def case(request, loaded, world_folder, make_picture, tmp_path):
    """A detector and a picture in which it finds something."""
    cached, kind = request.param.startswith("cached "), request.param.split()[-1]
    picture = make_picture()
    if kind == "world":
        picture = Picture.read("1", world_folder / "images" / "000001.png")
        detector = WorldTruth(false_alarms=0.3)
    elif kind.startswith("scripted"):
        boxes = [Box(1, 2, 30, 40, 0.7, "cat"), Box(0, 0, 5, 5, 0.9, "cat"), "dog", "pizza"]
        closed = frozenset(("cat", "dog", "bus")) if kind == "scripted-closed" else None
        detector = ScriptedDetector({picture.id: boxes}, vocabulary=closed)
    else:
        detector = loaded[kind]
    detector = CachedDetector(detector, tmp_path) if cached else detector
    detector.load()
    return detector, picture


def test_every_name_is_answered_once_in_the_order_of_the_question(case):
    detector, picture = case
    findings = detector.detect(picture, ASKED)
    assert list(findings) == list(ASKED)
    some = [finding for finding in findings.values() if finding is not None]
    assert any(finding.accepted for finding in some)
    assert not all(finding.accepted for finding in some)
    if detector.vocabulary is None:
        assert len(some) == len(ASKED)


def test_what_is_found_has_a_best_box_and_what_is_not_has_none(case):
    detector, picture = case
    for finding in filter(None, detector.detect(picture, ASKED).values()):
        scores = [box.score for box in finding.boxes]
        assert scores == sorted(scores, reverse=True)
        assert finding.score == (scores[0] if scores else None)
        assert finding.accepted or not finding.boxes


def test_boxes_lie_inside_the_picture(case):
    detector, picture = case
    boxes = [box for f in detector.detect(picture, ASKED).values() if f for box in f.boxes]
    assert boxes
    for box in boxes:
        assert 0 <= box.left < box.right <= picture.image.width
        assert 0 <= box.top < box.bottom <= picture.image.height
        assert 0 <= box.score <= 1
        assert box.label


def test_order_and_repetition_of_names_change_nothing(case):
    detector, picture = case
    findings = detector.detect(picture, ASKED)
    assert detector.detect(picture, ASKED) == findings
    assert detector.detect(picture, ASKED[::-1]) == findings
    assert detector.detect(picture, [*ASKED, *ASKED[:3]]) == findings


def test_no_names_cost_nothing(case):
    detector, picture = case
    before = _runs(detector)
    assert detector.detect(dataclasses.replace(picture, sha256="new"), []) == {}
    assert _runs(detector) == before


def test_facts_are_json_and_tell_settings_apart(case):
    detector, _ = case
    assert json.loads(json.dumps(detector.facts, allow_nan=False)) == detector.facts
    assert detector.name


def test_a_cache_changes_no_finding_and_no_fact(case, tmp_path):
    detector, picture = case
    cached = CachedDetector(detector, tmp_path / "more")
    cached.load()
    first = cached.detect(picture, ASKED[:9])
    assert cached.detect(picture, ASKED[:9]) == first == detector.detect(picture, ASKED[:9])
    assert (cached.name, cached.vocabulary) == (detector.name, detector.vocabulary)
    assert cached.facts == detector.facts


def _runs(detector) -> int:
    inner = getattr(detector, "inner", detector)
    return inner.engine.features.runs if isinstance(inner, NeuralDetector) else 0


# Detectors with weights.


@pytest.mark.parametrize("kind", NEURAL)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_of_any_shape_and_mode(kind, size, mode, loaded, make_picture):
    detector, picture = loaded[kind], make_picture(*size, mode=mode)
    findings = detector.detect(picture, ASKED)
    assert list(findings) == list(ASKED)
    for box in (box for finding in findings.values() for box in finding.boxes):
        assert 0 <= box.left < box.right <= size[0]
        assert 0 <= box.top < box.bottom <= size[1]


@pytest.mark.parametrize("kind", NEURAL)
def test_the_picture_is_encoded_once_whatever_is_asked(kind, loaded, make_picture):
    detector = dataclasses.replace(loaded[kind], box_threshold=0.3)  # so that none is empty
    first, second = make_picture(seed=11), make_picture(seed=12)
    before = detector.engine.features.runs
    expected = detector.detect(first, ASKED), detector.detect(second, ASKED)
    assert expected[0] != expected[1]
    assert detector.engine.features.runs == before + 2
    for _ in range(2):
        assert (detector.detect(first, ASKED), detector.detect(second, ASKED)) == expected
    detector.detect(first, ["clock"])
    assert detector.engine.features.runs == before + 2


@pytest.mark.parametrize("kind", NEURAL)
def test_features_of_the_longest_unused_picture_go_first(kind, loaded, make_picture):
    detector = dataclasses.replace(loaded[kind], pictures_kept=2)
    a, b, c = (make_picture(seed=seed) for seed in (21, 22, 23))
    for picture in (a, b, a, c, a):
        detector.detect(picture, ["dog"])
    assert detector.engine.features.runs == 3
    detector.detect(b, ["dog"])
    assert detector.engine.features.runs == 4


@pytest.mark.parametrize("kind", NEURAL)
def test_many_names_are_as_each_alone(kind, loaded, make_picture):
    detector = dataclasses.replace(loaded[kind], names_at_once=1)
    together = detector.detect(make_picture(), ASKED)
    for name in ASKED:
        alone = detector.detect(make_picture(), [name])[name]
        assert alone.accepted == together[name].accepted
        assert alone.score == pytest.approx(together[name].score, abs=1e-4)
        assert len(alone.boxes) == len(together[name].boxes)


def test_captions_of_one_pass_do_not_touch_each_other(loaded, make_picture):
    detector = loaded["hf-grounding"]
    one = dataclasses.replace(detector, captions_at_once=1).detect(make_picture(), ASKED)
    all_ = dataclasses.replace(detector, captions_at_once=50).detect(make_picture(), ASKED)
    for name in ASKED:
        assert one[name].accepted == all_[name].accepted
        assert one[name].score == pytest.approx(all_[name].score, abs=1e-4)


@pytest.mark.parametrize("kind", NEURAL)
def test_reduced_precision_gives_the_same_kind_of_answer(kind, loaded, make_picture):
    detector = dataclasses.replace(loaded[kind], dtype="bfloat16")
    findings = detector.detect(make_picture(), ASKED)
    assert list(findings) == list(ASKED)
    assert detector.facts != loaded[kind].facts


@pytest.mark.parametrize("kind", NEURAL)
def test_a_name_that_cannot_be_read_is_outside_the_vocabulary(kind, loaded, make_picture):
    long = "dog " * 40
    findings = loaded[kind].detect(make_picture(), [long, "dog"])
    assert findings[long] is None
    assert findings["dog"] is not None


@pytest.mark.parametrize("kind", NEURAL)
@pytest.mark.parametrize("error", ["OutOfMemoryError", "RuntimeError"])
def test_a_failure_of_the_device_is_passed_on_and_leaves_nothing(
    kind, error, loaded, make_picture, monkeypatch
):
    import torch

    raised = torch.OutOfMemoryError if error == "OutOfMemoryError" else RuntimeError
    detector = dataclasses.replace(loaded[kind])
    features = detector.engine.features
    encode = features._encode

    def full(*_, **__):
        raise raised("no room")

    monkeypatch.setattr(features, "_encode", full)
    with pytest.raises(raised, match="no room"):
        detector.detect(make_picture(), ["dog"])
    monkeypatch.setattr(features, "_encode", encode)
    assert detector.detect(make_picture(), ["dog"]) == loaded[kind].detect(make_picture(), ["dog"])


# Text forms.

FORMS = {
    "GroundingDINO": GroundingDINO(checkpoint="a.pth", text_threshold=0.2, names_at_once=1),
    "HFDetector": HFDetector(model="folder", prompt="{} here"),
    "WorldTruth": WorldTruth(misses=0.05, seed=3),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_text_form_round_trip(name):
    detector = FORMS[name]
    again = parse_detector(repr(detector))
    assert again == detector
    assert repr(again) == repr(detector)


@pytest.mark.parametrize("field", ["box_threshold", "text_threshold"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 35.0, float("nan")])
@pytest.mark.parametrize("name", ["GroundingDINO", "HFDetector"])
def test_failure_6_thresholds_outside_0_and_1(name, field, value):
    with pytest.raises(ValueError, match=f"{field} must be between 0 and 1"):
        dataclasses.replace(FORMS[name], **{field: value})


@pytest.mark.parametrize("name", ["GroundingDINO", "HFDetector"])
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float8", "dtype must be one of float32, bfloat16, float16"),
        ("names_at_once", 0, "names_at_once must be at least 1"),
        ("pictures_kept", 0, "pictures_kept must be at least 1"),
        ("max_text_tokens", 255, "max_text_tokens must be at most 254"),
    ],
)
def test_other_settings_are_checked_too(name, field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FORMS[name], **{field: value})
