"""MMA: image tokens see the question that comes after them."""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from mmlm.engine.layout import ANSWER, PROMPT, VISUAL, TokenLayout
from mmlm.engine.method import Method, Paper
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.method import Prompt

__all__ = ["MMA", "rows_without_question"]

_log = logging.getLogger(__name__)
#: Models whose causal training was remarked on.
_REMARKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: Rows of a model whose images stood before no text of their prompt.
_UNASKED: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class MMA(Method):
    """Modality-mutual attention: image tokens also see the question behind.

    Idea:
        Under a causal mask an image in front of its question is read in the same way whatever is
        asked. One rectangle of the mask is opened: queries of image tokens may see the prompt text
        of their turn that comes later. Image tokens among themselves, text and answers stay
        causal. A model must be trained with it (``model: {methods: ["MMA()"]}`` in a recipe).

    Paper:
        "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for
        Multimodal LLMs", arXiv 2503.02597. Read with the authors' code (sony/aki, c764231).

    Equations:
        With i a query, j a key, and g the base rule (causal, or the model's own)::

            allow(i, j) = (g(i, j) or rect(i, j)) and doc_i = doc_j and j is no padding
            rect(i, j)  = i is visual, j is prompt text, j > i, and scope(i, j)

        ``scope``: ``turn_i = turn_j`` ("turn"); j stands before the first answer of the document
        ("first"); always ("all_prompts"). With ``symmetric`` also i prompt text and j visual.

    Acts at:
        ``mask``, in every decoder layer, for passes over more than one position.

    Cost:
        No parameters, no further pass, no longer cache. The prefill runs under a mask: one of
        B * N * N bytes for sdpa, of blocks for flex, none for flash kernels, whose attention is
        computed in two parts (``mmlm/engine/masks/split_attention.py``).

    Parameters:
        scope: Which prompt text an image sees. "turn" (default, ours) equals the authors' mask for
            one image and one question and is right for conversations; "first" is the authors' for
            several turns: only the first question is seen; "all_prompts" (ours) lets an image see
            later questions, so that at most one turn may be learned from; "none" opens nothing
            (neutral).
        prompt_end: Where the prompt ends. "header" (default, ours): with the assistant's header,
            which is known at inference; "marker" (the authors'): with the header's first token.
        symmetric: Whether text also sees images of its turn that come later: the paper's formula
            for interleaved input, which the authors' code does not have. False or True; default
            False, as in their code.

    Shapes:
        The rule takes int64 tensors b, q, k that broadcast against each other, and gives a bool
        tensor of their common shape.

    State:
        None. How many rows had an image and no question is counted per model
        (:func:`rows_without_question`).

    Differs:
        The authors' code finds one image and one marker by hard-coded ids, crashes on two images
        in a row, loses the padding of batches while generating, and holds integers in its mask.
        Here several images, turns, videos, packed rows, padding on either side, beams and static
        caches work, the mask is bool, and windows and documents bound it. The authors do not let
        an image see what follows the marker; ``prompt_end="marker"`` does as they do.

    Limits:
        An image's keys and values depend on the question: a cached prefix with an image is wrong
        for another question, and so is a prompt in chunks. Turns are told by the collator, or by
        the chat template of a known processor; without either a prompt is one turn, in which
        images would also see answers given after them. Attaching it to a model that was trained
        causally is an ablation that nobody has tested; it is logged.

    Raises:
        ValueError: If a parameter is none of its values.
        LayoutError: If a token that is learned could be seen by an image (the model would read its
            target), more than one turn is learned under "all_prompts", a later turn would change
            images that are in the cache already, or the marker is wanted and not known.
        UnsupportedAttention: If the decoder is not causal, reads its prompt both ways anyway
            (PaliGemma), or its kernel can be told no mask; a ValueError too.

    Example:
        with attach(model, MMA()):
            model.generate(**inputs)
    """

    paper: ClassVar[Paper] = Paper(
        title="Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention "
        "for Multimodal LLMs",
        arxiv="2503.02597",
        year=2026,
        venue="ICML 2026 (as the authors' repository says)",
    )
    rewinds: ClassVar[bool] = True

    scope: Literal["turn", "first", "all_prompts", "none"] = "turn"
    prompt_end: Literal["header", "marker"] = "header"
    symmetric: bool = False

    def __post_init__(self) -> None:
        self._check_choice("scope", ("turn", "first", "all_prompts", "none"))
        self._check_choice("prompt_end", ("header", "marker"))
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"MMA: symmetric must be False or True, got {self.symmetric!r}.")

    def neutral(self) -> Self:
        """Nothing is opened."""
        return type(self)(scope="none")

    @property
    def turns(self) -> Literal["unread", "known", "needed"]:
        """Which text belongs to which turn decides what is opened."""
        if self.scope == "none":
            return "unread"
        return "needed" if self.prompt_end == "marker" else "known"

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Families that read their whole prompt both ways."""
        if anatomy.family.prefix and self.scope != "none":
            return ["it reads its whole prompt both ways, so its images see the question already"]
        return []

    def begin(self, prompt: Prompt) -> None:
        """Counts images that nothing is asked about, and remarks on models trained without this."""
        if self.scope == "none":
            return
        model, layout = prompt.anatomy.model, prompt.layout
        with_image = layout.has_image()
        alone = int((with_image & ~self.opened_keys(layout).any(-1)).sum())
        if alone:
            if model not in _UNASKED:
                warnings.warn(
                    f"{self.label}: {alone} of {layout.rows} rows have an image and no prompt text "
                    "of its turn behind it, so nothing is opened there. They are counted "
                    "(mmlm.methods.mma.rows_without_question).",
                    stacklevel=2,
                )
            _UNASKED[model] = _UNASKED.get(model, 0) + alone
        if model not in _REMARKED:
            _REMARKED.add(model)
            from mmlm.engine.build_in import built_in

            if self not in built_in(model):
                _log.warning(
                    "%s is attached to a model that does not say it was trained with it: opening "
                    "the mask of a causal model is an untested ablation.",
                    self.label,
                )

    def mask(self, state: Any, layout: TokenLayout) -> Callable[..., Tensor] | None:
        """The rectangle, None where there is no image."""
        if self.scope == "none" or not bool(layout.visual.any()):
            return None
        seg, told, scope = layout.seg, self._told(layout), self._scope(layout)

        def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            where = (seg[b, q] == VISUAL) & told[b, k]
            if self.symmetric:
                where = where | (told[b, q] & (seg[b, k] == VISUAL))
            return where & (k > q) & scope(b, q, k)

        return rule

    def check_supervised(self, layout: TokenLayout, supervised: Bool[Tensor, "B N"]) -> None:
        """Refuses batches whose targets an image would show to the tokens that predict them."""
        if self.scope == "none":
            return
        leaks = self.opened_keys(layout) & supervised
        if bool(leaks.any()):
            row, place = leaks.nonzero()[0].tolist()
            raise LayoutError(
                f"{self.label}: position {place} of row {row} is learned and can be seen by an "
                "image before it, through which the model would read its target.",
                advice="Learn from answers only: prompts (and headers of the assistant) need the "
                "label -100.",
            )
        if self.scope == "all_prompts":
            self._refuse_several_turns(layout, supervised)

    def _refuse_several_turns(self, layout: TokenLayout, supervised: Tensor) -> None:
        """Earlier answers would be learned behind images that have seen later questions."""
        for row in range(layout.rows):
            learned = supervised[row]
            documents, turns = layout.doc[row][learned], layout.turn[row][learned]
            for document in documents.unique().tolist():
                found = turns[documents == document].unique().tolist()
                if len(found) > 1:
                    raise LayoutError(
                        f"{self.label}: turns {found} of row {row} are learned, but its images see "
                        "the questions of all turns.",
                        advice="Use scope='turn', or learn from the last answer only.",
                    )

    def opened_keys(self, layout: TokenLayout) -> Bool[Tensor, "B N"]:
        """Prompt text that some image before it sees."""
        visual, told = layout.visual, self._told(layout)
        group = layout.doc.long()
        if self.scope == "turn":
            group = group * (int(layout.turn.max()) + 1) + layout.turn.long()
        elif self.scope == "first":
            told = told & (_index(layout) < _first_answer(layout))
        # Turns and documents are stretches of a row: count images since the stretch began.
        new = torch.ones_like(visual)
        new[:, 1:] = group[:, 1:] != group[:, :-1]
        seen = visual.long().cumsum(-1)
        before = torch.where(new, seen - visual.long(), 0).cummax(-1).values
        return told & (seen > before)

    def _told(self, layout: TokenLayout) -> Bool[Tensor, "B N"]:
        """Prompt text that may be opened at all."""
        told = layout.seg == PROMPT
        return told & ~layout.behind if self.prompt_end == "marker" else told

    def _scope(self, layout: TokenLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if self.scope == "turn":
            turn = layout.turn
            return lambda b, q, k: turn[b, q] == turn[b, k]
        if self.scope == "first":
            first = _first_answer(layout)
            return lambda b, q, k: k < first[b, q]
        return lambda b, q, k: k >= 0


def rows_without_question(model: nn.Module) -> int:
    """How many rows a model met in which an image stood before no text of its prompt.

    Args:
        model: The Hugging Face model itself, out of wrappers.
    """
    return _UNASKED.get(model, 0)


def _index(layout: TokenLayout) -> Tensor:
    return torch.arange(layout.length, device=layout.seg.device).expand_as(layout.seg)


def _first_answer(layout: TokenLayout) -> Tensor:
    """int64 [B, N]: where the first answer of each position's document begins; N without one."""
    places = torch.where(layout.seg == ANSWER, _index(layout), layout.length)
    document = layout.doc.long() + 1  # padding is -1
    first = places.new_full((layout.rows, int(document.max()) + 1), layout.length)
    first = first.scatter_reduce(1, document, places, "amin")
    return first.gather(1, document)
