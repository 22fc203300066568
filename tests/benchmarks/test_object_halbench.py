"""Object HalBench: words and phrases, the judge's replies, numbers by hand, files, bad input."""

import base64
import json
import random
from types import SimpleNamespace

import pytest

from benchmarks import object_halbench
from benchmarks.judges import ScriptedJudge, judged
from benchmarks.object_halbench import Truth, ask, read_truth, score_stored
from benchmarks.object_halbench import files as halbench_files
from benchmarks.object_halbench.objects import (
    RulePhrases,
    SpacyPhrases,
    named_by,
    named_in,
    parse_reply,
    refined_nodes,
    two_word_names,
)
from mmlm.errors import InputError

TRUTH = Truth({1: {"dog", "dining table"}, 2: {"person", "kite", "car"}, 3: set()})


def line(number, image, text, question="What is there?"):
    return {"id": str(number), "image_id": image, "question": question, "text": text}


def words_of(text):
    return [(item.word, item.node) for item in named_in(text)]


# --- words --------------------------------------------------------------------------------------


def test_the_refined_list():
    nodes = refined_nodes()
    assert nodes["motor bike"] == "motorcycle"
    assert nodes["cheesecake"] == "cake"
    assert not [word for word in nodes if word != word.strip()]
    for word, node in {
        "brother": "person",
        "pedestrian": "person",
        "coffee table": "dining table",
        "remote control": "remote",
    }.items():
        assert nodes[word] == node
        assert words_of(f"Two {word}s.") == [(word, node)]
    assert len(set(nodes.values())) == 80
    assert two_word_names()["toilet seat"] == "toilet"
    assert two_word_names()["home plate"] == "home plate"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A dog. A DOG and two dogs.", ["dog", "dog", "dog"]),
        ("A baby elephant near the train tracks", ["elephant"]),
        ("hot dogs and a stop sign", ["hot dog", "stop sign"]),
        ("the seat of the toilet", ["toilet"]),
        ("a seat on a toilet seat", ["toilet"]),
        ("a seat in the bus", ["seat", "bus"]),
        ("He is seated and skiing; they board.", []),  # verbs do not become nouns here
        ("men and women", ["woman"]),  # WordNet leaves "men" alone
        ("", []),
    ],
)
def test_words_are_read_as_nouns(text, named):
    assert [word for word, _ in words_of(text)] == named


def test_objects_are_found_where_they_stand():
    text = 'The "Puppy" sits by two  traffic lights.'
    spans = [text[item.start : item.end] for item in named_in(text)]
    assert spans == ["Puppy", "traffic lights"]


@pytest.mark.parametrize(
    ("phrase", "names"),
    [
        ("dogs", ["dog"]),
        ("men", ["man"]),
        ("two wooden chairs", ["wooden chair"]),
        ("parked cars", ["car"]),
        ("tennis player", ["tennis player"]),
        ("baby elephant", ["elephant"]),
        ("wooden dining tables", ["dining table"]),
        ("train tracks", ["train track"]),
        ("old", ["old"]),  # no noun: the last word counts
        ("", []),
    ],
)
def test_rules_read_phrases(phrase, names):
    assert RulePhrases()(phrase) == names


def test_spacy_reads_phrases_by_lemma_and_tag():
    seen = []

    def parser(text):
        seen.append(text)
        table = {
            "a": ("a", "DT"),
            "Labrador": ("Labrador", "NNP"),
            "puppies": ("puppy", "NNS"),
            "on": ("on", "IN"),
            "grass": ("grass", "NN"),
            "hot": ("hot", "JJ"),
            "dogs": ("dog", "NNS"),
        }
        return [SimpleNamespace(lemma_=table[w][0], tag_=table[w][1]) for w in text.split()]

    read = SpacyPhrases("test", parser)
    assert read("Labrador puppies on grass") == ["Labrador puppy", "grass"]
    assert read("grass on hot dogs") == ["hot dog"]
    assert seen == ["a Labrador puppies on grass", "a grass on hot dogs"]
    assert read.name == "spacy-test"


