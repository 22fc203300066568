"""A visitor's talk: columns side by side, marked words, where the model looked; without a page."""

import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from html import unescape
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

import mmlm
from mmlm.cli.options import ModelOptions
from mmlm.decoding_settings import GenerateSettings
from mmlm.errors import ImageReadError, InputError
from mmlm.show.conversation import Conversation, Picture
from mmlm.show.truth import Known, draw_scene
from mmlm.web import compare
from mmlm.web.answers import Clicked, Turn, talk_html, truth_html
from mmlm.web.columns import Column, answer_all
from mmlm.web.compare import Talk
from mmlm.web.gaze import follow
from mmlm.web.models import Limits, Models, Session
from mmlm.web.settings import Chosen

QUESTION = "describe the image ."


@pytest.fixture(scope="module")
def session():
    return Session(Models(["embedded"], ModelOptions()), Limits(), model=None)


@pytest.fixture
def talk():
    talk = Talk()
    compare.show_scene(talk, 17)
    return talk


def generate(**changes):
    return {**Chosen().generate, "max_new_tokens": 40, **changes}


def run(session, talk, *texts, question=QUESTION, **changes):
    steps = list(compare.ask(session, talk, "embedded", question, texts, generate(**changes)))
    return steps[-1]


def asked(index=17):
    drawn = draw_scene(index=index)
    return Conversation(pending=(Picture("scene", drawn.image, known=drawn.known),)).with_question(
        QUESTION
    )


# ---- columns -----------------------------------------------------------------------------------


def test_columns_stream_side_by_side(session, monkeypatch):
    together, borrow = threading.Barrier(3), session.models.borrow

    @contextmanager
    def meeting(name):
        with borrow(name) as loan:
            together.wait(timeout=60)  # all three have a model at the same time
            yield loan

    monkeypatch.setattr(session.models, "borrow", meeting)
    columns = [Column(asked()), Column(asked(), (mmlm.VHR(),)), Column(asked(), (mmlm.PAI(),))]
    seen = []
    for _ in answer_all(session.models, "embedded", columns, GenerateSettings(max_new_tokens=60)):
        seen.append([column.text for column in columns])
    assert [column.state for column in columns] == ["done"] * 3
    assert len({column.text for column in columns}) == 3
    assert all(0 < len(column.token_ids) <= 60 and column.seconds > 0 for column in columns)
    for texts in zip(*seen, strict=True):
        assert all(after.startswith(before.rstrip()) for before, after in pairwise(texts))


def test_an_error_stays_in_its_column(session):
    columns = [Column(asked()), Column(asked(), (mmlm.DARA(),))]
    list(answer_all(session.models, "embedded", columns, GenerateSettings(max_new_tokens=5)))
    assert [column.state for column in columns] == ["done", "failed"]
    html = talk_html([Turn(QUESTION, columns)])
    assert "DARA: row 0 has 1 images" in html
    assert 'class="failure"' in html


def test_a_stopped_column_keeps_what_it_has():
    slow = Models(["embedded"], ModelOptions())
    slow.open("embedded").model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    column = Column(asked())
    steps = answer_all(slow, "embedded", [column], GenerateSettings(max_new_tokens=400))
    while len(column.text) < 10:
        next(steps)
    column.stop.set()
    list(steps)
    assert column.state == "stopped"
    assert 0 < len(column.token_ids) < 31  # the whole answer has 31


def test_nobody_listening_stops_the_columns(session):
    column = Column(asked())
    settings = GenerateSettings(max_new_tokens=400, do_sample=True)
    steps = answer_all(session.models, "embedded", [column], settings)
    next(steps)
    steps.close()
    assert column.state == "stopped"


def test_sampled_columns_take_turns_and_are_repeatable(session):
    settings = GenerateSettings(max_new_tokens=16, do_sample=True, seed=3)

    def sampled():
        columns = [Column(asked()), Column(asked(), (mmlm.VHR(),))]
        list(answer_all(session.models, "embedded", columns, settings))
        return [column.token_ids for column in columns]

    assert sampled() == sampled()


