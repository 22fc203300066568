"""What ``mmlm calibrate heads`` tries for ACT and ZeroTuning, and which heads it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmlm.cli.calibrate import common
from mmlm.cli.calibrate.questions import Labelled, is_right
from mmlm.errors import InputError

if TYPE_CHECKING:
    from mmlm.cli.calibrate.heads import Calibrate
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.method import Method

__all__ = ["TOKENS", "Accuracy", "Judge", "Trials", "choose_act", "choose_zerotuning"]

TOKENS = 2
"""Of an answer: its first words are compared with the label."""
Accuracy = Mapping[str, float]
"""Accuracy by trial: ``plain``, or a method on one head."""


def choose_act(
    accuracy: Accuracy, trials: Mapping[tuple[int, int], str], gain: float
) -> list[tuple[int, int]]:
    """Heads under which accuracy rises by ``gain`` or more; for 0: does not fall."""
    return [head for head, trial in trials.items() if accuracy[trial] - accuracy["plain"] >= gain]


def choose_zerotuning(
    accuracy: Accuracy,
    up: Mapping[tuple[int, int], str],
    down: Mapping[tuple[int, int], str],
    gain: float,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Heads that gain from a factor above 1, and heads that gain from one below 1.

    That the groups go by the sign of the response is our reading of the paper.
    """
    plain = accuracy["plain"]

    def better(this: Mapping[tuple[int, int], str], other: Mapping[tuple[int, int], str]) -> Any:
        return [
            head
            for head in this
            if accuracy[this[head]] > max(plain, accuracy[other[head]])
            and accuracy[this[head]] - plain >= gain
        ]

    return better(up, down), better(down, up)


class Trials:
    """What is tried: each head alone, once for ACT, with two factors for ZeroTuning."""

    def __init__(self, settings: Calibrate, anatomy: Anatomy) -> None:
        from decoding.act import ACT
        from decoding.zerotuning import ZeroTuning

        is_act = settings.method == "ACT"
        every = range(2, anatomy.n_layers - 1) if is_act else range(anatomy.n_layers)
        layers = settings.layer or tuple(every)
        if not layers or not all(0 <= layer < anatomy.n_layers for layer in layers):
            raise InputError(
                f"Layers {list(layers)} were asked for.",
                advice=f"The model has layers 0 to {anatomy.n_layers - 1}; give --layer.",
            )
        heads = [(layer, head) for layer in layers for head in range(anatomy.n_heads)]
        if is_act:
            act = ACT(beta=settings.beta, theta=settings.theta)
            self.groups: list[Method] = [act]
        else:
            up = ZeroTuning(gamma=settings.gamma)
            self.groups = [up, ZeroTuning(gamma=round(1 / settings.gamma, 4))]
        alone = [{head: _on(group, [head]) for head in heads} for group in self.groups]
        self.names = [{head: m.label for head, m in methods.items()} for methods in alone]
        self.all: dict[str, tuple[Method, ...]] = {"plain": ()}
        self.all |= {m.label: (m,) for methods in alone for m in methods.values()}

    def choose(self, accuracy: Accuracy, gain: float) -> list[Method]:
        """The groups with the heads that were chosen for them; empty groups are left out."""
        if len(self.groups) == 1:
            chosen = [choose_act(accuracy, self.names[0], gain)]
        else:
            up, down = self.names
            chosen = list(choose_zerotuning(accuracy, up, down, gain))
        pairs = zip(self.groups, chosen, strict=True)
        return [_on(group, heads) for group, heads in pairs if heads]


def _on(method: Method, heads: Sequence[tuple[int, int]]) -> Method:
    """The method on these (layer, head) pairs."""
    return replace(method, heads_by_layer=tuple(heads))  # type: ignore[call-arg]


class Judge:
    """Asks the same questions again and again; pictures are read and prepared once."""

    def __init__(
        self, model: Any, processor: Any, asked: Sequence[Labelled], settings: Calibrate
    ) -> None:
        from mmlm.runner import GenerateSettings, generation_config

        self.model, self.processor, self.asked = model, processor, asked
        self.size = settings.batch_size
        given = GenerateSettings(max_new_tokens=settings.max_new_tokens or TOKENS)
        self.config = generation_config(model, given)
        requests = [one.request for one in asked]
        batches = common.model_inputs(model, processor, requests, self.size)
        self.inputs = [{k: v.cpu() for k, v in batch.items()} for batch in batches]

    def accuracy(self, methods: Sequence[Method]) -> float:
        """Share of questions that are answered right while the methods are attached."""
        import mmlm

        right = 0
        for number, batch in enumerate(self.inputs):
            given = {k: v.to(self.model.device) for k, v in batch.items()}
            with mmlm.attach(self.model, *methods, processor=self.processor):
                tokens = self.model.generate(**given, generation_config=self.config)
            answers = tokens[:, given["input_ids"].shape[1] :].cpu()
            texts = [self.processor.decode(row, skip_special_tokens=True) for row in answers]
            labels = [one.label for one in self.asked[number * self.size :][: len(texts)]]
            right += sum(map(is_right, texts, labels))
        return right / len(self.asked)
