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

from mmlm.engine.anatomy import Anatomy

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
    noised = method.noised.repaint(Anatomy(task.model), task.inputs["pixel_values"], None)

    def choose(step: int, outputs: list[Any]) -> Tensor:
        z, noise = (_last(output) for output in outputs)
        return _cut((1 + method.alpha) * z - method.alpha * noise, z, method.beta)

    prompts = [task.inputs, {**task.inputs, "pixel_values": noised}]
    return _loop(task.model, prompts, choose, tokens, tick)


def naive_icd(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """A second pass under a disturbing system message."""

    def choose(step: int, outputs: list[Any]) -> Tensor:
        z, disturbed = (_last(output) for output in outputs)
        return _cut((1 + method.alpha) * z - method.alpha * disturbed, z, method.beta)

    prompts = [task.inputs, task.prepare(task.questions, system=method.prefix)]
    return _loop(task.model, prompts, choose, tokens, tick)


def naive_m3id(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """A second pass without the image, weighted by the step."""

    def choose(step: int, outputs: list[Any]) -> Tensor:
        z, blind = (_last(output) for output in outputs)
        keep = math.exp(-method.decay * (step + method.first_step))
        return _cut(z + (1 - keep) / keep * (z - blind), z, method.beta)

    return _loop(task.model, [task.inputs, _without_image(task)], choose, tokens, tick)


def naive_inter(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """Four passes: image and question, question, image, neither."""
    noise = method.without_image.repaint(Anatomy(task.model), task.inputs["pixel_values"], None)
    mute = task.prepare(("",) * len(task.questions))

    def choose(step: int, outputs: list[Any]) -> Tensor:
        full, blind, silent, neither = (_last(output) for output in outputs)
        dividend = full - blind - silent + neither
        key = dividend.var(-1, keepdim=True) >= method.k
        return _cut(full + method.w * torch.where(key, dividend, 0.0), full, method.beta)

    prompts = [task.inputs, {**task.inputs, "pixel_values": noise}]
    prompts += [mute, {**mute, "pixel_values": noise}]
    return _loop(task.model, prompts, choose, tokens, tick)


# ---- attention ----------------------------------------------------------------------------------


class _Boost(Fork):
    """PAI and ImbalancedAttention: larger scores of image keys in the last row."""

    def __init__(self, strength: Tensor, first_layer: int) -> None:
        self.strength = strength  # [B, N], 0 outside the image
        self.first_layer = first_layer

    def scores(self, layer: int, s: Tensor) -> Tensor:
        if layer >= self.first_layer:
            n = self.strength.shape[1]
            last = s[:, :, -1, :n]
            s[:, :, -1, :n] = last + self.strength[:, None] * last.abs()
        return s


def naive_pai(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """Forked attention, and a second pass without the image if there is guidance."""
    boost = _Boost(method.alpha * _image(task), method.first_layer)
    if method.gamma == 1:
        return _run_forked(boost, task, tokens, tick)

    def choose(step: int, outputs: list[Any]) -> Tensor:
        p, blind = (_last(output).log_softmax(-1) for output in outputs)
        return _cut(method.gamma * (p - blind) + blind, p, method.beta)

    prompts = [task.inputs, _without_image(task)]
    boost.strength = boost.strength.to(task.model.dtype)
    with _forked(task.model, _OnlyFirst(boost)):
        return _loop(task.model, prompts, choose, tokens, tick, output_attentions=True)


class _OnlyFirst(Fork):
    """A fork for the first of two passes that alternate; the second one runs as it is."""

    def __init__(self, fork: Fork) -> None:
        self.fork = fork
        self.passes = -1

    def layer_in(self, layer: int, x: Tensor) -> None:
        self.passes += layer == 0

    def scores(self, layer: int, s: Tensor) -> Tensor:
        return s if self.passes % 2 else self.fork.scores(layer, s)


def naive_imbalanced(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """All attention matrices of an eager tower for two rows of them, then forked attention."""
    model, image = task.model, _image(task)
    tower = model.model.vision_tower
    kept = tower.config._attn_implementation
    tower.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            seen = tower(task.inputs["pixel_values"], output_attentions=True).attentions
    finally:
        tower.config._attn_implementation = kept
    early, late = (seen[i].float().sum(1)[:, 0, 1:] for i in (0, model.config.vision_feature_layer))
    strength = torch.zeros_like(early)
    for row in range(len(early)):
        count = early.shape[1]
        low, high = torch.quantile(late[row].double(), late.new_tensor([0.25, 0.75]).double())
        outliers = int((late[row].double() > high + 1.5 * (high - low)).sum())
        local = early[row].topk(int(count * method.local_ratio)).indices
        strength[row, local] = method.alpha
        strength[row, late[row].topk(int(count * (outliers / count))).indices] = method.beta
    placed = torch.zeros(image.shape, dtype=model.dtype, device=model.device)
    placed[image] = strength.flatten().to(model.dtype)
    return _run_forked(_Boost(placed, 2), task, tokens, tick)


class _Redistribute(Fork):
    """VAR: moves attention from sinks to the image in the rows behind it."""

    def __init__(self, method: Any, image: Tensor, n_layers: int) -> None:
        self.method, self.image, self.last = method, image, n_layers - 1
        self.tail = int(image[0].nonzero().max()) + 1
        self.sinks: dict[int, Tensor] = {}

    def layer_in(self, layer: int, x: Tensor) -> None:
        if layer not in self.sinks:
            rms = (x.float().square().mean(-1) + 1e-6).sqrt()
            largest = x.float()[..., list(self.method.sink_dims)].abs().amax(-1)
            self.sinks[layer] = largest / rms > self.method.tau

    def weights(self, layer: int, a: Tensor) -> Tensor:
        stays = layer == self.last and not self.method.include_last_layer
        n = self.image.shape[1]
        sinks, image = self.sinks[layer], self.image
        if layer < 2 or stays or not bool((sinks & image).any()):
            return a
        start = self.tail if a.shape[2] > 1 else 0
        row = a[:, :, start:].float()
        changed = row.clone()
        sink, visual_sink, rest = (
            torch.nn.functional.pad(m, (0, row.shape[-1] - n))[:, None, None]
            for m in (sinks, sinks & image, image & ~sinks)
        )
        on_image = (row * (visual_sink | rest)).sum(-1, keepdim=True)
        share = (row * visual_sink).sum(-1, keepdim=True)
        share = share / (on_image + 1e-6 * image.sum(-1)[:, None, None, None])
        heads = (on_image >= self.method.min_visual_mass) & (
            share <= 1 - self.method.min_nonsink_ratio
        )
        p = self.method.move_fraction
        moved = p * (row * sink).sum(-1, keepdim=True)
        target = (row * rest).sum(-1, keepdim=True)
        changed = torch.where(sink, (1 - p) * row, changed)
        changed = torch.where(rest, row + moved * row / target, changed)
        has_sink = (sinks & image).any(-1)[:, None, None, None]
        new = torch.where(heads & has_sink & (target > 0), changed, row)
        return torch.cat([a[:, :, :start], new.to(a.dtype)], dim=2)


def naive_var(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """Forked attention with all matrices and all hidden states."""
    fork = _Redistribute(method, _image(task), _n_layers(task.model))
    return _run_forked(fork, task, tokens, tick, output_hidden_states=True)


class _Calibrate(Fork):
    """ACT: less attention on sinks of chosen heads, found in the whole matrix of the prompt."""

    def __init__(self, method: Any) -> None:
        self.method, self.chosen = method, dict(method.heads_by_layer)
        self.sinks: dict[int, Tensor] = {}

    def weights(self, layer: int, a: Tensor) -> Tensor:
        heads = self.chosen.get(layer)
        if heads is None:
            return a
        part = a[:, list(heads)].float()
        if layer not in self.sinks:
            n = part.shape[-1]
            mean = part.sum(2) / torch.arange(n, 0, -1, device=a.device)
            sinks = mean > self.method.theta
            sinks[..., 0] = False
            self.sinks[layer] = sinks
        sinks = self.sinks[layer]
        sinks = torch.nn.functional.pad(sinks, (0, part.shape[-1] - sinks.shape[-1]))[:, :, None]
        freed = (1 - self.method.beta) * (part * sinks).sum(-1, keepdim=True)
        others = (part * ~sinks).sum(-1, keepdim=True)
        spread = part + freed * part / others
        new = torch.where(sinks, self.method.beta * part, spread)
        a = a.clone()
        a[:, list(heads)] = torch.where(others > 0, new, part).to(a.dtype)
        return a


def naive_act(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """Forked attention with all matrices."""
    return _run_forked(_Calibrate(method), task, tokens, tick)


class _FirstKey(Fork):
    """ZeroTuning: the first key's weight times gamma in chosen heads, all rows renormalised."""

    def __init__(self, method: Any) -> None:
        self.gamma, self.chosen = method.gamma, dict(method.heads_by_layer)

    def weights(self, layer: int, a: Tensor) -> Tensor:
        heads = self.chosen.get(layer)
        if heads is None:
            return a
        a = a.clone()
        part = a[:, list(heads)].float()
        part[..., 0] *= self.gamma
        a[:, list(heads)] = (part / part.sum(-1, keepdim=True)).to(a.dtype)
        return a


def naive_zerotuning(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """Forked attention with all matrices."""
    return _run_forked(_FirstKey(method), task, tokens, tick)


# ---- heads, hidden states -----------------------------------------------------------------------


def _n_layers(model: Any) -> int:
    return int(model.config.text_config.num_hidden_layers)


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
            without = self.without[layer]
            vhd = (y[:, -1].float() - without).norm(dim=-1)
            energy = without.square().sum(-1)
            for row in range(len(vhd)):
                high = vhd[row] > vhd[row].mean() + vhd[row].std()
                loud = energy[row] > energy[row].mean() + energy[row].std()
                vhd[row, high & loud] = 0
            chosen = vhd > vhd.median(-1, keepdim=True).values
            gain = torch.where(chosen, self.method.alpha, 1.0)
            self.gain[layer] = gain[:, None, :, None].to(y.dtype)
        return y * self.gain[layer]


def naive_vhr(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """A whole pass without the image first, then decoding with forked attention."""
    fork = _Heads(method, method.chosen_layers(_n_layers(task.model)))
    with _forked(task.model, fork), torch.no_grad():
        task.model(**_without_image(task), output_attentions=True)
    fork.measuring = False
    return _run_forked(fork, task, tokens, tick)


def naive_dola(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """The head on every position of every candidate layer."""
    model = task.model
    candidates = method.chosen_layers(Anatomy(model))

    def choose(step: int, outputs: list[Any]) -> Tensor:
        states = outputs[0].hidden_states
        early = [
            model.lm_head(model.model.language_model.norm(states[layer]))[:, -1]
            .float()
            .log_softmax(-1)
            for layer in candidates
        ]
        z = _last(outputs[0]).log_softmax(-1)
        chosen = []
        for row in range(len(z)):
            apart = []
            for q in (layer[row] for layer in early):
                mixture = (0.5 * (z[row].exp() + q.exp())).clamp(min=1e-38).log()
                apart.append(
                    0.5 * (z[row].exp() * (z[row] - mixture)).sum()
                    + 0.5 * (q.exp() * (q - mixture)).sum()
                )
            chosen.append(early[int(torch.stack(apart).argmax())][row])
        return _cut(z - method.strength * torch.stack(chosen), z, method.relative_top)

    return _loop(model, [task.inputs], choose, tokens, tick, output_hidden_states=True)


class _Textual(Fork):
    """ONLY: a second output of layer 0 without outlying weights and without visual heads."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        self.a = torch.empty(0)

    def layer_in(self, layer: int, x: Tensor) -> None:
        self.residual = x  # of the last layer in the end

    def weights(self, layer: int, a: Tensor) -> Tensor:
        if layer == 0:
            self.a = a.float()
        return a


def naive_only(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """All attention matrices and hidden states for one row of one layer."""
    model, image = task.model, _image(task)
    decoder = model.model.language_model
    last, fork = decoder.layers[-1], _Textual(image)

    def choose(step: int, outputs: list[Any]) -> Tensor:
        z = _last(outputs[0])
        a = fork.a[:, :, -1]
        value = outputs[0].past_key_values.layers[0].values
        value = repeat_kv(value, a.shape[1] // value.shape[1])
        visual = torch.nn.functional.pad(image, (0, a.shape[-1] - image.shape[1]))
        text = ~visual
        text[:, 0] = False
        entropies = []
        for columns in (text, visual):
            part = a[columns[:, None].expand_as(a)].view(*a.shape[:2], -1)
            limit = part.mean(-1, keepdim=True) + part.std(-1, keepdim=True)
            a = a.masked_fill((a > limit) & columns[:, None], 0)
            part = part.masked_fill(part > limit, 0)
            p = part / part.sum(-1, keepdim=True)
            entropies.append(-(p * (p + 1e-6).log()).sum(-1))
        ratio = entropies[0] / entropies[1].clamp(min=1e-6)
        a = a * (ratio >= ratio.mean(-1, keepdim=True))[..., None]
        y = (a[:, :, None].to(value.dtype) @ value)[:, :, 0].flatten(1)
        carried = last.input_layernorm(decoder.layers[0].self_attn.o_proj(y))
        x = method.residual_share * fork.residual[:, -1] + carried
        x = x + last.mlp(last.post_attention_layernorm(x))
        textual = model.lm_head(decoder.norm(x)).float()
        d = (z.softmax(-1) - textual.softmax(-1)).abs().sum(-1, keepdim=True)
        apart = (1 + method.contrast) * z - method.contrast * textual
        return _cut(
            torch.where(d < method.gamma, z + method.collaborate * textual, apart), z, method.beta
        )

    options = {"output_attentions": True, "output_hidden_states": True}
    with _forked(model, fork):
        return _loop(model, [task.inputs], choose, tokens, tick, **options)


class _Steered(torch.nn.Module):
    """VISTA's wrapper around an MLP."""

    def __init__(self, mlp: torch.nn.Module, vector: Tensor, strength: float) -> None:
        super().__init__()
        self.mlp, self.vector, self.strength = mlp, vector, strength

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x).float()
        cosine = torch.nn.functional.cosine_similarity(y, -self.vector[:, None], dim=-1)
        unit = torch.nn.functional.normalize(self.vector, dim=-1)[:, None]
        push = self.strength * (1 + cosine.clamp(min=0))[..., None] * unit
        turned = torch.nn.functional.normalize(
            torch.nn.functional.normalize(y, dim=-1) + push, dim=-1
        )
        return (turned * y.norm(dim=-1, keepdim=True)).to(x.dtype)


def naive_vista(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """Two whole passes for the vectors, wrapped MLPs, the head once per late layer."""
    model = task.model
    decoder, late = model.model.language_model, method.chosen_layers(_n_layers(model))
    seen: list[list[Tensor]] = []
    for prompt in (task.inputs, _without_image(task)):
        states: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda m, a, y, to=states: to.append(_state(y)[:, -1]))
            for layer in decoder.layers
        ]
        with torch.no_grad():
            model(**prompt, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        seen.append(states)
    vectors = [(a - b).float() for a, b in zip(*seen, strict=True)]

    def choose(step: int, outputs: list[Any]) -> Tensor:
        z, states = _last(outputs[0]), outputs[0].hidden_states
        exits = [model.lm_head(states[layer + 1])[:, -1].float() for layer in late]
        w = method.late_weight
        return (1 - w) * z + w * torch.stack(exits).mean(0)

    for layer, vector in zip(decoder.layers, vectors, strict=True):
        layer.mlp = _Steered(layer.mlp, vector, method.strength)
    try:
        return _loop(model, [task.inputs], choose, tokens, tick, output_hidden_states=True)
    finally:
        for layer in decoder.layers:
            layer.mlp = layer.mlp.mlp


def _state(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# ---- search -------------------------------------------------------------------------------------


def naive_opera(method: Any, task: Task, tokens: int, tick: Callable[[], None]) -> Tensor:
    """Beam search that looks at its candidates one after the other, all layers eager.

    Rollback is left out, which can only make it faster.
    """
    model, k = task.model, method.num_beams
    inputs = {name: x.repeat_interleave(k, dim=0) for name, x in task.inputs.items()}
    rows, n = inputs["input_ids"].shape
    score = torch.zeros(rows // k, k, device=model.device)
    score[:, 1:] = -1e9  # all beams are equal at first
    with _forked(model, Fork()), torch.no_grad():
        output = model(**inputs, use_cache=True, output_attentions=True)
        z, cache = _last(output), output.past_key_values
        answer = inputs["input_ids"][:, :0]
        own: list[Tensor] = []  # attention of the answer's rows, [rows, columns]
        for step in range(tokens):
            ahead = _one_by_one(method, model, z, cache)
            penalised = z - z.amax(-1, keepdim=True) - 999.0
            chosen = torch.stack(
                [z.gather(1, c)[:, 0] - method.penalty * _penalty(method, task, own, w, n, k)
                 for c, w in ahead], dim=1,
            )  # fmt: skip
            candidates = torch.cat([c for c, _ in ahead], dim=1)
            penalised = penalised.scatter(1, candidates, chosen.log_softmax(-1))
            total = (score.view(-1, 1) + penalised).view(rows // k, -1)
            best = total.topk(k)
            score = best.values
            first = torch.arange(0, rows, k, device=model.device)[:, None]
            parent = (best.indices // z.shape[-1] + first).flatten()
            token = (best.indices % z.shape[-1]).view(-1, 1)
            answer = torch.cat([answer[parent], token], dim=1)
            tick()
            if step + 1 < tokens:
                cache.reorder_cache(parent)
                output = model(
                    input_ids=token, past_key_values=cache, use_cache=True, output_attentions=True
                )
                z = _last(output)
                own = [w[parent] for w in own] + [_strongest(output)]
    return answer[::k]


def _strongest(output: Any) -> Tensor:
    """The last layer's last row: largest over the heads, renormalised, [rows, K]."""
    top = output.attentions[-1][:, :, -1].float().amax(1)
    return top / top.sum(-1, keepdim=True)


def _one_by_one(method: Any, model: Any, z: Tensor, cache: Any) -> list[tuple[Tensor, Tensor]]:
    """(token, attention row) of each candidate, from one pass each over the same cache."""
    found = []
    for candidate in z.topk(method.candidates).indices.split(1, dim=1):
        output = model(
            input_ids=candidate, past_key_values=cache, use_cache=True, output_attentions=True
        )
        cache.crop(-1)
        found.append((candidate, _strongest(output)))
    return found


def _penalty(method: Any, task: Task, own: Sequence[Tensor], row: Tensor, n: int, k: int) -> Tensor:
    """The largest product of a column of the answer's whole attention matrix, [rows]."""
    length = len(own) + 1
    if length <= 10:
        image = _image(task).repeat_interleave(k, dim=0)
        return -(row[:, :n] * image).sum(-1)
    columns = []
    for j in range(length):
        below = [w[:, n + j] for w in [*own, row][j:]]
        columns.append(1e-7 * (method.scale * torch.stack(below).double()).prod(0))
    return torch.stack(columns).amax(0).clamp(max=1e30).float()


NAIVE: dict[str, Naive] = {
    "ACT": naive_act,
    "DoLa": naive_dola,
    "ICD": naive_icd,
    "INTER": naive_inter,
    "ImbalancedAttention": naive_imbalanced,
    "M3ID": naive_m3id,
    "ONLY": naive_only,
    "OPERA": naive_opera,
    "PAI": naive_pai,
    "VAR": naive_var,
    "VCD": naive_vcd,
    "VHR": naive_vhr,
    "VISTA": naive_vista,
    "ZeroTuning": naive_zerotuning,
}
