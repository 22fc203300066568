"""SwapMix on features: what the decoder gets for some image tokens comes from another picture.

Paper: Gupta et al., "SwapMix: Diagnosing and Regularizing the Over-Reliance on Visual Context in
Visual Question Answering", arXiv 2204.02285 (CVPR 2022). Sources read: the abstract, and the
authors' code (vipulgupta1011/swapmix, no licence file: nothing is copied).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Method, Paper, Prompt
from mmlm.errors import InputError, LayoutError

__all__ = ["FeatureSwap", "Move"]

Move: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name of the donor's tensor, and numbers of image tokens: those that are replaced, and of the
donor's those that take their places, one for one."""


@dataclass
class _State:
    """What is kept for one prompt.

    Attributes:
        prompt: Tells which pass is running.
        row: int64 [n]; row of each replaced position.
        column: int64 [n]; its position.
        new: [n, D]; what takes its place.
    """

    prompt: Prompt
    row: Int[Tensor, "n"]
    column: Int[Tensor, "n"]
    new: Float[Tensor, "n D"]


@dataclass(frozen=True, kw_only=True)
class FeatureSwap(Method):
    """Replaces the features of some image tokens by those of another picture.

    Idea:
        An object that a question is not about is replaced by another one. The right answer stays;
        a model whose answer moves has leaned on the object.
    Paper:
        "SwapMix: Diagnosing and Regularizing the Over-Reliance on Visual Context in Visual Question
        Answering", arXiv 2204.02285, CVPR 2022.
    Equations:
        ``x[r, p_i] = d[q_i]`` for image tokens ``p_i`` of row r's first picture, d the donor's
        features.
    Acts at:
        ``layer_in`` of layer 0, in a prompt's first pass.
    Cost:
        No extra forward. Memory: the features of the donors in use.
    Parameters:
        donors: A safetensors file with one tensor [tokens, D] for each donor picture.
        moves: One entry for each row of the batch, or one for all rows: name of the donor,
            replaced tokens, the donor's tokens. An entry without tokens leaves its row alone.
    Shapes:
        B rows, L positions, D width of the decoder.
    State:
        Per prompt: rows, positions, and their new features.
    Differs:
        The paper replaces the feature of a detected box. A patch has no box: all tokens that show
        the object are replaced. The features are those before the first decoder layer; attention
        inside the vision tower has spread the old object over the picture before, so less is
        measured than by painting the picture again.
    Limits:
        The first picture of each row. Features that models feed to inner layers are left alone.

    Raises:
        ValueError: for moves that are not of this form, or have not as many new as old tokens.
        InputError: if the file lacks a donor or cannot be read.
        LayoutError: if there are not as many moves as rows, or a token is not there.

    Example:
        with FeatureSwap(donors="features.safetensors", moves=(("17", (4, 5), (40, 41)),))(model):
            ids = model.generate(**inputs)
    """

    paper: ClassVar[Paper] = Paper(
        title="SwapMix: Diagnosing and Regularizing the Over-Reliance on Visual Context in Visual "
        "Question Answering",
        arxiv="2204.02285",
        year=2022,
        venue="CVPR 2022",
    )
    needs_all_visual: ClassVar[bool] = True

    donors: str = ""
    moves: tuple[Move, ...] = ()

    def __post_init__(self) -> None:
        for name, old, new in self.moves:
            if not isinstance(name, str) or len(old) != len(new) or len(set(old)) != len(old):
                raise ValueError(
                    f"FeatureSwap: moves must be (donor, old tokens, as many new tokens), each old "
                    f"token once; got {(name, old, new)!r}."
                )
            if any(not isinstance(i, int) or i < 0 for i in (*old, *new)):
                raise ValueError(f"FeatureSwap: moves must have tokens >= 0, got {(old, new)!r}.")
        if self._acts and not self.donors:
            raise ValueError("FeatureSwap: donors must name a file where anything is moved.")

    @property
    def _acts(self) -> bool:
        return any(old for _, old, _ in self.moves)

    def neutral(self) -> FeatureSwap:
        """Nothing is moved."""
        return FeatureSwap()

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The first layer, if anything is moved."""
        return layer == 0 and self._acts

    def begin(self, prompt: Prompt) -> _State | None:
        """Finds the positions of the replaced tokens, and reads what takes their places."""
        if not self._acts:
            return None
        moves = self._of_rows(prompt)
        first = (prompt.layout.img == 0) & prompt.layout.visual
        rows, columns, new = [], [], []
        read = _reader(self.donors)
        for row, (name, old, donor) in enumerate(moves):
            if not old:
                continue
            places = first[row].nonzero()[:, 0]
            features = read(name)
            _check_tokens(row, old, len(places), "its first picture")
            _check_tokens(row, donor, len(features), f"the donor {name!r}")
            rows.append(torch.full((len(old),), row, dtype=torch.long))
            columns.append(places[list(old)].cpu())
            new.append(features[list(donor)])
        device = prompt.layout.seg.device
        parts = (torch.cat(rows), torch.cat(columns), torch.cat(new))
        return _State(prompt, *(part.to(device) for part in parts))

    def _of_rows(self, prompt: Prompt) -> tuple[Move, ...]:
        given = prompt.rows // prompt.copies
        moves = self.moves * given if len(self.moves) == 1 else self.moves
        if len(moves) != given:
            raise LayoutError(
                f"FeatureSwap has {len(moves)} moves for {given} rows.",
                advice="Give one for each row, or one for all.",
            )
        return tuple(move for move in moves for _ in range(prompt.copies))

    def layer_in(
        self, state: _State, layer: int, x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"] | None:
        """The prompt's states with the new features in them."""
        if state.prompt.past:
            return None
        if x.shape[-1] != state.new.shape[-1]:
            raise LayoutError(
                f"The donors have {state.new.shape[-1]} numbers per token, the model "
                f"{x.shape[-1]}.",
                advice="Take features of this very model.",
            )
        x = x.clone()
        x[state.row, state.column] = state.new.to(x.dtype)
        return x


def _check_tokens(row: int, tokens: tuple[int, ...], count: int, what: str) -> None:
    if max(tokens) >= count:
        raise LayoutError(
            f"Row {row}: there is no token {max(tokens)}; {what} has {count}.",
            advice="Number image tokens from 0, in the order of the prompt.",
        )


def _reader(path: str) -> Any:
    """Reads one donor after the other from a file, each once."""
    from safetensors import SafetensorError, safe_open

    known: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in known:
            try:
                with safe_open(path, framework="pt") as file:
                    known[name] = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"The donor {name!r} is not in {path!r}: {error}.",
                    advice="Give the file that `mmlm bench swapmix --level features` wrote.",
                ) from error
        return known[name]

    return read
