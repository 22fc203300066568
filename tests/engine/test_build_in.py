"""build_in: methods that are part of a model, with weights, copies, adapters and methods on top."""

import copy
import io
import pickle
import threading
from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch
from test_masks import SeeQuestion

from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Method, attach, build_in
from mmlm.engine.build_in import built_in, take_out
from mmlm.engine.method import Paper
from mmlm.errors import IncompatibleMethods, LayoutError

PAPER = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="here")


@dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    """Adds a learned multiple of one layer's input to its output."""

    paper: ClassVar[Paper] = PAPER
    at: int = 1
    start: float = 0.5

    def neutral(self):
        return Adapter(at=self.at, start=0.0)

    def modules(self, anatomy):
        linear = torch.nn.Linear(anatomy.width, anatomy.width, bias=False)
        with torch.no_grad():
            linear.weight.copy_(self.start * torch.eye(anatomy.width))
        return linear

    def begin(self, prompt):
        return prompt.module(self)

    def acts_in(self, anatomy, layer):
        return layer == self.at

    def layer_out(self, state, layer, x):
        return x + state(x)


@dataclass(frozen=True, kw_only=True)
class Double(Method):
    """Doubles one layer's output; has no weights."""

    paper: ClassVar[Paper] = PAPER

    def neutral(self):
        return self

    def layer_out(self, state, layer, x):
        return x * 2 if layer == 2 else None


def by_hand(model, inputs, factor=1.5, layer=1):
    """The same as an ordinary hook."""
    handle = model.get_decoder().layers[layer].register_forward_hook(lambda m, a, out: out * factor)
    try:
        return checks.next_logits(model, inputs)
    finally:
        handle.remove()


def test_it_acts_for_good_and_can_be_taken_out():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    plain, before = checks.next_logits(model, inputs), checks._footprint(model)
    expected = by_hand(model, inputs)
    assert build_in(model, Adapter()) is model
    assert built_in(model) == (Adapter(),)
    assert torch.equal(checks.next_logits(model, inputs), expected)
    assert torch.equal(checks.next_logits(model, inputs), expected)
    assert checks.generate(model, inputs, do_sample=False).shape == (2, checks.NEW)
    take_out(model)
    assert checks._footprint(model) == before
    assert built_in(model) == ()
    assert torch.equal(checks.next_logits(model, inputs), plain)


def test_weights_are_parameters_of_the_model():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    model.to(torch.float64)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    build_in(model, Adapter())
    weight = model.mmlm_methods["Adapter"].weight
    assert weight.dtype == torch.float64
    assert "mmlm_methods.Adapter.weight" in model.state_dict()
    assert any(p is weight for p in model.parameters())
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


def test_temporary_methods_on_top_and_the_built_in_ones_afterwards():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    build_in(model, Adapter())
    own = checks.next_logits(model, inputs)
    inside = checks._footprint(model)
    with attach(model, Double()):
        both = checks.next_logits(model, inputs)
        with pytest.raises(IncompatibleMethods, match=r"Adapter, Double is already attached"):
            with attach(model, VHR()):
                pass
        with pytest.raises(IncompatibleMethods, match="on top"):
            take_out(model)
    assert checks._footprint(model) == inside
    assert torch.equal(checks.next_logits(model, inputs), own)
    take_out(model)
    handle = model.get_decoder().layers[2].register_forward_hook(lambda m, a, out: out * 2)
    assert torch.equal(both, by_hand(model, inputs))
    handle.remove()
    failed = False
    build_in(model, Adapter())
    try:
        with attach(model, Double()):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        failed = True
    assert failed
    assert torch.equal(checks.next_logits(model, inputs), own)


def test_a_built_in_mask_with_a_temporary_contrast():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    with attach(model, SeeQuestion(), VCD()):
        expected = checks.generate(model, inputs, do_sample=False)
    build_in(model, SeeQuestion())
    with attach(model, VCD()):
        assert torch.equal(checks.generate(model, inputs, do_sample=False), expected)