def test_without_spacy_its_mode_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    with pytest.raises(InputError, match="spaCy") as caught:
        SpacyPhrases()
    assert "en_core_web_trf" in caught.value.advice


def test_a_missing_pipeline_is_refused(monkeypatch):
    def load(name):
        raise OSError(f"[E050] Can't find model {name!r}")

    monkeypatch.setitem(__import__("sys").modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(InputError, match="'nothing'"):
        SpacyPhrases("nothing")


def test_each_word_of_a_judge_counts_once():
    named = named_by(
        ["dogs", "dog", "puppy", "seat", "toilet", "sky"], RulePhrases(), "Dogs by a seat."
    )
    assert [(n.word, n.node) for n in named] == [
        ("dog", "dog"),
        ("puppy", "dog"),
        ("toilet", "toilet"),
    ]
    assert (named[0].start, named[0].end) == (0, 4)
    assert named[1].start == named[1].end


@pytest.mark.parametrize(
    ("reply", "phrases"),
    [
        ('["dog", "cat"]', ["dog", "cat"]),
        ("[]", []),
        ('Here they are:\n["dog"]', ["dog"]),
        ('I saw ["cat"] first.\n["dog"]\n\n', ["dog"]),
        ('["dog"]\nThat is all.', None),
        ("There is a dog.", None),
        ("", None),
        ("()", None),
        ('"dog"', None),
        ('{"objects": ["dog"]}', None),
        ('["dog", 3]', None),
        ('[["dog"]]', None),
        ("NaN", None),
        ("[" * 100_000, None),
    ],
)
def test_replies(reply, phrases):
    assert parse_reply(reply) == phrases


# --- numbers ------------------------------------------------------------------------------------

LINES = [
    line(0, 1, "A dog sits on a table beside a cat and another cat."),
    line(1, 2, "People fly a kite."),
    line(2, 3, "The sky is very blue."),
    line(3, 2, "A big bus."),
]


def test_by_hand_without_a_judge():
    scores = score_stored(LINES, truth=TRUTH)
    assert scores.name == "object-halbench/words"
    assert scores.counts == {
        "images": 3,
        "answers": 4,
        "answers_with_objects": 3,
        "hallucinated_answers": 2,
        "mentions": 4 + 2 + 0 + 1,
        "hallucinated_mentions": 2 + 0 + 0 + 1,
        "found_objects": 2 + 2 + 0 + 0,
        "true_objects": 2 + 3 + 0 + 3,
        "words": 12 + 4 + 5 + 3,
    }
    assert scores.metrics == {
        "response_rate": 2 / 3,
        "mention_rate": 3 / 7,
        "recall": 4 / 8,
        "chair_s": 2 / 4,
        "mean_length": 24 / 4,
    }
    assert scores.official == {
        "Response Hall": "66.67",
        "Object Hall": "42.86",
        "Response Correct": "33.33",
        "Object Correct": "57.14",
        "Object Recall": "50.00",
        "Average Length": "6.00",
        "COCO Sent Number": 3,
        "COCO Word Number": 4,
        "GT Word Number": 8,
    }
    assert [sample.correct for sample in scores.samples] == [False, True, None, False]
    first = scores.samples[0]
    assert [(first.answer[m.start : m.end], m.kind) for m in first.marks] == [
        ("dog", "good"),
        ("table", "good"),
        ("cat", "bad"),
        ("cat", "bad"),
    ]


def judge_with(replies):
    return ScriptedJudge(replies, "judge-1")


def test_by_hand_with_a_judge():
    judge = judge_with({"0": '["dog", "old table", "cat", "cats"]', "1": "[]", "2": '["sky"]'})
    lines = ask(LINES, judge)
    assert [judged.reply(entry, "objects") is None for entry in lines] == [
        False,
        False,
        False,
        True,
    ]
    scores = score_stored(lines, truth=TRUTH)
    assert scores.name == "object-halbench/judge-1/mmlm-prompt/rules"
    # The two cats are one word, and count once.
    assert scores.counts["mentions"] == 3
    assert scores.counts["hallucinated_mentions"] == 1
    assert scores.metrics["response_rate"] == 1
    assert scores.statuses == {"short: the judge was not asked": 1}
    assert scores.counts["answers"] == 4


def test_the_judges_prompt_is_a_system_message_with_question_and_answer():
    seen = []
    judge = judge_with(lambda prompt: seen.append(prompt) or "[]")
    braces = line(0, 1, "A {question} of {} and {answer} braces", "Really {}?")
    ask([braces], judge)
    assert seen[0].text == ""
    assert "Really {}?" in seen[0].system
    assert "A {question} of {} and {answer} braces" in seen[0].system
    lines = ask([braces], judge, role="user", template=judged.Template("{}|{}", "mine"))
    assert (seen[1].system, seen[1].text) == ("", f"Really {{}}?|{braces['text']}")
    assert score_stored(lines, truth=TRUTH).name == "object-halbench/judge-1/mine-as-user/rules"


def test_three_words_are_not_sent():
    seen = []
    judge = judge_with(lambda prompt: seen.append(prompt.id) or "[]")
    texts = ["", "A dog.", "two  big\ncats", "Assistant: two big cats", "four words are enough"]
    lines = ask([line(n, 1, text) for n, text in enumerate(texts)], judge)
    assert seen == ["4"]
    assert score_stored(lines, truth=TRUTH).statuses == {"short: the judge was not asked": 4}


def test_unreadable_replies_are_asked_for_again_and_then_counted():
    asked = []

    def reply(prompt):
        asked.append((prompt.id, prompt.attempt))
        if prompt.id == "0":
            return '["dog"]' if prompt.attempt == 1 else "a dog"
        return "I like dogs" if prompt.id == "1" else None

    lines = ask([line(n, 1, "There is a dog.") for n in range(3)], judge_with(reply))
    assert asked == [("0", 0), ("1", 0), ("2", 0), ("0", 1), ("1", 1), ("1", 2)]
    scores = score_stored(lines, truth=TRUTH)
    assert scores.counts["answers"] == 1
    assert scores.metrics["mention_rate"] == 0
    assert scores.statuses == {
        "not judged: no JSON list in the reply": 1,
        "not judged: no reply in the script": 1,
    }


def test_a_judge_that_never_answers_is_an_error_only_if_nothing_is_left():
    lines = ask([line(0, 1, "There is a dog.")], judge_with({}))
    with pytest.raises(InputError, match="None of the 1 answers can be scored"):
        score_stored(lines, truth=TRUTH)
    assert score_stored(lines, truth=TRUTH, extraction="words").name == "object-halbench/words"


def test_ratios_without_a_denominator_are_undefined():
    scores = score_stored([line(0, 3, "Nothing but sky.")], truth=TRUTH)
    assert scores.metrics["response_rate"] is None
    assert scores.metrics["mention_rate"] is None
    assert scores.metrics["recall"] is None
    assert scores.metrics["chair_s"] == 0
    assert scores.official["Response Hall"] is None
    assert scores.as_json(resamples=5)["metrics"]["mention_rate"]["undefined"] is True


def test_a_naive_count_agrees_on_random_answers():
    vocabulary = {"dog": "dog", "puppy": "dog", "kite": "kite", "stool": "chair", "sky": None}
    generator = random.Random(3)
    truth = {n: set(generator.sample(["dog", "kite", "chair", "cup"], 2)) for n in range(9)}
    lines, answers, wrong_answers, with_objects, mentions, wrong = [], 0, 0, 0, 0, 0
    for number in range(60):
        image = generator.randrange(9)
        chosen = generator.choices(list(vocabulary), k=generator.randrange(6))
        lines.append(line(number, image, "We see " + " , a ".join(chosen)))
        nodes = [vocabulary[word] for word in chosen if vocabulary[word]]
        bad = [node for node in nodes if node not in truth[image]]
        answers += 1
        with_objects += bool(nodes)
        wrong_answers += bool(bad)
        mentions += len(nodes)
        wrong += len(bad)
    scores = score_stored(lines, truth=Truth(truth))
    assert scores.metrics["response_rate"] == wrong_answers / with_objects
    assert scores.metrics["chair_s"] == wrong_answers / answers
    assert scores.metrics["mention_rate"] == wrong / mentions
    shuffled = generator.sample(lines, len(lines))
    assert score_stored(shuffled, truth=Truth(truth)).metrics == scores.metrics
    twice = lines + [{**entry, "id": f"again-{entry['id']}"} for entry in lines]
    assert score_stored(twice, truth=Truth(truth)).metrics == scores.metrics


def test_truth_from_coco_files(tmp_path):
    instances, captions = tmp_path / "instances.json", tmp_path / "captions.json"
    instances.write_text(
        json.dumps(
            {
                "images": [{"id": 7, "file_name": "7.jpg"}],
                "categories": [{"id": 1, "name": "dog"}],
                "annotations": [{"image_id": 7, "category_id": 1}],
            }
        )
    )
    rows = [{"image_id": 7, "caption": "Men seated at a coffee table with a remote control."}]
    captions.write_text(json.dumps({"annotations": rows}))
    truth = read_truth([instances], [captions])
    assert truth.objects == {7: {"dog", "dining table", "remote"}}
    assert truth.name == ""
    assert read_truth([instances]).name == "instances-only"
    assert len(read_truth().objects) == 40_504
    assert read_truth().name == "val2014-table"
    with pytest.raises(InputError, match="no annotations"):
        read_truth([], [captions])


# --- files --------------------------------------------------------------------------------------


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def question(image=7, text="Describe.", **more):
    return {"image_id": image, "question": text, "image": base64.b64encode(b"jpg").decode(), **more}


def test_questions_bring_their_pictures(tmp_path):
    path = write(tmp_path / "q.jsonl", [question(), question("42", "What is it?")])
    questions = halbench_files.read_questions(path)
    assert [(q.id, q.image_id, q.text, q.picture) for q in questions] == [
        ("0", 7, "Describe.", b"jpg"),
        ("1", 42, "What is it?", b"jpg"),
    ]
    pictures = halbench_files.unpack_pictures(questions, tmp_path / "pictures")
    assert {image: path.read_bytes() for image, path in pictures.items()} == {7: b"jpg", 42: b"jpg"}
    task = halbench_files.task(questions, pictures)
    assert task.items[1].request.prompt == "What is it?"
    assert task.items[1].facts == {
        "image_id": 42,
        "image": "000000000042.jpg",
        "question": "What is it?",
    }


def test_pictures_in_a_folder_go_by_cocos_names(tmp_path):
    questions = halbench_files.read_questions(
        write(tmp_path / "q.jsonl", [question(1), question(2), question(3)])
    )
    for name in ("COCO_val2014_000000000001.jpg", "COCO_train2014_000000000002.jpg"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="1 of 3 pictures are missing"):
        halbench_files.find_pictures(questions, tmp_path)
    found = halbench_files.find_pictures(questions[:2], tmp_path)
    assert [path.name[5:8] for path in found.values()] == ["val", "tra"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "x"}, "image_id"),
        ({"image_id": True, "question": "x"}, "image_id"),
        ({"image_id": 1.5, "question": "x"}, "image_id"),
        ({"image_id": 1}, "'question'"),
        ({"image_id": 1, "question": "  "}, "'question'"),
        (question(), "there twice"),
        (question(image=8) | {"image": "no base64!"}, "base64"),
        (question(image=8) | {"image": 5}, "base64"),
    ],
)
def test_wrong_question_files_are_refused(tmp_path, record, reason):
    path = write(tmp_path / "q.jsonl", [question(), record])
    with pytest.raises(InputError, match=reason) as caught:
        halbench_files.read_questions(path)
    assert "record 2" in str(caught.value)


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"\xff\xfe{", "not UTF-8")])
def test_empty_and_foreign_files_are_refused(tmp_path, content, reason):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    for read in (halbench_files.read_questions, halbench_files.read_official):
        with pytest.raises(InputError, match=reason):
            read(path)


