"""Character classification: two drawn faces with invented names; who is in the query?"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from data_tools.micl import drawing
from data_tools.micl.tasks import Latent, Params, Split, Task, pick

__all__ = ["Character"]

HAIR_COLOURS = ((40, 30, 25), (120, 70, 30), (225, 185, 90), (190, 70, 35), (150, 150, 155))
HAIR_FORMS = ("short", "long", "bun", "curls")
FACE_COLOURS = ((250, 220, 190), (200, 145, 105), (120, 80, 55))
EYES = ("dots", "glasses", "lashes")
IDENTITIES = 40
NAMES = (
    *("Blicket", "Dax", "Wug", "Toma", "Fep", "Zorla", "Kiva", "Mundo", "Plim", "Rask"),
    *("Vonu", "Tirel", "Gosh", "Lumo", "Nerf", "Quilo", "Sarn", "Yuppa", "Bremo", "Calda"),
)
SIZE = 200  # side on which a face is drawn before it is placed


class Character(Task):
    """A face in a random place, size and tilt on a noisy ground; the answer is its invented name.

    The latent is which name belongs to which of two faces; both are drawn anew for every episode,
    so that no name can be learnt. Forty identities differ in hair, face and eyes.
    """

    name = "character"
    type = "novel concept"
    question = "Who is in this image?"
    answers = "word"

    def latents(self, rng: np.random.Generator) -> tuple[Latent, ...]:
        """Two faces with two names: this way round, and the other."""
        one, two = (int(index) for index in rng.permutation(IDENTITIES)[:2])
        first, second = (NAMES[int(index)] for index in rng.permutation(len(NAMES))[:2])
        return (
            json.dumps({str(one): first, str(two): second}),
            json.dumps({str(one): second, str(two): first}),
        )

    def item(self, rng: np.random.Generator, split: Split) -> Params:
        """A rendering of any identity."""
        return _rendering(rng, int(rng.integers(IDENTITIES)))

    def item_for(
        self, rng: np.random.Generator, split: Split, latents: tuple[Latent, ...]
    ) -> Params:
        """A rendering of one of the two identities that have a name."""
        return _rendering(rng, int(pick(rng, tuple(json.loads(latents[0])))))

    def covers(self, demos: Sequence[Params], latents: tuple[Latent, ...]) -> bool:
        """Both faces are introduced."""
        return len({params["identity"] for params in demos}) == 2

    def allows(self, params: Params, latent: Latent) -> bool:
        """Only who has a name."""
        return str(params["identity"]) in json.loads(latent)

    def answer(self, params: Params, latent: Latent) -> str:
        """The name."""
        return str(json.loads(latent)[str(params["identity"])])

    def draw(self, params: Params) -> Image.Image:
        """A face on coloured noise."""
        rng = np.random.default_rng(params["noise"])
        ground = rng.integers(90, 256, size=(12, 12, 3), dtype=np.uint8)
        size = (drawing.SIDE, drawing.SIDE)
        picture = Image.fromarray(ground).resize(size, Image.Resampling.BICUBIC)
        face = _face(params["identity"]).rotate(params["tilt"], Image.Resampling.BICUBIC)
        side = round(SIZE * params["scale"])
        face = face.resize((side, side), Image.Resampling.LANCZOS)
        picture.paste(face, (params["x"], params["y"]), face)
        return picture


def _rendering(rng: np.random.Generator, identity: int) -> Params:
    scale = float(np.round(rng.uniform(0.7, 1.5), 3))
    room = drawing.SIDE - round(SIZE * scale)
    return {
        "identity": identity,
        "scale": scale,
        "tilt": float(np.round(rng.uniform(-20, 20), 2)),
        "x": int(rng.integers(room + 1)),
        "y": int(rng.integers(room + 1)),
        "noise": int(rng.integers(2**31)),
    }


@functools.cache
def _identities() -> tuple[tuple[int, int, int, int], ...]:
    """Forty of the 180 looks, the same for everybody."""
    looks = list(
        itertools.product(
            range(len(HAIR_COLOURS)),
            range(len(HAIR_FORMS)),
            range(len(FACE_COLOURS)),
            range(len(EYES)),
        )
    )
    order = np.random.default_rng(0).permutation(len(looks))[:IDENTITIES]
    return tuple(looks[int(index)] for index in order)


@functools.lru_cache(maxsize=IDENTITIES)
def _face(identity: int) -> Image.Image:
    hair, form, skin, eyes = _identities()[identity]
    picture = Image.new("RGBA", (SIZE, SIZE))
    canvas = ImageDraw.Draw(picture)
    _hair(canvas, HAIR_FORMS[form], HAIR_COLOURS[hair])
    canvas.ellipse([50, 45, 150, 170], FACE_COLOURS[skin], (0, 0, 0), 2)
    canvas.chord([50, 38, 150, 120], 180, 360, HAIR_COLOURS[hair])
    _eyes(canvas, EYES[eyes])
    canvas.line([(100, 108), (95, 125), (103, 125)], (60, 40, 30), 3)
    canvas.arc([80, 125, 120, 152], 20, 160, (150, 30, 40), 4)
    return picture


def _hair(canvas: ImageDraw.ImageDraw, form: str, colour: tuple[int, int, int]) -> None:
    if form == "long":
        canvas.rounded_rectangle([38, 40, 162, 190], 40, colour)
    elif form == "bun":
        canvas.ellipse([75, 5, 125, 55], colour)
    elif form == "curls":
        for x, y in [(45, 60), (60, 38), (85, 25), (115, 25), (140, 38), (155, 60), (40, 90)]:
            canvas.ellipse([x - 22, y - 22, x + 22, y + 22], colour)
        canvas.ellipse([138, 68, 182, 112], colour)
    canvas.ellipse([44, 30, 156, 130], colour)


def _eyes(canvas: ImageDraw.ImageDraw, kind: str) -> None:
    for x in (80, 120):
        canvas.ellipse([x - 5, 93, x + 5, 103], (10, 10, 10))
        if kind == "glasses":
            canvas.ellipse([x - 16, 82, x + 16, 114], None, (10, 10, 10), 4)
        elif kind == "lashes":
            for step in (-6, 0, 6):
                canvas.line([(x + step, 90), (x + step * 1.8, 80)], (10, 10, 10), 3)
    if kind == "glasses":
        canvas.line([(96, 98), (104, 98)], (10, 10, 10), 4)
