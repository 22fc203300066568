"""``mmlm calibrate heads --kind visual`` and ``--kind text``: a map of heads, for HeadAblation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.calibrate.common import check_output
from mmlm.cli.calibrate.questions import QuestionOptions
from mmlm.cli.frame import DONE, Terminal
from mmlm.cli.options import ModelOptions, open_model
from mmlm.errors import InputError
from mmlm.progress import tracked
from mmlm.records import read_lines

if TYPE_CHECKING:
    from mmlm.engine.head_maps import HeadMap
    from mmlm.head_measures import Grounded, Needle

__all__ = ["needles", "pictures", "run"]

_SHOWN = 10
_COUNT = 300
_DEPTHS = 10
#: Facts and questions about them, for texts in which one thing stands out.
_NEEDLES = (
    ("The best thing to do in {0} is to eat a {1} near the river .", "{0}"),
    ("The favourite meal of the painter from {0} is a {1} with honey .", "{0}"),
    ("Every visitor of {0} gets a {1} as a present .", "{0}"),
)
_PLACES = ("Lisbon", "Oslo", "Quito", "Kyoto", "Tunis")
_THINGS = ("sandwich", "banana", "pizza", "cake", "carrot")


def run(
    kind: str,
    output: Path,
    data: QuestionOptions,
    *,
    instances: Path | None,
    figure: Path | None,
    skip_bad: bool,
    threshold: float,
    rank: str,
    max_new_tokens: int,
    batch_size: int,
    model_options: ModelOptions,
    terminal: Terminal,
) -> int:
    """Measures the map, and writes and shows it.

    Args:
        kind: "visual" or "text".
        output: The file; only a map of heads is written over.
        data: Which pictures or texts.
        instances: Boxes of real pictures, in COCO format.
        figure: Where the map is drawn, if at all.
        skip_bad: Whether texts without their needle are left out.
        threshold: Heads of the kind have more than this.
        rank: What heads are ranked by.
        max_new_tokens: Longest answer.
        batch_size: Pictures at once.
        model_options: The model.
        terminal: Where it is shown.

    Raises:
        MmlmError: For everything that makes it impossible, before any work.
    """
    from mmlm.engine import head_maps
    from mmlm.head_measures import retrieval_heads, visual_heads

    check_output(output, head_maps.HeadMap.load, "is no map of heads")
    visual = kind == "visual"
    samples: list[Any] = list(pictures(data, instances) if visual else needles(data, skip_bad))
    model, processor = open_model(model_options, (), terminal)
    facts = {
        "model": model_options.id,
        "seed": data.seed,
        "samples_from": _source(data, instances, visual),
    }
    shown = tracked(samples, terminal.progress, "pictures" if visual else "texts")
    try:
        if visual:
            found = visual_heads(
                model,
                processor,
                shown,
                threshold=threshold,
                rank=rank,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                facts=facts,
            )
        else:
            found = retrieval_heads(
                model,
                processor,
                shown,
                threshold=threshold,
                rank=rank,
                max_new_tokens=max_new_tokens,
                skip_bad=skip_bad,
                facts=facts,
            )
    except ValueError as error:
        raise InputError(str(error), advice="See `mmlm calibrate heads --help`.") from error
    found.save(output)
    if figure is not None and found.counted["counted"]:
        from mmlm.show import figures
        from mmlm.show.head_figures import draw_map

        figures.save(draw_map(found), figure)
    if terminal.json:
        terminal.emit({**found.as_json(), "output": str(output)})
    else:
        _show(found, output, terminal)
    return DONE


def _source(data: QuestionOptions, instances: Path | None, visual: bool) -> str:
    if instances is not None:
        return instances.name
    if data.questions is not None and not visual:
        return data.questions.name
    what = "pictures" if visual else "captions"
    return f"{what} of the world, {data.split} {data.seed}, {_count(data)}"


def _count(data: QuestionOptions) -> int:
    return data.count or _COUNT


def pictures(data: QuestionOptions, instances: Path | None) -> Iterator[Grounded]:
    """Pictures whose objects have places: of the world, or with boxes in COCO format.

    Raises:
        InputError: If there is no such split, or the file is missing or damaged.
    """
    return _of_world(data) if instances is None else _of_coco(data, instances)


def _of_world(data: QuestionOptions) -> Iterator[Grounded]:
    from PIL import Image

    from data_tools.world import NAMES, SPLITS, render, scene
    from mmlm.cli.pictures import WORLD_PROMPT
    from mmlm.head_measures import Grounded

    if data.split not in SPLITS:
        raise InputError(
            f"There is no split {data.split!r}.", advice=f"Choose one of {', '.join(SPLITS)}."
        )
    for index in range(_count(data)):
        truth = scene(SPLITS[data.split], data.seed, index, data.split)
        drawn = render(truth)
        masks = {name: drawn.class_map == NAMES.index(name) + 1 for name in sorted(truth.classes)}
        yield Grounded(Image.fromarray(drawn.image), WORLD_PROMPT, masks)


def _of_coco(data: QuestionOptions, path: Path) -> Iterator[Grounded]:
    from benchmarks.coco import read_instances
    from mmlm.cli.pictures import COCO_PROMPT
    from mmlm.head_measures import Grounded
    from mmlm.inputs import load_image
    from mmlm.language.objects import node_of_word

    known = [picture for picture in read_instances(path) if picture.objects][: _count(data)]
    content = json.loads(path.read_text(encoding="utf-8"))
    names = {entry["id"]: node_of_word()[entry["name"]] for entry in content["categories"]}
    wanted = {picture.image_id for picture in known}
    boxes: dict[int, dict[str, list[list[float]]]] = {image: {} for image in wanted}
    for number, annotation in enumerate(content["annotations"]):
        image = int(annotation["image_id"])
        if image not in wanted:
            continue
        if len(box := annotation.get("bbox", ())) != 4:
            raise InputError(
                f"{path}: annotation {number} has no box (bbox).",
                advice="Give an instances*.json with boxes.",
            )
        x, y, width, height = map(float, box)
        own = boxes[image].setdefault(names[annotation["category_id"]], [])
        own.append([x, y, x + width, y + height])
    folder = data.images or path.parent
    for picture in known:
        shown = load_image(folder / picture.file_name)
        yield Grounded(shown, COCO_PROMPT, boxes=boxes[picture.image_id])


def needles(data: QuestionOptions, skip_bad: bool = False) -> Iterator[Needle]:
    """Texts with something to repeat: of a file, or captions of the world with a fact among them.

    Args:
        data: Which.
        skip_bad: Whether a text may lack its needle.

    Raises:
        InputError: If a line of the file lacks something.
    """
    from mmlm.head_measures import Needle

    if data.questions is None:
        yield from _among_captions(data)
        return
    for number, line in enumerate(read_lines(data.questions)[: _count(data)], start=1):
        for name in ("prompt", "needle"):
            if not isinstance(line.get(name), str) or not line[name].strip():
                raise InputError(
                    f"{data.questions}, text {number}: `{name}` must be text, got "
                    f"{line.get(name)!r}.",
                    advice="Every line needs `prompt` and `needle`.",
                )
        if line["needle"] not in line["prompt"] and not skip_bad:
            raise InputError(
                f"{data.questions}, text {number}: the needle does not stand in the prompt.",
                advice="Write it exactly as it stands there, or give --skip_bad.",
            )
        yield Needle(line["prompt"], line["needle"])


def _among_captions(data: QuestionOptions) -> Iterator[Needle]:
    import numpy as np

    from data_tools.world import SPLITS, caption, scene
    from mmlm.head_measures import Needle

    rng = np.random.default_rng(data.seed)
    for index in range(_count(data)):
        sentence, asked = _NEEDLES[index % len(_NEEDLES)]
        names = str(rng.choice(_PLACES)), str(rng.choice(_THINGS))
        needle = sentence.format(*names)
        length = 2 + 2 * (index // _DEPTHS % 5)
        hay = [
            caption(scene(SPLITS["train"], data.seed, length * index + n, "train"), rng)
            for n in range(length)
        ]
        hay.insert(round(index % _DEPTHS / (_DEPTHS - 1) * length), needle)
        about = f"What does the text say about {asked.format(*names)} ?"
        yield Needle(f"{' '.join(hay)} {about}", needle)


def _show(found: HeadMap, output: Path, terminal: Terminal) -> None:
    from rich.table import Table

    counted = found.counted
    if bad := counted.get("without_needle"):
        terminal.note(f"left out: {bad} texts without their needle")
    if not counted["counted"]:
        terminal.say(
            f"None of {counted['samples']} answers repeats its needle: no head was measured. "
            f"{output} says so."
        )
        return
    others = [name for name in found.values if name != found.rank]
    of = "pictures" if found.kind == "visual" else "texts"
    number = f"{counted['counted']} of {counted['samples']} {of}"
    title = f"{counted['steps']} scored tokens of {number}"
    table = Table("layer.head", found.rank, *others, title=title)
    for layer, head in found.top(min(_SHOWN, found.score.numel())):
        cells = [float(found.values[name][layer, head]) for name in (found.rank, *others)]
        table.add_row(f"{layer}.{head}", *(f"{cell:.3f}" for cell in cells))
    terminal.table(table)
    if left_out := counted.get("left_out_of_focus"):
        terminal.note(f"focus leaves out {left_out} rows without attention on the image")
    if found.few:
        terminal.note("fewer than 50 scored tokens: the map is not reliable")
    n = found.score.numel()
    terminal.say(
        f"{len(found.heads)} of {n} heads are above {found.threshold:g}. Written to {output}."
    )
