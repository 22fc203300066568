"""What each attention head does to the next token's logits, without running the model again.

Everything happens at one position, the last of a prompt, where the next token is decided. One pass
tells what the layers held there (:func:`look`); from two passes, one with the picture and one
without what it shows, :func:`patched_logits` computes for every head which logits the model would
have given had only that head seen the other picture; :func:`attribution` needs one pass.

Path patching: Wang et al., arXiv 2211.00593; Goldowsky-Dill et al., arXiv 2304.05969. All heads are
rows of one stream of single positions, so that nothing but their MLPs is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmlm.engine.anatomy import Anatomy
from mmlm.errors import UnsupportedModel

__all__ = [
    "Attribution",
    "Form",
    "LastPosition",
    "attribution",
    "contributions",
    "frozen_scale",
    "look",
    "patched_logits",
]

#: Whether the MLPs behind a patched head answer to it ("mlp_recomputed") or not ("direct").
Form: TypeAlias = Literal["mlp_recomputed", "direct"]

#: Share of a state's length by which the recomputed stream may miss the model's own: rounding in
#: half precision stays far below.
_TOLERANCE = 0.05


class LastPosition(NamedTuple):
    """What one pass held at the last position of every row."""

    heads: Float[Tensor, "N_l B H d"]
    """Head outputs: what enters the output projections."""
    added: Float[Tensor, "N_l B D"]
    """What each layer's attention adds to the residual."""
    entering: Float[Tensor, "N_l B D"]
    """The residual before each layer."""
    final: Float[Tensor, "B D"]
    """The residual behind the last layer, before the last norm."""
    length: int
    """Positions N of the prompt."""


class Attribution(NamedTuple):
    """The difference of two logits as a sum over everything that is in the residual."""

    heads: Float[Tensor, "B N_l H"]
    mlps: Float[Tensor, "B N_l"]
    biases: Float[Tensor, "B N_l"]
    """Biases of output projections, which belong to no head."""
    embedding: Float[Tensor, "B"]


