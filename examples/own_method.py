"""A method of your own: one frozen dataclass. docs/writing-a-method.md explains each line.

python examples/own_method.py
"""

from dataclasses import dataclass
from typing import ClassVar

import mmlm
from mmlm.engine.branches.branch import NoImage
from mmlm.engine.method import Paper
from mmlm.runner import Request, generate_all
from mmlm.show.truth import draw_scene


@dataclass(frozen=True, kw_only=True)
class ImagePush(mmlm.Method):
    """Pushes every prediction away from what the text alone would say."""

    paper: ClassVar[Paper] = Paper(title="An example", arxiv="0000.00000", year=2026, venue="docs")
    strength: float = 1.0

    def __post_init__(self):
        self._check_number("strength", at_least=0)

    def neutral(self):
        return ImagePush(strength=0.0)

    @property
    def branches(self):
        return (NoImage(),) if self.strength else ()  # this prompt without its picture

    def logits(self, state, z):
        return self.strength * (z["main"] - z[NoImage()]) if self.strength else None


model, processor = mmlm.load("embedded")
requests = [Request("scene", (draw_scene(index=3).image,), "describe the image .")]
for method in [ImagePush(strength=0.0), ImagePush(strength=0.5)]:
    (answer,) = generate_all(model, processor, requests, [method])
    print(method.label, "|", answer.text)
