"""The effects tab's numbers: equal to scoring everything at once, stoppable, refused beforehand."""

import contextlib

import pytest

import mmlm
from benchmarks import chair
from benchmarks.reports.comparison import Contender, compare
from mmlm.errors import IncompatibleMethods, InputError
from mmlm.runner import GenerateSettings, Request, generate_all
from mmlm.show.truth import draw_scene
from mmlm.web.effects_run import MOST_PICTURES, PLAIN, Plan, measure

VHR = "VHR(alpha=2.0)"
PAI = "PAI(alpha=0.2, gamma=1.1)"


@pytest.fixture(scope="module")
def embedded():
    return mmlm.load("embedded")


@pytest.fixture(scope="module")
def steps(embedded):
    plan = Plan((VHR, PAI), count=14, batch_size=6, max_new_tokens=40)
    return list(measure(*embedded, plan))


def test_every_batch_of_every_way_is_told(steps):
    assert [step.done for step in steps] == [0, 6, 12, 18, 24, 30, 36, 38, 40, 42]
    assert {step.total for step in steps} == {42}
    assert [step.finished for step in steps] == [False] * 9 + [True]
    assert not any(step.stopped or step.failed for step in steps)


def test_after_each_round_all_ways_are_compared_on_the_same_pictures(steps):
    assert [len(step.history) for step in steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [comparison.pictures for comparison in steps[-1].history] == [6, 12, 14]
    assert steps[-1].latest.labels == [PLAIN, VHR, PAI]
    assert {label: speed.answers for label, speed in steps[-1].speeds.items()} == {
        PLAIN: 14,
        VHR: 14,
        PAI: 14,
    }
    assert all(speed.seconds > 0 and speed.tokens > 14 for speed in steps[-1].speeds.values())


def test_the_last_numbers_are_those_of_scoring_everything_at_once(embedded, steps):
    drawn = [draw_scene("natural", 0, index) for index in range(14)]
    requests = [Request(str(i), (one.image,), Plan((VHR,)).question) for i, one in enumerate(drawn)]
    settings = GenerateSettings(max_new_tokens=40, batch_size=6)
    truth = {i: one.known.objects for i, one in enumerate(drawn)}
    contenders = []
    for label in (PLAIN, VHR, PAI):
        methods = () if label == PLAIN else (mmlm.parse_method(label),)
        results = generate_all(*embedded, requests, methods, settings)
        captions = [{"image_id": int(one.id), "caption": one.text} for one in results]
        contenders.append(Contender(label, chair.score(captions, truth)))
    assert steps[-1].latest.rows == compare(contenders).rows


def test_a_stop_keeps_the_whole_rounds(embedded):
    asked = iter([False] * 5)
    plan = Plan((VHR,), count=12, batch_size=4, max_new_tokens=8)
    steps = list(measure(*embedded, plan, stopped=lambda: next(asked, True)))
    assert steps[-1].stopped
    assert not steps[-1].finished
    assert [comparison.pictures for comparison in steps[-1].history] == [4, 8]
    assert steps[-1].done == 16


def test_the_model_is_held_for_one_batch_at_a_time(embedded):
    held = []

    @contextlib.contextmanager
    def turn():
        held.append("on")
        yield
        held.append("off")

    steps = measure(*embedded, Plan((VHR,), count=2, max_new_tokens=4), turn=turn)
    for _ in steps:
        assert not held or held[-1] == "off"
    assert held == ["on", "off"] * 3  # trying out, then a batch of each way


def test_pictures_that_cannot_be_described_are_left_out_everywhere(embedded, monkeypatch):
    from mmlm import runner

    load = runner.load_image

    def second_breaks(source):
        if source.tobytes() == broken:
            raise mmlm.errors.ImageReadError("cannot be read")
        return load(source)

    broken = draw_scene("natural", 0, 1).image.tobytes()
    monkeypatch.setattr(runner, "load_image", second_breaks)
    *_, last = measure(*embedded, Plan((VHR,), count=3, max_new_tokens=4))
    assert (last.failed, last.reason, last.finished) == (1, "cannot be read", True)
    assert last.latest.runs[1].scored.table.images == (0, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ()}, "0 methods"),
        ({"methods": ("VHR()", "VCD()", "PAI()", "ICD()", "DoLa()")}, "5 methods"),
        ({"split": "winter"}, "no split 'winter'"),
        ({"count": 0}, "0 pictures"),
        ({"count": MOST_PICTURES + 1}, f"{MOST_PICTURES + 1} pictures"),
        ({"seed": -1}, "seed is -1"),
        ({"question": "  "}, "question is empty"),
    ],
)
def test_a_plan_that_cannot_be_measured_is_refused_with_advice(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        Plan(**{"methods": (VHR,), **changes})
    assert caught.value.advice


@pytest.mark.parametrize("methods", [("VHR()", "VHR( )"), ("none",), ("Nonsense()",), (VHR, VHR)])
def test_methods_are_checked_before_any_work(methods):
    with pytest.raises(InputError) as caught:
        next(measure(None, None, Plan(methods)))
    assert caught.value.advice


def test_a_method_that_does_not_fit_the_model_is_refused_before_the_first_picture(embedded):
    with mmlm.attach(embedded[0], mmlm.VHR()), pytest.raises(IncompatibleMethods):
        next(measure(*embedded, Plan((PAI,), count=2)))
