"""Swapping one object of a scene: pixels, truth, who is swapped for whom, and what is refused."""

import dataclasses
import itertools

import numpy as np
import pytest

from data_tools.world import NAMES, SPLITS, render, scene, swapping, theme_classes
from data_tools.world.categories import size_group
from data_tools.world.swapping import (
    Replacement,
    SwapQuestion,
    draw_swaps,
    painted,
    swap,
    swap_questions,
    truth_of,
)


def truths(count=12, split="natural"):
    return [scene(SPLITS[split], 3, index, split) for index in range(count)]


def every_swap(scenes):
    for truth in scenes:
        for question in swap_questions(truth):
            for kind in ("object", "attribute"):
                for one in draw_swaps(truth, question, kind).swaps:
                    yield truth, question, kind, one


def test_probes_acceptance_12_pixels_outside_the_two_masks_are_equal():
    seen = 0
    for truth in truths(6):
        before = render(truth)
        for _, question, kind, one in every_swap([truth]):
            after = render(one.scene)
            under = painted(truth, one.instance) | painted(one.scene, one.instance)
            assert np.array_equal(before.image[~under], after.image[~under])
            if kind == "object":
                assert (before.image != after.image).any()
            for i in truth.instances:  # what the question is about is the same, bit for bit
                if i.name in question.subjects:
                    box = np.s_[i.y : i.y + i.height, i.x : i.x + i.width]
                    assert np.array_equal(before.image[box], after.image[box])
                if i.name not in (*one.touched, one.old):
                    box = np.s_[i.y : i.y + i.height, i.x : i.x + i.width]
                    assert np.array_equal(before.image[box], after.image[box])
            seen += 1
    assert seen > 300


def test_probes_acceptance_12_the_truth_is_unchanged():
    cases = itertools.islice(every_swap(truths(40)), 0, 5000, 10)
    checked = 0
    for truth, question, _, one in cases:
        if question.kind != "caption":
            assert truth_of(one.scene, question) == truth_of(truth, question)
        checked += 1
    assert checked == 500


def test_probes_acceptance_12_the_swapped_object_is_the_only_change():
    for truth, _, kind, one in every_swap(truths(4)):
        assert dataclasses.replace(one.scene, instances=truth.instances) == truth
        changed = [
            number
            for number, (a, b) in enumerate(zip(truth.instances, one.scene.instances, strict=True))
            if a != b
        ]
        assert changed == [one.instance]
        old, new = truth.instances[one.instance], one.scene.instances[one.instance]
        assert (old.name, new.name) == (one.old, one.new)
        assert (old.name != new.name) == (kind == "object")
        if kind == "object":
            assert max(old.width, old.height) == max(new.width, new.height)
        inside = (new.x >= 0, new.y >= 0, new.x + new.width <= 80, new.y + new.height <= 80)
        assert all(inside)


def test_new_classes_are_new_of_the_size_and_half_of_the_theme():
    for truth, question, kind, one in every_swap(truths(8)):
        if kind == "attribute":
            assert one.near is None
            continue
        assert one.new not in truth.classes | set(question.subjects)
        assert size_group(one.new) == size_group(one.old)
        assert one.near == (one.new in theme_classes(truth.theme))
    truth = truths(1)[0]
    question = swap_questions(truth)[-1]
    drawn = draw_swaps(truth, question, "object", 5).swaps
    for number in range(len(truth.instances)):
        mine = [one for one in drawn if one.instance == number]
        assert len({one.new for one in mine}) == len(mine)  # each class once
        assert sum(one.near for one in mine) <= 3
        assert sum(not one.near for one in mine) == 2
    assert draw_swaps(truth, question, "object", 5) == draw_swaps(truth, question, "object", 5)
    assert len(draw_swaps(truth, question, "object", 1).swaps) <= len(truth.instances)


def test_looks_are_another_picture_mirrored_larger_or_smaller():
    seen = set()
    for truth, _, kind, one in every_swap(truths(10)):
        if kind == "object":
            continue
        old, new = truth.instances[one.instance], one.scene.instances[one.instance]
        sides = max(new.width, new.height) / max(old.width, old.height)
        change = (old.picture != new.picture, old.flip != new.flip, round(4 * sides) / 4)
        assert sum((change[0], change[1], change[2] != 1)) == 1
        seen.add(change)
    assert seen == {
        (True, False, 1.0),
        (False, True, 1.0),
        (False, False, 1.25),
        (False, False, 0.75),
    }


