"""Visual attention sinks: image tokens that get attention and carry nothing.

Paper: "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
Kang et al., ICLR 2025, arXiv 2503.03321. Sources read: the authors' code (seilk/VisAttnSink) and
public notes on the paper; the paper's own body was not available. The method that takes attention
from sinks is VAR; this only finds them, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Paper, Prompt, Rows
from mmlm.engine.selections import read_numbers
from mmlm.engine.sinks import known_sink_dims, phi, reasons_without_sinks
from mmlm.probes.layer_probe import LayerProbe, check_rows, check_shown, short

__all__ = ["KINDS", "VisualSinks"]

KINDS = ("visual", "visual_sink", "text_sink")
"""Groups of keys whose attention is added up. ``visual_sink`` lies within ``visual``."""
_FIRST_LAYER = 2


@dataclass
class _Layer:
    """What is kept of one layer.

    Attributes:
        phi: fp32 [B, N]; of the prompt's positions in the decoder, 0 where none stands any more.
        marks: fp32 [B, N, 3]; see :data:`KINDS`.
        seen: Positions so far.
        steps: fp32 [B, 3] for every token: attention of the row that produced it.
    """

    phi: Tensor
    marks: Tensor
    seen: int = 0
    steps: list[Tensor] = field(default_factory=list)


@dataclass
class _State:
    """What is kept for one prompt.

    Attributes:
        prompt: Asked for the columns of a layer's input while the prompt is read.
        layers: Those that are measured.
        sink_dims: The dimensions in force.
        visual: Bool [B, N].
        real: Bool [B, N].
        img: int64 [B, N]; image of each given position, -1 outside.
        at: int64 [B, n]; the given position of each position in the decoder, -1 outside images.
        found: By layer.
    """

    prompt: Prompt
    layers: tuple[int, ...]
    sink_dims: tuple[int, ...]
    visual: Tensor
    real: Tensor
    img: Tensor
    at: Tensor
    found: dict[int, _Layer] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VisualSinks(LayerProbe):
    """Finds visual attention sinks, and measures how much attention goes to them.

    Idea:
        Some visual tokens get high attention although they carry nothing. A map of attention over
        the picture shows them as places that the model looked at; they are not.
    Paper:
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        arXiv 2503.03321, ICLR 2025.
    Equations:
        ``phi(x) = max over sink dims of |x[d]| / RMS(x)`` on inputs x of a layer, sinks where
        ``phi > tau``; attention on them as mean over heads, for the rows that produced tokens.
    Acts at:
        ``layer_in`` (looks) at the prefill; ``weights`` (looks, behind the edits of all other
        methods) of the last row of each pass.
    Cost:
        No extra forward. Per token and layer one row of attention weights is computed again.
        Memory: 4 numbers per layer and position, 3 per layer and token.
    Parameters:
        tau: Least phi of a sink, > 0. Default 20 (authors' code).
        sink_dims: Dimensions of the states, each >= 0. None: those published for the base model
            (``mmlm.engine.sinks.KNOWN_SINK_DIMS``); for any other, ``mmlm calibrate sink-dims``
            finds them.
        layers: Decoder layers, each >= 0. None: from layer 2 on (paper).
    Shapes:
        B rows, H query heads, R query rows, K keys, N prompt positions, D width.
    State:
        Per prompt: which position belongs to which image; per layer phi, and the sums.
    Differs:
        A sink has phi above tau (code); notes on the paper say at least tau.
        The query of the first token is the prompt's last row; the paper looks at all text.
    Limits:
        Beam search is refused. Only the prompt's tokens are sinks, never generated ones.

    Raises:
        ValueError: for a parameter out of range, or a layer or dimension that the model does not
            have.
        UnsupportedModel: if sink_dims is None and the base model is not in the table, or if tau
            is not below the square root of the width, which phi never exceeds.

    Example:
        with VisualSinks(sink_dims=(1415, 2533))(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        arxiv="2503.03321",
        year=2025,
        venue="ICLR 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"layer_in", "weights"})
    measures: ClassVar[str] = "visual_sinks"

    tau: float = 20.0
    sink_dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_number("tau", above=0)
        if self.sink_dims is not None:
            chosen = read_numbers("VisualSinks", "sink_dims", self.sink_dims)
            object.__setattr__(self, "sink_dims", chosen)
        super().__post_init__()

    @property
    def rows(self) -> Rows:
        """The last row of each pass."""
        return "last"

    def layers_of(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The layers that are measured on a model."""
        every = tuple(range(min(_FIRST_LAYER, anatomy.n_layers - 1), anatomy.n_layers))
        return every if self.layers is None else self.layers

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs sink dimensions, and a tau that can be exceeded."""
        super().unsupported(anatomy)
        return reasons_without_sinks("VisualSinks", self.sink_dims, self.tau, anatomy)

    def begin(self, prompt: Prompt) -> _State:
        """Notes where the images are."""
        layout, full = prompt.layout, prompt.full_layout
        number = torch.arange(full.length, device=full.seg.device).repeat(full.rows, 1)
        return _State(
            prompt=prompt,
            layers=self.layers_of(prompt.anatomy),
            sink_dims=self.sink_dims or known_sink_dims(prompt.anatomy) or (),
            visual=layout.visual,
            real=layout.real,
            img=full.img.long(),
            at=torch.where(layout.visual, prompt.entered(number), -1),
        )

    def layer_in(
        self, state: _State, layer: int, x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"] | None:
        """Finds the sinks of a layer among the prompt's tokens; changes nothing."""
        if layer in state.found:
            return None
        kept, values = state.prompt.kept, phi(x, state.sink_dims)
        whole = values.new_zeros(*state.real.shape)
        whole.scatter_add_(1, kept.clamp(min=0), values.masked_fill(kept < 0, 0))
        whole = whole.masked_fill(~state.real, 0)
        sinks = whole > self.tau
        marks = torch.stack([state.visual, state.visual & sinks, ~state.visual & sinks], dim=-1)
        state.found[layer] = _Layer(whole, marks.float())
        return None

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Adds a row up by kinds; changes nothing."""
        found, keys = state.found[layer], a.shape[-1]
        if found.seen and keys != found.seen + 1:  # a new turn: its answer begins
            found.steps.clear()
        found.seen = keys
        seen = a[:, :, -1, : found.marks.shape[1]].mean(1)
        found.steps.append(torch.bmm(seen[:, None], found.marks)[:, 0])
        return None

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per row, in plain JSON.

        Returns:
            Dictionaries with ``layers``, ``sink_dims``, ``tau``, ``queries`` (number of rows in the
            means), ``keys`` (positions of each image); per layer ``sinks`` (per image the numbers
            of its positions that are sinks), ``phi`` (largest of a visual position, 0 without any)
            and, by :data:`KINDS`, ``attention`` (share of a query's attention, mean over heads and
            queries).

        Raises:
            ValueError: If ``tokens`` are not one number per row.
            HiddenAttention: If the model's attention never showed its rows in some layer.
        """
        rows = state.visual.shape[0]
        check_rows(tokens, rows)
        if bool(state.visual.any()):
            check_shown(state.layers, [n for n, found in state.found.items() if found.steps])
        return [
            {
                "layers": list(state.layers),
                "sink_dims": list(state.sink_dims),
                "tau": self.tau,
                **self._of_row(state, row, None if tokens is None else tokens[row]),
            }
            for row in range(rows)
        ]

    def _of_row(self, state: _State, row: int, tokens: int | None) -> dict[str, Any]:
        """What was found in one row, whose answer has so many tokens (None: all that ran)."""
        img, at, visual = state.img[row].cpu(), state.at[row].cpu(), state.visual[row].cpu()
        where = [(img == image).nonzero()[:, 0] for image in range(int(img.max()) + 1)]
        record: dict[str, Any] = {"queries": 0, "keys": [len(positions) for positions in where]}
        record |= {"sinks": [], "phi": [], "attention": {kind: [] for kind in KINDS}}
        for layer in state.layers if where else ():
            found = state.found[layer]
            sinks = torch.zeros(len(img), dtype=torch.bool)
            sinks[at[found.marks[row, :, 1].bool().cpu()]] = True
            record["sinks"].append([sinks[at_].nonzero()[:, 0].tolist() for at_ in where])
            record["phi"].append(
                short(float(found.phi[row].cpu()[visual].amax())) if visual.any() else 0
            )
            steps = torch.stack([step[row] for step in found.steps[:tokens]]).cpu().double()
            record["queries"] = len(steps)
            for kind, share in zip(KINDS, steps.mean(0), strict=True):
                record["attention"][kind].append(short(float(share)))
        return record
