"""Where the parts of a model are.

Every part is found by declared paths tried in order. A family that deviates is one row of
:data:`mmlm.engine.families.FAMILIES`; a model type without a row gets the generic row, and a
missing part is an error that names the part, the class and what was tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmlm.engine.families import FAMILIES, GENERIC
from mmlm.engine.masks.kinds import SLIDING, kinds, reasons_against_masks, reasons_against_removal
from mmlm.errors import LayoutError, UnknownPlaceholder, UnsupportedModel

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = ["Anatomy", "unwrap"]


_O_PROJ_PATHS = ("self_attn.o_proj", "self_attn.out_proj", "attention.o_proj", "attn.o_proj")
_ATTENTION_PATHS = ("self_attn", "attention", "attn")
# A norm between the MLP and the residual add belongs to what is added, so it is tried first.
_MLP_PATHS = ("post_feedforward_layernorm", "mlp", "feed_forward", "block_sparse_moe")
_INPUT_NORM_PATHS = ("input_layernorm", "ln_1")
# Where two norms surround the MLP, "post_attention" names one on the output of the attention.
_MLP_NORM_PATHS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
_MLP_ONLY_PATHS = _MLP_PATHS[1:]
_TOWER_BLOCK_PATHS = ("encoder.layers", "encoder.layer", "blocks", "layers", "encoder.blocks")
_CLS_PATHS = ("embeddings.class_embedding", "embeddings.cls_token", "class_embedding", "cls_token")
_NORM_PATHS = ("norm", "final_layernorm", "final_layer_norm")


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a PEFT wrapper; any other model as it is.

    Hooks belong on the inner model: the wrapper's ``generate`` never calls the wrapper's forward.
    """
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


