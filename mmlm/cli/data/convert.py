"""``mmlm data convert``: preference data from one format into another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.frame import DONE, SOME_FAILED, Command, Terminal
from mmlm.errors import InputError

if TYPE_CHECKING:
    from data_tools.convert.preference import PreferenceRecord, Problem

__all__ = ["COMMAND", "ConvertData", "run"]

_ALLOWED = 0.2  # share of rows that may be left out before the exit code says so


@dataclass(frozen=True)
class ConvertData:
    """Options of ``mmlm data convert``.

    Attributes:
        source: JSON, JSON lines, parquet, a folder of parquet files or saved by `datasets`, or the
            output folder of one of our pipelines.
        to: Format to write: mmlm, trl (messages), trl-text (raw strings for --model), llava,
            llama-factory.
        output: The new file, its kind by its ending (.jsonl, .json, .parquet); a name without an
            ending is a folder for `datasets.load_from_disk` (trl and trl-text).
        source_format: Format to read: mmlm (SENTINEL's and MIA-DPO's pairs, too), sentinel,
            rlhf-v, rlaif-v, povid, mia-dpo, llava, llama-factory, trl; auto tells it by the fields.
        images: Folder that relative paths of pictures start at; by default the one of the source.
        image_store: Where pictures that come as bytes are written, named after their content; by
            default the folder `images` beside the output.
        check_images: What is checked of every picture; `decodes` reads it completely.
        model: The model whose chat template and tokenizer trl-text is written for.
        chat_template: As in `mmlm generate`: model, simple, or a Jinja file.
        show: How many problems are shown in full.
        overwrite: Replace the output.
    """

    source: Path
    to: str
    output: Path
    source_format: str = dataclasses.field(default="auto", metadata={"alias": "--from"})
    images: Path | None = None
    image_store: Path | None = None
    check_images: Literal["nothing", "exists", "decodes"] = "exists"
    model: str = ""
    chat_template: str = "model"
    show: int = 10
    overwrite: bool = False


def run(settings: ConvertData, terminal: Terminal) -> int:
    """Converts, and says what was left out and why.

    Raises:
        InputError: If the source cannot be read, its format not be told, or the target not
            express a record; nothing is written then.
    """
    from data_tools.convert.pictures import Pictures
    from data_tools.convert.reading import read
    from data_tools.convert.writing import form_of, write

    form_of(settings.to, settings.output)
    row_of = _row_of(settings)
    pictures = Pictures(
        settings.images or _folder_of(settings.source),
        settings.image_store or settings.output.parent / "images",
        settings.check_images,
    )
    problems: list[Problem] = []
    found = read(settings.source, settings.source_format, pictures)
    count = write(
        _records(found, problems),
        settings.to,
        settings.output,
        row_of=row_of,
        overwrite=settings.overwrite,
    )
    _report(settings, count, problems, terminal)
    return SOME_FAILED if len(problems) > _ALLOWED * (count + len(problems)) else DONE


def _records(
    found: Iterable[PreferenceRecord | Problem], problems: list[Problem]
) -> Iterator[PreferenceRecord]:
    from data_tools.convert.preference import Problem

    for one in found:
        if isinstance(one, Problem):
            problems.append(one)
        else:
            yield one


def _folder_of(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _row_of(settings: ConvertData) -> Any:
    from data_tools.convert import TRL_TEXT

    if settings.to != TRL_TEXT:
        if settings.model:
            raise InputError(
                f"{settings.to} is written without a model.",
                advice="Leave out --model, or write --to trl-text.",
            )
        return None
    if not settings.model:
        raise InputError(
            "trl-text is rendered with a model's chat template.",
            advice="Say which: --model embedded, a folder, or a Hugging Face id.",
        )
    from data_tools.convert.formats.trl_text import Renderer
    from mmlm.cli.options import check_model_name
    from mmlm.inputs import use_chat_template
    from mmlm.model.checkpoint import skeleton

    check_model_name(settings.model)
    _, processor = skeleton(settings.model)
    use_chat_template(processor, settings.chat_template)
    return Renderer(processor).row


def _report(settings: ConvertData, count: int, problems: list[Problem], terminal: Terminal) -> None:
    if terminal.json:
        terminal.emit(
            {
                "output": str(settings.output),
                "written": count,
                "left_out": len(problems),
                "problems": [dataclasses.asdict(one) for one in problems[: settings.show]],
            }
        )
        return
    for problem in problems[: settings.show]:
        terminal.note(f"left out: {problem.place}: {problem.reason}")
    if len(problems) > settings.show:
        terminal.note(f"... and {len(problems) - settings.show} more (--show).")
    terminal.say(f"{settings.output}: {count} records, {len(problems)} left out.")


COMMAND = Command(
    summary="preference data from one format into another (SENTINEL, RLHF-V, TRL, ...)",
    settings=ConvertData,
    run=run,
    positional=("source",),
    example="mmlm data convert out/sentinel --to trl-text --model llava-hf/llava-1.5-7b-hf "
    "--output train.parquet\n"
    "mmlm data convert RLAIF-V.parquet --to mmlm --output rlaif/pairs.jsonl",
)
