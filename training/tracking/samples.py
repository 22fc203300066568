"""What the model says about held-out pictures while it is trained.

A round of samples leaves no trace in the training: random numbers, training mode and activation
checkpointing are afterwards what they were, so a run with samples makes the very steps of one
without.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from mmlm.decoding_settings import GenerateSettings

if TYPE_CHECKING:
    from mmlm.runner import Request, Result

__all__ = ["HeldOut", "answers", "kept_random_numbers", "resting"]


class HeldOut(Protocol):
    """Pictures that no training sees, a question about each, and a score of the answers.

    Any class with these two methods will do; it need not know this one.
    """

    def requests(self) -> Sequence[Any]:
        """The questions: a list of `mmlm.runner.Request`, the same at every call.

        Called on every process, on the first one of each machine before the others, so files may
        be made here.
        """

    def score(self, texts: Mapping[str, str]) -> dict[str, float]:
        """Numbers to log, by name, such as `chair_i`.

        Args:
            texts: answers by the ids of the requests; those that could not be answered are left
                out.
        """


def answers(
    trainer: Any, requests: Sequence[Request], settings: GenerateSettings, *, gather: bool
) -> list[Result]:
    """Asks the model in training; every process must call it, and each gets all answers.

    The processes share the requests. Under ZeRO-3 each of them answers all: they hold the weights
    together and must go in step.

    Args:
        trainer: transformers' Trainer, inside or outside of its loop.
        requests: what is asked.
        settings: how to generate.
        gather: see `training.tracking.Tracking.gather_for_samples`.

    Returns:
        One result per request, in order.
    """
    from trl.models.utils import unwrap_model_for_generation

    from mmlm.runner import generate_all
    from training.gather import all_gathered

    accelerator = trainer.accelerator
    plugin = accelerator.state.deepspeed_plugin
    zero3 = plugin is not None and plugin.zero_stage == 3
    rank, count = accelerator.process_index, accelerator.num_processes
    mine = list(requests) if zero3 else list(requests)[rank::count]
    with (
        resting(trainer.model),
        unwrap_model_for_generation(
            trainer.model_wrapped,
            accelerator,
            gather_deepspeed3_params=gather,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model,
        accelerator.autocast(),
    ):
        found = list(generate_all(model, trainer.processing_class, mine, settings=settings))
    if not zero3:
        found = [result for share in all_gathered(found) for result in share]
    place = {request.id: number for number, request in enumerate(requests)}
    return sorted(found, key=lambda result: place[result.id])


@contextmanager
def resting(model: Any) -> Iterator[None]:
    """Evaluation mode and random numbers of its own; afterwards everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    with kept_random_numbers():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def kept_random_numbers() -> Iterator[None]:
    """Restores the generators of Python, numpy and torch, also that of this process's GPU."""
    import numpy as np
    import torch

    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if cuda else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device is not None:
            torch.cuda.set_rng_state(device)
