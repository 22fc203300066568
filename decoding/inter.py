"""INTER: interaction guidance sampling.

Paper: "INTER: Mitigating Hallucination in Large Vision-Language Models by Interaction Guidance
Sampling", Dong et al., ICCV 2025, arXiv 2507.05056.
Sources read: a specification made from the abstract, the method's figure and the authors'
repository xxxxx313/INTER; no code is copied. The body of the paper was not available.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmlm.engine.attach import attach
from mmlm.engine.branches.branch import (
    Branch,
    Flat,
    ImageBranch,
    NoImage,
    NoText,
    UniformNoise,
)
from mmlm.engine.method import Method, Paper, Prompt
from mmlm.errors import LayoutError

__all__ = [
    "INTER",
    "calibrate_k",
    "dispersion",
    "dividend",
    "guidance",
    "measure_dispersion",
    "plausible",
]

ImageMask = Literal["uniform_noise", "zeros", "mean", "columns", "drop"]
_IMAGE_MASKS = ("uniform_noise", "zeros", "mean", "columns", "drop")


def dividend(
    full: Float[Tensor, "B V"],
    without_image: Float[Tensor, "B V"],
    without_text: Float[Tensor, "B V"],
    without_both: Float[Tensor, "B V"],
) -> Float[Tensor, "B V"]:
    """The Harsanyi dividend of {image, text}: what each logit owes to both acting together.

    ``I = z_full - z_noimg - z_notxt + z_none``, in this order of additions.
    """
    return full - without_image - without_text + without_both


def plausible(full: Float[Tensor, "B V"], beta: float) -> Bool[Tensor, "B V"]:
    """Tokens that survive the cut ``z >= log beta + max z``; all of them for beta = 0."""
    if beta == 0:
        return torch.ones_like(full, dtype=torch.bool)
    return full >= full.amax(-1, keepdim=True) + math.log(beta)


def dispersion(
    interaction: Float[Tensor, "B V"], among: Bool[Tensor, "B V"] | None = None
) -> Float[Tensor, "B"]:
    """D: variance of the dividend over the vocabulary, divisor n - 1.

    Args:
        interaction: The dividend.
        among: Entries that count; None: the whole vocabulary. A single entry has variance 0.
    """
    if among is None:
        return interaction.var(-1)
    n = among.sum(-1, keepdim=True)
    mean = interaction.masked_fill(~among, 0).sum(-1, keepdim=True) / n
    squares = (interaction - mean).square().masked_fill(~among, 0).sum(-1)
    return squares / (n.squeeze(-1) - 1).clamp(min=1)


def guidance(
    interaction: Float[Tensor, "B V"], spread: Float[Tensor, "B"], k: float, w: float
) -> Float[Tensor, "B V"]:
    """Delta on the full logits: ``w * 1[D >= k] * I``."""
    return (w * interaction).masked_fill((spread < k)[:, None], 0)


@dataclass(frozen=True, kw_only=True)
class INTER(Method):
    """Adds what image and question say together at the steps where it matters.

    Idea:
        Four views of the same step, with and without the image and with and without the question,
        give the part of each logit that needs both (a Harsanyi dividend). Where that part differs
        much between tokens, the step is a key step and the part is added once more.
    Paper:
        "INTER: Mitigating Hallucination in Large Vision-Language Models by Interaction Guidance
        Sampling", arXiv 2507.05056, ICCV 2025.
    Equations:
        ``I = z_full - z_noimg - z_notxt + z_none``: :func:`dividend`.
        Interactive Guided Locator, ``D = Var_V(I)``, key step iff ``D >= k``: :func:`dispersion`.
        Interaction Probability Modifier, ``z' = z_full + w 1[D >= k] I``: :func:`guidance`.
        Tokens with ``z_full < log(beta) + max z_full`` are cut, at key steps and others:
        :func:`mmlm.engine.combine.edit_logits`; :func:`plausible` names the survivors.
    Acts at:
        ``logits``, every step, prefill and decode.
    Cost:
        Three more rows per row and step, all in the same forward pass inside ``generate``. Prompts
        without the question continue the others' caches: a prefill runs one more prompt with an
        image and two short ends. One more tower pass per prompt for the masks that change pixels,
        none for "columns" and "drop". Memory: three more sets of cache rows.
    Parameters:
        k: Variance from which a step is a key step, in squared logits, >= 0. Default 1.0 (code).
            0: every step; ``float("inf")``: none, which leaves the plausibility cut. It depends on
            the model; :func:`calibrate_k` measures it.
        w: Weight of the dividend, >= 0. Default 1.0 (implied by the code). Neutral 0.
        beta: Plausibility cut, in [0, 1]. Default 0.1 (code). Neutral 0.
        image_mask: What stands for "without the image". "uniform_noise": noise in [0, 1) for the
            normalised pixels (default, code). "zeros", "mean": one colour. "columns": the same
            tokens, but nothing may attend to the image. "drop": the image's tokens are deleted.
        scope: Over which tokens D is taken. "vocabulary": all (default, code). "plausible": the
            survivors of the cut (ours).
        seed: Seed of the noise, >= 0. Default 0 (ours; the code draws anew in every run).
        allow_text_only: Whether prompts without an image may be in the batch; they are left
            alone. Default False: they are an error, since there is no interaction to measure.
    Shapes:
        B rows, V vocabulary.
    State:
        None.
    Differs:
        "Without the question" removes the user's words, of all turns, and keeps the chat template,
        system message and earlier answers; the code empties InstructBLIP's prompt, which has no
        template.
        The noise depends on seed and picture, so that a row's answer does not depend on its batch.
        The hook sees raw logits in beam search too, so D means the same in every mode.
    Limits:
        Pictures, no videos, for the masks that change pixels. All pictures of a prompt are one
        player. Needs the processor to tell the user's words: ``mmlm.load`` remembers it,
        otherwise pass ``processor=``.

    Raises:
        ValueError: for a parameter out of range.
        LayoutError: at the first forward, for a row without image (unless allowed), a prompt that
            does not follow the processor's chat template, or without a processor.
        RuntimeError: for logits that are not finite.

    Example:
        with INTER(k=1.0)(model, processor=processor):
            ids = model.generate(**inputs, do_sample=True)
    """

    paper: ClassVar[Paper] = Paper(
        title="INTER: Mitigating Hallucination in Large Vision-Language Models by Interaction "
        "Guidance Sampling",
        arxiv="2507.05056",
        year=2025,
        venue="ICCV 2025",
    )

    k: float = 1.0
    w: float = 1.0
    beta: float = 0.1
    image_mask: ImageMask = "uniform_noise"
    scope: Literal["vocabulary", "plausible"] = "vocabulary"
    seed: int = 0
    allow_text_only: bool = False

    def __post_init__(self) -> None:
        if self.k != math.inf:
            self._check_number("k", at_least=0)
        self._check_number("w", at_least=0)
        self._check_number("beta", at_least=0, at_most=1)
        self._check_choice("image_mask", _IMAGE_MASKS)
        self._check_choice("scope", ("vocabulary", "plausible"))
        self._check_integer("seed", at_least=0)
        self._check_choice("allow_text_only", (True, False))

    @classmethod
    def code(cls) -> INTER:
        """The authors' code, for every model: k 1, beta 0.1, uniform noise."""
        return cls()

    def neutral(self) -> INTER:
        """Weight w = 0 and beta = 0."""
        return type(self)(w=0.0, beta=0.0, allow_text_only=True)

    @property
    def without_image(self) -> ImageBranch:
        """The prompt with its image masked."""
        match self.image_mask:
            case "uniform_noise":
                return UniformNoise(seed=self.seed)
            case "zeros" | "mean" as colour:
                return Flat(colour=colour)
            case "columns" | "drop" as kind:
                return NoImage(kind=kind)

    @property
    def without_text(self) -> NoText:
        """The prompt with the user's words masked."""
        return NoText()

    @property
    def without_both(self) -> NoText:
        """The prompt with both masked."""
        return NoText(image=self.without_image)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The three masked prompts; none if no step can be a key step or nothing is added."""
        if self.w == 0 or self.k == math.inf:
            return ()
        return (self.without_image, self.without_text, self.without_both)

    @property
    def plausibility(self) -> float:
        """The cut beta."""
        return self.beta

    def begin(self, prompt: Prompt) -> None:
        """Refuses rows without an image, unless they are allowed.

        Raises:
            LayoutError: Naming the rows.
        """
        if self.allow_text_only:
            return
        missing = (~prompt.layout.has_image()).nonzero().flatten().tolist()
        if missing:
            raise LayoutError(
                f"INTER needs an image in every row; there is none in row "
                f"{', '.join(map(str, missing))}.",
                advice="Leave these prompts out, or use INTER(allow_text_only=True), which leaves "
                "them alone.",
            )

    def interaction(
        self, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B"]]:
        """The dividend I and its dispersion D at one step.

        Raises:
            RuntimeError: If logits are not finite or differ in their vocabulary.
        """
        full, masked = z["main"], [z[branch] for branch in self.branches]
        _check_logits(full, *masked)
        together = dividend(full, *masked)
        among = plausible(full, self.beta) if self.scope == "plausible" else None
        return together, dispersion(together, among)

    def logits(
        self, state: Any, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """The dividend, at key steps."""
        if not self.branches:
            return None
        return guidance(*self.interaction(z), self.k, self.w)


def _check_logits(full: Tensor, *masked: Tensor) -> None:
    """Raises RuntimeError for numbers from which no token must be chosen."""
    for other in masked:
        if other.shape != full.shape:
            raise RuntimeError(
                f"INTER: a masked prompt gave logits {tuple(other.shape)}, the main one "
                f"{tuple(full.shape)}; they must be of one model."
            )
    if not bool(torch.stack([full, *masked]).isfinite().all()):
        raise RuntimeError(
            "INTER: the model's logits are not finite (NaN or infinity). Load it in another dtype: "
            "bfloat16 or float32 instead of float16."
        )


@dataclass(frozen=True, kw_only=True)
class _Watch(INTER):
    """Measures D at every step and changes nothing."""

    seen: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def plausibility(self) -> float:
        return 0.0

    def logits(
        self, state: Any, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        self.seen.append(self.interaction(z)[1])
        return None


def measure_dispersion(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    *,
    method: INTER | None = None,
    processor: Any = None,
    max_new_tokens: int = 64,
) -> Float[Tensor, "steps"]:
    """D at every step of greedy answers to some prompts, without changing any logit.

    Steps after the end of an answer do not count.

    Args:
        model: The model.
        inputs: Batches of model inputs, as the processor makes them, with an image in every row.
        method: Image mask, scope, beta and seed with which D is measured; default: ``INTER()``.
        processor: The model's processor; :func:`mmlm.load` remembers its own.
        max_new_tokens: Longest answer.

    Returns:
        D of all steps of all answers.

    Raises:
        ValueError: If there is no batch.
    """
    given = method or INTER()
    found = []
    for batch in inputs:
        watch = _Watch(
            beta=given.beta, image_mask=given.image_mask, scope=given.scope, seed=given.seed
        )
        with attach(model, watch, processor=processor):
            tokens: Tensor = model.generate(  # type: ignore[operator]
                **batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
            )
        answers = tokens[:, batch["input_ids"].shape[1] :]
        spread = torch.stack(watch.seen, dim=1)[:, : answers.shape[1]]
        found.append(spread[_counts(answers, model)])
    if not found:
        raise ValueError("INTER: no inputs were given; give at least one batch.")
    return torch.cat(found)


def calibrate_k(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    quantile: float = 0.5,
    *,
    method: INTER | None = None,
    processor: Any = None,
    max_new_tokens: int = 64,
) -> float:
    """The threshold above which a share of ``1 - quantile`` of a model's steps are key steps.

    Args:
        model: The model.
        inputs: As for :func:`measure_dispersion`.
        quantile: In [0, 1]. Default 0.5: every other step is a key step (ours).
        method: As for :func:`measure_dispersion`.
        processor: As for :func:`measure_dispersion`.
        max_new_tokens: As for :func:`measure_dispersion`.

    Returns:
        k, for ``INTER(k=...)``.

    Raises:
        ValueError: If the quantile is out of range or there is no batch.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"INTER: quantile must be >= 0 and <= 1, got {quantile!r}.")
    spread = measure_dispersion(
        model, inputs, method=method, processor=processor, max_new_tokens=max_new_tokens
    )
    return float(spread.quantile(quantile))


def _counts(answers: Tensor, model: Any) -> Bool[Tensor, "B T"]:
    """Steps that belong to an answer, its end included."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    over = torch.isin(answers, answers.new_tensor(ends)).long().cumsum(-1)
    return (over - torch.isin(answers, answers.new_tensor(ends)).long()) == 0
