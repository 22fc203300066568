"""ICD: instruction contrastive decoding.

Paper: "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive
Decoding", Wang et al., Findings of ACL 2024, arXiv 2403.18715.
Sources read: a specification of the method's equations and of the authors' repository
p1k0pan/ICD; no code is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from mmlm.engine.branches.branch import Branch, Instruction
from mmlm.engine.method import Method, Paper

__all__ = ["CONFUSED", "ICD", "contrast"]

CONFUSED = (
    "You are a confused objects detector to provide a fuzzy overview or impression of the image."
)
"""The disturbing instruction, one of those in the authors' code."""


def contrast(
    main: Float[Tensor, "B V"],
    disturbed: Float[Tensor, "B V"],
    alpha: float,
    *,
    form: Literal["code", "paper"] = "code",
) -> Float[Tensor, "B V"]:
    """Delta on the main logits.

    "code": ``(1 + a) z - a z_dist - z = a (z - z_dist)``. "paper": ``-a z_dist``, which also takes
    away what both instructions agree on.
    """
    return alpha * (main - disturbed) if form == "code" else -alpha * disturbed


@dataclass(frozen=True, kw_only=True)
class ICD(Method):
    """Subtracts what the model would say under a confusing instruction.

    Idea:
        An instruction that asks for a vague impression makes a model hallucinate more. What it
        says under such an instruction, about the same image and question, is subtracted.
    Paper:
        "Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive
        Decoding", arXiv 2403.18715, Findings of ACL 2024.
    Equations:
        ``z' = (1 + alpha) z - alpha z_dist``: :func:`contrast`.
        Tokens with ``p < beta * max p`` under the true instruction are cut:
        :func:`mmlm.engine.combine.edit_logits`.
    Acts at:
        ``logits``, every step, prefill and decode.
    Cost:
        One more prefill per prompt, with the main prompt's image features, and one more row per
        row and token. The prompt with the instruction is longer than the main one, so its steps
        are a forward pass of their own. Memory: a second set of cache rows.
    Parameters:
        alpha: Strength of the contrast, >= 0. Default 1.0 (authors' scripts; their sampler falls
            back to 0.5). Neutral 0.
        beta: Plausibility cut, in [0, 1]. Default 0.1 (scripts). Neutral 0.
        prefix: The disturbing instruction, not empty. Default :data:`CONFUSED` (code).
        place: Where it stands. "system": in place of the system message (the code, for LLaVA).
            "question": before the question's words. "auto" (default): "system" if the chat
            template has a system message, else "question".
        form: "code" (default) or "paper", see :func:`contrast`.
    Shapes:
        B rows, V vocabulary.
    State:
        None.
    Differs:
        Templates without a system message get the instruction before the question (ours; the
        code knows no such model). Rows without an image are left alone.
    Limits:
        Needs the processor to find the system message or the question: ``mmlm.load`` remembers
        it, otherwise pass ``processor=``. InstructBLIP's Q-Former instruction is not covered.

    Raises:
        ValueError: for a parameter out of range.
        LayoutError: at the first forward, for a prompt that does not follow the processor's chat
            template, a template without the place asked for, or without a processor.

    Example:
        with ICD(alpha=1.0, beta=0.1)(model, processor=processor):
            ids = model.generate(**inputs, do_sample=True)
    """

    paper: ClassVar[Paper] = Paper(
        title="Mitigating Hallucinations in Large Vision-Language Models with Instruction "
        "Contrastive Decoding",
        arxiv="2403.18715",
        year=2024,
        venue="Findings of ACL 2024",
    )

    alpha: float = 1.0
    beta: float = 0.1
    prefix: str = CONFUSED
    place: Literal["auto", "system", "question"] = "auto"
    form: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        self._check_number("alpha", at_least=0)
        self._check_number("beta", at_least=0, at_most=1)
        if not isinstance(self.prefix, str) or not self.prefix.strip():
            raise ValueError(f"ICD: prefix must be a text that is not empty, got {self.prefix!r}.")
        self._check_choice("place", ("auto", "system", "question"))
        self._check_choice("form", ("code", "paper"))

    @classmethod
    def scripts(cls) -> ICD:
        """The authors' scripts: alpha 1, beta 0.1."""
        return cls()

    @classmethod
    def sampler(cls) -> ICD:
        """The fallback in the authors' sampler: alpha 0.5."""
        return cls(alpha=0.5)

    def neutral(self) -> ICD:
        """Alpha = 0 and beta = 0."""
        return type(self)(alpha=0.0, beta=0.0)

    @property
    def disturbed(self) -> Instruction:
        """The auxiliary prompt."""
        return Instruction(prefix=self.prefix, place=self.place)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The prompt with the instruction; none if there is nothing to contrast."""
        return (self.disturbed,) if self.alpha > 0 else ()

    @property
    def plausibility(self) -> float:
        """The cut beta."""
        return self.beta

    def logits(
        self, state: Any, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """The contrast with the disturbing instruction."""
        if self.alpha == 0:
            return None
        return contrast(z["main"], z[self.disturbed], self.alpha, form=self.form)
