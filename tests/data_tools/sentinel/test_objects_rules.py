"""Objects by rules: SENTINEL's golden vectors, the embedded world's captions, names, the cache."""

import json
import random

import numpy as np
import pytest

from data_tools.sentinel.objects import ObjectExtractor, ObjectMention
from data_tools.sentinel.objects.coco import (
    COCO_NAMES,
    canonical,
    coco_words,
    find_coco,
    same_object,
)
from data_tools.sentinel.objects.make import CachedExtractor, make_extractor
from data_tools.sentinel.objects.mentions import MentionRules
from data_tools.sentinel.objects.objectless import ObjectlessShare
from data_tools.sentinel.objects.rules import RulesExtractor
from data_tools.world.language import (
    CLOSINGS,
    NOISE,
    OPENINGS,
    PAIRS,
    RELATION,
    RELATIONS,
    SEVERAL,
    SIDES,
    caption,
    noun_phrase,
)
from data_tools.world.scenes import WorldConfig, scene
from data_tools.world.themes import THEMES
from mmlm.language.objects import node_words
from tests.golden import golden

AUTHORS = MentionRules(lemmatise_every_token=True, word_list="authors")
COCO_ONLY = MentionRules(coco_only=True)


def lemmas(sentence, rules=None):
    [mentions] = RulesExtractor(rules or MentionRules()).extract([sentence])
    return [mention.lemma for mention in mentions]


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("sentinel/*.json"))
def test_acceptance_6_sentinel_1_extraction_of_coco_words(path):
    cases = json.loads(path.read_text())["extract_coco"]
    assert cases
    for case in cases:
        assert coco_words(case["sentence"]) == case["objects"], case["sentence"]
        # The extractor with both parity switches finds the same words, and more objects beside.
        [mentions] = RulesExtractor(AUTHORS).extract([case["sentence"]])
        named = [m.lemma for m in mentions if m.canonical in COCO_NAMES]
        assert named == case["objects"], case["sentence"]


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("sentinel/*.json"))
def test_acceptance_6_sentinel_1_objects_of_the_scenes_are_found_by_rules(path):
    """The golden sentences' objects, given by hand there, are among those found."""
    for drawn in json.loads(path.read_text())["scenes"]:
        for step in drawn["steps"]:
            for sentence, objects in zip(step["candidates"], step["objects"], strict=True):
                [mentions] = RulesExtractor().extract([sentence])
                found = {mention.canonical for mention in mentions}
                assert {canonical(name) for name in objects} <= found, sentence


def test_a_sentence_worked_out_by_hand():
    sentence = 'Two Puppies in "red" T-shirts chase a tennis ball past the palm trees.'
    [mentions] = RulesExtractor().extract([sentence])
    assert mentions == [
        ObjectMention("Puppies", "puppy", "dog", 4, 11),
        ObjectMention("T-shirts", "t-shirt", "t-shirt", 21, 29),
        ObjectMention("ball", "ball", "sports ball", 45, 49),
        ObjectMention("palm trees", "palm tree", "palm tree", 59, 69),
    ]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        # Rows of nouns name what their last noun names; a COCO word in them wins.
        ("A kitchen table stands in a kitchen.", ["table", "kitchen"]),
        ("The kitchen scene is bright.", []),
        # The forms in which plurals come, right and wrong in NLTK's lemmatiser.
        ("Three vases, two knives and some glasses.", ["vase", "knife", "glasses"]),
        ("Wine glasses and a wine glass.", ["wine glass", "wine glass"]),
        ("Men and women wear shorts.", ["man", "woman", "shorts"]),
        # Amounts are no objects, containers are.
        ("A pair of skis and a piece of broccoli.", ["ski", "broccoli"]),
        ("A bunch of bananas beside a crowd of surfers.", ["banana", "surfer"]),
        ("A crowd is waiting.", ["crowd"]),
        ("A vase of flowers.", ["vase", "flower"]),
        # A name in WordNet, and the same where a COCO word has claimed a part of it.
        ("A palm tree at a train station.", ["palm tree", "train", "station"]),
        # A colour, a fruit.
        ("An orange shirt.", ["shirt"]),
        ("There is an orange on the plate.", ["orange", "plate"]),
        # Part of a toilet; pairs that are one object; an animal's age.
        ("The toilet seat is near a seat.", ["toilet"]),
        ("A dining table and a coffee table.", ["dining table", "coffee table"]),
        ("A baby elephant and a baby.", ["elephant", "baby"]),
        ("A remote control lies there.", ["remote control"]),
        # Words about the picture.
        ("In the background of the image, on the left side of the scene, is a photo.", []),
        ("", []),
    ],
)
def test_rules(sentence, expected):
    assert lemmas(sentence) == expected