class Anatomy:
    """The parts of a vision-language model, found once and by name.

    Attributes:
        model: The model with its language-modelling head, out of its PEFT wrapper if it has one.
        family: The row of :data:`FAMILIES` in force.
        family_name: The configuration's ``model_type``.
        composite: The inner model that receives ``input_ids`` and merges image features.
        text: The text decoder; ``layers`` are its decoder layers, ``norm`` its last norm.
        head: The language-modelling head.
        width: Width D of the text decoder.
        n_layers: Number of decoder layers N_l.
        n_heads: Query heads H of a layer.
        n_kv_heads: Key/value heads of a layer.
        image_ids: Ids of visual placeholder tokens.
        wrapper_ids: Ids of tokens that only frame an image.

    Raises:
        UnsupportedModel: If a part every method needs is missing.
    """

    def __init__(self, model: Any) -> None:
        model = unwrap(model)
        self.model = model
        config: Any = getattr(model, "config", None)
        text = model.get_decoder() if callable(getattr(model, "get_decoder", None)) else None
        if config is None or text is None:
            raise UnsupportedModel(
                f"{type(model).__name__} is not a Hugging Face generation model: it lacks "
                "`config` or a text decoder (`get_decoder()`).",
                advice="Load it with transformers' AutoModelForImageTextToText.",
            )
        self.config = config
        self.family_name: str = config.model_type
        self.family = FAMILIES.get(self.family_name, GENERIC)
        self.composite: Any = self._part(model, "inner model", ("model",))
        self.text: Any = text
        self.layers: Any = self._part(self.text, "decoder layers", ("layers", "h", "blocks"))
        self.norm: Any = self._part(self.text, "last norm", _NORM_PATHS)
        self.head: Any = model.get_output_embeddings()
        if self.head is None:
            raise UnsupportedModel(
                f"{type(model).__name__} ({self.family_name}) has no language-modelling head: "
                "tried get_output_embeddings().",
                advice="Load it with transformers' AutoModelForImageTextToText.",
            )
        text_config = config.get_text_config()
        self.width: int = self._part(text_config, "width", ("hidden_size", "n_embd"))
        self.n_layers: int = len(self.layers)
        self.n_heads: int = self._part(
            text_config, "number of heads", ("num_attention_heads", "n_head")
        )
        self.n_kv_heads: int = getattr(text_config, "num_key_value_heads", None) or self.n_heads
        self.image_ids = self._ids(self.family.image_ids)
        self.wrapper_ids = self._ids(self.family.wrapper_ids)
        if not self.image_ids:
            raise UnknownPlaceholder(
                f"{type(model).__name__} ({self.family_name}) has no visual placeholder token: "
                f"its configuration has none of {', '.join(self.family.image_ids)}.",
                advice="mmlm needs a vision-language model; `mmlm doctor MODEL` tells more.",
            )

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self._part(self.composite, "vision tower", self.family.tower)

    @property
    def projector(self) -> Any:
        """The module that maps image features to the width of the text decoder."""
        return self._part(self.composite, "projector", self.family.projector)

    @property
    def tower_blocks(self) -> Any:
        """The vision tower's transformer blocks, in order."""
        return self._part(self.tower, "tower blocks", _TOWER_BLOCK_PATHS)

    @property
    def tower_has_cls(self) -> bool:
        """Whether the tower's states begin with a class token, before the patches."""
        return any(_follow(self.tower, path) is not None for path in _CLS_PATHS)

    @property
    def patches_per_feature(self) -> int:
        """How many patches of the tower become one image feature (1: none are merged)."""
        config = self.config
        side = getattr(self.tower, "spatial_merge_size", None)
        side = side if side is not None else getattr(config, "scale_factor", None)
        ratio = getattr(config, "downsample_ratio", None)
        if side is None and ratio is not None:
            side = round(1 / ratio)
        if side is not None:
            return int(side) ** 2
        tokens = getattr(config, "mm_tokens_per_image", None)
        if tokens is None:
            return 1
        vision = config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 // tokens)

    @property
    def tower_width(self) -> int:
        """Width of the states that enter the projector."""
        if self.family.projects_each:  # several layers, or squares of patches, may be one state
            linear = next(m for m in self.projector.modules() if isinstance(m, nn.Linear))
            return int(linear.in_features)
        return int(self._part(self.config.vision_config, "width", ("hidden_size", "embed_dim")))

    @property
    def tower_windows(self) -> tuple[int, ...]:
        """Blocks of the tower in which a picture sees all of itself; empty if all of them are."""
        return tuple(getattr(self.tower, "fullatt_block_indexes", None) or ())

    def feature_of_patch(self, patches: Tensor, count: int, unit: int | None = None) -> Tensor:
        """Numbers of the image features that patches of a tile become part of.

        Where patches are merged, they are in square blocks of a square grid, features row by row.

        Args:
            patches: Numbers of patches, row by row; negative ones stay negative.
            count: Patches of a tile.
            unit: How many patches make a block (default: as many as the model merges).

        Raises:
            LayoutError: If the grid is not square or does not hold whole blocks.
        """
        unit = self.patches_per_feature if unit is None else unit
        if unit == 1:
            return patches
        side, block = math.isqrt(count), math.isqrt(unit)
        if side * side != count or block * block != unit or side % block:
            raise LayoutError(
                f"{count} patches per tile are no square grid of blocks of {unit}.",
                advice="Methods that select patches cannot run on this model.",
            )
        row, column = patches // side, patches % side
        feature = row // block * (side // block) + column // block
        return torch.where(patches >= 0, feature, -1)

    @property
    def one_axis(self) -> bool:
        """Whether positions have one axis and no window counts them: they may be renumbered."""
        three = hasattr(self.composite, "rope_deltas")
        return not three and SLIDING not in kinds(self.text.config)

    def o_proj(self, layer: int) -> nn.Module:
        """The output projection of a decoder layer's attention; its input is [B, L, H * d]."""
        try:
            part: nn.Module = self._part(self.layers[layer], "output projection", _O_PROJ_PATHS)
        except UnsupportedModel as error:
            names = ", ".join(name for name, _ in self.layers[layer].named_modules() if name)
            raise UnsupportedModel(f"{error} It has: {names}.", advice=error.advice) from None
        return part

    def attention(self, layer: int) -> Any:
        """The self-attention module of a decoder layer."""
        return self._part(self.layers[layer], "self-attention", _ATTENTION_PATHS)

    def mlp(self, layer: int) -> Any:
        """The module whose output is what a decoder layer adds to its residual for the MLP.

        That is the MLP, or in families that normalise its output the norm after it.
        """
        return self._part(self.layers[layer], "MLP", _MLP_PATHS)

    def attended(self, layer: int) -> Any:
        """The module whose output is what a decoder layer adds to its residual for the attention.

        That is the attention, or in families that normalise its output the norm after it.

        Raises:
            UnsupportedModel: If the layer's MLP does not follow on that sum, or the sum is scaled.
        """
        block = self.layers[layer]
        name = type(block).__name__
        norm = self._part(block, "norm before the MLP", _MLP_NORM_PATHS)
        if getattr(block, "use_parallel_residual", False):
            raise UnsupportedModel(
                f"Attention and MLP of {name} run side by side on the same states.",
                advice="Methods between the two cannot run on this model.",
            )
        if getattr(block, "residual_multiplier", 1.0) != 1.0:
            raise UnsupportedModel(
                f"{name} scales what it adds to its residual ({block.residual_multiplier}).",
                advice="Methods between attention and MLP cannot run on this model.",
            )
        after = getattr(block, "post_attention_layernorm", None)
        surrounds = getattr(block, "post_feedforward_layernorm", None) is not None
        return after if surrounds and norm is not None else self.attention(layer)

    def mlp_norm(self, layer: int) -> Any:
        """The norm before a decoder layer's MLP."""
        return self._part(self.layers[layer], "norm before the MLP", _MLP_NORM_PATHS)

    def input_norm(self, layer: int) -> Any:
        """The norm before a decoder layer's attention."""
        return self._part(self.layers[layer], "input norm", _INPUT_NORM_PATHS)

    def has_input_norm(self, layer: int) -> bool:
        """Whether a decoder layer normalises what enters its attention."""
        return any(_follow(self.layers[layer], p) is not None for p in _INPUT_NORM_PATHS)

    def feed_forward(self, layer: int, x: Tensor) -> Tensor:
        """The second half of a decoder layer on any states [..., D]: ``x + mlp(norm(x))``.

        Runs past the hooks on these modules: they belong to the model's own pass.
        """
        block = self.layers[layer]
        y = self._part(block, "norm before the MLP", _MLP_NORM_PATHS).forward(x)
        y = self._part(block, "MLP", _MLP_ONLY_PATHS).forward(y)
        after = getattr(block, "post_feedforward_layernorm", None)
        return x + (y if after is None else after.forward(y))

    def split_heads(self, x: Tensor) -> Tensor:
        """Views an output projection's input [B, L, H * d] as [B, L, H, d].

        The head size comes from the tensor: some families' is not ``hidden_size / H``.

        Raises:
            UnsupportedModel: If the width is not a multiple of the number of heads.
        """
        width = x.shape[-1]
        if width % self.n_heads:
            raise UnsupportedModel(
                f"The output projection of {self.family_name} receives {width} numbers, which is "
                f"not a multiple of its {self.n_heads} heads.",
                advice="Methods on heads cannot run on this model.",
            )
        return x.unflatten(-1, (self.n_heads, width // self.n_heads))

    def exit_logits(self, x: Tensor, *, normed: bool = True) -> Tensor:
        """What the head makes of residual states [..., D] of any layer: fp32 [..., V].

        A model in float64 keeps it.

        Args:
            x: Outputs of decoder layers, before the last norm.
            normed: Whether the last norm is applied first, as the model does after its last layer.
        """
        z: Tensor = self.head(self.norm(x) if normed else x)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return torch.tanh(z / cap) * cap if self.family.softcap and cap else z

    def text_position(self, position_ids: Tensor) -> Tensor:
        """The [B, L] text positions among position ids of shape [B, L] or [3 or 4, B, L]."""
        return position_ids if position_ids.ndim == 2 else position_ids[0]

    def supports(self, method: Method) -> list[str]:
        """Reasons why this model cannot run ``method``; empty if it can."""
        reasons = []
        for sites, find in _NEEDED.values():
            if sites & method.sites:
                try:
                    find(self)
                except UnsupportedModel as error:
                    reasons.append(str(error))
        if "mask" in method.sites:
            reasons.extend(reasons_against_masks(self.text.config))
        if "tokens" in method.sites:
            reasons.extend(reasons_against_removal(self.text.config))
        if self.family is GENERIC and (method.branches or method.riders):
            reasons.append(
                f"model type {self.family_name!r} has no row in the family table, so it is not "
                "known how an auxiliary prompt must be built"
            )
        return [*reasons, *method.unsupported(self)]

    def parts(self) -> dict[str, tuple[Any, str]]:
        """Every part that some site needs: its name -> (the part, "") or (None, what was tried)."""
        found: dict[str, tuple[Any, str]] = {}
        for name, (_, find) in _NEEDED.items():
            try:
                found[name] = find(self), ""
            except UnsupportedModel as error:
                found[name] = None, str(error)
        return found

    def _ids(self, names: tuple[str, ...]) -> tuple[int, ...]:
        found = (getattr(self.config, name, None) for name in names)
        return tuple(sorted({int(i) for i in found if i is not None}))

    def _part(self, root: Any, what: str, paths: tuple[str, ...]) -> Any:
        for path in paths:
            part = _follow(root, path)
            if part is not None:
                return part
        raise UnsupportedModel(
            f"{type(root).__name__} ({self.family_name}) has no {what}: tried {', '.join(paths)}.",
            advice="`mmlm doctor MODEL` lists what this model supports.",
        )


#: Name of a part -> the sites that need it, and how it is found.
_NEEDED: dict[str, tuple[frozenset[str], Callable[[Anatomy], Any]]] = {
    "vision tower": (frozenset({"vision_layer", "patches", "visual_tokens"}), lambda a: a.tower),
    "tower blocks": (frozenset({"vision_layer", "patches"}), lambda a: a.tower_blocks),
    "projector": (
        frozenset({"vision_layer", "patches", "pool", "visual_tokens"}),
        lambda a: a.projector,
    ),
    "attention": (frozenset({"keys", "scores", "weights"}), lambda a: a.attention(0)),
    "output projection": (frozenset({"heads"}), lambda a: a.o_proj(0)),
    "MLP": (frozenset({"mlp"}), lambda a: a.mlp(0)),
    "sum of residual and attention": (frozenset({"attended"}), lambda a: a.attended(0)),
}


def _follow(root: Any, path: str) -> Any:
    """The attribute at a dotted path, None if any part of it is missing or None."""
    for name in path.split("."):
        root = getattr(root, name, None)
    return root
