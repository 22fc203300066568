"""The back ends beyond rules: triples, spaCy, scene-graph parsers, pronouns and coreference."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest

from data_tools.sentinel.objects.make import make_extractor
from data_tools.sentinel.objects.mentions import MentionRules
from data_tools.sentinel.objects.parsers import (
    PIPELINE,
    SpacyExtractor,
    TripleExtractor,
    factual_extractor,
    graph_triples,
    load_pipeline,
    scene_graph_extractor,
)
from data_tools.sentinel.objects.pronouns import FastCoref, load_fastcoref, only_pronoun_subject
from data_tools.sentinel.objects.triples import objects_of_triples, parse_triples
from mmlm.errors import InputError
from tests.golden import golden

NLP = [name for name in ("spacy", PIPELINE, "sng_parser") if importlib.util.find_spec(name) is None]
needs_nlp = pytest.mark.skipif(
    bool(NLP), reason=f"{', '.join(NLP)} missing: pip install 'mmlm[nlp]'"
)
absent_nlp = pytest.mark.skipif("spacy" not in NLP, reason="spaCy is installed")


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("sentinel/*.json"))
def test_acceptance_6_sentinel_1_objects_of_triples(path):
    cases = json.loads(path.read_text())["extract_triples"]
    assert cases
    for case in cases:
        assert objects_of_triples(case["triples"]) == case["objects"], case["triples"]


@pytest.mark.parametrize(
    ("triples", "objects"),
    [
        ([["cat", "are", "dog"]], ["cat"]),
        ([["cat", "has", "tail"]], ["cat", "tail"]),
        ([["dogs", "near", "dog"]], ["dog"]),
        ([["old idea", "of", "white wall"]], ["white wall"]),
        ([["car", "near", "red car"]], ["car"]),  # its only concrete noun is there already
        ([["red car", "near", "car"]], ["red car", "car"]),
        ([["red car", "near", "red car"]], ["red car"]),
        ([["", "on", "mat"], ["a", "b", "c", "d"]], ["mat"]),
        ([], []),
    ],
)
def test_triples_by_hand(triples, objects):
    assert objects_of_triples(triples) == objects


def test_what_counts_as_a_noun_can_be_asked_of_a_tagger():
    assert objects_of_triples([["cat", "on", "mat"]], lambda phrase: []) == []


def test_text_of_the_factual_parser():
    text = "( table , surrounded by , chairs ), ( cat, is, black ), ( x ), ("
    assert parse_triples(text) == [
        ["table", "surrounded by", "chairs"], ["cat", "is", "black"], ["x"],
    ]  # fmt: skip
    assert parse_triples("nonsense ( )") == []


def test_a_parser_adds_to_the_coco_words_and_invents_nothing():
    graph = [
        ["table", "with", "flowers"], ["puppy", "on", "lamp shade"], ["curtain", "near", "calm"],
    ]  # fmt: skip
    extractor = TripleExtractor("fake", lambda sentences: [graph], {"weights": "w"})
    [mentions] = extractor.extract(["Flowers on a dining table, and a lamp shade."])
    # The curtain and the puppy stand nowhere in the sentence; the table is a dining table.
    assert [(m.text, m.lemma, m.canonical) for m in mentions] == [
        ("Flowers", "flower", "flower"),
        ("dining table", "dining table", "dining table"),
        ("lamp shade", "lamp shade", "lamp shade"),
    ]
    assert extractor.facts["name"] == "fake"
    assert extractor.facts["weights"] == "w"


def test_a_parser_obeys_the_rules():
    extractor = TripleExtractor(
        "fake", lambda s: [[["flower", "in", "picture"]]], {}, rules=MentionRules(coco_only=True)
    )
    assert extractor.extract(["A flower in a picture."]) == [[]]
    extractor = TripleExtractor("fake", lambda s: [[["flower", "in", "picture"]]], {})
    assert [m.lemma for m in extractor.extract(["A flower in a picture."])[0]] == ["flower"]


def test_a_part_of_a_coco_word_is_no_object_of_its_own():
    extractor = TripleExtractor("fake", lambda sentences: [[["bear", "is", "brown"]]], {})
    [mentions] = extractor.extract(["A teddy bear is brown."])
    assert [mention.lemma for mention in mentions] == ["teddy bear"]


def test_an_object_of_the_graph_comes_once():
    graph = [["red tulips", "near", "red tulip"]]
    extractor = TripleExtractor("fake", lambda sentences: [graph], {})
    [mentions] = extractor.extract(["Red tulips near a red tulip."])
    assert [mention.text for mention in mentions] == ["Red tulips"]


def test_graph_of_the_scene_graph_parser_as_triples():
    graph = {
        "entities": [{"head": "woman"}, {"head": "piano"}, {"head": "hat"}],
        "relations": [{"subject": 0, "relation": "playing", "object": 1}],
    }
    assert objects_of_triples(graph_triples(graph)) == ["woman", "piano", "hat"]


class FakePipeline:
    """What `SpacyExtractor` sees of spaCy: words, tags, classes and the roots of chunks."""

    meta = {"lang": "en", "name": "fake", "version": "1"}

    def __init__(self, tagged, roots):
        self.tagged, self.roots = tagged, roots

    def pipe(self, sentences):
        for sentence in sentences:
            yield self.document(sentence)

    def document(self, sentence):
        tokens, cursor = [], 0
        for i, (text, tag, pos) in enumerate(self.tagged):
            at = sentence.index(text, cursor)
            tokens.append(SimpleNamespace(text=text, idx=at, tag_=tag, pos_=pos, i=i))
            cursor = at + len(text)
        chunks = [SimpleNamespace(root=tokens[i]) for i in self.roots]
        return type("Doc", (list,), {"noun_chunks": chunks})(tokens)


def test_spacy_glue_without_spacy():
    tagged = [("Two", "CD", "NUM"), ("Puppies", "NNS", "NOUN"), ("near", "IN", "ADP"),
              ("he", "PRP", "PRON"), ("and", "CC", "CCONJ"), ("hay", "NN", "NOUN"),
              ("bears", "NNS", "VERB")]  # fmt: skip
    extractor = SpacyExtractor(FakePipeline(tagged, roots=[1, 3, 5]))
    [mentions] = extractor.extract(["Two Puppies near he and hay bears"])
    # "bears" is a verb by its class; "he" is no noun here, though WordNet knows helium.
    assert [(m.lemma, m.start) for m in mentions] == [("puppy", 4), ("hay", 24)]
    assert extractor.facts["pipeline"] == "en_fake 1"


@absent_nlp
@pytest.mark.parametrize("name", ["spacy", "sng"])
def test_failure_spacy_is_missing(name):
    with pytest.raises(InputError, match="spaCy cannot be imported") as caught:
        make_extractor(name)
    assert caught.value.advice == "pip install 'mmlm[nlp]'"


def fake_spacy(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))


def test_failure_the_pipeline_is_missing_or_not_english(monkeypatch):
    def absent(name, exclude):
        raise OSError("E050")

    fake_spacy(monkeypatch, absent)
    with pytest.raises(InputError, match="'en_core_web_lg' is not installed") as caught:
        load_pipeline("en_core_web_lg")
    assert caught.value.advice == "python -m spacy download en_core_web_lg"
    with pytest.raises(InputError) as caught:
        load_pipeline()
    assert caught.value.advice == "pip install 'mmlm[nlp]'"
    fake_spacy(monkeypatch, lambda name, exclude: SimpleNamespace(lang="de"))
    with pytest.raises(InputError, match="reads 'de'"):
        load_pipeline("de_core_news_sm")


def test_failure_the_scene_graph_parser_is_missing(monkeypatch):
    fake_spacy(monkeypatch, lambda name, exclude: SimpleNamespace(lang="en"))
    monkeypatch.setitem(sys.modules, "sng_parser", None)
    with pytest.raises(InputError, match="sng_parser cannot be imported"):
        scene_graph_extractor()


@needs_nlp
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["spacy", "sng"])
def test_real_pipelines(name):
    extractor = make_extractor(name)
    [mentions, nothing] = extractor.extract(
        ["The table is surrounded by chairs, and a vase with flowers is on it.", "It is calm."]
    )
    assert {m.canonical for m in mentions} == {"dining table", "chair", "vase", "flower"}
    assert nothing == []
    assert extractor.facts["pipeline"].startswith("en_core_web_sm")


@needs_nlp
@pytest.mark.filterwarnings("ignore")
@pytest.mark.golden
@pytest.mark.parametrize("path", golden("sentinel/*.json"))
def test_acceptance_6_sentinel_1_extraction_with_spacy(path):
    for case in json.loads(path.read_text())["extract_coco"]:
        [mentions] = make_extractor("spacy").extract([case["sentence"]])
        assert set(case["objects"]) <= {m.lemma for m in mentions}, case["sentence"]


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5") / "tiny-factual"
    words = ["<pad>", "</s>", "<unk>", "(", ")", ",", "cat", "mat", "on", "is", "black"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_factual_with_a_tiny_random_model(tiny_t5, monkeypatch):
    from transformers import T5ForConditionalGeneration

    extractor = make_extractor("factual", weights=tiny_t5)
    sentences = ["A Cat on a mat.", "Nothing."]
    mentions = extractor.extract(sentences)  # random weights write no triples: COCO words are left
    assert [[m.canonical for m in one] for one in mentions] == [["cat"], []]
    assert extractor.facts["weights"] == "tiny-factual"
    seen = {}

    def generate(self, input_ids, attention_mask, **settings):
        import torch

        seen.update(
            settings,
            ids=input_ids.tolist(),
            shape=tuple(input_ids.shape),
            mask=attention_mask.sum(1).tolist(),
        )
        # "( cat , on , mat )" for every sentence.
        return torch.tensor([[0, 3, 6, 5, 8, 5, 7, 4, 1]]).repeat(len(input_ids), 1)

    monkeypatch.setattr(T5ForConditionalGeneration, "generate", generate)
    mentions = factual_extractor(tiny_t5).extract(sentences)
    assert [[m.canonical for m in one] for one in mentions] == [["cat", "mat"], []]
    # "Generate Scene Graph : a cat on a mat": lower case and without the full stop; the tiny
    # vocabulary knows three of the words.
    assert seen["ids"][0] == [2, 2, 2, 2, 2, 6, 8, 2, 7]
    assert seen["max_length"] == 200
    assert seen["num_beams"] == 1
    assert seen["do_sample"] is False
    assert seen["mask"][0] > seen["mask"][1]  # padded, and told so


def test_failure_wrong_weights_of_the_factual_parser(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        factual_extractor(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no sequence-to-sequence model"):
        factual_extractor(tmp_path)


@pytest.mark.parametrize(
    "sentence",
    [
        "It is sitting on the couch.",
        "They are near the table.",
        "He holds a cup and reads a book.",
        "This is a kitchen.",
        "These are placed on a table.",
        "In the background, it can be seen.",
        "In the living room it stands on a rug.",
        "It also features a dog, which is black.",
        "Both are wearing hats.",
        "She is standing next to a car with a dog in it.",
        "overall it looks like a typical kitchen .",
        "It",
    ],
)
def test_pronouns_are_the_only_subjects(sentence):
    assert only_pronoun_subject(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "There is a cat.",
        "A cat sits next to it.",
        "The dog and it are brown.",
        "It and the dog are brown.",
        "It is a sunny day and the man is walking.",
        "They look happy while the dog is sleeping.",
        "Its tail is long.",
        "Her dog is big.",
        "This image shows a dog.",
        "That dog is big.",
        "In the background a dog can be seen.",
        "On the table there is a cup.",
        "A man riding a bike.",
        "The man holding it is happy.",
        "Two of them are sitting.",
        "I can see a dog.",
        "two dogs can be seen in the image .",
        "the kitchen looks calm and tidy .",
        "",
    ],
)
def test_sentences_with_a_subject_of_their_own(sentence):
    assert not only_pronoun_subject(sentence)


def predictor(*clusters):
    seen = []

    def predict(texts):
        seen.append(texts)
        return [SimpleNamespace(get_clusters=lambda as_strings: list(clusters))]

    return predict, seen


def test_coreference_replaces_pronouns_of_the_sentence_only():
    context, sentence = "It rains on a red car.", "It is near a dog, and its owner likes it."
    car = (12, 21)
    second = len(context) + 1
    likes = second + sentence.rindex("it.")
    owner = second + sentence.index("its")
    predict, seen = predictor(
        [(0, 2), car, (second, second + 2), (owner, owner + 3), (likes, likes + 2)], [(0, 2)]
    )
    resolved = FastCoref(predict).resolve(context, sentence)
    assert resolved == "a red car is near a dog, and its owner likes a red car."
    assert seen == [[f"{context} {sentence}"]]


def test_coreference_takes_no_possessive_for_a_name():
    sentence = "Its owner drives a car and it shines."
    places = [(0, 3), (17, 22), (27, 29)]
    assert [sentence[start:end] for start, end in places] == ["Its", "a car", "it"]
    predict, _ = predictor(places)
    resolved = FastCoref(predict).resolve("", sentence)
    assert resolved == "Its owner drives a car and a car shines."


def test_coreference_without_context_or_name():
    predict, seen = predictor([(0, 2), (8, 10)])
    assert FastCoref(predict).resolve("", "It sees it.") == "It sees it."
    assert seen == [["It sees it."]]


@pytest.mark.skipif(
    importlib.util.find_spec("fastcoref") is not None, reason="fastcoref is installed"
)
def test_failure_fastcoref_is_missing():
    with pytest.raises(InputError, match="fastcoref cannot be imported") as caught:
        load_fastcoref("folder")
    assert "pip install fastcoref" in caught.value.advice
