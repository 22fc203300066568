"""Held-out pictures for trainings: the embedded world, and any folder in COCO format."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from mmlm.cli.held_out import ChairHeldOut
from mmlm.cli.pictures import COCO_PROMPT, WORLD_PROMPT, DataOptions
from mmlm.errors import InputError
from mmlm.runner import Request
from training.tracking import HeldOut


@pytest.fixture
def coco(tmp_path):
    """Three pictures: a dog, a dog and a cat, nothing."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = ["dog", "cat", "car"]
    objects = {1: [1], 2: [1, 2], 3: []}
    for number in objects:
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    instances = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in objects],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
        "annotations": [
            {"image_id": n, "category_id": c} for n, classes in objects.items() for c in classes
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(instances))
    return DataOptions(images=folder, annotations=path)


def test_a_folder_in_coco_format_is_asked_about(coco):
    held: HeldOut = ChairHeldOut(coco)
    requests = held.requests()
    assert [request.id for request in requests] == ["1", "2", "3"]
    assert all(isinstance(request, Request) for request in requests)
    assert requests[1].images == (coco.images / "2.png",)
    assert {request.prompt for request in requests} == {COCO_PROMPT}
    assert ChairHeldOut(coco, prompt="what ?").requests()[0].prompt == "what ?"


def test_captions_are_scored_by_hand_counted_numbers(coco):
    """Mentions: dog, dog, car, dog (invented), cat (invented); true objects: 1 + 2 + 0."""
    captions = {"1": "a dog .", "2": "a dog and a car .", "3": "a dog and a cat ."}
    scores = ChairHeldOut(coco).score(captions)
    assert scores == {
        "chair_i": pytest.approx(3 / 5),
        "chair_s": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "mean_length": 5,  # as CHAIR reads them: a full stop is a word
    }


def test_an_answer_that_is_missing_counts_neither_way(coco):
    assert ChairHeldOut(coco).score({"1": "a dog ."})["recall"] == 1


def test_numbers_that_are_undefined_are_left_out(coco):
    assert "chair_i" not in ChairHeldOut(coco).score({"1": "a picture ."})


def test_without_any_caption_there_is_no_score(coco):
    with pytest.raises(InputError, match="no caption"):
        ChairHeldOut(coco).score({})


def test_pictures_that_are_missing_are_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        ChairHeldOut(DataOptions(images=tmp_path / "none", annotations=tmp_path / "a.json"))


def test_the_embedded_world_is_drawn_once_and_only_when_asked(tmp_path):
    folder = tmp_path / "world"
    held = ChairHeldOut(DataOptions(count=3, split="counterfactual", seed=5), folder=folder)
    assert not folder.exists()
    requests = held.requests()
    assert {request.prompt for request in requests} == {WORLD_PROMPT}
    assert len(requests) == 3
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(before) == 3
    again = ChairHeldOut(DataOptions(count=3, split="counterfactual", seed=5), folder=folder)
    assert again.requests() == requests
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before


def test_true_captions_of_the_world_score_perfectly(tmp_path):
    held = ChairHeldOut(DataOptions(count=3), folder=tmp_path)
    [instances] = [r.images[0].parents[1] / "instances.json" for r in held.requests()[:1]]
    data = json.loads(instances.read_text())
    names = {entry["id"]: entry["name"] for entry in data["categories"]}
    seen = {str(image["id"]): set() for image in data["images"]}
    for one in data["annotations"]:
        seen[str(one["image_id"])].add(names[one["category_id"]])
    scores = held.score({n: "there is a " + " and a ".join(sorted(o)) for n, o in seen.items()})
    assert (scores["chair_i"], scores["chair_s"], scores["recall"]) == (0, 0, 1)
