"""What all detectors with weights share: settings, precision, and one encoding per picture."""

from __future__ import annotations

import contextlib
import functools
import os
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from data_tools.detectors import Box, Detector, Finding
from data_tools.pictures import Picture
from mmlm.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "Engine", "NeuralDetector", "PictureFeatures", "boxes_in", "not_too_thin"]

DTYPES = ("float32", "bfloat16", "float16")
_THINNEST = 16


class PictureFeatures:
    """Makes the part of a model that sees nothing but the picture run once per picture.

    The models read names and picture in one ``forward``, though their image encoders do not depend
    on the names. Here the encoder's own ``forward`` is replaced, on the instance, by one that
    returns what it computed for the picture at hand; the model's code stays as it is.

    Args:
        encoder: The module.
        prepare: Turns pixels into the encoder's arguments, one row each.
        kept: For how many pictures arguments and features are kept, the latest used.

    Attributes:
        runs: How often the encoder ran.
    """

    def __init__(
        self, encoder: torch.nn.Module, prepare: Callable[[Image.Image], tuple[Any, ...]], kept: int
    ) -> None:
        self.runs = 0
        self._encode = encoder.forward
        encoder.forward = self._recall
        self._prepare = prepare
        self._kept = kept
        self._known: OrderedDict[str, tuple[tuple[Any, ...], Any]] = OrderedDict()
        self._current: Any = None

    def show(self, picture: Picture) -> tuple[Any, ...]:
        """Encodes the picture unless it is known, and makes it the one at hand.

        Returns:
            The encoder's arguments for it, of one row.
        """
        if picture.sha256 not in self._known:
            arguments = self._prepare(picture.image)
            self._known[picture.sha256] = arguments, self._encode(*arguments)
            self.runs += 1
            if len(self._known) > self._kept:
                self._known.popitem(last=False)
        self._known.move_to_end(picture.sha256)
        arguments, self._current = self._known[picture.sha256]
        return arguments

    def _recall(self, *arguments: Any, **options: Any) -> Any:
        first = next(iter((*arguments, *options.values())))
        return rows(self._current, len(getattr(first, "tensors", first)))


def rows(value: Any, count: int) -> Any:
    """Repeats what belongs to one picture for every row of a batch, without copying numbers.

    Lists are new: the models append to what their encoder returned.
    """
    if isinstance(value, list | tuple):
        return type(value)(rows(one, count) for one in value)
    if hasattr(value, "decompose"):  # a NestedTensor: pixels and padding
        return type(value)(*rows(value.decompose(), count))
    if isinstance(value, dict):  # OWLv2 has one row for all names
        return value
    return value.expand(count, *value.shape[1:])


class Engine(Protocol):
    """A loaded model.

    Attributes:
        features: Its image encoder.
        weights: Hash of its weights.
    """

    features: PictureFeatures
    weights: str

    def find(self, picture: Picture, names: Sequence[str]) -> dict[str, Finding | None]:
        """Looks for names: at least one, sorted, each once."""


class NeuralDetector(Detector):
    """A detector with weights; its subclasses are dataclasses with these fields among others.

    Attributes:
        box_threshold: Least confidence of a box.
        pictures_kept: For how many pictures image features are kept.
        device: ``auto`` (a GPU if there is one), or torch's name of a device.
        dtype: Number format of the computation; weights stay float32.
    """

    box_threshold: float | None
    pictures_kept: int
    device: str
    dtype: str

    def __post_init__(self) -> None:
        """Refuses values that cannot be.

        Raises:
            ValueError: Names the field and its allowed values.
        """
        for field in ("box_threshold", "text_threshold"):
            value = getattr(self, field, None)
            if value is not None and not 0.0 < value < 1.0:
                raise ValueError(f"{field} must be between 0 and 1, both excluded, got {value}")
        for field in ("pictures_kept", "names_at_once", "captions_at_once", "max_text_tokens"):
            value = getattr(self, field, None)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @abstractmethod
    def _load(self) -> Engine:
        """Builds the model and fills it."""

    @functools.cached_property
    def engine(self) -> Engine:
        """The loaded model; loads it at the first use.

        Raises:
            InputError: If files are missing or of another kind.
            MissingTensors: If the weights do not fill the model.
        """
        return self._load()

    def load(self) -> None:
        """Loads the model, once; raises as `engine` does."""
        _ = self.engine

    def detect(self, picture: Picture, names: Sequence[str]) -> dict[str, Finding | None]:
        """Looks for objects.

        Raises:
            torch.OutOfMemoryError: If they are too many at once.
        """
        if not names:
            return {}
        import torch

        with torch.inference_mode(), self._precision():
            # Sorted, so that the order in which they are asked changes nothing.
            found = self.engine.find(picture, sorted(set(names)))
        return {name: found[name] for name in dict.fromkeys(names)}

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        import torch

        kind = self.torch_device().type
        reduced = self.dtype != "float32"
        with torch.autocast(kind, getattr(torch, self.dtype) if reduced else None, reduced):
            yield

    def torch_device(self) -> torch.device:
        """The device that is meant.

        Raises:
            InputError: If this machine has no such device.
        """
        import torch

        name = self.device
        if name == "auto" and torch.cuda.is_available():
            # Every process that a launcher starts on a machine gets a GPU of its own.
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            device = torch.device("cpu" if name == "auto" else name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
            raise InputError(
                f"The device {name!r} cannot be used: {str(error).splitlines()[0]}.",
                advice="Use device='auto' or device='cpu'.",
            ) from error
        return device

    def _facts(self, **more: Any) -> Mapping[str, Any]:
        return {
            "detector": self.name,
            "weights": self.engine.weights,
            "dtype": self.dtype,
            **more,
        }


def not_too_thin(image: Image.Image) -> Image.Image:
    """Puts a picture that is a thin line on black, so that no side vanishes when it is scaled.

    The picture stays in the upper left corner: positions in pixels are the same.
    """
    width, height = image.size
    least = -(-max(width, height) // _THINNEST)
    if min(width, height) >= least:
        return image
    canvas = Image.new("RGB", (max(width, least), max(height, least)))
    canvas.paste(image)
    return canvas


def boxes_in(
    image: Image.Image,
    shape: tuple[float, float],
    found: Sequence[tuple[Sequence[float], float, str]],
) -> list[Box]:
    """Boxes in pixels of a picture, cut at its border; none of those that lie outside.

    Args:
        image: The picture.
        shape: Width and height, in its pixels, of what the model saw.
        found: Centre x, centre y, width and height as shares of what the model saw; confidence;
            label.
    """
    boxes = []
    for (x, y, width, height), score, label in found:
        left, right = ((x + side * width / 2) * shape[0] for side in (-1, 1))
        top, bottom = ((y + side * height / 2) * shape[1] for side in (-1, 1))
        left, top = max(left, 0.0), max(top, 0.0)
        right, bottom = min(right, float(image.width)), min(bottom, float(image.height))
        left, top, right, bottom = (round(value, 2) for value in (left, top, right, bottom))
        if left < right and top < bottom:
            boxes.append(Box(left, top, right, bottom, round(score, 6), label))
    return boxes
