"""POPE's stored answers: published questions, conversations, the authors' files, bad lines."""

import dataclasses
import json
import random

import pytest

from benchmarks import pope
from benchmarks.complete import require_complete
from benchmarks.pope import answers as pope_answers
from benchmarks.pope import questions as pope_questions
from mmlm.errors import InputError

VERSION = "coco-2023-11"
SAID = ("Yes", "No", "Yes, there is.", "no, not at all.", "NO", "hm", "There is no doubt. No.", "")


def stored(version=VERSION, kinds=pope.KINDS, seed=0):
    """One line per published question, with an answer of every sort."""
    source = random.Random(seed)
    return [
        {
            "id": f"{kind}-{q.question_id}",
            "split": kind,
            "version": version,
            "image": q.image,
            "question_id": q.question_id,
            "question": q.text,
            "label": q.label,
            "prompt": q.text,
            "text": source.choice(SAID),
            "n_tokens": 2,
        }
        for kind in kinds
        for q in pope.published(version)[kind]
    ]


@pytest.fixture(scope="module")
def lines():
    return stored(kinds=("popular",))


# --- the questions that ship ----------------------------------------------------------------------


@pytest.mark.parametrize("version", pope.VERSIONS)
def test_shipped_questions_are_the_published_ones(version):
    for kind, questions in pope.published(version).items():
        assert pope.recognise(questions) == (version, kind)
        assert [q.question_id for q in questions] == list(range(1, len(questions) + 1))
        assert len({q.image for q in questions}) == 500
        yes = sum(q.label == "yes" for q in questions)
        short = (version, kind) == ("coco-legacy", "random")
        assert (yes, len(questions) - yes) == ((1500, 1410) if short else (1500, 1500))


def test_unknown_version():
    with pytest.raises(InputError, match="no version 'coco' of POPE") as caught:
        pope.published("coco")
    assert "coco-2023-11, coco-legacy, aokvqa, gqa" in caught.value.advice


def test_digest_tells_questions_apart():
    questions = pope.published(VERSION)["random"]
    assert pope_questions.digest(questions) != pope_questions.digest(questions[1:])
    assert pope_questions.digest(questions) == pope_questions.digest(list(questions))


# --- tasks ----------------------------------------------------------------------------------------

QUESTIONS = [
    pope.Question(1, "a.png", "Q1?", "yes"),
    pope.Question(2, "a.png", "Q2?", "no"),
    pope.Question(3, "b.png", "Q3?", "yes"),
    pope.Question(4, "a.png", "Q4?", "no"),  # back to the first picture
]


def test_task_asks_every_question_alone(tmp_path):
    task = pope.task({"mine": QUESTIONS}, tmp_path, suffix=" !", parser="vcd")
    assert task.metric == "pope/custom/vcd"
    assert [item.request.id for item in task.items] == ["mine-1", "mine-2", "mine-3", "mine-4"]
    assert task.items[1].request.prompt == "Q2? !"
    assert task.items[1].request.images == (tmp_path / "a.png",)
    assert task.items[1].facts == {
        "split": "mine",
        "version": "custom",
        "question_id": 2,
        "question": "Q2?",
        "label": "no",
        "image": "a.png",
    }


def test_task_of_conversations(tmp_path):
    task = pope.task({"mine": QUESTIONS}, tmp_path, suffix=" !", chat=True)
    assert task.metric == "pope/custom/chat/strict"
    first, second = task.items
    assert (first.request.id, second.request.id) == ("mine-a.png", "mine-b.png")
    assert (first.request.prompt, first.request.follow_ups) == ("Q1? !", ("Q2? !", "Q4? !"))
    assert second.request.follow_ups == ()
    assert [asked["question_id"] for asked in first.facts["questions"]] == [1, 2, 4]


def test_task_of_published_questions_names_their_version(tmp_path):
    splits = pope.published("coco-legacy")
    task = pope.task(splits, tmp_path, version="ignored", parser="official", chat=True)
    assert task.metric == "pope/coco-legacy/chat/official"
    assert len(task.items) == 1500
    assert {len(item.request.follow_ups) for item in task.items} == {3, 4, 5}


def test_task_needs_questions(tmp_path):
    with pytest.raises(InputError, match="no questions"):
        pope.task({"random": []}, tmp_path)


def conversation(**change):
    """A stored conversation about picture a, as `mmlm bench pope --chat` writes it."""
    task = pope.task({"mine": QUESTIONS}, pope_answers.Path("x"), chat=True)
    item = task.items[0]
    turns = [
        {"prompt": "Q1?", "text": "yes", "n_tokens": 2},
        {"prompt": "Q2?", "text": "no", "n_tokens": 2},
        {"prompt": "Q4?", "text": "yes", "n_tokens": 2},
    ]
    line = {"id": item.request.id, **item.facts, "text": "yes", "n_tokens": 6, "turns": turns}
    return line | change


