"""CHAIR by hand: every metric, every surprise of the two word procedures, and bad input."""

import json
import random
import subprocess
import sys

import pytest

from benchmarks import chair
from mmlm.errors import InputError
from mmlm.language import words

TRUTH = {1: {"dog", "person"}, 2: {"cat"}, 3: set()}
CAPTIONS = [
    # 2 tokens per "a dog" ...: a dog and a cat . a cat sleeps .   -> mentions dog, cat, cat
    {"image_id": 1, "caption": "A dog and a cat. A cat sleeps."},
    {"image_id": 2, "caption": "A kitten."},
    {"image_id": 2, "caption": "Nothing here."},
]


def test_metrics_by_hand():
    result = chair.score(CAPTIONS, TRUTH)
    # Mentions: dog, cat, cat | cat | -; hallucinated: both cats of picture 1.
    assert result.counts == {
        "images": 2,
        "captions": 3,
        "hallucinated_captions": 1,
        "mentions": 4,
        "hallucinated_mentions": 2,
        "named_objects": 3,  # {dog, cat} + {cat} + {}
        "found_objects": 2,  # dog, kitten
        "true_objects": 4,  # {dog, person} + {cat} twice: two captions of picture 2
        "words": 10 + 3 + 3,
        "sentences": 4,
        "duplicate_sentences": 0,
        "captions_of_unknown_images": 0,
    }
    assert result.metrics == pytest.approx(
        {
            "chair_s": 1 / 3,
            "chair_i": 2 / 4,
            "recall": 2 / 4,
            "precision": 2 / 3,
            "f1": 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2),
            "mean_length": 16 / 3,
            "duplicate_sentence_share": 0.0,
        }
    )
    assert result.name == "chair/wordnet"
    assert [m.sentence for m in result.per_caption[0].mentions] == [0, 0, 1]


def test_hallucination_by_place_in_the_caption():
    text = "A dog. A dog. A cat and a person. A cat."
    result = chair.score([{"image_id": 1, "caption": text}], TRUTH)
    assert [(m.numerator, m.denominator) for m in result.by_sentence()] == [
        (0, 1),
        (0, 1),
        (1, 2),
        (1, 1),
    ]
    # Sentences 0, 1 | 2 | 3 are the thirds 3 * i // 4.
    assert [m.value for m in result.by_third()] == [0.0, 0.5, 1.0]
    assert result.counts["duplicate_sentences"] == 1
    assert result.metrics["duplicate_sentence_share"] == 1 / 4


def test_sentence_without_mentions_has_an_undefined_rate():
    result = chair.score([{"image_id": 1, "caption": "Hello there. A dog."}], TRUTH)
    first, second = result.by_sentence()
    assert first.value is None
    assert first.as_json() == {"value": None, "undefined": True, "numerator": 0, "denominator": 0}
    assert second.value == 0.0


def test_caption_without_sentences():
    result = chair.score([{"image_id": 1, "caption": ""}], TRUTH)
    assert result.metrics["chair_i"] is None
    assert result.metrics["chair_s"] == 0.0
    assert result.metrics["duplicate_sentence_share"] is None
    assert result.by_sentence() == []


def test_unknown_picture_has_no_objects_and_is_counted():
    result = chair.score([{"image_id": 99, "caption": "A dog."}], TRUTH)
    assert result.metrics["chair_i"] == 1.0
    assert result.metrics["recall"] is None
    assert result.counts["captions_of_unknown_images"] == 1


def test_json_form_has_values_counts_and_intervals():
    record = chair.score(CAPTIONS, TRUTH).as_json(resamples=50)
    assert json.loads(json.dumps(record)) == record
    low, high = record["metrics"]["chair_i"]["interval"]
    assert low <= record["metrics"]["chair_i"]["value"] <= high
    assert record["metric"] == "chair/wordnet"


# --- properties -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    source = random.Random(3)
    names = ["dog", "cat", "person", "bus", "two chairs", "a tree"]
    return [
        {"image_id": source.randint(1, 3), "caption": f"A {source.choice(names)} and a dog."}
        for _ in range(40)
    ]


def test_order_of_captions_is_irrelevant(many):
    shuffled = random.Random(1).sample(many, len(many))
    assert chair.score(shuffled, TRUTH).as_json(resamples=20) == chair.score(many, TRUTH).as_json(
        resamples=20
    )


def test_caption_without_objects_lowers_chair_s_and_leaves_chair_i(many):
    before = chair.score(many, TRUTH).metrics
    after = chair.score([*many, {"image_id": 1, "caption": "A sunny day."}], TRUTH).metrics
    assert after["chair_i"] == before["chair_i"]
    assert after["chair_s"] < before["chair_s"]


