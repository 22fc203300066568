"""Tiny random vision-language models of every supported family, built offline in milliseconds.

``build(family)`` returns ``(model, processor)``; weights are random but fixed by a seed. Widths are
small and different wherever the real models' differ (H != KV heads, tower width != text width), so
that a mix-up of dimensions fails.
"""

from __future__ import annotations

import functools
import os

import mmlm  # noqa: F401  (first: it installs the torchvision guard)  # isort: skip
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl import InternVLVideoProcessor

ALL = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "paligemma",
    "gemma3",
)
#: The five that differ most: one run of visual tokens; packed tiles; 3-D positions and features
#: that enter several layers; framed tiles in padded rows; bidirectional images in sliding windows.
CORE = ("llava", "llava_next", "qwen3_vl", "idefics3", "gemma3")


def _chosen(names: str) -> tuple[str, ...]:
    """The families that tests run on: ``core``, ``all``, or names with commas between them."""
    chosen = {"core": CORE, "all": ALL}.get(names) or tuple(names.split(","))
    unknown = set(chosen) - set(ALL)
    if unknown:
        raise ValueError(f"MMLM_FAMILIES={names}: no tiny model of {', '.join(sorted(unknown))}.")
    return chosen


FAMILIES = _chosen(os.environ.get("MMLM_FAMILIES", "core"))

_SENTENCES = [
    "describe the image in detail .",
    "is there a dog in the picture ? answer yes or no .",
    "user : what is shown here ? assistant : a cat sits on a red couch near two remote controls .",
    "the quick brown fox jumps over the lazy dog while people watch a train in the station .",
]
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE_TOKENS{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", "<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=special,
    )


def _text(cls, vocabulary: int, layers: int = 4, **more):
    return cls(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=False,
        initializer_range=0.15,
        **more,
    )


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        projection_dim=32,
        initializer_range=0.15,
    )


def _siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )


def _llava(layers: int):
    tok = _tokenizer(image_token="<image>")
    pictures = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = LlavaProcessor(
        pictures,
        tok,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("IMAGE_TOKENS", "<image>"),
    )
    config = LlavaConfig(
        vision_config=_clip(),
        text_config=_text(LlamaConfig, len(tok), layers),
        image_token_id=tok.image_token_id,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration, config, processor


def _llava_next(layers: int):
    tok = _tokenizer(image_token="<image>")
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        pictures,
        tok,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("IMAGE_TOKENS", "<image>"),
    )
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text(LlamaConfig, len(tok), layers),
        image_token_id=tok.image_token_id,
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    return LlavaNextForConditionalGeneration, config, processor


def _llava_onevision(layers: int):
    tok = _tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    pictures = LlavaOnevisionImageProcessor(
        size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints
    )
    videos = LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56})
    processor = LlavaOnevisionProcessor(
        pictures,
        tok,
        videos,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_TEMPLATE.replace("IMAGE_TOKENS", "<image>"),
    )
    config = LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=_text(Qwen2Config, len(tok), layers),
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return LlavaOnevisionForConditionalGeneration, config, processor


def _qwen2_5_vl(layers: int):
    tok = _tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    pictures = Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=size)
    videos = Qwen2VLVideoProcessor(patch_size=14, merge_size=2, size=size)
    template = _TEMPLATE.replace("IMAGE_TOKENS", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2_5_VLProcessor(pictures, tok, videos, chat_template=template)
    text = _text(Qwen2Config, len(tok), layers).to_dict()
    text.pop("model_type")
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [2],
            "initializer_range": 0.15,
        },
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        vision_start_token_id=tok.vision_start_token_id,
        vision_end_token_id=tok.vision_end_token_id,
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration, config, processor


def _internvl(layers: int):
    tok = _tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    pictures = GotOcr2ImageProcessor(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=2
    )
    videos = InternVLVideoProcessor(size={"height": 56, "width": 56})
    processor = InternVLProcessor(
        pictures,
        tok,
        videos,
        image_seq_length=4,
        chat_template=_TEMPLATE.replace("IMAGE_TOKENS", "<IMG_CONTEXT>"),
    )
    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=[56, 56],
        patch_size=[14, 14],
        initializer_range=0.15,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=_text(Qwen2Config, len(tok), layers),
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration, config, processor


def _qwen3_vl(layers: int):
    tok = _tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    pictures = Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=size)
    videos = Qwen3VLVideoProcessor(patch_size=14, merge_size=2, size=size)
    template = _TEMPLATE.replace("IMAGE_TOKENS", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen3VLProcessor(pictures, tok, videos, chat_template=template)
    text = _text(Qwen2Config, len(tok), layers).to_dict()
    for name in ("model_type", "layer_types"):  # which this family does not have
        text.pop(name)
    text["head_dim"] = 8
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.15,
        },
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        vision_start_token_id=tok.vision_start_token_id,
        vision_end_token_id=tok.vision_end_token_id,
        tie_word_embeddings=False,
    )
    return Qwen3VLForConditionalGeneration, config, processor


