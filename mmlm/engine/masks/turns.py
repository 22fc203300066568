"""Turns of a conversation and earlier answers: what token ids alone do not tell.

A layout read from ids is one turn of prompt text. Two know more: a collator, which wrote the
conversation and hands its knowledge over with the batch (:data:`ROLES`), and the chat template,
whose fixed text is found again in the ids (:meth:`mmlm.engine.branches.template.Template.turns`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmlm.engine.branches.template import Template
from mmlm.engine.layout import ANSWER, PROMPT, TokenLayout
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["ROLES", "Handed", "encoded", "install_handing", "of_template", "wanted_turns"]

#: Name under which a collator hands the roles of a batch's positions over, int64 [B, N].
ROLES = "mmlm_roles"

_SAID, _BEHIND, _LEARNED, _TURN = 1, 2, 4, 8


def encoded(
    turn: Tensor, said: Tensor, *, behind: Tensor | None = None, learned: Tensor | None = None
) -> Tensor:
    """What a collator hands over, as one tensor, so that it is padded and packed like token ids.

    0 is prompt text of the first turn, which is right for padding too: that is known from the mask.

    Args:
        turn: Turn of each position, from 0 on in every conversation.
        said: Bool; the assistant's words, with the end token behind them.
        behind: Bool; tokens of the assistant's header behind its first one (default: unknown).
        learned: Bool; tokens with a label (default: none).

    Returns:
        int64, of the shape of ``turn``.
    """
    roles = turn.long() * _TURN + said.long() * _SAID
    if behind is not None:
        roles = roles + behind.long() * _BEHIND
    return roles if learned is None else roles + learned.long() * _LEARNED


@dataclass(frozen=True, eq=False)
class Handed:
    """What came with a batch beside the model's own inputs.

    Attributes:
        roles: What :func:`encoded` gave, or None.
        labels: The labels that the outer model was given, or None.
    """

    roles: Tensor | None = None
    labels: Tensor | None = None

    def told(self, layout: TokenLayout) -> TokenLayout:
        """A layout read from ids with turns and answers as they were handed over.

        Raises:
            LayoutError: If the shapes differ, or an image stands inside an answer.
        """
        roles = self.roles
        if roles is None:
            return layout
        if roles.shape != layout.seg.shape:
            raise LayoutError(
                f"{ROLES} has shape {tuple(roles.shape)}, the batch {tuple(layout.seg.shape)}.",
                advice="A collator hands one number over per token.",
            )
        roles = roles.to(layout.seg.device)
        said = (roles & _SAID) > 0
        if bool((said & layout.visual).any()):
            row, place = (said & layout.visual).nonzero()[0].tolist()
            raise LayoutError(
                f"{ROLES}: position {place} of row {row} is a picture's and the assistant's.",
                advice="Answers hold no pictures; check the collator.",
            )
        return replace(
            layout,
            seg=layout.seg.masked_fill(said & layout.real, ANSWER),
            turn=torch.div(roles, _TURN, rounding_mode="floor").to(layout.turn.dtype),
            behind=(roles & _BEHIND) > 0,
        )

    def supervised(self, layout: TokenLayout) -> Tensor | None:
        """Bool [B, N]: what is learned from the batch; None if nobody said."""
        found: Tensor | None = None
        if self.labels is not None and self.labels.shape == layout.seg.shape:
            found = self.labels != -100
        if self.roles is not None:
            learned = (self.roles & _LEARNED) > 0
            found = learned if found is None else found | learned
        return None if found is None else found.to(layout.seg.device)


def wanted_turns(session: Session) -> str:
    """The most that any method of a session wants to know about turns."""
    wishes = {method.turns for method in session.methods}
    return next((w for w in ("needed", "known") if w in wishes), "unread")


def install_handing(session: Session, stack: ExitStack) -> None:
    """Takes what a collator handed over out of the model's inputs, if a method asks for it.

    Twice: a wrapper may call the outer model's ``forward`` past its hooks, and what nobody took out
    then arrives at the inner model.

    Args:
        session: The attachment.
        stack: Takes everything back on exit.
    """
    if wanted_turns(session) == "unread":
        return

    def take(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if session.quiet:
            return None
        if module is session.anatomy.model:
            session.handed = Handed(None, kwargs.get("labels"))
        if ROLES not in kwargs:
            return None
        session.handed = Handed(kwargs[ROLES], session.handed.labels)
        return args, {name: value for name, value in kwargs.items() if name != ROLES}

    for module in (session.anatomy.model, session.anatomy.composite):
        stack.callback(module.register_forward_pre_hook(take, with_kwargs=True).remove)


def of_template(
    layout: TokenLayout,
    ids: Tensor | None,
    processor: Any,
    *,
    needed: bool,
    strange: Callable[[LayoutError], None],
) -> TokenLayout:
    """The layout of a prompt with its turns and earlier answers, read off the chat template.

    Args:
        layout: Read from ids: one turn of prompt text.
        ids: int [B, N]; None for a prompt of embeddings.
        processor: The model's, or None.
        needed: Whether not knowing is an error.
        strange: Told why a prompt is one turn; not called where no processor is known.

    Raises:
        LayoutError: If it is needed, and ids, processor or template are missing, or the template
            did not write the prompt, or it has no header of the assistant.
    """
    if ids is None or processor is None:
        if needed:
            Template.of(processor)  # says that no processor is known
            raise LayoutError("Turns cannot be read off embeddings.", advice="Pass input_ids.")
        return layout
    readable = layout.real & ~layout.visual & ~layout.frame
    turn, seg = torch.zeros_like(layout.turn), layout.seg.clone()
    behind = torch.zeros_like(layout.behind)
    memo: dict[tuple[int, ...], Any] = {}
    for row in range(layout.rows):
        line = tuple(ids[row].tolist())
        if line not in memo:  # beams begin alike
            try:
                template = Template.of(processor)
                memo[line] = template.turns(line, readable[row].tolist(), row, header=needed)
            except LayoutError as error:
                if needed:
                    raise
                strange(error)
                memo[line] = ([], [], [])
        answers, begins, headers = memo[line]
        for start, stop in answers:
            said = seg[row, start:stop] == PROMPT
            seg[row, start:stop] = torch.where(said, ANSWER, seg[row, start:stop])
        for column in begins:
            turn[row, column:] += 1
        for start, stop in headers:
            behind[row, start:stop] = True
    return replace(layout, seg=seg, turn=turn, behind=behind & (seg == PROMPT))
