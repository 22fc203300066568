"""A naive reference for methods on attention rows: whole eager matrices, no cache, no engine.

``edited(model, edit)`` swaps the text decoder's attention for one that builds the whole matrix of
weights and hands it to ``edit(layer, x, a)``: the layer's input [B, N, D] and the weights
[B, H, N, N] after the softmax, to be changed in place. ``Recompute`` makes plain ``generate``
choose its tokens from such passes, so beams and sampling have a reference too.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LogitsProcessor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

_NAME = "whole_matrix_by_hand"
_EDIT = []


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    heads = query.shape[1]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    value = value.repeat_interleave(heads // value.shape[1], 1)
    s = query @ key.transpose(-1, -2) * scaling
    n = s.shape[-1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    if attention_mask is not None:
        seen = seen & attention_mask
    a = s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1)
    edit, states = _EDIT[-1]
    edit(module.layer_idx, states[module.layer_idx], a)
    return (a @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def edited(model, edit):
    """The model with ``edit`` inside its attention; each pass must bring the whole sequence."""
    decoder, states = model.get_decoder(), {}
    before = decoder.config._attn_implementation

    def keep(layer):
        def hook(module, args, kwargs):
            states[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(decoder.layers):
            stack.callback(block.register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        _EDIT.append((edit, states))
        stack.callback(_EDIT.pop)
        decoder.config._attn_implementation_internal = _NAME
        stack.callback(setattr, decoder.config, "_attn_implementation_internal", before)
        yield model


@torch.no_grad()
def whole_pass(model, inputs, ids=None, **options):
    """A pass over prompt and answer, left padding respected, each prompt's rows repeated."""
    ids = inputs["input_ids"] if ids is None else ids
    grown = ids.shape[1] - inputs["input_ids"].shape[1]
    k = ids.shape[0] // inputs["input_ids"].shape[0]
    mask = inputs["attention_mask"].repeat_interleave(k, 0)
    mask = torch.cat([mask, mask.new_ones(len(ids), grown)], dim=1)
    more = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    if "image_grid_thw" in inputs:
        counts = inputs["image_grid_thw"].prod(-1).tolist()
        parts = [p for p in more["pixel_values"].split(counts) for _ in range(k)]
        more["pixel_values"] = torch.cat(parts)
        more["image_grid_thw"] = inputs["image_grid_thw"].repeat_interleave(k, 0)
        kinds = inputs["mm_token_type_ids"].repeat_interleave(k, 0)
        more["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(len(ids), grown)], dim=1)
    else:
        more["pixel_values"] = more["pixel_values"].repeat_interleave(k, 0)
        more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(**more, use_cache=False, **options).logits[:, -1]


class Recompute(LogitsProcessor):
    """Scores from a whole pass with ``edit``, whatever the model made of the cached ones.

    Args:
        model: The model.
        inputs: The prompts.
        edit: Gets rows k per prompt, like everything in ``generate``.
        end: Id of the end token, which stays forbidden where ``generate`` forbade it.
    """

    def __init__(self, model, inputs, edit, end=3):
        self.model, self.inputs, self.edit, self.end = model, inputs, edit, end

    def __call__(self, ids, scores):
        decoder = self.model.get_decoder()
        deltas = getattr(self.model.model, "rope_deltas", None)
        with edited(self.model, self.edit):
            z = whole_pass(self.model, self.inputs, ids)
        if deltas is not None:
            self.model.model.rope_deltas = deltas
        assert decoder.config._attn_implementation != _NAME
        z = z.log_softmax(-1)
        z[:, self.end] = scores[:, self.end].clamp(max=-torch.inf)
        return z