_TILE_TOKENS = [
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]


def _tiled_tokenizer() -> PreTrainedTokenizerFast:
    tok = _tokenizer(
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        end_of_utterance_token="<end_of_utterance>",
    )
    tok.add_tokens(_TILE_TOKENS, special_tokens=True)
    return tok


def _tiled(config_class, vocabulary: int, image_token_id: int, layers: int):
    return config_class(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "initializer_range": 0.15,
        },
        text_config=_text(LlamaConfig, vocabulary, layers),
        image_token_id=image_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
    )


_TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}


def _idefics3(layers: int):
    tok = _tiled_tokenizer()
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**_TILES),
        tok,
        image_seq_len=4,
        chat_template=_TEMPLATE.replace("IMAGE_TOKENS", "<image>"),
    )
    config = _tiled(Idefics3Config, len(tok), processor.image_token_id, layers)
    return Idefics3ForConditionalGeneration, config, processor


def _smolvlm(layers: int):
    tok = _tiled_tokenizer()
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**_TILES),
        tok,
        SmolVLMVideoProcessor(
            **_TILES,
            num_frames=4,
            fps=1,
            video_sampling={"video_size": {"longest_edge": 56}, "max_frames": 4, "fps": 1},
        ),
        image_seq_len=4,
        chat_template=_TEMPLATE.replace("IMAGE_TOKENS", "<image>"),
    )
    config = _tiled(SmolVLMConfig, len(tok), processor.image_token_id, layers)
    return SmolVLMForConditionalGeneration, config, processor


def _paligemma(layers: int):
    tok = _tokenizer(image_token="<image>")
    pictures = SiglipImageProcessor(size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    processor = PaliGemmaProcessor(
        pictures, tok, chat_template=_TEMPLATE.replace("IMAGE_TOKENS", "<image>")
    )
    config = PaliGemmaConfig(
        vision_config=_siglip(),
        # The processor has added its location tokens by now.
        text_config=_text(GemmaConfig, len(tok), layers, head_dim=16),
        image_token_index=tok.image_token_id,
        projection_dim=64,
        hidden_size=64,
        tie_word_embeddings=False,
    )
    return PaliGemmaForConditionalGeneration, config, processor


def _gemma3(layers: int):
    tok = _tokenizer(
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    pictures = Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = Gemma3Processor(
        pictures,
        tok,
        image_seq_length=4,
        chat_template=_TEMPLATE.replace("IMAGE_TOKENS", "<start_of_image>"),
    )
    text = _text(
        Gemma3TextConfig,
        len(tok),
        layers,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=12,  # shorter than every prompt
        layer_types=[
            "full_attention" if i % 4 == 2 else "sliding_attention" for i in range(layers)
        ],
    )
    config = Gemma3Config(
        vision_config=_siglip(),
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    return Gemma3ForConditionalGeneration, config, processor


_BUILDERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}


def build(family: str, *, layers: int = 4, seed: int = 0):
    """A fresh tiny model in eval mode and its processor."""
    cls, config, processor = _BUILDERS[family](layers)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = cls(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # left for a checkpoint to fill
            torch.nn.init.normal_(parameter, std=0.15)
    torch.random.set_rng_state(state)
    model.generation_config = GenerationConfig(pad_token_id=1, bos_token_id=2, eos_token_id=3)
    return model, processor


@functools.cache
def shared(family: str):
    """The one model of a family that read-only tests share."""
    return build(family)


def picture(seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A random picture, (width, height)."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def inputs(processor, prompts: list[str], pictures: list[list[Image.Image]]):
    """Model inputs of a batch; each prompt's pictures stand before its text."""
    texts = []
    for text, own in zip(prompts, pictures, strict=True):
        content = [{"type": "image"} for _ in own] + [{"type": "text", "text": text}]
        texts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        )
    options = {"padding": True, "return_tensors": "pt", "padding_side": "left"}
    if not any(pictures) and isinstance(processor, PaliGemmaProcessor):
        # That processor refuses prompts without a picture; the model does not.
        return dict(processor.tokenizer(text=texts, return_token_type_ids=True, **options))
    batch = processor(text=texts, images=pictures if any(pictures) else None, **options)
    batch.pop("labels", None)  # made by PaliGemma's processor for prompts too
    return dict(batch)
