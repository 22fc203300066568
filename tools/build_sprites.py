"""Build the sprite sheets of the embedded world from four npm packages of emoji.

The sheets are committed (`data_tools/world/sheets/`), so nobody needs this program to use the
world; it documents where every pixel comes from and rebuilds them:

    npm install --prefix /tmp/emoji --ignore-scripts @iconify-json/noto@1.2.9 \
        @iconify-json/fluent-emoji-flat@1.2.6 @lobehub/fluent-emoji-3d@1.1.0 \
        @iconify-json/twemoji@1.2.5
    pip install resvg-py
    python tools/build_sprites.py --packages /tmp/emoji/node_modules

Licences of the art are listed in NOTICE. Classes without a usable emoji come from
`drawn_sprites.py`.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import resvg_py
from drawn_sprites import DRAWINGS, draw
from PIL import Image, ImageDraw

SHEETS = Path(__file__).resolve().parents[1] / "data_tools" / "world" / "sheets"
CELL = 48
"""Longest side of a stored sprite in pixels; the world never draws one larger than 40."""
COLUMNS = 12
OVERSAMPLE = 4
PACKAGES = {
    "noto": "@iconify-json/noto",
    "fluent_flat": "@iconify-json/fluent-emoji-flat",
    "fluent_3d": "@lobehub/fluent-emoji-3d",
    "twemoji": "@iconify-json/twemoji",
}
EMOJI = {
    "person": "1f9cd 1f468 1f469 1f466 1f467 1f9d1 1f6b6",
    "bicycle": "1f6b2",
    "car": "1f697 1f699",
    "motorcycle": "1f3cd 1f6f5",
    "airplane": "2708 1f6e9",
    "bus": "1f68c 1f68e",
    "train": "1f686 1f682 1f684",
    "truck": "1f69a 1f69b",
    "boat": "26f5 1f6a4 1f6e5",
    "traffic light": "1f6a6 1f6a5",
    "stop sign": "1f6d1",
    "bird": "1f426 1f99c 1f54a",
    "cat": "1f408 1f431",
    "dog": "1f415 1f436 1f429",
    "horse": "1f40e 1f434",
    "sheep": "1f411 1f40f",
    "cow": "1f404 1f42e",
    "elephant": "1f418",
    "bear": "1f43b 1f43b-200d-2744",
    "zebra": "1f993",
    "giraffe": "1f992",
    "backpack": "1f392",
    "umbrella": "2602 2614",
    "handbag": "1f45c",
    "tie": "1f454",
    "suitcase": "1f9f3",
    "frisbee": "1f94f",
    "skis": "1f3bf",
    "sports ball": "26bd 1f3c0 1f3d0",
    "kite": "1fa81",
    "skateboard": "1f6f9",
    "tennis racket": "1f3be",
    "bottle": "1f37e 1f9f4",
    "wine glass": "1f377",
    "cup": "2615 1f964 1f375",
    "fork": "1f374",
    "knife": "1f52a",
    "spoon": "1f944",
    "bowl": "1f35c 1f957",
    "banana": "1f34c",
    "apple": "1f34e 1f34f",
    "sandwich": "1f96a",
    "orange": "1f34a",
    "broccoli": "1f966",
    "carrot": "1f955",
    "hot dog": "1f32d",
    "pizza": "1f355",
    "donut": "1f369",
    "cake": "1f370 1f382",
    "chair": "1fa91",
    "couch": "1f6cb",
    "potted plant": "1fab4",
    "bed": "1f6cf",
    "toilet": "1f6bd",
    "tv": "1f4fa",
    "laptop": "1f4bb",
    "mouse": "1f5b1",
    "keyboard": "2328",
    "cell phone": "1f4f1",
    "book": "1f4d5 1f4d6 1f4d8 1f4da",
    "clock": "23f0 1f552 1f570",
    "vase": "1f3fa",
    "scissors": "2702",
    "teddy bear": "1f9f8",
    "toothbrush": "1faa5",
}
"""Class name -> code points. The bowl with a spoon (1f963) is left out: it would add a spoon."""

UNUSABLE = {("twemoji", "tennis racket")}
"""Twemoji's tennis emoji is a ball without a racket: the drawing takes its place."""


