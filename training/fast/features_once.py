"""Each picture through vision tower and projector once per batch, if both are frozen.

TRL's batches hold every picture twice, for the chosen and for the rejected rows, and run them for
the policy and again for the reference: four tower passes. Frozen weights give the same features
each time, so one pass without gradient is enough, and the features are handed out again.

The one door to the features is the inner model's ``get_image_features``, which every family's
forward calls. What stands in for it here leaves signatures, position ids and the merging of
features to the model itself, and works for any batch: pictures that are not doubled, or new, are
simply encoded. Nothing is kept for longer than one batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.engine.anatomy import Anatomy
from mmlm.errors import UnsupportedModel
from training.errors import FastPathRefused
from training.fast.models import anatomy_of, refuse_sites, vision_parameters

__all__ = ["FeaturesOnce", "install_features_once"]

_NAME = "get_image_features"
_SITES = frozenset({"vision_layer", "patches", "pool", "visual_tokens", "tokens"})
#: Of what the encoder returns, the entries that inner models merge.
_FEATURES = ("pooler_output", "deepstack_features")


def install_features_once(model: nn.Module, ref_model: nn.Module | None = None) -> FeaturesOnce:
    """Lets a model encode each picture of a batch once.

    Args:
        model: The policy, in its PEFT, DDP or DeepSpeed wrapper or not.
        ref_model: A reference model of its own, if there is one. It takes the policy's features if
            its tower and projector hold equal weights; else it encodes each picture once itself.

    Returns:
        ``handle.remove()`` gives both models their own functions back.

    Raises:
        FastPathRefused: (a ValueError) If tower or projector have trainable parameters or adapters,
            or a method of mmlm follows the pictures through the tower.
        UnsupportedModel: If the model's parts cannot be found.
    """
    anatomy = anatomy_of(model)
    doors = [_Door(anatomy, _Store(), trained=True)]
    if ref_model is not None:
        reference = anatomy_of(ref_model)
        store = doors[0].store if _equal_vision(anatomy, reference) else _Store()
        doors.append(_Door(reference, store, trained=False))
    for door in doors:
        door.refuse()
    return FeaturesOnce(doors)


class FeaturesOnce:
    """The installed path.

    Args:
        doors: What stands in for ``get_image_features`` of each model.
    """

    def __init__(self, doors: list[_Door]) -> None:
        self._doors = doors
        for door in doors:
            setattr(door.anatomy.composite, _NAME, door)

    def expect(self, inputs: Mapping[str, Any] | None) -> None:
        """Announces a batch, or with None that it is over: its features are let go of.

        Args:
            inputs: Not needed here, since pictures are known by their pixels.
        """
        if inputs is None:
            for door in self._doors:
                door.store.held = None

    def remove(self) -> None:
        """Takes the path off; the models are what they were."""
        for door in self._doors:
            vars(door.anatomy.composite).pop(_NAME, None)
            door.store.held = None


@dataclass
class _Held:
    """The features of one batch, and what they were made of."""

    tensors: dict[str, Tensor]
    versions: dict[str, int]
    rest: tuple[Any, ...]
    output: Any


class _Store:
    """The last batch's features."""

    def __init__(self) -> None:
        self.held: _Held | None = None

    def find(self, tensors: Mapping[str, Tensor], rest: tuple[Any, ...]) -> Any:
        """The features of these very pictures, or None."""
        held = self.held
        if held is None or held.rest != rest or held.tensors.keys() != tensors.keys():
            return None
        for name, tensor in tensors.items():
            kept = held.tensors[name]
            # A buffer that was written to since no longer shows what was encoded.
            if kept._version != held.versions[name] or not _equal(kept, tensor):
                return None
        return held.output

    def keep(self, tensors: dict[str, Tensor], rest: tuple[Any, ...], output: Any) -> None:
        """Remembers them in place of the batch before."""
        versions = {name: tensor._version for name, tensor in tensors.items()}
        self.held = _Held(tensors, versions, rest, output)


