"""Which option did a model choose? One function for every published rule of reading an answer.

Multiple-choice scores depend on this as much as on the model: "I think B" is option I under
BLINK's rule, option B under MMMU's, and no option at all under NLVR2's. A rule is therefore part of
the name of every result. The rules below follow lmms-eval 0.7.3, quirks included, with one
exception: where a rule draws an option at random because it found none, the draw depends on the
question's id and a seed, and is counted.
"""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "LETTERS",
    "Choice",
    "drawn_letter",
    "first_letter",
    "is_open_answer_right",
    "last_named_option",
    "open_candidates",
    "sole_option",
    "stated_letter",
    "vqa_letter",
    "vqa_punctuation",
]

LETTERS = string.ascii_uppercase


@dataclass(frozen=True, slots=True)
class Choice:
    """What a rule read in an answer.

    Attributes:
        letter: The option's letter; "" if none was found.
        how: By its letter, by its text, drawn at random, or not at all.
    """

    letter: str
    how: Literal["letter", "text", "random", "none"] = "letter"


NOTHING = Choice("", "none")


def drawn_letter(letters: Sequence[str], identifier: str, seed: int = 0) -> Choice:
    """An option drawn at random, the same one for the same question and seed on every machine.

    Args:
        letters: The letters to draw from.
        identifier: The question's id.
        seed: Another seed gives other draws.
    """
    return Choice(random.Random(f"{seed}:{identifier}").choice(letters), "random")


def last_named_option(reply: str, options: Sequence[str], identifier: str, seed: int = 0) -> Choice:
    """MMMU's rule: letters in three steps, then option texts; of several the last one wins.

    The steps are "(A)", "A " and "A."; the first that finds anything decides. Only a reply of more
    than five words is searched for the texts. A reply in which nothing is found is answered at
    random. The second step takes every capital letter that ends a word: "DNA" is option A.

    Args:
        reply: What the model said.
        options: The options' texts, in order.
        identifier: The question's id, for the random draw.
        seed: Seed of the random draw.
    """
    letters = LETTERS[: len(options)]
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    # Steps two and three are ranked by " A ", which not every candidate has to contain.
    for pattern, rank in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in letters if pattern.format(letter) in reply]:
            return Choice(max(found, key=lambda letter: reply.rfind(rank.format(letter))))
    if len(reply.split()) > 5:
        low = reply.lower()
        texts = {letter: text.lower() for letter, text in zip(letters, options, strict=True)}
        if found := [letter for letter, text in texts.items() if text in low]:
            return Choice(max(found, key=lambda letter: low.rfind(texts[letter])), "text")
    return drawn_letter(letters, identifier, seed)


def first_letter(reply: str) -> Choice:
    """BLINK's rule: the reply's first letter, even if it only begins a word ("I think" is I)."""
    match = re.match(r"[(\s]*([A-Za-z])", reply.strip())
    return Choice(match[1].upper()) if match else NOTHING


def stated_letter(reply: str, n_options: int) -> Choice:
    """lmms-eval's present rule for BLINK: a bare letter, a stated one, one in brackets, the first.

    Args:
        reply: What the model said.
        n_options: How many options there are; other letters are no answers.
    """
    reply = reply.strip()
    one = f"([{LETTERS[:n_options]}])"
    first_line = reply.partition("\n")[0].strip()
    bare = re.match(rf"\(?{one}\)?[.\s:,)]*$", first_line, re.IGNORECASE)
    if bare and len(first_line) <= 4:
        return Choice(bare[1].upper())
    stated = rf"answers?(?:\s+is)?\s*[:\-]?\s*\(?{one}\)?(?![A-Za-z])"
    if found := re.findall(stated, reply, re.IGNORECASE) or re.findall(rf"\({one}\)", reply):
        return Choice(found[-1].upper())
    leading = re.match(rf"[(\s]*{one}", reply, re.IGNORECASE)
    return Choice(leading[1].upper()) if leading else NOTHING


