"""POPE by hand: six parsers, formulas, means, building questions, and bad input."""

import json
import random

import pytest

from benchmarks import pope
from benchmarks.pope import questions as pope_questions
from mmlm.errors import InputError

Y, N, U = True, False, None

# answer: strict, official, opera, vcd on a yes label, vcd on a no label, lmms-eval, vlmevalkit
READINGS = {
    "Yes": (Y, Y, Y, Y, Y, Y, Y),
    "No": (N, N, N, N, N, N, N),
    "no": (N, N, N, N, N, N, N),
    "NO": (N, Y, N, N, N, N, N),
    "No.": (N, N, N, N, N, U, N),
    "No!": (N, Y, Y, N, N, U, N),
    "no\n": (N, Y, Y, N, N, N, N),
    "None": (U, Y, Y, N, N, U, U),
    "": (U, Y, Y, N, Y, U, U),
    ".No": (N, Y, N, N, N, U, N),
    "It isn't.": (U, Y, N, N, Y, U, U),
    "not sure": (U, N, N, N, N, U, U),
    "I know": (U, Y, Y, N, N, U, U),
    "Yes, there is no doubt": (Y, N, N, Y, N, U, U),
    "Yes. There is no cat.": (Y, Y, N, Y, N, U, U),
    "yes , there is a dog in the image .": (Y, Y, Y, Y, Y, U, Y),
    "no , there is no dog in the image .": (N, N, N, N, N, U, N),
    "**Yes**": (Y, Y, Y, Y, Y, U, U),
    "Yes,there is": (Y, Y, Y, Y, Y, U, Y),
    "yes/no": (U, Y, Y, Y, N, U, U),
    "The answer is yes": (U, Y, Y, Y, Y, U, Y),
}


@pytest.mark.parametrize("answer", READINGS)
def test_parsers(answer):
    def read(parser, label):
        return pope.PARSERS[parser].read(answer, label)

    readings = (
        read("strict", "yes"),
        read("official", "yes"),
        read("opera", "yes"),
        read("vcd", "yes"),
        read("vcd", "no"),
        read("lmms-eval", "yes"),
        read("vlmevalkit", "yes"),
    )
    assert readings == READINGS[answer]


def test_formulas_by_hand():
    answers = ["yes", "yes", "no", "yes", "no", "hm", "hm"]
    labels = ["yes", "yes", "yes", "no", "no", "yes", "no"]
    result = pope.score(answers, labels)
    assert result.counts == {
        "answers": 7,
        "tp": 2,
        "fp": 1,
        "tn": 1,
        "fn": 1,
        "neither_yes": 1,
        "neither_no": 1,
        "yes_labels": 4,
    }
    precision, recall = 2 / 3, 2 / 4  # a yes-question without an answer is missed
    assert result.metrics == pytest.approx(
        {
            "accuracy": 3 / 7,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "yes_ratio": 3 / 7,
            "unparsed": 2 / 7,
        }
    )
    assert result.name == "pope/custom/strict"


def test_lmms_eval_forgives_neither_in_recall_and_takes_its_ratio_from_labels():
    answers, labels = ["yes", "hm", "no", "no"], ["yes", "yes", "yes", "no"]
    metrics = pope.score(answers, labels, "lmms-eval").metrics
    assert metrics["recall"] == 1 / 2
    assert metrics["yes_ratio"] == 3 / 4
    assert pope.score(answers, labels, "strict").metrics["recall"] == 1 / 3


@pytest.mark.parametrize(
    ("answers", "undefined"),
    [
        (["no", "no"], {"precision", "f1"}),
        (["no", "yes"], {"f1"}),  # precision 0, recall 0
    ],
)
def test_undefined_ratios(answers, undefined):
    metrics = pope.score(answers, ["yes", "no"]).metrics
    assert {name for name, value in metrics.items() if value is None} == undefined


def test_order_of_the_answers_is_irrelevant():
    rows = [("yes", "yes", 1), ("no", "yes", 1), ("yes", "no", 2), ("no", "no", 3)] * 3
    shuffled = random.Random(0).sample(rows, len(rows))

    def record(order):
        answers, labels, images = zip(*order, strict=True)
        return pope.score(answers, labels, images=images).as_json(resamples=20)

    assert record(rows) == record(shuffled)


def test_means_over_splits_pair_the_pictures():
    labels, images = ["yes", "no", "yes", "no"], ["a", "a", "b", "b"]
    splits = {
        "random": pope.score(["yes", "no", "yes", "no"], labels, images=images),
        "popular": pope.score(["yes", "yes", "yes", "no"], labels, images=images),
        "adversarial": pope.score(["yes", "yes", "no", "no"], labels, images=images),
    }
    summary = pope.summarize(splits)
    assert summary.metrics["mean_accuracy"] == pytest.approx((1 + 3 / 4 + 2 / 4) / 3)
    # F1: 1; 2*2/(2*2+1) = 4/5; 2*1/(2*1+1+1) = 1/2
    assert summary.metrics["mean_f1"] == pytest.approx((1 + 4 / 5 + 1 / 2) / 3)
    assert summary.table.images == ("a", "b")
    assert summary.llava_average is None
    record = summary.as_json(resamples=30)
    assert set(record["splits"]) == set(splits)
    low, high = record["means"]["mean_f1"]["interval"]
    assert low <= record["means"]["mean_f1"]["value"] <= high


def test_summary_refuses_mixed_parsers():
    one = pope.score(["yes"], ["yes"], "strict")
    two = pope.score(["yes"], ["yes"], "official")
    with pytest.raises(ValueError, match="one parser"):
        pope.summarize({"random": one, "popular": two})
    with pytest.raises(ValueError, match="at least one split"):
        pope.summarize({})


