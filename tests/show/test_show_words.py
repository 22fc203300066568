"""Answers cut into pieces: the same objects as CHAIR's, nothing lost, nothing invented."""

import pytest

from mmlm.show.words import coloured, pieces, words

TEXT = "Two puppies sit near a hot dog . there is a Boat ."


def kinds(found):
    return [(piece.text, piece.kind) for piece in found if piece.kind]


def test_objects_are_marked_as_chair_reads_them():
    found = pieces(TEXT, {"dog", "bench"})
    assert kinds(found) == [("puppies", "good"), ("hot dog", "bad"), ("Boat", "bad")]
    assert [p.title for p in found if p.kind] == [
        "dog: in the picture",
        "hot dog: invented",
        "boat: invented",
    ]


@pytest.mark.parametrize("truth", [None, set(), {"dog"}, {"dog", "boat", "hot dog"}])
@pytest.mark.parametrize("text", ["", "x", TEXT, 'a "dog" ’ boat', "boat"])
def test_pieces_join_to_the_answer(text, truth):
    found = pieces(text, truth)
    assert "".join(piece.text for piece in found) == text
    assert all(text[piece.start : piece.end] == piece.text for piece in found)


def test_without_truth_nothing_has_a_verdict():
    assert kinds(pieces(TEXT, None)) == []


def test_what_nobody_asked_about_has_no_verdict():
    assert kinds(pieces(TEXT, {"dog"}, asked={"dog", "boat"})) == [
        ("puppies", "good"),
        ("Boat", "bad"),
    ]


def test_words_are_what_one_clicks_on():
    text = "a T-shirt, isn't it ?"
    assert [text[a:b] for a, b in words(text)] == ["a", "T-shirt", "isn't", "it"]
    assert words(" . ") == ()


def test_the_terminal_tells_verdicts_apart_without_colours():
    shown = coloured("a dog and a boat", {"dog"})
    assert shown.plain == "a dog and a boat"
    styles = {shown.plain[s.start : s.end]: str(s.style) for s in shown.spans}
    assert styles == {"dog": "green", "boat": "bold red underline"}


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("no , there is no bird .", {"dog"}, [("bird", "good", "bird: rightly denied")]),
        ("there isn't a dog", {"dog"}, [("dog", "bad", "dog: denied, but in the picture")]),
        (
            "not a cat but a dog without a bird",
            {"dog"},
            [
                ("cat", "good", "cat: rightly denied"),
                ("dog", "good", "dog: in the picture"),
                ("bird", "good", "bird: rightly denied"),
            ],
        ),
        ("no , a bird", {"dog"}, [("bird", "bad", "bird: invented")]),
        ("a knot , a bird", {"dog"}, [("bird", "bad", "bird: invented")]),
    ],
)
def test_denials_are_judged_as_denials(text, truth, expected):
    found = [(piece.text, piece.kind, piece.title) for piece in pieces(text, truth) if piece.kind]
    assert found == expected
