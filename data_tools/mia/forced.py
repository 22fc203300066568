"""One teacher-forced forward of prompts with their responses: attention and probabilities.

The authors (MIA-DPO, arXiv 2410.17637; code Liuziyu77/MIA-DPO, commit a85c51a) generate with eager
attention, keep the weights of all layers and steps, and build an H x (L + T)^2 matrix per record.
Here the model runs its own kernel; in one layer only, the rows of the response are computed again
in chunks and added up as they come: O(H * chunk * L) memory (`mmlm.ImageAttention`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_tools.mia.perplexity import log_probabilities

if TYPE_CHECKING:
    from torch import Tensor

    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.layout import TokenLayout

__all__ = ["Forced", "force", "with_responses"]

#: What the tensors [B, N] beside the ids hold at response tokens; every other one holds 0.
_AT_RESPONSE = {"attention_mask": 1}
#: PaliGemma's type 0 is a prefix that sees itself in both directions; what is written is type 1.
_AT_RESPONSE_OF = {"paligemma": {"token_type_ids": 1}}


class _Reached(Exception):  # noqa: N818
    """Ends a pass behind the layer that was measured."""


@dataclass(frozen=True)
class Forced:
    """What one row gave.

    Attributes:
        attention: The record of `mmlm.ImageAttention`.
        log_probs: Of the response's tokens; None if the pass ended early.
        log_max: Of the most probable token at each of their places; None likewise.
    """

    attention: Mapping[str, Any]
    log_probs: list[float] | None = None
    log_max: list[float] | None = None


def with_responses(
    inputs: Mapping[str, Tensor],
    responses: Sequence[Sequence[int]],
    pad: int,
    model_type: str = "",
) -> dict[str, Tensor]:
    """A batch of prompts with what is fed back of their responses, all but the last token.

    Args:
        inputs: The processor's tensors, prompts padded on the left.
        responses: Token ids of every row's response.
        pad: Id of the padding token.
        model_type: The configuration's; some models mark what is written in a way of their own.

    Returns:
        The same tensors, those of shape [B, N] grown to [B, N'] and padded on the left again.
    """
    import torch

    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    fed = [list(response[:-1]) for response in responses]
    length = max(int(row.sum()) + len(new) for row, new in zip(real, fed, strict=True))
    at_response = _AT_RESPONSE | _AT_RESPONSE_OF.get(model_type, {})
    grown = dict(inputs)
    for name, values in inputs.items():
        if values.shape != ids.shape or values.is_floating_point():
            continue
        rows = values.new_full((len(ids), length), pad if name == "input_ids" else 0)
        for row, (old, where, new) in enumerate(zip(values, real, fed, strict=True)):
            tail = new if name == "input_ids" else [at_response.get(name, 0)] * len(new)
            line = torch.cat([old[where], old.new_tensor(tail)])
            rows[row, length - len(line) :] = line
        grown[name] = rows
    return grown


def force(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Tensor],
    responses: Sequence[Sequence[int]],
    *,
    layer: int | None = None,
    maps: bool = False,
    probabilities: bool = True,
) -> list[Forced]:
    """Runs prompts with given responses and measures attention and probabilities.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor.
        inputs: The processor's tensors of the prompts, padded on the left.
        responses: Token ids of every row's response; at least two each.
        layer: Decoder layer of the attention; None: `mmlm.probes.image_attention.central_layer`.
        maps: Whether the attention on every position of an image is kept.
        probabilities: Whether the pass goes on to the logits. Otherwise it ends behind the
            attention of the layer, at about half the cost.

    Returns:
        One result per row.

    Raises:
        ValueError: For a response with fewer than two tokens, or one that holds an image token.
        NotImplementedError: If the attention of the layer cannot be seen.
    """
    import torch

    import mmlm

    anatomy = mmlm.Anatomy(model)
    _check(anatomy, responses)
    grown = with_responses(inputs, responses, _pad(processor), anatomy.family_name)
    layout = _layout(anatomy, grown, [len(response) - 1 for response in responses])
    probe = mmlm.ImageAttention(layer=layer, queries="answer", maps=maps)
    with (
        torch.inference_mode(),
        mmlm.attach(model, probe, layout=layout, processor=processor),
    ):
        logits = _run(anatomy, grown, None if probabilities else probe.layer_of(anatomy), responses)
        found = [Forced(row[probe.measures]) for row in mmlm.measured(model)]
    if logits is None:
        return found
    return [
        Forced(one.attention, *_probabilities(row, response))
        for one, row, response in zip(found, logits, responses, strict=True)
    ]


def _check(anatomy: Anatomy, responses: Sequence[Sequence[int]]) -> None:
    for response in responses:
        if len(response) < 2:
            raise ValueError(f"a response needs two tokens, got {len(response)}")
        if set(response) & set(anatomy.image_ids):
            raise ValueError("the response holds an image token, which stands for no picture")


def _pad(processor: Any) -> int:
    pad = processor.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def _layout(anatomy: Anatomy, inputs: Mapping[str, Tensor], fed: list[int]) -> TokenLayout:
    """Roles of the positions: the last ones of each row are its answer."""
    import torch

    from mmlm.engine.layout import ANSWER, TokenLayout

    layout = TokenLayout.from_ids(
        inputs["input_ids"],
        inputs["attention_mask"],
        image_ids=anatomy.image_ids,
        wrapper_ids=anatomy.wrapper_ids,
        framing=anatomy.family.framing,
    )
    index = torch.arange(layout.length, device=layout.seg.device)
    answer = index >= layout.length - torch.tensor(fed, device=index.device)[:, None]
    return dataclasses.replace(
        layout, seg=layout.seg.masked_fill(answer, ANSWER), frame=layout.frame & ~answer
    )


def _run(
    anatomy: Anatomy,
    inputs: dict[str, Tensor],
    end: int | None,
    responses: Sequence[Sequence[int]],
) -> Tensor | None:
    """The logits of the last positions; None if the pass ended behind layer ``end``."""
    options: dict[str, Any] = {
        "use_cache": False,
        "return_dict": True,
        "logits_to_keep": 1 if end is not None else max(map(len, responses)),
    }
    if not hasattr(anatomy.composite, "get_rope_index"):
        # As generate() counts them; a plain call would count padding too.
        counted = inputs["attention_mask"].long().cumsum(-1) - 1
        options["position_ids"] = counted.clamp(min=0) + anatomy.family.first_position
    if end is None:
        logits: Tensor = anatomy.model(**inputs, **options).logits
        return logits
    handle = anatomy.attention(end).register_forward_hook(_stop)
    try:
        anatomy.model(**inputs, **options)
    except _Reached:
        return None
    finally:
        handle.remove()
    raise NotImplementedError(f"Layer {end} was not reached in a pass over the whole prompt.")


def _stop(module: Any, args: Any, output: Any) -> None:
    raise _Reached


def _probabilities(logits: Tensor, response: Sequence[int]) -> tuple[list[float], list[float]]:
    """Of the written tokens, and of the most probable ones; ``logits`` [T or more, V]."""
    import torch

    own = logits[-len(response) :]
    tokens = torch.tensor(list(response), device=own.device)
    return log_probabilities(own, tokens).tolist(), log_probabilities(own).tolist()
