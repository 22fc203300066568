"""Classes of sentences, pairs, what comes next, when a caption is complete; all settings."""

import subprocess
import sys

import pytest

from data_tools.generators import Sample
from data_tools.sentinel.objects import ObjectMention
from data_tools.sentinel.pairs import (
    Candidate,
    build_pairs,
    choose,
    classify,
    is_finished,
    may_come_next,
    same_text,
    stable_hash,
    unique_sentences,
)
from data_tools.sentinel.settings import SentinelSettings

LABELS = {"dog": "factual", "cup": "factual", "cat": "hallucinated", "fog": "uncertain"}


def mentions(words):
    return [ObjectMention(w, w, w, 0, len(w)) for w in words.split()]


@pytest.mark.parametrize(
    ("words", "context", "any_of", "all_of"),
    [
        ("", "dog", "objectless", "objectless"),
        ("dog", "dog", "coherent", "coherent"),
        ("dog cup", "dog", "coherent", "agnostic"),
        ("dog cup", "dog cup", "coherent", "coherent"),
        ("dog", "", "agnostic", "agnostic"),
        ("cup", "dog", "agnostic", "agnostic"),
        ("dog cat", "dog", "hallucinated", "hallucinated"),
        ("cat fog", "", "hallucinated", "hallucinated"),
        ("dog fog", "dog", "uncertain", "uncertain"),
        ("dog fog", "", "uncertain", "uncertain"),
    ],
)
def test_classes(words, context, any_of, all_of):
    for coherence, expected in (("any", any_of), ("all", all_of)):
        assert classify(mentions(words), LABELS, context.split(), coherence) == expected


def candidate(kind, text="", pronoun=False):
    return Candidate(text or kind, (), kind, pronoun=pronoun)


def some(*kinds):
    return [candidate(kind, f"{number} {kind}") for number, kind in enumerate(kinds)]


def texts(pairs):
    return [(int(p.chosen.text[0]), int(p.rejected.text[0]), p.kind) for p in pairs]


MIXED = some("hallucinated", "coherent", "agnostic", "hallucinated", "coherent", "hallucinated")


def test_the_first_clean_one_meets_the_first_hallucinated_one():
    made = build_pairs(MIXED, context_is_empty=False)
    assert texts(made) == [(1, 0, "coherent"), (4, 3, "coherent")]


def test_agnostic_sentences_win_only_if_they_may():
    made = build_pairs(MIXED, context_is_empty=False, allow_agnostic=True)
    assert texts(made) == [(1, 0, "coherent"), (2, 3, "agnostic"), (4, 5, "coherent")]


def naming(kind, text, *names):
    mentions = []
    for name in names:
        start = text.index(name)
        mentions.append(ObjectMention(name, name, name, start, start + len(name)))
    return Candidate(text, tuple(mentions), kind)


def test_matched_sentences_name_as_many_new_objects_and_are_of_one_form_if_they_can():
    found = [
        naming("hallucinated", "there is a cat on the left .", "cat"),
        naming("agnostic", "a dog is above the tree .", "dog", "tree"),
        naming("coherent", "there is an umbrella on the left .", "umbrella"),
        naming("agnostic", "There are two dogs on the left .", "dogs"),
        naming("hallucinated", "an apple is above the tree .", "apple", "tree"),
        naming("agnostic", "there is a dog on the left .", "dog"),
        naming("hallucinated", "there is a car on the left .", "car"),
        naming("hallucinated", "there is a cow on the left .", "cow"),
    ]
    made, alike = (
        build_pairs(
            found,
            context_is_empty=False,
            allow_agnostic=True,
            pairing=pairing,
            context_objects={"tree", "umbrella"},
        )
        for pairing in ("matched", "same_form")
    )
    assert alike == made[:2]
    # The umbrella is not new, as the cat is; for the car the dogs are left, for the cow nothing.
    assert [(pair.chosen.text, pair.rejected.text) for pair in made] == [
        ("there is a dog on the left .", "there is a cat on the left ."),
        ("a dog is above the tree .", "an apple is above the tree ."),
        ("There are two dogs on the left .", "there is a car on the left ."),
    ]


def test_without_a_context_there_is_no_pair_unless_it_may_be():
    first = some("agnostic", "hallucinated", "uncertain", "objectless")
    assert build_pairs(first, context_is_empty=True) == []
    made = build_pairs(first, context_is_empty=True, allow_empty_context=True)
    assert texts(made) == [(0, 1, "empty_context")]