class IconSet:
    """One style's pictures by code point."""

    def __init__(self, style: str, folder: Path) -> None:
        self.folder = folder
        self.raster = style == "fluent_3d"
        if not self.raster:
            self.icons = json.loads((folder / "icons.json").read_text("utf-8"))
            self.names = json.loads((folder / "chars.json").read_text("utf-8"))

    def picture(self, code: str) -> Image.Image:
        """RGBA picture of a code point, about `CELL * OVERSAMPLE` pixels wide."""
        if self.raster:
            path = next(p for p in self._paths(code) if p.exists())
            return Image.open(path).convert("RGBA")
        name = next(self.names[c] for c in (code, code + "-fe0f") if c in self.names)
        icon = (
            self.icons["icons"].get(name)
            or self.icons["icons"][self.icons["aliases"][name]["parent"]]
        )
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self.icons["width"])
        height = icon.get("height", self.icons["height"])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
        side = CELL * OVERSAMPLE
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
        return Image.open(io.BytesIO(png)).convert("RGBA")

    def _paths(self, code: str) -> list[Path]:
        return [self.folder / "assets" / f"{c}.webp" for c in (code, code + "-fe0f")]


def only_fork(image: Image.Image) -> Image.Image:
    """Keep the fork of the fork-and-knife emoji: the left one of its two parts.

    The parts are separated by the emptiest column of the middle third.
    """
    ink = np.asarray(image)[..., 3].astype(np.int64).sum(axis=0)
    third = image.width // 3
    cut = third + int(ink[third : 2 * third].argmin())
    return image.crop((0, 0, cut, image.height))


def largest_part(image: Image.Image) -> Image.Image:
    """Erase everything but the largest connected part: the ball beside the tennis racket."""
    ink = image.getchannel("A").point(lambda a: 255 if a >= 16 else 0)
    labels = 0
    while (rest := np.argwhere(np.asarray(ink) == 255)).size:
        labels += 1
        ImageDraw.floodfill(ink, (int(rest[0][1]), int(rest[0][0])), labels)
    sizes = np.bincount(np.asarray(ink).ravel(), minlength=2)
    keep = np.asarray(ink) == 1 + sizes[1:].argmax()
    pixels = np.asarray(image).copy()
    pixels[~keep] = 0
    return Image.fromarray(pixels)


def fit(image: Image.Image) -> Image.Image:
    """Crop to the visible part and average down to at most `CELL` pixels."""
    solid = image.getchannel("A").point(lambda a: 255 if a >= 16 else 0)
    image = image.crop(solid.getbbox())
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX)


def _as_is(image: Image.Image) -> Image.Image:
    return image


CLEAN = {"fork": only_fork, "tennis racket": largest_part}


def build_style(style: str, folder: Path) -> tuple[Image.Image, list[dict[str, object]]]:
    """Lay out all sprites of a style on one sheet.

    Returns:
        The sheet and one entry (class, code, box) per sprite, box = [x, y, width, height].
    """
    icons = IconSet(style, folder)
    sprites: list[tuple[str, str, Image.Image]] = []
    for name, codes in EMOJI.items():
        for code in codes.split():
            if (style, name) not in UNUSABLE:
                sprites.append((name, code, fit(CLEAN.get(name, _as_is)(icons.picture(code)))))
    for name in DRAWINGS:
        if name not in EMOJI or (style, name) in UNUSABLE:
            sprites.append((name, "drawn", fit(draw(name, style, CELL * OVERSAMPLE))))
    rows = -(-len(sprites) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    entries = []
    for i, (name, code, picture) in enumerate(sprites):
        x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
        sheet.paste(picture, (x, y))
        entries.append({"class": name, "code": code, "box": [x, y, *picture.size]})
    return sheet, entries


def main() -> None:
    """Write one lossless WebP per style and `index.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="a node_modules folder")
    parser.add_argument("--output", type=Path, default=SHEETS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    index = {}
    for style, package in PACKAGES.items():
        sheet, entries = build_style(style, args.packages / package)
        path = args.output / f"{style}.webp"
        sheet.save(path, lossless=True, quality=100, method=6)
        index[style] = entries
        print(f"{path.name}: {len(entries)} sprites, {path.stat().st_size / 1000:.0f} kB")
    lines = [
        f'  "{style}": [\n' + ",\n".join("    " + json.dumps(e) for e in entries) + "\n  ]"
        for style, entries in index.items()
    ]
    (args.output / "index.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