def test_questions_have_their_answers_and_their_kinds():
    kinds = set()
    for truth in truths(30):
        names = [i.name for i in truth.instances]
        for question in swap_questions(truth):
            kinds.add(question.kind)
            answer = truth_of(truth, question)
            assert all(subject in question.text for subject in question.subjects[:1]) or (
                question.kind == "count"
            )
            if question.kind == "existence":
                assert answer == ("yes" if question.subjects[0] in names else "no")
            if question.kind == "count":
                count = names.count(question.subjects[0])
                assert answer == ("zero", "one", "two", "three")[count]
        asked = [truth_of(truth, q) for q in swap_questions(truth) if q.kind == "existence"]
        assert asked == ["yes", "no"]
        assert swap_questions(truth) == swap_questions(truth)
    assert kinds == {"existence", "count", "relation", "caption"}


def test_absent_classes_that_are_asked_for_belong_to_the_theme():
    for truth in truths(30):
        (name,) = swap_questions(truth)[1].subjects
        belong = set(theme_classes(truth.theme)) - truth.classes
        assert name in (belong or set(NAMES) - truth.classes)


def test_scenes_have_draws_of_their_own():
    places = {}
    for truth in truths(30):
        present = sorted(truth.classes, key=NAMES.index)
        (name,) = swap_questions(truth)[0].subjects
        places.setdefault(len(present), set()).add(present.index(name))
    assert max(map(len, places.values())) > 1


def test_objects_that_cannot_be_exchanged_cleanly_are_skipped_and_counted():
    skipped = 0
    for truth in truths(20):
        for question in swap_questions(truth):
            drawn = draw_swaps(truth, question, "object")
            skipped += drawn.skipped
            if question.kind == "caption":
                assert drawn.skipped == 0
    assert skipped > 20


def test_noise_and_clutter_change_alone():
    differing = 0
    for truth in truths(8):
        base = render(truth)
        noise, clutter = render(truth, noise=1), render(truth, clutter=1)
        for other in (noise, clutter):
            assert np.array_equal(base.instance_map, other.instance_map)
        assert (base.image != noise.image).mean() > 0.5
        # Noise has a standard deviation of 5; two of them differ by 7.
        difference = base.image.astype(int) - noise.image.astype(int)
        assert 4 < difference.std() < 10
        assert not np.array_equal(render(truth, noise=2).image, noise.image)
        # An opaque object hides whatever lies behind it.
        assert (base.image != clutter.image).mean() < 0.3
        differing += (base.image != clutter.image).any()
    assert differing > 4


def test_error_a_swap_that_changes_the_truth(monkeypatch):
    truth = next(t for t in truths(20) if len(t.classes) > 2)
    question = swap_questions(truth)[1]  # about an absent class
    absent = NAMES.index(question.subjects[0])

    def wrong(rng, scene, question, number, count):
        yield Replacement(absent, 0, False), True

    monkeypatch.setattr(swapping, "_other_classes", wrong)
    expected = rf"scene {truth.index} \(split natural, seed 3\).*from 'no' to 'yes'"
    with pytest.raises(RuntimeError, match=expected):
        draw_swaps(truth, question, "object")


@pytest.mark.parametrize(
    ("instance", "by", "message"),
    [
        (99, Replacement(0, 0, False), "instance = 99"),
        (-1, Replacement(0, 0, False), "instance = -1"),
        (0, Replacement(80, 0, False), "category = 80"),
        (0, Replacement(0, 99, False), "picture = 99"),
        (0, Replacement(0, 0, False, 0.0), "scale = 0"),
        (0, Replacement(0, 0, False, float("nan")), "scale = nan"),
    ],
)
def test_error_an_impossible_swap(instance, by, message):
    with pytest.raises(ValueError, match=message):
        swap(truths(1)[0], instance, by)


def test_error_an_unknown_kind_or_count():
    truth = truths(1)[0]
    question = SwapQuestion("caption", (), "describe the image .")
    with pytest.raises(ValueError, match="kind = 'colour'"):
        draw_swaps(truth, question, "colour")
    with pytest.raises(ValueError, match="count = 0"):
        draw_swaps(truth, question, "object", 0)
