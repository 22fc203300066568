"""A LLaVA of your own: any vision transformer, any causal language model, ready to be trained.

The result is a stock `LlavaForConditionalGeneration` with a stock `LlavaProcessor` (LLaVA,
arXiv 2304.08485; two-layer MLP projector as in LLaVA-1.5, arXiv 2310.03744), so `mmlm.load`, plain
transformers and every recipe in `training/` read it. Its projector is random: it says nothing
sensible about pictures before the `pretrain` stage has trained it.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import InputError
from mmlm.model.assemble import assemble

if TYPE_CHECKING:
    from torch import nn
    from transformers import (
        BaseImageProcessor,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from mmlm.model.towers import Tower

__all__ = ["Strategy", "compose"]

Strategy = Literal["auto", "default", "full"]
PAD = "<pad>"


def compose(
    vision: str | Path | nn.Module,
    language: str | Path | PreTrainedModel,
    *,
    vision_weights: str | Path | None = None,
    image_processor: str | Path | BaseImageProcessor | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    chat_template: str | None = None,
    image_token: str = "<image>",
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: Strategy = "auto",
    projector_activation: str = "gelu",
    pad_to_multiple_of: int = 1,
    dtype: str = "float32",
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Puts a vision tower and a language model together, with the processor that fits them.

    Args:
        vision: a folder or an id of transformers (CLIP, SigLIP, DINOv2, ViT ...; of a whole CLIP
            or SigLIP the tower is taken); "open_clip:" with a folder, an id or a name of open_clip;
            or an object of either library.
        language: a folder, an id, a file `*.gguf`, or an object: any causal language model whose
            head is one matrix.
        vision_weights: for a name of open_clip: a file, a tag, or "random".
        image_processor: instead of the tower's own; a folder, an id or an object.
        tokenizer: of the language model; needed when that is an object.
        chat_template: Jinja source; "vicuna" for LLaVA-1.5's. None: the language model's own,
            extended by pictures, or "vicuna" if it has none.
        image_token: placeholder of one image feature; added to the tokenizer if unknown.
        vision_feature_layer: hidden state of the tower that is used (LLaVA-1.5: -2).
        vision_feature_select_strategy: "default" leaves the first token out (the class token),
            "full" keeps all; "auto": "default" for towers with a class token, else "full".
            Registers (DINOv2) stay image tokens.
        projector_activation: activation inside the projector.
        pad_to_multiple_of: the vocabulary's rows become a multiple of it; 1 pads nothing.
        dtype: precision of the model, "float32", "bfloat16", "float16", or "auto" for the one that
            the language model is stored in. A language model given as an object keeps its own.
        seed: of the projector's weights, and of a tower's that are asked to be random.

    Returns:
        Model and processor. The model is in evaluation mode, objects that were given are copied.

    Raises:
        InputError: something is not found, forgotten, or does not fit the rest.
        MissingTensors: a checkpoint does not fill its model.
        UnsupportedModel: stock LLaVA cannot hold one of the parts without changing its outputs.
    """
    import torch
    from transformers import PreTrainedModel

    from mmlm.engine.branches.template import remember_processor
    from mmlm.model.language_models import (
        add_tokens,
        check_head,
        load_language,
        untie_foreign_head,
    )
    from mmlm.model.towers import load_tower

    vision, language = (
        deepcopy(part) if isinstance(part, PreTrainedModel) else part for part in (vision, language)
    )
    # Whoever composes a model in the middle of a program finds its random numbers as they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = load_tower(
            vision,
            weights=vision_weights,
            image_processor=image_processor,
            layer=vision_feature_layer,
        )
        strategy = _strategy(vision_feature_select_strategy, tower)
        language, given = load_language(language, tokenizer, dtype=dtype)
        check_head(language)
        untie_foreign_head(language)
        words = deepcopy(given)
        # The end token is no padding: a loss that leaves padding out would unlearn to stop.
        own_pad = words.pad_token not in (None, words.eos_token)
        new = [image_token] if own_pad else [image_token, PAD]
        add_tokens(language, words, new, pad_to_multiple_of)
        if not own_pad:
            words.pad_token = PAD
        words.padding_side = "left"
        processor = _processor(tower, words, strategy, image_token, chat_template)
        torch.manual_seed(seed)
        model = assemble(
            tower.model,
            language,
            image_token_id=processor.image_token_id,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=strategy,
            projector_activation=projector_activation,
            image_seq_length=tower.n_patches + tower.n_prefix - (strategy == "default"),
            copy=False,
        ).eval()
    _set_ends(model, processor, language)
    remember_processor(model, processor)
    return model, processor


def _strategy(asked: Strategy, tower: Tower) -> Literal["default", "full"]:
    if asked == "auto":
        return "default" if tower.n_prefix else "full"
    if asked == "default" and not tower.n_prefix:
        raise InputError(
            f"{type(tower.model).__name__} has no class token: strategy 'default' would leave out "
            "the first patch of every picture",
            advice="Take 'full' or 'auto'.",
        )
    return asked


def _processor(
    tower: Tower,
    tokenizer: PreTrainedTokenizerBase,
    strategy: str,
    image_token: str,
    chat_template: str | None,
) -> LlavaProcessor:
    from transformers import LlavaProcessor

    from mmlm.model.chat_templates import check_template, vicuna, with_images

    own: Any = tokenizer.chat_template
    if isinstance(own, dict):  # some models have a second one, for tools
        own = own.get("default")
    if chat_template == "vicuna" or (chat_template is None and not own):
        chat_template = vicuna(image_token, tokenizer.eos_token or "")
    elif chat_template is None:
        chat_template = with_images(own, image_token)
    # One template only, the processor's: the tokenizer's would be found first by some.
    tokenizer.chat_template = None
    processor = LlavaProcessor(
        image_processor=tower.image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=tower.n_prefix,
        image_token=image_token,
        chat_template=chat_template,
    )
    if processor.image_token != image_token:  # the tokenizer's goes first in the library
        raise InputError(
            f"the tokenizer has an image token already, {processor.image_token!r}, and "
            f"{image_token!r} is asked for",
            advice=f"Give image_token {processor.image_token!r}.",
        )
    check_template(processor, image_token)
    return processor


def _set_ends(model: Any, processor: Any, language: Any) -> None:
    """Generation stops at every token that ends an answer: the model's own ones, the template's."""
    from transformers import GenerationConfig

    from mmlm.answers import answer_frame
    from mmlm.inputs import message

    tokenizer = processor.tokenizer
    closing = answer_frame(processor, [message("user", "?")]).closing.strip()
    of_turn = tokenizer.convert_tokens_to_ids(closing) if closing else None
    own = language.generation_config.eos_token_id
    ends = [*own] if isinstance(own, list) else [own]
    ends = [e for e in (*ends, tokenizer.eos_token_id, of_turn) if e is not None]
    unique = list(dict.fromkeys(ends))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=unique if len(unique) > 1 else (unique or [None])[0],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
