"""SwapMix's scorer: golden values, hand cases, captions, answers as classes, damaged lines."""

import json
import math

import pytest
from golden import golden

from benchmarks import swapmix
from benchmarks.swapmix import Asked, Variant, read_answer, score_swapmix
from mmlm.errors import InputError

PRINTED = {
    "model accuracy without SwapMix": "accuracy",
    "object reliance": "object_reliance",
    "attribute reliance": "attribute_reliance",
    "context reliance": "context_reliance",
    "effective accuracy": "effective_accuracy",
}


def record(answer, original, objects=(), attributes=(), **more):
    return {
        "answer": answer,
        "original": original,
        "object_swaps": list(objects),
        "attribute_swaps": list(attributes),
        **more,
    }


HAND = [
    record("yes", "yes", ["yes", "no"], ["yes"]),  # an object swap moves it
    record("two", "two", ["two"], ["two", "three"]),  # another one moves by its looks
    record("no", "no", ["no", "no"], ["no"]),  # firm
    record("left", "right", ["left"], ["left"]),  # wrong from the start: never counted
]


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("swapmix/swapmix_*.json"))
def test_probes_acceptance_11_golden(path):
    data = json.loads(path.read_text())
    scores = score_swapmix(data["records"])
    assert data["expected"].keys() == PRINTED.keys()
    for name, value in data["expected"].items():
        assert scores[PRINTED[name]] == pytest.approx(value, abs=1e-12)
    assert scores["n"] == sum(r["original"] == r["answer"] for r in data["records"])


def test_probes_acceptance_11_by_hand():
    scores = score_swapmix(HAND)
    # Three of four are right; one of the three moves by an object, another one by its looks.
    assert scores["object_reliance"] == pytest.approx(1 / 3)
    assert scores["attribute_reliance"] == pytest.approx(1 / 3)
    assert scores["context_reliance"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == 0.75
    assert scores["effective_accuracy"] == 0.25
    # Shares of moved answers: 1 of 3, 1 of 3, 0 of 3.
    assert scores["flip_rate"] == pytest.approx(2 / 9)
    assert scores["n"] == 3


def test_the_floor_of_noise_is_taken_off_question_by_question():
    noisy = [
        record("a", "a", ["b"], noise_swaps=["b", "a"]),  # noise moves it as well: no excess
        record("a", "a", ["b"], noise_swaps=["a", "a"]),
        record("a", "a", ["a"], noise_swaps=["c", "a"]),  # only noise moves it: a negative excess
    ]
    scores = score_swapmix(noisy)
    assert scores["noise_reliance"] == pytest.approx(2 / 3)
    assert scores["context_reliance"] == pytest.approx(2 / 3)
    assert scores["excess"] == 0
    some = score_swapmix([*noisy, record("a", "a", ["b"])])  # a question without noise says nothing
    assert some["excess"] == 0
    for name in ("excess", "noise_reliance"):  # nobody looked at what noise does
        assert math.isnan(score_swapmix(HAND)[name])


def test_a_question_without_any_swap_stays_in_the_denominator():
    scores = score_swapmix([record("a", "a", ["b"]), record("a", "a")])
    assert scores["context_reliance"] == 0.5
    assert scores["flip_rate"] == 1.0  # of the one that was swapped


def test_error_no_correct_answer():
    scores = score_swapmix([record("a", "b", ["a"], noise_swaps=["a"])])
    for name in ("object_reliance", "attribute_reliance", "context_reliance", "noise_reliance"):
        assert math.isnan(scores[name])
    assert scores["accuracy"] == scores["effective_accuracy"] == 0
    assert scores["n"] == 0
    assert math.isnan(score_swapmix([])["accuracy"])


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("existence", "Yes, there is a dog.", "yes"),
        ("existence", "no , there is no dog in the image .", "no"),
        ("existence", "There is a dog.", "other"),
        ("existence", "", "other"),
        ("count", "two", "2"),
        ("count", "There are 2 of the two dogs.", "2"),
        ("count", "one or two", "other"),
        ("count", "none", "0"),
        ("count", "bones", "other"),
        ("relation", "to the left of the cup", "left"),
        ("relation", "It is beneath the cup.", "below"),
        ("relation", "above and to the left of the cup", "other"),
        ("relation", "beside the cup", "other"),
    ],
)
def test_answers_become_classes(kind, text, expected):
    assert read_answer(kind, text) == expected


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="types of questions are existence, count, relation"):
        read_answer("colour", "red")


# --- stored lines ---------------------------------------------------------------------------------


def asked(kind="existence", answer="yes", **changes):
    variants = (
        Variant("object", "a.png", "dog -> cat", near=True, facts={"swapped": "dog"}),
        Variant("object", "b.png", "dog -> car", near=False, facts={"swapped": "dog"}),
        Variant("noise", "c.png", "other noise 1"),
    )
    given = {"id": "1-q", "kind": kind, "text": "is there a cup ?", "answer": answer}
    given |= {"picture": "1", "image": "0.png", "variants": variants, "skipped": 2}
    return Asked(**(given | changes))


def lines_of(questions, answer):
    return [
        {"id": item.request.id, **item.facts, "text": answer(item.facts)}
        for item in swapmix.task(questions, "world").items
    ]


