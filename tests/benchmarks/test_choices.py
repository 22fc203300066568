"""Rules of reading an option in a reply: worked examples of every rule and its quirks."""

import pytest

from benchmarks import choices

COLOURS = ("red", "green", "dark blue", "none of them")


@pytest.mark.parametrize(
    ("reply", "letter", "how"),
    [
        ("B", "B", "letter"),
        ("(C)", "C", "letter"),
        ("(A) or rather (D)", "D", "letter"),  # the last one wins
        ("The answer is B.", "B", "letter"),
        ("Not (A), it is B", "A", "letter"),  # brackets decide before bare letters
        ("D.N", "D", "letter"),  # third step
        ("It looks like DNA to me", "A", "letter"),  # a capital that ends a word
        ("i would say that it is dark blue", "C", "text"),
        ("first red and then in the end green", "B", "text"),
        ("dark blue", None, "random"),  # texts are searched in more than five words only
        ("", None, "random"),
    ],
)
def test_mmmu_rule(reply, letter, how):
    choice = choices.last_named_option(reply, COLOURS, "q1")
    assert choice.how == how
    if letter:
        assert choice.letter == letter


def test_random_options_depend_on_id_and_seed_only():
    def draw(identifier, seed=0):
        return choices.last_named_option("", COLOURS, identifier, seed).letter

    drawn = {f"q{number}": draw(f"q{number}") for number in range(40)}
    assert {draw("q7") for _ in range(5)} == {drawn["q7"]}
    assert set(drawn.values()) == set("ABCD")
    assert any(draw(name, 1) != letter for name, letter in drawn.items())


@pytest.mark.parametrize(
    ("reply", "letter"),
    [("B", "B"), ("(b) two", "B"), ("I think B", "I"), ("  ( C", "C"), ("42", ""), ("", "")],
)
def test_first_letter(reply, letter):
    assert choices.first_letter(reply).letter == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("b.", "B"),
        ("The correct answer is (B).", "B"),
        ("answer: A, no, answer: C", "C"),
        ("so I pick (B)", "B"),
        ("Because of the light", "B"),  # the leading letter, if it is an option's
        ("I think so", ""),
        ("(E)", ""),
        ("", ""),
    ],
)
def test_stated_letter(reply, letter):
    assert choices.stated_letter(reply, 4).letter == letter


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("(A) it moves", "A"),
        ("b. it rests", "B"),
        ("It is option C!", "C"),
        ("A dog", "A"),
        ("it moves", "it moves"),
        ("", ""),
    ],
)
def test_vqa_letter(reply, read):
    assert choices.vqa_letter(reply) == read


@pytest.mark.parametrize(
    ("reply", "letter", "how"),
    [
        ("B", "B", "letter"),
        ("The answer is (B).", "B", "letter"),
        ("A red cat sits", "", "none"),  # an article, and no option's text
        ("A cat sits on dark blue", "C", "text"),
        ("A or B", "", "none"),
        ("It is RED", "A", "text"),
        ("red or green", "", "none"),
        ("", "", "none"),
    ],
)
def test_mmbench_rule(reply, letter, how):
    options = dict(zip("ABCD", ("red paint", "green", "dark blue", "none of them"), strict=True))
    if "RED" in reply or "red or" in reply:
        options["A"] = "red"
    assert choices.sole_option(reply, options) == choices.Choice(letter, how)


@pytest.mark.parametrize(
    ("reply", "answers", "right"),
    [
        ("3.5", ["3.50"], True),
        ("The result is 1,250 metres.", ["1250"], True),
        ("x = 2.004", ["2"], True),  # rounded to two decimals
        ("x = 2.006", ["2"], False),
        ("so it could be the Red Sea", ["red sea"], True),
        ("a b c", ["b"], True),  # one character with a blank beside it
        ("abc", ["b"], False),
        ("two\nThe answer is nine", ["two"], False),  # what announces nothing is no answer
        ("nine", ["ten", "nine"], True),
        ("", ["nine"], False),
    ],
)
def test_open_answers(reply, answers, right):
    assert choices.is_open_answer_right(reply, answers) is right
