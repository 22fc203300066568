"""Vision towers of open_clip as the stock vision models of transformers.

open_clip's own vision transformer is the network that transformers calls `CLIPVisionModel`, and
timm's SigLIP transformer is its `SiglipVisionModel`; only the names of the weights differ. So a
tower is copied into the stock class, and both are compared before anybody uses the copy: a LLaVA
around it needs no code of ours and no open_clip to be loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from mmlm.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import CLIPVisionModel, SiglipVisionModel

__all__ = ["SUPPORTED", "from_open_clip"]

SUPPORTED = (
    "Supported are open_clip's own vision transformers with a class token and a first layer norm "
    "(OpenAI, LAION, DataComp, DFN, MetaCLIP ... weights) and timm's SigLIP and SigLIP 2 "
    "transformers; ResNet, ConvNeXt, EVA and CLIPA towers have no stock class in transformers."
)

TOLERANCE = 1e-5
"""Largest difference of hidden states, relative to the largest entry if that is above 1."""


def from_open_clip(visual: nn.Module) -> CLIPVisionModel | SiglipVisionModel:
    """Copies a tower of open_clip into the stock class of transformers.

    Args:
        visual: the image tower of an open_clip model (`model.visual`), or the whole model.

    Returns:
        The tower in float32 and evaluation mode, every hidden state within `TOLERANCE` of the
        original's.

    Raises:
        UnsupportedModel: transformers has no class that computes the same.
    """
    import torch
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    visual = getattr(visual, "visual", visual)
    if isinstance(visual, VisionTransformer):
        convert: Callable[[Any], Any] = _clip
    elif isinstance(visual, TimmModel):
        visual, convert = visual.trunk, _siglip
    else:
        raise _unsupported(visual, "it is no vision transformer")
    # A copy on the CPU in full precision: the original stays as it is, and the comparison is exact.
    original = deepcopy(visual).to("cpu", torch.float32).eval()
    tower = convert(original).eval()
    _compare(original, tower)
    return tower


def _clip(visual: Any) -> CLIPVisionModel:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    blocks = list(visual.transformer.resblocks)
    _refuse_clip(visual, blocks)
    first = blocks[0]
    config = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=first.mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=first.attn.num_heads,
        image_size=_square(visual, visual.image_size),
        patch_size=_square(visual, visual.patch_size),
        hidden_act=_activation(visual, first.mlp.gelu),
        layer_norm_eps=visual.ln_pre.eps,
    )
    weights = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.patch_embedding.weight": visual.conv1.weight,
        "embeddings.position_embedding.weight": visual.positional_embedding,
        **_affine("pre_layrnorm", visual.ln_pre),
    }
    for i, block in enumerate(blocks):
        at = f"encoder.layers.{i}"
        weights |= {
            **_affine(f"{at}.layer_norm1", block.ln_1),
            **_thirds(f"{at}.self_attn", block.attn.in_proj_weight, block.attn.in_proj_bias),
            **_scaled(f"{at}.self_attn.out_proj", block.attn.out_proj, block.ls_1),
            **_affine(f"{at}.layer_norm2", block.ln_2),
            **_affine(f"{at}.mlp.fc1", block.mlp.c_fc),
            **_scaled(f"{at}.mlp.fc2", block.mlp.c_proj, block.ls_2),
        }
    model = CLIPVisionModel(config)
    # CoCa normalises what its pooler returns; hidden states, all that a LLaVA reads, come before.
    pooled = visual.ln_post.normalized_shape[0] != config.hidden_size
    norm = model.post_layernorm if pooled else visual.ln_post
    _load(model, weights | _affine("post_layernorm", norm))
    return model


def _refuse_clip(visual: Any, blocks: list[Any]) -> None:
    """Raises for the variants of open_clip's transformer that CLIP did not have."""
    from open_clip.transformer import ResidualAttentionBlock
    from torch import nn

    if other := {type(b).__name__ for b in blocks if type(b) is not ResidualAttentionBlock}:
        raise _unsupported(visual, f"its blocks are {', '.join(sorted(other))}")
    if not isinstance(visual.ln_pre, nn.LayerNorm):
        raise _unsupported(visual, "it has no layer norm before the first block (no_ln_pre)")
    if len({norm.eps for norm in (visual.ln_pre, *(b.ln_1 for b in blocks))}) > 1:
        raise _unsupported(visual, "its layer norms have different epsilons")


