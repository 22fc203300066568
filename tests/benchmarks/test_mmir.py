"""MMIR: golden values, the rules by hand, the loader's refusals, judges, damaged lines."""

import json
import random

import pytest
from golden import golden
from PIL import Image

from benchmarks import mmir
from benchmarks.judges import ScriptedJudge
from mmlm.errors import InputError

SOURCES = ["web page"] * 240 + ["office"] * 223 + ["poster"] * 71
ELEMENTS = "[1] a blue title\n[2] a price of ten euros\n[3] a date in May\n[4] the footer"


def entry(index):
    truth = [1, 3] if index % 2 else [2]
    return {
        "source": SOURCES[index],
        "gt_ans": truth,
        "image": f"{index % 3}.png",
        "question": f"Which elements conflict? ({index})",
        "descs": ELEMENTS,
    }


def write(root, setting="mcq", change=lambda entries: entries):
    folder = root / "test"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(3):
        Image.new("RGB", (8, 8), (90, 60, 30)).save(folder / "images" / f"{number}.png")
    entries = change([entry(index) for index in range(mmir.COUNT)])
    (folder / f"questions_{setting}.json").write_text(json.dumps(entries))
    return root


@pytest.fixture
def questions(tmp_path):
    return mmir.read_questions(write(tmp_path), "mcq")


def stored(questions, folder, setting="mcq", text=lambda facts: perfect(facts)):
    pictures = mmir.find_pictures(questions, folder, setting)
    items = mmir.task(questions, pictures, setting).items
    return [{"id": i.request.id, **i.facts, "text": text(i.facts)} for i in items]


def perfect(facts):
    return f"I think <ans>{', '.join(str(name) for name in facts['truth'])}</ans>"


# --- golden ---------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("mmir/mmir_*.json"))
def test_ring_acceptance_1_golden(path):
    data = json.loads(path.read_text())
    for case in data["check_answer"]:
        assert mmir.points(case["answer"], case["gt"]) == case["score"], case
    for case in data["extract_xml"]:
        assert mmir.extract(case["text"], case["tag"]) == case["result"], case
    assert mmir.score_mmir(data["questions"], data["responses"]) == data["expected"]
    shuffled = random.Random(3).sample(data["responses"], len(data["responses"]))
    again = mmir.score_mmir(data["questions"], shuffled)
    assert again == pytest.approx(data["expected"], abs=1e-15)


# --- the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [("3.5", {3, 5}), ("-4", {4}), ("3,3", {3}), ("", set()), ("[12] and 7", {12, 7})],
)
def test_every_run_of_digits_is_an_id(text, ids):
    assert mmir.named_ids(text) == ids


def test_points_by_hand():
    assert mmir.points("3", [3]) == 1
    assert mmir.points("3, 4", [3]) == 0.5
    assert mmir.points("3, 4, 5", [3]) == 0  # naming everything is no answer
    assert mmir.points("3", [3, 4]) == 0.5
    assert mmir.points("4, 3", [3, 4]) == 1
    assert mmir.points("none", [3]) == 0


def test_chance_is_what_two_random_names_are_worth():
    generator = random.Random(0)
    for truth in ([2], [2, 5]):
        drawn = [mmir.points(str(generator.sample(range(8), 2)), truth) for _ in range(20000)]
        assert sum(drawn) / len(drawn) == pytest.approx(len(truth) / 8, abs=0.01)
    from benchmarks.mmir.rules import chance

    assert (chance(8, 1), chance(8, 2), chance(0, 1)) == (1 / 8, 2 / 8, 0)


def test_ring_acceptance_1_a_perfect_file_scores_100_in_both_settings(tmp_path):
    mcq = stored(mmir.read_questions(write(tmp_path), "mcq"), tmp_path)
    scores = mmir.score_stored(mcq)
    assert scores.name == "mmir/official/mcq"
    assert scores.official == {"web": 100, "office": 100, "poster": 100, "overall": 100}
    assert scores.metrics["overall"] == scores.metrics["two_elements"] == 1
    # Half of the questions have one true element of four, half have two.
    assert scores.metrics["chance"] == pytest.approx(0.375)
    questions = mmir.read_questions(write(tmp_path, "open"), "open")
    words = stored(questions, tmp_path, "open", lambda facts: "<ans>the title</ans>")
    truth = {line["id"]: line["truth"] for line in words}
    judge = ScriptedJudge(lambda p: f"<id>{str(truth[p.id])[1:-1]}</id>", "scribe")
    scores = mmir.score_stored(mmir.judge_answers(words, judge))
    assert scores.name == "mmir/official/open/scribe/own-prompt"
    assert scores.official == {"web": 100, "office": 100, "poster": 100, "overall": 100}


