"""SENTINEL against vectors from the authors' own functions, with their two detectors played."""

import json

import pytest
from golden import golden

from data_tools.detectors.scripted import ScriptedDetector
from data_tools.generators import Sample
from data_tools.pictures import Picture
from data_tools.sentinel.asking import Witnesses
from data_tools.sentinel.labels import Knowledge
from data_tools.sentinel.objects import ObjectMention, nouns
from data_tools.sentinel.objects.coco import canonical
from data_tools.sentinel.pairs import (
    Sentence,
    build_pairs,
    candidates,
    is_finished,
    may_come_next,
    unique_sentences,
)
from data_tools.sentinel.reading import Reading
from data_tools.sentinel.settings import SentinelSettings

pytestmark = pytest.mark.golden
CASES = pytest.mark.parametrize("path", golden("sentinel*/cases*.json"))


def as_mention(name):
    *before, last = name.lower().split()
    lemma = " ".join([*before, nouns.singular(last)])
    return ObjectMention(name, lemma, canonical(name), 0, len(name))


def names(mentions, label, knowledge):
    return [m.text for m in mentions if knowledge.labels[m.canonical] == label]


def witnesses_of(scene, vocabulary):
    dino = ScriptedDetector(
        findings={"one": scene["dino_labels"]}, name="dino", substring_match=True
    )
    yolo = ScriptedDetector(
        findings={"one": scene["yolo_labels_detected"]},
        name="yolo",
        vocabulary=frozenset(vocabulary),
    )
    return dino, Witnesses([dino, yolo], SentinelSettings.authors())


@CASES
def test_acceptance_1_labels_pairs_and_what_may_come_next(path, some_picture):
    cases = json.loads(path.read_text())
    for scene in cases["scenes"]:
        dino, witnesses = witnesses_of(scene, cases["yolo_vocabulary"])
        knowledge = Knowledge()
        context_objects: list[str] = []
        for step in scene["steps"]:
            found = check_labels(step, knowledge, witnesses, dino, some_picture)
            assert {canonical(name) for name in step["context_objects"]} == set(context_objects)
            for coherence in ("any", "all"):
                classified = classes(step, found, knowledge, context_objects, coherence)
                check_pairs(step, classified, step[f"coherent_{coherence}"])
            context_objects += [m.canonical for m in found[step["appended_index"]]]


def check_labels(step, knowledge, witnesses, dino, picture: Picture):
    found = [[as_mention(name) for name in own] for own in step["objects"]]
    new = knowledge.unknown([mention for own in found for mention in own])
    dino.calls.clear()
    answers = witnesses.ask(picture, list(new.values()))
    knowledge.learn(new, answers.findings, witnesses.policy, witnesses.out_of_vocabulary)
    asked = [name for _, names in dino.calls for name in names]
    assert sorted(asked) == step["dino_queried"]
    for own, hallucinated, factual in zip(
        found, step["hallucinated"], step["nonhallucinated"], strict=True
    ):
        assert names(own, "hallucinated", knowledge) == hallucinated
        assert names(own, "factual", knowledge) == factual
    state = step["state_after"]
    for label in ("factual", "uncertain", "hallucinated"):
        assert sorted(knowledge.asked[name] for name in knowledge.of(label)) == state[label]
    # The authors list under a detector only what the other one accepts.
    rejected = knowledge.rejected_by()
    for detector in ("dino", "yolo"):
        differing = set(rejected.get(detector, ())) & set(knowledge.of("uncertain"))
        assert sorted(knowledge.asked[n] for n in differing) == state[f"rejected_by_{detector}"]
    return found


def classes(step, found, knowledge, context_objects, coherence):
    sentences = [Sentence(text) for text in step["candidates"]]
    readings = [Reading(tuple(own), pronoun=False) for own in found]
    return candidates(sentences, readings, knowledge, context_objects, coherence)


def check_pairs(step, classified, expected):
    made = build_pairs(classified, context_is_empty=not step["context"])
    wanted = [(pair["y_win"], pair["y_lose"]) for pair in expected["pairs"]]
    assert [(pair.chosen.text, pair.rejected.text) for pair in made] == wanted
    assert {pair.kind for pair in made} <= {"coherent"}
    assert may_come_next(classified, "authors") == expected["eligible_next_index"]


@CASES
def test_acceptance_1_when_a_caption_is_complete(path):
    for case in json.loads(path.read_text())["finish_flag"]:
        drawn = [Sample(text, not text) for text in case["sentences"]]
        unique = [text for text, _, _ in unique_sentences(drawn)]
        assert sorted(unique) == sorted(case["dedup"]["valid"])
        assert sorted(s.text for s in drawn if s.text) == sorted(case["no_dedup"]["valid"])
        assert is_finished(drawn, "authors") is case["dedup"]["stop"]
        assert is_finished(drawn, "ended") is case["no_dedup"]["stop"]
