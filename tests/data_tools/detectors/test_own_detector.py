"""The documentation's detector, run as its reader would, beside a stand-in for ultralytics."""

from __future__ import annotations

import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from data_tools.detectors import parse_detector
from mmlm.errors import InputError

PAGE = Path(__file__).parents[3] / "docs" / "data.md"


class FakeYolo:
    """Finds a dog and a table wherever it looks."""

    names = {0: "person", 16: "dog", 60: "dining table"}

    def __init__(self, weights):
        self.weights = weights

    def predict(self, image, conf, verbose):
        assert not verbose
        rows = [[1.0, 2.0, 9.0, 8.0, 0.9, 16.0], [0.0, 0.0, 5.0, 5.0, 0.4, 60.0]]
        rows = torch.tensor([row for row in rows if row[4] > conf])
        boxes = types.SimpleNamespace(xyxy=rows[:, :4], conf=rows[:, 4], cls=rows[:, 5])
        return [types.SimpleNamespace(boxes=boxes)]


@pytest.fixture
def documented(tmp_path, monkeypatch):
    text = PAGE.read_text(encoding="utf-8")
    start = text.index('    """my_detectors.py"""')
    code = textwrap.dedent(text[start : text.index("    PYTHONPATH=.", start)])
    (tmp_path / "my_detectors.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_detectors", raising=False)
    monkeypatch.setitem(sys.modules, "ultralytics", types.SimpleNamespace(YOLO=FakeYolo))
    yield
    sys.modules.pop("my_detectors", None)


@pytest.mark.usefixtures("documented")
def test_a_closed_detector_of_the_user_s(make_picture):
    detector = parse_detector("my_detectors.Yolo(confidence=0.3)")
    detector.load()
    found = detector.detect(make_picture(), ["puppy", "table", "man", "counter"])
    assert found["puppy"].boxes[0].label == "dog"
    assert found["table"].accepted
    assert not found["man"].accepted
    assert found["counter"] is None
    assert detector.facts["confidence"] == 0.3
    stricter = parse_detector("my_detectors.Yolo(confidence=0.5)")
    assert not stricter.detect(make_picture(), ["table"])["table"].accepted


def test_a_detector_that_is_not_there():
    with pytest.raises(InputError, match="cannot be imported"):
        parse_detector("my_detectors.Absent()")
    with pytest.raises(InputError, match="There is no detector 'YOLO'"):
        parse_detector("YOLO()")
