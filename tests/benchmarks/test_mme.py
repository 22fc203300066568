"""MME's hallucination subset: files in both layouts, the reading rule, points, damaged input."""

import random

import pytest
from PIL import Image

from benchmarks import mme
from mmlm.errors import InputError


def build(root, *, apart=False, per_category=2, categories=mme.CATEGORIES):
    """An official folder with pictures 0.jpg, 1.jpg, ... in each category."""
    for category in categories:
        pictures, texts = root / category, root / category
        if apart:
            pictures, texts = pictures / "images", texts / "questions_answers_YN"
        for folder in {pictures, texts}:
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_category):
            Image.new("RGB", (8, 8), (number, 9, 9)).save(pictures / f"{number}.jpg")
            (texts / f"{number}.txt").write_text(
                f"Is there a {category} {number}? Please answer yes or no.\tYes\n"
                f"Is there no {category} {number}? Please answer yes or no.\tNo\n"
            )
    return root


def answered(root, answers):
    """Stored lines with the given answers, two per picture, repeated."""
    items = mme.task(mme.read_questions(root)).items
    texts = [answers[i % len(answers)] for i in range(len(items))]
    return [
        {"id": item.request.id, **item.facts, "prompt": item.request.prompt, "text": text}
        for item, text in zip(items, texts, strict=True)
    ]


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "mme")


@pytest.mark.parametrize("apart", [False, True])
def test_both_layouts_give_the_same_questions(tmp_path, apart):
    questions = mme.read_questions(build(tmp_path, apart=apart))
    assert [q.id for q in questions[:3]] == [
        "existence/0.jpg#1",
        "existence/0.jpg#2",
        "existence/1.jpg#1",
    ]
    assert len(questions) == 16
    assert {q.label for q in questions} == {"yes", "no"}
    assert all(q.path.is_file() for q in questions)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        (" no. ", "no"),
        ("Y", "yes"),
        ("n.", "no"),
        ("x", None),
        ("", None),
        ("Yes, there is no dog.", "yes"),  # the first four characters only
        ("A yes", None),  # "a ye"
        ("I no", "no"),
        ("Not sure", "no"),
        ("Nyes", "yes"),
        ("The answer is yes", None),
        ("1. no", "no"),  # full stops vanish first: "1 no"
    ],
)
def test_reading_rule(answer, read):
    assert mme.read_yes_no(answer) == read


def test_points_by_hand(folder):
    # Of two pictures per category: the first both right, the second one right.
    scores = mme.score_stored(answered(folder, ["Yes", "No", "Yes", "Yes"]))
    assert scores.official == dict.fromkeys(mme.CATEGORIES, "125.00") | {"total": "500.00"}
    assert scores.metrics["existence_points"] == pytest.approx(75 + 50)
    assert scores.metrics["accuracy"] == 0.75
    assert scores.metrics["accuracy_plus"] == 0.5
    assert scores.metrics["yes_ratio"] == 0.75
    assert next(iter(scores.table.ratios)) == "total_points"
    assert [sample.correct for sample in scores.samples[:4]] == [True, True, True, False]


@pytest.mark.parametrize(
    ("answers", "total"), [(["Yes"], 200), (["Yes", "No"], 800), (["No", "Yes"], 0), (["Hm"], 0)]
)
def test_extremes(folder, answers, total):
    scores = mme.score_stored(answered(folder, answers))
    assert scores.metrics["total_points"] == pytest.approx(total)
    assert scores.statuses["neither yes nor no"] == (16 if answers == ["Hm"] else 0)


def test_against_a_naive_count(folder):
    generator = random.Random(3)
    for _ in range(20):
        lines = answered(folder, [generator.choice(["Yes", "no", "?"]) for _ in range(16)])
        total = 0.0
        for category in mme.CATEGORIES:
            mine = [line for line in lines if line["category"] == category]
            right = {}
            for line in mine:
                said = {"Yes": "yes", "no": "no", "?": None}[line["text"]]
                right.setdefault(line["image"], []).append(said == line["label"])
            hits = [hit for pair in right.values() for hit in pair]
            total += 100 * sum(hits) / len(hits)
            total += 100 * sum(all(pair) for pair in right.values()) / len(right)
        assert mme.score_stored(lines).metrics["total_points"] == pytest.approx(total)


def test_order_of_lines_changes_nothing(folder):
    lines = answered(folder, ["Yes", "No", "Yes", "Hm"])
    shuffled = random.Random(1).sample(lines, len(lines))
    one, other = mme.score_stored(lines), mme.score_stored(shuffled)
    assert one.as_json(resamples=50) == other.as_json(resamples=50)


