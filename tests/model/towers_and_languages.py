"""Tiny towers of open_clip and tiny language models with a tokenizer, for the tests of compose."""

import mmlm  # noqa: F401  (first: it installs the torchvision guard)  # isort: skip
import open_clip
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LANGUAGES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 12}),
    "mistral": (MistralConfig, {}),
    "gemma": (GemmaConfig, {"head_dim": 12}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 12}),
    "phi3": (Phi3Config, {}),
    "gpt2": (GPT2Config, {}),
}


def language(name="llama", rows=330, **more):
    """A tiny random causal language model; its weights are large enough to tell outputs apart."""
    kind, own = LANGUAGES[name] if isinstance(name, str) else (name, {})
    config = kind(
        **{
            "vocab_size": rows,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
            **own,
            **more,
        }
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def tokenizer(template=None, pad=True):
    words = tiny._tokenizer()
    words.chat_template = template
    if not pad:
        words.pad_token = None
    return words


def clip(quick_gelu=True, **vision):
    """A tiny random CLIP of open_clip: 16 patches and a class token."""
    torch.manual_seed(6)
    model = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 32, "layers": 3, "width": 40, "head_width": 10, "patch_size": 8}
        | vision,
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
        quick_gelu=quick_gelu,
    ).eval()
    return _louder(model)


def siglip(name="vit_base_patch16_siglip_224", **more):
    """open_clip's wrapper around a tiny timm SigLIP: 4 patches, no class token."""
    import timm
    from open_clip.timm_model import TimmModel

    torch.manual_seed(7)
    model = TimmModel("vit_tiny_patch16_224", embed_dim=24, pool="token", proj="none")
    model.trunk = timm.create_model(
        name, num_classes=0, depth=3, embed_dim=40, num_heads=4, img_size=32, **more
    )
    model.image_size = (32, 32)
    return _louder(model.eval())


def _louder(model):
    """Larger matrices: fresh ones hardly change what passes, and would hide a wrong copy."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model
