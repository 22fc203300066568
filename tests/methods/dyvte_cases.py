"""What the tests of DyVTE share: the golden models, exits that are forced, a naive reference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tiny
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmlm import Anatomy, DyVTE, TokenLayout
from mmlm.engine.layout import PAD, PROMPT, VISUAL


def read_golden(path):
    """The arrays of a golden file, and its configuration."""
    with np.load(path) as data:
        found = {n: torch.from_numpy(np.asarray(data[n])) for n in data.files if n != "config"}
        return found, json.loads(str(data["config"]))


def golden_model(data, config):
    """A LLaVA with the golden decoder, and its routers as the state of a built-in DyVTE."""
    prefix, visual = config.pop("system_tokens"), config.pop("visual_tokens")
    theta = config.pop("rope_theta")
    text = LlamaConfig(
        **config,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tiny._clip(),
            text_config=text,
            image_token_id=config["vocab_size"] - 1,
            tie_word_embeddings=False,
        )
    ).eval()
    weights = {n.removeprefix("w::"): x for n, x in data.items() if n.startswith("w::")}
    decoder = {
        n.removeprefix("model."): x
        for n, x in weights.items()
        if n.startswith("model.") and "visual_gates_router" not in n
    }
    model.get_decoder().load_state_dict(decoder)
    model.lm_head.load_state_dict({"weight": weights["lm_head.weight"]})
    routers = {
        n.partition("visual_gates_router.")[2]: x
        for n, x in weights.items()
        if "visual_gates_router" in n
    }
    return model, routers, prefix, visual


def layout_of(real, prefix, visual):
    """The authors' layout: a prefix, the picture, then text; ``real`` bool [B, N]."""
    index = torch.arange(real.shape[1]).expand_as(real)
    inside = (index >= prefix) & (index < prefix + visual)
    seg = torch.where(inside, VISUAL, PROMPT).masked_fill(~real, PAD).to(torch.int8)
    none = torch.zeros_like(seg, dtype=torch.int16)
    return TokenLayout(
        seg=seg,
        img=torch.where(inside, 0, -1).to(torch.int16),
        frame=torch.zeros_like(inside),
        doc=none.masked_fill(~real, -1),
        turn=none,
    )


@dataclass(frozen=True, kw_only=True)
class Fresh(DyVTE):
    """Routers that nobody trained, which fire anyhow."""

    fresh_is_valid: ClassVar[bool] = True
    hidden: int = 8


@dataclass(frozen=True, kw_only=True)
class Forced(Fresh):
    """Each row exits after the layer that is written here; -1: never."""

    plan: tuple[int, ...] = ()

    def _votes(self, state, gate, x):
        super()._votes(state, gate, x)  # everything else stays as it is
        return (torch.tensor(self.plan) == gate).repeat_interleave(state.prompt.copies)


def inputs_of(processor, prompts, counts):
    """Prompts with so many pictures each, padded on the left."""
    pictures = [[tiny.picture(10 * row + k) for k in range(n)] for row, n in enumerate(counts)]
    return tiny.inputs(processor, prompts, pictures)


def alone(processor, prompts, counts, row):
    """One of these rows without the others."""
    if not counts[row]:  # some processors write a text alone otherwise than beside pictures
        together = inputs_of(processor, list(prompts), counts)
        n, shape = int(together["attention_mask"][row].sum()), together["input_ids"].shape
        return {k: v[row : row + 1, -n:] for k, v in together.items() if v.shape == shape}
    pictures = [tiny.picture(10 * row + k) for k in range(counts[row])]
    return tiny.inputs(processor, [prompts[row]], [pictures])


def visual_of(model, inputs):
    return torch.isin(inputs["input_ids"], torch.tensor(Anatomy(model).image_ids))


def naive_features(x, visual):
    """Section 2 of the method for one unpadded row: [mean of the text behind it ; last]."""
    last_visual = max(i for i in range(len(visual)) if visual[i])
    behind = [x[i] for i in range(last_visual + 1, len(visual))]
    mean = sum(behind[:-1]) / len(behind[:-1]) if len(behind) > 1 else behind[-1]
    return torch.cat([mean, behind[-1]])


def naive_exit(model, inputs, routers, threshold=0.0):
    """The whole method for one unpadded row, written as loops over the plain model's layers.

    Returns:
        The exit layer, the logits of the routers asked, the last position's logits.
    """
    visual = visual_of(model, inputs)[0].tolist()
    arguments, states = [], []
    decoder = model.get_decoder()
    handles = [
        layer.register_forward_pre_hook(
            lambda m, a, k: (arguments.append(k), states.append(a[0]))[0:0] or None,
            with_kwargs=True,
        )
        for layer in decoder.layers
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    x, keep, found, exit_layer = states[0], list(range(len(visual))), [], -1
    with torch.no_grad():
        for number, layer in enumerate(decoder.layers):
            given = arguments[number]
            cos, sin = given["position_embeddings"]
            n = len(keep)
            mask = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
            x = layer.forward(
                x,
                attention_mask=mask,
                position_embeddings=(cos[:, keep], sin[:, keep]),
                position_ids=given["position_ids"][..., keep],
            )
            if exit_layer >= 0:
                continue
            router = routers[number]
            h = router.w1.weight @ naive_features(x[0], visual)
            z = router.w2.weight @ (h * 0.5 * (1 + torch.erf(h / 2**0.5)))
            found.append(z)
            if float(z[1] - z[0]) > threshold:
                exit_layer = number
                keep = [i for i in keep if not visual[i]]
                x = x[:, keep]
        return exit_layer, torch.stack(found), model.lm_head(decoder.norm(x[:, -1]))