def test_sampling_waits_for_the_dice(session):
    column = Column(asked())
    settings = GenerateSettings(max_new_tokens=4, do_sample=True)
    steps = answer_all(session.models, "embedded", [column], settings)
    with session.models.dice:
        next(steps)
        time.sleep(0.3)
        assert column.state == "waiting"
    list(steps)
    assert column.state == "done"


def test_a_talk_longer_than_the_model_reads_is_refused(session):
    long = Conversation().with_question("the " * 3000)
    column = Column(long)
    list(answer_all(session.models, "embedded", [column], GenerateSettings(max_new_tokens=5)))
    assert isinstance(column.error, InputError)
    assert "and this model reads 512" in str(column.error)


def test_an_answer_ends_where_the_positions_do(session):
    column = Column(Conversation().with_question("the " * 480))
    list(answer_all(session.models, "embedded", [column], GenerateSettings(max_new_tokens=512)))
    assert column.error is None
    assert 0 < len(column.token_ids) < 32


# ---- answers as HTML ---------------------------------------------------------------------------


def column_of(text, state="done"):
    return Column(Conversation(), (), text, state)


def test_invented_and_found_objects_are_marked():
    turn = Turn(QUESTION, [column_of("a dog and two traffic lights . a cat .")])
    turn.known[0] = Known(frozenset({"dog", "traffic light"}), "a test")
    html = talk_html([turn])
    assert re.findall(r'<mark class="(\w+)"[^>]*><span[^>]*>([^<]+)<', html) == [
        ("good", "dog"),
        ("good", "traffic lights"),
        ("bad", "cat"),
    ]
    assert "1 invented" in html
    assert "2 found" in html


def test_what_is_denied_is_counted_apart():
    turn = Turn(QUESTION, [column_of("there is no cat ."), column_of("no dog , a bird .")])
    turn.known = dict.fromkeys((0, 1), Known(frozenset({"dog"}), "a test"))
    tallies = re.findall(r'<span class="tally">(.*?)</span></span>', talk_html([turn]))
    shown = [re.findall(r">([^<]+)<", f"{tally}<") for tally in tallies]
    assert shown == [["1 rightly denied"], ["1 invented", "1 wrongly denied"]]


def test_every_word_says_where_it_stands():
    text = "a well-known dog , it's here ."
    html = talk_html([Turn(QUESTION, [column_of(text)])])
    places = [
        (int(start), int(end), unescape(word))
        for start, end, word in re.findall(r'data-start="(\d+)" data-end="(\d+)">([^<]+)<', html)
    ]
    assert [word for *_, word in places] == ["a", "well-known", "dog", "it's", "here"]
    assert all(text[start:end] == word for start, end, word in places)
    shown = re.sub(r"<[^>]+>", "", re.search(r'<p class="answer">(.*?)</p>', html)[1])
    assert shown == "a well-known dog, it&#x27;s here."


@pytest.mark.parametrize("known", [None, Known(frozenset({"dog"}), "<i>")])
def test_nothing_that_is_written_becomes_html(known):
    evil = '<img src=x onerror="alert(1)"> dog'
    turn = Turn(evil, [column_of(evil), column_of("")])
    turn.columns[1].error = ValueError(evil)
    turn.known = {} if known is None else {0: known}
    html = talk_html([turn]) + truth_html(known, detector="<b>")
    assert "<img" not in html
    assert "<i>" not in html
    assert "<b>dete" not in html
    assert "<b></b>" not in html


def test_the_newest_question_comes_first():
    html = talk_html([Turn("first", []), Turn("second", [])])
    assert html.index("second") < html.index("first")


