"""HeadAblation: an experiment that takes attention heads away, or only their sight.

Papers: "Retrieval Head Mechanistically Explains Long-Context Factuality", Wu et al., arXiv
2404.15574, which masks heads to show what they are for. Authors' code: nightdessert/Retrieval_Head
@3ac171a (without a licence file); nothing is copied.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.head_maps import HeadMap, random_heads
from mmlm.engine.identity import fingerprint
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import HeadSet, by_layer, check_heads, check_shape, read_heads

__all__ = ["HeadAblation", "blinded", "head_gains", "levelled"]

_COMMAND = "`mmlm calibrate heads --kind visual --output heads.json` finds them"
_SITE = {"zero": "heads", "uniform": "scores", "blind": "weights"}


def head_gains(marks: Float[Tensor, "H"], gain: float) -> Float[Tensor, "1 1 H 1"]:
    """Gains of one layer's heads: ``gain`` where marked with 1, else 1."""
    return (1 + (gain - 1) * marks)[None, None, :, None]


def levelled(
    s: Float[Tensor, "B H R K"], marks: Float[Tensor, "H"], gain: float
) -> Float[Tensor, "B H R K"]:
    """Deltas after which marked heads have ``gain`` of their scores; for 0 all keys are equal."""
    return (gain - 1) * s * marks[:, None, None]


def blinded(
    a: Float[Tensor, "B H R K"],
    visual: Float[Tensor, "B K"],
    marks: Float[Tensor, "H"],
    gain: float,
) -> Float[Tensor, "B H R K"]:
    """Marked heads keep ``gain`` of their attention on the image; rows sum to 1 again.

    A row with nothing but attention on the image stays as it is, and so does one without any.
    """
    image = visual[:, None, None]
    left = a * (1 + (gain - 1) * image * marks[:, None, None])
    total = left.sum(-1, keepdim=True)
    seen = (a * image).sum(-1, keepdim=True) * marks[:, None, None]
    edited = left / total.clamp(min=torch.finfo(a.dtype).tiny)
    return torch.where((seen > 0) & (total > 0), edited, a)


@dataclass(frozen=True)
class _State:
    """What is kept for one prompt.

    Attributes:
        prompt: Tells a prompt's first pass from later ones.
        marks: fp32 [H] by layer; 1 for ablated heads.
        visual: fp32 [B, N]; image positions.
    """

    prompt: Prompt
    marks: dict[int, Tensor]
    visual: Tensor


