"""PH3: pruning memory heads, or image heads; and the weighing of both kinds.

Papers: "Cutting Off the Head Ends the Conflict: A Mechanism for Interpreting and Mitigating
Knowledge Conflicts in Language Models", Jin et al., Findings of ACL 2024, arXiv 2402.18154; "When
Seeing Overrides Knowing: Disentangling Knowledge Conflicts in Vision-Language Models", Ortu et al.,
ACL 2026, arXiv 2507.13868.
Sources read: of the first the abstract and a public review (neither code nor body could be
obtained); of the second the authors' code (francescortu/Seeing-Knowing, without a licence file).
Nothing is copied from the code.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from decoding.conflict_runs import Conflicts, calibrate_heads
from decoding.head_records import HeadRecord, read_record
from decoding.head_weights import PUBLISHED, head_weights, pairs, weigh
from mmlm.engine.anatomy import Anatomy
from mmlm.engine.identity import fingerprint
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import HeadSet, by_layer, check_heads, check_shape, read_heads

__all__ = [
    "PH3",
    "Conflicts",
    "SeeingKnowing",
    "calibrate_heads",
    "head_gain",
    "head_weights",
    "weigh",
]

_SHIPPED = Path(__file__).parent / "heads"
#: Share of all heads that is pruned where none was tuned.
FRACTION = 0.02
_COMMAND = "`mmlm calibrate conflict-heads --output heads.json` finds them"


def head_gain(heads: Collection[int], n_heads: int, gain: float) -> Float[Tensor, "1 1 H 1"]:
    """Gains of one layer's heads, 1 for those that are not named."""
    result = torch.ones(1, 1, n_heads, 1)
    result[:, :, list(heads)] = gain
    return result


@dataclass(frozen=True)
class _State:
    """What is kept for one prompt.

    Attributes:
        prompt: Tells a prompt's first pass from later ones.
        gains: fp32 [1, 1, H, 1] by layer.
    """

    prompt: Prompt
    gains: dict[int, Tensor]


