"""Every method as the papers' repositories run it, to compare speed with. Not for use.

What they have in common: an auxiliary prompt is a second ``model(...)`` call after the first one,
with its own cache and its own run of the vision tower; attention is forked, eager, and builds the
whole matrix of every head and layer to change some of its rows; hidden states are collected for all
positions. The maths is the method's own, so the same tokens must come out (a test checks it);
batch rows must have equal lengths, as none of the repositories pads.

Every function takes the method, a task, a number of tokens and a function that it calls after each
token, and returns greedy tokens [B, n].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

if TYPE_CHECKING:
    from benchmarks.speed_model import Task

__all__ = ["NAIVE", "Naive"]

#: A method's naive run: (method, task, tokens, tick) -> tokens [B, n].
Naive = Callable[[Any, "Task", int, Callable[[], None]], Tensor]
Inputs = dict[str, Any]


# ---- the loop -----------------------------------------------------------------------------------


def _loop(
    model: Any,
    prompts: Sequence[Inputs],
    choose: Callable[[int, list[Any]], Tensor],
    tokens: int,
    tick: Callable[[], None],
    **options: Any,
) -> Tensor:
    """One pass per prompt and token, one after the other, each with its own cache."""
    branches = [dict(prompt) for prompt in prompts]
    chosen = []
    with torch.no_grad():
        for step in range(tokens):
            outputs = []
            for branch in branches:
                output = model(**branch, use_cache=True, **options)
                branch["past_key_values"] = output.past_key_values
                outputs.append(output)
            token = choose(step, outputs).argmax(-1, keepdim=True)
            chosen.append(token)
            tick()
            for branch in branches:
                branch.pop("pixel_values", None)
                mask = branch["attention_mask"]
                branch["attention_mask"] = torch.cat([mask, torch.ones_like(token)], dim=1)
                branch["input_ids"] = token
    return torch.cat(chosen, dim=1)


def _last(output: Any) -> Tensor:
    return output.logits[:, -1].float()  # logits of all positions were computed, as there


def _cut(edited: Tensor, z: Tensor, beta: float) -> Tensor:
    """Removes tokens below ``beta`` times the largest probability."""
    if beta == 0:
        return edited
    return edited.masked_fill(z < z.amax(-1, keepdim=True) + math.log(beta), -math.inf)


def _without_image(task: Task) -> Inputs:
    """The prompt with its image tokens deleted."""
    ids = task.inputs["input_ids"]
    kept = ids[ids != task.model.config.image_token_id].view(ids.shape[0], -1)
    return {"input_ids": kept, "attention_mask": torch.ones_like(kept)}


# ---- forked attention ---------------------------------------------------------------------------


class Fork:
    """What a repository's copy of the attention module does differently."""

    def layer_in(self, layer: int, x: Tensor) -> None:
        """Sees the hidden states [B, L, D] that enter a layer."""

    def scores(self, layer: int, s: Tensor) -> Tensor:
        """Scores [B, H, L, K] before the softmax."""
        return s

    def weights(self, layer: int, a: Tensor) -> Tensor:
        """Weights [B, H, L, K]."""
        return a

    def heads(self, layer: int, y: Tensor) -> Tensor:
        """Head outputs [B, L, H, d]."""
        return y


def _forked_forward(
    fork: Fork,
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    layer, shape = module.layer_idx, (*hidden_states.shape[:-1], -1, module.head_dim)
    query = module.q_proj(hidden_states).view(shape).transpose(1, 2)
    key = module.k_proj(hidden_states).view(shape).transpose(1, 2)
    value = module.v_proj(hidden_states).view(shape).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, layer)
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    s = query @ key.transpose(2, 3) * module.scaling
    if attention_mask is not None:
        s = s + attention_mask[..., : key.shape[2]]
    a = fork.scores(layer, s).softmax(-1, dtype=torch.float32).to(query.dtype)
    a = fork.weights(layer, a)
    y = fork.heads(layer, (a @ value).transpose(1, 2))
    return module.o_proj(y.reshape(*hidden_states.shape[:-1], -1).contiguous()), a


@contextmanager
def _forked(model: Any, fork: Fork) -> Iterator[None]:
    """The decoder with forked, eager attention in all layers."""
    decoder = model.model.language_model
    kept = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    hooks = []
    for i, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        attention.forward = functools.partial(_forked_forward, fork, attention)

        def see(module: Any, args: tuple[Any, ...], i: int = i) -> None:
            fork.layer_in(i, args[0])

        hooks.append(layer.register_forward_pre_hook(see))
    try:
        yield
    finally:
        decoder.config._attn_implementation = kept
        for hook in hooks:
            hook.remove()
        for layer in decoder.layers:
            del layer.self_attn.forward


def _run_forked(
    fork: Fork, task: Task, tokens: int, tick: Callable[[], None], **options: Any
) -> Tensor:
    with _forked(task.model, fork):
        return _loop(
            task.model,
            [task.inputs],
            lambda step, outputs: _last(outputs[0]),
            tokens,
            tick,
            output_attentions=True,
            **options,
        )


def _image(task: Task) -> Tensor:
    """Bool [B, N]: the image's positions."""
    return task.inputs["input_ids"] == task.model.config.image_token_id


# ---- logits: one pass after the other -----------------------------------------------------------


def naive_vcd(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """A second pass with a noised image."""
    from mmlm.engine.anatomy import Anatomy

    pixels = task.inputs["pixel_values"]
    noised = method.noised.repaint(Anatomy(task.model), pixels, None)

    def choose(step: int, outputs: list[Any]) -> Tensor:
        z, noise = (_last(output) for output in outputs)
        return _cut((1 + method.alpha) * z - method.alpha * noise, z, method.beta)

    prompts = [task.inputs, {**task.inputs, "pixel_values": noised}]
    return _loop(task.model, prompts, choose, tokens, tick)


# ---- heads --------------------------------------------------------------------------------------


class _Heads(Fork):
    """VHR: head outputs of the pass without the image, then gains in the one with it."""

    def __init__(self, method: Any, layers: Sequence[int]) -> None:
        self.method, self.layers = method, layers
        self.without: dict[int, Tensor] = {}
        self.gain: dict[int, Tensor] = {}
        self.measuring = True

    def heads(self, layer: int, y: Tensor) -> Tensor:
        if layer not in self.layers:
            return y
        if self.measuring:
            self.without[layer] = y[:, -1].float()
            return y
        if layer not in self.gain:
            from decoding.vhr import divergence, drop_negative_outliers, select_heads

            without = self.without[layer]
            vhd = divergence(y[:, -1].float(), without)
            if self.method.outliers:
                energy = without.square().sum(-1)
                vhd = drop_negative_outliers(vhd, energy, unbiased=self.method.unbiased)
            gain = torch.where(select_heads(vhd), self.method.alpha, 1.0)
            self.gain[layer] = gain[:, None, :, None].to(y.dtype)
        return y * self.gain[layer]


def naive_vhr(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """A whole pass without the image first, then decoding with forked attention."""
    fork = _Heads(method, method.chosen_layers(task.model.config.text_config.num_hidden_layers))
    with _forked(task.model, fork), torch.no_grad():
        task.model(**_without_image(task), output_attentions=True)
    fork.measuring = False
    return _run_forked(fork, task, tokens, tick)


NAIVE: dict[str, Naive] = {
    "VCD": naive_vcd,
    "VHR": naive_vhr,
}
