"""OPA-DPO's conditional term: the chosen answer must fit the picture better than a covered one.

Paper: "Mitigating Hallucinations in Large Vision-Language Models via DPO: On-Policy Data Hold the
Key" (OPA-DPO), Yang et al., CVPR 2025, arXiv 2501.09695.
Sources read: the authors' repository zhyang2226/OPA-DPO; no code is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from training.losses import ExtraLoss, Passes
from training.losses.pixels import change_pictures
from training.losses.shared import chosen_rows, random_stream, without_picture

__all__ = ["MaskedImage", "cover"]


def cover(picture: Tensor, generator: torch.Generator, ratio: float, block: int) -> Tensor:
    """The picture with a random share of its blocks in the picture's mean value.

    Args:
        picture: [C, H, W].
        generator: Of the draw.
        ratio: Share of blocks, in (0, 1]; the number is rounded down, but at least one.
        block: Side of a block in pixels, >= 1; blocks at the right and lower edge may be cut.
    """
    height, width = (-(-side // block) for side in picture.shape[-2:])
    count = max(1, int(height * width * ratio))
    covered = torch.zeros(height * width, dtype=torch.bool)
    covered[torch.randperm(height * width, generator=generator)[:count]] = True
    blocks = covered.view(height, 1, width, 1).expand(-1, block, -1, block)
    area = blocks.reshape(height * block, width * block)[: picture.shape[1], : picture.shape[2]]
    return torch.where(area.to(picture.device), picture.mean(), picture)


@dataclass(frozen=True, kw_only=True)
class MaskedImage(ExtraLoss):
    """Adds a preference between the picture and one that is covered in part.

    Idea:
        An answer that is as likely when a third of the picture is hidden comes from the language
        prior. So the same answer is compared under the picture v and the covered picture v'.
    Equations:
        ``-log sigma(beta (l_w(v) - l_w(v')))``, CoPO in the paper.
    Cost:
        One more pass of policy and reference, over the chosen answers.
    Parameters:
        weight: Factor on the term, > 0. Default 0.2 (authors' script).
        ratio: Share of the picture that is covered, in (0, 1]. Default 0.3 (authors' script).
        block: Side of the covered squares in pixels, >= 1. Default 1, single pixels, the script's
            "random"; 14 is its "blockwise".
    Differs:
        The authors weigh the tokens by scores of a judge, which our pairs do not have.
        Models that see a picture as tiles get every tile covered by the same share.
    Limits:
        Rows without a picture add a constant ln 2.

    Raises:
        ValueError: For a parameter out of range.
        UnsupportedModel: At the first step, see `training.losses.pixels`.
    """

    weight: float = 0.2
    ratio: float = 0.3
    block: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("ratio", above=0, at_most=1)
        self._check_integer("block", at_least=1)

    def __call__(self, passes: Passes) -> tuple[Tensor, dict[str, float]]:
        """The mean over chosen answers; logs ``masked/...``."""
        change = partial(
            cover,
            generator=random_stream(passes, "MaskedImage"),
            ratio=self.ratio,
            block=self.block,
        )
        covered = change_pictures(chosen_rows(passes.inputs), passes.config, change)
        loss, numbers = without_picture(passes, passes.ratios()[0], covered)
        return loss, {f"masked/{name}": value for name, value in numbers.items()}
