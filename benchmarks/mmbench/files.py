"""MMBench's tables: one row per question, the picture inside as base64, tabs between the columns.

Some files hold every cyclic shift of a question as a row of its own (index + 1,000,000 for each
shift, as v1.0 was published), others each question once; both become the same problems here.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.multi_image.rows import Pictures

__all__ = [
    "MARKS",
    "SHIFT",
    "Edition",
    "Problem",
    "Way",
    "read_problems",
    "read_table",
    "recognise",
]

Way = Literal["circular", "vanilla"]
MARKS = "ABCDE"
SHIFT = 1_000_000
"""What is added to a question's index for each cyclic shift of its options."""

_NEEDED = ("index", "question", "A", "B", "image")
_ABSENT = ("", "nan")  # how the tables write a value that is not there


@dataclass(frozen=True, slots=True)
class Edition:
    """Which MMBench: scores of different editions cannot be compared.

    Attributes:
        version: "v1.0" or "v1.1".
        split: "dev" or "test".
        language: "en" or "cn".
    """

    version: str
    split: str
    language: str

    def __str__(self) -> str:
        """As it stands in the name of a result."""
        return f"{self.version}-{self.split}-{self.language}"


@dataclass(frozen=True)
class Problem:
    """One question with its options in one order.

    Attributes:
        number: The question's index, the same for all its shifts.
        shift: By how many places the options were moved.
        question: The question.
        hint: What is said before it; "" for nothing.
        options: The options' texts by letter.
        answer: The right letter; None if it is kept secret.
        category: The ability it tests.
        group: The group of abilities (L-2).
        image: The picture.
    """

    number: int
    shift: int
    question: str
    hint: str
    options: Mapping[str, str]
    answer: str | None
    category: str
    group: str
    image: Path

    @property
    def index(self) -> int:
        """The index in the official tables."""
        return self.number + SHIFT * self.shift

    def shifted(self, places: int) -> Problem:
        """The same question with its options moved: option B becomes A, and A the last one."""
        letters = list(self.options)
        texts = list(self.options.values())
        moved = texts[places:] + texts[:places]
        answer = self.answer
        if answer is not None:
            answer = letters[(letters.index(answer) - places) % len(letters)]
        options = dict(zip(letters, moved, strict=True))
        return replace(self, shift=self.shift + places, options=options, answer=answer)


def recognise(path: Path) -> Edition | None:
    """The edition of a file with an official name, such as MMBench_DEV_EN_V11.tsv."""
    name = path.name.lower()
    split = re.search(r"(?<![a-z])(dev|test)(?![a-z])", name)
    if split is None or not name.startswith("mmbench"):
        return None
    language = re.search(r"(?<![a-z])(en|cn)(?![a-z])", name)
    version = "v1.1" if "v11" in name or "v1.1" in name else "v1.0"
    return Edition(version, split[1], language[1] if language else "en")


def read_table(path: Path) -> list[dict[str, str]]:
    """Reads a table with tabs; every value is text, and "None" or "NA" are not taken for absent.

    Raises:
        InputError: If it cannot be read, is empty, or is not UTF-8.
    """
    import pandas
    from pandas.errors import EmptyDataError, ParserError

    try:
        table = pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, UnicodeDecodeError, ParserError, EmptyDataError) as error:
        raise InputError(
            f"{path} cannot be read: {error}.", advice="Give a UTF-8 table with tabs (.tsv)."
        ) from error
    rows = table.to_dict("records")
    if not rows:
        raise InputError(f"{path} holds no rows.", advice="Download it again.")
    return [{str(name): value for name, value in row.items()} for row in rows]


def read_problems(path: Path, pictures: Pictures, way: Way = "circular") -> list[Problem]:
    """Reads an official table and asks every question in all orders, or in the first one only.

    Args:
        path: The table.
        pictures: Where its pictures go.
        way: circular or vanilla.

    Raises:
        InputError: If a column is missing, an index is doubled or no number, a picture is no
            base64, an answer is none of the options, or a shift is missing.
    """
    rows = read_table(path)
    if missing := [name for name in _NEEDED if name not in rows[0]]:
        raise InputError(
            f"{path} has no column {missing[0]!r}; it has {', '.join(rows[0])}.",
            advice="Give an official MMBench table.",
        )
    images = {row["index"]: row["image"] for row in rows}
    given = [
        _problem(row, images, pictures, f"{path}, row {at}") for at, row in enumerate(rows, start=1)
    ]
    index, count = Counter(problem.index for problem in given).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: index {index} occurs {count} times.", advice="Get it again.")
    first = [problem for problem in given if problem.shift == 0]
    if way == "vanilla":
        return first
    if len(first) == len(given):
        return [one.shifted(places) for one in first for places in range(len(one.options))]
    _check_shifts(given, path)
    return sorted(given, key=lambda problem: (problem.number, problem.shift))


def _problem(
    row: Mapping[str, str], images: Mapping[str, str], pictures: Pictures, place: str
) -> Problem:
    if not row["index"].isdecimal():
        raise _refused(place, f"the index {row['index']!r} is no number")
    shift, number = divmod(int(row["index"]), SHIFT)
    options = {}
    for letter in MARKS:
        if row.get(letter, "") in _ABSENT:
            break
        options[letter] = row[letter]
    answer: str | None = row.get("answer", "")
    if answer in _ABSENT:
        answer = None
    elif answer not in options:
        raise _refused(place, f"the answer {answer!r} is none of {', '.join(options)}")
    if len(options) < 2:
        raise _refused(place, "there are fewer than two options")
    return Problem(
        number=number,
        shift=shift,
        question=row["question"],
        hint=_given(row, "hint"),
        options=options,
        answer=answer,
        category=_given(row, "category"),
        group=_given(row, "l2-category") or _given(row, "L2-category"),
        image=pictures.keep(_bytes(row["image"], images, place)),
    )


def _given(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name, "")
    return "" if value in _ABSENT else value


def _bytes(value: str, images: Mapping[str, str], place: str) -> bytes:
    """A picture; a number stands for the picture of another row."""
    if value.isdecimal():
        value = images.get(value, "")
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise _refused(place, "the picture is no base64")
    return data


def _check_shifts(problems: Sequence[Problem], path: Path) -> None:
    shifts: dict[int, set[int]] = {}
    for problem in problems:
        shifts.setdefault(problem.number, set()).add(problem.shift)
    for problem in problems:
        if shifts[problem.number] != set(range(len(problem.options))):
            there = ", ".join(str(one) for one in sorted(shifts[problem.number]))
            raise InputError(
                f"{path}: question {problem.number} has {len(problem.options)} options, but the "
                f"shifts {there}.",
                advice="Get the whole table, or ask the vanilla way.",
            )


def _refused(place: str, reason: str) -> InputError:
    return InputError(f"{place}: {reason}.", advice="Give an official MMBench table.")