def test_conversations_are_scored_like_single_questions():
    alone = [
        {"id": f"mine-{n}", "split": "mine", "version": "custom", "image": "a.png"}
        | {"question_id": n, "question": f"Q{n}?", "label": label, "text": text}
        for n, label, text in ((1, "yes", "yes"), (2, "no", "no"), (4, "no", "yes"))
    ]
    chat, single = pope.score_stored([conversation()]), pope.score_stored(alone)
    assert chat.name == "pope/custom/chat/strict"
    assert single.name == "pope/custom/strict"
    assert chat.metrics == single.metrics
    assert chat.splits["mine"].counts == single.splits["mine"].counts
    assert [s.answer for s in chat.samples] == ["yes", "no", "yes"]
    assert [s.id for s in chat.samples] == ["mine-1", "mine-2", "mine-4"]


def test_a_failed_conversation_counts_all_its_questions():
    failed = conversation(id="mine-b", error="no such file")
    summary = pope.score_stored([conversation(), failed])
    assert summary.statuses == {"failed": 3}
    assert summary.splits["mine"].counts["answers"] == 3


def test_conversations_and_single_questions_do_not_mix():
    single = conversation(id="s", text="no", label="no", question="Q9?", question_id=9)
    del single["questions"]
    with pytest.raises(InputError, match="mixes single questions and conversations"):
        pope.score_stored([conversation(), single])
    results = {
        name: dataclasses.replace(pope.score(["yes"], ["yes"]), chat=chat)
        for name, chat in (("random", True), ("popular", False))
    }
    with pytest.raises(ValueError, match="one parser"):
        pope.summarize(results)


# --- scores in the common shape -------------------------------------------------------------------


def test_summary_is_a_scored_file():
    summary = pope.score_stored(stored())
    assert summary.name == "pope/coco-2023-11/strict"
    assert list(summary.directions) == list(summary.table.ratios)
    assert next(iter(summary.directions)) == "mean_accuracy"
    assert summary.directions["random_yes_ratio"] == "none"
    assert summary.statuses == {}
    sums = summary.table.sums()
    assert set(summary.good) | set(summary.bad) <= sums.keys()
    assert sum(sums[name] for name in (*summary.good, *summary.bad)) == 9000
    assert len(summary.samples) == 9000
    right = sum(sample.correct for sample in summary.samples)
    assert right == sum(sums[name] for name in summary.good)
    for name, result in summary.splits.items():
        assert summary.table.measure(f"{name}_f1").value == result.metrics["f1"]
        assert next(iter(result.directions)) == "accuracy"
        assert set(result.good) | set(result.bad) <= result.counts.keys()
    record = summary.as_json(resamples=20)
    assert json.loads(json.dumps(record)) == record
    assert set(record["means"]) == {"mean_accuracy", "mean_f1", "mean_yes_ratio"}


def test_sample_says_what_was_expected_and_read(lines):
    line = lines[0] | {"text": "No."}
    sample = pope.score_stored([line]).samples[0]
    assert (sample.id, sample.image) == ("popular-1", line["image"])
    assert (sample.question, sample.answer, sample.correct) == (line["question"], "No.", False)
    assert sample.note == "popular: expected yes, read as no"
    line = lines[0] | {"text": "perhaps"}
    assert pope.score_stored([line]).samples[0].note.endswith("expected yes, read as neither")


def test_directions_survive_split_names_with_underscores():
    summary = pope.summarize({"my_own_split": pope.score(["yes"], ["yes"])})
    assert summary.directions["my_own_split_yes_ratio"] == "none"
    assert summary.good == ("my_own_split.tp", "my_own_split.tn")


def test_order_of_lines_is_irrelevant(lines):
    shuffled = random.Random(1).sample(lines, len(lines))
    once, again = (pope.score_stored(order).as_json(resamples=20) for order in (lines, shuffled))
    assert once == again


def test_llava_average_needs_all_questions_alone():
    lines = stored("coco-legacy")
    assert pope.score_stored(lines, "official").llava_average is not None
    assert pope.score_stored(lines, "strict").llava_average is None
    assert pope.score_stored(lines[:-1], "official").llava_average is None


# --- the authors' files ---------------------------------------------------------------------------


def official_script(answers, questions):
    """What the authors' evaluation does with an answer file and a question file."""
    said = []
    for row in answers.read_text(encoding="utf-8").splitlines():
        text = json.loads(row)["answer"]
        if "." in text:
            text = text.split(".")[0]
        words = text.replace(",", "").split(" ")
        said.append("No" not in words and "not" not in words and "no" not in words)
    labels = [json.loads(row)["label"] == "yes" for row in questions.read_text().splitlines()]
    pairs = list(zip(said, labels, strict=True))
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    tn, fn = pairs.count((False, False)), pairs.count((False, True))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": said.count(True) / len(said),
    }


