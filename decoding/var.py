"""VAR: visual attention redistribution.

Paper: "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
Kang et al., ICLR 2025, arXiv 2503.03321.
Sources read: the authors' code (seilk/VisAttnSink, licence not checked) and public notes on the
paper; the paper's own body was not available. Nothing is copied from the code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import read_numbers
from mmlm.engine.sinks import (
    EPS,
    KNOWN_SINK_DIMS,
    known_sink_dims,
    no_sink_dims,
    phi,
    reasons_without_sinks,
)

__all__ = [
    "KNOWN_SINK_DIMS",
    "VAR",
    "SinkDims",
    "find_sink_dims",
    "image_centric",
    "known_sink_dims",
    "mark",
    "masses",
    "massive_dims",
    "phi",
    "redistribute",
]

_FIRST_LAYER = 2

#: The paper's rho, the least share of non-sink visual tokens, by kind of task (a note).
_TASKS = {"general": 0.8, "hallucination": 0.5, "vision_centric": 0.9}


def mark(visual: Bool[Tensor, "B N"], sinks: Bool[Tensor, "B N"]) -> Float[Tensor, "B N 3"]:
    """One-hot columns of the three kinds: visual non-sink, visual sink, sink in the text."""
    return torch.stack([visual & ~sinks, visual & sinks, ~visual & sinks], dim=-1).float()


def masses(a: Float[Tensor, "B H R K"], marks: Float[Tensor, "B N 3"]) -> Float[Tensor, "B H R 3"]:
    """Attention that each row of each head gives to the three kinds of :func:`mark`.

    Keys behind the N marked ones are of no kind.
    """
    heads = a.shape[1:3]
    return torch.bmm(a[..., : marks.shape[1]].flatten(1, 2), marks).unflatten(1, heads)


def image_centric(
    mass: Float[Tensor, "B H R 3"],
    n_visual: Int[Tensor, "B R_or_1"],
    min_visual_mass: float,
    min_nonsink_ratio: float,
) -> Bool[Tensor, "B H R"]:
    """Heads that look at the image enough, and not mostly at its sinks (head test, Eq. 3).

    Args:
        mass: What :func:`masses` gives.
        n_visual: Number of visual keys a row may see.
        min_visual_mass: Least attention on the image.
        min_nonsink_ratio: The paper's rho; the authors' code compares the sinks' share with its
            own ``rho``, which is one minus this.
    """
    nonsink, sink, _ = mass.unbind(-1)
    seen = nonsink + sink
    share = sink / (seen + EPS * n_visual[:, None])
    return (seen >= min_visual_mass) & (share <= 1 - min_nonsink_ratio)


def redistribute(
    a: Float[Tensor, "B H R K"],
    marks: Float[Tensor, "B N 3"],
    mass: Float[Tensor, "B H R 3"],
    selected: Bool[Tensor, "B H R"],
    move_fraction: float,
) -> Float[Tensor, "B H R K"]:
    """Moves part of the sinks' attention to the non-sink visual keys, in proportion (Eq. 4).

    Sinks in the text give as well; only visual keys receive. Rows without attention on non-sink
    visual keys, and rows that are not selected, are returned as they are.
    """
    nonsink, sink, text_sink = mass.unbind(-1)
    acting = selected & (nonsink > 0)
    loss = move_fraction * acting
    moved = move_fraction * (sink + text_sink)
    gain = torch.where(acting, moved / nonsink.clamp(min=torch.finfo(a.dtype).tiny), 0)
    change = torch.stack([gain, -loss, -loss], dim=-1).flatten(1, 2)  # [B, H * R, 3]
    factor = 1 + torch.bmm(change, marks.transpose(1, 2)).unflatten(1, a.shape[1:3])
    marked = a[..., : marks.shape[1]] * factor
    rest = a[..., marks.shape[1] :]
    return torch.cat([marked, rest], dim=-1) if rest.shape[-1] else marked


# ---- sink dimensions ---------------------------------------------------------------------------


def massive_dims(
    ratio: Float[Tensor, "P L D"], tau: float = 20.0, share: float = 0.9
) -> tuple[int, ...]:
    """Dimensions whose |x| / RMS exceeds ``tau`` in at least ``share`` of prompts and layers."""
    coverage = (ratio > tau).float().mean(dim=(0, 1))
    return tuple(torch.nonzero(coverage >= share).flatten().tolist())


@dataclass(frozen=True, eq=False)
class SinkDims:
    """What :func:`find_sink_dims` measured.

    Attributes:
        dims: The sink dimensions; empty if there are none.
        layers: Decoder layers whose inputs were looked at.
        ratio: fp32 [P, L, D]; |x| / RMS of the first token by prompt, layer and dimension.
    """

    dims: tuple[int, ...]
    layers: tuple[int, ...]
    ratio: Tensor


@torch.no_grad()
def find_sink_dims(
    model: nn.Module,
    prompts: Iterable[Mapping[str, Any]],
    *,
    tau: float = 20.0,
    layers: Sequence[int] | None = None,
    share: float = 0.9,
) -> SinkDims:
    """Measures in which dimensions the first token has massive activations (our procedure).

    Args:
        model: A Hugging Face vision-language model.
        prompts: The processor's outputs, on the model's device; any prompts do, since these
            dimensions belong to the language model.
        tau: What counts as massive, in RMS of the state.
        layers: Decoder layers whose inputs are looked at. Default: the middle half.
        share: Least share of prompts times layers in which a dimension must be massive.

    Raises:
        ValueError: If there are no prompts, or a layer does not exist.
    """
    anatomy = Anatomy(model)
    n = anatomy.n_layers
    chosen = tuple(range(n // 4, n - n // 4)) if layers is None else tuple(layers)
    if not chosen or not all(0 <= layer < n for layer in chosen):
        raise ValueError(f"find_sink_dims: layers must be within 0 to {n - 1}, got {layers!r}.")
    first = Tensor()
    found: dict[int, list[Tensor]] = {layer: [] for layer in chosen}

    def catch(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            x = x[torch.arange(len(x), device=x.device), first.to(x.device)].float()
            found[layer].append((x.abs() / (x.square().mean(-1, True) + EPS).sqrt()).cpu())

        return hook

    with ExitStack() as stack:
        for layer in chosen:
            handle = anatomy.layers[layer].register_forward_pre_hook(catch(layer), with_kwargs=True)
            stack.callback(handle.remove)
        for inputs in prompts:
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            first = mask.long().argmax(-1)
            anatomy.model(**inputs, use_cache=False, logits_to_keep=1)
    if not found[chosen[0]]:
        raise ValueError("find_sink_dims: no prompts were given; give at least one.")
    ratio = torch.stack([torch.cat(found[layer]) for layer in chosen], dim=1)
    return SinkDims(massive_dims(ratio, tau, share), chosen, ratio)


# ---- the method --------------------------------------------------------------------------------


@dataclass
class _Layer:
    """What is kept of one layer.

    Attributes:
        seen: Positions whose states have been looked at.
        sinks: Bool [B, N']; N' grows only if a later pass brings several tokens.
        marks: fp32 [B, N', 3], see :func:`mark`.
        first: int64 [B, 1]; position of the first visual sink, larger than any position without.
        acts: Whether any row has a visual sink.
    """

    seen: int
    sinks: Tensor
    marks: Tensor
    first: Tensor
    acts: bool


@dataclass(frozen=True)
class _State:
    """What is kept for one prompt.

    Attributes:
        visual: Bool [B, N].
        real: Bool [B, N].
        n_visual: int64 [B, N or 1]; visual keys that a row sees, one column if all see the same.
        open: Bool [B, N]; rows that may act; None if all that are given may.
        sink_dims: The dimensions in force.
        layers: By layer number.
    """

    visual: Tensor
    real: Tensor
    n_visual: Tensor
    open: Tensor | None
    sink_dims: tuple[int, ...]
    layers: dict[int, _Layer] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VAR(Method):
    """Moves attention from sink tokens to the rest of the image.

    Idea:
        Some visual tokens get high attention although they carry nothing; they show massive
        activations in a few fixed dimensions. In heads that look at the image, part of the
        attention on such sinks goes to the other visual tokens.
    Paper:
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        arXiv 2503.03321, ICLR 2025.
    Equations:
        ``phi(x) = max over sink dims of |x[d]| / RMS(x)``, sinks where ``phi > tau``: :func:`phi`.
        (3) head test: attention on the image ``>= min_visual_mass``, of which at least
        ``min_nonsink_ratio`` on non-sinks: :func:`image_centric`.
        (4) ``a' = (1 - p) a`` on sinks, ``a' = a + Omega a / sum`` on non-sink visual keys with
        ``Omega = p * sum over sinks``: :func:`redistribute`.
    Acts at:
        ``layer_in`` (looks): sinks are found once, at the prefill; ``weights`` of the text after
        the last image and of every new token, in layers 2 to N_l - 2.
    Cost:
        No extra forward. Per token and layer the weights of one row; at the prefill those of the
        rows after the image. Memory: 4 N numbers per row and layer.
    Parameters:
        move_fraction: The paper's p, share of a sink's attention that is moved, in [0, 1].
            Default 0.4 (authors' code, which keeps 0.6). 0.6 is the other reading: the paper's p
            is the moved share, and which of the two its tables used is not known. Neutral 0.
        min_nonsink_ratio: The paper's rho, in [0, 1]. Default 0.5 (the code's configuration, and
            the paper for hallucination); general tasks 0.8, vision-centric 0.9 (:meth:`for_task`).
        min_visual_mass: Least attention on the image of a head that is changed, in [0, 1].
            Default 0.2 (authors' code).
        tau: Least phi of a sink, > 0. Default 20 (authors' code).
        sink_dims: Dimensions of the states, each >= 0. None: those published for the base model
            (:data:`KNOWN_SINK_DIMS`); for any other, ``mmlm calibrate sink-dims`` finds them.
        include_last_layer: Whether layer N_l - 1 is changed too. Default False (paper).
        per_image_tail: Whether text between images acts too, on the images before it. Default
            False (ours; the code knows one image).
    Shapes:
        B rows, H query heads, R query rows, K keys, N prompt positions, D width, N_l layers.
    State:
        Per prompt: visual positions; per layer the sinks and where they stand.
    Differs:
        min_nonsink_ratio is the paper's rho; the code's ``rho`` is one minus that.
        A sink has phi above tau (code); notes on the paper say at least tau.
        The last layer is left alone (paper); the code meant to and did not:
        ``include_last_layer=True`` restores what it does.
        Sinks are found per row of the batch; the code pools them over the batch.
        A row whose non-sink visual keys have no attention is left alone; the code divides by zero.
        The eps of 1e-6 per visual key in the head test is the code's.
        Without known dimensions attaching is refused; the code uses those of LLaMA-2-7B for 13B.
    Limits:
        Rows without an image are left alone, and so is a layer without a visual sink. In a later
        turn over the same cache new tokens may become sinks, but images are those of the first.

    Raises:
        ValueError: for a parameter out of range, or a dimension that the model does not have.
        UnsupportedModel: if sink_dims is None and the base model is not in the table, or if tau
            is not below the square root of the width, which phi never exceeds.

    Example:
        with VAR(sink_dims=(1415, 2533))(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        arxiv="2503.03321",
        year=2025,
        venue="ICLR 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"layer_in"})

    move_fraction: float = 0.4
    min_nonsink_ratio: float = 0.5
    min_visual_mass: float = 0.2
    tau: float = 20.0
    sink_dims: tuple[int, ...] | None = None
    include_last_layer: bool = False
    per_image_tail: bool = False

    def __post_init__(self) -> None:
        for name in ("move_fraction", "min_nonsink_ratio", "min_visual_mass"):
            self._check_number(name, at_least=0, at_most=1)
        self._check_number("tau", above=0)
        self._check_choice("include_last_layer", (True, False))
        self._check_choice("per_image_tail", (True, False))
        if self.sink_dims is not None:
            chosen = read_numbers("VAR", "sink_dims", self.sink_dims)
            object.__setattr__(self, "sink_dims", chosen)

    @classmethod
    def for_task(
        cls,
        task: Literal["general", "hallucination", "vision_centric"],
        *,
        sink_dims: tuple[int, ...] | None = None,
    ) -> VAR:
        """The paper's rho for a kind of task: 0.8, 0.5 or 0.9 (known from a note only)."""
        if task not in _TASKS:
            raise ValueError(f"VAR: task must be one of {', '.join(_TASKS)}, got {task!r}.")
        return cls(min_nonsink_ratio=_TASKS[task], sink_dims=sink_dims)

    @classmethod
    def for_model(
        cls,
        anatomy: Anatomy,
        task: Literal["general", "hallucination", "vision_centric"] = "hallucination",
    ) -> VAR:
        """The setting for a model of the table, with its sink dimensions spelled out.

        Raises:
            ValueError: If the model is not in the table.
        """
        dims = known_sink_dims(anatomy)
        if dims is None:
            raise ValueError(f"VAR: {no_sink_dims(anatomy)}.")
        return cls.for_task(task, sink_dims=dims)

    def neutral(self) -> VAR:
        """Nothing is moved."""
        return type(self)(move_fraction=0.0)

    @property
    def rows(self) -> Rows:
        """The text after the last image; all rows if text between images acts too."""
        return "all" if self.per_image_tail else "tail"

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Layers from 2 on, without the last one unless it is included."""
        last = anatomy.n_layers - 1
        return self.move_fraction > 0 and (
            _FIRST_LAYER <= layer < last or (layer == last and self.include_last_layer)
        )

    def acts_now(self, state: _State, layer: int) -> bool:
        """Not where no row has a visual sink."""
        return state.layers[layer].acts

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs sink dimensions, and a tau that can be exceeded."""
        if self.move_fraction == 0:
            return []
        return reasons_without_sinks("VAR", self.sink_dims, self.tau, anatomy)

    def begin(self, prompt: Prompt) -> _State | None:
        """Notes where the image is."""
        if self.move_fraction == 0:
            return None
        layout = prompt.layout
        dims = self.sink_dims or known_sink_dims(prompt.anatomy) or ()
        visual, may_act = layout.visual, None
        n_visual = visual.sum(-1, keepdim=True)
        if self.per_image_tail:
            n_visual = visual.cumsum(-1)
            index = torch.arange(layout.length, device=visual.device)
            behind = index > layout.last_image_end()[:, None]
            may_act = behind | (~visual & ~layout.frame & (n_visual > 0))
        return _State(visual, layout.real, n_visual, may_act, dims)

    def layer_in(
        self, state: _State | None, layer: int, x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"] | None:
        """Finds the sinks of a layer; tokens that are generated one by one never become sinks."""
        if state is None:
            return None
        known = state.layers.get(layer)
        if known is None:
            sinks = (phi(x, state.sink_dims) > self.tau) & state.real
            state.layers[layer] = _layer(state.visual, sinks, x.shape[1])
        elif x.shape[1] == 1:
            known.seen += 1
        else:
            sinks = phi(x, state.sink_dims) > self.tau
            before = functional.pad(known.sinks, (0, known.seen - known.sinks.shape[1]))
            sinks = torch.cat([before, sinks], dim=1)
            state.layers[layer] = _layer(state.visual, sinks, known.seen + x.shape[1])
        return None

    def weights(
        self,
        state: _State,
        layer: int,
        rows: Int[Tensor, "B R"],
        a: Float[Tensor, "B H R K"],
    ) -> Float[Tensor, "B H R K"] | None:
        """Redistributes the rows of image-centric heads."""
        known, n_visual = state.layers[layer], state.n_visual
        may_act = rows >= known.first
        if state.open is not None:
            n = state.open.shape[1]
            index = rows.clamp(max=n - 1)
            may_act = may_act & (state.open.gather(1, index) | (rows >= n))
            n_visual = n_visual.gather(1, index)
        mass = masses(a, known.marks)
        selected = image_centric(mass, n_visual, self.min_visual_mass, self.min_nonsink_ratio)
        selected = selected & may_act[:, None]
        return redistribute(a, known.marks, mass, selected, self.move_fraction)


def _layer(visual: Tensor, sinks: Tensor, seen: int) -> _Layer:
    visual = functional.pad(visual, (0, sinks.shape[1] - visual.shape[1]))
    both = visual & sinks
    index = torch.arange(both.shape[1], device=both.device)
    never = torch.iinfo(torch.int64).max
    first = torch.where(both, index, never).amin(-1, keepdim=True)
    # The one read-back per layer and prompt: it spares every later step the layer's rows.
    return _Layer(seen, sinks, mark(visual, sinks), first, acts=bool(both.any()))
