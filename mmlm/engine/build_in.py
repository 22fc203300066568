"""build_in(): makes methods a lasting part of a model, weights included.

The same hooks as :func:`mmlm.engine.attach.attach`, but for good. Weights of the methods become
parameters of the model under ``mmlm_methods`` and so are trained, moved and stored with it;
:func:`mmlm.model.checkpoint.save` writes them beside a checkpoint that plain transformers reads.
Temporary methods may be attached on top: for that time one session holds both.

Copies and pickles of the model carry their methods along. A hook drives one session of one model,
so they are taken off for the length of the copy and put on both.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from mmlm.engine.anatomy import Anatomy, unwrap
from mmlm.engine.attach import BUILT, MARK, install, refuse
from mmlm.engine.branches.template import known_processor
from mmlm.engine.method import MODULES, Method
from mmlm.engine.session import Session
from mmlm.engine.weights import make, without_file
from mmlm.errors import IncompatibleMethods

__all__ = ["Built", "build_in", "built_in", "take_out"]

#: Sites that act on what a training loss may never see: it calls the inner model.
_OUTSIDE = {
    "logits": "edits logits after the head, which the fused losses of trainers bypass",
    "search": "is a way of generating, not a part of the model",
}


def build_in(model: nn.Module, *methods: Method, processor: Any = None) -> nn.Module:
    """Builds methods into a model for good.

        build_in(model, DyVTE(...))
        model.generate(**inputs)          # with it
        with attach(model, VAR(...)):     # both
            model.generate(**inputs)

    Args:
        model: As for :func:`mmlm.attach`.
        *methods: In the order in which order-dependent edits are applied. Their weights, if they
            have any, are made now, on the model's device and in its precision, or read from the
            files that the methods name; from then on the model holds them and names no file.
        processor: As for :func:`mmlm.attach`.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no method.
        IncompatibleMethods: If methods are attached or built in already, two of these exclude each
            other, or one acts outside what a training loss sees.
        InputError, MissingTensors: If the file of a method's weights is unreadable or does not fit.
        UnsupportedModel: If the model lacks what a method needs.
    """
    if not methods:
        raise ValueError("build_in needs at least one method, got none.")
    inner: Any = unwrap(model)
    if hasattr(inner, MARK):
        held = ", ".join(m.label for m in getattr(inner, MARK).methods)
        raise IncompatibleMethods(
            f"{held} is already part of this model, so "
            f"{', '.join(m.label for m in methods)} cannot be built in.",
            advice="Build all methods in with one call, outside of any attach() block.",
        )
    for method in methods:
        for site, why in _OUTSIDE.items():
            if site in method.sites:
                raise IncompatibleMethods(
                    f"{method.label} cannot be built in: its site {site!r} {why}.",
                    advice="Attach it: with attach(model, ...).",
                )
    anatomy = Anatomy(inner)
    refuse(anatomy, methods, built=methods)
    modules = make(anatomy, methods)
    if modules:
        setattr(inner, MODULES, nn.ModuleDict(modules))
    Built(inner, tuple(map(without_file, methods)), processor).resume()
    return model


def built_in(model: nn.Module) -> tuple[Method, ...]:
    """The methods that are built into a model, none of a plain one."""
    built: Built | None = getattr(unwrap(model), BUILT, None)
    return () if built is None else built.methods


def take_out(model: nn.Module) -> nn.Module:
    """Removes all built-in methods and their weights; the model is a plain one again."""
    inner: Any = unwrap(model)
    built: Built | None = getattr(inner, BUILT, None)
    if built is not None:
        if not built.running:
            raise IncompatibleMethods(
                "Other methods are attached on top of the built-in ones.",
                advice="Take them out after the attach() block.",
            )
        built.pause()
        delattr(inner, BUILT)
        if hasattr(inner, MODULES):
            delattr(inner, MODULES)
    return model


class Built:
    """The methods of one model, and their hooks while these are on.

    Args:
        model: Out of its PEFT wrapper.
        methods: In order.
        processor: The model's processor, if it is known.
    """

    def __init__(self, model: Any, methods: tuple[Method, ...], processor: Any) -> None:
        self.model = model
        self.methods = methods
        self.processor = processor
        self._stack: ExitStack | None = None

    @property
    def running(self) -> bool:
        """Whether the hooks are on."""
        return self._stack is not None

    def resume(self) -> None:
        """Puts the hooks on."""
        model = self.model
        processor = self.processor if self.processor is not None else known_processor(model)
        session = Session(Anatomy(model), self.methods, None, processor)
        session.lasting = self.methods
        setattr(model, BUILT, self)
        self._stack = stack = ExitStack()
        # Looked up on the object by copy and by pickle.
        for name, function in (("__deepcopy__", _copied), ("__reduce_ex__", _reduced)):
            setattr(model, name, partial(function, self))
            stack.callback(delattr, model, name)
        install(session, stack)

    def pause(self) -> None:
        """Takes the hooks off; the weights stay."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model is a plain one inside, apart from its weights."""
        self.pause()
        delattr(self.model, BUILT)
        try:
            yield
        finally:
            self.resume()


def _copied(built: Built, memo: dict[int, Any]) -> Any:
    """A copy of the model with the same methods built in."""
    with built.off():
        twin = copy.deepcopy(built.model, memo)
    Built(twin, built.methods, built.processor).resume()
    return twin


def _reduced(built: Built, protocol: int) -> tuple[Any, tuple[Any, ...]]:
    """How the model is pickled: its plain self, and the methods."""
    with built.off():
        data = pickle.dumps(built.model, protocol)
    return _restored, (data, built.methods)


def _restored(data: bytes, methods: tuple[Method, ...]) -> Any:
    model = pickle.loads(data)  # the very bytes that _reduced wrote
    Built(model, methods, None).resume()
    return model
