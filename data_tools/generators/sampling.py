"""Draws sentences behind prompts that were read: what is where in the tree, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_tools.generators.drawing import Stops, Uniforms, draw
from data_tools.generators.tree import Kept, Rows

__all__ = ["Caption", "draw_sentences"]


@dataclass(eq=False)
class Caption:
    """A caption whose next sentence is drawn.

    Attributes:
        kept: Its prompt.
        uniforms: The request's random numbers.
        limit: At most this many tokens.
        samples: Token ids of each sample, filled by `draw_sentences`.
        nodes: Node of each sample that has not ended.
    """

    kept: Kept
    uniforms: Uniforms
    limit: int
    samples: list[list[int]]
    nodes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Step:
    """Nodes of one depth, as the rows of the pass see them.

    Attributes:
        tokens: int64 [P, S].
        parents: int64 [P, S], nodes of the depth before.
    """

    tokens: Int[Tensor, "P S"]
    parents: Int[Tensor, "P S"]


def draw_sentences(
    model: Any,
    captions: Sequence[Caption],
    temperature: float,
    stops: Stops,
    never: Int[Tensor, "x"],
) -> None:
    """Draws every sample of every caption up to its end; fills `Caption.samples`.

    Args:
        model: The model.
        captions: The captions.
        temperature: > 0.
        stops: What ends a sample.
        never: Tokens that are never drawn.
    """
    for caption in captions:
        caption.nodes = dict.fromkeys(range(len(caption.samples)), 0)
    logits = torch.stack([caption.kept.logits for caption in captions])[:, None]
    rows: Rows | None = None
    seen = torch.empty(0)
    live, depth = list(captions), 0
    while True:
        _draw_tokens(live, logits, depth, temperature, never)
        step = _next_step(live, stops, logits.device)
        if step is None:
            return
        if rows is None:
            rows = Rows(model, [caption.kept for caption in live])
            seen = rows.real[:, None]
        if 2 * sum(bool(caption.nodes) for caption in live) <= len(live):
            going = [i for i, caption in enumerate(live) if caption.nodes]
            index = torch.tensor(going, device=logits.device)
            live = [live[i] for i in going]
            rows.keep(index)
            seen = seen[index]
            step = _Step(step.tokens[index], step.parents[index])
        seen = _seen(seen, step.parents)
        logits = rows.read(step.tokens, seen, depth)
        depth += 1


def _draw_tokens(
    live: list[Caption],
    logits: Float[Tensor, "P S V"],
    step: int,
    temperature: float,
    never: Tensor,
) -> None:
    """Draws the next token of every sample; samples of one node draw from one distribution."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, caption in enumerate(live):
        for sample, node in caption.nodes.items():
            groups.setdefault((row, node), []).append(sample)
    widest = max(map(len, groups.values()))
    uniforms = np.zeros((len(groups), widest))
    numbers = {row: live[row].uniforms.at(step) for row in {row for row, _ in groups}}
    for i, ((row, _), samples) in enumerate(groups.items()):
        uniforms[i, : len(samples)] = numbers[row][samples]
    device = logits.device
    at = torch.tensor(list(groups), device=device)
    found = draw(
        logits[at[:, 0], at[:, 1]], torch.from_numpy(uniforms).to(device), temperature, never
    ).tolist()
    for tokens, ((row, _), samples) in zip(found, groups.items(), strict=True):
        for token, sample in zip(tokens, samples, strict=False):  # rows are filled up
            live[row].samples[sample].append(token)


def _next_step(live: list[Caption], stops: Stops, device: torch.device) -> _Step | None:
    """Samples that have ended leave; the others get the node of what they have drawn."""
    tokens: list[list[int]] = []
    parents: list[list[int]] = []
    for caption in live:
        nodes: dict[tuple[int, int], int] = {}
        after: dict[int, int] = {}
        for sample, node in caption.nodes.items():
            ids = caption.samples[sample]
            if ids[-1] not in stops and len(ids) < caption.limit:
                after[sample] = nodes.setdefault((node, ids[-1]), len(nodes))
        caption.nodes = after
        tokens.append([token for _, token in nodes])
        parents.append([node for node, _ in nodes])
    width = max(map(len, tokens))
    if not width:
        return None
    filled = [[row + [0] * (width - len(row)) for row in x] for x in (tokens, parents)]
    return _Step(*(torch.tensor(x, device=device) for x in filled))


def _seen(seen: Tensor, parents: Tensor) -> Tensor:
    """What the nodes of a new depth see: what their parents did, and themselves."""
    n, width = parents.shape
    inherited = seen.gather(1, parents[..., None].expand(-1, -1, seen.shape[2]))
    own = torch.eye(width, dtype=torch.bool, device=seen.device).expand(n, -1, -1)
    return torch.cat([inherited, own], dim=2)