def _siglip(trunk: Any) -> SiglipVisionModel:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    _refuse_siglip(trunk)
    blocks = list(trunk.blocks)
    first, embed = blocks[0], trunk.patch_embed
    config = SiglipVisionConfig(
        hidden_size=trunk.embed_dim,
        intermediate_size=first.mlp.fc1.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=first.attn.num_heads,
        image_size=_square(trunk, embed.img_size),
        patch_size=_square(trunk, embed.patch_size),
        hidden_act=_activation(trunk, first.mlp.act),
        layer_norm_eps=first.norm1.eps,
        vision_use_head=False,  # the pooling head makes one vector of a picture; LLaVA reads none
    )
    weights = {
        **_affine("embeddings.patch_embedding", embed.proj),
        "embeddings.position_embedding.weight": trunk.pos_embed[0],
        **_affine("post_layernorm", trunk.norm),
    }
    for i, block in enumerate(blocks):
        at = f"encoder.layers.{i}"
        weights |= {
            **_affine(f"{at}.layer_norm1", block.norm1),
            **_thirds(f"{at}.self_attn", block.attn.qkv.weight, block.attn.qkv.bias),
            **_scaled(f"{at}.self_attn.out_proj", block.attn.proj, block.ls1),
            **_affine(f"{at}.layer_norm2", block.norm2),
            **_affine(f"{at}.mlp.fc1", block.mlp.fc1),
            **_scaled(f"{at}.mlp.fc2", block.mlp.fc2, block.ls2),
        }
    model = SiglipVisionModel(config)
    _load(model, weights)
    return model


def _refuse_siglip(trunk: Any) -> None:
    """Raises for the timm models that are not built like SigLIP's transformer."""
    from timm.models.vision_transformer import Block, VisionTransformer
    from torch import nn

    if type(trunk) is not VisionTransformer:
        raise _unsupported(trunk, "it is no plain vision transformer of timm")
    if trunk.num_prefix_tokens:
        raise _unsupported(trunk, f"it has {trunk.num_prefix_tokens} tokens before the patches")
    parts = {
        "a norm before the first block": [trunk.norm_pre, trunk.patch_embed.norm],
        "norms of queries, keys or inside a block": [
            norm
            for block in trunk.blocks
            for norm in (block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm)
        ],
    }
    for what, modules in parts.items():
        if any(not isinstance(module, nn.Identity) for module in modules):
            raise _unsupported(trunk, f"it has {what}")
    if trunk.pos_embed is None or trunk.patch_embed.proj.bias is None:
        raise _unsupported(trunk, "it has no learned positions, or patches without a bias")
    if any(type(block) is not Block or block.attn.qkv.bias is None for block in trunk.blocks):
        raise _unsupported(trunk, "its blocks differ from SigLIP's")
    if not isinstance(trunk.norm, nn.LayerNorm):
        raise _unsupported(trunk, "it has no last layer norm")


def _affine(name: str, module: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def _thirds(name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Rows of one matrix for queries, keys and values as three."""
    pieces = zip("qkv", weight.chunk(3), bias.chunk(3), strict=True)
    return {
        f"{name}.{part}_proj.{kind}": value
        for part, w, b in pieces
        for kind, value in (("weight", w), ("bias", b))
    }


def _scaled(name: str, linear: Any, scale: Any) -> dict[str, Tensor]:
    """A linear map with the layer scale behind it folded in: g (W x + b) = (g W) x + g b."""
    gain = getattr(scale, "gamma", None)
    if gain is None:
        return _affine(name, linear)
    return {f"{name}.weight": gain[:, None] * linear.weight, f"{name}.bias": gain * linear.bias}


def _activation(visual: Any, module: Any) -> str:
    """The name under which transformers knows an activation."""
    from open_clip.transformer import QuickGELU
    from torch import nn

    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    if type(module).__name__ == "GELUTanh":  # timm's
        return "gelu_pytorch_tanh"
    raise _unsupported(visual, f"its activation is {type(module).__name__}")


def _square(visual: Any, size: Any) -> int:
    sides = {int(side) for side in (size if isinstance(size, tuple | list) else (size,))}
    if len(sides) > 1:
        raise _unsupported(visual, f"its pictures or patches are not square: {tuple(size)}")
    return sides.pop()


def _load(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copies every weight; strict, so that none is forgotten and none is left over."""
    model.load_state_dict({name: value.detach() for name, value in weights.items()})


def _compare(original: Any, tower: Any) -> None:
    """Raises unless both towers compute the same hidden states, to `TOLERANCE`."""
    import torch

    size = tower.config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = tower(pixels, output_hidden_states=True).hidden_states[1:]
        if hasattr(original, "transformer"):
            out = original.forward_intermediates(
                pixels, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
            )
            parts = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
            want = [torch.cat(pair, dim=1) for pair in parts]
        else:
            want = original.forward_intermediates(pixels, intermediates_only=True, output_fmt="NLC")
    for layer, (a, b) in enumerate(zip(got, want, strict=True), start=1):
        worst = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        if not worst <= TOLERANCE:  # also when it is not a number
            raise _unsupported(
                original, f"after the weights were copied, layer {layer} differs by {worst:.1e}"
            )


def _unsupported(visual: Any, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the tower {type(visual).__name__} cannot become a stock vision model: {why}",
        advice=SUPPORTED,
    )
