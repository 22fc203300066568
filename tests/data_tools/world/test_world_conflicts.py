"""Conflict samples of the world: what they ask is true, and the donors differ in one class."""

import numpy as np
import pytest

from data_tools.world import NAMES, SPLITS, render, scene, vocabulary
from data_tools.world.conflicts import KINDS, TYPICAL, conflict, conflicts
from data_tools.world.scenes import DROP_OVERLAP, stream, with_object, without_class
from data_tools.world.themes import BY_NAME, swapped

FOUND = list(conflicts(KINDS, 3, 0, 60))


def asked(one):
    """The class that a yes/no question names."""
    (name,) = [n for n in NAMES if one.question.endswith((f" a {n} in the image ?",
                                                          f" an {n} in the image ?"))]  # fmt: skip
    return name


def test_all_kinds_come_in_both_directions():
    count = {kind: sum(one.kind == kind for one in FOUND) for kind in KINDS}
    assert min(count.values()) >= 30
    for kind in ("presence", "theme"):
        answers = [one.memory for one in FOUND if one.kind == kind]
        assert 0.25 < answers.count("yes") / len(answers) < 0.75


@pytest.mark.parametrize("kind", ["presence", "theme"])
def test_questions_are_true_and_the_donor_answers_the_other_way(kind):
    for one in (one for one in FOUND if one.kind == kind):
        name, expected = asked(one), BY_NAME[one.scene.theme].classes
        assert {one.image, one.memory} == {"yes", "no"}
        assert (one.image == "yes") == (name in one.scene.classes) != (name in one.donor.classes)
        assert one.scene.classes ^ one.donor.classes == {name}
        assert expected.get(name, 0) >= TYPICAL if one.memory == "yes" else name not in expected
        assert one.begun == one.neutral == ""


def test_captions_end_before_the_largest_unnamed_object():
    for one in (one for one in FOUND if one.kind == "caption"):
        (gone,) = one.scene.classes ^ one.donor.classes
        assert gone in one.scene.classes
        assert one.image == gone.split()[0] != one.memory
        present = {name.split()[0] for name in one.scene.classes}
        assert one.memory not in present
        likely = [n for n in BY_NAME[one.scene.theme].classes if n.split()[0] == one.memory]
        assert any(BY_NAME[one.scene.theme].classes[n] >= TYPICAL for n in likely)
        assert one.begun.split()[-1] == ("an" if gone[0] in "aeiou" else "a")
        assert f" {gone} " not in f" {one.begun} "
        assert len(one.begun.split()) == len(one.neutral.split())
        assert one.begun != one.neutral
        assert BY_NAME[one.scene.theme].word not in one.neutral
        words = (one.begun + " " + one.neutral + " " + one.question).split()
        assert set(words) <= set(vocabulary())


def test_flipped_themes_show_the_objects_of_another():
    for one in (one for one in FOUND if one.kind == "theme"):
        other = swapped(BY_NAME[one.scene.theme]).classes
        inside = [name in other for name in one.scene.classes]
        assert sum(inside) >= len(inside) - 1  # and at most one surprise


def test_samples_are_functions_of_their_number_and_no_scenes_of_a_split():
    assert conflict("presence", 3, 7) == conflict("presence", 3, 7)
    assert conflict("caption", 3, 7) != conflict("caption", 4, 7)
    scenes = {one.scene.instances for one in FOUND}
    for split, config in SPLITS.items():
        assert scenes.isdisjoint(scene(config, 3, i, split).instances for i in range(60))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'text'; kinds are presence, caption, theme"):
        conflict("text", 0, 0)


def test_with_object_adds_one_that_can_be_seen():
    truth = scene(SPLITS["natural"], 0, 5, "natural")
    name = next(n for n in NAMES if n not in truth.classes)
    more = with_object(truth, name, stream("natural", 0, 5, 9))
    (new,) = set(more.instances) - set(truth.instances)
    assert new.name == name
    assert set(truth.instances) < set(more.instances)
    areas = [i.width * i.height for i in more.instances]
    assert areas == sorted(areas, reverse=True)
    number = more.instances.index(new) + 1
    assert (render(more).instance_map == number).sum() > 0.2 * new.width * new.height
    before, after = render(truth).image.copy(), render(more).image.copy()
    for image in (before, after):
        image[new.y : new.y + new.height, new.x : new.x + new.width] = 0
    assert np.array_equal(before, after)  # nothing else moved


def test_with_object_gives_up_where_everything_is_covered(monkeypatch):
    truth = scene(SPLITS["natural"], 0, 5, "natural")
    monkeypatch.setattr("data_tools.world.scenes.DROP_OVERLAP", -1.0)
    assert with_object(truth, "couch", stream("natural", 0, 5, 9)) is None
    assert DROP_OVERLAP > 0


def test_without_class_takes_all_of_them():
    truth = next(
        s for i in range(99)
        if len((s := scene(SPLITS["natural"], 0, i, "natural")).instances) > len(s.classes)
    )  # fmt: skip
    names = [i.name for i in truth.instances]
    name = next(n for n in names if names.count(n) > 1)
    assert without_class(truth, name).classes == truth.classes - {name}