def test_doubling_the_file_changes_nothing(many):
    once = chair.score(many, TRUTH).measures(resamples=20)
    twice = chair.score(many + many, TRUTH).measures(resamples=20)
    for name, measure in once.items():
        assert twice[name].value == pytest.approx(measure.value)
        assert twice[name].interval == measure.interval


# --- the surprises of the word procedures ---------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "pattern", "wordnet"),
    [
        ("A bus.", [], ["bus"]),
        ("A minibus and an airbus.", [], ["bus", "airplane"]),
        ("Two buses.", ["bus"], ["bus"]),
        ("He has two ties.", [], ["tie"]),
        ("Two men.", ["person"], []),
        ("He is seated.", [], ["chair"]),
        ("They are boating.", [], ["boat"]),
        ("They are training.", [], ["train"]),
        ("They are booking a trip.", [], ["book"]),
        ("They were tied.", [], ["tie"]),
        ("They are skiing.", [], ["skis"]),
        ("They are biking.", [], ["bicycle"]),
        ("Two vases.", ["vase"], []),
        ("Some smartphones.", ["cell phone"], []),
        ("Two macbooks.", ["laptop"], []),
        ("Two longboards.", ["surfboard"], []),
        ("Two teddybears.", ["teddy bear"], []),
        ("Two firetrucks.", ["truck"], []),
        ("A cheesecake.", [], []),
        ("An iPhone.", [], []),
        ("A motor bike.", [], []),
        ("Two skis.", ["skis"], ["skis"]),
        ("A person’s dog — there 🙂.", ["person", "dog"], ["person", "dog"]),
        ("東京 and a cat.", ["cat"], ["cat"]),
    ],
)
def test_surprises(caption, pattern, wordnet):
    assert chair.node_words(caption, "pattern") == pattern
    assert chair.node_words(caption, "wordnet") == wordnet


def test_two_word_names_depend_on_the_tag_under_wordnet_only():
    caption = "The parking meter stands there."
    words_, letters = words.tokenize(caption.lower()).words, []
    letters = words.part_of_speech(words_)
    found = chair.node_words(caption, "wordnet")
    # "parking" as a verb becomes "park", and "park meter" is no name.
    assert found == ([] if letters[1] == "v" else ["parking meter"])
    assert chair.node_words(caption, "pattern") == ["parking meter"]
    assert words.lemmatize("parking", "v") == "park"
    assert words.lemmatize("potted", "v") == "pot"


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A hot dog.", ["hot dog"]),
        ("A home plate and a train track.", []),  # these two only hide "plate" and "train"
        ("A baby elephant and an adult giraffe.", ["elephant", "giraffe"]),
        ("A passenger train.", ["train"]),
        ("A bow tie.", ["tie"]),
        ("Two wine glasses.", ["wine glass"]),
        ("A toilet seat.", ["toilet"]),
        ("A stove top oven.", ["oven", "oven"]),  # three words never match the two-word key
        ("A seat beside the toilet.", ["toilet"]),
        ("A seat beside the sofa.", ["chair", "couch"]),
        ("A dog. A dog.", ["dog", "dog"]),
    ],
)
def test_two_word_names_and_toilet_seats(caption, expected):
    assert chair.node_words(caption, "pattern") == expected


def test_index_schemes_around_a_dropped_seat():
    caption = "A seat near the toilet, a hot dog and a cat."
    (scored,) = chair.score([{"image_id": 3, "caption": caption}], TRUTH, "pattern").per_caption
    assert scored.objects == ["toilet", "hot dog", "cat"]
    # tokens:  a seat near the toilet , a hot dog and a cat .      words: a seat ... , a hot-dog
    assert scored.hallucination_idxs() == [4, 7, 10]
    assert scored.hallucination_idxs("pai") == [3, 6, 9]  # after "seat" was taken out
    # The scorers read token positions from a list that still holds "seat".
    assert scored.hallucination_idxs("original") == [3, 6, 10]
    assert [caption.lower()[start:end] for start, end, _ in scored.spans()] == [
        "toilet",
        "hot dog",
        "cat",
    ]


def test_spans_survive_rewritten_quotation_marks():
    (scored,) = chair.score([{"image_id": 3, "caption": 'The "Dog" and a cat.'}], TRUTH).per_caption
    assert ['the "dog" and a cat.'[start:end] for start, end, _ in scored.spans()] == ["dog", "cat"]


@pytest.mark.parametrize(
    ("word", "singular"),
    [
        ("dogs", "dog"),
        ("bus", "bu"),
        ("glass", "glas"),
        ("tennis", "tenni"),
        ("ties", "ty"),
        ("cookies", "cookies"),
        ("women", "woman"),
        ("four", "fmy"),
        ("hour", "hmy"),
        ("s", "s"),
        ("es", "es"),
        ("dogs'", "dog's"),
        ("''", "'s's"),
        ("mothers-in-law", "mother-in-law"),
        ("t-shirts", "t-shirt"),
        ("knives", "knife"),
        ("buses", "bus"),
        ("people", "person"),
        ("diagnoses", "diagnosis"),
        ("", ""),
    ],
)
def test_singular_rules(word, singular):
    assert words.singularize(word) == singular