class _Door:
    """A model's ``get_image_features`` while the path is on.

    An object, and not a closure, so that a deep copy of the model gets a copy that encodes with the
    copied tower.
    """

    def __init__(self, anatomy: Anatomy, store: _Store, *, trained: bool) -> None:
        self.anatomy = anatomy
        self.store = store
        self._trained = trained
        self._original: Any = getattr(anatomy.composite, _NAME, None)
        if self._original is None:
            raise UnsupportedModel(
                f"{type(anatomy.composite).__name__} has no {_NAME}, through which inner models of "
                "transformers encode pictures.",
                advice="Switch features_once off.",
            )
        self.__signature__ = inspect.signature(self._original)

    def refuse(self) -> None:
        """Raises if features may differ from pass to pass."""
        refuse_sites(
            self.anatomy, "features_once", _SITES, "which must see every pass through the tower"
        )
        if self._trained:
            _refuse_trained(self.anatomy)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.__signature__.bind(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        asked = given.get("output_attentions") or given.get("output_hidden_states")
        # Inference tensors may not enter a graph later, so those passes leave nothing behind.
        if asked or given.get("return_dict") is False or torch.is_inference_mode_enabled():
            return self._original(*args, **kwargs)
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        others = {n: x for n, x in given.items() if n not in tensors and x is not None}
        doubled = _per_picture(others) and _is_doubled(tensors)
        if doubled:
            tensors = {name: x.chunk(2)[0] for name, x in tensors.items()}
        rest = (repr(sorted(others.items())), *_autocast(tensors))
        output = self.store.find(tensors, rest)
        if output is None:
            self.refuse()  # adapters may have come since
            with torch.no_grad():
                output = _features(self._original(**tensors, **others))
            self.store.keep(tensors, rest, output)
        return _twice(output) if doubled else output


def _refuse_trained(anatomy: Anatomy) -> None:
    """Raises if anything but the text decoder is trained or adapted."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained = [name for name, p in vision_parameters(anatomy).items() if p.requires_grad]
    if not trained:
        text = set(map(id, anatomy.text.modules()))
        modules = anatomy.composite.named_modules()
        trained = [n for n, m in modules if isinstance(m, BaseTunerLayer) and id(m) not in text]
    if trained:
        some = ", ".join(trained[:3]) + (", ..." if len(trained) > 3 else "")
        raise FastPathRefused(
            "features_once: vision tower and projector must be frozen, but "
            f"{len(trained)} of their parts are trained or adapted: {some}.",
            advice="Freeze them (LoRA on the language model only), or switch features_once off.",
        )


def _equal_vision(one: Anatomy, other: Anatomy) -> bool:
    """Whether two models' towers and projectors hold the same weights."""
    a, b = vision_parameters(one), vision_parameters(other)
    # ZeRO-3 leaves empty tensors, about which nothing is known.
    known = all(p.numel() for p in (*a.values(), *b.values()))
    return known and a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    )


def _per_picture(others: Mapping[str, Any]) -> bool:
    """Whether all that is known per picture comes in tensors, which can be halved."""
    return all(
        isinstance(x, bool | int | float | str) or name == "vision_feature_layer"
        for name, x in others.items()
    )


def _is_doubled(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the second half of every tensor repeats the first."""
    return bool(tensors) and all(
        x.ndim and x.shape[0] % 2 == 0 and torch.equal(*x.chunk(2)) for x in tensors.values()
    )


def _autocast(tensors: Mapping[str, Tensor]) -> tuple[bool, torch.dtype | None]:
    """Precision in which the tower would run now."""
    kind = next(iter(tensors.values())).device.type if tensors else "cpu"
    on = torch.is_autocast_enabled(kind)
    return on, torch.get_autocast_dtype(kind) if on else None


def _features(output: Any) -> Any:
    """An encoder's output with nothing but what is merged."""
    if getattr(output, "pooler_output", None) is None:
        raise UnsupportedModel(
            f"{_NAME} returned a {type(output).__name__} without pooler_output.",
            advice="Switch features_once off.",
        )
    return type(output)(**{name: output[name] for name in _FEATURES if name in output})


def _twice(output: Any) -> Any:
    """The features of pictures that come twice: first all of them, then all of them again."""
    new = {"pooler_output": _both(output.pooler_output)}
    if "deepstack_features" in output:
        new["deepstack_features"] = [_both(layer) for layer in output.deepstack_features]
    return type(output)(**new)


def _both(features: Any) -> Any:
    if isinstance(features, Tensor):
        return torch.cat([features, features])
    return [*features, *features]
