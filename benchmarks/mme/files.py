"""MME's official files: questions in folders, and answers for MME's own evaluation tool."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.stored import answer_text
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["CATEGORIES", "Question", "read_official", "read_questions", "write_official"]

CATEGORIES = ("existence", "count", "position", "color")
"""The hallucination subset, in the order of the paper."""

_SUFFIXES = (".jpg", ".jpeg", ".png")
_ADVICE = (
    "MME is given out by its authors on request (github.com/BradyFU/Awesome-Multimodal-Large-"
    "Language-Models); unpack it and name the folder that holds existence, count, position, color."
)


@dataclass(frozen=True, slots=True)
class Question:
    """One of the two questions about a picture.

    Attributes:
        category: Name of the category.
        image: File name of the picture.
        path: Where the picture is.
        number: 1 or 2.
        text: The question, its ending included.
        label: "yes" or "no".
    """

    category: str
    image: str
    path: Path
    number: int
    text: str
    label: str

    @property
    def id(self) -> str:
        """Identifies the question: category, picture and number."""
        return f"{self.image_name}#{self.number}"

    @property
    def image_name(self) -> str:
        """The picture's name with its category: categories use the same file names."""
        return f"{self.category}/{self.image}"


def read_questions(folder: Path, categories: Sequence[str] = CATEGORIES) -> list[Question]:
    """Reads the official folder: per picture a text file with two lines, question TAB answer.

    Both official layouts are read: ``<category>/images`` beside
    ``<category>/questions_answers_YN``, and pictures and texts together in ``<category>``.

    Args:
        folder: Holds one folder per category.
        categories: The categories to read.

    Returns:
        The questions, by category and then by name of the picture.

    Raises:
        InputError: If a category, picture or text is missing, or a text does not hold two
            questions with yes or no.
    """
    absent = [name for name in categories if not (folder / name).is_dir()]
    if absent:
        raise InputError(f"{str(folder)!r} has no folder for: {', '.join(absent)}.", advice=_ADVICE)
    return [question for name in categories for question in _read_category(folder, name)]


def _read_category(folder: Path, category: str) -> list[Question]:
    pictures = texts = folder / category
    if (pictures / "images").is_dir():
        pictures, texts = pictures / "images", texts / "questions_answers_YN"
    if not texts.is_dir():
        raise InputError(f"There is no folder {str(texts)!r}.", advice=_ADVICE)
    files = sorted(path for path in pictures.iterdir() if path.suffix.lower() in _SUFFIXES)
    stems = Counter(path.stem for path in files)
    if twice := [stem for stem, count in stems.items() if count > 1]:
        raise InputError(
            f"{pictures} has more than one picture named {twice[0]!r}.",
            advice="Keep the official one.",
        )
    written = {path.stem for path in texts.glob("*.txt")}
    alone = sorted(stems.keys() ^ written)
    if alone or not files:
        raise InputError(
            f"{category}: {len(files)} pictures and {len(written)} texts; {len(alone)} without "
            f"counterpart{': ' + alone[0] if alone else ''}.",
            advice=_ADVICE,
        )
    return [
        Question(category, path.name, path, number, text, label)
        for path in files
        for number, (text, label) in enumerate(_read_pair(texts / f"{path.stem}.txt"), start=1)
    ]


def _read_pair(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}).", advice="Convert it to UTF-8."
        ) from error
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) != 2:
        raise InputError(
            f"{path} holds {len(lines)} questions; accuracy+ needs two per picture.",
            advice="Use the official file, or take the picture out.",
        )
    pairs = []
    for line in lines:
        question, tab, answer = line.rpartition("\t")
        label = answer.strip().lower().removesuffix(".")
        if not tab or not question.strip() or label not in ("yes", "no"):
            raise InputError(
                f"{path}: {line!r} is not of the form question TAB Yes (or No).",
                advice="Use the official file.",
            )
        pairs.append((question.strip(), label))
    return pairs


def write_official(folder: Path, lines: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Writes answers for MME's own evaluation tool: ``<category>.txt``, four columns with tabs.

    The columns are picture, question, label and answer; line breaks and tabs in answers become
    blanks, because the tool reads one answer per line.

    Raises:
        InputError: If an answer is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        text = answer_text(line, number)
        if text is None:
            raise InputError(
                f"Line {number} ({line.get('id')!r}) has no answer.",
                advice="Repeat the failed questions; the official tool cannot skip any.",
            )
        image = line["image"].rpartition("/")[2]
        cells = (image, line["question"], line["label"].capitalize(), " ".join(text.split()))
        rows.setdefault(line["category"], []).append("\t".join(cells) + "\n")
    paths = [folder / f"{category}.txt" for category in rows]
    for path, content in zip(paths, rows.values(), strict=True):
        path.write_text("".join(content), encoding="utf-8")
    return paths


def read_official(folder: Path) -> list[dict[str, Any]]:
    """Reads the answer files of MME's own evaluation tool as lines for `score_stored`.

    Raises:
        InputError: If no category is there, or a line does not have four columns.
    """
    files = [path for name in CATEGORIES if (path := folder / f"{name}.txt").is_file()]
    if not files:
        raise InputError(
            f"{str(folder)!r} holds none of: {', '.join(f'{name}.txt' for name in CATEGORIES)}.",
            advice="Give the folder of result files that MME's calculation.py takes.",
        )
    lines: list[dict[str, Any]] = []
    for path in files:
        seen: Counter[str] = Counter()
        for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not text.strip():
                continue
            cells = text.split("\t")
            if len(cells) != 4:
                raise InputError(
                    f"{path}, line {number}: {len(cells)} columns instead of 4.",
                    advice="Expected: picture, question, label, answer, with tabs between them.",
                )
            image, question, label, answer = cells
            seen[image] += 1
            lines.append(
                {
                    "id": f"{path.stem}/{image}#{seen[image]}",
                    "category": path.stem,
                    "image": f"{path.stem}/{image}",
                    "question": question,
                    "label": label.strip().lower().removesuffix("."),
                    "text": answer,
                }
            )
    return lines
