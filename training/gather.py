"""Whole tensors of a model whose parameters may be divided among processes (ZeRO-3).

Every process must walk through the same tensors, because each gathering is a meeting of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.launch import world

__all__ = [
    "all_gathered",
    "gathered_state",
    "is_main",
    "on_main",
    "process_count",
    "wait_for_all",
    "whole_tensors",
    "without_zero3",
]


def process_count() -> int:
    """How many processes train together.

    Raises:
        RuntimeError: a launcher has started several, but they have not met yet.
    """
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    if world() > 1:
        raise RuntimeError(
            f"{world()} processes were started, but there is no process group yet: build the "
            "TrainingArguments first, or call training.launch.start_deepspeed"
        )
    return 1


def is_main() -> bool:
    """Whether this is the first of all processes (or the only one)."""
    return process_count() == 1 or torch.distributed.get_rank() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if process_count() > 1:
        torch.distributed.barrier()


def on_main(work: Callable[[], Any]) -> Any:
    """Lets the first process work while the others wait, and gives all of them its result.

    Args:
        work: called on the first process only; its result must be picklable.

    Returns:
        What ``work`` returned, on every process.

    Raises:
        Exception: what ``work`` raised, on every process: none is left waiting.
    """
    if process_count() == 1:
        return work()
    result: list[Any] = [None, None]
    if is_main():
        try:
            result[0] = work()
        except Exception as error:  # every process must hear of it
            result[1] = error
    torch.distributed.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


@contextmanager
def without_zero3() -> Iterator[None]:
    """Models made inside belong to this process alone.

    While a ZeRO-3 configuration is alive, transformers divides every model that it loads among all
    processes, and waits for them.
    """
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def all_gathered(value: Any) -> list[Any]:
    """What every process has given, in the order of their ranks; a meeting of all."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    torch.distributed.all_gather_object(values, value)
    return values


def whole_tensors(
    model: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor, int | None]]:
    """The tensors of a model's state dictionary, each whole while it is the current one.

    Args:
        model: not wrapped by DeepSpeed or DDP.
        wanted: which names; the same ones on every process.

    Yields:
        Name, tensor, and DeepSpeed's number of the parameter if it is a divided one, else None. A
        divided one goes back to its owners when the next is asked for, so copy what must last.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not wanted(name):
            continue
        if hasattr(tensor, "ds_id"):  # DeepSpeed marks the parameters that it has divided
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                yield name, tensor.detach(), tensor.ds_id
        else:
            yield name, tensor.detach(), None


def gathered_state(
    model: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The state dictionary with whole tensors.

    Args:
        model: not wrapped by DeepSpeed or DDP.
        wanted: which names.

    Returns:
        On the first process all wanted tensors, those that were divided as copies on the CPU,
        the others as they are; on the others nothing, for want of memory. Names that share one
        parameter share one tensor.
    """
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor, number in whole_tensors(model, wanted):
        if not is_main():
            continue
        if number is not None:
            if number not in copies:
                copies[number] = tensor.cpu().clone()
            tensor = copies[number]
        state[name] = tensor
    return state
