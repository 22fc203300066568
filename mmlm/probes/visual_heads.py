"""Visual heads: attention heads that look exactly at what the model is about to name.

Paper: "SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs", Wang et al., ICCV
2025, arXiv 2506.05344. Authors' code: CR400AF-A/SparseMM @f52655b (without a licence file),
``visual_head/llava_visual_head.py``; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlm.engine.head_scores import Region
from mmlm.engine.method import Paper, Prompt, Rows
from mmlm.engine.selections import read_numbers
from mmlm.errors import InputError
from mmlm.probes.layer_probe import LayerProbe, check_rows, check_shown, short

__all__ = ["VisualHeads", "scored"]

#: Of each row its regions, of each region the numbers of its image tokens.
Regions: TypeAlias = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass
class _State:
    """What is kept for one prompt.

    Attributes:
        layers: Those that are measured.
        number: int64 [B, N]; number of each image token within its row, -1 elsewhere.
        marks: fp32 [B, N, 1 + G]; the image, then each region: 1 or 0.
        regions: Those of each row.
        seen: Positions so far, by layer.
        peaks: Per layer int64 [B, H] for every token: position with the most attention.
        masses: Per layer fp32 [B, H, 1 + G] for every token.
    """

    layers: tuple[int, ...]
    number: Tensor
    marks: Tensor
    regions: Regions
    seen: dict[int, int] = field(default_factory=dict)
    peaks: dict[int, list[Tensor]] = field(default_factory=dict)
    masses: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VisualHeads(LayerProbe):
    """Measures which heads look at the image, and at which part of it, while each token is written.

    Idea:
        A few heads look exactly at the thing that is named next. Where they did not, the name came
        from elsewhere. Which heads they are is a property of the model.
    Paper:
        "SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs", arXiv 2506.05344,
        ICCV 2025.
    Equations:
        None is numbered in the sources read; from the code: a head's score grows by ``1 / |R|``
        where ``argmax_j r_j`` lies in R, the image tokens of what is named. Ours beside it:
        :class:`mmlm.engine.head_scores.RegionCounts`.
    Acts at:
        ``weights`` (looks, behind the edits of all other methods) of the row that produces each
        token, in the chosen layers.
    Cost:
        No extra forward. Per token and layer one row of attention weights is computed again.
        Memory: ``2 + G`` numbers per token and head for G regions; rows are not kept.
    Parameters:
        layers: Decoder layers, each >= 0. None: all.
        regions: For each row of the batch its regions, each as the numbers of its image tokens,
            counted from 0 over all images of the row. None (``()``): only the image as a whole.
        steps: Whether the record holds every token, and not only means over them. Which word
            belongs to which region is known once the answer is: :func:`scored`.
    Shapes:
        B rows, H query heads, R query rows, K keys, N prompt positions, G regions of a row.
    State:
        Per prompt: which position belongs to which region; peaks and sums of every token.
    Differs:
        Every grounded word counts, not only printed text; several boxes of a class are one region;
        the step is the one that produces the word's first token; base tiles count as tiles do.
        Rates are means over steps, so that pictures with different numbers of words compare.
    Limits:
        Beam search is refused, and so are methods that remove image positions. Row ends and
        separators of an image are image tokens that belong to no region.

    Raises:
        ValueError: for layers that the model does not have, or regions of another form.
        InputError: if the regions do not fit the prompts.

    Example:
        with VisualHeads(regions=(((3, 4, 11),),), steps=True)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title="SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs",
        arxiv="2506.05344",
        year=2025,
        venue="ICCV 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"weights"})
    needs_all_visual: ClassVar[bool] = True
    measures: ClassVar[str] = "visual_heads"

    regions: Regions = ()
    steps: bool = False

    def __post_init__(self) -> None:
        self._check_choice("steps", (True, False))
        super().__post_init__()
        try:
            rows = tuple(
                tuple(read_numbers("VisualHeads", "regions", region) for region in row)
                for row in self.regions
            )
        except TypeError as error:
            raise ValueError(
                "VisualHeads: regions must be numbers of image tokens, per region, per row, got "
                f"{self.regions!r}."
            ) from error
        object.__setattr__(self, "regions", rows)

    @property
    def rows(self) -> Rows:
        """The last row of each pass."""
        return "last"

    def begin(self, prompt: Prompt) -> _State:
        """Marks the image and the regions."""
        visual = prompt.layout.visual
        number = torch.where(visual, visual.long().cumsum(-1) - 1, -1)
        own = tuple(row for row in self.regions for _ in range(prompt.copies))
        if self.regions and len(own) != prompt.rows:
            raise InputError(
                f"VisualHeads: regions of {len(self.regions)} rows were given for "
                f"{prompt.rows // prompt.copies} prompts.",
                advice="Give one entry per prompt of the batch; () for a prompt without regions.",
            )
        most = max((len(row) for row in own), default=0)
        marks = torch.zeros(*visual.shape, 1 + most, device=visual.device)
        marks[..., 0] = visual
        tokens = visual.sum(-1).tolist()
        for row, regions in enumerate(own):
            for at, region in enumerate(regions, start=1):
                if region[-1] >= tokens[row]:
                    raise InputError(
                        f"VisualHeads: a region has image token {region[-1]}; prompt {row} has "
                        f"{tokens[row]} of them.",
                        advice="Image tokens are counted from 0.",
                    )
                marks[row, :, at] = torch.isin(number[row], number.new_tensor(region))
        return _State(self.layers_of(prompt.anatomy), number, marks, own)

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Notes the row's peak and its sums; changes nothing."""
        keys, before, n = a.shape[-1], state.seen.get(layer), state.number.shape[1]
        state.seen[layer] = keys
        if before is not None and keys != before + 1:  # a new turn: its answer begins
            state.peaks.pop(layer), state.masses.pop(layer)
        row = a[:, :, -1]
        # No more than needed while the model waits: what a peak is, is looked up in the end.
        state.peaks.setdefault(layer, []).append(row.argmax(-1))
        state.masses.setdefault(layer, []).append(torch.bmm(row[..., :n], state.marks))
        return None

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per row, in plain JSON.

        Returns:
            Dictionaries with ``layers``, ``tokens`` (rows that were measured), ``image_tokens``,
            ``regions`` (as given), ``looks`` and ``mass`` (per layer and head: share of tokens for
            which the peak lay on the image, and mean attention on it; None without tokens), and
            with ``steps`` also ``peaks`` [token][layer][head] (number of the image token, -1 for
            text), ``masses`` [token][layer][head] and ``region_masses`` [token][layer][head][g].

        Raises:
            ValueError: If ``tokens`` are not one number per row.
            HiddenAttention: If the model's attention never showed its rows in some layer.
        """
        n_rows = state.number.shape[0]
        check_rows(tokens, n_rows)
        if bool((state.number >= 0).any()):
            check_shown(state.layers, state.peaks)
        if not state.peaks:  # nobody has an image: nothing ran
            return [self._of_row(state, row, None, None) for row in range(n_rows)]
        peaks = torch.stack([torch.stack(state.peaks[n]) for n in state.layers], 2).cpu()
        peaks = _tokens_of(peaks, state.number.cpu())
        masses = torch.stack([torch.stack(state.masses[n]) for n in state.layers], 2).cpu()
        lengths = [len(peaks)] * n_rows if tokens is None else tokens
        return [
            self._of_row(state, row, peaks[:n, row], masses[:n, row].double())
            for row, n in enumerate(lengths)
        ]

    def _of_row(
        self, state: _State, row: int, peaks: Tensor | None, masses: Tensor | None
    ) -> dict[str, Any]:
        """The record of one row: peaks [n, N_l, H], masses [n, N_l, H, 1 + G]."""
        regions = state.regions[row] if state.regions else ()
        record: dict[str, Any] = {
            "layers": list(state.layers),
            "tokens": 0 if peaks is None else len(peaks),
            "image_tokens": int((state.number[row] >= 0).sum()),
            "regions": [list(region) for region in regions],
            "looks": None,
            "mass": None,
        }
        if peaks is None or masses is None or not len(peaks):
            return record
        record["looks"] = short((peaks >= 0).double().mean(0).tolist(), 7)
        record["mass"] = short(masses[..., 0].mean(0).tolist(), 7)
        if self.steps:
            record["peaks"] = peaks.tolist()
            record["masses"] = short(masses[..., 0].tolist(), 7)
            record["region_masses"] = short(masses[..., 1 : 1 + len(regions)].tolist(), 7)
        return record


def _tokens_of(
    peaks: Int[Tensor, "n B N_l H"], number: Int[Tensor, "B N"]
) -> Int[Tensor, "n B N_l H"]:
    """Numbers of the image tokens at some positions; -1 for text and for new tokens."""
    new = number.new_full((number.shape[0], 1), -1)
    known = torch.cat([number, new], dim=1)  # the last column stands for all new tokens
    at = peaks.clamp(max=number.shape[1])
    return known[torch.arange(len(known))[:, None, None], at]


def scored(record: Mapping[str, Any], words: Iterable[tuple[int, int]]) -> list[Region]:
    """What the rows saw that produced words with a region.

    Args:
        record: Of one row, with ``steps``.
        words: Per word the number of its first token, and that of its region.

    Raises:
        ValueError: If the record holds no steps, or not such a step or region.
    """
    if record["tokens"] and "peaks" not in record:
        raise ValueError("the record holds means only; measure with VisualHeads(steps=True)")
    found = []
    for step, number in words:
        if not (0 <= step < record["tokens"] and 0 <= number < len(record["regions"])):
            raise ValueError(
                f"there is no token {step} with region {number} among {record['tokens']} tokens "
                f"and {len(record['regions'])} regions"
            )
        region = torch.tensor(record["regions"][number])
        peak = torch.tensor(record["peaks"][step])
        found.append(
            Region(
                size=len(region),
                image=record["image_tokens"],
                hit=torch.isin(peak, region),
                looks=peak >= 0,
                mass=torch.tensor(record["region_masses"][step], dtype=torch.float64)[..., number],
                image_mass=torch.tensor(record["masses"][step], dtype=torch.float64),
            )
        )
    return found
