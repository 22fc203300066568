"""Models around towers and decoders of the golden vectors, and what the tests of pruning share."""

from __future__ import annotations

import json

import golden
import numpy as np
import tiny
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from mmlm import measured

PROMPTS = ["describe the image in detail .", "is there a dog in the picture ?", "what is shown ?"]


def read(path):
    """Configuration, weights and arrays of one file."""
    with np.load(path) as data:
        config = json.loads(str(data["config"]))
    arrays = {k: v for k, v in golden.arrays_of_numbers(path).items()}
    weights = {k[3:]: v for k, v in arrays.items() if k.startswith("w::")}
    return config, weights, {k: v for k, v in arrays.items() if not k.startswith("w::")}


def small_text(vocabulary=32, layers=2, **more):
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        **more,
    }


def around_clip(config, weights, implementation):
    """A LLaVA around a CLIP tower, and a function that runs pictures through it.

    The function returns, for a batch of pixels: numbers of the patches kept per picture, the
    tower's features of all patches, and the number of tokens after each block.
    """
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**config),
            text_config=LlamaConfig(**small_text()),
            image_token_id=31,
            attn_implementation=implementation,
        )
    ).eval()
    model.set_attn_implementation(implementation)
    tower = model.model.vision_tower
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("position_ids" in name for name in missing)
    patches = (config["image_size"] // config["patch_size"]) ** 2

    def run(pixels):
        ids = torch.tensor([[1, *[31] * patches, 2, 3]] * len(pixels))
        seen, lengths = [], []
        handles = [tower.register_forward_hook(lambda m, a, out: seen.append(out))]
        handles += [
            block.register_forward_hook(lambda m, a, out: lengths.append(out.shape[1]))
            for block in tower.encoder.layers
        ]
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        for handle in handles:
            handle.remove()
        return kept(model), seen[0].hidden_states[-2][:, 1:], lengths

    return model, run


def kept(model):
    """Numbers of the patches of each row's only tile."""
    records = [next(iter(row.values()))["kept"] for row in measured(model)]
    assert all(len(tiles) == 1 for tiles in records)
    return torch.tensor([tiles[0] for tiles in records])


def around_llama(config, weights):
    """A LLaVA around a decoder of the golden vectors; its tower and head are never run."""
    torch.manual_seed(0)
    config = {
        **config,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")},
    }
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tiny._clip(),
            text_config=LlamaConfig(**config),
            image_token_id=31,
        )
    ).eval()
    missing, unexpected = model.model.language_model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) == {"embed_tokens.weight"}
    return model


def around_qwen(config, weights, implementation):
    """A Qwen2-VL around a tower of the golden vectors."""
    torch.manual_seed(0)
    text = small_text(40, hidden_size=config["hidden_size"])
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
    }
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text,
            vision_config=config,
            image_token_id=31,
            video_token_id=32,
            vision_start_token_id=33,
            vision_end_token_id=34,
        )
    ).eval()
    model.set_attn_implementation(implementation)
    missing, unexpected = model.model.visual.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    return model


def deep(blocks=8, seed=0):
    """A LLaVA whose tower has enough blocks for several cuts, and its processor."""
    cls, config, processor = tiny._llava(4)
    config.vision_config.num_hidden_layers = blocks
    torch.manual_seed(seed)
    model = cls(config).eval()
    sharpen(model.model.vision_tower.encoder.layers, "self_attn", ("q_proj", "k_proj"))
    model.generation_config = GenerationConfig(pad_token_id=1, bos_token_id=2, eos_token_id=3)
    return model, processor


def sharpen(blocks, attention, projections, by=16.0):
    """Makes a random tower's attention uneven, so that its spread says something."""
    with torch.no_grad():
        for block in blocks:
            for name in projections:
                getattr(getattr(block, attention), name).weight.mul_(by)


def naive_pass(tower, pixels, target):
    """FlowCut on one picture, sentence by sentence as it is defined, with loops.

    Returns:
        Numbers of the patches kept, the features of these [K, D], and patches after each block.
    """
    x = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]  # [1 + N, D], class token first
    blocks = list(tower.encoder.layers)
    last = len(blocks) - 2  # the block whose output LLaVA reads
    kept, running, lengths = list(range(x.shape[0] - 1)), None, []
    for number, block in enumerate(blocks[: last + 1]):
        attention, n = block.self_attn, len(kept)
        y = block.layer_norm1(x)
        heads, size = attention.num_heads, attention.head_dim
        q, k, v = (
            getattr(attention, f"{name}_proj")(y).view(-1, heads, size) for name in ("q", "k", "v")
        )
        scores = None
        if n > target:
            a, e = torch.zeros(n), torch.zeros(n)
            for h in range(heads):
                a += torch.softmax(k[:, h] @ q[0, h] / size**0.5, 0)[1:] / heads
                e += torch.softmax(v[:, h] @ v[0, h], 0)[1:] / heads
            m = v[1:].mean(1).abs().sum(-1)
            scores = (a / a.sum() + e / e.sum()) * m
            running = scores if running is None else 0.5 * running + 0.5 * scores
        mixed = torch.zeros_like(q)
        for h in range(heads):
            mixed[:, h] = torch.softmax(q[:, h] @ k[:, h].T / size**0.5, -1) @ v[:, h]
        x = x + attention.out_proj(mixed.flatten(1))
        x = x + block.mlp(block.layer_norm2(x))
        remaining = last - number - 1
        if scores is not None and remaining >= 0 and remaining % 2 == 0:
            p = a / a.sum()
            spread = float(-(p * p.log()).sum() / np.log(n))
            drop = n - target if remaining == 0 else (n - target) / remaining**0.5 * (1 - spread**2)
            new = max(n - round(drop), target)
            best = sorted(range(n), key=lambda j: -float(running[j]))[:new]
            best.sort()
            x = x[[0, *[1 + j for j in best]]]
            running = running[best]
            kept = [kept[j] for j in best]
        lengths.append(len(kept))
    return kept, x[1:], lengths


def pictures(n):
    """Pictures of different content and spread of attention."""
    made = []
    for i in range(n):
        picture = np.asarray(tiny.picture(i, (56, 56))).astype(float)
        made.append(Image.fromarray((picture * (i + 1) / n).astype(np.uint8)))
    return made


def row_of(inputs, row):
    """One row of a batch of prompts with one picture each, without its padding."""
    skip = inputs["input_ids"].shape[1] - int(inputs["attention_mask"][row].sum())
    text = ("input_ids", "attention_mask")
    return {
        k: v[row : row + 1, skip:] if k in text else v[row : row + 1] for k, v in inputs.items()
    }
