"""Weights of methods outside a model: lent for a block, stored in a file, read back."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import checks
import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_build_in import Adapter

import mmlm
from mmlm import attach, build_in
from mmlm.engine.build_in import built_in
from mmlm.engine.weights import make, store
from mmlm.errors import IncompatibleMethods, InputError, MissingTensors


@dataclass(frozen=True, kw_only=True)
class Lent(Adapter):
    """The adapter with a file; fresh ones mean something."""

    fresh_is_valid: ClassVar[bool] = True
    weights_file: str = ""
    width: int = 0

    def neutral(self):
        return replace(self, start=0.0)

    def modules(self, anatomy):
        linear = torch.nn.Linear(anatomy.width, self.width or anatomy.width, bias=False)
        with torch.no_grad():
            linear.weight.mul_(self.start)
        return linear


@dataclass(frozen=True, kw_only=True)
class Untrained(Lent):
    """The same, whose fresh weights mean nothing."""

    fresh_is_valid: ClassVar[bool] = False


@pytest.fixture
def trained(tmp_path):
    """A file of weights, logits with them, the plain model, its inputs."""
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    twin = copy.deepcopy(model)
    build_in(twin, Untrained(start=2.0))
    with torch.no_grad():
        twin.mmlm_methods["Untrained"].weight.add_(0.01)
    store(twin, "Untrained", tmp_path / "new" / "untrained.safetensors")
    return (
        tmp_path / "new" / "untrained.safetensors",
        checks.next_logits(twin, inputs),
        model,
        inputs,
    )


def test_a_file_holds_what_the_model_had(trained):
    file, expected, model, inputs = trained
    names = [n for n, _ in model.named_parameters()]
    with attach(model, Untrained(weights_file=str(file))):
        assert torch.equal(checks.next_logits(model, inputs), expected)
        assert [n for n, _ in model.named_parameters()] == names
    assert not hasattr(model, "mmlm_methods")


def test_built_in_from_a_file_the_method_names_it_no_longer(trained):
    file, expected, model, inputs = trained
    build_in(model, Untrained(weights_file=str(file)))
    assert built_in(model) == (Untrained(),)
    assert torch.equal(checks.next_logits(model, inputs), expected)
    assert model.mmlm_methods["Untrained"].weight.requires_grad


def test_fresh_weights_are_lent_only_where_they_mean_something():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    with attach(model, Lent()):
        first = checks.next_logits(model, inputs)
    torch.rand(7)  # what was drawn before does not matter
    with attach(model, Lent()):
        assert torch.equal(checks.next_logits(model, inputs), first)
    assert not torch.allclose(first, plain, atol=1e-4)
    with pytest.raises(IncompatibleMethods, match="Untrained has weights that must be trained"):
        with attach(model, Untrained()):
            pass


def test_a_lent_method_beside_a_built_in_one():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    build_in(model, Adapter(at=1))
    with attach(model, Lent(at=2)):
        both = checks.next_logits(model, inputs)
    twin, _ = tiny.build("llava")
    build_in(twin, Adapter(at=1), Lent(at=2))
    assert torch.equal(checks.next_logits(twin, inputs), both)


def test_weights_come_in_the_models_precision_but_for_those_that_keep_theirs():
    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = torch.nn.Linear(2, 2)
            self.gate = torch.nn.Linear(1, 1)
            self.gate.keep_fp32 = True

    class Mixed(Lent):
        def modules(self, anatomy):
            return Parts()

    model, _ = tiny.build("llava")
    made = make(mmlm.Anatomy(model.bfloat16()), [Mixed()])["Mixed"]
    assert made.wide.weight.dtype == torch.bfloat16
    assert made.gate.weight.dtype == torch.float32


def test_files_that_do_not_fit(trained, tmp_path):
    file, _, model, _ = trained
    cases = [
        (Untrained(weights_file=str(tmp_path / "none")), InputError, "cannot be read"),
        (
            Lent(weights_file=str(file)),
            InputError,
            r"weights of test_weights.Untrained\(.*not of Lent",
        ),
        (
            Untrained(weights_file=str(file), width=7),
            MissingTensors,
            r"made by .*Untrained.*instead of",
        ),
    ]
    other = tmp_path / "other.safetensors"
    save_file({"bias": torch.zeros(1)}, other)
    cases.append(
        (Lent(weights_file=str(other)), MissingTensors, "1 missing: weight; 1 unexpected: bias")
    )
    (tmp_path / "torn").write_bytes(file.read_bytes()[:40])
    cases.append((Lent(weights_file=str(tmp_path / "torn")), InputError, "cannot be read"))
    for method, error, message in cases:
        with pytest.raises(error, match=message), attach(model, method):
            pass
    with pytest.raises(InputError, match="there are: none"):
        store(model, "Untrained", tmp_path / "x.safetensors")


def test_weights_that_learn_beside_adapters():
    import peft  # slow to import, and needed here only

    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    build_in(model, Untrained(start=2.0))
    before = checks.next_logits(model, inputs)
    lora = peft.LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.q_proj",
        modules_to_save=["mmlm_methods.Untrained"],
    )
    wrapped = peft.get_peft_model(model, lora).eval()
    learning = [p for n, p in wrapped.named_parameters() if "Untrained" in n and p.requires_grad]
    assert len(learning) == 1
    assert torch.equal(checks.next_logits(wrapped, inputs), before)
    with torch.no_grad():
        learning[0].mul_(0)
    assert not torch.allclose(checks.next_logits(wrapped, inputs), before, atol=1e-4)
    with wrapped.disable_adapter():  # as a reference model is run
        assert torch.equal(checks.next_logits(wrapped, inputs), before)
