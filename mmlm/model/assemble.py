"""A LLaVA put together from a vision tower and a language model, and its word-level processor.

`assemble` builds a stock `LlavaForConditionalGeneration`: no class of our own, so the checkpoint it
saves is read by plain transformers. `word_processor` builds the tokenizer, the image processor and
the chat template of the embedded world's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )

__all__ = ["SPECIAL_TOKENS", "assemble", "unknown_words", "word_processor", "word_tokenizer"]

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
"""The specials of a word-level vocabulary; their ids are their places in this tuple."""

CHAT_TEMPLATE = """\
<bos>
{%- for message in messages -%}
    {%- if message['role'] not in ['user', 'assistant'] -%}
        {{- raise_exception("role " ~ message['role'] ~ " is unknown: use user or assistant") -}}
    {%- endif -%}
    {{- ' ' ~ message['role'] ~ ' :' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
        {%- if message['content'] is string -%}
            {{- ' ' ~ message['content'] -}}
        {%- else -%}
            {%- for part in message['content'] -%}{{- ' ' ~ part['text'] -}}{%- endfor -%}
        {%- endif -%}
        {{- ' <eos>' -}}
        {%- endgeneration -%}
    {%- elif message['content'] is string -%}
        {{- ' ' ~ message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- ' <image>' if part['type'] == 'image' else ' ' ~ part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{{- ' assistant :' if add_generation_prompt else '' -}}
"""


def assemble(
    vision: PreTrainedConfig | PreTrainedModel,
    language: PreTrainedConfig | PreTrainedModel,
    *,
    image_token_id: int,
    vision_feature_layer: int = -1,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    projector_activation: str = "gelu",
    image_seq_length: int | None = None,
    copy: bool = True,
) -> LlavaForConditionalGeneration:
    """Puts a tower and a causal language model together with LLaVA's two-layer MLP between them.

    Args:
        vision: a vision config (random weights) or a vision model whose weights are taken over.
        language: a text config or a causal language model, likewise.
        image_token_id: id of the placeholder that one image feature replaces, in [0, vocabulary).
        vision_feature_layer: hidden state handed to the projector, -1 the last (LLaVA-1.5: -2).
        vision_feature_select_strategy: "default" drops the class token, "full" keeps it.
        projector_activation: activation between the projector's two layers (LLaVA: "gelu").
        image_seq_length: tokens of one picture, for the config; None: as many as a tower with a
            class token makes of a picture of its own size.
        copy: whether given models are copied; False makes their modules part of the new model,
            which saves their memory.

    Returns:
        The stock model in training mode, the projector random; in float32, or in the precision
        and on the device of a given language model.

    Raises:
        ValueError: the image token is outside the language model's vocabulary.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

    vision, language = (
        deepcopy(part) if copy and isinstance(part, PreTrainedModel) else part
        for part in (vision, language)
    )
    vision_config = vision.config if isinstance(vision, PreTrainedModel) else vision
    text_config = language.config if isinstance(language, PreTrainedModel) else language
    if not 0 <= image_token_id < text_config.vocab_size:
        raise ValueError(
            f"image_token_id is {image_token_id}, the language model knows ids 0 to "
            f"{text_config.vocab_size - 1}: resize its embeddings before assembling"
        )
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        projector_hidden_act=projector_activation,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        image_seq_length=image_seq_length
        or _image_tokens(vision_config, vision_feature_select_strategy),
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    if not isinstance(vision, PreTrainedModel) and not isinstance(language, PreTrainedModel):
        return LlavaForConditionalGeneration(config)
    return _around(vision, language, config)


def _around(vision: Any, language: Any, config: Any) -> LlavaForConditionalGeneration:
    """The stock model with given parts inside; nothing as large as they are is made besides."""
    import torch
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        LlavaForConditionalGeneration,
        PreTrainedModel,
    )

    if not isinstance(vision, PreTrainedModel):
        vision = AutoModel.from_config(config.vision_config)
    if not isinstance(language, PreTrainedModel):
        language = AutoModelForCausalLM.from_config(config.text_config)
    place = {"device": language.device, "dtype": language.dtype}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector.to_empty(device="cpu").float()
    for linear in (projector.linear_1, projector.linear_2):  # as the library initialises it
        std = getattr(config.text_config, "initializer_range", 0.02)
        torch.nn.init.normal_(linear.weight, std=std)
        torch.nn.init.zeros_(linear.bias)
    projector.to(**place)
    model.model.vision_tower = vision.to(**place)
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    config.dtype = config.text_config.dtype = config.vision_config.dtype = language.dtype
    model.requires_grad_(True).train()
    return model


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, split at blanks and punctuation, `<unk>` for the rest.

    Args:
        words: the vocabulary without the specials, lower case, in the order of the ids
            (the first word gets id 5, after `SPECIAL_TOKENS`).

    Raises:
        ValueError: a word is given twice, or could never be produced by the splitter.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [*SPECIAL_TOKENS, *words]
    if len(set(vocabulary)) != len(vocabulary):
        twice = sorted({word for word in vocabulary if vocabulary.count(word) > 1})
        raise ValueError(f"words given more than once: {twice}; the vocabulary needs each once")
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    for word in words:
        pieces = [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(word)]
        if pieces != [word] or word != word.lower():
            raise ValueError(
                f"{word!r} is split into {pieces}: give lower-case words without blanks, "
                "and each punctuation sign as a word of its own"
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def word_processor(
    words: Sequence[str],
    *,
    image_size: int,
    patch_size: int,
    pixel_mean: float = 127.5,
    pixel_std: float = 64.0,
) -> LlavaProcessor:
    """The processor of a word-level LLaVA: tokenizer, chat template and square CLIP pictures.

    The chat template writes `<bos> user : <image> QUESTION assistant : ANSWER <eos>`, further
    turns follow as `user : ... assistant : ... <eos>`. Any picture is scaled to `image_size` on
    its shorter side and cropped to the middle; one of that size already is left as it is.

    Args:
        words: vocabulary without the specials, see `word_tokenizer`.
        image_size: side of the square fed to the tower, pixels.
        patch_size: side of a patch, pixels; an image becomes `(image_size / patch_size)^2` tokens.
        pixel_mean: subtracted from each channel, on the scale 0 to 255.
        pixel_std: each channel is divided by it, on the scale 0 to 255.
    """
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=[pixel_mean / 255.0] * 3,
            image_std=[pixel_std / 255.0] * 3,
        ),
        tokenizer=word_tokenizer(words),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def unknown_words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The words of a text that the tokenizer can only read as `<unk>`, in order, each once.

    A tokenizer without an unknown token (byte-level ones know every text) gives an empty list.
    """
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    found = (text[a:b] for token, (a, b) in spans if token == tokenizer.unk_token_id)
    return list(dict.fromkeys(found))


def _image_tokens(vision_config: PreTrainedConfig, strategy: str) -> int:
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return patches if strategy == "default" else patches + 1
