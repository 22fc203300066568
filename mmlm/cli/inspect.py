"""``mmlm inspect``: what a model looks at while it answers, and what methods change about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.cli.options import (
    EMBEDDED,
    ModelOptions,
    check_model_name,
    method_field,
    open_model,
    parse_methods,
)
from mmlm.cli.pictures import COCO_PROMPT, WORLD_PROMPT
from mmlm.decoding_settings import GenerateSettings
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mmlm.engine.method import Method
    from mmlm.show.conversation import Picture
    from mmlm.show.inspection import Inspection
    from mmlm.show.spots import Spot

__all__ = ["COMMAND", "Inspect", "run"]

PAGE, NUMBERS = "index.html", "inspect.json"
FIGURES = ("words", "layers", "heads", "looks", "copies", "norms", "first", "magnets", "sinks")


@dataclass(frozen=True)
class Inspect:
    """Options of ``mmlm inspect``.

    Attributes:
        images: Pictures of one question.
        scene: Number of a scene of the embedded world, instead of pictures (split `natural`).
        prompt: The question. Default: to describe the picture.
        methods: A method, e.g. "VHR(alpha=2.0)": the answer with all methods given is shown beside
            the plain model's.
        probes: A probe, e.g. "AttentionMap(layers=(8, 9))". Default: AttentionMap, TextDominance
            and HeadDivergence in all layers, and VisualSinks where the model's sink dimensions
            are known.
        words: A word or phrase of the answers whose map is shown. Default: the objects they name.
        truth: Objects in the pictures, instances.json in COCO format: objects in answers are
            marked as found or invented. Not needed for scenes and for pictures beside the file
            that `mmlm data world` writes.
        output: A folder for the page, the numbers and the figures.
        figures: Format of the figures.
        model: The model.
        generate: How answers are generated (`batch_size` does not matter here).
    """

    images: tuple[str, ...] = ()
    scene: int | None = None
    prompt: str = ""
    methods: tuple[str, ...] = method_field()
    probes: tuple[str, ...] = field(default=(), metadata={"alias": "--probe"})
    words: tuple[str, ...] = field(default=(), metadata={"alias": "--word"})
    truth: Path | None = None
    output: Path = Path("runs/inspect")
    figures: Literal["png", "svg"] = "png"
    model: ModelOptions = field(default_factory=ModelOptions)
    generate: GenerateSettings = field(default_factory=GenerateSettings)


def run(settings: Inspect, terminal: Terminal) -> int:
    """Answers, measures, and writes the page.

    Returns:
        ``DONE``.

    Raises:
        MmlmError: For everything that makes the inspection impossible, before any work if it can be
            known then.
    """
    check_model_name(settings.model.id)
    methods, wanted = parse_methods(settings.methods), _probes(settings.probes)
    _claim(settings.output)
    pictures = _pictures(settings)
    model, processor = open_model(settings.model, (*methods, *wanted), terminal)

    from mmlm.engine.anatomy import Anatomy
    from mmlm.inputs import unknown_words
    from mmlm.show.inspection import default_probes, fitting, inspect
    from mmlm.show.spots import spots

    probes = wanted or default_probes(Anatomy(model).n_layers)
    probes, left_out = fitting(model, processor, pictures, methods, probes)
    _refuse(left_out, probes, wanted)
    for name, reason in left_out.items():
        terminal.note(f"{name} is left out: {reason}")
    prompt = settings.prompt.strip() or (
        WORLD_PROMPT if settings.model.id == EMBEDDED else COCO_PROMPT
    )
    if unknown := unknown_words(processor, prompt):
        terminal.note(f"words that the model does not know: {', '.join(unknown)}")
    inspection = inspect(
        model,
        processor,
        settings.model.id,
        pictures,
        prompt,
        methods,
        probes,
        settings.generate,
        terminal.note,
    )
    inspection = replace(inspection, left_out=left_out)
    shown = spots(inspection, settings.words)
    files = _write(settings, inspection, shown, probes, model, processor)
    if terminal.json:
        terminal.emit(inspection.as_json() | {"files": [str(path) for path in files]})
    else:
        _say(inspection, terminal)
        terminal.say(f"\nopen {files[0]}")
    return DONE


def _claim(folder: Path) -> None:
    """Refuses to write over what another program wrote.

    Raises:
        InputError: If something of the kind is there.
    """
    from mmlm import pages
    from mmlm.show.inspect_page import GENERATOR

    pages.claim(folder / PAGE, GENERATOR)
    if not (folder / PAGE).exists():
        for name in (NUMBERS, *(f"{n}.{kind}" for n in FIGURES for kind in ("png", "svg"))):
            if (folder / name).exists():
                raise InputError(
                    f"{str(folder / name)!r} exists and is not from `{GENERATOR}`.",
                    advice="Choose another --output.",
                )


def _probes(texts: Sequence[str]) -> tuple[Method, ...]:
    """The probes that were asked for.

    Raises:
        InputError: For a method that is no probe, an unknown name or a refused value.
    """
    import mmlm

    probes = parse_methods(texts)
    for text, probe in zip(texts, probes, strict=False):
        if not (probe.measures and probe.sites <= probe.only_looks):
            raise InputError(
                f"{text} is no probe: it changes answers.",
                advice=f"Probes: {', '.join(sorted(mmlm._PROBES))}. Methods go to --method.",
            )
    return probes


def _pictures(settings: Inspect) -> tuple[Picture, ...]:
    """The pictures of the question, with what is known to be in them."""
    from mmlm.show.conversation import Picture
    from mmlm.show.truth import draw_scene, of_file

    if bool(settings.images) == (settings.scene is not None):
        given = "both pictures and a scene" if settings.images else "no picture"
        raise InputError(
            f"There is {given} to look at.",
            advice="Give the path of a picture, or --scene 3 for one of the embedded world.",
        )
    if settings.truth is not None and not settings.truth.is_file():
        raise InputError(f"There is no file {str(settings.truth)!r}.", advice="Check --truth.")
    if settings.scene is not None:
        drawn = draw_scene("natural", 0, settings.scene)
        return (Picture(f"world natural {settings.scene}", drawn.image, known=drawn.known),)
    read = [Picture.read(Path(image).expanduser()) for image in settings.images]
    return tuple(replace(p, known=of_file(p.name, settings.truth)) for p in read)


def _refuse(
    left_out: Mapping[str, str], probes: Sequence[Method], wanted: Sequence[Method]
) -> None:
    """What was asked for must fit; of the default probes at least one."""
    if left_out and (wanted or not probes):
        name, reason = next(iter(left_out.items()))
        raise InputError(
            f"{name} cannot look at this: {reason}",
            advice="Choose other probes (--probe) or methods (--method).",
        )


def _write(
    settings: Inspect,
    inspection: Inspection,
    shown: Sequence[Spot],
    probes: Sequence[Method],
    model: Any,
    processor: Any,
) -> list[Path]:
    """Writes everything; the page first in the list, and last to the disk."""
    from mmlm.show import figures
    from mmlm.show import inspect_figures as drawing
    from mmlm.show.inspect_page import page

    folder = settings.output
    folder.mkdir(parents=True, exist_ok=True)
    drawings = (
        drawing.draw_words(inspection, shown),
        drawing.draw_layers(inspection),
        drawing.draw_heads(inspection),
        drawing.draw_looks(inspection),
        drawing.draw_copies(inspection),
        drawing.draw_norms(inspection),
        drawing.draw_first(inspection),
        drawing.draw_magnets(inspection, model, processor),
        drawing.draw_sinks(inspection, model, processor),
    )
    drawn = {}
    for name, figure in zip(FIGURES, drawings, strict=True):
        if figure is not None:
            drawn[name] = folder / f"{name}.{settings.figures}"
            figures.save(figure, drawn[name])
    numbers = json.dumps(inspection.as_json(), ensure_ascii=False, allow_nan=False, indent=1)
    (folder / NUMBERS).write_text(numbers + "\n", encoding="utf-8")
    on_page = {name: path for name, path in drawn.items() if name != "words"}
    table = drawing.stage_table(inspection)
    text = page(inspection, shown, on_page, [table], _facts(settings, probes))
    target = folder / PAGE
    temporary = target.with_name(f".{PAGE}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return [target, folder / NUMBERS, *drawn.values()]


def _facts(settings: Inspect, probes: Sequence[Method]) -> dict[str, str]:
    from importlib.metadata import version

    generate = settings.generate
    return {
        "model": f"{settings.model.id} ({settings.model.dtype}, {settings.model.attention})",
        "methods": " + ".join(settings.methods) or "none",
        "probes": " + ".join(probe.text for probe in probes),
        "answers": f"{'sampled' if generate.do_sample else 'greedy'}, at most "
        f"{generate.max_new_tokens} tokens, seed {generate.seed}",
        "versions": ", ".join(f"{n} {version(n)}" for n in ("mmlm", "torch", "transformers")),
    }


def _say(inspection: Inspection, terminal: Terminal) -> None:
    """The answers and their attention on the pictures, for people at a terminal."""
    from rich.text import Text

    from mmlm.show.words import coloured

    known = inspection.pictures[0].known if len(inspection.pictures) == 1 else None
    for arm in inspection.arms:
        seen = "" if arm.look is None else f" ({arm.look.shares.sum(1).mean():.0%} on the picture)"
        terminal.table(Text(f"{arm.name}{seen}", style="bold"))
        truth, asked = (known.objects, known.asked) if known else (None, None)
        terminal.table(coloured(arm.text, truth, asked))


COMMAND = Command(
    summary="what a model looks at while it answers: maps, layers, heads, before and after",
    settings=Inspect,
    run=run,
    positional=("images",),
    example=(
        'mmlm inspect --scene 3 --method "VHR(alpha=2.0)"\n'
        'mmlm inspect photo.jpg --prompt "What is on the table?" --output runs/table\n'
        'mmlm inspect photo.jpg --model llava-hf/llava-1.5-7b-hf --probe "VisualSinks()"'
    ),
)
