"""MMBench: official tables in, circular and vanilla accuracies out."""

import base64
import json
import random

import multi_image_data as data
import pytest

from benchmarks import mmbench
from benchmarks.judges import ScriptedJudge
from benchmarks.mmbench.files import SHIFT, Edition
from benchmarks.multi_image.rows import Pictures
from mmlm.errors import InputError

COLUMNS = "index question hint A B C D answer category l2-category image".split()
EDITION = Edition("v1.1", "dev", "en")


def image(seed):
    return base64.b64encode(data.encoded(seed)).decode()


def row(index, options, answer, hint="", seed=1, group="attribute reasoning", **more):
    letters = dict(zip("ABCD", [*options, "", ""], strict=False))
    given = {"index": index, "question": f"Question {index}?", "hint": hint, "answer": answer}
    return {**given, **letters, "category": "x", "l2-category": group, "image": image(seed), **more}


def table(path, rows, columns=COLUMNS):
    lines = ["\t".join(columns), *("\t".join(str(one[name]) for name in columns) for one in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


ROWS = [
    row(3, ["a dog", "a cat", "None"], "B", hint="Look closely."),
    row(7, ["yes", "no"], "A", seed=2, hint="nan", group="logic reasoning"),
]


@pytest.fixture
def pictures(tmp_path):
    return Pictures(tmp_path / "kept")


@pytest.fixture
def problems(tmp_path, pictures):
    return mmbench.read_problems(table(tmp_path / "MMBench_DEV_EN_V11.tsv", ROWS), pictures)


def answered(problems, say, way="circular"):
    task = mmbench.task(problems, EDITION, way)
    return [
        {"id": item.request.id, **item.facts, "text": say(problem)}
        for item, problem in zip(task.items, problems, strict=True)
    ]


def test_every_cyclic_shift_is_asked(problems):
    assert [problem.index for problem in problems] == [
        3,
        3 + SHIFT,
        3 + 2 * SHIFT,
        7,
        7 + SHIFT,
    ]
    assert [list(problem.options.values()) for problem in problems[:3]] == [
        ["a dog", "a cat", "None"],
        ["a cat", "None", "a dog"],
        ["None", "a dog", "a cat"],
    ]
    # The right option is the same text in every shift.
    assert {problem.options[problem.answer] for problem in problems[:3]} == {"a cat"}
    assert {problem.options[problem.answer] for problem in problems[3:]} == {"yes"}
    assert problems[0].image.read_bytes() == data.encoded(1)


def test_prompt_is_that_of_lmms_eval(problems):
    first, *_, last = mmbench.task(problems, EDITION).items
    assert first.request.prompt == (
        "Look closely. Question 3? There are several options:\nA. a dog\nB. a cat\nC. None\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert last.request.prompt.startswith("Question 7? There are several options:\nA. no\nB. yes\n")
    chinese = mmbench.task(problems, Edition("v1.1", "dev", "cn")).items[0].request.prompt
    assert chinese.endswith("\n\n请直接使用所提供的选项字母作为答案回答。")


def test_scores_by_hand(problems):
    lines = answered(problems, lambda one: one.answer)
    lines[2]["text"] = "C"  # right letter of another shift
    lines[2]["text"] = "A" if problems[2].answer != "A" else "B"
    scores = mmbench.score_stored(lines)
    assert scores.name == "mmbench/v1.1-dev-en/circular"
    assert scores.metrics == {
        "circular_accuracy": 0.5,
        "vanilla_accuracy": 1.0,
        "shift_accuracy": 0.8,
        "attribute reasoning": 0.0,
        "logic reasoning": 1.0,
    }
    assert scores.official == {"Overall": 50.0, "x": 50.0}
    assert (scores.counts["right"], scores.counts["wrong"]) == (1, 1)
    assert [sample.correct for sample in scores.samples] == [True, True, False, True, True]


def test_always_the_same_letter_is_never_circularly_right(problems):
    lines = answered(problems, lambda one: "B")
    assert mmbench.score_stored(lines).metrics["circular_accuracy"] == 0.0
    assert mmbench.score_stored(lines).metrics["vanilla_accuracy"] == 0.5


def test_vanilla_asks_the_first_order_only(tmp_path, pictures):
    path = table(tmp_path / "t.tsv", ROWS)
    problems = mmbench.read_problems(path, pictures, "vanilla")
    scores = mmbench.score_stored(answered(problems, lambda one: one.answer, "vanilla"))
    assert scores.name == "mmbench/v1.1-dev-en/vanilla"
    assert next(iter(scores.metrics)) == "vanilla_accuracy"
    assert "circular_accuracy" not in scores.metrics


def test_table_with_the_shifts_in_it_means_the_same(tmp_path, pictures, problems):
    rows = [
        row(one.index, list(one.options.values()), one.answer, hint=one.hint, group=one.group)
        | {"image": image(1 if one.number == 3 else 2), "question": one.question}
        for one in problems
    ]
    for number in (1, 2):
        rows[number]["image"] = "3"  # the picture of the row with this index
    random.Random(1).shuffle(rows)
    expanded = mmbench.read_problems(table(tmp_path / "v1.tsv", rows), pictures)
    assert [(one.index, one.options, one.answer, one.image) for one in expanded] == [
        (one.index, one.options, one.answer, one.image) for one in problems
    ]
    rows = [one for one in rows if one["index"] != 3 + SHIFT]
    with pytest.raises(InputError, match="question 3 has 3 options, but the shifts 0, 2"):
        mmbench.read_problems(table(tmp_path / "v1.tsv", rows), pictures)


@pytest.mark.parametrize(
    ("name", "edition"),
    [
        ("MMBench_DEV_EN_V11.tsv", "v1.1-dev-en"),
        ("MMBench_TEST_CN.tsv", "v1.0-test-cn"),
        ("mmbench_dev_20230712.tsv", "v1.0-dev-en"),
        ("table.tsv", "None"),
    ],
)
def test_editions_by_file_name(tmp_path, name, edition):
    assert str(mmbench.recognise(tmp_path / name)) == edition


def test_judge_is_asked_about_unreadable_replies_only(problems):
    lines = answered(problems, lambda one: one.answer)
    lines[0]["text"] = "the feline"
    lines[3]["text"] = "hm"
    asked = []

    def reply(prompt):
        asked.append(prompt)
        return "B" if "the feline" in prompt.text else None

    assert mmbench.score_stored(lines).statuses == {"no option": 2}
    scores = mmbench.score_stored(lines, ScriptedJudge(reply))
    assert scores.name == "mmbench/v1.1-dev-en/circular/judge=scripted"
    assert [prompt.id for prompt in asked] == ["3", "7"]
    assert "Question: Question 3??\nOptions: There are several options: \nA. a dog" in asked[0].text
    assert scores.statuses == {"judged": 1, "not judged": 1}
    assert scores.metrics["circular_accuracy"] == 0.5


def test_official_table_there_and_back(tmp_path, problems):
    lines = answered(problems, lambda one: f'({one.answer})\twith a tab, "quotes"\nand a line')
    path = tmp_path / "predictions.tsv"
    mmbench.write_official(path, lines)
    read = mmbench.read_official(path, EDITION)
    assert [line["text"] for line in read] == [line["text"] for line in lines]
    assert [line["options"] for line in read] == [line["options"] for line in lines]
    assert mmbench.score_stored(read).metrics == mmbench.score_stored(lines).metrics
    with pytest.raises(InputError, match="no column 'prediction'"):
        mmbench.read_official(table(tmp_path / "t.tsv", ROWS), EDITION)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": "x"}, "row 2: the index 'x' is no number"),
        ({"index": 3}, "index 3 occurs 2 times"),
        ({"image": "no base64!"}, "row 2: the picture is no base64"),
        ({"image": "99"}, "row 2: the picture is no base64"),
        ({"answer": "C"}, "row 2: the answer 'C' is none of A, B"),
        ({"B": ""}, "fewer than two options|none of"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, pictures, change, message):
    rows = [ROWS[0], ROWS[1] | change]
    with pytest.raises(InputError, match=message):
        mmbench.read_problems(table(tmp_path / "t.tsv", rows), pictures)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"index\tquestion\n", "holds no rows"),
        (b"index\tquestion\n1\twhat\n", "has no column 'A'"),
        (b"index\tquestion\n1\t\xff\xfe\n", "cannot be read"),
        (b"index\tquestion\n1\ta\tb\tc\td\n1\ta\n", "has no column|cannot be read"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, pictures, content, message):
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        mmbench.read_problems(tmp_path / "t.tsv", pictures)


def test_missing_file(tmp_path, pictures):
    with pytest.raises(InputError, match="cannot be read"):
        mmbench.read_problems(tmp_path / "t.tsv", pictures)
    with pytest.raises(InputError, match="no questions"):
        mmbench.task([], EDITION)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "3"}, "'3' is there twice"),
        ({"text": float("nan")}, "has nan in 'text'"),
        ({"text": None}, "has None in 'text'"),
        ({"benchmark": "pope"}, "is of 'pope', not of 'mmbench'"),
        ({"edition": "v1.0-dev-en"}, "several runs"),
        ({"way": "vanilla"}, "several runs"),
    ],
)
def test_damaged_lines_are_refused(problems, change, message):
    lines = answered(problems, lambda one: one.answer)
    lines[1] |= change
    with pytest.raises(InputError, match=message):
        mmbench.score_stored(lines)


