"""Turns and answers of a conversation, for methods that must tell them apart (MMA).

A collator wrote the conversation, so it knows; a method reads it with the batch
(`mmlm.engine.masks.turns`). Batches of models without such methods stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mmlm.errors import InputError, LayoutError

if TYPE_CHECKING:
    from torch import Tensor

    from training.sft.rows import Conversation

__all__ = [
    "ROLES",
    "Turns",
    "refuse_other_masks",
    "refuse_several_answers",
    "roles_of_ids",
    "roles_of_spans",
    "turns_of",
]

Turns: TypeAlias = Literal["unread", "known", "needed"]
"""What the methods of a model ask for, see `mmlm.Method.turns`."""

ROLES = "mmlm_roles"
"""As `mmlm.engine.masks.turns.ROLES`; importing that would cost seconds."""


def turns_of(model: Any) -> Turns:
    """What the methods that are built into a model ask for."""
    from mmlm.engine.build_in import built_in

    wishes = {method.turns for method in built_in(model)}
    return next((w for w in ("needed", "known") if w in wishes), "unread")  # type: ignore[return-value]


def roles_of_spans(
    offsets: Tensor,
    labels: Tensor,
    spans: Sequence[tuple[int, int]],
    headers: Sequence[tuple[int, int] | None],
) -> Tensor:
    """What is handed over for one conversation whose answers' characters are known.

    Args:
        offsets: Start and end of each token's characters [n, 2].
        labels: -100 where nothing is learned [n].
        spans: Start and end of every answer.
        headers: Likewise of the assistant's header before each; empty if nobody asks for them.

    Returns:
        int64 [n].

    Raises:
        InputError: If an answer has no header of its own.
    """
    import torch

    from mmlm.engine.masks.turns import encoded

    first, last = offsets.unbind(-1)
    index = torch.arange(len(first))
    turn, said = torch.zeros_like(index), torch.zeros_like(index, dtype=torch.bool)
    behind = torch.zeros_like(said)
    for n, (start, stop) in enumerate(spans):
        own = (first < stop) & (last > start)
        said |= own
        places = own.nonzero()[:, 0]
        after = int(places[-1]) + 1 if len(places) else int(((first < stop) & (last > 0)).sum())
        turn[after:] += 1
        if headers:
            begins = places[0] if len(places) else after
            behind |= _behind_marker(first, last, headers[n], index < begins)
    learned = labels != -100
    return encoded(turn, said, behind=behind, learned=learned)


def _behind_marker(
    first: Tensor, last: Tensor, header: tuple[int, int] | None, before: Tensor
) -> Tensor:
    """Tokens of a header behind its first one."""
    tokens = (first < header[1]) & (last > header[0]) & before if header else before & False
    if not bool(tokens.any()):
        raise InputError(
            "The chat template writes no header of the assistant of its own before an answer, so "
            "its first token (the marker) is not known.",
            advice="Use MMA(prompt_end='header').",
        )
    marker = int(tokens.nonzero()[0])
    behind = tokens.clone()
    behind[marker] = False
    return behind


def roles_of_ids(
    processor: Any, ids: Sequence[int], start: int, *, image_ids: Sequence[int], turns: Turns
) -> list[int]:
    """What is handed over for an answer behind a prompt, whose turns the chat template tells.

    Args:
        processor: The model's.
        ids: Of prompt, context and answer.
        start: Where the learned answer begins.
        image_ids: Ids of pictures.
        turns: What is asked for.

    Raises:
        InputError: If the chat template did not write the prompt.
    """
    import torch

    from mmlm.engine.branches.template import Template
    from mmlm.engine.masks.turns import encoded

    pictures = set(image_ids)
    readable = [token not in pictures for token in ids]
    try:
        answers, begins, headers = Template.of(processor).turns(
            ids, readable, 0, header=turns == "needed"
        )
    except LayoutError as error:
        raise InputError(f"The turns of a row are not known: {error}", advice=error.advice) from (
            error
        )
    index = torch.arange(len(ids))
    said, behind = index >= start, torch.zeros_like(index, dtype=torch.bool)
    for first, stop in answers:
        said |= (index >= first) & (index < stop)
    for first, stop in headers:
        behind |= (index >= first) & (index < stop)
    turn = torch.stack([index >= column for column in begins]).sum(0) if begins else index * 0
    return encoded(turn, said, behind=behind & ~said, learned=index >= start).tolist()


def refuse_several_answers(model: Any, rows: Sequence[Conversation]) -> None:
    """Refuses conversations from which a method of the model cannot learn; before any work.

    Raises:
        LayoutError: If images see the questions of all turns and a row has several answers.
    """
    from mmlm.engine.build_in import built_in
    from mmlm.methods.mma import MMA

    wide = [m for m in built_in(model) if isinstance(m, MMA) and m.scope == "all_prompts"]
    for row in rows if wide else ():
        answers = sum(message["role"] == "assistant" for message in row.messages)
        if answers > 1:
            raise LayoutError(
                f"{row.place}: row {row.id!r} has {answers} answers to learn from, but under "
                f"{wide[0].label} its images see the questions of all turns.",
                advice="Use MMA(scope='turn'), or split the row into one per answer.",
            )


def refuse_other_masks(policy: Any, reference: Any) -> None:
    """Refuses a reference model that sees other things than the policy.

    Raises:
        ValueError: If methods that open attention masks are built into one and not the other.
    """
    from mmlm.engine.anatomy import unwrap
    from mmlm.engine.build_in import built_in

    both = [
        tuple(m.text for m in built_in(unwrap(model)) if "mask" in m.sites)
        for model in (policy, reference)
    ]
    if both[0] != both[1]:
        names = [" + ".join(texts) or "none" for texts in both]
        raise ValueError(
            f"The policy opens its attention masks by {names[0]}, the reference by {names[1]}: "
            "their log-probabilities would differ for a reason that nobody learns. Build the same "
            "methods into both (model.methods in a recipe does)"
        )
