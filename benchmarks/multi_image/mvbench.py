"""MVBench: 4,000 questions about short clips, 200 in each of 20 tasks; the frames are pictures.

Paper: Li et al., "MVBench: A Comprehensive Multi-modal Video Understanding Benchmark", arXiv
2311.17005. The number of frames (8 or 16) decides a good part of the score and is part of the name,
as in ``mvbench/train/8-frames/first-letter`` (``train`` is what the hub calls the only split). The
prompt is lmms-eval's. Ways to read the reply:

* ``first-letter``: the first letter is compared.
* ``lmms-eval``: "A. text", else the first single letter from A to E anywhere; its script leaves
  empty replies out of the denominator, which is shown as the official value.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from benchmarks.base import Scores
from benchmarks.choices import LETTERS, first_letter, vqa_letter
from benchmarks.multi_image.frames import Bounds, frame_files, is_clip
from benchmarks.multi_image.questions import Question, make_task
from benchmarks.multi_image.rows import Pictures, Row, read_rows
from benchmarks.multi_image.scoring import Reading, Scored, score_lines
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.run import Task

__all__ = ["SIZES", "SPLITS", "TASKS", "Parser", "read_questions", "score_stored", "task"]

Parser = Literal["first-letter", "lmms-eval"]
SIZES = {"train": 4000}
SPLITS = ("train",)
# Where the clips of a task come from: a folder somewhere on the clip's path.
TASKS = {
    "action_antonym": "ssv2",
    "action_count": "perception",
    "action_localization": "sta",
    "action_prediction": "star",
    "action_sequence": "star",
    "character_order": "perception",
    "counterfactual_inference": "clevrer",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa",
    "fine_grained_action": "Moments_in_Time",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer",
    "moving_count": "clevrer",
    "moving_direction": "clevrer",
    "object_existence": "clevrer",
    "object_interaction": "star",
    "object_shuffle": "perception",
    "scene_transition": "scene_qa",
    "state_change": "perception",
    "unexpected_action": "FunQA",
}


def read_questions(path: Path, pictures: Pictures, *, frames: int = 8) -> list[Question]:
    """Reads MVBench's question files, one per task (``action_antonym.json``), and finds the clips.

    Args:
        path: The data set's folder, its folder ``json``, or one file of that.
        pictures: ``beside`` is a folder with all clips below it, by default ``path``; ``kept``
            takes frames of videos.
        frames: How many frames stand for a clip; the authors take 8 or 16.

    Raises:
        ValueError: If frames is less than 1.
        InputError: If a row lacks a column, its task is unknown, or its answer is no option.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    root = pictures.beside or (path if path.is_dir() else path.parent)
    clips = _index(root)
    asked = path / "json" if (path / "json").is_dir() else path
    return [_question(row, pictures, clips, frames) for row in read_rows(asked, "train")]


def _index(root: Path) -> dict[str, list[Path]]:
    """All clips by their names."""
    clips: dict[str, list[Path]] = {}
    for folder, folders, files in os.walk(root):
        for name in sorted(folders + files):
            if is_clip(path := Path(folder) / name):
                clips.setdefault(name, []).append(path)
    return clips


def _question(
    row: Row, pictures: Pictures, clips: Mapping[str, Sequence[Path]], frames: int
) -> Question:
    subject = row.file.name.partition(".")[0]
    if subject not in TASKS:
        raise row.refused(f"the file is named after no task of MVBench: {', '.join(TASKS)}")
    options, answer = row.texts("candidates"), row.text("answer")
    if answer not in options:
        raise row.refused(f"the answer {answer!r} is none of the candidates")
    listed = "".join(f"({letter}) {text}\n" for letter, text in zip(LETTERS, options, strict=False))
    text, video = row.text("question"), row.text("video")
    clip = _find(clips, subject, video)
    if clip is None:
        pictures.missing.append(Path(video))
    bounds = _bounds(row, clip)
    shown = () if clip is None else frame_files(clip, frames, bounds, pictures)
    return Question(
        id=f"{subject}-{row.number}",
        subject=subject,
        prompt=f"Question:{text}\nOption:\n{listed}Only give the best option.\n",
        pictures=shown,
        label=LETTERS[options.index(answer)],
        options=options,
        text=text,
        facts={"frames": frames, "video": video, "bounds": None if bounds is None else [*bounds]},
    )


def _find(clips: Mapping[str, Sequence[Path]], subject: str, video: str) -> Path | None:
    """The clip of that name; of several, the one from the task's own source.

    The source must begin a folder's name: "sta" is another one than "star".
    """
    name = video.rstrip("/").rpartition("/")[2]
    found = [path for path in clips.get(name, ()) if path.as_posix().endswith(video.rstrip("/"))]
    if len(found) > 1:
        source = TASKS[subject]
        found = [p for p in found if any(_is_from(part, source) for part in p.parts)]
    return found[0] if found else None


def _is_from(folder: str, source: str) -> bool:
    return folder.startswith(source) and not folder.removeprefix(source)[:1].isalpha()


def _bounds(row: Row, clip: Path | None) -> Bounds:
    """The part that is asked about, unless the clip has been cut to it already."""
    start, end = row.values.get("start"), row.values.get("end")
    if start is None or end is None or clip is None:
        return None
    if any(part.endswith("_segment") for part in clip.parts):
        return None
    try:
        return float(start), float(end)
    except (TypeError, ValueError):
        raise row.refused(f"start {start!r} and end {end!r} are no seconds") from None


def task(questions: Sequence[Question], parser: Parser = "first-letter") -> Task:
    """The requests."""
    frames = {one.facts["frames"] for one in questions}
    named = "+".join(str(number) for number in sorted(frames))
    return make_task("mvbench", "train", f"{named}-frames/{parser}", questions)


def score_stored(lines: Sequence[Mapping[str, Any]], parser: Parser = "first-letter") -> Scores:
    """Scores stored answers; the headline is the mean over the twenty tasks.

    Args:
        lines: Lines of `mmlm bench mvbench`.
        parser: How the reply is read.

    Raises:
        ValueError: If the parser is unknown.
        InputError: If a line is damaged, doubled, or of another benchmark, or runs with different
            numbers of frames are mixed.
    """
    if parser not in get_args(Parser):
        raise ValueError(f"parser must be one of {get_args(Parser)}, got {parser!r}")
    frames = {line.get("frames") for line in lines}
    if len(frames) != 1:
        raise InputError(
            f"The lines are of runs with {', '.join(map(str, sorted(frames, key=str)))} frames.",
            advice="Score each run by itself.",
        )
    return score_lines(
        "mvbench",
        f"{frames.pop()}-frames/{parser}",
        lines,
        lambda line: _read(line, parser),
        macro=True,
        sizes=SIZES,
        official=_official,
    )


def _read(line: Mapping[str, Any], parser: Parser) -> Reading:
    by_letter = parser == "first-letter"
    said = first_letter(line["text"]).letter if by_letter else vqa_letter(line["text"])
    known = said != "" and said in LETTERS[: len(line["options"])]
    return Reading(said, said == line["label"], "" if known else "no option")


def _official(scored: Sequence[Scored]) -> dict[str, Any]:
    """lmms-eval's figure in percent: its own reading; empty replies are not counted at all."""
    right = [vqa_letter(line["text"]) == line["label"] for line, _ in scored if line["text"]]
    return {"mvbench_accuracy": 100 * sum(right) / len(right) if right else 0}