def test_question_without_all_its_shifts_is_refused_and_a_failed_one_counted(problems):
    lines = answered(problems, lambda one: one.answer)
    with pytest.raises(InputError, match=r"Question 3 was asked with the shifts \[0, 2\]"):
        mmbench.score_stored(lines[:1] + lines[2:])
    lines[1] |= {"text": None, "error": "no picture"}
    scores = mmbench.score_stored(lines)
    assert scores.statuses == {"failed": 1, "question with a failed shift": 1}
    assert scores.counts["problems"] == 1
    with pytest.raises(InputError, match="No question has answers to all its shifts"):
        mmbench.score_stored(lines[:3])


def test_secret_answers_leave_the_accuracy_undefined(tmp_path, pictures):
    rows = [one | {"answer": ""} for one in ROWS]
    path = table(tmp_path / "MMBench_TEST_EN_V11.tsv", rows)
    problems = mmbench.read_problems(path, pictures)
    scores = mmbench.score_stored(answered(problems, lambda one: "A"))
    assert scores.metrics["circular_accuracy"] is None
    assert scores.statuses["label is secret"] == 5
    assert scores.official == {}
    json.dumps(scores.as_json(), allow_nan=False)


def test_order_does_not_matter(problems):
    lines = answered(problems, lambda one: "B")
    shuffled = random.Random(5).sample(lines, len(lines))
    assert mmbench.score_stored(shuffled).as_json() == mmbench.score_stored(lines).as_json()
