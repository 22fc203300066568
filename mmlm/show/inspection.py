"""One question about pictures, answered by the plain model and with methods, with all probes on.

A probe changes no bit of an answer, so what is shown is what would have been said without it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmlm.errors import IncompatibleMethods, MmlmError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor

    from mmlm.decoding_settings import GenerateSettings
    from mmlm.engine.method import Method
    from mmlm.show.conversation import Picture
    from mmlm.show.looking import Look

__all__ = ["PLAIN", "Arm", "Inspection", "default_probes", "fitting", "inspect"]

PLAIN = "plain model"
"""Name of the arm without methods."""


@dataclass(frozen=True)
class Arm:
    """One answer and everything that was measured while it was written.

    Attributes:
        name: :data:`PLAIN`, or the methods with what differs from their defaults.
        text: The answer.
        n_tokens: Its tokens, the end token included.
        seconds: How long it took, probes included.
        records: What each probe measured, by the name of its measurement; with what follows from
            two of them, or from one and the tokens.
        look: Attention over the pictures; None without `mmlm.AttentionMap`.
    """

    name: str
    text: str
    n_tokens: int
    seconds: float
    records: Mapping[str, Any] = field(default_factory=dict)
    look: Look | None = None

    def attention_on_pictures(self) -> dict[int, float]:
        """Per layer the share of attention on all pictures together, mean over heads and tokens."""
        if self.look is None:
            return {}
        shares = self.look.layer_shares.sum(-1).mean(-1).tolist()
        return dict(zip(self.look.layers, shares, strict=True))

    def dominance(self, figure: str) -> dict[int, float | None]:
        """Per layer ``mdi``, ``aei_text`` or ``aei_image``; None where it is undefined."""
        from benchmarks.text_dominance.records import RECORD, Record

        if RECORD not in self.records:
            return {}
        raw = self.records[RECORD]
        record = Record(raw["n_layers"], raw["queries"], raw["queries_from"], raw)
        return {layer: getattr(m, figure) for layer, m in record.masses("all", True).items()}


@dataclass(frozen=True)
class Inspection:
    """The answers to one question, side by side.

    Attributes:
        model: Name of the model.
        prompt: The question.
        pictures: What it is about.
        arms: The plain model's answer, and the one with methods if there are any.
        left_out: Probes that do not fit, and why.
    """

    model: str
    prompt: str
    pictures: tuple[Picture, ...]
    arms: tuple[Arm, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def maps(
        self, spans: Mapping[int, tuple[int, int] | None], image: int = 0
    ) -> dict[int, tuple[np.ndarray, float]]:
        """Maps of one word, and how much of the attention the picture got while it was written.

        Args:
            spans: By the number of the arm, where its answer says the word; None: all of it.
            image: Number of the picture.

        Returns:
            By the number of the arm; arms without a look are left out.
        """
        found = {}
        for number, span in spans.items():
            look = self.arms[number].look
            if look is not None and span is None:
                found[number] = look.overall(image), float(look.shares[:, image].mean())
            elif look is not None and span is not None:
                found[number] = look.of_span(*span, image), look.share_of_span(*span, image)
        return found

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, in plain JSON."""
        return {
            "model": self.model,
            "prompt": self.prompt,
            "pictures": [picture.name for picture in self.pictures],
            "left_out": dict(self.left_out),
            "arms": [
                {
                    "name": arm.name,
                    "text": arm.text,
                    "n_tokens": arm.n_tokens,
                    "seconds": round(arm.seconds, 3),
                    "look": None if arm.look is None else arm.look.as_json(),
                    "mdi": arm.dominance("mdi"),
                    "aei_text": arm.dominance("aei_text"),
                    "aei_image": arm.dominance("aei_image"),
                    # A look is the same on the pictures, and shorter.
                    "records": {k: v for k, v in arm.records.items() if k != "attention_map"},
                }
                for arm in self.arms
            ],
        }


def default_probes(n_layers: int) -> tuple[Method, ...]:
    """Every probe of an inspection, in all layers.

    Args:
        n_layers: Decoder layers of the model.
    """
    import mmlm

    return (
        mmlm.AttentionMap(),
        mmlm.TextDominance(layers=tuple(range(n_layers))),
        mmlm.HeadDivergence(),
        mmlm.VisualSinks(),
    )


def fitting(
    model: Any,
    processor: Any,
    pictures: Sequence[Picture],
    methods: Sequence[Method],
    probes: Sequence[Method],
) -> tuple[tuple[Method, ...], dict[str, str]]:
    """The probes that this model can run beside these methods, and why the others cannot.

    Args:
        model: The model.
        processor: Its processor.
        pictures: The pictures of the prompt.
        methods: The methods that will be on.
        probes: What is wanted.
    """
    import mmlm

    fit: list[Method] = []
    left_out: dict[str, str] = {}
    for probe in probes:
        try:
            for attached in ((), methods):
                with mmlm.attach(model, *attached, probe, processor=processor):
                    pass
            if isinstance(probe, mmlm.AttentionMap):
                _check_places(model, processor, pictures)
            fit.append(probe)
        except MmlmError as error:
            left_out[type(probe).__name__] = str(error)
    return tuple(fit), left_out


