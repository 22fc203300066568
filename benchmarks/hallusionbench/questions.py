"""HallusionBench's questions and figures, and what stored answers to them must look like."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_records
from benchmarks.run import Item, Task
from benchmarks.stored import check_ids, check_texts
from mmlm.errors import InputError
from mmlm.language.tables import load_table
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Entry", "entries_of", "entry_of", "find_figures", "read_entries", "task"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One question of the benchmark.

    Attributes:
        category: "VD" (visual dependent: no answer without the picture) or "VS" (visual
            supplement: world knowledge may answer it).
        subcategory: chart, table, map, ocr, illusion, math or video.
        visual_input: "0" no picture, "1" the original one, "2" a changed one.
        set_id: Number of the set within category and subcategory.
        figure_id: Number of the figure within the set; "0" is the original, for VS no figure.
        question_id: Number of the question within the set.
        question: The question.
        reference: The reference answer, in words.
        label: "yes" or "no".
    """

    category: str
    subcategory: str
    visual_input: str
    set_id: str
    figure_id: str
    question_id: str
    question: str
    reference: str
    label: str

    @property
    def id(self) -> str:
        """The authors' name of the entry."""
        return f"{self.set}_{self.figure_id}_{self.question_id}"

    @property
    def set(self) -> str:
        """The set it belongs to."""
        return f"{self.category}_{self.subcategory}_{self.set_id}"

    @property
    def pair(self) -> str:
        """The question pair it belongs to: one question about all figures of a set."""
        return f"{self.set}_{self.question_id}"

    @property
    def is_original(self) -> bool:
        """Whether it is the question about the original figure, or without a figure."""
        return self.figure_id == "0"

    @property
    def has_figure(self) -> bool:
        """Whether a picture is shown."""
        return not (self.category == "VS" and self.is_original)

    @property
    def image(self) -> str:
        """The picture within the official folder; "" for none."""
        if not self.has_figure:
            return ""
        return f"{self.category}/{self.subcategory}/{self.set_id}_{self.figure_id}.png"


_TEXTS = (*Entry.__dataclass_fields__, "image")
_SOURCE = "mmlm bench hallusionbench"


def read_entries(path: Path | None = None) -> list[Entry]:
    """Reads the questions.

    Args:
        path: A file in the format of the authors' HallusionBench.json, plain or gzipped; by
            default the published 1,129 questions, which ship with this package.

    Raises:
        InputError: If the file cannot be read, a field is missing, a question is there twice, or
            the question about the original figure is missing.
    """
    records = (
        load_table("hallusionbench.json.xz", "benchmarks") if path is None else read_records(path)
    )
    place = "HallusionBench" if path is None else str(path)
    return _checked(
        [entry_of(record, f"{place}, entry {i}") for i, record in enumerate(records, 1)]
    )


def entry_of(record: Mapping[str, Any], place: str) -> Entry:
    """The entry in a record of the authors' file; ``place`` is for messages."""
    numbers = ("visual_input", "set_id", "figure_id", "question_id", "gt_answer")
    texts = ("category", "subcategory", "question", "gt_answer_details")
    if missing := [name for name in (*numbers, *texts) if record.get(name) is None]:
        raise InputError(f"{place} has no {missing[0]!r}.", advice="Use the authors' file.")
    label = {"1": "yes", "0": "no"}.get(str(record["gt_answer"]))
    entry = Entry(
        *(str(record[name]) for name in ("category", "subcategory", *numbers[:4])),
        question=str(record["question"]),
        reference=str(record["gt_answer_details"]),
        label=str(label),
    )
    return _valid(entry, place)


def _valid(entry: Entry, place: str) -> Entry:
    allowed = {
        "category": ("VD", "VS"),
        "visual_input": ("0", "1", "2"),
        "label": ("yes", "no"),
    }
    for name, values in allowed.items():
        if getattr(entry, name) not in values:
            raise InputError(
                f"{place}: {name} is {getattr(entry, name)!r}; allowed are {', '.join(values)}.",
                advice="Use the authors' file.",
            )
    return entry


def _checked(entries: list[Entry]) -> list[Entry]:
    ids = [entry.id for entry in entries]
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"The question {twice} is there twice.", advice="Keep one of each.")
    originals = {entry.pair for entry in entries if entry.is_original}
    if lonely := [entry.id for entry in entries if entry.pair not in originals]:
        raise InputError(
            f"{len(lonely)} questions lack their counterpart about the original figure, "
            f"e.g. {lonely[0]}.",
            advice="Give whole sets; the reasons of errors are told by comparison.",
        )
    return entries


def find_figures(entries: Sequence[Entry], folder: Path) -> dict[str, Path]:
    """Finds the figures in the authors' folder; by name, each once.

    Raises:
        InputError: If some are missing; says how many.
    """
    figures = {entry.image: folder / entry.image for entry in entries if entry.image}
    if missing := sorted(name for name, path in figures.items() if not path.is_file()):
        raise InputError(
            f"{len(missing)} of {len(figures)} figures are not in {str(folder)!r}, "
            f"e.g. {missing[0]}.",
            advice="Download hallusion_bench.zip (see github.com/tianyi-lab/HallusionBench), "
            "unpack it, and name the folder that holds VD and VS.",
        )
    return figures


def task(entries: Sequence[Entry], folder: Path, *, scorer: str = "yesno") -> Task:
    """The questions as requests; those without a figure are asked as plain text.

    Args:
        entries: The questions.
        folder: The authors' folder of figures, with VD and VS in it.
        scorer: How answers will be scored; for the name.

    Raises:
        InputError: If figures are missing; says how many.
    """
    figures = find_figures(entries, folder)
    items = tuple(
        Item(
            Request(entry.id, (figures[entry.image],) if entry.image else (), entry.question),
            {**asdict(entry), "image": entry.image},
        )
        for entry in entries
    )
    return Task(f"hallusionbench/{scorer}", items)


def entries_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Entry]:
    """The entries that stored lines are about, by id, in their order."""
    if not lines:
        raise InputError("There are no answers to score.", advice="Give at least one.")
    check_ids(lines)
    entries = []
    for number, line in enumerate(lines, start=1):
        check_texts(line, number, _TEXTS, _SOURCE)
        entry = Entry(*(line[name] for name in Entry.__dataclass_fields__))
        entries.append(_valid(entry, f"Line {number}"))
        if entry.id != line["id"]:
            raise InputError(
                f"Line {number}: the id {line['id']!r} belongs to another question than the "
                f"fields, which say {entry.id!r}.",
                advice=f"Score files of `{_SOURCE}`.",
            )
    return {entry.id: entry for entry in _checked(entries)}
