"""Naive passes that references are built of: whole prompts, no cache, one after the other."""

from __future__ import annotations

import hashlib

import checks
import torch
from transformers import LogitsProcessor, LogitsProcessorList


def whole_pass(model, inputs, ids, *, pixels=None, prompt=None):
    """Raw last-position logits of a full pass over a prompt and the answer so far.

    Args:
        inputs: The main prompt's inputs.
        ids: Main prompt and answer, beams included; the answer is what is behind the main prompt.
        pixels: Other pixels; default: the prompt's own.
        prompt: Inputs of another prompt in place of the main one (other words, no image).
    """
    answer = ids[:, inputs["input_ids"].shape[1] :]
    prompt = inputs if prompt is None else prompt
    times = len(ids) // len(prompt["input_ids"])
    start = prompt["input_ids"].repeat_interleave(times, 0)
    mask = prompt["attention_mask"].repeat_interleave(times, 0)
    mask = torch.cat([mask, torch.ones_like(answer)], dim=1)
    more = {"input_ids": torch.cat([start, answer], dim=1), "attention_mask": mask}
    if "pixel_values" in prompt:
        pixels = prompt["pixel_values"] if pixels is None else pixels
        if "image_grid_thw" in prompt:
            grid = prompt["image_grid_thw"]
            parts = [p for p in pixels.split(grid.prod(-1).tolist()) for _ in range(times)]
            kinds = prompt["mm_token_type_ids"].repeat_interleave(times, 0)
            more["pixel_values"] = torch.cat(parts)
            more["image_grid_thw"] = grid.repeat_interleave(times, 0)
            more["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(answer)], dim=1)
            return model(**more, use_cache=False).logits[:, -1]
        more["pixel_values"] = pixels.repeat_interleave(times, 0)
    more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(**more, use_cache=False).logits[:, -1]


def uniform_noise(inputs, seed):
    """Noise in [0, 1) for each picture, from a generator seeded with ``seed`` and its pixels."""

    def one(picture, shape):
        digest = hashlib.sha256(str(seed).encode() + picture.contiguous().numpy().tobytes())
        number = int.from_bytes(digest.digest()[:8], "big") >> 1
        return torch.rand(shape, generator=torch.Generator().manual_seed(number))

    pixels = inputs["pixel_values"]
    if "image_grid_thw" not in inputs:
        return torch.stack([one(p, p.shape) for p in pixels])
    noise = []
    for p in pixels.split(inputs["image_grid_thw"].prod(-1).tolist()):
        frame = one(p, (len(p), p.shape[1] // 2)).view(len(p), 3, 1, -1)
        noise.append(frame.repeat(1, 1, 2, 1).reshape(len(p), -1))  # both frames show one picture
    return torch.cat(noise)


class Recomputed(LogitsProcessor):
    """A method on logits in the papers' manner: every pass computed anew at every step.

    Args:
        edit: (ids of prompt and answer) -> edited raw logits.
    """

    def __init__(self, edit):
        self.edit = edit

    def __call__(self, ids, scores):
        forbidden = scores == -torch.inf  # by processors before this one, e.g. the end
        return self.edit(ids).log_softmax(-1).masked_fill(forbidden, -torch.inf)


def generate_recomputed(model, inputs, edit, **options):
    """Plain ``generate`` with the recomputing processor in it."""
    processors = LogitsProcessorList([Recomputed(edit)])
    return checks.generate(model, inputs, logits_processor=processors, **options)


def next_passes(model, inputs, new, sizes):
    """Logits of new tokens that are read behind a cached prompt, so many at a time.

    Args:
        inputs: One prompt.
        new: int64 [1, n]; the tokens.
        sizes: Tokens of each pass; they sum to n.
    """
    n, seen, logits = inputs["input_ids"].shape[1], 0, []
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for size in sizes:
            mask = torch.ones(1, n + seen + size, dtype=torch.long)
            more = {"input_ids": new[:, seen : seen + size], "attention_mask": mask}
            logits.append(model(**more, past_key_values=cache, use_cache=True).logits)
            seen += size
    return torch.cat(logits, 1)
