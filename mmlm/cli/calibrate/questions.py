"""Labelled questions to calibrate a method with: from a file, or about the embedded world."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mmlm.errors import InputError
from mmlm.records import read_lines

if TYPE_CHECKING:
    from mmlm.runner import Request

__all__ = ["Labelled", "QuestionOptions", "is_right", "labelled_questions"]


_COUNT = 64


@dataclass(frozen=True)
class QuestionOptions:
    """Which labelled questions are asked.

    Attributes:
        questions: JSON lines with `image`, `prompt` (or `text`) and `label`, the first words of
            the right answer. Without it, yes/no questions about pictures of the embedded world.
        images: Folder of the pictures; default: that of the questions.
        split: Split of the world.
        kind: How absent objects of the world are chosen: `random`, `popular` or `adversarial`.
        count: Number of the world's pictures, six questions each, or of questions in a file.
            Default: 64; for maps of heads 300.
        seed: Seed of the world's pictures.
        held_out: Share of the questions, the last ones, on which the choice is checked.
    """

    questions: Path | None = field(default=None, metadata={"alias": "--questions"})
    images: Path | None = field(default=None, metadata={"alias": "--images"})
    split: str = field(default="train", metadata={"alias": "--split"})
    kind: Literal["random", "popular", "adversarial"] = "adversarial"
    count: int | None = field(default=None, metadata={"alias": "--count"})
    seed: int = field(default=0, metadata={"alias": "--seed"})
    held_out: float = 0.25


class Labelled(NamedTuple):
    """A question and the first words of its right answer."""

    request: Request
    label: str


def is_right(answer: str, label: str) -> bool:
    """Whether an answer begins with the label's words, whatever case and punctuation."""
    words = re.findall(r"\w+", label.casefold())
    return re.findall(r"\w+", answer.casefold())[: len(words)] == words


def labelled_questions(options: QuestionOptions) -> list[Labelled]:
    """The questions that the options name, with their pictures.

    Raises:
        InputError: For a split that does not exist, or a line of a file that lacks something.
    """
    if options.questions is not None:
        return _from_file(options.questions, options)
    from PIL import Image

    from data_tools.world import SPLITS, render, scene
    from data_tools.world.polling import poll
    from mmlm.runner import Request

    if options.split not in SPLITS:
        raise InputError(
            f"There is no split {options.split!r}.", advice=f"Choose one of {', '.join(SPLITS)}."
        )
    config = SPLITS[options.split]
    count = options.count or _COUNT
    scenes = [scene(config, options.seed, i, options.split) for i in range(count)]
    asked = poll(options.kind, [(truth, str(truth.index)) for truth in scenes])
    pictures = {str(truth.index): Image.fromarray(render(truth).image) for truth in scenes}
    return [
        Labelled(Request(str(q["question_id"]), (pictures[q["image"]],), q["text"]), q["label"])
        for q in asked
    ]


def _from_file(path: Path, options: QuestionOptions) -> list[Labelled]:
    from mmlm.runner import Request

    folder = options.images or path.parent
    found = []
    for number, line in enumerate(read_lines(path)[: options.count or _COUNT], start=1):
        prompt = "prompt" if "prompt" in line else "text"
        image, question, label = (
            _text(line, name, f"{path}, question {number}") for name in ("image", prompt, "label")
        )
        found.append(Labelled(Request(str(number), (folder / image,), question), label))
    return found


def _text(line: Mapping[str, Any], name: str, place: str) -> str:
    value = line.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{place}: `{name}` must be text, got {value!r}.",
            advice="Every line needs `image`, `prompt` (or `text`) and `label`.",
        )
    return value
