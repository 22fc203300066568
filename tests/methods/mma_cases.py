"""What the tests of MMA share: masks as layers get them, conversations, loops as references."""

from __future__ import annotations

from contextlib import contextmanager

import tiny
import torch

from mmlm import TokenLayout
from mmlm.engine.layout import ANSWER, PAD, PROMPT, VISUAL
from mmlm.engine.masks.openings import opened

PROMPTS = ["what is shown here ?", "is there a dog in the picture ? answer yes or no ."]


def layout(seg, *, turn=None, doc=None, behind=None):
    """A layout from lists, or from strings: one sign per position, "." for padding."""
    signs = {".": PAD, "v": VISUAL, "p": PROMPT, "a": ANSWER}
    rows = [[signs.get(s, s) for s in row] for row in seg]
    seg = torch.tensor(rows, dtype=torch.int8)
    zero = torch.zeros(seg.shape, dtype=torch.int16)

    def given(x, default):
        return default if x is None else torch.tensor(x, dtype=default.dtype)

    return TokenLayout(
        seg=seg,
        img=torch.where(seg == VISUAL, 0, -1).to(torch.int16),
        frame=torch.zeros(seg.shape, dtype=torch.bool),
        doc=torch.where(seg == PAD, -1, given(doc, zero)),
        turn=given(turn, zero),
        behind=given(behind, torch.zeros(seg.shape, dtype=torch.bool)),
    )


def allowed(method, roles):
    """Bool [B, N, N]: what a causal decoder sees under a method."""
    index = torch.arange(roles.length)
    q, k = index[None, :, None], index[None, None]
    b = torch.arange(roles.rows)[:, None, None]
    seen = (k <= q) & roles.real[b, k] & (roles.doc[b, q] == roles.doc[b, k])
    rule = method.mask(None, roles)
    return seen if rule is None else seen | opened([rule], roles, q, k, None)


def by_loops(roles, scope, *, marker=False, symmetric=False):
    """The same, position by position, as the formulas say."""
    b, n = roles.seg.shape
    seg, turn, doc, behind = (getattr(roles, x).tolist() for x in ("seg", "turn", "doc", "behind"))
    out = torch.zeros(b, n, n, dtype=torch.bool)
    for r in range(b):
        for i in range(n):
            for j in range(n):
                if seg[r][j] == PAD or doc[r][i] != doc[r][j]:
                    continue
                first = next(
                    (x for x in range(n) if seg[r][x] == ANSWER and doc[r][x] == doc[r][i]), n
                )
                within = {"turn": turn[r][i] == turn[r][j], "first": j < first}.get(scope, True)
                told = seg[r][j] == PROMPT and not (marker and behind[r][j])
                rect = seg[r][i] == VISUAL and told
                if symmetric:
                    asks = seg[r][i] == PROMPT and not (marker and behind[r][i])
                    rect = rect or (asks and seg[r][j] == VISUAL)
                out[r, i, j] = j <= i or (rect and j > i and within)
    return out


@contextmanager
def masks_of(model):
    """The masks that the first layer gets, in the order of passes."""
    found = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda m, a, k: found.append(k["attention_mask"]), with_kwargs=True
        )
    )
    try:
        yield found
    finally:
        handle.remove()


def user(text, images=0):
    return {
        "role": "user",
        "content": [{"type": "image"}] * images + [{"type": "text", "text": text}],
    }


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def talk(processor, messages, pictures, **options):
    """Model inputs of one conversation."""
    text = processor.apply_chat_template(
        messages, **{"add_generation_prompt": True, "tokenize": False, **options}
    )
    return dict(
        processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
    )


def visual(model, inputs):
    return inputs["input_ids"] == model.config.image_token_id


def places(inputs):
    """Position ids of left-padded rows."""
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def states(model, inputs, **more):
    """Hidden states of all layers, [layers + 1, B, N, D]."""
    with torch.no_grad():
        output = model(**inputs, **more, output_hidden_states=True)
    return torch.stack(output.hidden_states)


def padded_pair(processor):
    """Two prompts of different length: the first is padded on the left."""
    return tiny.inputs(processor, PROMPTS, [[tiny.picture(1)], [tiny.picture(2)]])
