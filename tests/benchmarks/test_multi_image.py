"""MMMU, BLINK, Mantis-Eval and NLVR2: official files in, accuracies out."""

import json
import random

import multi_image_data as data
import pytest
from multi_image_data import answered

from benchmarks.multi_image import blink, mantis, mmmu, nlvr2
from benchmarks.multi_image.questions import digest, mark_pictures
from benchmarks.multi_image.rows import Pictures, read_rows
from mmlm.errors import InputError


@pytest.fixture
def pictures(tmp_path):
    return Pictures(tmp_path / "kept")


# ---- MMMU


def test_mmmu_prompts_and_pictures(tmp_path, pictures):
    first, second, third = mmmu.read_questions(data.mmmu(tmp_path / "set"), pictures)
    assert first.prompt == (
        "What is<image 1>?\nA. a dog\nB. a cat\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (first.subject, first.label, first.options) == ("Art", "B", ("a dog", "a cat"))
    # The picture mentioned first is shown first; named again, it is only named.
    assert second.prompt.startswith("Is<image 1>like<image 2>? Look at <image 1> again.")
    assert [path.read_bytes() for path in second.pictures] == [data.encoded(2), data.encoded(1)]
    assert third.prompt == (
        "<image 1>How many?\n\nAnswer the question using a single word or phrase."
    )
    assert (third.subject, third.options) == ("Math", ())


def test_mmmu_scores_by_hand(tmp_path, pictures):
    task = mmmu.task(mmmu.read_questions(data.mmmu(tmp_path / "set"), pictures))
    scores = mmmu.score_stored(answered(task, "B", "no idea", "It is 3.50"))
    drawn = scores.samples[1].correct
    art = (1 + drawn) / 2
    assert scores.name == "mmmu/validation/last-named"
    assert scores.metrics == {
        "mean_accuracy": pytest.approx((art + 1) / 2),
        "accuracy": pytest.approx((2 + drawn) / 3),
        "Art": art,
        "Math": 1.0,
    }
    assert scores.statuses == {"random option": 1, "not asked, of 900": 897}
    assert scores.official["Overall"] == round((2 + drawn) / 3, 5)
    assert scores.official["Overall-Art and Design"] == art
    assert next(iter(scores.directions)) == "mean_accuracy"
    again = mmmu.score_stored(answered(task, "B", "no idea", "It is 3.50"))
    assert again.metrics == scores.metrics


def test_mmmu_answers_in_the_official_format(tmp_path, pictures):
    questions = mmmu.read_questions(data.mmmu(tmp_path / "set"), pictures)
    lines = answered(mmmu.task(questions), "(B)", "A", "3.5")
    path = tmp_path / "answers.json"
    mmmu.write_official(path, lines)
    assert json.loads(path.read_text()) == {
        "validation_Art_1": "B",
        "validation_Art_2": "A",
        "validation_Math_1": "3.5",
    }
    read = mmmu.read_official(path, questions)
    assert mmmu.score_stored(read).metrics == mmmu.score_stored(lines).metrics
    path.write_text('{"validation_Art_1": "B", "validation_Art_9": "A"}')
    with pytest.raises(InputError, match="2 questions have no answer and 1 answers belong to no"):
        mmmu.read_official(path, questions)
    path.write_text('["A"]')
    with pytest.raises(InputError, match="holds a list"):
        mmmu.read_official(path, questions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "Art1"}, "not like validation_Art_1"),
        ({"image_1": None}, "mentions image 1, which the row does not have"),
        ({"options": "['a'"}, "are no list"),
        ({"options": "['a']"}, "two or more"),
        ({"question": None}, "instead of a text"),
        ({"image_1": {"bytes": None, "path": None}}, "instead of a picture"),
    ],
)
def test_mmmu_rows_that_cannot_be_used(tmp_path, pictures, change, message):
    row = data.mmmu_rows()[0] | change
    path = tmp_path / "validation.jsonl"
    if isinstance(row["image_1"], dict) and row["image_1"]["bytes"]:
        (tmp_path / "1.png").write_bytes(data.encoded(1))
        row["image_1"] = "1.png"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=message):
        mmmu.read_questions(path, pictures)


# ---- BLINK


def test_blink_prompts_pictures_and_rules(tmp_path, pictures):
    questions = blink.read_questions(data.blink(tmp_path / "set"), pictures)
    assert questions[0].prompt == (
        "Note: You only need to respond with A, B without providing any additional information.\n"
        "Question 1?\nSelect from the following choices.\n(A) one\n(B) two"
    )
    assert [len(question.pictures) for question in questions] == [1, 1, 2]
    assert not questions[2].marked
    lines = answered(blink.task(questions), "A", "I think (B)", "(B) two")
    scores = blink.score_stored(lines)
    assert scores.name == "blink/val/first-letter"
    assert scores.metrics == {
        "mean_accuracy": 0.75,
        "accuracy": pytest.approx(2 / 3),
        "Counting": 0.5,
        "Jigsaw": 1.0,
    }
    assert scores.statuses == {"no option": 1, "not asked, of 1901": 1898}
    assert blink.score_stored(lines, "stated-letter").metrics["accuracy"] == 1.0
    path = tmp_path / "blink.json"
    blink.write_official(path, lines)
    assert json.loads(path.read_text()) == {
        "val_Counting_1": "(A)",
        "val_Counting_2": "I think (B)",
        "val_Jigsaw_3": "(B)",
    }
    foreign = blink.score_stored(blink.read_official(path, questions))
    assert foreign.metrics == scores.metrics
    with pytest.raises(ValueError, match="parser must be one of"):
        blink.score_stored(lines, "guess")


