"""CrossLMM written out the slow way: loops over rows, fp64 softmax, no caches, LLaVA only."""

import math

import tiny
import torch
from torch import nn

from mmlm import build_in


def norm(layer, x):
    y = x.double()
    return y / (y.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight.double()


def linear(layer, x):
    y = x.double() @ layer.weight.double().T
    return y if layer.bias is None else y + layer.bias.double()


def block(module, x, z, number, keys=None, rows=None):
    """One cross-attention, row by row and head by head, with a softmax over what is seen."""
    copies, heads, groups = x.shape[0] // z.shape[0], module.heads, module.kv_heads
    out = []
    for b in range(x.shape[0]):
        r = b // copies
        q = linear(module.q_proj, norm(module.q_norm, x[b])).unflatten(-1, (heads, -1))
        y = norm(module.kv_norm, z[r])
        numbered = y if module.frame is None else y + module.frame.weight.double()[number[r]]
        k = linear(module.k_proj, numbered).unflatten(-1, (groups, -1))
        v = linear(module.v_proj, y).unflatten(-1, (groups, -1))
        for t in range(x.shape[1]):
            seen = torch.ones(z.shape[1], dtype=torch.bool)
            seen = seen if keys is None else seen & keys[r]
            seen = seen if rows is None else seen & rows[b, t]
            if not seen.any():
                out.append(torch.zeros(x.shape[-1], dtype=torch.float64))
                continue
            parts = []
            for h in range(heads):
                g = h * groups // heads
                s = torch.einsum("d,od->o", q[t, h], k[seen, g]) / math.sqrt(q.shape[-1])
                parts.append(s.softmax(0) @ v[seen, g])
            out.append(linear(module.o_proj, torch.cat(parts)))
    y = torch.stack(out).view(x.shape[0], x.shape[1], -1)
    return torch.tanh(module.gate.double()) * y


def windows(size, cells):
    """Equal windows that cover a line: begin rounded down, end rounded up."""
    return [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]


def pooled(grid, method):
    """[h, w, D] to [s * s, D]."""
    side, s = grid.shape[0], method.grid
    if method.pooling == "average":
        lines = windows(side, s)
        return torch.stack([grid[a:b, c:d].mean((0, 1)) for a, b in lines for c, d in lines])

    def at(i):
        place = max((i + 0.5) * side / s - 0.5, 0)
        low = int(place)
        return low, min(low + 1, side - 1), place - low

    out = []
    for i in range(s):
        for j in range(s):
            a, b, f = at(i)
            c, d, e = at(j)
            top = grid[a, c] * (1 - e) + grid[a, d] * e
            bottom = grid[b, c] * (1 - e) + grid[b, d] * e
            out.append(top * (1 - f) + bottom * f)
    return torch.stack(out)


@torch.no_grad()
def forward(model, blocks, inputs, method):
    """Logits of the last position of each row, one row at a time."""
    inner = model.model
    states = inner.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    states = states[model.config.vision_feature_layer][:, 1:]
    pictures = iter(states)
    found = []
    for ids, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[real.bool()]
        embeds, kinds, z, frame, starts = [], [], [], [], []
        i = 0
        while i < len(ids):
            if int(ids[i]) != model.config.image_token_id:
                embeds.append(inner.get_input_embeddings()(ids[i]))
                kinds.append(-1)
                i += 1
                continue
            own = next(pictures)
            side = math.isqrt(len(own))
            small = inner.multi_modal_projector(pooled(own.view(side, side, -1), method))
            z.append(own if method.kv_source == "tower" else inner.multi_modal_projector(own))
            frame += [len(starts)] * len(own)
            starts.append(len(embeds))
            embeds += list(small)
            kinds += [len(starts) - 1] * len(small)
            i += len(own)
        found.append(
            _row(model, blocks, torch.stack(embeds), kinds, torch.cat(z), frame, starts, method)
        )
    return torch.stack(found)


def _row(model, blocks, x, kinds, z, frame, starts, method):
    text = model.model.language_model
    n, kinds, frame = len(x), torch.tensor(kinds), torch.tensor(frame)
    begins = torch.tensor(starts)[frame]
    x, places = x[None], torch.arange(n)[None]
    rotary = text.rotary_emb(x, places)
    mask = torch.full((1, 1, n, n), torch.finfo(x.dtype).min).triu(1)
    number = torch.zeros_like(frame)  # every picture is one frame
    for layer, part in enumerate(text.layers):
        y, _ = part.self_attn(
            hidden_states=part.input_layernorm(x), position_embeddings=rotary, attention_mask=mask
        )
        x = x + y
        if layer % method.every == 0:
            delta = torch.zeros_like(x)
            for kind, who in (("v2v", kinds >= 0), ("t2v", kinds < 0)):
                if not getattr(method, kind):
                    continue
                place = who.nonzero().flatten()
                if kind == "t2v" or method.v2v_scope == "all":
                    seen = begins[None] <= place[:, None]
                else:
                    seen = frame[None] == kinds[place][:, None]
                cross = getattr(blocks, kind)[str(layer)]
                delta[:, place] = block(
                    cross, x[:, place], z[None], number[None], None, seen[None]
                ).to(x.dtype)
            x = x + delta
        x = x + part.mlp(part.post_attention_layernorm(x))
    return model.lm_head(text.norm(x))[0, -1]


# ---- a task whose answer pooling destroys --------------------------------------------------------


PATTERNS = 4


def learned(method, steps=80, rows=32, rate=3e-3):
    """Share of right answers after some steps: which of four patterns stands in one place?

    Every picture holds the same four patterns on grey, at other places, and the tower is a linear
    map of each patch plus a code of its place: the mean over the patches is always the same.
    """
    torch.manual_seed(0)
    model, _ = tiny.build("llava", layers=2)
    tower = model.model.vision_tower
    tower.pre_layrnorm = nn.Identity()
    first = tower.encoder.layers[0]
    for part in (first.self_attn.out_proj, first.mlp.fc2):  # that block adds nothing
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    model.config.vision_feature_layer = 1
    build_in(model, method)
    draw = torch.Generator().manual_seed(1)
    looks = torch.randn(PATTERNS, 3, 14, 14, generator=draw)
    # Patterns and places weigh alike in a patch's state.
    with torch.no_grad():
        looks = looks / tower.embeddings.patch_embedding(looks).std()
        nn.init.normal_(tower.embeddings.position_embedding.weight)
    ids = torch.tensor([[5, *[model.config.image_token_id] * 16, 6, 7]])
    answers = torch.arange(20, 20 + PATTERNS)

    def batch(n):
        pixels, labels = torch.zeros(n, 3, 56, 56), torch.zeros(n, dtype=torch.long)
        for i in range(n):
            order = torch.randperm(PATTERNS, generator=draw)
            others = (torch.randperm(15, generator=draw)[: PATTERNS - 1] + 6) % 16  # all but 5
            places = torch.cat([torch.tensor([5]), others])
            for look, place in zip(order.tolist(), places.tolist(), strict=True):
                a, b = 14 * (place // 4), 14 * (place % 4)
                pixels[i, :, a : a + 14, b : b + 14] = looks[look]
            labels[i] = order[0]
        return pixels, labels

    def choose(pixels):
        out = model(input_ids=ids.expand(len(pixels), -1), pixel_values=pixels, use_cache=False)
        return out.logits[:, -1, answers]

    tower.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(steps):
        pixels, labels = batch(rows)
        optimizer.zero_grad()
        nn.functional.cross_entropy(choose(pixels), labels).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        pixels, labels = batch(200)
        return (choose(pixels).argmax(-1) == labels).float().mean().item()
