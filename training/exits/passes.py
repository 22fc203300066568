"""What becomes of an answer if visual tokens leave after a layer: one shared pass, then short ones.

The model runs once over prompt and answer, with everything in place. From that pass the states of
the text are kept at some layers, with the arguments that each decoder layer got. An exit after
layer e is then the pass of the text's states alone through layers e+1 ..., which is exact:
positions, masks and windows are those of the whole prompt, cut to the columns that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.removal.columns import Survivors
from mmlm.engine.removal.pruning import cut_arguments
from mmlm.methods.routers import Pooling
from training.sft.documents import IGNORED

__all__ = ["Answers", "Outcome", "SharedPass", "last_answers"]


@dataclass(frozen=True, eq=False)
class Answers:
    """The last answer of each row.

    Attributes:
        labels: [B, N]; its ids, `IGNORED` elsewhere.
        start: int64 [B]; its first column.
    """

    labels: Int[Tensor, "B N"]
    start: Int[Tensor, "B"]


def last_answers(labels: Int[Tensor, "B N"]) -> Answers:
    """Keeps the last answer of each row: what stands before it is its prompt.

    Args:
        labels: ids of all answers, `IGNORED` elsewhere.

    Raises:
        ValueError: a row has no answer.
    """
    learned = labels != IGNORED
    empty = (~learned.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"rows {empty} of a batch of {len(labels)} have no label: an exit cannot be judged "
            "without an answer. Leave rows without an answer out."
        )
    index = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(learned, index, -1).amax(1, keepdim=True)
    # The last gap before it ends the earlier answers.
    gap = torch.where(~learned & (index < last), index, -1).amax(1, keepdim=True)
    inside = learned & (index > gap)
    return Answers(labels.masked_fill(~inside, IGNORED), gap[:, 0] + 1)


@dataclass(frozen=True, eq=False)
class Outcome:
    """An answer with and without the visual tokens above a layer.

    Attributes:
        agree: float [B]; share of the answer's positions whose likeliest token stays the same.
        ce_with: float [B]; cross-entropy of the answer with them, summed over its tokens and
            divided by the number of labels above 0 (the authors').
        ce_without: float [B]; without them.
    """

    agree: Float[Tensor, "B"]
    ce_with: Float[Tensor, "B"]
    ce_without: Float[Tensor, "B"]


class SharedPass:
    """A forward pass of a batch, from which exits after several layers are judged.

    Args:
        model: whose parts are used; hooks of built-in methods run in the shared pass.
        visual: bool [B, N]; visual positions.
        real: bool [B, N]; everything but padding.
        answers: the answers that are judged.
        layers: exits that will be asked for.
    """

    def __init__(
        self,
        model: Any,
        visual: Bool[Tensor, "B N"],
        real: Bool[Tensor, "B N"],
        answers: Answers,
        layers: Sequence[int],
    ) -> None:
        self._anatomy = Anatomy(model)
        self._layers, self._answers = tuple(layers), answers
        index = torch.arange(visual.shape[1], device=visual.device)
        text = real & ~visual
        self._pooling = Pooling.of(visual, text & (index < answers.start[:, None]))
        self._text = Survivors.of(text)
        self._states: dict[int, Tensor] = {}
        self._arguments: dict[int, dict[str, Any]] = {}
        self._cuts: dict[int, tuple[Any, Any]] = {}
        learned = answers.labels != IGNORED
        # What predicts a token stands one column before it.
        self._rows, columns = learned.nonzero(as_tuple=True)
        self._columns = columns - 1
        self._targets = answers.labels[learned]
        rank = text.long().cumsum(1) - text.sum(1, keepdim=True)
        self._packed = (rank + self._text.length - 1)[self._rows, self._columns]
        self._with: Tensor | None = None

    def run(self, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
        """Runs the model once, and keeps what exits need.

        Args:
            forward: the model, or what a library has wrapped around it.
            inputs: its arguments, without labels.
        """
        first = min(self._layers)
        with ExitStack() as stack:
            for layer, block in enumerate(self._anatomy.layers):
                if layer in self._layers:
                    hook = block.register_forward_hook(self._keeper(layer))
                    stack.callback(hook.remove)
                if layer > first:
                    hook = block.register_forward_pre_hook(self._noter(layer), with_kwargs=True)
                    stack.callback(hook.remove)
            final: list[Tensor] = []
            hook = self._anatomy.text.register_forward_hook(
                lambda module, args, output: final.append(output.last_hidden_state)
            )
            stack.callback(hook.remove)
            forward(**inputs)
        with torch.no_grad():
            states = final[0][self._rows, self._columns]
            self._with = self._anatomy.exit_logits(states, normed=False)

    def _keeper(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            self._states[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def _noter(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            more = {"hidden_states"} if "hidden_states" in kwargs else set()
            self._arguments[layer] = {k: v for k, v in kwargs.items() if k not in more}

        return hook

    def features(self, layer: int) -> Float[Tensor, "B F"]:
        """What the router of a layer reads: the answer is not there yet."""
        return self._pooling.features(self._states[layer].detach())

    @torch.no_grad()
    def outcome(self, layer: int) -> Outcome:
        """The answers with everything in place, and without visual tokens above ``layer``."""
        if self._with is None:
            raise RuntimeError("run() comes first")
        without = self._with if layer == self._anatomy.n_layers - 1 else self._without(layer)
        rows = self._answers.start.shape[0]
        same = (without.argmax(-1) == self._with.argmax(-1)).float()
        count = torch.bincount(self._rows, minlength=rows)
        agree = torch.zeros(rows, device=same.device).index_add(0, self._rows, same) / count
        return Outcome(agree, self._entropy(self._with), self._entropy(without))

    def _without(self, layer: int) -> Float[Tensor, "A V"]:
        """Logits of the answers' tokens if the visual ones leave after a layer."""
        anatomy, x = self._anatomy, self._text.take(self._states[layer])
        implementation = anatomy.text.config._attn_implementation or "eager"
        for number in range(layer + 1, anatomy.n_layers):
            given = self._arguments[number]
            own = cut_arguments(self._text, given, number, implementation, self._cut)
            # Past the hooks: they belong to the model's own pass.
            output = anatomy.layers[number].forward(x, **own)
            x = output[0] if isinstance(output, tuple) else output
        return anatomy.exit_logits(x[self._rows, self._packed])

    def _cut(self, value: Any, function: Callable[[Any], Any]) -> Any:
        if id(value) not in self._cuts:  # layers share their arguments
            self._cuts[id(value)] = (value, function(value))
        return self._cuts[id(value)][1]

    def _entropy(self, logits: Float[Tensor, "A V"]) -> Float[Tensor, "B"]:
        rows = self._answers.start.shape[0]
        each = functional.cross_entropy(logits.float(), self._targets, reduction="none")
        total = torch.zeros(rows, device=each.device).index_add(0, self._rows, each)
        positive = torch.bincount(self._rows, weights=(self._targets > 0).float(), minlength=rows)
        return total / positive.clamp(min=1)
