"""DyVTE: all visual tokens leave the decoder once the text has read them.

Paper: "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the
Empirical Findings", Wu et al., NeurIPS 2025, arXiv 2411.19628.
Sources read: what is said about versions 1 and 2 and about the authors' code (DoubtedSteam/DyVTE,
commit b4a3396), and values that this code computed. The paper speaks of the mean of all text before
the last token; the code reads the text behind the image only, and so does this file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Method, Paper, Prompt
from mmlm.engine.selections import check_layers, read_numbers
from mmlm.methods.routers import NO_TEXT, RULES, Pooling, Routers

__all__ = ["DyVTE"]

#: Lowest threshold: odds of e^-1000 against an exit are as good as none.
_LOWEST = -1000.0


@dataclass(eq=False)
class _State:
    """What is kept for one prompt.

    Attributes:
        prompt: The prompt.
        routers: Of the layers that are asked, None for a fixed exit.
        pooling: What they read.
        has_image: bool [B].
        exits: int64 [B]; layer after which a row's visual tokens left, -1 for never.
        voted: bool [B]; rows whose router has fired.
        logits: By layer, [B, 2].
        is_open: Whether somebody may still exit.
        prefilled: Whether the prompt's first pass is over.
        later: How many later passes brought several positions at once, i.e. further turns, which
            meet upper layers without the first pictures.
    """

    prompt: Prompt
    routers: Routers | None
    pooling: Pooling
    has_image: Bool[Tensor, "B"]
    exits: Int[Tensor, "B"]
    voted: Bool[Tensor, "B"]
    logits: dict[int, Tensor] = field(default_factory=dict)
    is_open: bool = True
    prefilled: bool = False
    later: int = 0


@dataclass(frozen=True, kw_only=True)
class DyVTE(Method):
    """Removes all visual tokens after the layer at which a router says so.

    Idea:
        Lower layers move what the picture shows into the text tokens; from some layer on, which
        depends on the question, visual tokens add nothing. A small network per layer (router)
        looks at the text behind the image and decides whether all of them leave.
    Paper:
        "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the
        Empirical Findings", arXiv 2411.19628, NeurIPS 2025.
    Equations:
        After layer l, with x the residual stream of the text behind the image:
        ``z = W2 gelu(W1 [mean(x_1 .. x_t-1) ; x_t])``, exact GELU, no biases
        (:class:`mmlm.methods.routers.Router`); exit if ``z[1] - z[0] > threshold``, the first l
        that fires.
    Acts at:
        ``tokens`` of the layers behind a router, in the prompt's first pass; looks at the outputs
        of the last layer. Layers up to the exit hold keys and values of all positions, those above
        of the text only; positions are not renumbered.
    Cost:
        Two small matrix products per row and asked layer, once per prompt: 4 D * hidden + 4 *
        hidden FLOP (33.6 M per layer for D = 4096 with the paper's hidden width). It saves more:
        layers above the exit compute and cache nothing for the image.
    Parameters:
        weights_file: File of trained routers, as :func:`mmlm.engine.weights.store` writes it; ""
            for routers that are part of the model (``build_in``), or for a fixed exit. The file may
            hold routers of more layers than ``gate_layers``: only these are read.
        exit_layer: 0-based layer after which every prompt's visual tokens leave, without any
            router; None to ask. Our baseline; see :meth:`fixed`.
        gate_layers: Layers after which a router is asked, 0-based; None: all (paper). (): none,
            which is the neutral setting.
        hidden: Hidden width of the routers, at least 1. Default 2048 (paper): 16.8 M parameters
            per layer at D = 4096. 256 is eight times smaller and our advice for small models.
        min_layer: Nobody is asked before this layer. Default 0 (paper).
        max_layer: Nobody is asked after this layer; None: no limit (paper).
        threshold: Exit if the exit's logit exceeds the other by more than this, from -1000 up to
            infinity (never). Default 0.0 (paper: the larger of two logits).
        batch: "exact" (default, ours): each row exits on its own, shorter rows are padded, so a
            batch computes as much as its longest row. "split": the same, but rows that have left
            run apart from the others in every layer. "sync": all rows with an image exit together,
            when ``sync_share`` of them have voted; then an answer depends on its batch.
        split_min: "split": how many rows must have left, at least 1. Default 2 (ours).
        sync_share: "sync": share of the rows with an image, in (0, 1]. Default 1.0 (ours): all.
    Shapes:
        B rows, N positions, D width of the decoder.
    State:
        Per prompt: positions that are read, the exit of each row, the logits of each router.
    Differs:
        Batches, other templates, several images and tiles: visual is what the token ids say, not
        positions 35 to 610. All images of a row leave together, line ends included.
        Without text behind the last image the text behind the first one is read, else all text;
        the record says which. The prompt's last position makes the next token and stays, even if
        it is visual. One single text token is its own mean (the authors divide by zero).
        Decoding goes on if no router fires (theirs ends in an error). States are averaged in fp32.
        The router behind the last layer removes nothing; its exit is recorded, as theirs is.
        While the model is in training mode nothing leaves: an answer would be read as question.
    Limits:
        Routers are trained for one model; on another one accuracy may collapse. Static caches are
        refused: they hold all positions whatever leaves. ``output_hidden_states``: entries above
        an exit are shorter; ``output_attentions``: "split" gives two entries per layer. Methods
        that edit attention rows behind the first router are refused; beside "split" also those
        that act inside layers. Auxiliary prompts keep their pictures. A later turn on the same
        cache goes on with what the upper layers hold; the record counts them. A router whose
        answer would be NaN keeps. Not tested on a GPU, nor with flash kernels.

    Raises:
        ValueError: for a parameter out of range, a layer that the model does not have, or a file
            whose routers are not those of the asked layers or of another width.
        IncompatibleMethods: if routers are needed and there are none.
        NeedsDynamicCache: for a static cache.

    Example:
        with DyVTE(weights_file="routers.safetensors", hidden=256)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            exits = [record["dyvte"]["exit_layer"] for record in mmlm.measured(model)]
    """

    paper: ClassVar[Paper] = Paper(
        title="Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the "
        "Empirical Findings",
        arxiv="2411.19628",
        year=2025,
        venue="NeurIPS 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"layer_out"})
    rewinds: ClassVar[bool] = True
    measures: ClassVar[str] = "dyvte"

    weights_file: str = ""
    exit_layer: int | None = None
    gate_layers: tuple[int, ...] | None = None
    hidden: int = 2048
    min_layer: int = 0
    max_layer: int | None = None
    threshold: float = 0.0
    batch: Literal["exact", "split", "sync"] = "exact"
    split_min: int = 2
    sync_share: float = 1.0

    def __post_init__(self) -> None:
        self._check_integer("hidden", at_least=1)
        self._check_integer("min_layer", at_least=0)
        self._check_integer("split_min", at_least=1)
        self._check_number("sync_share", above=0, at_most=1)
        self._check_choice("batch", ("exact", "split", "sync"))
        if not isinstance(self.weights_file, str):
            raise ValueError(f"DyVTE: weights_file must be a path, got {self.weights_file!r}.")
        if self.max_layer is not None:
            self._check_integer("max_layer", at_least=self.min_layer)
        if self.exit_layer is not None:
            self._check_integer("exit_layer", at_least=0)
        if self.threshold != math.inf:
            self._check_number("threshold", at_least=_LOWEST)
        if self.gate_layers is not None:
            chosen = tuple(self.gate_layers) if _is_empty(self.gate_layers) else self.gate_layers
            layers = read_numbers("DyVTE", "gate_layers", chosen) if chosen != () else ()
            object.__setattr__(self, "gate_layers", layers)
        if self.exit_layer is not None and (self.weights_file or self.gate_layers is not None):
            raise ValueError(
                "DyVTE: give routers (weights_file, gate_layers) or exit_layer, not both."
            )

    @classmethod
    def fixed(cls, *, layer: int) -> DyVTE:
        """The same exit for every prompt, after ``layer``: what routers have to beat."""
        return cls(exit_layer=layer)

    def neutral(self) -> DyVTE:
        """Nobody is asked."""
        return type(self)(gate_layers=())

    @property
    def acts(self) -> bool:
        """Whether this setting can remove anything on some model."""
        return self.exit_layer is not None or self.gate_layers != ()

    @property
    def needs_dynamic_cache(self) -> bool:
        """Unless nothing leaves: a shorter cache is half of what is gained."""
        return self.acts

    @property
    def runs_apart(self) -> int | None:
        """In "split"."""
        return self.split_min if self.acts and self.batch == "split" else None

    def gates(self, n_layers: int) -> tuple[int, ...]:
        """The layers of a model of ``n_layers`` layers after which a router is asked.

        Raises:
            ValueError: If a given layer does not exist.
        """
        given = [x for x in (self.exit_layer, self.max_layer) if x is not None]
        check_layers("DyVTE", [*given, *(self.gate_layers or ())], n_layers)
        if self.exit_layer is not None:
            return ()
        chosen = range(n_layers) if self.gate_layers is None else self.gate_layers
        last = n_layers - 1 if self.max_layer is None else self.max_layer
        return tuple(layer for layer in chosen if self.min_layer <= layer <= last)

    def modules(self, anatomy: Anatomy) -> Routers | None:
        """One router per asked layer, Xavier initialised (the authors' choice)."""
        gates = self.gates(anatomy.n_layers)
        return Routers(gates, anatomy.width, self.hidden) if gates else None

    def read_from(
        self, shapes: Mapping[str, tuple[int, ...]], module: nn.Module
    ) -> Collection[str]:
        """The asked layers' routers; see :meth:`mmlm.methods.routers.Routers.check`."""
        assert isinstance(module, Routers)
        chosen = self.gate_layers is not None or self.min_layer > 0 or self.max_layer is not None
        return module.check(shapes, "DyVTE", every=not chosen)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Nothing beyond what every removal needs; checks the layers."""
        self.gates(anatomy.n_layers)
        return []

    def acts_at(self, anatomy: Anatomy, site: str, layer: int) -> bool:
        """Positions leave behind an asked layer or a fixed exit; the last layer is looked at."""
        gates = self.gates(anatomy.n_layers)
        if site == "layer_out":
            return self.acts and layer == anatomy.n_layers - 1
        return layer - 1 in ((self.exit_layer,) if self.exit_layer is not None else gates)

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Where it acts at one of its sites."""
        return any(self.acts_at(anatomy, site, layer) for site in sorted(self.sites))

    def begin(self, prompt: Prompt) -> _State | None:
        """Finds the text that the routers read."""
        if not self.acts or prompt.anatomy.model.training:
            return None
        routers = None
        if self.gates(prompt.anatomy.n_layers):
            routers = prompt.module(self)
            assert isinstance(routers, Routers)
            if routers.held:
                return None
        layout = prompt.layout
        has_image = layout.has_image()
        return _State(
            prompt=prompt,
            routers=routers,
            pooling=Pooling.of(layout.visual, layout.real & ~layout.visual),
            has_image=has_image,
            exits=torch.full_like(layout.last_row(), -1),
            voted=torch.zeros_like(has_image),
            is_open=bool(has_image.any()),
        )

    def tokens(
        self, state: _State | None, layer: int, x: Float[Tensor, "B N D"]
    ) -> Int[Tensor, "B n"] | None:
        """All columns, without the visual ones of rows that exit after the layer before."""
        if state is None:
            return None
        leaving = self._leaving(state, layer - 1, x)
        if leaving is None:
            return None
        kept = state.prompt.kept
        visual = state.prompt.layout.gather(kept).visual
        goes = visual & leaving[:, None]
        goes[:, -1] = False  # it makes the next token
        index = torch.arange(x.shape[1], device=x.device).expand_as(goes)
        return torch.where(goes, -1, index)

    def layer_out(self, state: _State | None, layer: int, x: Float[Tensor, "B L D"]) -> None:
        """Asks the router of the last layer, behind which nothing is left to remove."""
        if state is None or layer != state.prompt.anatomy.n_layers - 1:
            return
        if state.prefilled:
            state.later += x.shape[1] > 1
            return
        state.prefilled = True
        self._leaving(state, layer, x)

    def _leaving(
        self, state: _State, gate: int, x: Float[Tensor, "B N D"]
    ) -> Bool[Tensor, "B"] | None:
        """Rows that exit after layer ``gate``, or None if there are none."""
        if not state.is_open:
            return None
        if self.exit_layer is not None:
            if gate != self.exit_layer:
                return None
            leaving = state.has_image
        else:
            if state.routers is None or str(gate) not in state.routers:
                return None
            leaving = self._fires(state, gate, x)
            if not bool(leaving.any()):
                return None
        state.exits = torch.where(leaving & (state.exits < 0), gate, state.exits)
        state.is_open = bool((state.has_image & (state.exits < 0)).any())
        return leaving

    def _fires(self, state: _State, gate: int, x: Float[Tensor, "B N D"]) -> Bool[Tensor, "B"]:
        votes = self._votes(state, gate, x)
        copies = state.prompt.copies
        if copies > 1:  # beams differ in their last bits, and must not part here
            votes = votes[::copies].repeat_interleave(copies)
        votes = votes & state.has_image & (state.exits < 0)
        if self.batch != "sync":
            return votes
        state.voted = state.voted | votes
        share = state.voted.sum() / state.has_image.sum()
        return state.has_image & (share >= self.sync_share)

    @torch.no_grad()
    def _votes(self, state: _State, gate: int, x: Float[Tensor, "B N D"]) -> Bool[Tensor, "B"]:
        """Rows whose router says exit."""
        assert state.routers is not None
        z = state.routers.at(gate)(state.pooling.features(x, state.prompt.kept)).float()
        state.logits[gate] = z
        return (z[:, 1] - z[:, 0] > self.threshold) & (state.pooling.rule != NO_TEXT)

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """Per answer: exit layer (-1: never), rule, and logits of every router asked before it.

        Beams and several answers to one prompt share the prompt's record.

        Raises:
            ValueError: If the answers are no multiple of the prompts, nor the other way round.
        """
        rows = len(state.exits)
        wanted = rows if tokens is None else len(tokens)
        prompts = rows // state.prompt.copies
        if not wanted or (wanted % prompts and rows % wanted):
            raise ValueError(f"DyVTE: {wanted} numbers of tokens for {prompts} prompts.")
        exits, rules = state.exits.tolist(), state.pooling.rule.tolist()
        images = state.has_image.tolist()
        logits = {gate: z.tolist() for gate, z in state.logits.items()}
        found = []
        for row in (i * rows // wanted for i in range(wanted)):
            own = images[row] and self.exit_layer is None
            upto = exits[row] if exits[row] >= 0 else math.inf
            found.append(
                {
                    "exit_layer": exits[row],
                    "text": RULES[rules[row]] if own else "not asked",
                    "gate_logits": {
                        str(gate): z[row] for gate, z in logits.items() if own and gate <= upto
                    },
                    "later_turns": state.later,
                }
            )
        return found


def _is_empty(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and not values
