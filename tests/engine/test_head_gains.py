"""The ``heads`` site: gains for all positions, gains per position, and prompts without an image."""

from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch

from decoding.vhr import VHR
from mmlm import Anatomy, Method, attach
from mmlm.engine.method import Paper

LAYER, HEAD = 2, 3


@dataclass(frozen=True, kw_only=True)
class Everywhere(Method):
    """Scales one head at all positions."""

    paper: ClassVar[Paper] = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="")
    by: float = 0.25

    def neutral(self):
        return type(self)(by=1.0)

    def heads(self, state, layer, y):
        if layer != LAYER:
            return None
        gain = y.new_ones(y.shape[0], 1, y.shape[2], 1)
        gain[:, :, HEAD] = self.by
        return gain


@dataclass(frozen=True, kw_only=True)
class LastRow(Everywhere):
    """Scales one head at the last position of each pass."""

    def heads(self, state, layer, y):
        if layer != LAYER:
            return None
        gain = y.new_ones(*y.shape[:3], 1)
        gain[:, -1, HEAD] = self.by
        return gain


@dataclass(frozen=True, kw_only=True)
class Always(Everywhere):
    """Scales one head, with an image or without one."""

    edits_without_image: ClassVar[bool] = True


def outputs(model, inputs, *methods, edit=None):
    """Outputs of the layer; ``edit`` changes what enters its output projection, by hand."""
    found = []
    anatomy = Anatomy(model)

    def scale(module, args):
        y = args[0].unflatten(-1, (anatomy.n_heads, -1)).clone()
        edit(y)
        return (y.flatten(-2),)

    with attach(model, *methods), torch.no_grad():
        handles = [anatomy.layers[LAYER].register_forward_hook(lambda m, a, o: found.append(o))]
        if edit is not None:
            handles.append(anatomy.o_proj(LAYER).register_forward_pre_hook(scale))
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return (found[-1][0] if isinstance(found[-1], tuple) else found[-1]), logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gains_per_position_equal_hooks_by_hand(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)

    def edit(y):
        y[:, -1, HEAD] *= 0.25

    ours, by_hand = outputs(model, inputs, LastRow())[1], outputs(model, inputs, edit=edit)[1]
    assert torch.equal(ours, by_hand)
    plain = outputs(model, inputs)[0]
    edited = outputs(model, inputs, LastRow())[0]
    assert torch.equal(edited[:, :-1], plain[:, :-1])
    assert not torch.allclose(edited[:, -1], plain[:, -1], atol=1e-4)


def test_both_kinds_of_gains_multiply_position_by_position():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)

    def edit(y):
        y[:, :, HEAD] *= 0.5
        y[:, -1, HEAD] *= 0.25

    by_hand = outputs(model, inputs, edit=edit)[1]
    for pair in ((LastRow(), Everywhere(by=0.5)), (Everywhere(by=0.5), LastRow())):
        assert torch.equal(outputs(model, inputs, *pair)[1], by_hand)


def test_gains_per_position_leave_riding_rows_alone():
    # VHR in lockstep measures its text-only rows in the same prefill: a second set of rows.
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    riding = VHR(layers=(1,), text_branch="lockstep")
    alone, with_gains = (outputs(model, inputs, riding, *more)[1] for more in ((), (LastRow(),)))
    assert not torch.allclose(alone[:, -1], with_gains[:, -1], atol=1e-4)
    torch.testing.assert_close(alone[:, :-1], with_gains[:, :-1])


def test_gains_per_position_hold_in_decoding():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    n = inputs["input_ids"].shape[1]
    method = LastRow(by=-9.0)
    with attach(model, method):
        ours = checks.generate(model, inputs, do_sample=False)

    def edit(y):  # without a cache: the prompt's last row, and all new ones
        y[:, n - 1 :, HEAD] *= -9

    ids = inputs["input_ids"]
    for _ in range(checks.NEW):
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        z = outputs(model, whole, edit=edit)[1][:, -1]
        z[:, 3] = -torch.inf  # every answer gets its full length
        ids = torch.cat([ids, z.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ours, ids[:, n:])
    assert not torch.equal(ours, checks.generate(model, inputs, do_sample=False))


@pytest.mark.parametrize("cls", [Everywhere, LastRow])
def test_prompts_without_an_image_are_left_alone_unless_a_method_says_otherwise(cls):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(1)], []])
    plain, edited = outputs(model, inputs)[1], outputs(model, inputs, cls())[1]
    assert torch.equal(plain[1], edited[1])
    assert not torch.allclose(plain[0, -1], edited[0, -1], atol=1e-4)
    both = outputs(model, inputs, Always())[1]
    assert not torch.allclose(plain[1, -1], both[1, -1], atol=1e-4)
    text = tiny.inputs(processor, checks.PROMPTS, [[], []])
    assert not torch.allclose(outputs(model, text)[1], outputs(model, text, Always())[1], atol=1e-4)
