"""Models around towers and decoders of the golden vectors, and what the tests of pruning share."""

from __future__ import annotations

import json

import golden
import numpy as np
import tiny
import torch
from transformers import (
    CLIPVisionConfig,
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