@torch.no_grad()
def look(anatomy: Anatomy, inputs: Mapping[str, Any]) -> LastPosition:
    """Runs a batch of left-padded prompts up to the last norm and keeps the last position.

    Methods that are attached act, and what is kept is what they made of it.
    """
    ids = inputs.get("input_ids")
    rows, length = (ids if ids is not None else inputs["inputs_embeds"]).shape[:2]
    heads: dict[int, Tensor] = {}
    added: dict[int, Tensor] = {}
    entering: dict[int, Tensor] = {}

    def gets(found: dict[int, Tensor], key: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[key] = (args[0] if args else kwargs["hidden_states"])[:rows, -1]

        return hook

    def makes(found: dict[int, Tensor], key: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[key] = (output[0] if isinstance(output, tuple) else output)[:rows, -1]

        return hook

    with ExitStack() as stack:
        before: list[tuple[nn.Module, Callable[..., None]]] = [
            (anatomy.norm, gets(entering, anatomy.n_layers))
        ]
        for layer, block in enumerate(anatomy.layers):
            before.append((block, gets(entering, layer)))
            before.append((anatomy.o_proj(layer), gets(heads, layer)))
            handle = anatomy.attended(layer).register_forward_hook(makes(added, layer))
            stack.callback(handle.remove)
        for module, hook in before:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        anatomy.composite(**inputs, use_cache=False)
    layers = range(anatomy.n_layers)
    return LastPosition(
        torch.stack([anatomy.split_heads(heads[layer]) for layer in layers]),
        torch.stack([added[layer] for layer in layers]),
        torch.stack([entering[layer] for layer in layers]),
        entering[anatomy.n_layers],
        length,
    )


def contributions(
    anatomy: Anatomy, layer: int, y: Float[Tensor, "B H d"]
) -> Float[Tensor, "B H D"]:
    """What each head alone adds: ``W_h y_h``, whatever the projection's number format.

    The projection runs past its hooks, and its bias is left out.
    """
    project = anatomy.o_proj(layer).forward
    alone = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[:, :, None]
    together: Tensor = project((y[:, None] * alone).flatten(-2))
    bias: Tensor = project(torch.zeros_like(y[:1]).flatten(-2))
    return together - bias


def _shifts(
    anatomy: Anatomy, layer: int, plain: LastPosition, other: LastPosition
) -> Float[Tensor, "B H D"]:
    """How what the attention adds changes if one head is taken from the other pass."""
    y = plain.heads[layer]
    change = contributions(anatomy, layer, other.heads[layer] - y)
    after = _norm_after(anatomy, layer)
    if after is None:
        return change
    whole = anatomy.o_proj(layer).forward(y.flatten(-2))[:, None]
    changed: Tensor = after.forward(whole + change)
    return changed - after.forward(whole)


def _norm_after(anatomy: Anatomy, layer: int) -> Any:
    """The norm on what a layer's attention adds, in families that have one."""
    added = anatomy.attended(layer)
    return None if added is anatomy.attention(layer) else added


@torch.no_grad()
def patched_logits(
    anatomy: Anatomy,
    plain: LastPosition,
    other: LastPosition,
    tokens: Int[Tensor, "B T"],
    form: Form = "mlp_recomputed",
) -> Float[Tensor, "B N_l H T"]:
    """Logits if one head had what it had in the other pass, all others what they had in this one.

    A head that had the same in both passes leaves the logits as they are, bit for bit.

    Args:
        anatomy: The model's parts.
        plain: The pass that is patched.
        other: The pass that heads are taken from, for prompts of the same length.
        tokens: Whose logits.
        form: "mlp_recomputed": the MLPs of the head's layer and of later ones answer to it; that
            takes ``H N_l (N_l + 1) / 2 + N_l - 1`` rows of MLPs. "direct": they stay, too.

    Raises:
        UnsupportedModel: If a layer adds more to the residual than its attention and its MLP.
    """
    ends = _recomputed if form == "mlp_recomputed" else _direct
    before = _picked(anatomy, plain.final[:, None], tokens)
    after = [_picked(anatomy, states, tokens) for states in ends(anatomy, plain, other)]
    same = (plain.heads == other.heads).all(-1).transpose(0, 1)  # [B, N_l, H]
    return torch.where(same[..., None], before[:, None], torch.stack(after, dim=1))


def _direct(anatomy: Anatomy, plain: LastPosition, other: LastPosition) -> list[Tensor]:
    """Last states per layer, [B, H, D]: the difference goes straight to the end."""
    layers = range(anatomy.n_layers)
    return [plain.final[:, None] + _shifts(anatomy, x, plain, other) for x in layers]


def _recomputed(anatomy: Anatomy, plain: LastPosition, other: LastPosition) -> list[Tensor]:
    """Last states per layer, [B, H, D]; row 0 of the stream is the pass as it was."""
    stream = plain.entering[0][:, None]
    last = anatomy.n_layers - 1
    for layer in range(anatomy.n_layers):
        if layer == last:
            _check_stream(stream[:, 0], plain.entering[layer])
        stream = stream + plain.added[layer][:, None]
        patched = stream[:, :1] + _shifts(anatomy, layer, plain, other)
        stream = torch.cat([stream[:, int(layer == last) :], patched], dim=1)
        stream = anatomy.feed_forward(layer, stream)
    return list(stream.split(anatomy.n_heads, dim=1))


def _check_stream(ours: Tensor, model: Tensor) -> None:
    missed = (ours - model).float().norm(dim=-1) / model.float().norm(dim=-1)
    if bool((missed > _TOLERANCE).any()):
        raise UnsupportedModel(
            "The model's layers add more to the residual than attention and MLP: recomputed "
            f"states miss its own by {100 * float(missed.max()):.0f} %.",
            advice="Use the form 'direct', which computes no layer again.",
        )


def _picked(
    anatomy: Anatomy, x: Float[Tensor, "B R D"], tokens: Int[Tensor, "B T"]
) -> Float[Tensor, "B R T"]:
    z = anatomy.exit_logits(x)
    return z.gather(-1, tokens[:, None].expand(-1, z.shape[1], -1))


def frozen_scale(norm: Any, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """Factors per dimension that an RMS norm gives at ``x``: a linear map once they are held.

    Raises:
        UnsupportedModel: If the norm does more than that (it subtracts a mean or adds a bias).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    gain = norm.forward(torch.ones_like(x))  # up to one factor, which the next line finds
    whole, unscaled = norm.forward(x), gain * x
    scale = (
        gain * (whole * unscaled).sum(-1, keepdim=True) / unscaled.square().sum(-1, keepdim=True)
    )
    missed = (scale * x - whole).norm(dim=-1)
    if not bool((missed <= 0.02 * whole.norm(dim=-1)).all()):  # also where there is no number
        raise UnsupportedModel(
            f"{type(norm).__name__} is no RMS norm, so logits are no sum over heads.",
            advice="Use path patching alone.",
        )
    return scale


@torch.no_grad()
def attribution(anatomy: Anatomy, run: LastPosition, tokens: Int[Tensor, "B 2"]) -> Attribution:
    """How much every part of the residual says for the first token against the second.

    ``J = (U_first - U_second) . N'(x) c`` with the last norm's scale held at x. All parts together
    are the difference of the two logits, where the head neither has a bias nor caps its logits.

    Args:
        anatomy: The model's parts.
        run: The pass.
        tokens: The two tokens of each row.

    Raises:
        UnsupportedModel: If a norm is no RMS norm.
    """
    final = frozen_scale(anatomy.norm, run.final)[:, None]

    def says(parts: Tensor) -> Tensor:
        x = (final * parts).to(run.final.dtype)
        z = anatomy.head(x) - anatomy.head(torch.zeros_like(x[:1, :1]))
        z = z.gather(-1, tokens[:, None].expand(-1, z.shape[1], -1))
        return z[..., 0] - z[..., 1]

    heads, mlps, biases = [], [], []
    follows = [*run.entering[1:], run.final]
    for layer in range(anatomy.n_layers):
        parts = contributions(anatomy, layer, run.heads[layer])
        after = _norm_after(anatomy, layer)
        if after is not None:
            whole = anatomy.o_proj(layer).forward(run.heads[layer].flatten(-2))
            parts = frozen_scale(after, whole)[:, None] * parts
        heads.append(says(parts))
        added = run.added[layer]
        biases.append(says((added - parts.sum(1))[:, None])[:, 0])
        mlps.append(says((follows[layer] - run.entering[layer] - added)[:, None])[:, 0])
    embedding = says(run.entering[0][:, None])[:, 0]
    return Attribution(
        torch.stack(heads, 1), torch.stack(mlps, 1), torch.stack(biases, 1), embedding
    )
