"""The detector of other tests: its failures come when they are scripted."""

from __future__ import annotations

import pytest
import torch

from data_tools.detectors.scripted import ScriptedDetector


def test_failures_on_command(make_picture):
    picture = make_picture()
    with pytest.raises(RuntimeError, match=f"scripted failure on {picture.id}"):
        ScriptedDetector({}, fail_on={picture.id}).detect(picture, ["dog"])
    small = ScriptedDetector({picture.id: ["dog"]}, memory={picture.id: 2})
    with pytest.raises(torch.OutOfMemoryError, match="3 names do not fit"):
        small.detect(picture, ["dog", "cat", "bus"])
    assert small.detect(picture, ["dog", "cat"])["dog"].accepted
    assert [len(names) for _, names in small.calls] == [3, 2]


def test_an_unknown_picture_holds_nothing(make_picture):
    found = ScriptedDetector({}).detect(make_picture(), ["dog"])
    assert not found["dog"].accepted