def test_a_deep_copy_has_the_methods_and_weights_of_its_own():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    build_in(model, Adapter())
    expected = checks.next_logits(model, inputs)
    twin = copy.deepcopy(model)
    assert built_in(twin) == (Adapter(),)
    assert torch.equal(checks.next_logits(twin, inputs), expected)
    with torch.no_grad():
        twin.mmlm_methods["Adapter"].weight.zero_()
    assert torch.equal(checks.next_logits(model, inputs), expected)
    changed = checks.next_logits(twin, inputs)
    take_out(twin)
    assert torch.equal(changed, checks.next_logits(twin, inputs))
    # Two models at once: neither reaches the other.
    twin = copy.deepcopy(model)
    results = {}
    threads = [
        threading.Thread(
            target=lambda n=n, m=m: results.__setitem__(n, checks.next_logits(m, inputs))
        )
        for n, m in (("model", model), ("twin", twin))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results["model"], expected)
    assert torch.equal(results["twin"], expected)


def test_pickle_and_torch_save():
    """Before the first pass: then the library itself puts hooks on that cannot be pickled."""
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    build_in(model, Adapter())
    copies = [pickle.loads(pickle.dumps(model)), _through_torch(model)]
    expected = checks.next_logits(model, inputs)
    for again in copies:
        assert built_in(again) == (Adapter(),)
        assert torch.equal(checks.next_logits(again, inputs), expected)


def _through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_state_dict_round_trip():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    build_in(model, Adapter())
    expected = checks.next_logits(model, inputs)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    other, _ = tiny.build("llava")
    build_in(other, Adapter(start=0.0))
    assert not torch.equal(checks.next_logits(other, inputs), expected)
    other.load_state_dict(state)
    assert torch.equal(checks.next_logits(other, inputs), expected)


def test_save_pretrained_is_still_read_by_plain_transformers(tmp_path):
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    build_in(model, Adapter())
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == ["mmlm_methods.Adapter.weight"]
    assert not info["missing_keys"]
    torch.testing.assert_close(checks.next_logits(again.eval(), inputs), plain, atol=0, rtol=0)


def test_under_an_adapter_wrapper():
    import peft  # slow to import, and needed here only

    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    expected = by_hand(model, inputs)
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
    wrapped = peft.get_peft_model(model, lora).eval()
    build_in(wrapped, Adapter())
    torch.testing.assert_close(checks.next_logits(wrapped, inputs), expected, atol=0, rtol=0)
    assert built_in(wrapped) == built_in(model) == (Adapter(),)
    with attach(wrapped, Double()):
        assert not torch.equal(checks.next_logits(wrapped, inputs), expected)
    assert model.mmlm_methods["Adapter"].weight.requires_grad
    # Built in first, wrapped later: the wrapper freezes all weights that it is not told to train.
    twin, _ = tiny.build("llava")
    build_in(twin, Adapter())
    later = peft.get_peft_model(twin, lora).eval()
    torch.testing.assert_close(checks.next_logits(later, inputs), expected, atol=0, rtol=0)
    assert not twin.mmlm_methods["Adapter"].weight.requires_grad
    copied = copy.deepcopy(later)
    torch.testing.assert_close(checks.next_logits(copied, inputs), expected, atol=0, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing):
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    build_in(model, SeeQuestion(), Adapter())
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    weight = model.mmlm_methods["Adapter"].weight
    optimiser = torch.optim.SGD([weight], lr=0.05)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_what_is_refused():
    model, processor = tiny.build("llava")
    with pytest.raises(ValueError, match="at least one method"):
        build_in(model)
    with pytest.raises(IncompatibleMethods, match=r"its site 'logits' edits logits after the head"):
        build_in(model, VCD())
    with pytest.raises(IncompatibleMethods, match=r"Two methods Adapter bring weights"):
        build_in(model, Adapter(), Adapter(at=2))
    with pytest.raises(IncompatibleMethods, match="weights that must be trained first"):
        with attach(model, Adapter()):
            pass
    with attach(model, Double()), pytest.raises(IncompatibleMethods, match="already part of"):
        build_in(model, Adapter())
    build_in(model, Adapter())
    with pytest.raises(IncompatibleMethods, match="already part of"):
        build_in(model, Double())
    with pytest.raises(IncompatibleMethods, match=r"VCD runs auxiliary prompts.*Adapter"):
        with attach(model, VCD()):
            pass
    with (
        attach(model, VHR()),
        pytest.raises(IncompatibleMethods, match=r"auxiliary prompt.*Adapter"),
    ):
        checks.next_logits(model, checks.batch(processor))


def test_weights_that_are_not_there():
    model, processor = tiny.build("llava")
    build_in(model, Adapter())
    del model.mmlm_methods
    with pytest.raises(LayoutError, match="Adapter has no weights"):
        checks.next_logits(model, checks.batch(processor))