def test_exported_files_give_the_official_script_our_numbers(tmp_path):
    lines = stored()
    random.Random(2).shuffle(lines)  # the export stands in question order whatever the lines' is
    written = pope.write_official(tmp_path / "out", lines)
    assert len(written) == 6
    summary = pope.score_stored(lines, "official")
    for kind in pope.KINDS:
        answers, questions = (
            tmp_path / "out" / f"{part}_{kind}.jsonl" for part in ("answers", "questions")
        )
        ours = summary.splits[kind].metrics
        for name, value in official_script(answers, questions).items():
            assert ours[name] == pytest.approx(value, abs=1e-12), name
        # The question file is the published one, and our reader understands the answers.
        assert pope.recognise(pope.read_questions(questions)) == (VERSION, kind)
        again = pope.score_answers(answers, pope.read_questions(questions), "official")
        assert again.splits["all"].metrics == ours


def test_exported_conversations_are_single_answers(tmp_path):
    records = pope.official_lines([conversation()])["mine"]
    assert [(r["question_id"], r["answer"]) for r in records] == [(1, "yes"), (2, "no"), (4, "yes")]


def test_a_question_without_an_answer_is_not_exported(tmp_path, lines):
    broken = [*lines[:-1], lines[-1] | {"text": None, "error": "no such file"}]
    with pytest.raises(InputError, match="'popular-3000' has no answer: no such file"):
        pope.write_official(tmp_path / "out", broken)
    assert not (tmp_path / "out").exists()
    nameless = {k: v for k, v in lines[0].items() if k != "question_id"}
    with pytest.raises(InputError, match="have no question_id"):
        pope.official_lines([nameless])


# --- bad lines ------------------------------------------------------------------------------------


def test_missing_and_failed_questions_are_counted(lines):
    part = [*lines[:100], lines[100] | {"text": None, "error": "no such file"}]
    summary = pope.score_stored(part)
    assert summary.statuses == {"failed": 1, "missing": 3000 - 101}
    assert summary.as_json(resamples=2)["statuses"] == summary.statuses
    with pytest.raises(InputError, match="is not complete: 1 failed; 2899 missing"):
        require_complete(summary)
    require_complete(pope.score_stored(lines))


def test_strict_refuses_undefined_metrics(lines):
    denied = [line | {"text": "no"} for line in lines]
    with pytest.raises(InputError, match="undefined: mean_f1, popular_f1"):
        require_complete(pope.score_stored(denied))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": float("nan")}, "Line 1 has no 'text' .it is nan"),
        ({"text": None}, "Line 1 has no 'text'"),
        ({"label": None}, "Line 1 has no 'label'"),
        ({"split": 3}, "Line 1 has no 'split'"),
        ({"question_id": 3001}, "has no question 3001"),
        ({"question_id": 2}, "has no question 2 'Is there a snowboard"),
        ({"image": "other.jpg"}, "about 'other.jpg'"),
        ({"label": "no"}, "with the label 'no'"),
        ({"question": "Is there a zebra in the image?"}, "zebra"),
        ({"version": "aokvqa"}, "aokvqa/popular has no question 1"),
        ({"version": "custom", "label": "maybe"}, "'maybe'"),
    ],
)
def test_bad_lines(lines, change, message):
    with pytest.raises(InputError, match=message) as caught:
        pope.score_stored([lines[0] | change])
    assert caught.value.advice


def test_double_lines(lines):
    with pytest.raises(InputError, match="Line 2: the id 'popular-1' occurs twice"):
        pope.score_stored([lines[0], lines[0]])
    with pytest.raises(InputError, match="Question 1 of coco-2023-11/popular is answered 2 times"):
        pope.score_stored([lines[0], lines[0] | {"id": "again"}])


def test_nothing_but_errors(lines):
    with pytest.raises(InputError, match="All 1 lines hold errors"):
        pope.score_stored([lines[0] | {"error": "x"}])


def test_wrong_number_of_turns():
    with pytest.raises(InputError, match="Line 1 has 1 answers to 3 questions"):
        pope.score_stored([conversation(turns=[{"prompt": "Q1?", "text": "yes"}])])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"answer": "\xff"}', "not UTF-8"),
        (b'{"answer": NaN}\n{"answer": "no"}', "question 1 has no answer"),
        (b'{"answer": "yes"}', "1 answers for 2 questions"),
        (b'{"answer": "yes", "question": "Q9?"}\n{"answer": "no"}', "answer 1 is about 'Q9"),
    ],
)
def test_bad_answer_files(tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        pope.score_answers(path, QUESTIONS[:2])
