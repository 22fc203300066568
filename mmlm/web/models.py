"""The models that a playground offers: loaded once, lent as twins that share the weights.

Methods are hooks on one model object, so one object answers one question at a time. A **twin** is
a second set of modules around the same tensors: milliseconds and no memory, and hooks of its own.
The columns of a comparison, and several users, run at the same time on a twin each.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mmlm.cli.frame import Terminal
from mmlm.cli.options import ModelOptions, check_model_name, open_model
from mmlm.errors import InputError

if TYPE_CHECKING:
    import gradio as gr

    from data_tools.detectors import Detector

__all__ = ["Limits", "Loan", "Models", "Session", "twin"]


class Loan(NamedTuple):
    """A model that nobody else uses meanwhile, with a processor of its own."""

    model: Any
    processor: Any


@dataclass
class _Loaded:
    """A model that is in memory, and the twins of it that are idle."""

    original: Loan
    idle: list[Loan] = field(default_factory=list)


class Models:
    """What is loaded, by name; safe to use from many threads.

    Args:
        names: What users may choose: ids, folders, or ``embedded``. Nothing else is ever loaded.
        options: How each of them is loaded; its ``id`` is not used.

    Attributes:
        names: As given, each once.
        dice: Held by whoever draws random numbers. torch has one generator for all threads, so
            two sampled answers at a time would not be repeatable. Greedy answers need no lock,
            but a run over many pictures (which seeds per batch) takes it for each batch.

    Raises:
        InputError: If a name cannot be a model.
    """

    def __init__(self, names: Sequence[str], options: ModelOptions) -> None:
        self.names = tuple(dict.fromkeys(names))
        for name in self.names:
            check_model_name(name)
        self.dice = threading.RLock()
        self._options = options
        self._loaded: dict[str, _Loaded] = {}
        self._loading = {name: threading.Lock() for name in self.names}
        self._lending = threading.Lock()

    def open(self, name: str) -> Loan:
        """The model itself, loaded at the first call; for looking only: run a twin.

        Raises:
            InputError: If the name was not offered, or the model cannot be loaded.
        """
        return self._open(name).original

    @contextmanager
    def borrow(self, name: str) -> Iterator[Loan]:
        """Lends a twin for the length of the block; others get other twins.

        Args:
            name: One of `names`.

        Raises:
            InputError: If the name was not offered, or the model cannot be loaded.
        """
        loaded = self._open(name)
        with self._lending:
            # Copied under the lock: a model with built-in methods is without them for that moment.
            loan = loaded.idle.pop() if loaded.idle else twin(*loaded.original)
        try:
            yield loan
        finally:
            with self._lending:
                loaded.idle.append(loan)

    def _open(self, name: str) -> _Loaded:
        if name not in self._loading:
            raise InputError(
                f"The model {name!r} is not offered here.",
                advice=f"Choose: {', '.join(self.names)}. More: mmlm web --model ID --also ID",
            )
        with self._loading[name]:
            if name not in self._loaded:
                options = replace(self._options, id=name)
                loan = Loan(*open_model(options, (), Terminal(quiet=True)))
                self._loaded[name] = _Loaded(loan)
            return self._loaded[name]


def twin(model: Any, processor: Any) -> Loan:
    """A second set of modules around the same tensors, and a copy of the processor.

    Args:
        model: A Hugging Face model without attached methods; built-in ones are built in again.
        processor: Copied, because a tokenizer cannot be set up by two threads at a time.
    """
    from mmlm.engine.branches.template import remember_processor

    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    loan = Loan(copy.deepcopy(model, shared), copy.deepcopy(processor))
    remember_processor(*loan)
    return loan


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for.

    Attributes:
        upload_bytes: Largest file that is taken.
        pixels: Largest picture (width x height) that is decoded.
        new_tokens: Most new tokens of an answer.
        waiting: Most requests that wait; further ones are told to come again.
    """

    upload_bytes: int = 10 * 2**20
    pixels: int = 24_000_000
    new_tokens: int = 512
    waiting: int = 32


@dataclass(frozen=True)
class Session:
    """What the tabs of one page share; handed to each tab's ``build``.

    Attributes:
        models: The models; run one with ``with session.models.borrow(name) as (model, processor)``.
        limits: What one visitor may ask for.
        model: The component with the name of the chosen model, for ``inputs=``.
        methods: The components with the methods of each column as text ("VHR(alpha=2.0)", several
            joined by " + ", empty for a column that is not used), for ``inputs=``. Read them with
            `mmlm.web.method_forms.read_methods`.
        detector: Says what is in an uploaded picture; None if the playground has none.
        start: The methods that each column starts with, as text.
    """

    models: Models
    limits: Limits
    model: gr.Dropdown
    methods: tuple[gr.Textbox, ...] = ()
    detector: Detector | None = None
    start: tuple[str, ...] = ("VHR(alpha=2.0)",)
