"""Vision-aware head divergence: how much a head's output depends on the image.

Paper: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
He et al., ACL 2025, arXiv 2412.13949. The method that acts on it is `decoding.vhr`; the probe that
only measures it is `mmlm.probes.head_divergence`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["divergence", "drop_negative_outliers", "text_activation"]


def divergence(
    with_image: Float[Tensor, "B H d"],
    without: Float[Tensor, "B H d"],
    computed_in: torch.dtype | None = None,
) -> Float[Tensor, "B H"]:
    """VHD of each head (Eq. 4): how far its output moves when the image is removed.

    A distance below the rounding error of the outputs counts as zero: heads that ignore the image
    would otherwise be ranked by noise.

    Args:
        with_image: Outputs of the heads at the last position of the prompt.
        without: The same with the image removed.
        computed_in: The precision in which the model computed them, if coarser than that of the
            numbers.
    """
    distance = (with_image - without).norm(dim=-1)
    size = with_image.norm(dim=-1) + without.norm(dim=-1)
    eps = max(torch.finfo(dtype or size.dtype).eps for dtype in (computed_in, size.dtype))
    return distance.masked_fill(distance <= 4 * eps * size, 0)


def text_activation(without: Float[Tensor, "B H d"]) -> Float[Tensor, "B H"]:
    """TA of each head: its squared output without the image."""
    return without.square().sum(-1)


def drop_negative_outliers(
    vhd: Float[Tensor, "B H"], activation: Float[Tensor, "B H"], *, unbiased: bool = True
) -> Float[Tensor, "B H"]:
    """Zeroes the VHD of heads that stand out in both VHD and text activation (Eq. 6).

    Args:
        vhd: Head divergence.
        activation: Text activation.
        unbiased: Standard deviation over the H heads with divisor H - 1 instead of H.
    """

    def stands_out(x: Tensor) -> Tensor:
        deviation = x.std(dim=-1, keepdim=True, correction=int(unbiased))
        return x > x.mean(dim=-1, keepdim=True) + deviation

    return vhd.masked_fill(stands_out(vhd) & stands_out(activation), 0)
