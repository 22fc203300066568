"""Random LLaVA models of a fixed shape, and prompts for them: what speed and memory depend on.

Neither depends on the weights, so nothing is downloaded. The model comes with a real processor
(words ``w7`` to ``w31999``, a chat template with a system message), because methods that change the
prompt's text must tell the user's words from the template.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

import mmlm  # noqa: F401  (it makes torchvision importable beside any torch)

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["PRESETS", "Shape", "Task", "build_model", "build_processor", "make_task"]

IMAGE = 32000  # token id, as in LLaVA-1.5
VOCABULARY = 32064
PATCH = 14
WORDS = 32
"""Words of a question."""
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'][0]['text'] }} "
    "{% else %}{{ m['role'].upper() }} : "
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        layers: decoder layers.
        width: of the decoder.
        heads: query and key heads of the decoder.
        intermediate: width of the decoder's MLP.
        tower: (layers, width, heads) of the CLIP tower.
        side: pixels of a picture's side; (side / 14) ** 2 image tokens.
    """

    layers: int = 8
    width: int = 512
    heads: int = 8
    intermediate: int = 2048
    tower: tuple[int, int, int] = (6, 256, 4)
    side: int = 336

    @property
    def image_tokens(self) -> int:
        """Image tokens of a picture."""
        return (self.side // PATCH) ** 2


PRESETS = {
    "small": Shape(),
    # As many layers as a 7B model: what a method costs in some of them stands against all.
    "deep": Shape(32, 1024, 16, 2816),
    "7b": Shape(32, 4096, 32, 11008, (24, 1024, 16)),
}


def build_model(shape: Shape, dtype: str = "float32", device: str = "cpu") -> Any:
    """A random LLaVA (CLIP tower, Llama decoder) without an end token: runs have full length."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    layers, width, heads = shape.tower
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=shape.side,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=8192,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    return model


def build_processor(shape: Shape, words: int = IMAGE) -> Any:
    """A processor whose words are w7 to w31999.

    Args:
        shape: Its side is the pictures'.
        words: Size of the vocabulary without the image token, whose id this is.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    fixed = ("<pad>", "<s>", "</s>", "<unk>", "USER", ":", "ASSISTANT")
    known = [*fixed, *(f"w{i}" for i in range(len(fixed), words)), "<image>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": shape.side, "width": shape.side}
    return LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@dataclass(frozen=True)
class Task:
    """What a user brings: one picture and one question per row.

    Attributes:
        model: The model.
        processor: Its processor.
        questions: One per row.
        pictures: One per row.
    """

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    questions: tuple[str, ...]
    pictures: tuple[Image.Image, ...] = field(repr=False)

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The model's inputs."""
        return self.prepare(self.questions)

    def prepare(self, questions: tuple[str, ...], system: str = "") -> dict[str, torch.Tensor]:
        """Inputs for other questions about the same pictures, under a system message."""
        texts = []
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
            if system:
                first = {"role": "system", "content": [{"type": "text", "text": system}]}
                messages.insert(0, first)
            texts.append(
                self.processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            )
        inputs = self.processor(
            text=texts,
            images=list(self.pictures),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        device, dtype = self.model.device, self.model.dtype
        return {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }


def make_task(model: Any, processor: Any, batch: int, side: int) -> Task:
    """Random pictures and questions, the same length in every row."""
    from PIL import Image

    generator = np.random.default_rng(1)
    words = generator.integers(10, 30000, (batch, WORDS))
    pixels = generator.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    return Task(
        model,
        processor,
        tuple(" ".join(f"w{i}" for i in row) for row in words),
        tuple(Image.fromarray(picture) for picture in pixels),
    )