@dataclass(frozen=True, kw_only=True)
class PH3(Method):
    """Prunes the attention heads that repeat the prior, or those that read the image.

    Idea:
        In late layers some heads add the answer that the model remembers, others the one that
        stands in the context. For a model that sees, the context is the image and the memory is
        what usually stands in such a scene. Path patching finds both kinds; pruning memory heads
        turns answers towards the image, pruning image heads is the control that must make it worse.
    Paper:
        "Cutting Off the Head Ends the Conflict: A Mechanism for Interpreting and Mitigating
        Knowledge Conflicts in Language Models", arXiv 2402.18154, Findings of ACL 2024.
    Equations:
        None is numbered in the sources read. ``y_h' = gain y_h`` for listed heads:
        :func:`head_gain`. The lists: ``I_h = mean of [delta(z) - delta(z_h')]`` with ``delta(z) =
        z(image answer) - z(memory answer)`` and z_h' the logits with head h patched from the run
        with another picture, and ``J_h = (U_image - U_memory) . N'(x) W_h y_h``:
        :mod:`mmlm.engine.head_effects`, :mod:`decoding.conflict_heads`.
    Acts at:
        ``heads`` of layers with listed heads, all positions, prefill and decode, the same for
        every row.
    Cost:
        No extra forward; one multiply per layer with listed heads. Finding the heads takes two or
        three prefills per sample, once per model.
    Parameters:
        heads_file: A file of `mmlm calibrate conflict-heads`, or "embedded", which ships for the
            embedded model.
        towards: "image": memory heads of the file are pruned (default). "memory": image heads.
        gain: Factor of the listed heads, >= 0. Default 0.0 (paper: pruning). Neutral 1.0.
        fraction: Share of all heads that is pruned, in (0, 0.5], at least one head. None: what the
            file was tuned to, else 0.02 (ours; the paper's rates are not known to us).
        mode: "all": all positions (default, our reading of the paper). "last_row": the last
            position of the prompt and all new tokens.
        allow_unstable: Whether a file is used whose halves of the samples hardly agree.
        heads_by_layer: The heads to prune as ((layer, (head, ...)), ...), as ((layer, head), ...),
            or the path of a map of heads, instead of a file's. Neither: unknown, so that attaching
            is refused.
    Shapes:
        B rows, L new positions, H query heads, d head size.
    State:
        Per prompt: one gain per layer with listed heads.
    Differs:
        Only the abstract and a review of the paper could be read: samples, path patching in two
        forms, scores, significance, the protection of the first layers and tuning are ours, and so
        is the transfer to images. Heads on both lists, or on different ones in the two halves of
        the samples, are never pruned (influential heads are said to serve
        memory and context at once: arXiv 2503.10996).
        Prompts without an image are edited as well: pruned heads are gone for every prompt.
    Limits:
        Heads of a file are valid for the model, and beside the methods, with which they were found:
        another model of the same shape, and other methods, get a warning.

    Raises:
        ValueError: for a parameter out of range; a head that the model does not have; a file that
            is missing, damaged, unstable, without such heads, or of a model of another shape.
        UnsupportedModel: if no heads are given, or the model has no output projection per layer.

    Example:
        with PH3(heads_file="heads.json", towards="image", fraction=0.02)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title=(
            "Cutting Off the Head Ends the Conflict: A Mechanism for Interpreting and Mitigating "
            "Knowledge Conflicts in Language Models"
        ),
        arxiv="2402.18154",
        year=2024,
        venue="Findings of ACL 2024",
    )
    rewinds: ClassVar[bool] = True
    edits_without_image: ClassVar[bool] = True

    heads_file: str = ""
    towards: Literal["image", "memory"] = "image"
    gain: float = 0.0
    fraction: float | None = None
    mode: Literal["all", "last_row"] = "all"
    allow_unstable: bool = False
    heads_by_layer: HeadSet | None = None

    def __post_init__(self) -> None:
        self._check_number("gain", at_least=0)
        self._check_choice("towards", ("image", "memory"))
        self._check_choice("mode", ("all", "last_row"))
        self._check_choice("allow_unstable", (True, False))
        if self.fraction is not None:
            self._check_number("fraction", above=0, at_most=0.5)
        if self.heads_by_layer is not None:
            if self.heads_file or self.fraction is not None:
                raise ValueError("PH3: heads_by_layer excludes heads_file and fraction.")
            given = read_heads("PH3", "heads_by_layer", self.heads_by_layer)
            object.__setattr__(self, "heads_by_layer", given)
        # Read once: what is wrong with a file is said here, and it cannot change while attached.
        record = _record(self.heads_file) if self.heads_file else None
        object.__setattr__(self, "_found", record)
        object.__setattr__(self, "_pruned", self._choose(record))

    def _choose(self, record: HeadRecord | None) -> HeadSet:
        """The heads that are pruned."""
        if record is None:
            return self.heads_by_layer or ()
        if record.unstable and not self.allow_unstable:
            raise ValueError(
                f"PH3: {self.heads_file!r} is unstable: rank correlations of its halves "
                f"{record.lists.split_half}. Calibrate on more samples, or allow_unstable=True."
            )
        kind = "memory" if self.towards == "image" else "image"
        ranked = getattr(record.lists, kind)
        if not ranked:
            removed = {why: found for why, found in record.lists.removed.items() if found}
            raise ValueError(
                f"PH3: {self.heads_file!r} has no {kind} head"
                + (f" but those removed: {removed}." if removed else ".")
            )
        fraction = self.fraction or record.fraction.get(self.towards, FRACTION)
        n_layers, n_heads = record.shape
        return by_layer(ranked[: max(1, round(fraction * n_layers * n_heads))])

    @classmethod
    def for_model(cls, anatomy: Anatomy, **parameters: Any) -> PH3:
        """PH3 with the heads that ship for a model.

        Args:
            anatomy: The model's parts.
            **parameters: Others than the heads.

        Raises:
            ValueError: If none ship for it; there is no guess.
        """
        own = fingerprint(anatomy.model)
        for path in sorted(_SHIPPED.glob("*.json")):
            if read_record(path).weights == own:
                return cls(heads_file=path.stem, **parameters)
        raise ValueError(
            f"PH3: no heads ship for this model ({anatomy.family_name}, weights {own}); {_COMMAND}."
        )

    @staticmethod
    def seeing_knowing(model: str, strength: float = -1.0) -> SeeingKnowing:
        """The published heads of a model with the intervention that they were published with.

        Args:
            model: "llava-next-mistral-7b".
            strength: Change on the text of memory heads; that on the image of image heads is its
                negative.

        Raises:
            ValueError: If no heads were published for it.
        """
        return SeeingKnowing.published(model, strength)

    def neutral(self) -> PH3:
        """Gain = 1."""
        return type(self)(gain=1.0)

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Layers with pruned heads."""
        return self.gain != 1 and any(layer == at for at, _ in self.pruned)

    @property
    def pruned(self) -> HeadSet:
        """The heads that this setting prunes."""
        heads: HeadSet = self._pruned  # type: ignore[attr-defined]
        return heads

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs heads, of a model like this one."""
        record: HeadRecord | None = self._found  # type: ignore[attr-defined]
        if record is not None:
            check_shape("PH3", self.heads_file, record.shape, anatomy)
            _warn_of_another_model(record, anatomy)
        check_heads("PH3", self.pruned, anatomy)
        if not self.pruned and self.gain != 1:
            return [f"no heads are given; {_COMMAND}"]
        return []

    def begin(self, prompt: Prompt) -> _State:
        """Makes the gains of each layer."""
        record: HeadRecord | None = self._found  # type: ignore[attr-defined]
        beside = prompt.beside(self)
        if record is not None and sorted(beside) != sorted(record.methods):
            warnings.warn(
                f"PH3: the heads of {self.heads_file!r} were found beside "
                f"{_several(record.methods)}, and are used beside {_several(beside)}.",
                stacklevel=2,
            )
        n_heads, device = prompt.anatomy.n_heads, prompt.layout.real.device
        return _State(
            prompt, {n: head_gain(h, n_heads, self.gain).to(device) for n, h in self.pruned}
        )

    def heads(
        self, state: _State, layer: int, y: Float[Tensor, "B L H d"]
    ) -> Float[Tensor, "B L_or_1 H 1"] | None:
        """The gain of this layer's heads."""
        gain = state.gains[layer].to(y.dtype)
        rows, length = y.shape[:2]
        if self.mode == "all" or state.prompt.past:
            return gain.expand(rows, 1, -1, 1)
        last = torch.arange(length, device=y.device) == length - 1
        return torch.where(last[:, None, None], gain, torch.ones_like(gain)).expand(rows, -1, -1, 1)