def test_parity_takes_every_token_for_a_noun():
    sentence = "She bears a load and he ties it."
    assert "bear" in lemmas(sentence, MentionRules(lemmatise_every_token=True))
    assert "bear" not in lemmas(sentence)
    assert coco_words("Dogs chase CATS.") == ["dog", "cat"]
    assert coco_words("A baby was there.") == []  # "baby" is not on the authors' list


def test_word_lists_differ_where_documented():
    sentence = "a mother and a brother watch a monitor with a remote by a sailboard .".split()
    found = {name: [f.word for f in find_coco(sentence, name)] for name in ("chair", "authors")}
    assert found["chair"] == ["mother", "brother", "monitor", "remote", "sailboard"]
    assert found["authors"] == ["brother"]


def test_acceptance_6_world_captions_name_exactly_the_classes_of_their_scene():
    """Precision and recall 1 against the generator's truth, on 600 captions."""
    world = WorldConfig(label_noise=0.0)
    everything, coco = RulesExtractor(), RulesExtractor(COCO_ONLY)
    places = {theme.word for theme in THEMES}
    for index in range(600):
        drawn = scene(world, 5, index, "test")
        text = caption(drawn, np.random.default_rng(index))
        sentences = [part.strip() + " ." for part in text.split(" .") if part.strip()]
        found = {m.canonical for mentions in coco.extract(sentences) for m in mentions}
        assert found == set(drawn.classes), text
        others = {m.lemma for ms in everything.extract(sentences) for m in ms} - places
        assert {canonical(name) for name in others} == set(drawn.classes), text


@pytest.mark.parametrize("name", sorted(COCO_NAMES))
def test_every_class_is_found_in_every_sentence_of_the_world(name):
    extractor = RulesExtractor(COCO_ONLY)
    for template in (*PAIRS, *SEVERAL, *SIDES, *NOISE, RELATION, *OPENINGS):
        for count in (1, 2):
            things = noun_phrase(name, count)
            sentence = template.format(
                verb="are", things=things, thing=things, previous="dog", relation=RELATIONS[0],
                a_theme="a kitchen",
            )  # fmt: skip
            [mentions] = extractor.extract([sentence])
            expected = [name, "dog"] if "{previous}" in template else [name]
            assert [mention.canonical for mention in mentions] == expected, sentence


def test_closings_of_the_world_name_a_place_at_most():
    for theme in THEMES:
        for template in CLOSINGS:
            sentence = template.format(theme=theme.word)
            assert lemmas(sentence, COCO_ONLY) == []
            assert set(lemmas(sentence)) <= {theme.word}, sentence


ALPHABET = ["dog", "Dogs", "'s", '"', "''", "``", "“a”", "İstanbul", "café", "can't", "...", "-",
            "wine", "glasses", "of", "a", "\n", "\t", "(", "é", "5", "...a", "."]  # fmt: skip


def test_places_are_right_in_any_text():
    rng = random.Random(0)
    for rules in (MentionRules(), AUTHORS, COCO_ONLY):
        extractor = RulesExtractor(rules)
        for _ in range(300):
            sentence = rng.choice(["", " "]).join(rng.choices(ALPHABET, k=rng.randrange(12)))
            [mentions] = extractor.extract([sentence])
            starts = [mention.start for mention in mentions]
            assert starts == sorted(starts)
            for mention in mentions:
                assert sentence[mention.start : mention.end] == mention.text != ""


def test_letters_that_grow_in_lower_case_move_no_place():
    [mentions] = RulesExtractor(AUTHORS).extract(["İİİ a dog"])
    assert [(mention.text, mention.start) for mention in mentions] == [("dog", 6)]


