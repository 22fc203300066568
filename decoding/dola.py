"""DoLa: decoding by contrasting layers.

Paper: "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
Chuang et al., ICLR 2024, arXiv 2309.03883.
Sources read: the paper and the authors' repository voidism/DoLa for its candidate layers and for
what it does differently from the paper; no code is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.branches.branch import Branch
from mmlm.engine.method import Cost, Method, Paper, Prompt
from mmlm.engine.selections import read_numbers

__all__ = ["DoLa", "bucket_layers", "contrast", "divergence", "premature"]

_DEEP = 40  # above this many layers a bucket is 20 layers wide instead of half of them


def bucket_layers(n_layers: int, bucket: Literal["low", "high"], tied: bool) -> tuple[int, ...]:
    """The candidates of a bucket: every second layer of the lower or upper half (Sec. 4.1).

    Counted as in the paper: 0 is the embedding, ``l`` the output of the l-th layer, ``n_layers``
    the mature one. 32 layers: 0, 2, .., 14 and 16, 18, .., 30; 40 layers: 0, 2, .., 18 and
    20, 22, .., 38. Deeper models get the outer 20 layers, as transformers 4 chose.

    Args:
        n_layers: Number of decoder layers.
        bucket: The lower or the upper half.
        tied: Whether embedding and head are one matrix. Then an exit from the embedding only
            returns the token just read, so the lower bucket begins at 2.
    """
    width = n_layers // 2 if n_layers <= _DEEP else _DEEP // 2
    if bucket == "low":
        return tuple(range(2 if tied else 0, width, 2))
    return tuple(range(n_layers // 2 if n_layers <= _DEEP else n_layers - width, n_layers, 2))


def divergence(
    mature: Float[Tensor, "B V"], early: Float[Tensor, "C B V"], *, swapped: bool = False
) -> Float[Tensor, "C B"]:
    """Jensen-Shannon divergence of each candidate from the last layer (Sec. 2.2), in nats.

    Args:
        mature: Log-probabilities of the last layer.
        early: Log-probabilities of the candidates.
        swapped: Both Kullback-Leibler terms the other way round, as in the authors' code:
            ``KL(mixture || p)`` instead of ``KL(p || mixture)``.
    """
    p, q = mature.exp(), early.exp()
    mixture = 0.5 * (p + q)
    log_mixture = mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
    if swapped:
        terms = mixture * (log_mixture - 0.5 * (mature + early))
    else:
        terms = 0.5 * (p * (mature - log_mixture) + q * (early - log_mixture))
    return terms.sum(-1)


def premature(
    distance: Float[Tensor, "C B"],
    active: Bool[Tensor, "B"],
    *,
    whole_batch: bool = False,
) -> Int[Tensor, "B"]:
    """Number of the candidate that is farthest from the last layer (Eq. 2), one per row.

    Args:
        distance: Divergence of the candidates.
        active: Rows that count where the whole batch shares one layer.
        whole_batch: One candidate for all rows, by the mean over rows, as in the authors' code.
    """
    if not whole_batch:
        return distance.argmax(0)
    mean = (distance * active).sum(-1)
    return mean.argmax().expand(distance.shape[1])


def contrast(
    z: Float[Tensor, "B V"], early: Float[Tensor, "B V"], strength: float
) -> Float[Tensor, "B V"]:
    """Delta on the main logits (Eq. 3): ``log p_N - log p_M - z`` at strength 1.

    Args:
        z: Raw logits of the last layer.
        early: Log-probabilities of the premature layer M.
        strength: Factor of the delta.
    """
    return -strength * (z.logsumexp(-1, keepdim=True) + early)


@dataclass(frozen=True)
class _State:
    """What is kept for one prompt: the last position of each candidate, step by step."""

    anatomy: Anatomy
    candidates: tuple[int, ...]
    active: Tensor
    exits: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DoLa(Method):
    """Subtracts what an earlier layer would already have said.

    Idea:
        Facts enter a language model in its later layers. Dividing the last layer's distribution by
        that of the earlier layer which differs most from it keeps what the later layers added.
    Paper:
        "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
        arXiv 2309.03883, ICLR 2024.
    Equations:
        (2) ``M = argmax over candidates of JSD(p_N, p_l)``: :func:`divergence`,
        :func:`premature`.
        (3) ``z' = log p_N - log p_M``: :func:`contrast`.
        (4) tokens with ``p_N < relative_top * max p_N`` are cut:
        :func:`mmlm.engine.combine.edit_logits`.
    Acts at:
        ``layer_in`` of layer 0 and ``layer_out`` of the candidates (both only look), ``logits``;
        every step, prefill and decode.
    Cost:
        No extra row. One more norm and head projection per candidate and token, of the last
        position only. Memory: C * B * V numbers while a token is chosen.
    Parameters:
        strength: Factor of the contrast, >= 0. Default 1.0 (the paper has no such factor).
            Neutral 0.
        relative_top: Plausibility cut, in [0, 1]. Default 0.1 (paper). Neutral 0.
        bucket: Which half of the layers is tried, "low" or "high", see :func:`bucket_layers`.
            Default "low", the paper's choice for long answers; it takes "high" for short ones.
        candidates: Layers instead of a bucket, 0 for the embedding and l for the output of the
            l-th layer; below the number of layers. Default None.
        exit_norm: Whether an early state passes the model's last norm before its head. Default
            True (ours); the authors' code projects it as it is.
        swapped_divergence: The two Kullback-Leibler terms the other way round, as in the authors'
            code. Default False (paper).
        one_layer_per_batch: One premature layer for all rows, by the mean divergence, as in the
            authors' code. Default False: each row its own.
    Shapes:
        B rows, L new positions, D width, C candidates, V vocabulary.
    State:
        C * B * D numbers: the candidates' states at the last position.
    Differs:
        The authors' code skips the last norm for early exits, swaps the divergence and chooses one
        layer per batch, so that a row's answer depends on its neighbours:
        ``DoLa.authors_code()`` restores all three.
        The paper proposes a repetition penalty of 1.2 beside the method; pass it to ``generate``.
        Made for language models; rows without an image are left alone here.
    Limits:
        Needs no image branch, so it runs on every supported model.

    Raises:
        ValueError: for a parameter out of range or a candidate that the model does not have.

    Example:
        with DoLa(bucket="low")(model):
            ids = model.generate(**inputs, repetition_penalty=1.2)
    """

    paper: ClassVar[Paper] = Paper(
        title="DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
        arxiv="2309.03883",
        year=2024,
        venue="ICLR 2024",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"layer_in", "layer_out"})

    strength: float = 1.0
    relative_top: float = 0.1
    bucket: Literal["low", "high"] = "low"
    candidates: tuple[int, ...] | None = None
    exit_norm: bool = True
    swapped_divergence: bool = False
    one_layer_per_batch: bool = False

    def __post_init__(self) -> None:
        self._check_number("strength", at_least=0)
        self._check_number("relative_top", at_least=0, at_most=1)
        self._check_choice("bucket", ("low", "high"))
        for name in ("exit_norm", "swapped_divergence", "one_layer_per_batch"):
            self._check_choice(name, (True, False))
        if self.candidates is not None:
            object.__setattr__(
                self, "candidates", read_numbers("DoLa", "candidates", self.candidates)
            )

    @classmethod
    def for_model(cls, anatomy: Anatomy, bucket: Literal["low", "high"] = "low") -> DoLa:
        """The paper's setting for a model, with the layers spelled out.

        The paper's table: LLaMA-7B 0, 2, .., 14 or 16, 18, .., 30; LLaMA-13B 0, 2, .., 18 or
        20, 22, .., 38. Other depths by :func:`bucket_layers`.
        """
        return cls(candidates=cls(bucket=bucket).chosen_layers(anatomy))

    @classmethod
    def long_answers(cls) -> DoLa:
        """The lower bucket: the paper's choice for reasoning and long texts."""
        return cls(bucket="low")

    @classmethod
    def short_answers(cls) -> DoLa:
        """The upper bucket: the paper's choice for TruthfulQA."""
        return cls(bucket="high")

    @classmethod
    def authors_code(cls, bucket: Literal["low", "high"] = "low") -> DoLa:
        """What the authors' code computes where it differs from the paper."""
        return cls(
            bucket=bucket, exit_norm=False, swapped_divergence=True, one_layer_per_batch=True
        )

    def neutral(self) -> DoLa:
        """Strength = 0 and no cut."""
        return type(self)(strength=0.0, relative_top=0.0)

    @property
    def mixes_rows(self) -> bool:
        """With one premature layer for all rows."""
        return self.one_layer_per_batch

    @property
    def plausibility(self) -> float:
        """The cut ``relative_top``."""
        return self.relative_top

    @property
    def cost(self) -> Cost:
        """No extra row."""
        return Cost()

    def chosen_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The candidates in a model.

        Raises:
            ValueError: If a given candidate does not exist, or the bucket is empty.
        """
        n = anatomy.n_layers
        if self.candidates is not None:
            if max(self.candidates) >= n:
                raise ValueError(
                    f"DoLa: candidates must be below the number of layers, {n}, since that is the "
                    f"last layer itself; got {max(self.candidates)}."
                )
            return self.candidates
        tied = bool(getattr(anatomy.config, "tie_word_embeddings", False))
        chosen = bucket_layers(n, self.bucket, tied)
        if not chosen:
            raise ValueError(
                f"DoLa: the {self.bucket} bucket of a model of {n} layers is empty; give "
                f"candidates from 0 to {n - 1}."
            )
        return chosen

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The layers whose output is a candidate; layer 0 too if its input is."""
        if self.strength == 0:
            return False
        chosen = self.chosen_layers(anatomy)
        return layer + 1 in chosen or (layer == 0 and 0 in chosen)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Nothing; checks the candidates."""
        self.chosen_layers(anatomy)
        return []

    def begin(self, prompt: Prompt) -> _State | None:
        """Notes the candidates."""
        if self.strength == 0:
            return None
        chosen = self.chosen_layers(prompt.anatomy)
        return _State(prompt.anatomy, chosen, prompt.layout.has_image())

    def layer_in(self, state: _State | None, layer: int, x: Float[Tensor, "B L D"]) -> None:
        """Keeps the last position of the embeddings."""
        if state is not None and layer == 0 and 0 in state.candidates:
            state.exits[0] = x[:, -1].clone()  # a view would keep the whole prompt alive

    def layer_out(self, state: _State | None, layer: int, x: Float[Tensor, "B L D"]) -> None:
        """Keeps the last position of a candidate."""
        if state is not None and layer + 1 in state.candidates:
            state.exits[layer + 1] = x[:, -1].clone()

    def logits(
        self, state: _State | None, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """The contrast with the premature layer of each row."""
        if state is None:
            return None
        main = z["main"]
        exits = torch.stack([state.exits[layer] for layer in state.candidates])
        early = state.anatomy.exit_logits(exits, normed=self.exit_norm).log_softmax(-1)
        if len(state.candidates) == 1:
            return contrast(main, early[0], self.strength)
        distance = divergence(main.log_softmax(-1), early, swapped=self.swapped_divergence)
        m = premature(distance, state.active, whole_batch=self.one_layer_per_batch)
        return contrast(main, early[m, torch.arange(len(m), device=m.device)], self.strength)
