"""Captions, questions and vocabulary of the embedded world."""

import dataclasses
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools.world import (
    CAPTION_QUESTIONS,
    NAMES,
    SPLITS,
    THEMES,
    caption,
    existence_answer,
    existence_question,
    language,
    questions,
    scene,
    theme_classes,
    vocabulary,
)
from mmlm.language.objects import node_words

ROOT = Path(__file__).parents[3]
TRAIN = SPLITS["train"]
FORMS = {form: name for name in NAMES for form in (name, language.plural(name))}


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def synonyms():
    """Every word of the official CHAIR list."""
    folder = Path(os.environ.get("MMLM_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "chair" / "synonyms.json"
    if not path.exists():
        path = ROOT / "mmlm" / "language" / "data" / "synonyms.json"
    rows = json.loads(path.read_text("utf-8"))
    assert len(rows) == 80
    return {word.strip().lower() for row in rows for word in row}


def named(text):
    """Classes in a text by longest match, in order of appearance, with repeats."""
    words = text.split()
    found, i = [], 0
    while i < len(words):
        for length in (3, 2, 1):
            phrase = " ".join(words[i : i + length])
            if phrase in FORMS:
                found.append(FORMS[phrase])
                i += length - 1
                break
        i += 1
    return found


def test_no_fixed_phrase_or_theme_word_is_a_chair_synonym(synonyms):
    for phrase in language.fixed_phrases():
        words = [w for w in phrase.split() if w.isalpha()]
        for length in (1, 2, 3):
            for i in range(len(words) - length + 1):
                part = " ".join(words[i : i + length])
                assert part not in synonyms, phrase
                assert part.removesuffix("s") not in synonyms, phrase
                assert part.removesuffix("es") not in synonyms, phrase


def test_fixed_phrases_are_complete():
    """Removing the classes from generated text leaves nothing that was not checked above."""
    checked = {word for phrase in language.fixed_phrases() for word in phrase.split()}
    of_classes = {w for n in NAMES for f in (language.singular(n), language.plural(n), n)
                  for w in f.split()}  # fmt: skip
    for i in range(300):
        truth = scene(TRAIN, 0, i)
        texts = [caption(truth, rng(i)), *(t for qa in questions(truth, rng(i)) for t in qa)]
        assert {w for t in texts for w in t.split()} <= checked | of_classes
    assert {theme.word for theme in THEMES} <= set(language.fixed_phrases())
    assert set(CAPTION_QUESTIONS) <= set(language.fixed_phrases())


@pytest.mark.parametrize("variant", ["wordnet", "pattern"])
def test_chair_finds_no_invented_object_in_a_true_caption(variant):
    found = possible = 0
    for i in range(250):
        truth = scene(TRAIN, 5, i)
        objects = set(node_words(caption(truth, rng(i)), variant))
        assert objects <= truth.classes
        found += len(objects)
        possible += len(truth.classes)
    assert found / possible > 0.97  # CHAIR's word rules miss "bus" or "vases"; see the scorer


def test_captions_name_every_class_once_as_subject():
    for i in range(500):
        truth = scene(TRAIN, 6, i)
        text = caption(truth, rng(i))
        assert set(named(text)) == truth.classes
        subjects = Counter()
        for sentence in text.split(" . "):
            sentence = re.sub(r" (to the left of|to the right of|above|below|near) the .*", "",
                              sentence)  # fmt: skip
            subjects.update(named(sentence))
        assert subjects == Counter(truth.classes)
        assert text.endswith(" .")
        assert text == text.lower() == " ".join(text.split())


def test_caption_counts_and_places():
    checked = Counter()
    for i in range(400):
        truth = scene(TRAIN, 7, i)
        members = {n: [x for x in truth.instances if x.name == n] for n in truth.classes}
        for sentence in caption(truth, rng(i)).split(" . "):
            for number, word in enumerate(("two", "three"), start=2):
                for name, instances in members.items():
                    if f"{word} {language.plural(name)}" in sentence:
                        assert len(instances) == number
                        checked["count"] += 1
            if match := re.fullmatch(r"there is (.*) (on the left side|in the middle|on the right "
                                     r"side)( \.)?", sentence):  # fmt: skip
                (instance,) = members[named(match[1])[0]]
                third = int(3 * (instance.x + instance.width / 2) / 80)
                assert ("left" in match[2], "middle" in match[2], "right" in match[2])[third]
                checked["side"] += 1
    assert min(checked["count"], checked["side"]) > 50


def test_mean_length():
    lengths = [len(caption(scene(TRAIN, 8, i), rng(i)).split()) for i in range(1000)]
    assert np.mean(lengths) == pytest.approx(40, abs=2)
    assert max(lengths) <= 88


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("dog", 1, "a dog"),
        ("apple", 1, "an apple"),
        ("person", 2, "two people"),
        ("skis", 1, "a pair of skis"),
        ("scissors", 3, "three pairs of scissors"),
        ("sheep", 2, "two sheep"),
        ("knife", 2, "two knives"),
        ("traffic light", 3, "three traffic lights"),
    ],
)
def test_noun_phrases(name, count, expected):
    assert language.noun_phrase(name, count) == expected


