"""Visual attention sinks: tokens with massive activations in a few fixed dimensions.

Paper: "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
Kang et al., ICLR 2025, arXiv 2503.03321. The method that acts on sinks is `decoding.var`; the
probe that only measures them is `mmlm.probes.visual_sinks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy

__all__ = [
    "EPS",
    "KNOWN_SINK_DIMS",
    "known_sink_dims",
    "no_sink_dims",
    "phi",
    "reasons_without_sinks",
]

EPS = 1e-6
"""Added to the mean square inside phi, and to each visual weight in VAR's head test (code)."""

#: Sink dimensions by base language model: names of checkpoints, width, dimensions.
#: Who says so: LLaMA-2-7B code and notes, LLaMA-2-13B code, the others a note on the paper only.
KNOWN_SINK_DIMS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("llava-1.5-7b-hf llava-v1.5-7b llava-v1.6-vicuna-7b-hf", 4096, (1415, 2533)),
    ("vicuna-7b-v1.5 llama-2-7b llama-2-7b-hf llama-2-7b-chat-hf", 4096, (1415, 2533)),
    ("llava-1.5-13b-hf llava-v1.5-13b llava-v1.6-vicuna-13b-hf", 5120, (2100, 4743)),
    ("vicuna-13b-v1.5 llama-2-13b llama-2-13b-hf llama-2-13b-chat-hf", 5120, (2100, 4743)),
    ("qwen2-vl-7b qwen2-vl-7b-instruct", 3584, (458, 2570)),
    ("internvl2-8b internvl2-8b-hf", 4096, (3584,)),
)


def phi(x: Float[Tensor, "*B D"], sink_dims: Sequence[int]) -> Float[Tensor, "*B"]:
    """How far a state stands out in the sink dimensions: their largest |x| over the RMS of x.

    It cannot exceed the square root of the width D.
    """
    x = x.float()
    rms = (x.square().mean(-1) + EPS).sqrt()
    return x[..., list(sink_dims)].abs().amax(-1) / rms


def known_sink_dims(anatomy: Anatomy) -> tuple[int, ...] | None:
    """The published sink dimensions of a model, by the name of it or of its language model.

    Looks at the last part of the names in the configuration, and at the width; None if no name is
    in :data:`KNOWN_SINK_DIMS`.
    """
    configs = (anatomy.config, anatomy.config.get_text_config())
    names = {PurePath(config.name_or_path).name.lower() for config in configs}
    for known, width, dims in KNOWN_SINK_DIMS:
        if width == anatomy.width and names.intersection(known.split()):
            return dims
    return None


def no_sink_dims(anatomy: Anatomy) -> str:
    """Says that nothing is known about a model's sink dimensions, and what to do."""
    name = anatomy.config.name_or_path or anatomy.family_name
    return (
        f"no sink dimensions are known for {name!r}; `mmlm calibrate sink-dims` finds them "
        "(decoding.var.find_sink_dims), then give sink_dims=(...)"
    )


def reasons_without_sinks(
    name: str, sink_dims: tuple[int, ...] | None, tau: float, anatomy: Anatomy
) -> list[str]:
    """Why a setting finds no sinks in a model; empty if it can.

    Args:
        name: The method that is set so.
        sink_dims: Dimensions of the states. None: those published for the base model.
        tau: Least phi of a sink.
        anatomy: The model.

    Raises:
        ValueError: If the model has no such dimension.
    """
    reasons = []
    if sink_dims is not None and max(sink_dims) >= anatomy.width:
        raise ValueError(
            f"{name}: sink_dims must be below the model's width {anatomy.width}, got {sink_dims!r}."
        )
    if sink_dims is None and known_sink_dims(anatomy) is None:
        reasons.append(no_sink_dims(anatomy))
    if tau >= anatomy.width**0.5:
        reasons.append(
            f"tau is {tau:g}, but phi never exceeds {anatomy.width**0.5:.1f}, the square "
            f"root of the width {anatomy.width}: there would be no sink; give a smaller tau"
        )
    return reasons