def vqa_letter(reply: str) -> str:
    """lmms-eval's rule for MVBench: "A. text", else the first single letter from A to E.

    A reply without such a letter becomes its own text, lower-cased and without punctuation.
    """
    if match := re.match(r"([A-E])\.\s*(.+)$", reply.strip(), re.IGNORECASE):
        return match[1].upper()
    text = vqa_punctuation(re.sub(r"[\n\t]", " ", reply).strip())
    for mark in "'\")(":
        text = text.strip(mark)
    text = text.strip().lower()
    letter = re.search(r"\b([a-e])\b", text)
    return letter[1].upper() if letter else text


def vqa_punctuation(text: str) -> str:
    """The VQA evaluation's rule: a mark beside a blank vanishes, one inside a word is a blank."""
    digits_with_comma = re.search(r"\d,\d", text) is not None
    result = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_blank or digits_with_comma else " ")
    # The original passes a flag (32) where the number of substitutions stands: 32 full stops.
    return re.sub(r"\.(?!\d)", "", result, count=32)


# How a letter may be dressed, in the order in which MMBench's scorer looks for it.
_DRESSES = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})")


def sole_option(reply: str, options: Mapping[str, str]) -> Choice:
    """MMBench's rule: the only letter among the reply's words, else the only option it contains.

    A lone "A" in a reply of more than three words may be an article and does not count. As in the
    original, "E" counts as a letter although no question has five options.

    Args:
        reply: What the model said.
        options: The options' texts by letter.
    """
    words = reply.split()
    if letter := _sole_word(words, "{}"):
        if not ("A" in words and len(words) > 3):
            return Choice(letter)
    for dress in (*_DRESSES, ":{})."):
        if letter := _sole_word(words, dress):
            return Choice(letter)
    low = reply.lower()
    found = [letter for letter, text in options.items() if text.lower() in low]
    return Choice(found[0], "text") if len(found) == 1 else NOTHING


def _sole_word(words: Sequence[str], dress: str) -> str:
    found = [letter for letter in "ABCDE" if dress.format(letter) in words]
    return found[0] if len(found) == 1 else ""


_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # scientific
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
_ANNOUNCEMENTS = (
    "could be ",
    "so ",
    "is ",
    "thus ",
    "therefore ",
    "final ",
    "answer ",
    "result ",
)


def is_open_answer_right(reply: str, answers: Sequence[str]) -> bool:
    """MMMU's rule for open questions: a reference is contained in what the reply may have meant.

    Numbers must be equal after rounding to two decimals; texts are compared in lower case, and a
    reference of one character needs a blank beside it.

    Args:
        reply: What the model said.
        answers: The accepted references.
    """
    references = [form for answer in answers for form in _normal_forms(answer)]
    texts = [form for form in references if isinstance(form, str)]
    for candidate in open_candidates(reply):
        if isinstance(candidate, str):
            if any(text in candidate for text in texts):
                return True
        elif candidate in references:
            return True
    return False


def open_candidates(reply: str) -> set[str | float]:
    """What a reply to an open question may have meant: the ends of its lines, and their numbers.

    Of every line the shortest part behind "is", "so", "answer" and the like is taken; in the last
    line an equals sign announces an answer too. If no line announces anything, the whole reply is
    the candidate.
    """
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    tails = []
    for number, line in enumerate(lines, start=1):
        last = ("=",) if number == len(lines) else ()
        tail = _announced(line, _ANNOUNCEMENTS + last)
        if tail and tail not in (":", ",", ".", "!", "?", ";", "'"):
            tails.append(tail)
    tails = tails or [reply]
    numbers = [number for tail in tails for rule in _NUMBERS for number in re.findall(rule, tail)]
    return {form for text in tails + numbers for form in _normal_forms(text)}


def _announced(line: str, announcements: Sequence[str]) -> str:
    shortest = ""
    for announcement in announcements:
        if announcement in line:
            tail = line.rpartition(announcement)[2].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def _normal_forms(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    # A single letter is contained in almost every text.
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
