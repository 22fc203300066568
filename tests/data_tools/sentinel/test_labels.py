"""Three-way labels: policies, names outside vocabularies, what a picture knows already."""

import itertools

import pytest

from data_tools.detectors import Box, Finding
from data_tools.detectors.scripted import ScriptedDetector
from data_tools.sentinel.asking import Witnesses
from data_tools.sentinel.labels import Knowledge, cross_check
from data_tools.sentinel.objects import ObjectMention
from data_tools.sentinel.settings import SentinelSettings

YES, NO = Finding(True), Finding(False)


def label(votes, policy="both", out_of_vocabulary="abstain"):
    findings = {f"d{number}": {"dog": vote} for number, vote in enumerate(votes)}
    return cross_check(["dog"], findings, policy, out_of_vocabulary)["dog"]


@pytest.mark.parametrize(
    ("votes", "both", "vote"),
    [
        ((YES, YES), "factual", "factual"),
        ((NO, NO), "hallucinated", "hallucinated"),
        ((YES, NO), "uncertain", "uncertain"),
        ((NO, YES), "uncertain", "uncertain"),
        ((YES, YES, NO), "uncertain", "factual"),
        ((NO, YES, NO), "uncertain", "hallucinated"),
        ((YES,), "factual", "factual"),
        ((NO,), "hallucinated", "hallucinated"),
        ((None, YES), "factual", "factual"),
        ((None, NO), "hallucinated", "hallucinated"),
        ((None, None), "uncertain", "uncertain"),
    ],
)
def test_policies(votes, both, vote):
    assert label(votes) == both
    assert label(votes, "vote") == vote


def test_accepting_what_is_unknown():
    assert label((None, NO), out_of_vocabulary="accept") == "uncertain"
    assert label((None, YES), out_of_vocabulary="accept") == "factual"
    assert label((None, None), out_of_vocabulary="accept") == "factual"
    assert label((None, NO, NO), "vote", "accept") == "hallucinated"


def test_a_single_detector_decides():
    assert label((YES, NO), "single:d1") == "hallucinated"
    assert label((YES, NO), "single:d0") == "factual"
    assert label((YES, None), "single:d1") == "uncertain"
    assert label((NO, None), "single:d1", "accept") == "factual"


def test_no_label_depends_on_the_order_of_detectors():
    for votes in itertools.product([YES, NO, None], repeat=3):
        for policy in ("both", "vote"):
            for rule in ("accept", "abstain"):
                found = {label(order, policy, rule) for order in itertools.permutations(votes)}
                assert len(found) == 1


@pytest.mark.parametrize("policy", ["neither", "single:", "single:other", "Both"])
def test_an_unknown_policy_names_what_there_is(policy):
    with pytest.raises(ValueError, match=r"cross_check must be one of both, vote, single:d0"):
        label((YES, YES), policy)
    with pytest.raises(ValueError, match="out_of_vocabulary must be"):
        label((YES, YES), "both", "auto")


YOLO = frozenset({"dog", "cat"})


def witnesses(*detectors, **settings):
    return Witnesses(detectors, SentinelSettings(**settings))


def label_of(name, picture, asked):
    knowledge = Knowledge()
    answers = asked.ask(picture, [name])
    knowledge.learn({name: name}, answers.findings, asked.policy, asked.out_of_vocabulary)
    return knowledge.labels[name]


def test_acceptance_9_out_of_vocabulary(some_picture):
    """Closed YOLO, and an open DINO that rejects "counter"."""
    yolo = ScriptedDetector(findings={"one": ["dog"]}, vocabulary=YOLO, name="yolo")
    dino = ScriptedDetector(findings={"one": ["dog"]}, name="dino")
    authors = witnesses(dino, yolo, out_of_vocabulary="accept")
    assert label_of("counter", some_picture, authors) == "uncertain"
    assert label_of("counter", some_picture, witnesses(dino, yolo)) == "hallucinated"
    closed = ScriptedDetector(findings={}, vocabulary=frozenset({"car"}), name="closed")
    both_closed = witnesses(closed, yolo, out_of_vocabulary="abstain")
    assert label_of("counter", some_picture, both_closed) == "uncertain"


def test_abstaining_is_the_rule_as_soon_as_somebody_knows_every_name():
    open_one = ScriptedDetector(findings={}, name="open")
    closed = ScriptedDetector(findings={}, vocabulary=YOLO, name="closed")
    assert witnesses(closed, open_one).out_of_vocabulary == "abstain"
    assert witnesses(closed).out_of_vocabulary == "accept"
    # The open one is not asked, so it decides nothing.
    only = witnesses(closed, open_one, cross_check="single:closed")
    assert only.out_of_vocabulary == "accept"


def test_two_detectors_of_one_name_are_told_apart():
    twice = witnesses(ScriptedDetector(findings={}), ScriptedDetector(findings={}))
    assert twice.names == ("ScriptedDetector", "ScriptedDetector#2")
    with pytest.raises(ValueError, match="at least one detector"):
        witnesses()


def test_only_detectors_that_the_policy_needs_are_asked(some_picture):
    first, second = (ScriptedDetector(findings={}, name=name) for name in "ab")
    witnesses(first, second, cross_check="single:b").ask(some_picture, ["dog"])
    assert (first.calls, second.calls) == ([], [("one", ("dog",))])


def mention(lemma, canonical=None):
    return ObjectMention(lemma, lemma, canonical or lemma, 0, len(lemma))


def test_an_object_is_asked_once_under_its_first_name():
    knowledge = Knowledge()
    new = knowledge.unknown([mention("puppy", "dog"), mention("dog"), mention("cat")])
    assert new == {"dog": "puppy", "cat": "cat"}
    knowledge.learn(new, {"d": {"puppy": YES, "cat": NO}}, "both", "abstain")
    assert knowledge.labels == {"dog": "factual", "cat": "hallucinated"}
    assert knowledge.unknown([mention("hound", "dog"), mention("cup")]) == {"cup": "cup"}
    assert knowledge.of("factual") == ["dog"]
    assert knowledge.rejected_by() == {"d": ["cat"]}


def test_an_object_without_an_answer_is_uncertain():
    knowledge = Knowledge()
    findings = {"a": {"dog": YES}, "b": {"dog": YES, "cat": NO}}
    knowledge.learn({"dog": "dog", "cat": "cat"}, findings, "both", "abstain")
    assert knowledge.labels == {"dog": "factual", "cat": "uncertain"}


def test_what_was_found_at_all():
    knowledge = Knowledge()
    assert not knowledge.nothing_found()
    knowledge.learn({"sky": "sky"}, {"a": {"sky": None}}, "both", "abstain")
    assert not knowledge.nothing_found()  # nobody could say
    knowledge.learn({"cat": "cat"}, {"a": {"cat": NO}}, "both", "abstain")
    assert knowledge.nothing_found()
    knowledge.learn({"dog": "dog"}, {"a": {"dog": YES}}, "both", "abstain")
    assert not knowledge.nothing_found()


def test_boxes_of_accepted_objects_are_kept():
    knowledge = Knowledge()
    box = Box(1, 2.00049, 30, 40, 0.98765, "a dog")
    findings = {"a": {"dog": Finding(True, 0.98765, (box,)), "cat": Finding(False, 0.1, (box,))}}
    knowledge.learn({"dog": "dog", "cat": "cat"}, findings, "both", "abstain")
    assert knowledge.boxes() == {"dog": {"a": [[1.0, 2.0, 30.0, 40.0, 0.988]]}}
