"""The sites that no shipped method uses yet, with small methods made for the purpose."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch

from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Method, attach
from mmlm.engine.combine import chain, product, total
from mmlm.engine.method import SITES, Paper
from mmlm.errors import UnsupportedModel

PAPER = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="here")


@dataclass(frozen=True, kw_only=True)
class Scale(Method):
    """Multiplies one layer's input."""

    paper: ClassVar[Paper] = PAPER
    by: float = 2.0
    at: int = 2

    def neutral(self):
        return Scale(by=1.0)

    def layer_in(self, state, layer, x):
        return x * self.by if layer == self.at else None


@dataclass(frozen=True, kw_only=True)
class Shift(Scale):
    """Adds to one layer's input."""

    def layer_in(self, state, layer, x):
        return x + self.by if layer == self.at else None


@dataclass(frozen=True, kw_only=True)
class ScaleOut(Scale):
    """Multiplies one layer's output."""

    layer_in = Method.layer_in

    def layer_out(self, state, layer, x):
        return x * self.by if layer == self.at else None


@dataclass(frozen=True, kw_only=True)
class Watch(Method):
    """Looks at everything and changes nothing."""

    paper: ClassVar[Paper] = PAPER

    def neutral(self):
        return self

    def begin(self, prompt):
        return []

    def layer_in(self, state, layer, x):
        state.append(("in", layer, tuple(x.shape)))

    def layer_out(self, state, layer, x):
        state.append(("out", layer, tuple(x.shape)))


def by_hand(model, inputs, *, before=None, after=None):
    """The same edit as an ordinary hook on layer 2."""
    layer, handles = model.get_decoder().layers[2], []
    if before:
        handles.append(layer.register_forward_pre_hook(lambda m, a: (before(a[0]), *a[1:])))
    if after:
        handles.append(layer.register_forward_hook(lambda m, a, out: after(out)))
    z = checks.next_logits(model, inputs)
    for handle in handles:
        handle.remove()
    return z


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layer_in_and_layer_out_equal_plain_hooks(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    with attach(model, Scale(by=3.0)):
        before = checks.next_logits(model, inputs)
    with attach(model, ScaleOut(by=0.5)):
        after = checks.next_logits(model, inputs)
    assert torch.equal(before, by_hand(model, inputs, before=lambda x: x * 3))
    assert torch.equal(after, by_hand(model, inputs, after=lambda x: x * 0.5))


def test_replacements_run_in_the_given_order():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, Scale(), Shift()):
        first = checks.next_logits(model, inputs)
    with attach(model, Shift(), Scale()):
        second = checks.next_logits(model, inputs)
    assert torch.equal(first, by_hand(model, inputs, before=lambda x: x * 2 + 2))
    assert torch.equal(second, by_hand(model, inputs, before=lambda x: (x + 2) * 2))
    assert not torch.equal(first, second)


def test_a_method_that_only_looks_changes_no_bit_and_sees_all_layers():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    n = inputs["input_ids"].shape[1]
    plain = checks.next_logits(model, inputs)
    with attach(model, Watch()), torch.no_grad():
        assert torch.equal(model(**inputs).logits[:, -1], plain)
        seen = model._mmlm_session.states[0]
    assert seen == [(side, layer, (2, n, 64)) for layer in range(4) for side in ("in", "out")]


@torch.no_grad()
def test_edits_touch_the_main_rows_only():
    """While branches share the batch, layer edits must leave their rows alone."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    methods = (ScaleOut(by=1.5), VCD())
    with attach(model, *methods):
        fused = checks.generate(model, inputs, do_sample=False)
        separate = checks.generate(
            model, inputs, do_sample=False, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(fused, separate)


@torch.no_grad()
def test_lockstep_rows_do_not_reach_other_methods():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, VHR(text_branch="lockstep"), Watch()):
        model(**inputs)
        shapes = {shape for _, _, shape in model._mmlm_session.states[1]}
        states = model._mmlm_session.states[0]
    assert {s[0] for s in shapes} == {2}
    assert states.gain[1].shape == (2, 1, 8, 1)


def test_sites_are_derived_from_what_a_class_overrides():
    assert Scale().sites == {"layer_in"}
    assert ScaleOut().sites == {"layer_out"}
    assert VHR().sites == {"heads"}
    assert VCD().sites == {"logits"}
    assert len(SITES) == len(set(SITES)) == 16
    assert all(hasattr(Method, site) for site in SITES)


def test_a_site_without_mechanism_is_refused_not_ignored(monkeypatch):
    model, _ = tiny.shared("llava")
    working = sys.modules["mmlm.engine.attach"]._WORKING
    monkeypatch.setattr("mmlm.engine.attach._WORKING", working - {"layer_in"})
    with pytest.raises(UnsupportedModel, match="acts at layer_in"), attach(model, Scale()):
        pass


def test_a_method_of_another_package_is_named_by_its_path():
    assert Scale(by=3.0).text == "test_sites.Scale(by=3.0, at=2)"
    assert Scale(by=3.0).label == "Scale(by=3.0)"
    assert Scale().label == "Scale"


def test_combination_laws_by_hand():
    one, two = torch.tensor([2.0]), torch.tensor([3.0])
    assert product([None, one, None, two]).tolist() == [6.0]
    assert product([None]) is None
    assert total([one, None, two]).tolist() == [5.0]
    assert total([]) is None
    assert chain([lambda x: x + 1, lambda x: None, lambda x: x * 2], one).tolist() == [6.0]