def test_questions_without_pictures_need_a_folder(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"image_id": 1, "question": "x"}])
    questions = halbench_files.read_questions(path)
    with pytest.raises(InputError, match="1 of 1 questions come without"):
        halbench_files.unpack_pictures(questions, tmp_path / "pictures")
    with pytest.raises(InputError, match="no questions"):
        halbench_files.task([], {})


def test_answers_travel_to_the_authors_scripts_and_back(tmp_path):
    path = tmp_path / "answers.jsonl"
    halbench_files.write_official(path, LINES)
    assert json.loads(path.read_text().splitlines()[0]) == {
        "question_id": "0",
        "image_id": 1,
        "question": "What is there?",
        "answer": LINES[0]["text"],
    }
    again = halbench_files.read_official(path)
    assert again == LINES
    assert score_stored(again, truth=TRUTH).metrics == score_stored(LINES, truth=TRUTH).metrics
    with pytest.raises(InputError, match="has no answer"):
        halbench_files.official_lines([{**LINES[0], "text": None, "error": "broken"}])


def test_answers_without_image_id_are_matched_by_the_question_file(tmp_path):
    questions = halbench_files.read_questions(
        write(tmp_path / "q.jsonl", [question(1, "One?"), question(2, "Two?")])
    )
    answers = [{"prompt": "USER: One? ASSISTANT:", "text": "a"}, {"prompt": "Two?", "text": "b"}]
    path = write(tmp_path / "a.jsonl", answers)
    lines = halbench_files.read_official(path, questions)
    assert [entry["image_id"] for entry in lines] == [1, 2]
    with pytest.raises(InputError, match="no image_id"):
        halbench_files.read_official(path)
    with pytest.raises(InputError, match="2 answers for 1 questions"):
        halbench_files.read_official(path, questions[:1])
    with pytest.raises(InputError, match="record 1 does not answer question 1"):
        halbench_files.read_official(path, questions[::-1])
    other = write(tmp_path / "b.jsonl", [{**answer, "image_id": 1} for answer in answers])
    with pytest.raises(InputError, match="record 2 does not answer question 1"):
        halbench_files.read_official(other, questions)