def _check_places(model: Any, processor: Any, pictures: Sequence[Picture]) -> None:
    """Makes sure that it is known, before any work, which token shows which part of a picture."""
    import torch

    from mmlm.engine.anatomy import Anatomy
    from mmlm.show.conversation import Conversation
    from mmlm.show.looking import prepared_otherwise
    from mmlm.token_places import footprints

    places = [footprints(model, processor, picture.image.size) for picture in pictures]
    asked = Conversation().with_pictures(*pictures).with_question("a")
    ids = asked.inputs(model, processor)["input_ids"]
    together = int(torch.isin(ids, ids.new_tensor(Anatomy(model).image_ids)).sum())
    if together != sum(one.tokens for one in places):
        raise prepared_otherwise(sum(one.tokens for one in places), together)


def inspect(
    model: Any,
    processor: Any,
    name: str,
    pictures: Sequence[Picture],
    prompt: str,
    methods: Sequence[Method],
    probes: Sequence[Method],
    settings: GenerateSettings,
    note: Callable[[str], None] = lambda line: None,
) -> Inspection:
    """Answers one question without and with methods, and measures both answers.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor.
        name: What the model is called.
        pictures: The pictures, shown before the question.
        prompt: The question.
        methods: Attached together for the second answer; none: there is only the first.
        probes: What is measured.
        settings: How to generate.
        note: Told what is being done.

    Raises:
        IncompatibleMethods: If the settings search with beams, beside which nothing is measured.
        MmlmError: Whatever makes an answer or its measurement impossible.
    """
    counting = [probe.label for probe in probes if not probe.rewinds]
    if settings.num_beams > 1 and counting:
        raise IncompatibleMethods(
            f"{counting[0]} cannot run with beam search (num_beams={settings.num_beams}): beams "
            "change places, and what was measured would belong to no answer.",
            advice="Inspect with generate.num_beams 1, or with probes of the prompt only: "
            "--probe HeadDivergence().",
        )
    arms = []
    for attached in ((), tuple(methods)) if methods else ((),):
        arm_name = " + ".join(method.label for method in attached) or PLAIN
        note(f"answering: {arm_name}")
        arms.append(_arm(model, processor, arm_name, pictures, prompt, attached, probes, settings))
    return Inspection(name, prompt, tuple(pictures), tuple(arms))


def _arm(
    model: Any,
    processor: Any,
    name: str,
    pictures: Sequence[Picture],
    prompt: str,
    methods: Sequence[Method],
    probes: Sequence[Method],
    settings: GenerateSettings,
) -> Arm:
    import mmlm
    from mmlm.show import looking
    from mmlm.show.conversation import Conversation
    from mmlm.streaming import AnswerStream

    asked = Conversation().with_pictures(*pictures).with_question(prompt)
    inputs = asked.inputs(model, processor)
    start = time.perf_counter()
    with AnswerStream(model, processor, inputs, [*methods, *probes], settings) as stream:
        for _ in stream:
            pass
    seconds = time.perf_counter() - start
    look = None
    if any(isinstance(probe, mmlm.AttentionMap) for probe in probes):
        look = looking.of_stream(stream, [picture.image for picture in pictures])
    records = _together(stream.records, inputs["input_ids"][0], stream.token_ids)
    return Arm(name, stream.text, stream.n_tokens, seconds, records, look)


def _together(
    records: Mapping[str, Any], prompt: Tensor, answer: Sequence[int]
) -> Mapping[str, Any]:
    """The records, with what is known only beside the tokens or another record.

    That is ``copies`` of mmlm.RetrievalHeads (per layer and head the share of tokens at which the
    peak lies on the same token in the prompt) and ``agreement`` of mmlm.AttentionSinks, where
    mmlm.VisualSinks looked, too.
    """
    import torch

    from mmlm.engine.head_scores import retrieval_hits
    from mmlm.probes.attention_sinks import agreement

    found = dict(records)
    copied = found.get("retrieval_heads")
    if copied is not None and copied["peaks"]:
        peaks, ids = torch.tensor(copied["peaks"]), prompt.cpu()
        hits = retrieval_hits(peaks, ids, (0, len(ids)), torch.tensor(answer[: len(peaks)]))
        found["retrieval_heads"] = {**copied, "copies": hits.double().mean(0).tolist()}
    sinks, states = found.get("attention_sinks"), found.get("visual_sinks")
    if sinks is not None and states is not None:
        found["attention_sinks"] = {**sinks, "agreement": agreement(sinks, states)}
    return found
