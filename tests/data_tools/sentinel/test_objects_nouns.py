"""The noun table: WordNet's classes and dictionary forms, and the program that packs it."""

import importlib.util
import json
import lzma
from pathlib import Path

import pytest

from data_tools.sentinel.objects import nouns
from mmlm.language.tables import load_table
from tests.golden import golden

TOOL = Path(__file__).parents[3] / "tools" / "build_noun_table.py"


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("sentinel/*.json"))
def test_acceptance_6_sentinel_1_concrete_nouns(path):
    cases = json.loads(path.read_text())["concrete_noun"]
    assert cases
    wrong = {phrase: v for phrase, v in cases.items() if nouns.is_concrete(phrase) is not v}
    assert wrong == {}


def test_the_table_is_wordnet_3_0():
    table = load_table("nouns.json.xz", "data_tools.sentinel.objects")
    assert len(table["classes"]) == table["nouns"].count("\n") + 1 == 117_798
    assert len(nouns.CLASSES) == len(set(table["classes"])) == 26
    assert nouns.CLASSES[ord(max(table["classes"])) - ord("a")] == "time"
    assert len(nouns.ABSTRACT) == 12
    assert set(nouns.CLASSES) > nouns.ABSTRACT


@pytest.mark.parametrize(
    ("noun", "name"),
    [
        ("cat", "animal"), ("cats", "animal"), ("table", "group"), ("light", "phenomenon"),
        ("park", "location"), ("city", "location"), ("touch", "event"), ("scene", "location"),
        ("people", "group"), ("men", "group"), ("geese", "animal"), ("palm tree", "plant"),
        ("palm trees", "plant"), ("orange", "food"), ("entity", "Tops"), ("o'clock", None),
        ("xyzzy", None), ("", None),
    ],
)  # fmt: skip
def test_class_of_the_first_sense(noun, name):
    """Those of the specification, and one per way of finding an entry."""
    assert nouns.noun_class(noun) == name


def test_only_the_phrase_as_a_whole_decides():
    assert nouns.is_concrete("idea of a Chair")
    assert not nouns.is_concrete("calm idea")
    assert not nouns.is_concrete("")


def test_lemma_is_the_lemmatiser_of_the_scorer():
    """NLTK's lemmatiser, whose answers for 437 nouns ship with the scorer's tables."""
    known = load_table("wordnet_lemmas.json")["n"]
    assert {noun: nouns.lemma(noun) for noun in known} == known


@pytest.mark.parametrize(
    ("noun", "lemma", "singular"),
    [
        ("vases", "vas", "vase"), ("men", "men", "man"), ("glasses", "glass", "glass"),
        ("knives", "knife", "knife"), ("buses", "bus", "bus"), ("was", "wa", "wa"),
        ("people", "people", "people"), ("xyzzies", "xyzzies", "xyzzies"),
        ("houses of cards", "house of cards", "house of cards"), ("houses", "house", "house"),
    ],
)  # fmt: skip
def test_dictionary_forms(noun, lemma, singular):
    assert nouns.lemma(noun) == lemma
    assert nouns.singular(noun) == singular


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("build_noun_table", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEADER = "  14 WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.  \n"


def wordnet(folder, halves):
    rows = [
        "00000001 05 n 01 cat 0 001 @ 00000009 n 0000 | a feline\n",
        "00000002 06 n 02 cat 0 cat-o'-nine-tails 0 000 | a whip\n",
        "00000003 28 n 01 wee_hour 0 000 | early\n",
    ]
    if halves:
        (folder / "data.noun1").write_text(HEADER + rows[0])
        (folder / "data.noun2").write_text("".join(rows[1:]))
    else:
        (folder / "data.noun").write_text(HEADER + "".join(rows))
    (folder / "index.noun").write_text(
        HEADER + "cat n 2 1 @ 2 1 00000001 00000002  \nwee_hour n 1 0 1 0 00000003  \n"
    )
    (folder / "noun.exc").write_text("wee_hourses wee_hour\ncatten cat\n")


@pytest.mark.parametrize("halves", [False, True])
def test_the_table_is_built_from_wordnets_files(tool, tmp_path, halves, capsys):
    wordnet(tmp_path, halves)
    tool.main([str(tmp_path), "--output", str(tmp_path / "out.xz")])
    assert "2 nouns" in capsys.readouterr().out
    assert json.loads(lzma.decompress((tmp_path / "out.xz").read_bytes())) == {
        "nouns": "cat\nwee hour",
        "classes": "cz",  # the first sense of "cat" is the animal
        "irregular": "catten cat\nwee_hourses wee_hour",
    }


def test_another_wordnet_is_refused(tool, tmp_path):
    wordnet(tmp_path, halves=False)
    index = tmp_path / "index.noun"
    index.write_text(index.read_text().replace("3.0", "3.1"))
    with pytest.raises(ValueError, match=r"no WordNet 3\.0"):
        tool.noun_table(tmp_path)