def test_blink_secret_answers_leave_the_accuracy_undefined(tmp_path, pictures):
    rows = [row | {"answer": "hidden"} for row in data.blink_rows()]
    data.parquet(tmp_path / "set" / "test-00000-of-00001.parquet", rows)
    questions = blink.read_questions(tmp_path / "set", pictures, "test")
    scores = blink.score_stored(answered(blink.task(questions, "test"), "A", "B", "A"))
    assert scores.metrics["mean_accuracy"] is None
    assert scores.statuses["label is secret"] == 3
    assert scores.as_json()["metrics"]["accuracy"]["undefined"]


def test_blink_answer_that_is_no_option(tmp_path, pictures):
    data.parquet(tmp_path / "val.parquet", data.blink_rows(("(A)", "(C)", "(B)")))
    with pytest.raises(InputError, match="row 2: the answer 'C' is none of A, B"):
        blink.read_questions(tmp_path / "val.parquet", pictures)


# ---- Mantis-Eval


def test_mantis_prompts_and_scores(tmp_path, pictures):
    questions = mantis.read_questions(data.mantis(tmp_path / "set"), pictures)
    assert questions[0].prompt == (
        "<image 1> and <image 2>: which is first?\nAnswer with the option's letter from the given "
        "choices directly.['(A) left', '(B) right']"
    )
    assert [question.marked for question in questions] == [True, False]
    assert questions[1].prompt.startswith("Given the images, answer the following short answer")
    task = mantis.task(questions)
    scores = mantis.score_stored(answered(task, "Answer: b", "Grass.\nFinal Answer: red"))
    assert scores.metrics == {"accuracy": 1.0, "multi-choice": 1.0, "short-answer": 1.0}
    scores = mantis.score_stored(answered(task, "right", "It is red"))
    # "right" begins with R, which is no option; the text of the option counts.
    assert scores.metrics == {"accuracy": 0.5, "multi-choice": 1.0, "short-answer": 0.0}
    assert scores.statuses["read as text"] == 1


def test_marks_must_match_the_pictures():
    assert mark_pictures("a <image> b <image>", 2, "here") == ("a <image 1> b <image 2>", True)
    assert mark_pictures("no marks", 2, "here") == ("no marks", False)
    with pytest.raises(InputError, match="here: the question marks 1 pictures, but has 2"):
        mark_pictures("a <image>", 2, "here")


# ---- NLVR2


def test_nlvr2_from_the_authors_files(tmp_path):
    path = data.nlvr2(tmp_path)
    pictures = Pictures(tmp_path / "kept", tmp_path / "images")
    questions = nlvr2.read_questions(path, pictures)
    assert [path.name for path in questions[1].pictures] == [
        "test1-0-1-img0.png",
        "test1-0-1-img1.png",
    ]
    assert not pictures.missing
    lines = answered(nlvr2.task(questions), "True.", "I would say false")
    scores = nlvr2.score_stored(lines)
    assert scores.name == "nlvr2/test1/true-false"
    assert scores.metrics == {"accuracy": 0.5, "consistency": 0.0}
    assert scores.statuses["no option"] == 1
    nlvr2.write_official(tmp_path / "p.csv", lines)
    assert (tmp_path / "p.csv").read_text() == "test1-0-0-0,True\ntest1-0-1-0,None\n"
    read = nlvr2.read_official(tmp_path / "p.csv", questions)
    assert nlvr2.score_stored(read).metrics == scores.metrics
    both = nlvr2.score_stored(answered(nlvr2.task(questions), "true", "FALSE, because"))
    assert both.metrics == {"accuracy": 1.0, "consistency": 1.0}


def test_nlvr2_as_a_choice(tmp_path):
    pictures = Pictures(tmp_path / "kept", tmp_path / "images")
    questions = nlvr2.read_questions(data.nlvr2(tmp_path), pictures, prompt="choice")
    task = nlvr2.task(questions, prompt="choice")
    assert nlvr2.score_stored(answered(task, "A", "(B) False")).metrics["accuracy"] == 1.0
    mixed = answered(task, "A", "B")
    mixed[0]["asked"] = "true-false"
    with pytest.raises(InputError, match="several prompts"):
        nlvr2.score_stored(mixed)


