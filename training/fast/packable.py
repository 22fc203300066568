"""Which models may run pairs in packed rows."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.masks.kinds import FULL, SLIDING, kinds
from mmlm.engine.method import SITES
from training.errors import FastPathRefused
from training.fast.models import refuse_sites

__all__ = ["refuse_dropout", "refuse_model", "refuse_prompt_learning"]

#: Sites that edit each position for itself; the first pass shows whether a method keeps to that.
_SITES = frozenset(SITES) - {"layer_in", "heads", "mlp", "layer_out"}
_KERNELS = ("sdpa", "eager", "flex_attention")


def refuse_model(anatomy: Anatomy) -> None:
    """Raises for models that cannot be packed exactly, as they are set now."""
    config = anatomy.text.config
    implementation = (config._attn_implementation or "eager").removeprefix("mmlm_rows_")
    if implementation not in _KERNELS:
        raise FastPathRefused(
            f"shared_prefix: attention {implementation!r} takes no mask that keeps two answers "
            f"apart; {', '.join(_KERNELS)} do.",
            advice="model.set_attn_implementation('sdpa'), or switch shared_prefix off.",
        )
    unknown = [kind for kind in kinds(config) if kind not in (FULL, SLIDING)]
    if unknown or not getattr(config, "is_causal", True):
        raise FastPathRefused(
            f"shared_prefix: the text decoder of {anatomy.family_name} has "
            f"{', '.join(unknown) or 'no causal'} layers.",
            advice="Switch shared_prefix off for this model.",
        )
    refuse_sites(anatomy, "shared_prefix", _SITES, "which may let one answer act on the other")


def refuse_dropout(anatomy: Anatomy) -> None:
    """Raises if dropout is on: plain rows would draw it for each answer."""
    dropout = getattr(anatomy.text.config, "attention_dropout", 0.0) or 0.0
    rates = [m.p for m in anatomy.text.modules() if isinstance(m, nn.Dropout)]
    rate = max([dropout, *rates])
    if rate > 0:
        raise FastPathRefused(
            f"shared_prefix: dropout {rate} is on, of which the two answers of a plain batch have "
            "different draws.",
            advice="Set disable_dropout=True (TRL's default) and attention_dropout=0.",
        )


def refuse_prompt_learning(model: Any) -> None:
    """Raises for adapters that put tokens in front of the rows."""
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise FastPathRefused(
                f"shared_prefix: adapter {name!r} ({config.peft_type}) puts tokens of its own in "
                "front of every row.",
                advice="Use LoRA, or switch shared_prefix off.",
            )