def test_a_category_that_was_not_asked_leaves_the_total_undefined(tmp_path):
    root = build(tmp_path, categories=("existence", "count"))
    questions = mme.read_questions(root, ("existence", "count"))
    assert len(questions) == 8
    with pytest.raises(InputError, match="no folder for: position, color"):
        mme.read_questions(root)
    build(root, categories=("position", "color"))
    lines = [x for x in answered(root, ["Yes", "No"]) if x["category"] in ("existence", "count")]
    scores = mme.score_stored(lines)
    assert scores.official["existence"] == "200.00"
    assert scores.official["position"] is None
    assert scores.official["total"] is None
    assert scores.as_json(resamples=20)["metrics"]["total_points"]["undefined"] is True


def test_a_failed_answer_leaves_its_picture_out(folder):
    lines = answered(folder, ["Yes", "No"])
    lines[1] = {**lines[1], "text": None, "error": "cannot read"}
    scores = mme.score_stored(lines)
    assert scores.statuses == {"neither yes nor no": 0, "failed": 1, "pictures left out": 1}
    assert scores.counts["questions"] == 14
    assert len(scores.samples) == 15
    with pytest.raises(InputError, match="None of 8 pictures"):
        mme.score_stored([{**line, "text": None, "error": "x"} for line in lines])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(), "1 pictures do not have two questions"),
        (lambda lines: lines[2].pop("id"), "Line 3 has no id"),
        (lambda lines: lines[2].update(id=lines[0]["id"]), "is there twice"),
        (lambda lines: lines[2].update(text=float("nan")), "the answer is nan, not a text"),
        (lambda lines: lines[2].update(text=None), "the answer is None, not a text"),
        (lambda lines: lines[2].pop("label"), "no text in 'label'"),
        (lambda lines: lines[2].update(label="maybe"), "label 'maybe'"),
        (lambda lines: lines[2].update(category="scene"), "category 'scene'"),
    ],
)
def test_damaged_lines_are_refused(folder, change, message):
    lines = answered(folder, ["Yes"])
    change(lines)
    with pytest.raises(InputError, match=message) as refused:
        mme.score_stored(lines)
    assert refused.value.advice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (c / "0.txt").unlink(), "2 pictures and 1 texts; 1 without counterpart: 0"),
        (lambda c: (c / "0.jpg").unlink(), "1 pictures and 2 texts; 1 without counterpart: 0"),
        (lambda c: (c / "0.txt").write_text("Is it? \tYes\n"), "holds 1 questions"),
        (lambda c: (c / "0.txt").write_text(""), "holds 0 questions"),
        (lambda c: (c / "0.txt").write_text("A? Yes\nB?\tNo\n"), "not of the form question TAB"),
        (lambda c: (c / "0.txt").write_text("A?\tperhaps\nB?\tNo\n"), "not of the form"),
        (lambda c: (c / "0.txt").write_bytes(b"A?\tYes\n\xff?\tNo\n"), "not UTF-8"),
        (lambda c: (c / "0.png").write_bytes(b""), "more than one picture named '0'"),
        (lambda c: (c / "images").mkdir(), "There is no folder"),
    ],
)
def test_damaged_folders_are_refused(folder, change, message):
    change(folder / "count")
    with pytest.raises(InputError, match=message):
        mme.read_questions(folder)


def test_prompts(folder):
    questions = mme.read_questions(folder)
    official = mme.task(questions).items[0].request.prompt
    assert official == "Is there a existence 0? Please answer yes or no."
    llava = mme.task(questions, "llava").items[0].request.prompt
    assert llava == "Is there a existence 0?\nAnswer the question using a single word or phrase."
    with pytest.raises(ValueError, match="Unknown prompt 'x'"):
        mme.task(questions, "x")
    with pytest.raises(InputError, match="no questions"):
        mme.task([])


def test_official_files_go_there_and_back(folder, tmp_path):
    lines = answered(folder, ["Yes", "No\nnot\tyes", "yes", "N"])
    paths = mme.write_official(tmp_path / "results", lines)
    assert [path.name for path in paths] == [f"{name}.txt" for name in mme.CATEGORIES]
    first = paths[0].read_text().splitlines()
    assert first[1].split("\t")[2:] == ["No", "No not yes"]
    back = mme.read_official(tmp_path / "results")
    assert mme.score_stored(back).official == mme.score_stored(lines).official
    assert [line["id"] for line in back] == [line["id"] for line in lines]
    paths[0].write_text("0.jpg\tIs it?\tYes\n")
    with pytest.raises(InputError, match="3 columns instead of 4"):
        mme.read_official(tmp_path / "results")
    with pytest.raises(InputError, match="holds none of"):
        mme.read_official(tmp_path)
    with pytest.raises(InputError, match="has no answer"):
        mme.write_official(tmp_path / "r", [{**lines[0], "text": None, "error": "x"}])
