"""Adapters on the language model only, whatever the layers of the other parts are called.

A bare name such as "q_proj" given to PEFT also matches the vision tower of most models. Here the
layers are found as modules of the language model, so no name can go astray.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from training.settings import LoraSettings

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["llm_linear_regex", "lora_config", "refuse_targets_outside"]


def llm_linear_regex(
    model: Any, targets: tuple[str, ...] | None = None, layers: tuple[int, ...] | None = None
) -> str:
    """A pattern for PEFT's `target_modules` that fits exactly the language model's linear layers.

    Args:
        model: a Hugging Face vision-language model.
        targets: last names of the layers to take, None for all of them.
        layers: decoder layers to take, None for all of them.

    Raises:
        ValueError: a target is the name of no linear layer of the language model, or there is no
            such decoder layer.
    """
    from torch import nn

    from mmlm.engine.anatomy import Anatomy

    anatomy = Anatomy(model)
    head = anatomy.head
    prefix = _name_of(model, anatomy.text)
    inner = {
        name
        for name, m in anatomy.text.named_modules()
        if isinstance(m, nn.Linear) and m is not head
    }
    last = {name.rpartition(".")[2] for name in inner}
    if targets is not None:
        if unknown := sorted(set(targets) - last):
            raise ValueError(
                f"{', '.join(unknown)}: no linear layer of the language model is called so; it has "
                f"{', '.join(sorted(last))}"
            )
        inner = {name for name in inner if name.rpartition(".")[2] in targets}
    if layers is not None:
        from mmlm.engine.selections import check_layers

        check_layers("lora", layers, anatomy.n_layers)
        blocks = [_name_of(anatomy.text, anatomy.layers[layer]) for layer in layers]
        inner = {name for name in inner if name.startswith(tuple(f"{one}." for one in blocks))}
        return rf"{re.escape(prefix)}\.({'|'.join(sorted(map(re.escape, inner)))})"
    # Layers differ by their number only.
    shapes = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in inner})
    return rf"{re.escape(prefix)}\.({'|'.join(shapes)})"


def lora_config(model: Any, settings: LoraSettings, *, whole: tuple[str, ...] = ()) -> LoraConfig:
    """PEFT's configuration of adapters on the language model.

    Args:
        model: a Hugging Face vision-language model.
        settings: rank, scale, dropout, layers.
        whole: names of modules that learn as a whole beside the adapters and are saved with them,
            such as the projector.

    Raises:
        ValueError: see `llm_linear_regex`.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=llm_linear_regex(model, settings.targets, settings.layers),
        modules_to_save=list(whole) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def refuse_targets_outside(model: Any, config: Any) -> None:
    """Refuses a PEFT configuration whose layers are not the language model's alone.

    Args:
        model: a Hugging Face vision-language model, not wrapped yet.
        config: a `peft.PeftConfig`; one without `target_modules` is left to PEFT.

    Raises:
        ValueError: it adapts the head, which TRL's fused loss would silently not train, or layers
            of the tower or the projector; lists them.
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from torch import nn

    from mmlm.engine.anatomy import Anatomy

    if not getattr(config, "target_modules", None) or config.target_modules == "all-linear":
        if getattr(config, "target_modules", None) == "all-linear":
            raise ValueError(
                'target_modules = "all-linear" adapts the vision tower too. Give '
                "training.lora.llm_linear_regex(model) instead"
            )
        return
    anatomy = Anatomy(model)
    matched = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and check_target_module_exists(config, name)
    }
    if any(module is anatomy.head for module in matched.values()):
        raise ValueError(
            "target_modules include the head (lm_head): preference losses multiply by its weight "
            "directly, so its adapter would never be trained. Take it out"
        )
    own = {id(module) for module in anatomy.text.modules()}
    outside = sorted(name for name, module in matched.items() if id(module) not in own)
    if outside:
        more = f" and {len(outside) - 6} more" if len(outside) > 6 else ""
        raise ValueError(
            f"target_modules match layers outside the language model: {', '.join(outside[:6])}"
            f"{more}. Give training.lora.llm_linear_regex(model) instead"
        )


def _name_of(model: Any, part: Any) -> str:
    return next(name for name, module in model.named_modules() if module is part)