def test_existence_texts():
    assert existence_question("oven") == "is there an oven in the image ?"
    assert existence_question("skis") == "is there a skis in the image ?"
    assert existence_answer("skis", True) == "yes , there is a pair of skis in the image ."
    assert existence_answer("oven", False) == "no , there is no oven in the image ."


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ((10, 42), "to the left of"),
        ((70, 38), "to the right of"),
        ((45, 10), "above"),
        ((35, 70), "below"),
        ((30, 30), "to the left of"),
    ],
)
def test_relation(subject, expected):
    assert language.relation(subject, (40, 40)) == expected


def test_label_noise_names_one_absent_class_of_the_theme_from_the_third_sentence_on():
    noisy = dataclasses.replace(TRAIN, label_noise=1.0)
    seen = Counter()
    for i in range(400):
        truth = scene(noisy, 3, i)
        sentences = caption(truth, rng(i)).removesuffix(" .").split(" . ")
        invented = [(k, n) for k, s in enumerate(sentences) for n in named(s)
                    if n not in truth.classes]  # fmt: skip
        assert len(invented) == 1
        position, name = invented[0]
        assert name in theme_classes(truth.theme)
        closing = (
            sentences[-1].startswith(("overall", "the scene suggests"))
            or " looks calm " in (sentences[-1])
        )
        assert position >= min(2, len(sentences) - closing - 1)
        seen[name] += 1
    assert len(seen) > 30


def test_label_noise_rate_and_weights():
    half = dataclasses.replace(TRAIN, label_noise=0.4)
    count = sum(
        bool(set(named(caption(scene(half, 4, i), rng(i)))) - scene(half, 4, i).classes)
        for i in range(1500)
    )
    assert count / 1500 == pytest.approx(0.4, abs=0.05)
    # A class with probability 0.6 is named 2 ** 1.5 = 2.8 times as often as one with 0.3.
    noisy = dataclasses.replace(TRAIN, label_noise=1.0)
    empty = dataclasses.replace(scene(noisy, 0, 0), theme="dining room", instances=())
    drawn = Counter(
        named(language._noise_sentence(empty, language.BY_NAME["dining room"], generator))[0]
        for generator in [rng(0)]
        for _ in range(6000)
    )
    assert drawn["fork"] / drawn["pizza"] == pytest.approx(2**1.5, rel=0.2)


def test_questions_are_different_and_their_answers_true():
    kinds = Counter()
    for i in range(600):
        truth = scene(TRAIN, 9, i)
        counts = Counter(x.name for x in truth.instances)
        box = {x.name: x for x in truth.instances}
        asked = questions(truth, rng(i), 5)
        assert len({q for q, _ in asked}) == 5
        for question, answer in asked:
            assert question == " ".join(question.split())
            names = named(question)
            if question.startswith("is there"):
                kinds[answer.split()[0]] += 1
                assert answer.startswith("yes , " if names[0] in counts else "no , ")
                assert named(answer) == names
            elif question.startswith("how many"):
                kinds["count"] += 1
                assert answer == ("one", "two", "three")[counts[names[0]] - 1]
            else:
                kinds["relation"] += 1
                one, other = (box[n] for n in names)
                assert counts[names[0]] == counts[names[1]] == 1
                assert named(answer) == [names[1]]
                dx, dy = (a - b for a, b in zip(one.centre, other.centre, strict=True))
                holds = {"left": dx <= 0, "right": dx >= 0, "above": dy <= 0, "below": dy >= 0}
                word = next(w for w in holds if w in answer.split())
                assert holds[word]
                assert (word in ("left", "right")) == (abs(dx) >= abs(dy))
    total = sum(kinds.values())
    assert total == 3000
    assert kinds["count"] / total == pytest.approx(0.13, abs=0.04)
    assert kinds["relation"] / total == pytest.approx(0.13, abs=0.04)
    # Questions are never repeated within a picture, which has few present and many absent classes.
    assert 0.4 < kinds["yes"] / (kinds["yes"] + kinds["no"]) < 0.5


@pytest.mark.parametrize("n", [0, 41])
def test_number_of_questions(n):
    with pytest.raises(ValueError, match=f"n = {n}"):
        questions(scene(TRAIN, 0, 0), rng(), n)


def test_forty_questions_about_any_scene():
    lone = next(s for s in (scene(TRAIN, 0, i) for i in range(999)) if len(s.instances) == 1)
    assert len(questions(lone, rng(), 40)) == 40


def test_vocabulary_is_closed():
    words = vocabulary()
    known = set(words)
    assert words == sorted(known)
    assert len(words) <= 256
    assert {"user", "assistant", ":", ".", ",", "?"} <= known
    noisy = dataclasses.replace(TRAIN, label_noise=0.5)
    used = set()
    for i in range(2000):
        truth = scene(noisy, 12, i)
        texts = [caption(truth, rng(i)), *(t for qa in questions(truth, rng(i)) for t in qa)]
        used.update(w for t in texts for w in t.split())
    assert used <= known
    assert len(known - used) < 70, "the vocabulary holds many words that nothing says"


def test_the_vocabulary_is_a_copy():
    vocabulary().append("unicorn")
    assert "unicorn" not in vocabulary()