def test_chance_is_over_the_questions_whose_elements_are_known(questions, tmp_path):
    one, two = stored(questions, tmp_path)[:2]
    assert mmir.score_stored([one, two]).metrics["chance"] == (1 / 4 + 2 / 4) / 2
    assert mmir.score_stored([one, two | {"elements": {}}]).metrics["chance"] == 1 / 4


def test_ring_acceptance_1_half_the_file_halves_the_overall_score(questions, tmp_path):
    lines = stored(questions, tmp_path)
    half = mmir.score_stored(lines[::2])
    assert half.official["overall"] == 50
    assert half.statuses["absent"] == 267
    asked = [{"source": q.source} for q in questions]
    given = [
        {"i": q.index, "response": [perfect({"truth": q.truth})], "gt_ans": list(q.truth)}
        for q in questions
    ]
    assert mmir.score_mmir(asked, given)["overall"] == 1
    assert mmir.score_mmir(asked, given[::2])["overall"] == 0.5


def test_ring_acceptance_1_the_order_of_the_file_does_not_matter(questions, tmp_path):
    lines = stored(questions, tmp_path, text=lambda f: f"<ans>{f['source'].count('e')}</ans>")
    shuffled = random.Random(1).sample(lines, len(lines))
    first, second = (mmir.score_stored(part).as_json(resamples=9) for part in (lines, shuffled))
    assert first == second
    assert 0 < first["metrics"]["overall"]["value"] < 1


def test_answers_that_cannot_be_read_are_counted(questions, tmp_path):
    texts = iter(["3", "<ans>1, 2, 3</ans>", "<ans>77</ans>", "<ans>the title</ans>"] * 200)
    lines = stored(questions, tmp_path, text=lambda facts: next(texts))[:40]
    lines[3] |= {"text": None, "error": "the picture cannot be read"}
    scores = mmir.score_stored(lines)
    assert scores.statuses == {
        "failed": 1,
        "unparsed": 10,
        "more than two ids": 10,
        "id that is no element": 10,
        "absent": 494,
    }
    assert scores.metrics["unparsed"] == 0.25
    assert scores.metrics["overall"] == 0
    assert scores.samples[3].correct is None


# --- the judge that needs no model ----------------------------------------------------------------


def test_match_takes_the_element_with_most_common_words(tmp_path):
    elements = {"1": "a blue title", "2": "a price of ten euros", "3": "a date", "4": "a day"}
    assert mmir.matched_id("the title is blue", elements) == "1"
    assert mmir.matched_id("ten euros", elements) == "2"
    # The words that a description has besides count against it.
    assert mmir.matched_id("blue title", {"1": "a long blue title", "2": "a blue title"}) == "2"
    assert mmir.matched_id("a", elements) == ""  # "a date" and "a day" share it alike
    assert mmir.matched_id("nothing of that", {"1": "red"}) == ""
    questions = mmir.read_questions(write(tmp_path, "open"), "open")
    lines = stored(questions, tmp_path, "open", lambda f: "<ans>a price of ten euros</ans>")
    scores = mmir.score_stored(mmir.match_answers(lines))
    assert scores.name == "mmir/open-match"
    assert scores.metrics["one_element"] == 1
    assert scores.metrics["two_elements"] == 0


def test_a_judge_sees_the_elements_and_is_not_asked_about_nothing(tmp_path):
    questions = mmir.read_questions(write(tmp_path, "open"), "open")
    texts = iter(["<ans>the title</ans>", "no tags"] * 300)
    lines = stored(questions, tmp_path, "open", lambda facts: next(texts))[:4]
    asked = []

    def reply(prompt):
        asked.append(prompt)
        return None if prompt.id == "2" else "<id>2</id>"

    judged = mmir.judge_answers(lines, ScriptedJudge(reply, "scribe"))
    assert [prompt.id for prompt in asked] == ["0", "2"]
    assert "[2] a price of ten euros" in asked[0].text
    assert "Answer: the title" in asked[0].text
    scores = mmir.score_stored(judged)
    assert scores.statuses == {"not judged": 1, "unparsed": 2, "absent": 530}
    assert scores.metrics["overall"] == 0.25


# --- the loader -----------------------------------------------------------------------------------