def test_sentences_about_it_make_no_pair():
    about_it = [candidate("coherent", "0", True), candidate("coherent", "1")]
    losers = [candidate("hallucinated", "2", True), candidate("hallucinated", "3")]
    assert texts(build_pairs(about_it + losers, context_is_empty=False)) == [(1, 3, "coherent")]


@pytest.mark.parametrize(
    ("kinds", "clean", "authors"),
    [
        (("coherent", "agnostic", "hallucinated", "agnostic"), [1, 3], [1, 3]),
        (("coherent", "objectless", "coherent"), [0, 2], [0, 2]),
        (("hallucinated", "objectless", "uncertain"), [1, 2], [0, 1, 2]),
        (("hallucinated", "hallucinated"), [], [0, 1]),
        ((), [], []),
    ],
)
def test_what_may_come_next(kinds, clean, authors):
    found = some(*kinds)
    assert may_come_next(found, "clean") == clean
    assert may_come_next(found, "authors") == authors


def test_objectless_sentences_come_next_only_if_they_may():
    found = some("objectless", "uncertain")
    assert may_come_next(found, "clean", allow_objectless=False) == [1]


def test_sentences_about_it_come_next_last():
    found = [candidate("agnostic", pronoun=True), candidate("coherent")]
    assert may_come_next(found, "clean") == [1]
    assert may_come_next(found[:1], "clean") == [0]
    assert may_come_next([candidate("hallucinated", pronoun=True)], "clean") == []


def samples(text):
    return [Sample(one.strip(), not one.strip()) for one in text.split("|")]


@pytest.mark.parametrize(
    ("drawn", "ended", "authors"),
    [
        ("a|a|a|a", False, True),
        ("a|b|||", True, True),
        ("a||", True, True),
        ("a|", False, False),  # exactly half
        ("a|b|a|b", False, False),
        ("a|b|c|d", False, False),
        ("|", True, True),
    ],
)
def test_when_a_caption_is_complete(drawn, ended, authors):
    assert is_finished(samples(drawn), "ended") is ended
    assert is_finished(samples(drawn), "authors") is authors


def test_unique_sentences_keep_their_order_and_count():
    drawn = [Sample("b", False), Sample("", True), Sample("a", False), Sample("b", True)]
    assert unique_sentences(drawn) == [("b", 2, True), ("a", 1, False)]


def test_equal_texts():
    assert same_text(" A  dog.", "a DOG.")
    assert not same_text("a dog.", "a dog !")
    assert same_text("", " ")


def test_choices_are_the_same_in_every_process():
    assert choose([], 0, "x") is None
    assert choose([7], 0, "x") == 7
    code = "from data_tools.sentinel.pairs import stable_hash as h; print(h(0, 'a', 3, 'next'))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert stable_hash(0, "a", 3, "next") == int(other)
    assert 0 <= stable_hash("x") < 2**63


def test_choices_spread_and_keys_do_not_run_into_each_other():
    drawn = [choose(range(4), 0, "a", step) for step in range(400)]
    assert all(70 < drawn.count(position) < 130 for position in range(4))
    assert stable_hash("a", "b") != stable_hash("ab")
    assert stable_hash(1, 12) != stable_hash(11, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 1}, "n must be at least 2, got 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": float("nan")}, "temperature must be > 0"),
        ({"temperature": float("inf")}, "temperature must be > 0"),
        ({"max_sentences": 0}, "max_sentences must be at least 1"),
        ({"cross_check": "single"}, "cross_check must be 'both', 'vote' or 'single:NAME'"),
        ({"cross_check": "single:"}, "cross_check must be"),
        ({"out_of_vocabulary": "reject"}, "one of auto, abstain, accept, got 'reject'"),
        ({"coherence": "some"}, "coherence must be one of any, all, got 'some'"),
        ({"finish_rule": "paper"}, "finish_rule must be one of ended, authors"),
        ({"next_sentence": "best"}, "next_sentence must be one of clean, authors"),
    ],
)
def test_refused_settings(change, message):
    with pytest.raises(ValueError, match=message):
        SentinelSettings(**change)


def test_the_authors_settings():
    authors = SentinelSettings.authors(seed=3)
    assert authors.finish_rule == authors.next_sentence == "authors"
    assert authors.out_of_vocabulary == "accept"
    assert authors.keep_suspicious
    assert not authors.drop_pronouns
    assert (authors.n, authors.temperature, authors.seed) == (10, 0.7, 3)