@dataclass(frozen=True, kw_only=True)
class HeadAblation(Method):
    """Takes heads away, or levels or blinds their attention: an experiment.

    Idea:
        What a head is for shows when it is gone. Ablated visual heads should make a model invent;
        as many random heads of the same layers, the control, should not. No mitigation.
    Paper:
        "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, 2024.
    Equations:
        None is numbered in the sources read. Zero: ``y_h' = g y_h``: :func:`head_gains`. Uniform:
        ``softmax(g s)``: :func:`levelled`. Blind: ``A_j' = g A_j / sum`` on image keys j:
        :func:`blinded`.
    Acts at:
        kind "zero": ``heads``; "uniform": ``scores``; "blind": ``weights``; in layers with ablated
        heads, in the rows that ``steps`` names.
    Cost:
        No extra forward. Kinds "uniform" and "blind" compute rows of attention a second time.
    Parameters:
        kind: "zero": the head's output is gone (default, ours). "uniform": it sees all keys alike,
            so that its output is the mean of the values (authors' code). "blind": it does not see
            the image, and keeps its work on text (ours).
        gain: What is left, >= 0: of the output, the scores, or the attention on the image.
            Default 0. Between 0 and 1 damps, above 1 boosts. Neutral 1.
        steps: "all": from the prompt on; for "blind" from the end of the last image on. "decode":
            the prompt's last row and new tokens (authors' code). None: "decode" for "uniform", as
            its authors do, else "all".
        heads_file: A file of `mmlm calibrate heads --kind visual` or `--kind text`.
        top: So many of the file's strongest heads, >= 1. None: those above its threshold.
        control: Seed >= 0 of a control: instead of those heads as many others of the same layers
            (:func:`mmlm.engine.head_maps.random_heads`). None: the heads themselves.
        heads_by_layer: The heads as ((layer, (head, ...)), ...) or ((layer, head), ...), e.g.
            ``found.top(20)`` of a map, instead of a file's. Neither: unknown, so that attaching is
            refused.
    Shapes:
        B rows, H query heads, R query rows, K keys, N prompt positions.
    State:
        Per prompt: ablated heads of each layer, and which position is image.
    Differs:
        The authors know "uniform" in new tokens only. Their control draws anew for every sample,
        and may draw the heads it is a control for; this one does not.
    Limits:
        Kind "zero" acts in prompts without an image, too: a head that is gone is gone for every
        prompt. The other kinds leave them alone. No other method may act at ``scores`` beside
        "uniform": the sum would not be zero attention scores.

    Raises:
        ValueError: for a parameter out of range; a head that the model does not have; a file that
            is missing, damaged, without heads, or of a model of another shape.
        UnsupportedModel: if no heads are given.
        IncompatibleMethods: for "uniform" beside another method at ``scores``.

    Example:
        with HeadAblation(heads_file="heads.json", top=20, kind="blind")(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        arxiv="2404.15574",
        year=2024,
        venue="ICLR 2025",
    )
    rewinds: ClassVar[bool] = True
    edits_without_image: ClassVar[bool] = True

    kind: Literal["zero", "uniform", "blind"] = "zero"
    gain: float = 0.0
    steps: Literal["all", "decode"] | None = None
    heads_file: str = ""
    top: int | None = None
    control: int | None = None
    heads_by_layer: HeadSet | None = None

    def __post_init__(self) -> None:
        self._check_choice("kind", ("zero", "uniform", "blind"))
        self._check_number("gain", at_least=0)
        self._check_choice("steps", (None, "all", "decode"))
        if self.top is not None:
            self._check_integer("top", at_least=1)
        if self.control is not None:
            self._check_integer("control", at_least=0)
        if not self.heads_file and (self.top is not None or self.control is not None):
            raise ValueError("HeadAblation: top and control choose among the heads of heads_file.")
        if self.heads_by_layer is not None:
            if self.heads_file:
                raise ValueError("HeadAblation: heads_by_layer excludes heads_file.")
            given = read_heads("HeadAblation", "heads_by_layer", self.heads_by_layer)
            object.__setattr__(self, "heads_by_layer", given)
        # Read once: what is wrong with a file is said here, and it cannot change while attached.
        found = self._read() if self.heads_file else None
        object.__setattr__(self, "_map", found)
        object.__setattr__(self, "_ablated", self._choose(found))

    def _read(self) -> HeadMap:
        try:
            return HeadMap.load(self.heads_file)
        except ValueError as error:
            raise ValueError(f"HeadAblation: {error}.") from error

    def _choose(self, found: HeadMap | None) -> HeadSet:
        if found is None:
            return self.heads_by_layer or ()
        try:
            chosen = found.heads if self.top is None else found.top(self.top)
            if not chosen:
                raise ValueError(f"no head is above the threshold {found.threshold}; give top")
            if self.control is not None:
                chosen = random_heads(chosen, found.shape, self.control)
        except ValueError as error:
            raise ValueError(f"HeadAblation: {self.heads_file!r}: {error}.") from error
        return by_layer(chosen)

    def neutral(self) -> HeadAblation:
        """Gain = 1."""
        return type(self)(gain=1.0)

    @property
    def ablated(self) -> HeadSet:
        """The heads that this setting ablates."""
        heads: HeadSet = self._ablated  # type: ignore[attr-defined]
        return heads

    @property
    def sites(self) -> frozenset[str]:
        """The one of its kind."""
        return frozenset({_SITE[self.kind]})

    @property
    def alone_at(self) -> frozenset[str]:
        """Scores that another method adds to would not be level."""
        return self.sites & {"scores"}

    @property
    def _where(self) -> str:
        return self.steps or ("decode" if self.kind == "uniform" else "all")

    @property
    def rows(self) -> Rows:
        """None for outputs of heads; else those that ``steps`` names."""
        if self.kind == "zero":
            return "none"
        if self._where == "decode":
            return "last"
        return "all" if self.kind == "uniform" else "tail"

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Layers with ablated heads."""
        return self.gain != 1 and any(layer == at for at, _ in self.ablated)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs heads, of a model like this one."""
        found: HeadMap | None = self._map  # type: ignore[attr-defined]
        if found is not None:
            check_shape("HeadAblation", self.heads_file, found.shape, anatomy)
            if found.facts.get("weights", "") not in ("", fingerprint(anatomy.model)):
                warnings.warn(
                    f"HeadAblation: the heads of {self.heads_file!r} were found on other weights "
                    f"({found.facts.get('model', 'unnamed')}).",
                    stacklevel=2,
                )
        check_heads("HeadAblation", self.ablated, anatomy)
        if not self.ablated and self.gain != 1:
            return [f"no heads are given; {_COMMAND}"]
        return []

    def begin(self, prompt: Prompt) -> _State:
        """Marks the ablated heads of each layer, and the image."""
        visual = prompt.layout.visual.float()
        marks = {}
        for layer, heads in self.ablated:
            marks[layer] = torch.zeros(prompt.anatomy.n_heads, device=visual.device)
            marks[layer][list(heads)] = 1
        return _State(prompt, marks, visual)

    def heads(
        self, state: _State, layer: int, y: Float[Tensor, "B L H d"]
    ) -> Float[Tensor, "B L_or_1 H 1"] | None:
        """The gain of this layer's heads."""
        gain = head_gains(state.marks[layer], self.gain).to(y.dtype)
        rows, length = y.shape[:2]
        if self._where == "all" or state.prompt.past:
            return gain.expand(rows, 1, -1, 1)
        last = torch.arange(length, device=y.device) == length - 1
        return torch.where(last[:, None, None], gain, torch.ones_like(gain)).expand(rows, -1, -1, 1)

    def scores(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], s: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Level scores."""
        return levelled(s, state.marks[layer], self.gain)

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Rows that do not see the image; new tokens are text."""
        visual = functional.pad(state.visual, (0, a.shape[-1] - state.visual.shape[-1]))
        return blinded(a, visual, state.marks[layer], self.gain)