def test_sentences_are_split_before_words():
    tokens = words.tokenize("a dog. a cat")
    assert tokens.words == ("a", "dog", ".", "a", "cat")
    assert tokens.sentence == (0, 0, 0, 1, 1)


# --- truth ----------------------------------------------------------------------------------------


def coco(**change):
    data = {
        "images": [{"id": 1, "file_name": "1.png"}, {"id": 2}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"image_id": 1, "category_id": 18},
            {"image_id": 1, "category_id": 18},
            {"image_id": 1, "category_id": 1},
        ],
    }
    return data | change


def write(path, data):
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_truth_unites_instances_and_reference_captions(tmp_path):
    instances = write(tmp_path / "instances.json", coco())
    captions = write(
        tmp_path / "captions.json",
        {"annotations": [{"image_id": 2, "caption": "Two buses and a puppy."}]},
    )
    assert chair.truth_from_coco(instances) == {1: {"dog", "person"}, 2: set()}
    assert chair.truth_from_coco([instances], captions, "pattern") == {
        1: {"dog", "person"},
        2: {"bus", "dog"},
    }


def test_shipped_truth_of_val2014():
    truth = chair.truth_of_val2014()
    assert len(truth) == 40504
    assert truth[42] == {"dog"} | (truth[42] - {"dog"})
    assert set(chair.subset_ids("opera500")) <= truth.keys()
    assert len(set(chair.subset_ids("opera500"))) == 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (coco(categories=[{"id": 18, "name": "unicorn"}]), "80 objects only; it has 'unicorn'"),
        (coco(annotations=[{"image_id": 1, "category_id": 99}]), "category_id 99 is not among"),
        (coco(annotations=[{"image_id": 1}]), r"annotations\[0\] has no 'category_id'"),
        (coco(images=[{"file_name": "x"}]), r"images\[0\] has no 'id'"),
        ({"images": []}, "not in COCO format: it has no list 'categories'"),
        ([], "not in COCO format"),
    ],
)
def test_bad_annotation_files_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        chair.truth_from_coco(write(tmp_path / "instances.json", content))


# --- captions files -------------------------------------------------------------------------------


def test_reading_captions_in_all_forms(tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        '{"image_id": 1, "caption": "a"}\n\n{"id": "2", "text": "b", "n_tokens": 3}\n'
        '{"id": "3", "text": "", "error": "no such file"}\n',
        encoding="utf-8",
    )
    expected = [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}]
    assert chair.read_captions(lines) == expected
    assert chair.read_captions(write(tmp_path / "list.json", expected)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"[]", "holds no records"),
        (b'{"image_id": 1, "caption": "\xff"}', "not UTF-8"),
        (b'{"image_id": 1, "caption": "a"}\n{"image_id": 1, "capt', "line 2: not valid JSON"),
        (b"[1]", "entry 0: expected a JSON object, found int"),
        (b'{"image_id": 1}', "record 1: no caption"),
        (b'{"image_id": 1, "caption": null}', "record 1: no caption"),
        (b'{"caption": "a"}', "image_id must be a whole number, found None"),
        (
            b'{"image_id": "x.jpg", "caption": "a"}',
            "image_id must be a whole number, found 'x.jpg'",
        ),
        (b'{"image_id": true, "caption": "a"}', "image_id must be a whole number, found True"),
        (
            b'{"id": "7", "image_id": 1, "caption": "a"}\n{"id": "7", "image_id": 2, "text": "b"}',
            "record 2: id '7' occurs twice",
        ),
        (b"\x1f\x8bnot gzip", "cannot be read"),
    ],
)
def test_bad_caption_files_are_refused(tmp_path, content, message):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        chair.read_captions(path)
    assert error.value.advice


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        chair.read_captions(tmp_path / "absent.jsonl")


def test_bad_arguments():
    with pytest.raises(ValueError, match="Unknown CHAIR variant 'spacy'; there are: wordnet"):
        chair.score(CAPTIONS, TRUTH, "spacy")
    with pytest.raises(InputError, match="no captions"):
        chair.score([], TRUTH)
    with pytest.raises(InputError, match="caption 0: no caption"):
        chair.score([{"image_id": 1}], TRUTH)
    with pytest.raises(InputError, match="no subset 'pai500'"):
        chair.subset_ids("pai500")


def test_import_is_light():
    code = (
        "import sys, benchmarks.chair, benchmarks.pope;"
        "print([m for m in ('torch', 'transformers', 'nltk', 'data_tools') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
