"""What is known to be in a picture, from the world, from files, from detectors."""

import json

import pytest

from data_tools.detectors.scripted import ScriptedDetector
from data_tools.world.export import write_split
from mmlm.errors import InputError
from mmlm.show.truth import by_detector, draw_scene, of_file


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_split(folder, "natural", 4, 3, progress=False)
    return folder


def test_a_drawn_scene_knows_its_objects_and_is_the_exported_one(split):
    drawn = draw_scene("natural", seed=3, index=2)
    assert drawn.image.size == (80, 80)
    assert drawn.known.objects == drawn.scene.classes
    assert drawn.known.asked is None
    assert of_file(split / "images" / "000003.png").objects == drawn.known.objects
    assert draw_scene("natural", 3, 1).known != drawn.known or (
        draw_scene("natural", 3, 1).image.tobytes() != drawn.image.tobytes()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("no",), "no split 'no'"), (("natural", -1), "seed is -1"), (("natural", 0, -2), "index")],
)
def test_impossible_scenes_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        draw_scene(*arguments)


def test_given_annotations_come_first(split, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "000001.png"}],
                "categories": [{"id": 18, "name": "dog"}],
                "annotations": [{"id": 1, "image_id": 1, "category_id": 18}],
            }
        )
    )
    assert of_file(split / "images" / "000001.png", path).objects == {"dog"}
    with pytest.raises(InputError, match="has no picture with the file name"):
        of_file(split / "images" / "000002.png", path)


def test_coco_pictures_are_known_by_name_and_others_are_not(tmp_path):
    known = of_file("anywhere/COCO_val2014_000000000042.jpg")
    assert known.source == "COCO val2014"
    assert "dog" in known.objects
    assert of_file(tmp_path / "images" / "holiday.jpg") is None
    assert of_file("COCO_val2014_999999999999.jpg") is None


def test_a_detector_is_asked_about_named_objects_only(split):
    path = split / "images" / "000001.png"
    detector = ScriptedDetector(findings={str(path): ["dog"]})
    known = by_detector(detector, path, "a puppy , a dog and a boat")
    assert detector.calls == [(str(path), ("dog", "boat"))]
    assert (known.objects, known.asked) == ({"dog"}, {"dog", "boat"})
    assert by_detector(detector, path, "nothing").asked == frozenset()
    assert len(detector.calls) == 1
    closed = ScriptedDetector(findings={str(path): ["dog"]}, vocabulary=frozenset({"dog"}))
    assert by_detector(closed, path, "a dog and a boat").asked == {"dog"}
