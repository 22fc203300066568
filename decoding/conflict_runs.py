"""Conflict samples on a model: what every head does in them, and the record of a calibration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decoding.conflict_heads import Halves, Measured, Score, counted, list_heads, means_of, select
from decoding.head_records import HeadRecord
from mmlm.engine.anatomy import Anatomy
from mmlm.engine.head_effects import Form, LastPosition, attribution, look, patched_logits
from mmlm.engine.identity import fingerprint
from mmlm.errors import UnsupportedModel

__all__ = [
    "Conflicts",
    "calibrate_heads",
    "differences",
    "make_record",
    "mean_feature",
    "measure",
]


@dataclass(frozen=True, kw_only=True)
class Conflicts:
    """A batch of conflict samples, as inputs of the model.

    Attributes:
        inputs: Left-padded prompts with their pictures.
        donor: The same prompts with pictures that do not support the image answer, of the same
            length; None: the image features are replaced by their mean.
        neutral: The same prompts without the words that carry the prior, of the same length, if
            there are such words.
        memory: First token of the memory answers, one per row.
        image: First token of the image answers.
        kinds: What kind of sample each row is; kinds are balanced one by one.
        yes_no: Which rows are yes/no questions.
    """

    inputs: Mapping[str, Any]
    donor: Mapping[str, Any] | None
    neutral: Mapping[str, Any] | None = None
    memory: Tensor
    image: Tensor
    kinds: tuple[str, ...]
    yes_no: tuple[bool, ...]

    @property
    def tokens(self) -> Tensor:
        """Both answers, int64 [B, 2]: by the image, by memory."""
        return torch.stack([self.image, self.memory], dim=-1)


def measure(
    model: nn.Module,
    batches: Iterable[Conflicts],
    *,
    form: Form = "mlp_recomputed",
    score: Score = "patching",
    mean: Float[Tensor, "D"] | None = None,
) -> Measured:
    """Runs every sample with its picture and with the other one, and takes all heads' effects.

    Args:
        model: The model; methods that are attached act in all runs.
        batches: The samples.
        form: Whether MLPs answer to a patched head.
        score: With "patching" the last norm may be any; J is 0 where it is no RMS norm.
        mean: What stands for every image feature in batches without a donor: :func:`mean_feature`.

    Raises:
        ValueError: If a corrupted prompt has another length.
    """
    anatomy = Anatomy(model)
    found = [_measured(anatomy, batch, form, score, mean) for batch in batches]
    if not found:
        raise ValueError("There are no conflict samples.")
    joined: Any = (
        torch.cat(part) if isinstance(part[0], Tensor) else tuple(x for p in part for x in p)
        for part in zip(*found, strict=True)
    )
    return Measured(*joined)


@torch.no_grad()
def _measured(
    anatomy: Anatomy, batch: Conflicts, form: Form, score: Score, mean: Tensor | None
) -> Measured:
    plain = look(anatomy, batch.inputs)
    tokens = batch.tokens.to(plain.final.device)
    z = anatomy.exit_logits(plain.final)
    answers = z.gather(-1, tokens)
    ahead = (z[:, None] > answers[:, :, None]).sum(-1)
    delta = answers[:, 0] - answers[:, 1]

    def lost(other: LastPosition) -> Tensor:
        """I: how much of the difference is gone without what the head saw."""
        patched = patched_logits(anatomy, plain, other, tokens, form)
        return delta[:, None, None] - (patched[..., 0] - patched[..., 1])

    pushes = lost(_corrupted(anatomy, batch, mean))
    remembers, says = pushes, torch.zeros_like(pushes)
    if batch.neutral is not None:
        _check_length(batch.inputs, batch.neutral)
        differs = (batch.inputs["input_ids"] != batch.neutral["input_ids"]).any(-1)
        without = lost(look(anatomy, batch.neutral))
        remembers = torch.where(differs[:, None, None], without, pushes)
    try:
        says = attribution(anatomy, plain, tokens).heads
    except UnsupportedModel:  # patching needs no norm that logits can be summed through
        if score != "patching":
            raise
    return Measured(
        memory=batch.memory.cpu(),
        image=batch.image.cpu(),
        plain=delta.double().cpu(),
        among_ten=(ahead < 10).all(-1).cpu(),
        pushes=pushes.double().cpu(),
        says=says.double().cpu(),
        remembers=remembers.double().cpu(),
        kinds=batch.kinds,
        yes_no=batch.yes_no,
    )


def _corrupted(anatomy: Anatomy, batch: Conflicts, mean: Tensor | None) -> LastPosition:
    if batch.donor is not None:
        _check_length(batch.inputs, batch.donor)
        return look(anatomy, batch.donor)
    if mean is None:
        raise ValueError("A batch without donor pictures needs the mean image feature.")
    with _image_features(anatomy, batch, lambda features: mean.to(features).expand_as(features)):
        return look(anatomy, batch.inputs)


def _check_length(inputs: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    a, b = (x["attention_mask"].sum(-1).tolist() for x in (inputs, other))
    if a != b or inputs["input_ids"].shape != other["input_ids"].shape:
        one, two = next(((x, y) for x, y in zip(a, b, strict=False) if x != y), (len(a), len(b)))
        raise ValueError(
            f"A prompt has {one} positions and {two} when corrupted; heads can only be exchanged "
            "between prompts of one length. Give the other picture the same size."
        )


@torch.no_grad()
def mean_feature(model: nn.Module, batches: Iterable[Conflicts]) -> Float[Tensor, "D"]:
    """The mean of all image features of the samples, as they enter the decoder."""
    anatomy = Anatomy(model)
    sums: list[Tensor] = []
    count = 0
    for batch in batches:

        def note(features: Tensor) -> Tensor:
            sums.append(features.double().sum(0))
            return features

        with _image_features(anatomy, batch, note):
            look(anatomy, batch.inputs)
        count += int(_visual(anatomy, batch.inputs["input_ids"]).sum())
    if not count:
        raise ValueError("The samples have no image features to take the mean of.")
    return torch.stack(sums).sum(0) / count


def _visual(anatomy: Anatomy, ids: Tensor) -> Tensor:
    return torch.isin(ids, torch.tensor(anatomy.image_ids, device=ids.device))


@contextmanager
def _image_features(
    anatomy: Anatomy, batch: Conflicts, edit: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Image features [n, D] of the batch go through ``edit`` where they enter the decoder."""
    visual = _visual(anatomy, batch.inputs["input_ids"])

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("deepstack_visual_embeds") is not None:
            raise UnsupportedModel(
                "Image features of this model enter several layers, so their mean would not "
                "replace them.",
                advice="Use donor pictures.",
            )
        embeds = kwargs["inputs_embeds"].clone()
        embeds[visual] = edit(embeds[visual])
        return args, {**kwargs, "inputs_embeds": embeds}

    handle = anatomy.text.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def differences(model: nn.Module, batches: Iterable[Conflicts]) -> Float[Tensor, "n"]:
    """``z(image) - z(memory)`` of every sample, with what is attached to the model."""
    anatomy = Anatomy(model)
    found = []
    for batch in batches:
        z = anatomy.exit_logits(look(anatomy, batch.inputs).final)
        answers = z.gather(-1, batch.tokens.to(z.device))
        found.append((answers[:, 0] - answers[:, 1]).double().cpu())
    return torch.cat(found)