def test_lines_are_asked_stored_and_scored():
    def answer(facts):
        return "no" if facts["note"] == "dog -> cat" else "yes"

    def safe(facts):
        return answer({"note": "", **facts})

    questions = [asked(), asked(id="2-q", picture="2", answer="no")]
    lines = lines_of(questions, safe)
    assert [line["id"] for line in lines[:4]] == [
        "1-q-original",
        "1-q-object-1",
        "1-q-object-2",
        "1-q-noise-1",
    ]
    scores = swapmix.score_stored(lines)
    assert scores.name == "swapmix/world"
    assert scores.metrics["accuracy"] == 0.5
    assert scores.metrics["context_reliance"] == 1
    assert scores.metrics["noise_reliance"] == 0
    assert scores.metrics["near_flip_rate"] == 1
    assert scores.metrics["far_flip_rate"] == 0
    assert scores.metrics["swaps_per_question"] == 2
    assert scores.metrics["existence_flip_rate"] == 0.5
    assert scores.metrics["existence_excess"] == 1  # the one that is right moves, by no noise
    assert scores.metrics["existence_effective_accuracy"] == 0
    assert scores.statuses == {"swaps skipped": 4}
    moved = [sample for sample in scores.samples if sample.id == "1-q-object-1"]
    assert moved[0].note == "object: dog -> cat"
    # The first question was right: what moves is wrong. The second was not: nothing is expected.
    verdicts = [sample.correct for sample in scores.samples]
    assert verdicts == [True, False, True, True, False, None, None, None]
    assert scores.table.images == ("1", "2")  # the bootstrap draws scenes, not their variants


def test_the_share_of_unreadable_answers_is_a_class_and_is_shown():
    def answer(facts):
        return "maybe" if facts["swap"] == "object" else "yes"

    scores = swapmix.score_stored(lines_of([asked()], answer))
    assert scores.metrics["object_reliance"] == 1  # from "yes" to neither is a change
    assert scores.metrics["other_answers"] == 0.5


def test_a_question_with_a_failed_answer_is_left_out_and_counted():
    lines = lines_of([asked(), asked(id="2-q", picture="2")], lambda facts: "yes")
    lines[1] |= {"text": None, "error": "out of memory"}
    scores = swapmix.score_stored(lines)
    assert scores.table.images == ("2",)
    assert scores.statuses == {"failed": 1, "questions left out": 1, "swaps skipped": 4}
    for line in lines:
        line |= {"text": None, "error": "out of memory"}
    with pytest.raises(InputError, match="No question has all its answers"):
        swapmix.score_stored(lines)


def test_words_of_captions_are_questions_of_their_own():
    texts = {
        "original": "there is a dog and a cup . a fork can be seen .",  # the fork is invented
        "dog -> cat": "there is a cat .",  # the cup is lost
        "dog -> car": "there is a car and a cup and a knife .",  # the knife is new
        "other noise 1": "there is a dog and a cup and a fork .",  # invented before, too
    }
    sets = [("cat", "cup"), ("car", "cup"), ("cup", "dog")]
    variants = tuple(
        Variant(v.swap, v.image, v.note, v.near, objects, v.facts)
        for v, objects in zip(asked().variants, sets, strict=True)
    )
    question = asked(kind="caption", answer="", objects=("cup", "dog"), variants=variants)
    lines = lines_of([question], lambda facts: texts[facts.get("note", "original")])
    scores = swapmix.score_stored(lines)
    # "cup": named, lost once in two swaps. "dog": no swap left that is not about it.
    assert scores.metrics["caption_accuracy"] == 1
    assert scores.metrics["caption_context_reliance"] == 0.5
    assert scores.metrics["caption_flip_rate"] == 0.5
    assert scores.metrics["lost_words"] == 0.5  # the cup, in one of two captions
    assert scores.metrics["gained_words"] == pytest.approx(1 / 4)  # the knife, of 1 + 3 words
    assert scores.metrics["noise_lost_words"] == 0
    assert scores.metrics["noise_gained_words"] == 0
    assert "context_reliance" not in scores.metrics  # words are not mixed with questions
    clutter = Variant("clutter", "d.png", "other clutter 1", objects=("cup", "dog"))
    texts["other clutter 1"] = "there is a bed ."  # no swap: nobody's word
    more = asked(kind="caption", answer="", objects=("cup", "dog"), variants=(*variants, clutter))
    cluttered = swapmix.score_stored(
        lines_of([more], lambda facts: texts[facts.get("note", "original")])
    )
    for name in ("lost_words", "gained_words", "noise_lost_words", "noise_gained_words"):
        assert cluttered.metrics[name] == scores.metrics[name]
    lines[1]["touched"] = ["cup"]  # a cat that reaches into the cup's box says nothing about it
    assert swapmix.score_stored(lines).metrics["caption_context_reliance"] == 0
    both = swapmix.score_stored([*lines, *lines_of([asked(id="2-q")], lambda facts: "no")])
    assert both.metrics["accuracy"] == 0
    assert both.metrics["caption_accuracy"] == 1
    assert "lost_words" not in swapmix.score_stored(lines_of([asked()], lambda f: "no")).metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"swap": "colour"}, "swap is 'colour'"),
        ({"type": "colour"}, "type is 'colour'"),
        ({"picture": None}, "no text in 'picture'"),
        ({"text": 3}, "the answer is 3"),
        ({"level": "features"}, "several levels: features, world"),
        ({"swap": "object"}, "0 answers about its untouched picture"),
    ],
)
def test_damaged_lines_are_refused(change, message):
    lines = lines_of([asked(), asked(id="2-q")], lambda facts: "yes")
    lines[0] |= change
    with pytest.raises(InputError, match=message):
        swapmix.score_stored(lines)


def test_an_impossible_task_is_refused():
    with pytest.raises(InputError, match="no questions"):
        swapmix.task([], "world")
    with pytest.raises(ValueError, match="'perhaps' is no answer"):
        swapmix.task([asked(answer="perhaps")], "world")
    with pytest.raises(ValueError, match="swap = 'colour'"):
        swapmix.task([asked(variants=(Variant("colour", "a.png"),))], "world")