# ---- gaze --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["none", "VHR", "VCD", "FlowCut(target=50)", "VAR(tau=6.0, sink_dims=(71, 151))"]
)
def test_following_an_answer_repeats_what_gave_it(session, text):
    methods = compare.read_methods(text)
    column = Column(asked(), methods)
    settings = GenerateSettings(max_new_tokens=24)
    list(answer_all(session.models, "embedded", [column], settings))
    with session.models.borrow("embedded") as (model, processor):
        gaze = follow(model, processor, methods, column.asked, column.token_ids)
        words = [processor.decode([token], skip_special_tokens=True) for token in column.token_ids]
    assert gaze.look.text == column.text
    # Greedy answers: at every step the token that was written is the favourite.
    assert list(gaze.favourites) == words
    assert all(0 < chance <= 1 for chance in gaze.chances)


def test_following_is_the_attention_of_the_answer_itself(session):
    from mmlm.show import looking
    from mmlm.streaming import AnswerStream

    one = asked()
    methods = (mmlm.VHR(alpha=3.0),)
    with session.models.borrow("embedded") as (model, processor):
        inputs = one.inputs(model, processor)
        settings = GenerateSettings(max_new_tokens=24)
        probed = [*methods, mmlm.AttentionMap()]
        with AnswerStream(model, processor, inputs, probed, settings) as stream:
            list(stream)
        direct = looking.of_stream(stream, one.pictures())
        gaze = follow(model, processor, methods, one, stream.token_ids)
    assert np.array_equal(gaze.look.maps[0], direct.maps[0])
    assert np.array_equal(gaze.look.shares, direct.shares)


def test_another_method_follows_with_other_eyes(session, talk):
    run(session, talk, "PAI(alpha=1.0, gamma=1.1)")
    html = list(compare.word(session, talk, 0, Clicked(0, *span_of(talk, 0, "truck"))))[-1]
    plain, pai = talk.gazes[0, 0, 0], talk.gazes[0, 0, 1]
    assert plain.look.text == pai.look.text
    assert pai.look.shares.mean() > plain.look.shares.mean()  # PAI raises attention on the image
    assert html.count("<figure") == 2
    assert html.count('aria-pressed="true"') == 1
    assert html.count("data:image/") == 2


def test_a_second_click_runs_no_model(session, talk, monkeypatch):
    run(session, talk, "VHR")
    list(compare.word(session, talk, 0, Clicked(1, *span_of(talk, 1, "street"))))
    monkeypatch.setattr(compare, "follow", None)
    steps = list(compare.word(session, talk, 0, Clicked(1, *span_of(talk, 1, "scene"))))
    assert len(steps) == 1


def span_of(talk, column, word):
    text = talk.turns[0].columns[column].text
    start = text.index(word)
    return start, start + len(word)


@pytest.mark.parametrize(
    ("turn", "clicked"), [(5, Clicked(0, 0, 1)), (0, Clicked(9, 0, 1)), (-1, Clicked(0, 0, 1))]
)
def test_words_that_are_not_there(session, talk, turn, clicked):
    run(session, talk)
    with pytest.raises(InputError, match="gone"):
        list(compare.word(session, talk, turn, clicked))


def test_a_place_without_a_word_is_refused(session, talk):
    run(session, talk)
    with pytest.raises(InputError, match="No token wrote"):
        list(compare.word(session, talk, 0, Clicked(0, 9000, 9001)))


def test_a_talk_without_a_picture_has_nothing_to_look_at(session):
    talk = Talk()
    run(session, talk)
    html = list(compare.word(session, talk, 0, Clicked(0, 0, 1)))[-1]
    assert "nothing to look at" in html


# ---- talks -------------------------------------------------------------------------------------