def make_record(
    model: nn.Module,
    measured: Measured,
    halves: Halves,
    settings: Mapping[str, Any],
    *,
    name: str = "",
    methods: Sequence[str] = (),
    **options: Any,
) -> HeadRecord:
    """The record of a calibration; says once if the halves hardly agree.

    Args:
        model: The model.
        measured: What the samples gave.
        halves: Those that count.
        settings: How they were measured, for the record.
        name: The model's name.
        methods: Text forms of what was attached.
        **options: Of :func:`list_heads`.
    """
    anatomy = Anatomy(model)
    kept = torch.tensor([*halves[0], *halves[1]])
    values: dict[str, Any] = {}
    for quantity in ("pushes", "says", "remembers"):
        mean, error = means_of(getattr(measured, quantity)[kept])
        values[quantity], values[f"{quantity}_error"] = _rows(mean), _rows(error)
    record = HeadRecord(
        shape=(anatomy.n_layers, anatomy.n_heads),
        lists=list_heads(measured, halves, **options),
        values=values,
        samples=counted(measured, halves),
        settings={**settings, **{k: v for k, v in options.items() if k != "protect"}},
        model=name,
        weights=fingerprint(anatomy.model),
        methods=tuple(methods),
    )
    if record.unstable:
        worst = min(record.lists.split_half.values())
        warnings.warn(
            f"The two halves of the samples hardly agree on the heads (rank correlation "
            f"{worst:.2f}): the record is marked as unstable, and PH3 refuses it.",
            stacklevel=3,
        )
    return record


def _rows(x: Tensor) -> list[list[float]]:
    return [[round(v, 6) for v in row] for row in x.tolist()]


def calibrate_heads(
    model: nn.Module,
    samples: Iterable[Conflicts],
    *,
    form: Form = "mlp_recomputed",
    score: Score = "patching",
    name: str = "",
    **options: Any,
) -> HeadRecord:
    """From conflict samples to the two lists.

    Args:
        model: The model; methods that are attached act in all runs.
        samples: Batches of samples.
        form: Whether the MLPs behind a patched head answer to it.
        score: By what memory heads are ranked.
        name: The model's name, for the record.
        **options: Of :func:`list_heads`.

    Raises:
        ValueError: If too few samples are left, or a corrupted prompt has another length.
    """
    batches = list(samples)
    lacking = any(batch.donor is None for batch in batches)
    mean = mean_feature(model, batches) if lacking else None
    measured = measure(model, batches, form=form, score=score, mean=mean)
    settings = {"form": form, "corruption": "mean" if lacking else "donor"}
    halves = select(measured)
    return make_record(model, measured, halves, settings, name=name, score=score, **options)