def without(name):
    return lambda entries: [{k: v for k, v in e.items() if k != name} for e in entries]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries[:-1], "has 533 questions; MMIR has 534"),
        (without("source"), "the source must stand under source; the first question has descs"),
        (
            without("gt_ans"),
            "the true ids must stand under gt_ans or .*has descs, image, question, source",
        ),
        (without("image"), "the picture must stand under image or image_path"),
        (without("question"), "the question must stand under question or prompt"),
        (
            lambda entries: [*entries[:-1], *without("image")(entries[-1:])],
            "the picture must stand under image or image_path",
        ),
        (lambda entries: {"all": entries}, "no list of questions"),
        (
            lambda entries: [{**entries[0], "gt_ans": [1, 2, 3]}, *entries[1:]],
            r"question 0: the true ids are \[1, 2, 3\]",
        ),
        (lambda entries: [{**e, "gt_ans": "x"} for e in entries], 'the true ids are "x"'),
    ],
)
def test_error_a_file_that_is_not_mmirs(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        mmir.read_questions(write(tmp_path, change=change), "mcq")


def test_error_a_missing_file_picture_or_list_of_elements(tmp_path):
    with pytest.raises(InputError, match=r"no questions_open\.json"):
        mmir.read_questions(write(tmp_path), "open")
    questions = mmir.read_questions(tmp_path, "mcq")
    (tmp_path / "test" / "images" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1 of 3 pictures are not in .*1\.png"):
        mmir.find_pictures(questions, tmp_path, "mcq")
    bare = write(tmp_path, "open", lambda entries: [{**e, "descs": "a page"} for e in entries])
    with pytest.raises(InputError, match="'descs' holds no numbered elements: 'a page'"):
        mmir.read_questions(bare, "open")


@pytest.mark.parametrize(
    "descs",
    [
        "[3] a heading\n[12] a date",
        "3. a heading\n\n12: a date",
        "ID 3: a heading\nelement 12 - a date",
        ["3 - a heading", "12 - a date"],
        [{"id": 3, "text": "a heading"}, {"id": "12", "text": "a date"}],
        {"3": "a heading", "12": "a date"},
    ],
)
def test_lists_of_elements_in_any_form(descs):
    assert mmir.elements_of(descs, "here") == {3: "a heading", 12: "a date"}


def test_categories_are_joined_only_where_nothing_is_guessed(tmp_path):
    def named(entries):
        return [{**e, "image": f"{i}.png"} for i, e in enumerate(entries)]

    write(tmp_path, change=named)
    assert {q.category for q in mmir.read_questions(tmp_path, "mcq")} == {""}
    rows = [{"file_name": f"images/{i}.png", "category": "abc"[i % 3]} for i in range(534)]
    metadata = tmp_path / "test" / "metadata.jsonl"

    def categories(rows):
        metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [q.category for q in mmir.read_questions(tmp_path, "mcq")]

    assert categories(rows[::-1])[:4] == ["a", "b", "c", "a"]
    assert set(categories([*rows, rows[0]])) == {""}  # a picture that stands there twice
    assert set(categories(rows[:-1])) == {""}  # one that does not
    assert set(categories([{"n": 1}] * 534)) == {""}
    write(tmp_path, change=lambda e: [{**one, "category": "own"} for one in named(e)])
    assert set(categories(rows)) == {"own"}


# --- responses and lines --------------------------------------------------------------------------


def test_error_a_response_about_no_question_or_a_second_one():
    questions = [{"source": "poster"}, {"source": "slides"}]
    one = {"i": 1, "response": "<ans>3</ans>", "gt_ans": [3]}
    assert mmir.score_mmir(questions, [one]) == {"office": 1, "poster": 0, "overall": 1 / 534}
    with pytest.raises(ValueError, match="i = 2: there are questions 0 to 1"):
        mmir.score_mmir(questions, [{**one, "i": 2}])
    with pytest.raises(ValueError, match="i = 1: there are two responses"):
        mmir.score_mmir(questions, [one, one])
    words = {**one, "response": "<ans>the date</ans>", "llm_ans": "3"}
    assert mmir.score_mmir(questions, [words])["overall"] == 0
    assert mmir.score_mmir(questions, [words], judged=True)["overall"] == 1 / 534


def test_error_open_answers_without_a_judge(tmp_path):
    questions = mmir.read_questions(write(tmp_path, "open"), "open")
    with pytest.raises(InputError, match="have not been judged") as error:
        mmir.score_stored(stored(questions, tmp_path, "open"))
    assert "--judge match" in error.value.advice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": None}, "lacks 'truth' or 'elements'"),
        ({"elements": "[1] a title"}, "lacks 'truth' or 'elements'"),
        ({"setting": "open"}, "settings mcq, open"),
        ({"source": None}, "no text in 'source'"),
        ({"text": 3}, "the answer is 3"),
    ],
)
def test_damaged_lines_are_refused(questions, tmp_path, change, message):
    lines = stored(questions, tmp_path)
    lines[0] |= change
    with pytest.raises(InputError, match=message):
        mmir.score_stored(lines)
