"""What the effects tab and the data tab write on the page."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks import chair
from benchmarks.reports.comparison import Contender, compare
from benchmarks.run import Speed
from mmlm.web import data, data_html, effects_html
from mmlm.web.data_steps import DrawnScene, Upload
from mmlm.web.effects_run import Plan, Progress

PLAN = Plan(("VHR()",), count=12)


def compared(pictures, other="a dog and <b>a cat</b> ."):
    truth = {image: {"dog"} for image in range(pictures)}
    texts = {"plain": "a dog .", "VHR(alpha=<2>)": other}
    runs = [
        Contender(label, chair.score([{"image_id": i, "caption": text} for i in truth], truth))
        for label, text in texts.items()
    ]
    return compare(runs)


@pytest.fixture(scope="module")
def step():
    history = (compared(4), compared(8), compared(12))
    speeds = {label: Speed(3.0, 12, 60) for label in history[0].labels}
    return Progress(24, 24, history, speeds)


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({"done": 5}, "running", "Running: 5 of 24 captions"),
        ({}, "done", "Done: 24 of 24 captions, 12 pictures in every way."),
        ({"done": 16, "stopped": True}, "stopped", "Stopped: 16 of 24"),
        ({"failed": 2, "reason": "<no>"}, "done", "2 pictures are left out: &lt;no&gt;"),
    ],
)
def test_progress_tells_its_state(step, changes, state, words):
    shown = effects_html.progress(replace(step, **changes))
    assert f'data-state="{state}"' in shown
    assert words in shown
    assert f'value="{changes.get("done", 24)}" max="24"' in shown


def test_there_are_no_numbers_before_the_first_round():
    assert effects_html.numbers(Progress(3, 24), PLAN) == ""


def test_a_curve_is_a_figure_in_the_colours_of_the_page(step):
    svg = effects_html.curve(step.history, "chair_i")
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert root.get("role") == "img"
    assert "CHAIR_i after 12 pictures: plain 0.0, VHR(alpha=<2>) 50.0" in root.get("aria-label")
    assert "currentColor" in svg
    assert effects_html._INK not in svg
    assert not re.search(r"https?://(?!www\.w3\.org|purl\.org|creativecommons|matplotlib)", svg)


def test_an_undefined_metric_is_a_gap_and_no_error():
    history = (compared(2, other="nothing ."),)
    assert "undefined" in ET.fromstring(effects_html.curve(history, "f1")).get("aria-label")


def test_the_numbers_hold_figure_table_and_the_newest_picture(step):
    shown = effects_html.numbers(step, PLAN)
    assert shown.count("<svg") == len(effects_html.CURVES)
    assert "<th>VHR(alpha=&lt;2&gt;)</th>" in shown
    assert "Seconds per caption" in shown
    assert "<strong>0.25</strong>" in shown
    assert '<mark class="bad" title="cat: invented">cat</mark>' in shown
    assert "Scene 11:" in shown
    assert "<b>a" not in shown  # what a model writes is text


def line(**changes):
    image = {
        "path": "none.png", "image_id": "x", "caption": "a <i>dog</i> sits .", "n_sentences": 1,
        "status": "ok", "factual": ["dog"], "hallucinated": ["cat"], "uncertain": ["fog"],
        "rejected_by": {"one": ["cat"], "two": ["cat", "fog"]},
        "boxes": {"dog": {"one": [[0, 0, 5, 5, 1.0]]}},
        "steps": [{
            "candidates": [
                {"text": "a dog sits .", "class": "coherent", "objects": [["dog", 2, 5]],
                 "drawn": 3, "chosen": [0]},
                {"text": "a cat <b> .", "class": "hallucinated", "objects": [["cat", 2, 5]],
                 "drawn": 1, "rejected": [0]},
            ],
            "ended": 1, "next": 0,
        }],
    }  # fmt: skip
    return image | changes


def watch(tmp_path, **changes):
    pair = {"id": "x-0-0", "step": 0, "chosen": "a dog sits .", "rejected": "a cat <b> ."}
    return SimpleNamespace(
        image=line(**changes), pairs=[pair], detectors=("one", "two"), folder=tmp_path,
        complete=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("detector", "name", "said"),
    [
        ("one", "dog", "yes"),  # a box
        ("one", "cat", "no"),
        ("two", "dog", "yes"),  # found, and this one gives no boxes
        ("two", "fog", "no"),
        ("one", "fog", "cannot tell"),  # gives boxes, and none here
        ("two", "sky", "cannot tell"),
    ],
)
def test_what_each_detector_said_follows_from_the_audit(detector, name, said):
    assert data_html._said(line(), detector, name) == said


def test_an_object_is_uncertain_because_one_without_boxes_accepts_it():
    assert data_html._said(line(boxes={}), "one", "fog") == "yes"


def test_steps_show_candidates_pairs_and_what_goes_on(tmp_path):
    shown = data_html.steps(watch(tmp_path))
    assert "So far: 1 step, 1 pair." in shown
    assert shown.count('<li class="candidate') == 2
    assert '<li class="candidate next" data-class="coherent">' in shown
    assert "drawn 3 times" in shown
    assert '<mark class="good" title="dog">dog</mark>' in shown
    assert '<div class="pair" data-pair="x-0-0">' in shown
    assert "<b>" not in shown
    assert "<i>dog" not in shown


def test_trouble_is_told(tmp_path):
    shown = data_html.steps(watch(tmp_path, error="two: <out of memory>", status="no_pairs"))
    assert "two: &lt;out of memory&gt;" in shown
    assert "Nothing to pair." in shown


def test_a_step_in_which_the_caption_ended_has_no_candidates(tmp_path):
    ended = [*line()["steps"], {"candidates": [], "ended": 4, "next": None}]
    shown = data_html.steps(watch(tmp_path, steps=ended))
    assert "the model ended the caption in all 4 samples" in shown


def test_objects_outside_of_every_vocabulary_count_as_found(tmp_path):
    shown = data_html.knowledge(
        watch(tmp_path, factual=["sky"], boxes={"dog": {"one": [], "two": []}})
    )
    assert '<tr><th>sky</th><td><b class="better">counts as found</b></td>' in shown
    assert (
        '<tr><th>cat</th><td><b class="worse">absent</b></td><td>no</td><td>no</td></tr>' in shown
    )
    assert "none.png" in shown  # the picture was moved away: said in its place


def test_the_fields_of_the_data_tab_become_objects(tmp_path):
    session = SimpleNamespace(detector=None, limits=SimpleNamespace(pixels=10**6))
    numbers = (5, 0.5, 3, "matched", True, 7)
    subject, question, settings = data._read(
        session, (data._SCENE, 4, 0.2, None, "", "q", *numbers)
    )
    assert (subject, question) == (DrawnScene(4, 0.2), "q")
    assert (settings.n, settings.temperature, settings.max_sentences) == (5, 0.5, 3)
    assert (settings.pairing, settings.allow_agnostic_pairs, settings.seed) == ("matched", True, 7)
    from tiny import picture

    picture().save(tmp_path / "a.png")
    fields = (data._MINE, 4, 0.2, str(tmp_path / "a.png"), " Dog, ball,,", "q", *numbers)
    assert data._read(session, fields)[0] == Upload(tmp_path / "a.png", ("dog", "ball"))


def test_styles_are_those_of_the_reports_without_other_peoples_fonts():
    for css in (effects_html.style(), data_html.style()):
        assert "mark.bad" in css
        assert "http" not in css
        assert "${" not in css  # Gradio would fill it in
