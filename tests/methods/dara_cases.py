"""What the tests of DARA share: models with known factors, and whole-matrix references."""

from __future__ import annotations

from contextlib import contextmanager

import tiny
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from mmlm import DARA, build_in

PROMPTS = ["what is shown here ?", "is there a dog in the picture ? answer yes or no .", "describe"]
HEADS = 8


def drawn(layers=1, heads=HEADS, images=5, seed=0):
    """Random factors between 0.3 and 2.3."""
    state = torch.Generator().manual_seed(seed)
    return 0.3 + 2 * torch.rand(layers, heads, images, generator=state)


def built(family, factors, **parameters):
    """A tiny model with DARA built in, and its processor."""
    model, processor = tiny.build(family)
    build_in(model, DARA(**parameters))
    module = model.mmlm_methods.DARA
    module.set_factors(factors)
    return model, processor


def prompt(processor, counts, seed=1):
    """A batch whose prompts have so many pictures."""
    pictures, number = [], seed
    for count in counts:
        pictures.append([tiny.picture(number + k, (64, 64)) for k in range(count)])
        number += count
    return tiny.inputs(processor, PROMPTS[: len(counts)], pictures)


def slots_by_hand(model, inputs, counts, images):
    """The slots of a batch in which every picture takes equally many features."""
    visual = inputs["input_ids"] == model.config.image_token_id
    slots = torch.full(visual.shape, -1)
    for row, count in enumerate(counts):
        places = visual[row].nonzero().flatten()
        each = len(places) // count if count else 1
        for at, place in enumerate(places.tolist()):
            image = at // each
            slots[row, place] = images - 1 if image == count - 1 else image
    return slots


def gains(factors, slots):
    """Factors [H, S] by position, [B, H, N]: one by one."""
    out = torch.ones(slots.shape[0], factors.shape[0], slots.shape[1])
    for b, row in enumerate(slots.tolist()):
        for n, slot in enumerate(row):
            if slot >= 0:
                out[b, :, n] = factors[:, slot]
    return out


@contextmanager
def whole_matrix(model, by_layer, mode="score", closed=None):
    """The model under an attention that builds whole matrices and multiplies their columns.

    Args:
        model: A plain model.
        by_layer: Gains [B, H, N] by layer.
        mode: As DARA's.
        closed: Columns nobody sees: (first layer, last layer + 1, bool [B, N]).
    """

    def eager(module, query, key, value, attention_mask, scaling=None, **kwargs):
        heads = query.shape[1]
        key = key.repeat_interleave(heads // key.shape[1], 1)
        value = value.repeat_interleave(heads // value.shape[1], 1)
        s = (
            query
            @ key.transpose(-1, -2)
            * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        )
        new, columns = s.shape[-2:]
        seen = torch.ones(new, columns, dtype=torch.bool).tril(columns - new)[None, None]
        if attention_mask is not None:
            seen = attention_mask
        if closed is not None and closed[0] <= module.layer_idx < closed[1]:
            seen = (
                seen & ~functional.pad(closed[2], (0, columns - closed[2].shape[1]))[:, None, None]
            )
        g = by_layer.get(module.layer_idx)
        if g is not None:
            g = functional.pad(g, (0, columns - g.shape[-1]), value=1.0)[:, :, None]
            s = s * g if mode == "score" else s
        a = s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1)
        if g is not None and mode == "weight":
            a = a * g
            a = a / a.sum(-1, keepdim=True)
        return (a.to(value.dtype) @ value).transpose(1, 2).contiguous(), None

    name = "dara_whole_matrix"
    AttentionInterface.register(name, eager)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def last(model, inputs):
    """Logits of the last position."""
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def grown(inputs, tokens):
    """A batch with tokens [B, n] behind its prompts."""
    n = tokens.shape[1]
    more = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
        "attention_mask": functional.pad(inputs["attention_mask"], (0, n), value=1),
    }
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            more[name] = functional.pad(inputs[name], (0, n))
    return more


def beam_search(model, inputs, steps, beams=2):
    """Two beams without a cache, one row: the tokens of the best one. The end token is barred."""
    known = [(0.0, inputs["input_ids"].new_zeros(1, 0))]
    for _ in range(steps):
        grew = []
        for score, tokens in known:
            z = last(model, grown(inputs, tokens))[0].float()
            p = z.log_softmax(-1)
            p[3] = -torch.inf
            for value, token in zip(*p.topk(beams), strict=True):
                grew.append((score + float(value), torch.cat([tokens, token[None, None]], 1)))
        known = sorted(grew, key=lambda one: -one[0])[:beams]
    return known[0][1]
