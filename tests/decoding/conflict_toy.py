"""A model of one layer with two hand-wired heads: one copies the picture's class, one a constant.

Head 0 writes "picture 1" or "picture 2" into the residual, head 4 writes "memory" as often as the
prompt has the word "dog". Everything else writes nothing.
"""

from __future__ import annotations

import tiny
import torch
from PIL import Image
from torch import nn

from decoding.ph3 import Conflicts

SEEN, OTHER, REMEMBERED = 20, 21, 22
"""Tokens: what picture 1 shows, what picture 2 shows, what the text suggests."""
IMAGE_HEAD, MEMORY_HEAD = (0, 0), (0, 4)
PICTURES = [Image.new("RGB", (56, 56), colour) for colour in ("white", "black")]


class _Class(nn.Module):
    """A projector that tells the two pictures apart, and nothing else."""

    def __init__(self, dtype):
        super().__init__()
        self.linear_1 = nn.Linear(1, 1)
        self.border, self.dtype = 0.0, dtype

    def forward(self, states):
        first = states.mean((1, 2)) > self.border
        features = states.new_zeros(*states.shape[:2], 64)
        features[..., 0], features[..., 1] = first[:, None], ~first[:, None]
        return features


def build():
    """The model and its processor."""
    model, processor = tiny.build("llava", layers=1)
    layer = model.get_decoder().layers[0]
    attention, projector = layer.self_attn, _Class(model.dtype)
    model.model.multi_modal_projector = projector
    states = []
    handle = projector.register_forward_pre_hook(lambda m, args: states.append(args[0].mean()))
    with torch.no_grad():
        for picture in PICTURES:
            model(**tiny.inputs(processor, ["a dog"], [[picture]]))
        projector.border = float(sum(states) / 2)
        # Which picture has the larger mean is the tower's matter.
        if states[0] < states[1]:
            PICTURES.reverse()
        words = model.get_input_embeddings().weight
        words.zero_()
        words[:, 3] = 1
        words[dog(processor)] = 0
        words[dog(processor), 2] = 1
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        d = attention.head_dim
        attention.v_proj.weight[0, 0] = attention.v_proj.weight[1, 1] = 1  # heads 0 to 3
        attention.v_proj.weight[d, 2] = 1  # heads 4 to 7
        attention.o_proj.weight[10, 0] = attention.o_proj.weight[11, 1] = 8
        attention.o_proj.weight[12, MEMORY_HEAD[1] * d] = 24
        model.lm_head.weight.zero_()
        for token, dimension in ((SEEN, 10), (OTHER, 11), (REMEMBERED, 12)):
            model.lm_head.weight[token, dimension] = 1
    handle.remove()
    return model, processor


def dog(processor):
    """The one token of the word."""
    (token,) = set(processor.tokenizer(" dog")["input_ids"]) - {2}
    return token


def conflicts(processor, *, donor=True, neutral=False, same_token=False):
    """Forty samples: in half of them the picture decides, in half the text."""
    prompts = ["a dog", "a dog there", "a" + " dog" * 12, "a" + " dog" * 12 + " there"]
    batches = []
    for shown in (0, 1) * 5:
        inputs = tiny.inputs(processor, prompts, [[PICTURES[shown]]] * 4)
        other = tiny.inputs(processor, prompts, [[PICTURES[1 - shown if donor else shown]]] * 4)
        ids = inputs["input_ids"]
        without = {**inputs, "input_ids": torch.where(ids == dog(processor), 40, ids)}
        seen = torch.full((4,), (SEEN, OTHER)[shown])
        batches.append(
            Conflicts(
                inputs=inputs,
                donor=other,
                neutral=without if neutral else None,
                memory=seen if same_token else torch.full((4,), REMEMBERED),
                image=seen,
                kinds=("toy",) * 4,
                yes_no=(False,) * 4,
            )
        )
    return batches
