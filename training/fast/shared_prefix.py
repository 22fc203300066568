"""Prompt, pictures and begun answer through the decoder once, with both answers behind them.

TRL's fused loss calls the inner model with rows [chosen; rejected]. Hooks on that inner model turn
the 2B rows of an announced batch into B packed ones (:mod:`training.fast.pairs`), hand the text
decoder a mask that keeps the answers apart, and give the states back as 2B rows, so the loss sees
what it always sees. With a prefix of 600 to 3,000 tokens and answers of 30, which is what sentence
preference data is, that is nearly half of the decoder's work.

Exact where a state depends only on tokens before it. That holds for causal decoders, with the
pictures' own attention (PaliGemma, Gemma 3) inside the prefix and with sliding windows, which are
counted in each row's own positions. It is not taken on trust: the first packed pass of each model
is compared with a plain one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.masks.kinds import FULL, kinds, window
from mmlm.engine.removal.columns import typed_mask
from training.errors import FastPathRefused
from training.fast.models import anatomy_of
from training.fast.packable import refuse_dropout, refuse_model, refuse_prompt_learning
from training.fast.pairs import PREFIX, PackedPairs

__all__ = ["SharedPrefix", "install_shared_prefix"]

_NOT_FOR_THE_MODEL = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "ids"})
#: Largest mean difference between packed and plain states, as a share of their size. A wrong mask
#: or wrong positions give far more; sums in another order give 1e-6 in fp32 and 1e-2 in bf16.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_COARSE = 0.05


def install_shared_prefix(
    model: nn.Module, ref_model: nn.Module | None = None, *, check: bool = True
) -> SharedPrefix:
    """Lets a model run announced pairs in packed rows.

        shared = install_shared_prefix(trainer.model)
        shared.expect(inputs)                       # before each loss
        trainer.compute_loss(trainer.model, inputs)

    Args:
        model: The policy, in its PEFT, DDP or DeepSpeed wrapper or not.
        ref_model: A reference model of its own, if there is one.
        check: Whether the first packed pass of each model is compared with a plain one.

    Returns:
        What batches are announced to; ``remove()`` takes the hooks off.

    Raises:
        FastPathRefused: (a ValueError) For attention kernels without arbitrary masks, decoders
            that are not causal or whose layers are of an unknown kind, prompt-learning adapters,
            and methods of mmlm that mix positions.
        UnsupportedModel: If the model's parts cannot be found.
    """
    wrapped = [model] if ref_model is None else [model, ref_model]
    for one in wrapped:
        refuse_prompt_learning(one)
    anatomies = [anatomy_of(one) for one in wrapped]
    for anatomy in anatomies:
        refuse_model(anatomy)
    return SharedPrefix(anatomies, check=check)


@dataclass
class _Batch:
    """An announced batch."""

    inputs: dict[str, Any]
    pairs: PackedPairs
    scored: Tensor  # bool [2B, S]
    per_token: frozenset[str]  # names of inputs [2B, S]
    doubled: frozenset[str]  # names of inputs that hold the pictures twice
    seen: dict[Any, Any] = field(default_factory=dict)  # masks by kind of layer
    positions: tuple[Tensor | None] | None = None  # [..., B, L]; None inside: column numbers


class SharedPrefix:
    """The installed path.

    Attributes:
        passes: How many passes ran packed.
    """

    def __init__(self, anatomies: list[Anatomy], *, check: bool) -> None:
        self.passes = 0
        self.batch: _Batch | None = None
        self._models = [_Packer(self, anatomy, check) for anatomy in anatomies]

    def expect(self, inputs: Mapping[str, Any] | None) -> None:
        """Announces a batch: passes over its ``input_ids`` run packed until the next call.

        Args:
            inputs: A preference collator's batch, on the model's device; None for no batch.

        Raises:
            FastPathRefused: If its rows are no pairs, or a picture belongs to one side only.
        """
        self.batch = None
        if inputs is None:
            return
        given = {n: x for n, x in inputs.items() if n not in _NOT_FOR_THE_MODEL}
        ids, scored = inputs["input_ids"], inputs["completion_mask"]
        pairs = PackedPairs.of(ids, inputs["attention_mask"], scored)
        tensors = {n: x for n, x in given.items() if isinstance(x, Tensor)}
        per_token = {n for n, x in tensors.items() if x.shape[-2:] == ids.shape}
        doubled = tensors.keys() - per_token
        for name in sorted(doubled):
            if not _is_doubled(tensors[name]):
                raise FastPathRefused(
                    f"shared_prefix: {name} {tuple(tensors[name].shape)} does not hold the chosen "
                    "rows' pictures and then the same ones for the rejected rows.",
                    advice="Both sides of a pair must show the same pictures; else switch it off.",
                )
        batch = _Batch(given, pairs, scored.bool(), frozenset(per_token), frozenset(doubled))
        for packer in self._models:
            packer.refuse_pictures(batch)
        self.batch = batch

    def remove(self) -> None:
        """Takes the hooks off."""
        self.batch = None
        for packer in self._models:
            packer.remove()


class _Packer:
    """The hooks on one model.

    Args:
        owner: The path.
        anatomy: The model.
        check: Whether the first packed pass is compared with a plain one.
    """

    def __init__(self, owner: SharedPrefix, anatomy: Anatomy, check: bool) -> None:
        self.owner = owner
        self.anatomy = anatomy
        self.check = check
        self.running: _Batch | None = None
        self.plain: Tensor | None = None  # states that the running pass must agree with
        self.off = False
        composite = anatomy.composite
        self._handles: list[RemovableHandle] = [
            # Before the hooks of built-in methods: they see the packed rows, as the decoder does.
            composite.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            composite.register_forward_hook(self._leave),
            anatomy.text.register_forward_pre_hook(self._decode, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def refuse_pictures(self, batch: _Batch) -> None:
        """Raises if an image token stands behind a prefix."""
        ids = batch.pairs.pack(batch.inputs["input_ids"])
        images = torch.isin(ids, ids.new_tensor(self.anatomy.image_ids))
        if bool((images & (batch.pairs.part > PREFIX)).any()):
            raise FastPathRefused(
                "shared_prefix: an image token stands behind the place where chosen and rejected "
                "part.",
                advice="Pictures belong into the prompt.",
            )

    # ---- the hooks, in the order in which a pass meets them -------------------------------------

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Packs the inputs of the inner model, if they are the announced ones."""
        self.running = None
        batch = self.owner.batch
        if self.off or batch is None or not self._is_announced(batch, kwargs):
            return None
        refuse_model(self.anatomy)
        if module.training:
            refuse_dropout(self.anatomy)
        if self.check:
            self.plain = self._plain_states(module, kwargs, batch.scored)
        packed = dict(kwargs)
        for name, x in kwargs.items():
            if name in batch.per_token:
                packed[name] = batch.pairs.pack(x)
            elif name in batch.doubled:
                packed[name] = x.chunk(2)[0]
        packed["attention_mask"] = batch.pairs.real.to(kwargs["attention_mask"].dtype)
        packed["position_ids"] = self._positions(batch, kwargs)
        self.running = batch
        return args, packed

    def _decode(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Gives the text decoder the mask that keeps the answers apart."""
        if self.running is None:
            return None
        config, given = module.config, kwargs.get("attention_mask")
        full = given.get(FULL) if isinstance(given, dict) else given
        dtype = kwargs["inputs_embeds"].dtype
        masks = {k: _mask(self.running, k, config, full, dtype) for k in kinds(config)}
        ready = masks if len(masks) > 1 else next(iter(masks.values()))
        return args, {**kwargs, "attention_mask": ready}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Gives the states back as the rows that came in."""
        batch, self.running = self.running, None
        if batch is None:
            return None
        for name in ("attentions", "router_logits"):
            if getattr(output, name, None) is not None:
                raise FastPathRefused(
                    f"shared_prefix: {name} of packed rows cannot be given back as plain ones.",
                    advice=f"Switch output_{name} off, or this path.",
                )
        states = batch.pairs.unpack(output.last_hidden_state)
        if self.plain is not None:
            self._compare(states[:, :-1][batch.scored[:, 1:]], self.plain)
        output.last_hidden_state = states
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(map(batch.pairs.unpack, output.hidden_states))
        self.owner.passes += 1
        return output

    # ---- parts ---------------------------------------------------------------------------------

    def _is_announced(self, batch: _Batch, kwargs: Mapping[str, Any]) -> bool:
        """Whether a pass has the announced rows and pictures that both sides share."""
        ids, expected = kwargs.get("input_ids"), batch.inputs["input_ids"]
        if ids is None or not (ids is expected or _equal(ids, expected)):
            return False
        # An extra pass of a loss may show other pictures, not the same on both sides.
        pictures = ((x, batch.inputs[n]) for n, x in kwargs.items() if n in batch.doubled)
        return all(x is known or _is_doubled(x) for x, known in pictures)

    def _positions(self, batch: _Batch, kwargs: Mapping[str, Any]) -> Tensor:
        """Position ids [..., B, L]: those that the model gives the plain rows."""
        if kwargs.get("position_ids") is not None:
            return batch.pairs.pack(kwargs["position_ids"])
        if batch.positions is None:
            batch.positions = (self._own_positions(kwargs),)
        own = batch.positions[0]
        if own is not None:
            return batch.pairs.pack(own)
        return batch.pairs.col + self.anatomy.family.first_position

    def _own_positions(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """What families with positions in three dimensions make of the plain rows."""
        compute = getattr(self.anatomy.composite, "compute_3d_position_ids", None)
        if compute is None:
            return None
        names = inspect.signature(compute).parameters
        return compute(**{name: kwargs.get(name) for name in names})

    def _plain_states(self, module: nn.Module, kwargs: dict[str, Any], scored: Tensor) -> Tensor:
        """States of the plain rows that predict scored tokens."""
        self.off = True
        try:
            with torch.no_grad(), _in_eval_mode(module):
                output = module(**kwargs)
        finally:
            self.off = False
        return output.last_hidden_state[:, :-1][scored[:, 1:]]

    def _compare(self, packed: Tensor, plain: Tensor) -> None:
        """Raises if the first packed pass does not agree with the plain one."""
        self.check, self.plain = False, None
        packed = packed.detach()
        limit = _TOLERANCE.get(packed.dtype, _COARSE)
        if torch.is_autocast_enabled(packed.device.type):
            limit = _COARSE
        size = plain.float().norm(dim=-1).clamp(min=1e-12)
        found = float(((packed - plain).float().norm(dim=-1) / size).mean())
        if not found <= limit:
            raise FastPathRefused(
                f"shared_prefix: {type(self.anatomy.model).__name__} gives other states in packed "
                f"rows than in plain ones (mean relative difference {found:.2g}, at most {limit:g} "
                "is allowed): its positions see more than what stands before them.",
                advice="Switch shared_prefix off for this model.",
            )


def _mask(batch: _Batch, kind: str, config: Any, given: Any, dtype: torch.dtype) -> Any:
    """The mask of one kind of layer, as its attention kernel takes it."""
    bound = window(config, kind)
    implementation = config._attn_implementation or "eager"
    opened = None
    if isinstance(given, Tensor) and given.ndim == 4:  # made by the family's inner model
        opened = (given if given.dtype == torch.bool else given >= 0)[:, 0]
    if implementation == "flex_attention":
        from training.fast.flex import block_mask

        if opened is not None or not (given is None or isinstance(given, Tensor)):
            raise FastPathRefused(
                "shared_prefix: flex_attention takes no mask that the inner model has made.",
                advice="Set sdpa: model.set_attn_implementation('sdpa').",
            )
        return batch.seen.setdefault((kind, "flex"), block_mask(batch.pairs, bound))
    if opened is not None:
        return typed_mask(batch.pairs.seen(bound, opened)[:, None], implementation, dtype)
    if kind not in batch.seen:  # policy and reference share it
        batch.seen[kind] = batch.pairs.seen(bound)[:, None]
    return typed_mask(batch.seen[kind], implementation, dtype)


def _is_doubled(x: Tensor) -> bool:
    return x.ndim > 0 and x.shape[0] % 2 == 0 and torch.equal(*x.chunk(2))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """No gradient checkpointing and no dropout inside; every module's own mode afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training