def _record(file: str) -> HeadRecord:
    """The record of a file, or one that ships, by its name."""
    shipped = _SHIPPED / f"{file}.json"
    try:
        return read_record(shipped if shipped.is_file() else Path(file))
    except ValueError as error:
        raise ValueError(f"PH3: {error}.") from error


def _warn_of_another_model(record: HeadRecord, anatomy: Anatomy) -> None:
    name = str(getattr(anatomy.config, "_name_or_path", ""))
    same_name = Path(name).name == Path(record.model).name
    if not same_name and fingerprint(anatomy.model) != record.weights:
        warnings.warn(
            f"PH3: the heads were found on {record.model!r}; this model is {name!r}.", stacklevel=2
        )


def _several(methods: Collection[str]) -> str:
    return ", ".join(methods) or "no other method"


@dataclass(frozen=True, kw_only=True)
class SeeingKnowing(Method):
    """Weighs what image heads take from the image, and memory heads from the text.

    Idea:
        Where a picture contradicts what the model knows, a few late heads decide. More weight on
        the image in heads that follow it, and less on the text in those that follow memory, turns
        the answer; the opposite signs turn it back.
    Paper:
        "When Seeing Overrides Knowing: Disentangling Knowledge Conflicts in Vision-Language
        Models", arXiv 2507.13868, ACL 2026.
    Equations:
        None is numbered in the sources read; from the code: factors ``1 + gamma`` on image keys of
        image heads, ``1 + lambda`` on text keys of memory heads, and on text keys of the other
        heads of such layers ``(H - N (1 + gamma) - F (1 + lambda)) / M``: :func:`head_weights`,
        :func:`weigh`.
    Acts at:
        ``weights`` of the last row of the prompt and of every new token, in layers with listed
        heads.
    Cost:
        No extra forward. One attention row per token of layers with listed heads is computed a
        second time.
    Parameters:
        image_change: gamma. Default 1.0: image heads see the image twice.
        memory_change: lambda. Default -1.0: memory heads do not see text. Below -1 weights turn
            negative. The authors sweep gamma = -lambda from -3 to 3; neutral 0 and 0.
        rebalanced: Whether the other heads make up for it, so that the factors of a layer sum to
            H. Default True (authors' code).
        image_heads: Heads that follow the image, as ((layer, (head, ...)), ...) or ((layer, head),
            ...).
        memory_heads: Heads that follow memory. Both None: unknown, so that attaching is refused;
            :meth:`published` has the authors' lists, `mmlm calibrate conflict-heads` finds others.
    Shapes:
        B rows, H query heads, R query rows, K keys.
    State:
        Per prompt: which positions are image, and two factors per head of each such layer.
    Differs:
        Every new token is weighed; the authors' code runs one forward for one next token.
        One call for both lists. The authors' paired setting calls twice, and how the factors of
        the other heads then meet is decided in a library that was not read.
    Limits:
        Weights are not renormalised, which no other method here does: rows do not sum to 1.
        Prompts without an image are left alone, like with every method here.

    Raises:
        ValueError: for a parameter out of range, a head on both lists, or one that the model does
            not have.
        UnsupportedModel: if no heads are given.

    Example:
        with PH3.seeing_knowing("llava-next-mistral-7b", strength=-1.0)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title=(
            "When Seeing Overrides Knowing: Disentangling Knowledge Conflicts in Vision-Language "
            "Models"
        ),
        arxiv="2507.13868",
        year=2026,
        venue="ACL 2026",
    )
    rewinds: ClassVar[bool] = True

    image_change: float = 1.0
    memory_change: float = -1.0
    rebalanced: bool = True
    image_heads: HeadSet | None = None
    memory_heads: HeadSet | None = None

    def __post_init__(self) -> None:
        for name in ("image_change", "memory_change"):
            self._check_number(name, at_least=-100, at_most=100)
        self._check_choice("rebalanced", (True, False))
        for name in ("image_heads", "memory_heads"):
            heads = getattr(self, name)
            if heads is not None:
                object.__setattr__(self, name, read_heads("SeeingKnowing", name, heads))
        both = set(pairs(self.image_heads)) & set(pairs(self.memory_heads))
        if both:
            raise ValueError(f"SeeingKnowing: {sorted(both)} are image heads and memory heads.")

    @classmethod
    def published(cls, model: str, strength: float = -1.0) -> SeeingKnowing:
        """The authors' heads of a model; ``gamma = -lambda``.

        Args:
            model: Its name.
            strength: lambda.

        Raises:
            ValueError: If no heads were published for it.
        """
        if model not in PUBLISHED:
            raise ValueError(
                f"No heads were published for {model!r}, but for {', '.join(PUBLISHED)}; "
                f"{_COMMAND}."
            )
        image, memory = (
            by_layer([(int(n), int(h)) for n, h in (pair.split(".") for pair in text.split())])
            for text in PUBLISHED[model]
        )
        return cls(
            image_change=-strength, memory_change=strength, image_heads=image, memory_heads=memory
        )

    def neutral(self) -> SeeingKnowing:
        """Both changes 0."""
        return type(self)(image_change=0.0, memory_change=0.0)

    @property
    def rows(self) -> Rows:
        """The row that decides the next token."""
        return "last"

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Layers with listed heads."""
        return self._changes and any(
            layer == at for at, _ in (*(self.image_heads or ()), *(self.memory_heads or ()))
        )

    @property
    def _changes(self) -> bool:
        return bool(self.image_change or self.memory_change)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs heads."""
        if self.image_heads is None and self.memory_heads is None and self._changes:
            return [f"no heads are given; {_COMMAND}"]
        for heads in (self.image_heads, self.memory_heads):
            check_heads("SeeingKnowing", heads or (), anatomy)
        return []

    def begin(self, prompt: Prompt) -> _Weighing:
        """Makes the factors of each layer."""
        visual, n_heads = prompt.layout.visual, prompt.anatomy.n_heads
        factors = head_weights(
            n_heads,
            pairs(self.image_heads),
            pairs(self.memory_heads),
            self.image_change,
            self.memory_change,
            rebalanced=self.rebalanced,
        )
        state = _Weighing(visual)
        for (layer, head), (factor, kind) in factors.items():
            if layer not in state.factors:
                state.factors[layer] = torch.ones(2, n_heads, device=visual.device)
            state.factors[layer][0 if kind == "image" else 1, head] = factor
        return state

    def weights(
        self,
        state: _Weighing,
        layer: int,
        rows: Int[Tensor, "B R"],
        a: Float[Tensor, "B H R K"],
    ) -> Float[Tensor, "B H R K"]:
        """The weighed row; new tokens are text."""
        visual = functional.pad(state.visual, (0, a.shape[-1] - state.visual.shape[-1]))
        return weigh(a, visual, *state.factors[layer])


@dataclass(frozen=True)
class _Weighing:
    """What is kept for one prompt.

    Attributes:
        visual: Bool [B, N].
        factors: fp32 [2, H] by layer: on the image, on the text.
    """

    visual: Tensor
    factors: dict[int, Tensor] = field(default_factory=dict)
