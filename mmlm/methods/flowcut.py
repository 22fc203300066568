"""FlowCut: patches leave the vision tower step by step, by how information flows.

Paper: "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
arXiv 2505.19536, NeurIPS 2025. Sources read: abstract and opening of the paper; the authors' code
(TungChintao/FlowCut, a2ecd24), which made the tables. Nothing is copied from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.layout import TokenLayout
from mmlm.engine.method import Paper, Prompt, Rows
from mmlm.engine.vision.patch_look import PatchLook
from mmlm.engine.vision.tower import feature_block, feature_blocks
from mmlm.methods.llm_cut import keep_visual, visual_scores
from mmlm.methods.patch_pruner import Newline, PatchPruner, Positions, keep_best
from mmlm.methods.patch_scores import attention_row, entropy, magnitude, similarity_row

__all__ = ["FlowCut", "block_scores", "drop_count"]


def block_scores(
    attention: Float[Tensor, "T P"],
    size: Float[Tensor, "T P"],
    similarity: Float[Tensor, "T P"] | None,
) -> Float[Tensor, "T P"]:
    """One block's score ``(A / sum A + E / sum E) M``; without similarity ``A M``.

    Args:
        attention: The row's attention A.
        size: Magnitudes M of the values.
        similarity: The class value's similarity E; None on towers without a class token.
    """
    if similarity is None:
        return attention * size
    return (_shares(attention) + _shares(similarity)) * size


def drop_count(
    there: Int[Tensor, " T"], target: int, remaining: int, spread: Float[Tensor, " T"]
) -> Int[Tensor, " T"]:
    """How many of each tile leave at a cut.

    ``round((N - K) / sqrt(R) (1 - Hn^2))``, half to even; everything above K where R = 0.

    Args:
        there: What is there, N.
        target: What shall be left, K.
        remaining: Blocks R that can still be followed by a cut.
        spread: Entropy of the attention divided by its largest value, Hn in [0, 1].
    """
    above = (there - target).clamp(min=0)
    if remaining == 0:
        return above
    share = (1 - spread.double().square()).clamp(min=0)
    count = (above.double() / math.sqrt(remaining) * share).round().long()
    return torch.minimum(count, above)


def _shares(x: Float[Tensor, "T P"]) -> Float[Tensor, "T P"]:
    """Rows divided by their sums; a row of zeros, all of it underflown, stays."""
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


@dataclass
class _Pass:
    """What is kept while pictures are in the tower."""

    anatomy: Anatomy
    scores: Tensor | None = None  # running mean, [T, patches before any left]


@dataclass
class _State:
    """What is kept of one prompt."""

    patches: Callable[[], list[list[list[int]]]]
    prompt: Prompt
    layout: TokenLayout
    scores: Tensor | None = None  # of visual positions in the decoder, -inf elsewhere
    kept: Tensor | None = None  # bool [B, N]: visual positions that stayed there


@dataclass(frozen=True, kw_only=True)
class FlowCut(PatchPruner):
    """Drops patches inside the vision tower, step by step between its blocks.

    Idea:
        The class token gathers what patches know and hands it back, so its attention is a cheap
        sign of how information flows. Redundancy appears block by block and one block ranks
        patches badly: so patches leave step by step, as many as the spread of the attention says,
        by a score that is averaged over blocks. The tower, the projector, the prefill and every
        cache become smaller. In long prompts a second cut follows in the decoder.
    Paper:
        "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
        arXiv 2505.19536, NeurIPS 2025.
    Equations:
        In a block, ``A`` = mean over heads of softmax(q_cls . k / sqrt(d)), ``E`` = mean over heads
        of softmax(v_cls . v), ``M`` = L1 norm of the heads' mean value (patch columns):
        ``s = (A / sum A + E / sum E) M`` (:func:`block_scores`); ``c = c / 2 + s / 2`` over blocks.
        After every second block, R blocks from the last possible cut,
        ``P = round((N - K) / sqrt(R) (1 - Hn^2))`` with ``Hn = H(A / sum A) / ln N``
        (:func:`drop_count`); what is above K leaves at the last one. The largest ``c`` stay.
        Decoder: ``s = (a + e) M`` over visual columns of the last row, both softmaxes scaled.
    Acts at:
        ``patches`` up to the block that makes the features; with ``llm_layer`` also ``scores`` of
        that layer's last prompt row (looks only) and ``tokens`` before the next.
    Cost:
        Negative. Two row products of 4 (P + 1) D FLOP per scored block, a mean over values; no
        extra projection, no matrix of P x P.
    Parameters:
        target: Patches kept of each tile, K >= 1; tiles with no more are left as they are. Default
            192 (authors, for LLaVA-1.5; theirs are 192, 128, 64). Counts patches, also where a
            model makes one feature of several (Qwen: 4).
        positions: "compact": numbers without gaps behind what left, in the decoder's cut too (the
            authors' LLaVA runs); "original": what stays keeps its numbers, which grounding needs.
            Default "auto" (ours): compact where positions have one axis and no window counts
            them, else original (the authors' Qwen runs).
        batch: "independent": each tile has its own number of drops (default, ours). "coupled":
            the largest of the batch for all (authors; what a picture keeps then depends on what
            stands beside it), for parity.
        llm_layer: Decoder layer, 0-based, after which a second cut follows; None: none (default).
            The authors use 1 for LLaVA-NeXT and Qwen2-VL.
        llm_target: Visual tokens of a row that go on from there, over all of its pictures, >= 1;
            with ``llm_layer`` only. Fewer than that are left as they are.
        unit: Patches that leave together. "auto": those of one image feature (default, ours); 4:
            blocks of 2 x 2; 1: single ones, the authors' rule, which in Qwen towers glues
            neighbouring survivors into features: for parity only.
        newline: Line ends of pictures of several tiles. "line": they stay while anything in their
            line does (default, ours); "authors": all go.
    Shapes:
        T tiles, S tokens and P patches of a tile; B rows, N positions, H heads, K columns.
    State:
        Per pass of pictures: running scores [T, P]. Per prompt: numbers of the patches that are
        left; with ``llm_layer`` the scores of visual positions.
    Differs:
        The code, not the paper's "cosine similarity", defines E; it made the tables. Entropies
        take 0 log 0 as 0. Several pictures are scored jointly in the decoder, by a mask. With a
        class token among the features ("full"), K counts patches beside it. For other feature
        layers the last cut stands one block before the one that makes the features; where there is
        no class token the mean query's row counts, ``s = A M``, and the last cut follows that
        block (authors, Qwen2-VL). Qwen2.5-VL: scored and cut only after blocks that see whole
        pictures and at the end. Merge units stay whole, by sums of scores.
    Limits:
        Pictures, no videos. Not beside methods that act on all patches in the tower, or that need
        all image positions. ``llm_layer`` refuses methods on attention rows behind that layer.

    Raises:
        ValueError: for a parameter out of range, a number that is no multiple of the unit, or
            features that the model reads before the last cut.
        UnknownTower: if the tower's queries, keys and values cannot be read.
        FloatingPointError: if a picture's states are not finite; names it.

    Example:
        with FlowCut(target=64)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            kept = [row["flowcut"]["kept"] for row in mmlm.measured(model)]  # by row, by tile
    """

    paper: ClassVar[Paper] = Paper(
        title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language "
        "Models",
        arxiv="2505.19536",
        year=2025,
        venue="NeurIPS 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"scores"})
    rewinds: ClassVar[bool] = True
    measures: ClassVar[str] = "flowcut"

    target: int = 192
    positions: Positions = "auto"
    batch: Literal["independent", "coupled"] = "independent"
    llm_layer: int | None = None
    llm_target: int | None = None
    unit: Literal["auto", 1, 4] = "auto"
    newline: Newline = "line"

    def __post_init__(self) -> None:
        self._check_shared("target")
        self._check_choice("batch", ("independent", "coupled"))
        self._check_choice("unit", ("auto", 1, 4))
        self._check_choice("newline", ("line", "authors"))
        if self.unit == 4 and self.target % 4:
            raise ValueError(
                f"FlowCut: with unit=4, target must be a multiple of 4, got {self.target}."
            )
        if (self.llm_layer is None) != (self.llm_target is None):
            raise ValueError(
                "FlowCut: give llm_layer and llm_target together, or neither; got "
                f"llm_layer={self.llm_layer}, llm_target={self.llm_target}."
            )
        if self.llm_layer is not None:
            self._check_integer("llm_layer", at_least=0)
            self._check_integer("llm_target", at_least=1)

    def neutral(self) -> FlowCut:
        """More than any tile has."""
        return type(self)(target=2**20)

    @property
    def budget(self) -> int:
        """``target``."""
        return self.target

    @property
    def sites(self) -> frozenset[str]:
        """The tower's, and the decoder's if there is a cut in it."""
        return super().sites - (frozenset() if self.cuts_decoder else {"scores", "tokens"})

    @property
    def cuts_decoder(self) -> bool:
        """Whether there is a second cut."""
        return self.llm_layer is not None

    @property
    def rows(self) -> Rows:
        """The last prompt row, for the second cut."""
        return "last" if self.cuts_decoder else "none"

    @property
    def line_ends(self) -> Literal["line", "all", "none"]:
        """The authors keep none in pictures of several tiles."""
        return "none" if self.newline == "authors" else "line"

    def chosen_unit(self, anatomy: Anatomy) -> int:
        """The unit in force on a model."""
        return anatomy.patches_per_feature if self.unit == "auto" else self.unit

    def last_cut(self, anatomy: Anatomy) -> int:
        """The block that the last cut follows."""
        return feature_block(anatomy) - int(anatomy.tower_has_cls)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Units that a model would break, a second cut behind its last layer; checks the rest.

        Raises:
            ValueError: If features are read before the last cut; see also the class.
        """
        reasons = super().unsupported(anatomy)
        own, unit, last = (
            anatomy.patches_per_feature,
            self.chosen_unit(anatomy),
            self.last_cut(anatomy),
        )
        early = [block for block in feature_blocks(anatomy) if block < last]
        if early:
            raise ValueError(
                f"{self.label}: the model reads features after tower blocks "
                f"{', '.join(map(str, early))}, before the last cut, which follows block {last}. "
                "Use a model that reads the last blocks only."
            )
        if last < 0:
            reasons.append("its vision tower has no block before the one that makes the features")
        packed = hasattr(anatomy.tower, "spatial_merge_size")
        glued = packed and not anatomy.tower_windows and self.target % own == 0
        glued = glued and not getattr(anatomy.tower, "deepstack_merger_list", None)
        if unit % own and not (unit == 1 and glued):
            reasons.append(
                f"it makes one image feature of {own} patches, which unit={self.unit} would break; "
                "unit='auto' keeps them whole"
            )
        if self.llm_layer is not None and self.llm_layer + 1 >= anatomy.n_layers:
            raise ValueError(
                f"FlowCut: llm_layer={self.llm_layer} leaves no layer behind the cut; the model "
                f"has {anatomy.n_layers}."
            )
        return reasons

    # ---- the tower ---------------------------------------------------------------------------

    def remaining(self, anatomy: Anatomy, block: int) -> int | None:
        """R if a cut follows ``block``, else None."""
        left = self.last_cut(anatomy) - block
        if left < 0:
            return None
        if anatomy.tower_windows:
            return left if block in anatomy.tower_windows or left == 0 else None
        return left if left % 2 == 0 else None

    def acts_in_tower(self, anatomy: Anatomy, block: int) -> bool:
        """Blocks up to the last cut; with windows those that see whole pictures, and the last."""
        if anatomy.tower_windows:
            return self.remaining(anatomy, block) is not None
        return block <= self.last_cut(anatomy)

    def begin_vision(self, anatomy: Anatomy) -> _Pass:
        """A place for the running scores."""
        return _Pass(anatomy)

    def patches(
        self, state: _Pass, block: int, x: Float[Tensor, "T S D"], look: PatchLook
    ) -> Int[Tensor, "tiles P"] | None:
        """Scores the block's patches; after every second block drops some."""
        if look.numbers.shape[1] <= self.target:  # reached, or never exceeded
            return None
        attention = None
        windows = state.anatomy.tower_windows
        if not windows or block in windows:
            attention = attention_row(look)
            likeness = similarity_row(look) if look.first else None
            self._average(state, look, block_scores(attention, magnitude(look), likeness))
        remaining = self.remaining(state.anatomy, block)
        if remaining is None or state.scores is None:
            return None
        scores = state.scores.gather(1, look.numbers.clamp(min=0)).masked_fill(~look.valid, 0)
        look.refuse_non_finite(scores)
        there = look.valid.sum(-1)
        spread = torch.ones_like(there, dtype=torch.float32)
        if attention is not None:
            held = entropy(_shares(attention)) if look.first else entropy(attention, floor=1e-7)
            spread = held / there.clamp(min=2).log()
        unit = self.chosen_unit(state.anatomy)
        leaves = drop_count(there // unit, self.target // unit, remaining, spread)
        if self.batch == "coupled":
            leaves = leaves.max().expand_as(leaves)
        stays = (there // unit - leaves).clamp(min=self.target // unit)
        return keep_best(look, scores, unit, stays)

    def _average(self, state: _Pass, look: PatchLook, scores: Float[Tensor, "T P"]) -> None:
        """Half of the old running score, half of the new; a patch keeps its own."""
        spare = max(look.sizes)  # takes what only fills up a row
        place = torch.where(look.valid, look.numbers, spare)
        if state.scores is not None:
            scores = 0.5 * state.scores.gather(1, place) + 0.5 * scores
        empty = scores.new_zeros(len(scores), spare + 1)
        state.scores = empty.scatter(1, place, scores)

    # ---- the decoder -------------------------------------------------------------------------

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The layer that is looked at and the next one."""
        return self.llm_layer is not None and layer in (self.llm_layer, self.llm_layer + 1)

    def acts_at(self, anatomy: Anatomy, site: str, layer: int) -> bool:
        """Looks at one layer and cuts before the next."""
        if self.llm_layer is None:
            return False
        return layer == self.llm_layer + (site == "tokens")

    def acts_now(self, state: _State, layer: int) -> bool:
        """The prompt's own pass."""
        return state.scores is None and bool(state.layout.visual.any())

    def begin(self, prompt: Prompt) -> _State:  # type: ignore[override]
        """Notes which patches are left, and where what is visual stands."""
        return _State(prompt.patches_kept(), prompt, prompt.layout)

    def scores(
        self,
        state: _State,
        layer: int,
        rows: Int[Tensor, "B R"],
        s: Float[Tensor, "B H R K"],
    ) -> None:
        """Scores the visual positions by the last row and its value."""
        if s.shape[-1] == state.layout.length:
            state.scores = visual_scores(s[:, :, -1], state.prompt.values(), state.layout.visual)

    def tokens(
        self, state: _State, layer: int, x: Float[Tensor, "B N D"]
    ) -> Int[Tensor, "B N"] | None:
        """The best visual positions of each row, and all others."""
        if state.scores is None or self.llm_target is None:
            return None
        keep, state.kept = keep_visual(
            state.scores, state.layout.visual, state.prompt.kept, self.llm_target
        )
        return keep

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """What each row kept: patches by tile, and visual tokens behind the decoder's cut."""
        found = super().record(state.patches, tokens)
        if state.kept is not None:
            for row, kept, visual in zip(found, state.kept, state.layout.visual, strict=True):
                row["llm_kept"] = kept[visual].nonzero().flatten().tolist()
        return found