def test_each_column_goes_on_from_its_own_answer(session, talk):
    run(session, talk, "VHR(alpha=3.0)")
    first = [column.text for column in talk.turns[0].columns]
    run(session, talk, "VHR(alpha=3.0)", "PAI", question="is there a truck ?")
    pasts = [column.asked.turns[0].answer for column in talk.turns[1].columns]
    # New methods go on from the plain model's answer.
    assert pasts == [first[0], first[1], first[0]]
    assert all(len(column.asked.pictures()) == 1 for column in talk.turns[1].columns)


def test_another_picture_begins_a_new_talk(session, talk):
    run(session, talk)
    compare.show_scene(talk, 18)
    assert (talk.turns, talk.gazes, talk.scene) == ([], {}, 18)


def test_unused_columns_are_not_answered(session, talk):
    run(session, talk, "", "VHR", None, "none")
    assert [column.label for column in talk.turns[0].columns] == ["plain", "VHR"]


@pytest.mark.parametrize(
    ("texts", "question", "changes", "said"),
    [
        ((), "  ", {}, "no question"),
        ((), None, {}, "no question"),
        (("VHR", "VHX"), QUESTION, {}, "Method 2: There is no method 'VHX'"),
        ((), QUESTION, {"max_new_tokens": 513}, "this page allows 512"),
        ((), QUESTION, {"num_beams": 17}, "this page allows 16"),
        ((), QUESTION, {"max_new_tokens": None}, "max_new_tokens is empty"),
        ((), QUESTION, {"do_sample": True, "top_p": 1.5}, "top_p must be in"),
        ((), QUESTION, {"seed": -1}, "seed must not be negative"),
    ],
)
def test_requests_that_cannot_be(session, talk, texts, question, changes, said):
    with pytest.raises(InputError, match=said) as error:
        run(session, talk, *texts, question=question, **changes)
    assert error.value.advice
    assert talk.turns == []


def test_a_talk_has_an_end(session, talk):
    talk.turns = [Turn("x", [])] * 20
    with pytest.raises(InputError, match="20 questions"):
        run(session, talk)


def test_uploads(session, talk, tmp_path):
    good, broken, large = (tmp_path / name for name in ("good.png", "broken.png", "large.png"))
    Image.new("RGB", (30, 20)).save(good)
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    Image.new("1", (8000, 6000)).save(large)
    assert "not known" in compare.show_upload(session, talk, str(good))
    assert (talk.picture.name, talk.scene) == ("good.png", None)
    for path, said in ((broken, "damaged"), (large, "too large"), (tmp_path / "x.png", "no such")):
        compare.show_upload(session, talk, str(good))
        with pytest.raises(ImageReadError, match=said) as error:
            compare.show_upload(session, talk, str(path))
        assert str(tmp_path) not in str(error.value)
        assert talk.picture is None


def test_pictures_of_coco_are_known_by_name(session, talk, tmp_path):
    path = tmp_path / "COCO_val2014_000000000042.jpg"
    Image.new("RGB", (30, 20)).save(path)
    assert "COCO val2014" in compare.show_upload(session, talk, str(path))


def test_a_detector_judges_uploads(session, talk, tmp_path):
    from data_tools.detectors import Detector, Finding

    class Sees(Detector):
        name = "a test detector"

        def facts(self):
            return {}

        def detect(self, picture, names):
            return {name: Finding(name == "truck") for name in names}

    path = tmp_path / "photo.png"
    draw_scene(index=17).image.save(path)
    seeing = replace(session, detector=Sees())
    assert "a test detector" in compare.show_upload(seeing, talk, str(path))
    html = run(seeing, talk)
    assert '<mark class="good"' in html
    assert '<mark class="bad"' in html  # the traffic light, of which this detector knows nothing


def test_stop_ends_a_running_answer(session, talk):
    steps = compare.ask(session, talk, "embedded", QUESTION, (), generate(max_new_tokens=400))
    next(steps)
    threading.Timer(0.05, compare.stop, [talk]).start()
    list(steps)
    assert talk.turns[0].columns[0].state in ("stopped", "done")
    compare.stop(Talk())  # nothing runs: nothing happens
