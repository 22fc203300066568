"""Words whose maps are shown: objects by their verdict, matched over answers, phrases."""

from __future__ import annotations

import pytest
from PIL import Image

from mmlm.errors import InputError
from mmlm.show.conversation import Picture
from mmlm.show.inspection import Arm, Inspection
from mmlm.show.spots import spots
from mmlm.show.truth import Known

KNOWN = Known(frozenset({"boat", "dog"}), "by hand")


def inspection(*texts, known=KNOWN):
    picture = Picture("p", Image.new("RGB", (8, 8)), known=known)
    arms = tuple(Arm(f"arm {i}", text, 1, 0.0) for i, text in enumerate(texts))
    return Inspection("model", "what ?", (picture,), arms)


def found(spots_, texts):
    return [
        (spot.text, spot.number, {i: texts[i][s.start : s.end] for i, s in spot.said.items()})
        for spot in spots_
    ]


def test_objects_are_matched_by_word_and_occurrence():
    texts = ("a boat and a dog near a boat .", "a Boat and a cat .")
    shown = spots(inspection(*texts))
    assert found(shown, texts) == [
        ("boat", 1, {0: "boat", 1: "Boat"}),
        ("dog", 1, {0: "dog"}),
        ("boat", 2, {0: "boat"}),
        ("cat", 1, {1: "cat"}),
    ]
    assert [spot.said[min(spot.said)].kind for spot in shown] == ["good", "good", "good", "bad"]
    assert len({spot.anchor for spot in shown}) == 4


def test_without_truth_objects_have_no_verdict():
    (shown,) = spots(inspection("there is a dog .", known=None))
    assert shown.said[0].kind == ""


def test_answers_without_objects_show_their_first_words():
    shown = spots(inspection("yes , it is so " * 9))
    assert len(shown) == 12
    assert [spot.text for spot in shown[:4]] == ["yes", "it", "is", "so"]


def test_wanted_phrases_are_found_whole_and_longest_first():
    texts = ("two boats and two boats ashore",)
    shown = spots(inspection(*texts), ["boats", "two boats", "TWO"])
    assert found(shown, texts) == [
        ("two boats", 1, {0: "two boats"}),
        ("two boats", 2, {0: "two boats"}),
    ]
    with pytest.raises(InputError, match="'boat'") as caught:
        spots(inspection(*texts), ["boat"])  # no part of a word
    assert "two boats" in caught.value.advice


def test_an_empty_answer_has_no_word():
    assert spots(inspection("")) == ()
