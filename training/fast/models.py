"""Which models a fast path may work on, and where their parts are."""

from __future__ import annotations

from typing import Any

from mmlm.engine.anatomy import Anatomy, unwrap
from mmlm.engine.attach import MARK
from training.errors import FastPathRefused

__all__ = ["PRUNING", "anatomy_of", "methods_of", "vision_parameters"]

#: The advice of trl-dpo's contract, word for word: users search for it.
PRUNING = "disable visual token pruning for preference training"


def anatomy_of(model: Any) -> Anatomy:
    """The parts of a model inside its DDP, DeepSpeed and PEFT wrappers."""
    from accelerate.utils import extract_model_from_parallel

    return Anatomy(unwrap(extract_model_from_parallel(model, recursive=True)))


def methods_of(anatomy: Anatomy) -> tuple[Any, ...]:
    """The mmlm methods that run on a model now, built in or attached."""
    session = getattr(anatomy.model, MARK, None)
    return () if session is None else session.methods


def refuse_sites(anatomy: Anatomy, path: str, sites: frozenset[str], why: str) -> None:
    """Refuses models with a method at one of ``sites``.

    Args:
        anatomy: The model.
        path: Name of the fast path.
        sites: Names of sites.
        why: What these sites and the path disagree about.

    Raises:
        FastPathRefused: If there is one.
    """
    for method in methods_of(anatomy):
        found = sorted(method.sites & sites)
        if {"tokens", "visual_tokens"} & set(found):
            raise FastPathRefused(
                f"{path}: {method.label} removes visual tokens ({', '.join(found)}): {PRUNING}.",
                advice="Take the method out, or switch this path off.",
            )
        if found:
            raise FastPathRefused(
                f"{path}: {method.label} acts at {', '.join(found)}, {why}.",
                advice="Switch this path off, or take the method out.",
            )


def vision_parameters(anatomy: Anatomy) -> dict[str, Any]:
    """Parameters of everything below the inner model but the text decoder: tower, projector, ..."""
    text = {id(p) for p in anatomy.text.parameters()}
    named = anatomy.composite.named_parameters()
    return {name: p for name, p in named if id(p) not in text}