@pytest.mark.parametrize(
    "record",
    [
        {"image_id": 1, "question": "x"},
        {"image_id": 1, "answer": "x"},
        {"answer": 3, "prompt": "x"},
    ],
)
def test_official_answers_that_lack_a_field_are_refused(tmp_path, record):
    with pytest.raises(InputError, match="has no text in"):
        halbench_files.read_official(write(tmp_path / "a.jsonl", [record]))


# --- bad lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": None}, "no id"),
        ({"id": "1"}, "twice"),
        ({"text": None}, "not a text"),
        ({"text": float("nan")}, "not a text"),
        ({"image_id": None}, "image_id must be a number"),
        ({"image_id": 99}, "picture 99 is not in the annotations"),
        ({"question": None}, "'question'"),
    ],
)
def test_bad_lines_are_refused(change, reason):
    lines = [LINES[1], {**LINES[0], **change}]
    with pytest.raises(InputError, match=reason):
        score_stored(lines, truth=TRUTH)


def test_failed_requests_are_left_out_and_counted():
    broken = {**line(9, 1, None), "error": "cannot be read"}
    scores = score_stored([*LINES, broken], truth=TRUTH)
    assert scores.statuses == {"no answer": 1}
    assert scores.metrics == score_stored(LINES, truth=TRUTH).metrics
    assert len(ask([*LINES, broken], judge_with(lambda prompt: "[]"))) == 5
    with pytest.raises(InputError, match="None of the 1 answers"):
        score_stored([broken], truth=TRUTH)


def test_lines_of_two_judges_are_refused():
    one = ask(LINES[:1], ScriptedJudge({"0": "[]"}, "a"))
    two = ask(LINES[1:], ScriptedJudge(lambda prompt: "[]", "b"))
    with pytest.raises(InputError, match="same judge"):
        score_stored(one + two, truth=TRUTH)


def test_metrics_have_directions():
    scores = score_stored(LINES, truth=TRUTH)
    assert set(scores.directions) == set(object_halbench.METRICS)
    assert set(scores.good + scores.bad) <= set(scores.table.columns)
