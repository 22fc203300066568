"""Tiny random detectors, saved as the real ones are, so that the real loading code reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mmlm  # noqa: F401  (first: it installs the torchvision guard)  # isort: skip
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertTokenizerFast,
    CLIPTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)

from data_tools.detectors import groundingdino_package
from data_tools.detectors.groundingdino_package import quiet

NAMES = (
    "person bicycle car bus train bench bird cat dog horse sheep cow umbrella tie kite bottle cup "
    "fork knife spoon bowl banana apple orange carrot pizza cake chair couch bed toilet tv laptop "
    "mouse oven sink book clock vase red hot table counter kitchen light traffic"
).split()
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 300,
}


def bert_tokenizer() -> BertTokenizerFast:
    """A WordPiece tokenizer that knows the names, and "carrot" also as "car" and "##rot"."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "-", *NAMES, "##rot", "##s"]
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizerFast(tokenizer_object=core, do_lower_case=True)


def seeded(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Builds a model with the same weights in every session, whatever ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Larger random weights than initialisation makes, so that scores spread, but not to 0 and 1.

    Grounding DINO's scores are products of two normalised vectors of 256 numbers (64 in the tiny
    one of transformers), which random ones make large.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = 0.7 / parameter.shape[-1] ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        elif name.endswith("bias") and not name.endswith(SCORING_NORMS):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        elif name.endswith(SCORING_NORMS):
            parameter.data.fill_(0.15 if name.endswith("weight") else 0.0)


SCORING_NORMS = tuple(
    f"{norm}.{kind}"
    for norm in ("decoder.norm", "decoder.layer_norm", "enc_output_norm")
    for kind in ("weight", "bias")
)


def save_groundingdino(folder: Path) -> dict[str, str]:
    """Arguments of `GroundingDINO` for a tiny checkpoint; the Swin sizes must be patched."""
    text = folder / "bert"
    tokenizer = bert_tokenizer()
    tokenizer.save_pretrained(text)
    BertConfig(vocab_size=len(tokenizer), **BERT).save_pretrained(text)
    with quiet():
        from groundingdino.config import GroundingDINO_SwinT_OGC as released
    settings = {k: v for k, v in vars(released).items() if not k.startswith("__")}
    settings |= {
        "enc_layers": 1,
        "dec_layers": 2,
        "dim_feedforward": 48,
        "hidden_dim": 256,  # the package counts on it in its text positions
        "nheads": 4,
        "num_queries": 12,
    }
    config = folder / "tiny.py"
    config.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    model = seeded(lambda: groundingdino_package.build(str(config), str(text)))
    randomize(model)
    # Both lie in the released files.
    extra = {
        "label_enc.weight": torch.zeros(3, 2),
        "bert.embeddings.position_ids": torch.arange(300)[None],
    }
    state = {f"module.{name}": tensor for name, tensor in (model.state_dict() | extra).items()}
    torch.save({"model": state}, folder / "tiny.pth")
    return {
        "checkpoint": str(folder / "tiny.pth"),
        "config": str(config),
        "text_encoder": str(text),
    }


def tiny_swin(modelname: str, pretrain_img_size: int, **options: object) -> torch.nn.Module:
    """In place of the package's Swin, whose sizes are written into it."""
    with quiet():
        from groundingdino.models.GroundingDINO.backbone.swin_transformer import SwinTransformer
    return SwinTransformer(
        pretrain_img_size=pretrain_img_size,
        embed_dim=12,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        **options,
    )


def save_hf_grounding(folder: Path) -> Path:
    tokenizer = bert_tokenizer()
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            embed_dim=12,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 2, 4],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(vocab_size=len(tokenizer), **BERT),
        num_queries=12,
        encoder_layers=1,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        d_model=64,
    )
    model = seeded(lambda: GroundingDinoForObjectDetection(config))
    randomize(model)
    model.save_pretrained(folder)
    pictures = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def clip_tokenizer() -> CLIPTokenizerFast:
    """Letters only: a name of more than 16 less the prompt's is too long, as it can be for CLIP."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    # In the real one, too, padding comes first (OWLv2 leaves out texts that begin with it) and the
    # marks of a text last (CLIP's features are read at the largest number).
    letters = [*letters, *(f"{letter}</w>" for letter in letters)]
    words = ["!", *letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizerFast(vocab=vocabulary, merges=[], pad_token="!")


def save_owl(folder: Path) -> Path:
    tokenizer = clip_tokenizer()
    config = Owlv2Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 16,
        },
        projection_dim=32,
    )
    model = seeded(lambda: Owlv2ForObjectDetection(config))
    randomize(model)
    model.save_pretrained(folder)
    pictures = Owlv2ImageProcessor(size={"height": 64, "width": 64})
    Owlv2Processor(pictures, tokenizer).save_pretrained(folder)
    return folder
