"""Settings under which a reference's log-probabilities are no constants that can be stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from mmlm.errors import InputError

if TYPE_CHECKING:
    from trl import DPOConfig

__all__ = ["CacheSettingsError", "check_cache_settings", "refuse_trl_cache"]


class CacheSettingsError(InputError, ValueError):
    """Settings under which the reference's values are no constants."""


def refuse_trl_cache(args: DPOConfig) -> None:
    """Points users of TRL's own cache to this one; to be called before TRL's constructor.

    Raises:
        CacheSettingsError: ``precompute_ref_log_probs`` is set.
    """
    if args.precompute_ref_log_probs:
        raise CacheSettingsError(
            "precompute_ref_log_probs=True is TRL's cache, which knows no pictures",
            advice="Leave it False and use training.preference.reference_cache.precompute_ref "
            "(reference_cache: true in a recipe).",
        )


def check_cache_settings(
    args: DPOConfig, model: nn.Module, extra_losses: Sequence[Any] = ()
) -> None:
    """Refuses settings under which stored sums are wrong or not enough.

    Args:
        args: of the trainer.
        model: that is trained; its reference is looked at.
        extra_losses: those of the trainer; each says ``needs_reference_tokens``.

    Raises:
        CacheSettingsError: the reference is updated (``sync_ref_model``), dropout makes its values
            random, or a loss needs the reference's value of every token.
    """
    refuse_trl_cache(args)
    if args.sync_ref_model:
        raise CacheSettingsError(
            "sync_ref_model=True changes the reference while training; stored values go stale",
            advice="Switch off either sync_ref_model or the reference cache.",
        )
    random = _dropouts(model)
    if random:
        raise CacheSettingsError(
            f"dropout is on in {len(random)} places ({', '.join(random[:3])} ...), so that the "
            "reference's values are random",
            advice="Leave disable_dropout=True (TRL's default) and attention_dropout at 0, or "
            "switch off the reference cache.",
        )
    needy = [type(one).__name__ for one in extra_losses if one.needs_reference_tokens]
    if needy:
        raise CacheSettingsError(
            f"{', '.join(needy)} needs the reference's log-probability of every token; stored are "
            "sums over a response",
            advice="Switch off the reference cache for this loss.",
        )


def _dropouts(model: nn.Module) -> list[str]:
    """Names of all places where something is dropped at random."""
    kinds = (nn.modules.dropout._DropoutNd,)
    found = [n for n, m in model.named_modules() if isinstance(m, kinds) and m.p > 0]
    # Attention drops weights inside a function, which TRL's disable_dropout does not reach.
    for name, module in model.named_modules():
        rates = (module.__dict__.get(key) for key in ("attention_dropout", "dropout"))
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            found.append(name)
    return found
