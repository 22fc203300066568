"""Findings on the disk: asked once, kept apart by settings, safe from damage."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from data_tools.detectors import Box
from data_tools.detectors.cache import CachedDetector
from data_tools.detectors.scripted import ScriptedDetector
from data_tools.pictures import Picture
from mmlm.errors import InputError

NAMES = ("cat", "dog", "bus", "dining table")


def scripted(picture, **options):
    return ScriptedDetector({picture.id: [Box(1, 2, 3, 4.5, 0.25, "cat"), "dog"]}, **options)


def cached(detector, folder):
    made = CachedDetector(detector, folder)
    made.load()
    return made


def lines_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.jsonl"))


def test_only_new_names_are_asked(make_picture, tmp_path):
    picture = make_picture()
    inner = scripted(picture)
    detector = cached(inner, tmp_path)
    expected = scripted(picture).detect(picture, NAMES)
    detector.detect(picture, NAMES[:2])
    assert detector.detect(picture, NAMES) == expected
    assert [names for _, names in inner.calls] == [NAMES[:2], NAMES[2:]]
    fresh = scripted(picture)
    assert cached(fresh, tmp_path).detect(picture, NAMES[::-1]) == expected
    assert fresh.calls == []


def test_a_picture_is_known_by_its_bytes(make_picture, tmp_path):
    picture = make_picture()
    cached(scripted(picture), tmp_path).detect(picture, NAMES)
    inner = scripted(picture)
    renamed = Picture("another id", picture.path, picture.image, picture.sha256)
    assert cached(inner, tmp_path).detect(renamed, ["cat"])["cat"].accepted
    assert inner.calls == []
    cached(inner, tmp_path).detect(make_picture(seed=1), ["cat"])
    assert len(inner.calls) == 1


def test_other_settings_are_another_cache(make_picture, tmp_path):
    picture = make_picture()
    cached(scripted(picture), tmp_path).detect(picture, NAMES)
    other = scripted(picture, substring_match=True)
    cached(other, tmp_path).detect(picture, NAMES)
    assert len(other.calls) == 1
    facts = [json.loads(path.read_text()) for path in tmp_path.glob("*/facts.json")]
    assert sorted(one["substring_match"] for one in facts) == [False, True]


def test_outside_the_vocabulary_is_kept_too(make_picture, tmp_path):
    picture = make_picture()
    closed = scripted(picture, vocabulary=frozenset({"cat"}))
    assert cached(closed, tmp_path).detect(picture, ["bus"]) == {"bus": None}
    assert cached(closed, tmp_path).detect(picture, ["bus"]) == {"bus": None}
    assert len(closed.calls) == 1


def test_a_failure_is_not_kept(make_picture, tmp_path):
    picture = make_picture()
    with pytest.raises(RuntimeError, match="scripted failure"):
        cached(scripted(picture, fail_on=[picture.id]), tmp_path).detect(picture, NAMES)
    assert lines_of(tmp_path) == []


GOOD = {"accepted": True, "score": 0.5, "boxes": []}
BOX = {"left": 0, "top": 0, "right": 1, "bottom": 1, "score": 0.5, "label": "cat"}
DAMAGED = {
    "cut": '{"cat": {"accepted": tr',
    "no object": "[1, 2]",
    "no finding": '{"cat": 3}',
    "field missing": json.dumps({"cat": {"accepted": True}}),
    "no truth value": json.dumps({"cat": GOOD | {"accepted": "yes"}}),
    "no number": json.dumps({"cat": GOOD | {"score": "high"}}),
    "not finite": '{"cat": {"accepted": true, "score": NaN, "boxes": []}}',
    "huge": '{"cat": {"accepted": true, "score": 1' + "0" * 400 + ', "boxes": []}}',
    "half a box": json.dumps({"cat": GOOD | {"boxes": [{"left": 1}]}}),
    "box without a label": json.dumps({"cat": GOOD | {"boxes": [BOX | {"label": None}]}}),
}


@pytest.mark.parametrize("line", [*DAMAGED.values(), b"\xff\xfe\x00"], ids=[*DAMAGED, "binary"])
def test_damage_costs_its_line_and_nothing_else(line, make_picture, tmp_path):
    picture = make_picture()
    detector = cached(scripted(picture), tmp_path)
    detector.detect(picture, ["dog"])
    (path,) = lines_of(tmp_path)
    with path.open("ab") as stream:
        stream.write(line if isinstance(line, bytes) else line.encode())  # no end of line: cut off
    inner = scripted(picture)
    again = cached(inner, tmp_path)
    expected = scripted(picture).detect(picture, NAMES)
    assert again.detect(picture, NAMES) == expected
    assert [names for _, names in inner.calls] == [("cat", "bus", "dining table")]
    assert again.detect(picture, NAMES) == expected
    assert len(inner.calls) == 1


def _ask(folder: Path, picture: Picture, part: int) -> None:
    detector = cached(scripted(picture), folder)
    for number in range(40):
        detector.detect(picture, [f"thing {part} {number}", *NAMES])


def test_several_processes_may_write_at_once(make_picture, tmp_path):
    picture = make_picture()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_ask, args=(tmp_path, picture, part)) for part in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    inner = scripted(picture)
    names = [*NAMES, *(f"thing {part} {number}" for part in range(3) for number in range(40))]
    assert cached(inner, tmp_path).detect(picture, names) == scripted(picture).detect(
        picture, names
    )
    assert inner.calls == []


def test_a_folder_that_cannot_be_written(make_picture, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        cached(scripted(make_picture()), tmp_path / "file")
