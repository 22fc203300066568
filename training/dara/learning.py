"""What may learn: DARA's factors and nothing else, and images for all of which there is a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError
from training.sft.rows import Conversation

if TYPE_CHECKING:
    from mmlm.methods.dara import DARA

__all__ = ["WrongParameters", "built_dara", "factor_names", "refuse_images", "refuse_others"]


class WrongParameters(InputError, ValueError):  # noqa: N818
    """Something else than what was asked for would learn, or nothing; names what."""


def built_dara(model: Any) -> DARA | None:
    """The DARA that is built into a model, if one is."""
    from mmlm.engine.build_in import built_in
    from mmlm.methods.dara import DARA

    return next((m for m in built_in(model) if isinstance(m, DARA)), None)


def factor_names(model: Any) -> list[str]:
    """Names of the factors among the parameters of a model, wrapped by PEFT or not."""
    return [n for n, _ in model.named_parameters() if "mmlm_methods.DARA." in n]


def refuse_others(model: Any, *, train_only_dara: bool) -> None:
    """Refuses a model in which nothing learns, or more than DARA although only that shall.

    Raises:
        WrongParameters: With the names of three parameters that would learn.
    """
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    if not learning:
        raise WrongParameters(
            "Nothing learns: the model has 0 parameters with a gradient.",
            advice="Give model.methods: ['DARA()'] and model.learns: [methods], or model.lora.",
        )
    own = set(factor_names(model))
    others = [name for name in learning if name not in own]
    if train_only_dara and others:
        raise WrongParameters(
            f"train_only_dara is set, but {len(others)} other parameters would learn: "
            f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}.",
            advice="Give model.learns: [methods] without lora and DARA as the only method with "
            "weights, or train_only_dara: false to compare with.",
        )


def refuse_images(method: DARA | None, rows: Sequence[Conversation]) -> None:
    """Refuses rows whose number of images has no slots, before the first step.

    Raises:
        WrongParameters: Names the row, how many images it has, and S.
    """
    if method is None:
        return
    from mmlm.methods.dara import place_images

    for row in rows:
        count = len(row.images)
        if count and place_images(count, method.images, method.align, method.overflow) is None:
            raise WrongParameters(
                f"{row.place}: the episode {row.id!r} has {count} images, and {method.label} has "
                f"factors for S = {method.images}.",
                advice="Give DARA(images=shots + 1), or align and overflow.",
            )
