"""Acceptance 15: what only image tokens that have seen the question can tell.

A picture has two colours, and a question asks for one of them. The position that answers sees one
image token, the last, and itself: neither the question nor any other image token. So the picked
colour must be in that token's state, which under a causal mask does not know the question.
"""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn import functional

from mmlm import MMA, build_in

COLOURS = ((255, 0, 0), (0, 0, 255), (0, 255, 0))
WORDS = [40, 41, 42]  # any three ids: one per colour
ASKED = [50, 51]  # the left colour, the right one


def batch(processor, rows, seed):
    """Prompts of one length that differ in one token, their pictures, and the colours asked for."""
    draw = np.random.default_rng(seed)
    pictures, sides, answers = [], [], []
    for _ in range(rows):
        pair = draw.choice(3, 2, replace=False)
        canvas = np.zeros((64, 64, 3), np.uint8)
        canvas[:, :32], canvas[:, 32:] = COLOURS[pair[0]], COLOURS[pair[1]]
        pictures.append([Image.fromarray(canvas)])
        sides.append(int(draw.integers(2)))
        answers.append(int(pair[sides[-1]]))
    inputs = tiny.inputs(processor, ["the dog ?"] * rows, pictures)
    place = (inputs["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids("Ġdog")).nonzero()
    assert len(place) == 1
    inputs["input_ids"][:, int(place)] = torch.tensor(ASKED)[torch.tensor(sides)]
    assert bool(inputs["attention_mask"].all())
    return {**inputs, "use_cache": False}, torch.tensor(answers)


def bottleneck(ids, image):
    """Causal, but the last position sees the last image token and itself."""
    n = ids.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    seen[-1] = False
    seen[-1, int((ids[0] == image).nonzero()[-1])] = True
    seen[-1, -1] = True
    return seen[None, None]


def learned(method, steps=60):
    """Share of right answers on pictures that were not learned from."""
    torch.manual_seed(0)
    model, processor = tiny.build("llava")
    inputs, answers = batch(processor, 256, seed=0)
    held, right = batch(processor, 200, seed=1)
    mask = bottleneck(inputs["input_ids"], model.config.image_token_id)
    model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "attention_mask": mask}), with_kwargs=True
    )
    build_in(model, method, processor=processor)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(answers), (32,))
        given = {n: x[chosen] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
        logits = model(**given).logits[:, -1, WORDS]
        optimiser.zero_grad()
        functional.cross_entropy(logits, answers[chosen]).backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        found = model(**held).logits[:, -1, WORDS].argmax(-1)
    return float((found == right).float().mean())


@pytest.mark.slow
def test_acceptance_15_only_with_mma_the_question_reaches_the_pooled_token():
    assert learned(MMA()) > 0.95
    # One of the two colours at random is right half of the time.
    assert 0.35 < learned(MMA(scope="none")) < 0.65
