"""Makes the figures of docs/gallery.md, and docs/results/gallery.json with what stands beside them.

    python tools/gallery_figures.py [METHOD ...]

For every method that needs no training: the first scene of the embedded world in whose plain
caption something is invented and whose caption the method changes. Nothing is chosen by whether the
method helps there. Methods that cut tokens show which patches stay; the others, where the model
looked while it wrote the first word that differs. A few minutes on one core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import mmlm
from mmlm.cli.configs import effect_settings
from mmlm.errors import IncompatibleMethods
from mmlm.inputs import message, prepare
from mmlm.runner import GenerateSettings, Request, generate_all
from mmlm.show import figures, looking, words
from mmlm.show.truth import Drawn, draw_scene
from mmlm.streaming import AnswerStream

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "results" / "gallery.json"
IMAGES = ROOT / "docs" / "images" / "gallery"
QUESTION = "describe the image ."
SETTINGS = GenerateSettings(max_new_tokens=84, batch_size=20)
#: Scenes that are looked through before a method counts as changing nothing.
MOST = 400
SIDE, GAP, HEAD = 220, 10, 26


def main(chosen: Sequence[str]) -> None:
    """Makes what was asked for, or everything."""
    model, processor = mmlm.load("embedded")
    found = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    IMAGES.mkdir(parents=True, exist_ok=True)
    settings = {
        name: texts[0]
        for family in ("embedded", "pruning")
        for name, texts in effect_settings(family).items()
    }
    for name in chosen or settings:
        method = mmlm.parse_method(settings[name])
        shown = show(Reader(model, processor), method, IMAGES / f"{name}.png")
        found[name] = {"setting": " ".join(settings[name].split()), **shown}
        print(f"{name}: scene {found[name]['scene']}")
        text = json.dumps(dict(sorted(found.items())), indent=1, ensure_ascii=False)
        RECORD.write_text(text + "\n", encoding="utf-8")


class Reader:
    """The embedded model with a question, asked about scenes."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def captions(self, numbers: Sequence[int], methods: Sequence[mmlm.Method]) -> list[str]:
        """Captions of some scenes, together."""
        requests = [Request(str(n), (draw_scene(index=n).image,), QUESTION) for n in numbers]
        answers = generate_all(self.model, self.processor, requests, methods, SETTINGS)
        return [answer.text for answer in answers]

    def caption(self, scene: Drawn, methods: Sequence[mmlm.Method]) -> AnswerStream:
        """The caption of one scene, with whatever probes measured."""
        asked = [message("user", QUESTION, n_images=1)]
        inputs = prepare(self.processor, [asked], [[scene.image]])
        with AnswerStream(self.model, self.processor, inputs, methods, SETTINGS) as stream:
            for _ in stream:
                pass
        return stream


def show(reader: Reader, method: mmlm.Method, path: Path) -> dict[str, Any]:
    """Finds the scene, draws the figure, and returns what stands beside it."""
    number = first_change(reader, method)
    scene = draw_scene(index=number)
    if type(method).__name__ in ("FlowCut", "ClsPruner", "RandomPruner"):
        plain, changed, seen = *both(reader, scene, method, ()), ()
        panels = [("the picture", enlarged(scene.image)), kept(changed, scene)]
    else:
        try:
            plain, changed = both(reader, scene, method, (mmlm.AttentionMap(),))
            panels, seen = gazes(plain, changed, scene)
        except IncompatibleMethods:  # a search that reorders rows cannot be looked at
            plain, changed, seen = *both(reader, scene, method, ()), ()
            panels = [("the picture", enlarged(scene.image))]
    beside(panels).quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    return {
        "scene": number,
        "truth": sorted(scene.known.objects),
        "plain": plain.text,
        "with": changed.text,
        "words": list(seen),
    }


def first_change(reader: Reader, method: mmlm.Method) -> int:
    """The first scene with an invention whose caption the method changes."""
    for start in range(0, MOST, SETTINGS.batch_size):
        numbers = range(start, start + SETTINGS.batch_size)
        plain = reader.captions(numbers, ())
        changed = reader.captions(numbers, (method,))
        for number, before, after in zip(numbers, plain, changed, strict=True):
            truth = draw_scene(index=number).known.objects
            invented = any(piece.kind == "bad" for piece in words.pieces(before, truth))
            if invented and before != after:
                return number
    raise SystemExit(f"{method.label} changes none of {MOST} captions.")


def both(
    reader: Reader, scene: Drawn, method: mmlm.Method, probes: Sequence[mmlm.Method]
) -> tuple[AnswerStream, AnswerStream]:
    """Without and with the method."""
    return reader.caption(scene, probes), reader.caption(scene, (*probes, method))


def gazes(
    plain: AnswerStream, changed: AnswerStream, scene: Drawn
) -> tuple[list[tuple[str, Image.Image]], tuple[str, str]]:
    """The picture, and where the model looked at the first word that differs."""
    looks = [looking.of_stream(stream, [scene.image]) for stream in (plain, changed)]
    spans = [words.words(look.text) for look in looks]
    texts = [[look.text[a:b] for a, b in s] for look, s in zip(looks, spans, strict=True)]
    at = next(
        (i for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]),
        min(map(len, texts)) - 1,  # one caption goes on where the other ends
    )
    maps = [look.of_span(*s[at]) for look, s in zip(looks, spans, strict=True)]
    peak = float(max(m.max() for m in maps))
    seen = (texts[0][at], texts[1][at])
    panels = [("the picture", enlarged(scene.image))]
    for how, word, values in zip(("plain", "with it"), seen, maps, strict=True):
        over = figures.overlay(scene.image, values, peak=peak, side=SIDE)
        panels.append((f"{how}: “{word}”", over))
    return panels, seen


def kept(stream: AnswerStream, scene: Drawn) -> tuple[str, Image.Image]:
    """The patches that stayed; what left is dark."""
    (record,) = stream.records.values()
    places = record["kept"][0]
    vision = stream.model.config.vision_config
    rows = vision.image_size // vision.patch_size
    mask = np.zeros(rows * rows, bool)
    mask[places] = True
    large = np.asarray(enlarged(scene.image), np.float32)
    cell = SIDE // rows
    shown = np.kron(mask.reshape(rows, rows), np.ones((cell, cell)))[..., None]
    return f"{len(places)} patches stay", Image.fromarray(
        np.round(np.where(shown, large, 0.12 * large + 25)).astype(np.uint8)
    )


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture, pixel by pixel."""
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)


def beside(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures in a row, each with a line above."""
    width = len(panels) * (SIDE + GAP) - GAP
    sheet = Image.new("RGB", (width, SIDE + HEAD), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for place, (title, picture) in enumerate(panels):
        left = place * (SIDE + GAP)
        draw.text((left, 2), title, fill="#222222", font=font)
        sheet.paste(picture, (left, HEAD))
    return sheet


if __name__ == "__main__":
    main(sys.argv[1:])