def test_extraction_does_not_depend_on_the_other_sentences():
    sentences = ["A dog.", "Two cats on a mat.", "", "A dog."]
    extractor = RulesExtractor()
    together = extractor.extract(sentences)
    assert together == [extractor.extract([sentence])[0] for sentence in sentences]
    assert extractor.extract([]) == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("dog", "puppy", True),
        ("dog", "puppies", True),
        ("Dining Tables", "desk", True),
        ("bow tie", "ties", True),
        ("passenger trains", "train", True),
        ("men", "person", True),
        ("cheesecake", "cake", True),
        ("street lights", "traffic light", True),
        ("flowers", "flower", True),
        ("red cars", "red car", True),
        ("red car", "car", False),
        ("car", "carrot", False),
        ("shorts", "short", False),
        ("orange", "oranges", True),
        ("", "dog", False),
    ],
)
def test_same_object(one, other, same):
    assert same_object(one, other) is same
    assert same_object(other, one) is same


def test_canonical_is_idempotent_and_agrees_with_the_scorer():
    for name in COCO_NAMES:
        assert canonical(name) == name
    for word in ("puppy", "sedan", "sofa", "kitten", "fridge", "lady"):
        assert [canonical(word)] == node_words(f"A {word}.")


class Counting(ObjectExtractor):
    facts = {"name": "counting"}

    def __init__(self):
        self.asked = []

    def extract(self, sentences):
        self.asked.append(list(sentences))
        return [[ObjectMention(s, s, s, 0, len(s))] for s in sentences]


def test_the_cache_asks_once_and_forgets_the_oldest():
    inner = Counting()
    cached = CachedExtractor(inner, size=2)
    assert [m[0].text for m in cached.extract(["a", "b", "a"])] == ["a", "b", "a"]
    assert inner.asked == [["a", "b"]]
    cached.extract(["a"])  # used again: "b" is the oldest now
    cached.extract(["c"])
    cached.extract(["a", "b"])
    assert [asked for asked in inner.asked if asked] == [["a", "b"], ["c"], ["b"]]
    assert len(cached._known) == 2
    assert cached.facts == inner.facts


def test_what_a_caller_does_with_an_answer_does_not_reach_the_cache():
    cached = CachedExtractor(Counting(), size=2)
    cached.extract(["a"])[0].clear()
    assert len(cached.extract(["a"])[0]) == 1


def test_make_extractor():
    assert make_extractor().facts["name"] == "rules"
    assert isinstance(make_extractor(cache=0), RulesExtractor)
    rules = MentionRules(coco_only=True, ignored={"b", "a"})
    facts = make_extractor("rules", rules=rules).facts
    assert facts["coco_only"] is True
    assert json.loads(json.dumps(facts))["ignored"] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "bert"}, "extractor must be one of rules, spacy, sng, factual, got 'bert'"),
        ({"name": "factual"}, "factual needs weights"),
        ({"cache": -1}, "cache must be at least 0"),
    ],
)
def test_failure_wrong_settings_of_an_extractor(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_extractor(**arguments)
    with pytest.raises(ValueError, match="word_list must be one of chair, authors"):
        MentionRules(word_list="coco")


def test_failure_text_that_is_not_english_raises_the_objectless_share():
    german = ["Eine Frau steht neben einem Fahrrad.", "Der Himmel ist blau."]
    english = ["A woman stands beside a bicycle.", "A dog runs."]
    share = ObjectlessShare(images=3, limit=0.6)
    extractor = RulesExtractor()
    warnings = [share.add(extractor.extract(text)) for text in [english] * 3 + [german] * 3]
    assert warnings[:5] == [None] * 5
    assert "name no object" in warnings[5]
    assert share.shares[0] == 0
    assert share.shares[1] > 0.6


def test_objectless_share_by_hand():
    mention = ObjectMention("dog", "dog", "dog", 0, 3)
    share = ObjectlessShare(images=2, limit=0.6)
    assert share.add([[], [mention], []]) is None
    assert share.add([[], [mention]]) is None  # 3 of 5: the limit itself is allowed
    assert share.add([]) is None
    assert share.add([]) is None  # no sentence at all
    assert share.shares == [0.6, 0.0]
    assert share.add([[]]) is None
    assert share.add([[]]).startswith("100% of the sentences of the last 2 images")
    for wrong in ({"images": 0}, {"limit": 1.0}, {"limit": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ObjectlessShare(**wrong)
