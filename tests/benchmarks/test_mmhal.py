"""MMHal-Bench: golden values, ratings by hand, judges that fail, official files, damaged input."""

import json
import random

import pytest
from golden import golden
from PIL import Image

from benchmarks import mmhal
from benchmarks.judges import ScriptedJudge, judged
from mmlm.errors import InputError

QUESTIONS = mmhal.read_questions()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All pictures: half of them under the published name, half under the id."""
    root = tmp_path_factory.mktemp("mmhal")
    for question in QUESTIONS:
        name = question.address.rpartition("/")[2] if question.index % 2 else question.image_id
        Image.new("RGB", (8, 8)).save(
            root / (name if question.index % 2 else f"{name}.png"),
            "PNG",
        )
    return root


@pytest.fixture
def lines(folder):
    """Stored answers to all questions."""
    return [
        {"id": item.request.id, **item.facts, "prompt": item.request.prompt, "text": "A dog."}
        for item in mmhal.task(QUESTIONS, folder).items
    ]


def rated(lines, replies):
    """Lines judged by a script that gives the replies in order; None is no reply."""
    table = {line["id"]: reply for line, reply in zip(lines, replies, strict=True)}
    return mmhal.judge_answers(lines, ScriptedJudge(lambda prompt: table[prompt.id]))


@pytest.mark.golden
@pytest.mark.parametrize("root", golden("judge_benchmarks*"))
def test_every_printed_value(root, lines):
    expected = json.loads(next(root.glob("expected*.json")).read_text())["mmhal"]
    replies = json.loads(next(root.glob("inputs*.json")).read_text())["mmhal"]
    scores = mmhal.score_stored(rated(lines, replies))
    printed = dict(expected)
    exact = printed.pop("informativeness")
    assert scores.official == printed | {"informativeness": f"{exact:.2f}"}
    assert round(100 * scores.metrics["informativeness"], 6) == exact
    shuffled = random.Random(2).sample(rated(lines, replies), len(lines))
    assert mmhal.score_stored(shuffled).as_json(resamples=9) == scores.as_json(resamples=9)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 5", 5),
        ("The answer is fine. RATING: 0, not informative", 0),
        ("Rating: 6. I repeat, rating: 6", 6),
        ("Rating:5", None),
        ("Rating: 2, perhaps rating: 3", None),
        ("Rating: 7", None),
        ("Rating: 10", 1),  # the official rule looks for the text only
        ("rating 4", None),
        ("", None),
    ],
)
def test_rating_rule(reply, rating):
    assert mmhal.read_rating(reply) == rating


def test_metrics_by_hand(lines):
    replies = ["Rating: 6", "Rating: 2", "Rating: 3", "no idea"] + ["Rating: 4"] * 92
    scores = mmhal.score_stored(rated(lines, replies))
    assert scores.name == "mmhal/scripted/own-prompt"
    assert scores.metrics["rating"] == pytest.approx((6 + 2 + 3 + 0 + 4 * 92) / 96)
    assert scores.metrics["hallucination_rate"] == pytest.approx(2 / 96)
    assert scores.metrics["informativeness"] == pytest.approx((3 + 2 + 0 + 0 + 92) / 96 / 3)
    assert scores.metrics["attribute_rating"] == pytest.approx((6 + 4 * 11) / 12)
    assert scores.metrics["counting_rating"] == pytest.approx(44 / 12)
    assert scores.statuses["reply without one rating"] == 1
    assert [sample.correct for sample in scores.samples[:4]] == [True, False, True, False]
    assert scores.official["average_score"] == "3.95"


def test_the_judge_is_shown_everything_it_needs(lines):
    asked = []
    judge = ScriptedJudge(lambda prompt: asked.append(prompt) or "Rating: 3")
    mmhal.judge_answers([{**lines[0], "text": "It is {red}."}, *lines[1:]], judge)
    assert len(asked) == 96
    for part in ("Fire hydrant", QUESTIONS[0].text, QUESTIONS[0].reference, "It is {red}."):
        assert part in asked[0].text
    assert "{}" not in asked[0].text


def test_a_failing_judge_is_counted_and_official_numbers_withheld(lines):
    scores = mmhal.score_stored(rated(lines, [None] * 3 + ["Rating: 4"] * 93))
    assert scores.statuses["not judged"] == 3
    assert scores.official == {}
    assert scores.metrics["rating"] == 4
    assert scores.counts["judged"] == 93
    assert scores.samples[0].correct is None


def test_a_judge_that_never_replies_gives_undefined_scores(lines):
    scores = mmhal.score_stored(rated(lines, [None] * 96))
    assert scores.statuses["not judged"] == 96
    assert set(scores.metrics.values()) == {None}
    assert scores.as_json(resamples=5)["metrics"]["rating"]["undefined"] is True


def test_failed_answers_are_not_judged_and_counted(lines):
    lines[4] = {**lines[4], "text": None, "error": "cannot read"}
    asked = []
    judge = ScriptedJudge(lambda prompt: asked.append(prompt.id) or "Rating: 3")
    scores = mmhal.score_stored(mmhal.judge_answers(lines, judge))
    assert len(asked) == 95
    assert scores.statuses["failed"] == 1
    assert scores.statuses["not judged"] == 0
    assert scores.official == {}


def test_missing_questions_are_counted(lines):
    scores = mmhal.score_stored(rated(lines[:90], ["Rating: 3"] * 90))
    assert scores.statuses["absent"] == 6
    assert scores.official == {}


def test_without_verdicts_the_error_names_the_command(lines):
    with pytest.raises(InputError, match="not been judged") as refused:
        mmhal.score_stored(lines)
    assert "mmlm score mmhal FILE --judge" in refused.value.advice
    scores = mmhal.score_stored(lines, allow_unjudged=True)
    assert scores.name == "mmhal/not-judged"
    assert scores.statuses["not judged"] == 96


def test_verdicts_stand_beside_the_answers(lines, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mmhal.read_answers(path) == lines
    done = rated(lines, ["Rating: 5"] * 96)
    judged.write_judged(judged.judged_path(path), done)
    assert mmhal.read_answers(path) == done
    assert mmhal.read_answers(tmp_path / "answers.judged.jsonl") == done
    other = [{**lines[0], "text": "A cat."}, *lines[1:]]
    path.write_text("".join(json.dumps(line) + "\n" for line in other))
    with pytest.raises(InputError, match="verdicts on other answers"):
        mmhal.read_answers(path)


def test_files_with_dots_in_their_names_keep_their_verdicts_apart(tmp_path):
    one, other = tmp_path / "llava-1.5.jsonl", tmp_path / "llava-1.6.jsonl"
    assert judged.judged_path(one) != judged.judged_path(other)
    assert judged.judged_path(judged.judged_path(one)) == judged.judged_path(one)


def test_a_second_judge_replaces_the_first(lines):
    first = rated(lines, ["Rating: 5"] * 96)
    second = mmhal.judge_answers(first, ScriptedJudge({"0": "Rating: 1"}, "second"))
    scores = mmhal.score_stored(second)
    assert scores.name == "mmhal/second/own-prompt"
    assert scores.counts["judged"] == 1
    assert scores.metrics["rating"] == 1


def test_two_judges_in_one_file_are_refused(lines):
    done = rated(lines, ["Rating: 5"] * 96)
    done[3]["judge"] = "another"
    with pytest.raises(InputError, match="not all judged by the same judge: another, scripted"):
        mmhal.score_stored(done)
    del done[3]["judge"]
    with pytest.raises(InputError, match="not all judged by the same judge: none, scripted"):
        mmhal.score_stored(done)
    done[3] |= {"judge": done[0]["judge"], "judged": {"rating": 5}}
    with pytest.raises(InputError, match="'judged' does not hold replies"):
        mmhal.score_stored(done)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.clear(), "no answers to score"),
        (lambda lines: lines[2].pop("id"), "Line 3 has no id"),
        (lambda lines: lines[2].update(id="0"), "is there twice"),
        (lambda lines: lines[2].update(index=0), "the index is 0"),
        (lambda lines: lines[2].update(index=96), "the index is 96"),
        (lambda lines: lines[2].update(index=True), "the index is True"),
        (lambda lines: lines[2].update(question_type="other"), "said to be of type 'other'"),
        (lambda lines: lines[2].update(text=float("nan")), "not a text"),
        (lambda lines: lines[2].pop("reference"), "no text in 'reference'"),
    ],
)
def test_damaged_lines_are_refused(lines, change, message):
    change(lines)
    with pytest.raises(InputError, match=message):
        mmhal.score_stored(lines, allow_unjudged=True)


def test_shipped_questions_are_the_official_ones(data_folder):
    assert mmhal.read_questions(data_folder / "mmhal" / "mmhal_bench.json.gz") == QUESTIONS
    assert [question.type for question in QUESTIONS[:8]] == list(mmhal.TYPES)


def test_damaged_question_files_are_refused(data_folder, tmp_path):
    from benchmarks.base import read_json

    records = read_json(data_folder / "mmhal" / "mmhal_bench.json.gz")
    path = tmp_path / "q.json"
    for change, message in (
        (records[:95], "holds 95 questions instead of 96"),
        ([*records[1:], records[0]], "entry 1 is of type 'adversarial'"),
        ([{**records[0], "question": 3}, *records[1:]], "has no 'question'"),
        ([{**records[0], "image_content": "dog"}, *records[1:]], "has no 'image_content'"),
    ):
        path.write_text(json.dumps(change))
        with pytest.raises(InputError, match=message):
            mmhal.read_questions(path)


def test_missing_pictures_are_counted(folder, tmp_path):
    with pytest.raises(InputError, match="96 of 96 pictures are not in"):
        mmhal.find_pictures(QUESTIONS, tmp_path)
    assert len(set(mmhal.find_pictures(QUESTIONS, folder))) == 96


def test_official_files_go_there_and_back(lines, tmp_path, data_folder):
    from benchmarks.base import read_json

    path = tmp_path / "answers.json"
    mmhal.write_official(path, lines, QUESTIONS)
    template = read_json(data_folder / "mmhal" / "mmhal_bench.json.gz")
    assert json.loads(path.read_text()) == [{**r, "model_answer": "A dog."} for r in template]
    reviews = tmp_path / "reviews.json"
    replies = [{"choices": [{"message": {"content": f"Rating: {i % 7}"}}]} for i in range(96)]
    reviews.write_text(json.dumps(replies))
    scores = mmhal.score_stored(mmhal.read_answers(path, reviews, "gpt-4-0314"))
    assert scores.name == "mmhal/gpt-4-0314"
    assert scores.metrics["rating"] == pytest.approx(sum(i % 7 for i in range(96)) / 96)
    for damaged, message in (
        (replies[:5], "list of 96"),
        ([{}, *replies[1:]], "no chat completion"),
        ([{"choices": [{"message": {"content": None}}]}, *replies[1:]], "the reply is None"),
    ):
        reviews.write_text(json.dumps(damaged))
        with pytest.raises(InputError, match=message):
            mmhal.read_answers(path, reviews)
    failed = [{**line, "text": None, "error": "x"} for line in lines]
    with pytest.raises(InputError, match="96 of 96 answers are missing"):
        mmhal.write_official(path, failed, QUESTIONS)
    stored = tmp_path / "own.jsonl"
    stored.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="no official answer file"):
        mmhal.read_answers(stored, reviews)


def test_templates(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("{} / {} / {} / {}!")
    template = judged.read_template(path, mmhal.JUDGE_PARTS)
    assert template.fill("a", "{}", "c", "d") == "a / {} / c / d!"
    assert template.name.startswith("prompt-")
    with pytest.raises(ValueError, match="1 parts for 4 places"):
        template.fill("a")
    path.write_text("{} {}")
    with pytest.raises(InputError, match="has 2 places"):
        judged.read_template(path, mmhal.JUDGE_PARTS)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        judged.read_template(path, mmhal.JUDGE_PARTS)
    with pytest.raises(InputError, match="cannot be read"):
        judged.read_template(tmp_path / "absent", mmhal.JUDGE_PARTS)
