"""mDPO: the chosen answer must fit the picture better than a cropped one, and must not lose.

Paper: "mDPO: Conditional Preference Optimization for Multimodal Large Language Models", Wang et
al., EMNLP 2024, arXiv 2406.11839.
Sources read: the paper and the authors' repository luka-group/mDPO; no code is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from training.losses import ExtraLoss, Passes
from training.losses.pixels import change_pictures
from training.losses.shared import chosen_rows, compare, random_stream, without_picture

__all__ = ["MDPO", "crop"]


def crop(picture: Tensor, generator: torch.Generator, smallest: float, largest: float) -> Tensor:
    """A random part of the picture, as large as the picture.

    The share of the area is uniform in [smallest, largest], the aspect ratio log-uniform in
    [3/4, 4/3], the place uniform: torchvision's `RandomResizedCrop`, as in the authors' code.

    Args:
        picture: [C, H, W].
        generator: Of the draws.
        smallest: Share of the area, > 0.
        largest: Likewise, <= 1.
    """
    from torchvision.transforms.v2 import RandomResizedCrop

    cropper = RandomResizedCrop(tuple(picture.shape[-2:]), scale=(smallest, largest))
    seed = int(torch.randint(2**31, (), generator=generator))
    # torchvision draws from torch's global generator and takes no other.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cropper(picture.float()).to(picture)


@dataclass(frozen=True, kw_only=True)
class MDPO(ExtraLoss):
    """Adds a preference between pictures, and an anchor, to the preference between answers.

    Idea:
        DPO on pictures learns much from the text alone. So the same answer is compared under the
        picture v and under a crop v' that shows little of it. The anchor keeps the chosen answer
        from getting less likely, which DPO alone allows as long as the rejected one falls faster.
    Equations:
        The main loss is DPO. ``L_CoPO = -log sigma(beta (l_w(v) - l_w(v')))`` and
        ``L_AncPO = -log sigma(beta l_w - delta)``, delta = 0; this class is
        ``weight * (conditional * L_CoPO + anchor * L_AncPO)``. All factors 1 give the paper's sum.
    Cost:
        One more pass of policy and reference, over the chosen answers.
    Parameters:
        weight: Factor on the term, > 0. Default 1.
        conditional: Factor on the preference between pictures, >= 0. Default 1.
        anchor: Factor on the anchor, >= 0. Default 1.
        smallest: Smallest share of the area that a crop shows, in (0, 1]. Default 0.01 (authors).
        largest: Largest share, in [smallest, 1]. Default 0.2 (authors).
    Differs:
        Models that see a picture as tiles get a crop of every tile.
    Limits:
        Rows without a picture add a constant ln 2 to the conditional term.

    The authors train with beta 0.1, learning rate 1e-5, LoRA 64 / 128, 3 epochs.

    Raises:
        ValueError: For a parameter out of range.
        UnsupportedModel: At the first step, see `training.losses.pixels`.
    """

    conditional: float = 1.0
    anchor: float = 1.0
    smallest: float = 0.01
    largest: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("conditional", at_least=0)
        self._check_number("anchor", at_least=0)
        self._check_number("smallest", above=0, at_most=1)
        self._check_number("largest", at_least=self.smallest, at_most=1)

    def __call__(self, passes: Passes) -> tuple[Tensor, dict[str, float]]:
        """The two terms; logs ``mdpo/...``."""
        chosen, _ = passes.ratios()
        cropped = change_pictures(chosen_rows(passes.inputs), passes.config, self._crop(passes))
        picture, numbers = without_picture(passes, chosen, cropped)
        anchored = compare(chosen, 0.0, passes.beta)
        log = {f"mdpo/{name}": value for name, value in numbers.items()}
        log |= {"mdpo/conditional": picture.item(), "mdpo/anchor": anchored.item()}
        return self.conditional * picture + self.anchor * anchored, log

    def _crop(self, passes: Passes) -> Callable[[Tensor], Tensor]:
        return partial(
            crop,
            generator=random_stream(passes, "MDPO"),
            smallest=self.smallest,
            largest=self.largest,
        )