# --- building questions ---------------------------------------------------------------------------

PICTURES = [
    ("1.jpg", ["dog", "person", "cup"]),
    ("2.jpg", ["cat", "person", "sofa"]),
    ("3.jpg", ["cat", "cup", "apple"]),
]


def build(kind, **arguments):
    return pope.build_questions(PICTURES, kind, random.Random(0), **arguments)


def test_popular_asks_for_the_most_frequent_absent_object():
    # person 2, cup 2, cat 2, dog 1, sofa 1, apple 1; first seen: dog person cup cat sofa apple
    asked = [
        q.text.removeprefix("Is there ").removesuffix(" in the image?") for q in build("popular")
    ]
    assert asked[:6] == ["a dog", "a cat", "a person", "a sofa", "a cup", "an apple"]


def test_adversarial_asks_for_the_nearest_companion():
    assert pope_questions.co_occurrence(PICTURES)["cat"] == ["person", "sofa", "cup", "apple"]
    last = build("adversarial")[12:]
    # Picture 3 (cat, cup, apple): cat -> person; cup -> dog (person is used); apple -> none left.
    assert [q.text for q in last[:4:2]] == [
        "Is there a cat in the image?",
        "Is there a cup in the image?",
    ]
    assert last[1].text == "Is there a person in the image?"
    assert last[3].text == "Is there a dog in the image?"
    assert last[5].text == "Is there a sofa in the image?"


@pytest.mark.parametrize("kind", pope.KINDS)
def test_questions_alternate_and_are_true(kind):
    questions = build(kind)
    truth = {image: set(objects) for image, objects in PICTURES}
    assert [q.question_id for q in questions] == list(range(1, 19))
    assert [q.label for q in questions] == ["yes", "no"] * 9
    for question in questions:
        name = question.text.split(" ", 3)[3].removesuffix(" in the image?")
        assert (name in truth[question.image]) == (question.label == "yes")
    assert len({(q.image, q.text) for q in questions}) == 18


def test_article_is_right_unless_compatible():
    assert "Is there an apple in the image?" in [q.text for q in build("popular")]
    assert "Is there an apple in the imange?" in [q.text for q in build("popular", compat=True)]


def test_pictures_are_drawn_among_those_with_enough_objects():
    pictures = [*PICTURES, ("4.jpg", ["dog"])]
    chosen = pope_questions.select_pictures(pictures, random.Random(0), count=3)
    assert sorted(image for image, _ in chosen) == ["1.jpg", "2.jpg", "3.jpg"]
    with pytest.raises(InputError, match="needs 4 pictures with at least 3 objects; there are 3"):
        pope_questions.select_pictures(pictures, random.Random(0), count=4)


def test_building_ends_when_no_absent_object_is_left():
    alone = [("1.jpg", ["dog", "cat", "cup"])]
    for kind in pope.KINDS:
        with pytest.raises(InputError, match="every object of the data set"):
            pope.build_questions(alone, kind, random.Random(0))
    with pytest.raises(InputError, match="has 1 objects; 3 are needed"):
        pope.build_questions([("1.jpg", ["dog"])], "random", random.Random(0))
    with pytest.raises(ValueError, match="Unknown kind 'hard'"):
        pope.build_questions(alone, "hard", random.Random(0))


# --- files ----------------------------------------------------------------------------------------

QUESTION = {"question_id": 1, "image": "1.jpg", "text": "Is there a dog?", "label": "yes"}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([QUESTION | {"label": "maybe"}], "label 'maybe' is neither"),
        ([{k: v for k, v in QUESTION.items() if k != "image"}], "question 1: no 'image'"),
        ([QUESTION, QUESTION], "question 2: question_id 1 occurs twice"),
    ],
)
def test_bad_question_files(tmp_path, records, message):
    with pytest.raises(InputError, match=message):
        pope.read_questions(write(tmp_path / "q.jsonl", records))


def answered(path, records):
    questions = [pope.Question(i, "1.jpg", f"Q{i}?", "yes") for i in (1, 2)]
    return pope.match_answers(write(path, records), questions)


def test_answers_are_matched_by_id_or_position(tmp_path):
    by_id = [{"question_id": 2, "text": "b"}, {"question_id": 1, "text": "a"}]
    assert answered(tmp_path / "a.jsonl", by_id) == ["a", "b"]
    by_place = [{"question": "Q1?", "answer": "a"}, {"answer": "b"}]
    assert answered(tmp_path / "a.jsonl", by_place) == ["a", "b"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"answer": "a"}], "1 answers for 2 questions"),
        ([{"answer": "a"}, {"x": 1}], "question 2 has no answer"),
        ([{"answer": "a"}, {"text": "", "error": "no such file"}], "no such file"),
        ([{"question_id": i, "text": "a"} for i in (1, 1)], "record 2: question_id 1 occurs twice"),
        ([{"question_id": i, "text": "a"} for i in (1, 3)], "question_id 3 belongs to no question"),
        ([{"question": "Q2?", "answer": "a"}, {"answer": "b"}], "answer 1 is about 'Q2"),
    ],
)
def test_bad_answer_files(tmp_path, records, message):
    with pytest.raises(InputError, match=message):
        answered(tmp_path / "a.jsonl", records)


def test_bad_arguments():
    with pytest.raises(ValueError, match="Unknown parser 'gpt'; there are: strict"):
        pope.score(["yes"], ["yes"], "gpt")
    with pytest.raises(InputError, match="1 answers for 2 labels"):
        pope.score(["yes"], ["yes", "no"])
    with pytest.raises(InputError, match="no answers"):
        pope.score([], [])
    with pytest.raises(InputError, match="Label 1 is 'ja'"):
        pope.score(["yes"], ["ja"])
