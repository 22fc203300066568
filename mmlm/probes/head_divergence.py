"""Vision-aware head divergence: which heads change their output when the image is removed.

Paper: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
He et al., ACL 2025, arXiv 2412.13949. Sources read: paper v3 with appendices A-G. The method that
amplifies such heads is VHR; this only measures them, in every layer, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.branches.branch import NoImage
from mmlm.engine.divergence import divergence, text_activation
from mmlm.engine.method import IN_BRANCHES, Cost, Paper, Prompt
from mmlm.probes.layer_probe import LayerProbe, short

__all__ = ["HeadDivergence"]

_NAMES = ("vhd", "relative", "text_activation")


@dataclass(frozen=True)
class _State:
    """What is kept for one prompt.

    Attributes:
        layers: Those that are measured.
        copies: How often each prompt stands in the batch: beams.
        has_image: Bool [B].
        without: fp32 [B, H, d] by layer; outputs of the heads without the image.
        vhd: fp32 [B, H] by layer.
        size: The same for the sum of both outputs' norms.
    """

    layers: tuple[int, ...]
    copies: int
    has_image: Tensor
    without: Mapping[int, Tensor]
    vhd: dict[int, Tensor] = field(default_factory=dict)
    size: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HeadDivergence(LayerProbe):
    """Measures how far the output of every attention head moves when the image is removed.

    Idea:
        Only some heads react to the image. Those that do not cannot ground a word in it.
    Paper:
        "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        arXiv 2412.13949, ACL 2025.
    Equations:
        (4) ``VHD = || A(image, text) - A(text) ||_2`` at the last position of the prompt.
    Acts at:
        ``heads`` (looks; before the gains of other methods in the same layer, behind their edits
        of attention) at the prefill.
    Cost:
        One extra prefill of the text without its image per prompt, up to the last chosen layer;
        no extra forward per token. Memory: B * H * d numbers per layer.
    Parameters:
        layers: Decoder layers, each >= 0. None: all.
    Shapes:
        B rows, L new positions, H query heads, d head size.
    State:
        Per prompt: outputs of the heads without the image, and their divergence.
    Differs:
        The relative divergence, VHD over the sum of both norms, is ours: outputs grow with depth,
        so plain VHD cannot be compared across layers.
        A divergence below rounding error counts as zero.
    Limits:
        A row without an image has no divergence. Beside VHR the layers behind a reinforced one are
        measured with it reinforced.

    Raises:
        ValueError: for layers that the model does not have.
        UnsupportedModel: if the model has no output projection per layer.

    Example:
        with HeadDivergence()(model):
            ids = model.generate(**inputs, max_new_tokens=1)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        arxiv="2412.13949",
        year=2025,
        venue="ACL 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"heads"})
    rewinds: ClassVar[bool] = True
    measures: ClassVar[str] = "head_divergence"

    @property
    def cost(self) -> Cost:
        """One text-only row."""
        return Cost(prompt=1)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs a prompt without its image, to which every method that is built in applies."""
        from mmlm.engine.build_in import built_in

        super().unsupported(anatomy)
        return [
            f"{method.label} is built in and knows the main prompt only, so heads without the "
            "image cannot be compared"
            for method in built_in(anatomy.model)
            if method.sites - method.only_looks - IN_BRANCHES
        ]

    def begin(self, prompt: Prompt) -> _State:
        """Runs the text-only prefill and keeps its head outputs."""
        layers, has_image = self.layers_of(prompt.anatomy), prompt.layout.has_image()
        without: Mapping[int, Tensor] = {}
        if bool(has_image.any()):
            without = prompt.run(NoImage(), heads=layers).heads
        return _State(layers, prompt.copies, has_image, without)

    def heads(
        self, state: _State, layer: int, y: Float[Tensor, "B L H d"]
    ) -> Float[Tensor, "B 1 H 1"] | None:
        """Compares the heads at the end of the prompt; changes nothing."""
        if layer in state.without and layer not in state.vhd:
            last, without = y[:, -1].float(), state.without[layer]
            moved = divergence(last, without, y.dtype)
            state.vhd[layer] = moved.masked_fill(~state.has_image[:, None], 0)
            state.size[layer] = last.norm(dim=-1) + without.norm(dim=-1)
        return None

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per answer, in plain JSON; beams of a prompt share the prompt's.

        Returns:
            Dictionaries with ``layers``, and per layer and head ``vhd``, ``relative`` (VHD over the
            sum of both norms, in [0, 1]) and ``text_activation`` (squared norm without the image).
            A row without an image has empty lists in their place.

        Raises:
            ValueError: If the answers are no multiple of the prompts, nor the other way round.
        """
        rows = state.has_image.shape[0]
        wanted, prompts = rows if tokens is None else len(tokens), rows // state.copies
        if not wanted or (wanted % prompts and rows % wanted):
            raise ValueError(f"Got {wanted} numbers of tokens for {prompts} rows.")
        found = _measured(state) if state.vhd else {}
        has_image = state.has_image.tolist()
        return [
            {"layers": list(state.layers)}
            | {n: short(found[n][row].tolist()) if has_image[row] else [] for n in _NAMES}
            for row in (i * rows // wanted for i in range(wanted))
        ]


def _measured(state: _State) -> dict[str, Float[Tensor, "B layers H"]]:
    """What is recorded, by name."""
    active = {layer: text_activation(y) for layer, y in state.without.items()}
    vhd, size, activation = (
        torch.stack([found[layer] for layer in state.layers], dim=1).cpu()
        for found in (state.vhd, state.size, active)
    )
    relative = vhd / size.clamp(min=torch.finfo(size.dtype).tiny)
    return dict(zip(_NAMES, (vhd, relative, activation), strict=True))
