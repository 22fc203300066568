"""Weighing image heads and memory heads: golden vectors, a naive reference, hand examples."""

from __future__ import annotations

import json
import math
import re

import checks
import golden
import pytest
import tiny
import torch
from whole_matrix import edited, whole_pass

from decoding.head_weights import PUBLISHED
from decoding.ph3 import PH3, SeeingKnowing, head_weights, weigh
from mmlm import Anatomy, attach
from mmlm.errors import UnsupportedModel

IMAGE, MEMORY = ((1, (0, 1)), (2, (3,))), ((1, (2,)), (2, (6, 7)))
STRONG = SeeingKnowing(image_change=2.0, memory_change=-2.0, image_heads=IMAGE, memory_heads=MEMORY)


@pytest.mark.golden
@pytest.mark.parametrize("path", golden.golden("conflict_heads/weights_*.json"))
def test_ph3_acceptance_07_golden_weights(path):
    kinds = {"cfact": "image", "fact": "memory", "other": "other"}
    cases = json.loads(path.read_text())
    assert cases
    for case in cases:
        ours = head_weights(
            case["n_heads"],
            [tuple(head) for head in case["image_heads"]],
            [tuple(head) for head in case["memory_heads"]],
            case["image_change"],
            case["memory_change"],
            rebalanced=case["rebalanced"],
        )
        expected = {(a, b): (w, kinds[kind]) for a, b, w, kind in case["weights"]}
        assert ours.keys() == expected.keys()
        for head, (weight, kind) in expected.items():
            assert ours[head] == (pytest.approx(weight, abs=1e-12), kind), (case, head)


def test_weights_by_hand():
    # Four heads: one image head at 3, one memory head at -1, so 2 are left for two others.
    found = head_weights(4, [(1, 0)], [(1, 3)], 2.0, -2.0)
    assert found == {
        (1, 0): (3.0, "image"), (1, 1): (1.0, "other"), (1, 2): (1.0, "other"),
        (1, 3): (-1.0, "memory"),
    }  # fmt: skip
    # Nothing is left over where a layer has no other heads, and without rebalancing.
    assert head_weights(1, [(0, 0)], [], 1.0, -1.0) == {(0, 0): (2.0, "image")}
    assert head_weights(2, [(0, 0)], [], 1.0, -1.0, rebalanced=False)[0, 1] == (1.0, "other")


def test_weigh_by_hand():
    a = torch.tensor([0.2, 0.5, 0.3]).expand(1, 2, 1, 3)
    visual = torch.tensor([[False, True, False]])
    new = weigh(a, visual, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(new[0, :, 0], torch.tensor([[0.2, 1.0, 0.3], [0.0, 0.5, 0.0]]))


@torch.no_grad()
def test_equals_whole_matrices_with_the_last_row_multiplied():
    model, processor = tiny.build("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    visual = inputs["input_ids"][0] == model.config.image_token_id

    def multiply(layer, x, a):
        if layer not in (1, 2):
            return
        others = {1: [3, 4, 5, 6, 7], 2: [0, 1, 2, 4, 5]}[layer]
        n_image, n_memory = {1: (2, 1), 2: (1, 2)}[layer]
        left = (8 - 3 * n_image + n_memory) / len(others)
        for head in dict(IMAGE)[layer]:
            a[:, head, -1, visual] *= 3
        for head in dict(MEMORY)[layer]:
            a[:, head, -1, ~visual] *= -1
        for head in others:
            a[:, head, -1, ~visual] *= left

    with edited(model, multiply):
        expected = whole_pass(model, inputs)
    with attach(model, STRONG):
        found = whole_pass(model, inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, whole_pass(model, inputs), atol=1e-4)


def test_only_the_last_row_of_the_prompt_changes():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with torch.no_grad():
        plain = model(**inputs).logits
        with attach(model, STRONG):
            weighed = model(**inputs).logits
    torch.testing.assert_close(weighed[:, :-1], plain[:, :-1], atol=1e-6, rtol=0)
    assert not torch.allclose(weighed[:, -1], plain[:, -1], atol=1e-4)


def test_layers_with_heads_of_either_kind_are_touched():
    anatomy = Anatomy(tiny.shared("llava")[0])
    method = SeeingKnowing(image_heads=((1, (0,)),), memory_heads=((3, (2,)),))
    assert [layer for layer in range(4) if method.acts_in(anatomy, layer)] == [1, 3]


@torch.no_grad()
def test_new_tokens_are_text():
    """Nothing is edited before layer 1, so its plain row is that of a whole pass."""
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    asked = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    asked |= {"output_attentions": True, "return_dict_in_generate": True}
    with attach(model, STRONG):
        out = model.generate(**inputs, **asked)
    row = out.attentions[1][1][0, :, -1]
    whole = {**inputs, "input_ids": out.sequences[:, :-1]}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    plain = model(**whole, output_attentions=True).attentions[1][0, :, -1]
    visual = whole["input_ids"][0] == model.config.image_token_id
    on_image = torch.tensor([3.0, 3, 1, 1, 1, 1, 1, 1])
    on_text = torch.tensor([1.0, 1, -1, 0.6, 0.6, 0.6, 0.6, 0.6])  # (8 - 2 * 3 + 1) / 5 are left
    expected = plain * torch.where(visual, on_image[:, None], on_text[:, None])
    torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_published_heads():
    method = PH3.seeing_knowing("llava-next-mistral-7b", strength=-2.0)
    assert (method.image_change, method.memory_change) == (2.0, -2.0)
    for heads in (method.image_heads, method.memory_heads):
        assert sum(len(own) for _, own in heads) == 20
        assert all(layer < 32 and own[-1] < 32 for layer, own in heads)
    assert dict(method.image_heads)[31] == (18, 22, 25, 27)
    assert dict(method.memory_heads)[3] == (18,)
    # All but one lie in the second half of the layers.
    early = [layer for heads in (method.image_heads, method.memory_heads) for layer, _ in heads]
    assert [layer for layer in early if layer < 16] == [3]
    with pytest.raises(ValueError, match="published for 'gpt', but for llava-next-mistral-7b"):
        PH3.seeing_knowing("gpt")
    assert list(PUBLISHED) == ["llava-next-mistral-7b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_change": math.nan}, "image_change must be a finite number"),
        ({"memory_change": "x"}, "memory_change must be a finite number"),
        ({"rebalanced": 2}, "rebalanced must be one of True, False, got 2"),
        ({"image_heads": ()}, "layers and heads must be >= 0 and not empty"),
        (
            {"image_heads": ((1, (2, 3)),), "memory_heads": ((1, (3,)),)},
            "[(1, 3)] are image heads and memory heads",
        ),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SeeingKnowing(**arguments)


def test_error_heads_of_another_model():
    model, _ = tiny.shared("llava")
    published = PH3.seeing_knowing("llava-next-mistral-7b")
    with pytest.raises(ValueError, match="layer 18 does not exist"), attach(model, published):
        pass
    with (
        pytest.raises(UnsupportedModel, match="no heads are given"),
        attach(model, SeeingKnowing()),
    ):
        pass
    assert not SeeingKnowing().neutral().unsupported(Anatomy(model))
