"""Held-out pictures for trainings: the model's captions are scored by CHAIR while it learns.

Named by its class path in a training's YAML file; `training` itself knows neither benchmarks nor
the embedded world.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.pictures import DataOptions, find

if TYPE_CHECKING:
    from mmlm.cli.pictures import Source

__all__ = ["ChairHeldOut"]


class ChairHeldOut:
    """Captions of the embedded world's pictures, or of a folder's in COCO format.

        samples:
          class_path: mmlm.cli.held_out.ChairHeldOut
          init_args:
            data: {images: coco/val2017, annotations: instances_val2017.json, count: 16}

    Args:
        data: which pictures, as for `mmlm bench chair`; without `images` the embedded world is
            drawn. Choose a split and a seed that the training data do not have.
        folder: where the world's pictures are drawn, once.
        prompt: the question. Default: as for `mmlm bench chair`.
        variant: word procedure of the scorer.

    Raises:
        InputError: the pictures or their annotations are missing, or the options contradict each
            other.
    """

    def __init__(
        self,
        data: DataOptions,
        folder: Path = Path("runs/held_out"),
        prompt: str | None = None,
        variant: Literal["wordnet", "pattern"] = "wordnet",
    ) -> None:
        self._source, self._variant = find(data, folder), variant
        self._prompt = prompt or self._source.prompt
        self._drawn: Source | None = None

    def requests(self) -> Sequence[Any]:
        """One question per picture; the world's pictures are drawn first if they are not there."""
        from benchmarks import chair

        source = self._pictures()
        task = chair.task(source.pictures, source.folder, self._prompt, self._variant)
        return [item.request for item in task.items]

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        """CHAIR_i, CHAIR_s, recall (fractions), and words per caption.

        A number that is undefined, such as CHAIR_i of captions that name nothing, is left out.

        Args:
            texts: captions by the ids of the requests.

        Raises:
            InputError: there is no caption.
        """
        from benchmarks import chair

        lines = [{"image_id": int(name), "caption": text} for name, text in texts.items()]
        result = chair.score(lines, self._pictures().truth(self._variant), self._variant)
        names = ("chair_i", "chair_s", "recall", "mean_length")
        values = {name: result.table.measure(name).value for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def _pictures(self) -> Source:
        if self._drawn is None:
            self._drawn = self._source.draw(progress=False)
        return self._drawn