def test_missing_pictures_are_counted_and_named(tmp_path):
    path = data.nlvr2(tmp_path)
    pictures = Pictures(tmp_path / "kept", tmp_path / "elsewhere")
    nlvr2.read_questions(path, pictures)
    with pytest.raises(InputError, match=r"4 pictures are missing.*test1-0-0-img0\.png"):
        pictures.check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"test1-0-0-0\n", "has not two fields"),
        (b"test1-0-0-0,True\ntest1-0-0-0,True\n", "occurs twice"),
        (b"test1-0-0-0,True\n", "1 questions have no answer"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_nlvr2_predictions_that_cannot_be_scored(tmp_path, text, message):
    pictures = Pictures(tmp_path / "kept", tmp_path / "images")
    questions = nlvr2.read_questions(data.nlvr2(tmp_path), pictures)
    (tmp_path / "p.csv").write_bytes(text)
    with pytest.raises(InputError, match=message):
        nlvr2.read_official(tmp_path / "p.csv", questions)


# ---- what all share


def test_split_must_be_there(tmp_path, pictures):
    folder = data.mmmu(tmp_path / "set")
    assert len(mmmu.read_questions(folder, pictures, "dev")) == 1
    with pytest.raises(InputError, match="no split 'test'; there are: dev, validation"):
        mmmu.read_questions(folder, pictures, "test")
    with pytest.raises(InputError, match="There is no data"):
        list(read_rows(tmp_path / "nothing", "test"))
    (folder / "Art" / "validation-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        mmmu.read_questions(folder, pictures)


def test_saved_data_sets_are_read_like_parquet(tmp_path, pictures):
    import datasets

    rows = data.blink_rows()
    kinds = datasets.Features(
        {name: datasets.Value("string") for name in ("idx", "sub_task", "prompt", "answer")}
        | {"choices": datasets.List(datasets.Value("string"))}
        | {f"image_{number}": datasets.Image() for number in (1, 2, 3)}
    )
    saved = datasets.Dataset.from_list(rows, features=kinds)
    datasets.DatasetDict({"val": saved}).save_to_disk(tmp_path / "both")
    saved.save_to_disk(tmp_path / "one")
    expected = blink.read_questions(data.blink(tmp_path / "set"), pictures)
    assert blink.read_questions(tmp_path / "both", pictures) == expected
    assert blink.read_questions(tmp_path / "one", pictures) == expected
    with pytest.raises(InputError, match="no split 'test'; there are: val"):
        blink.read_questions(tmp_path / "both", pictures, "test")


def test_data_hash_sees_every_change(tmp_path, pictures):
    questions = blink.read_questions(data.blink(tmp_path / "set"), pictures)
    whole = digest(blink.task(questions))
    assert digest(blink.task(questions)) == whole
    assert digest(blink.task(questions[:2])) != whole
    rows = data.blink_rows()
    rows[0]["image_1"] = data.inside(77)
    data.parquet(tmp_path / "val.parquet", rows)
    changed = blink.read_questions(tmp_path / "val.parquet", pictures)
    assert digest(blink.task(changed)) != whole


def test_double_ids_are_refused(tmp_path, pictures):
    questions = blink.read_questions(data.blink(tmp_path / "set"), pictures)
    with pytest.raises(InputError, match="'val_Counting_1' occurs 2 times"):
        blink.task([*questions, questions[0]])
    with pytest.raises(InputError, match="no questions"):
        blink.task([])


@pytest.fixture
def lines(tmp_path, pictures):
    questions = blink.read_questions(data.blink(tmp_path / "set"), pictures)
    return answered(blink.task(questions), "A", "A", "B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "Line 2 has no id"),
        ({"id": "val_Counting_1"}, "'val_Counting_1' is there twice"),
        ({"text": float("nan")}, "Line 2 has nan in 'text'"),
        ({"text": None}, "Line 2 has None in 'text'"),
        ({"benchmark": "mmmu"}, "Line 2 is of 'mmmu', not of 'blink'"),
        ({"split": "test"}, "several splits"),
        ({"subject": 3}, "Line 2 has 3 in 'subject'"),
    ],
)
def test_damaged_lines_are_refused(lines, change, message):
    lines[1] |= change
    with pytest.raises(InputError, match=message):
        blink.score_stored(lines)


def test_failed_lines_are_counted(lines):
    lines[0] |= {"text": None, "error": "out of pictures"}
    scores = blink.score_stored(lines)
    assert scores.statuses["failed"] == 1
    assert scores.metrics["accuracy"] == 0.5
    with pytest.raises(InputError, match="None of 1 lines holds an answer"):
        blink.score_stored(lines[:1])
    with pytest.raises(InputError, match="None of 0 lines"):
        blink.score_stored([])


def test_order_does_not_matter_and_doubling_changes_nothing(lines):
    scores = blink.score_stored(lines)
    shuffled = random.Random(3).sample(lines, len(lines))
    assert blink.score_stored(shuffled).as_json() == scores.as_json()
    twice = lines + [line | {"id": line["id"] + "-again"} for line in lines]
    assert blink.score_stored(twice).metrics == scores.metrics
