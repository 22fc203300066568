"""Methods that are stored beside a checkpoint."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import mmlm
from mmlm import Method, build_in
from mmlm.engine.build_in import built_in
from mmlm.engine.method import Paper
from mmlm.errors import InputError, MissingTensors
from mmlm.model.checkpoint import load, save

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Bias(Method):
    """Adds a learned vector to one layer's output."""

    paper: ClassVar[Paper] = Paper(title="made for a test", arxiv="0", year=2026, venue="here")
    at: int = 1

    def neutral(self):
        return self

    def modules(self, anatomy):
        part = torch.nn.Module()
        part.vector = torch.nn.Parameter(torch.linspace(-1, 1, anatomy.width))
        return part

    def begin(self, prompt):
        return prompt.module(self).vector

    def layer_out(self, state, layer, x):
        return x + state if layer == self.at else None


@pytest.fixture
def stored(tmp_path):
    """A folder, and logits of the built-in model and of the plain one."""
    model, processor = tiny.build("llava")
    model.eval()
    inputs = tiny.inputs(processor, ["what is shown here ?"], [[tiny.picture(1)]])
    with torch.no_grad():
        plain = model(**inputs).logits
        build_in(model, Bias(at=2))
        model.mmlm_methods["Bias"].vector.mul_(3)
        edited = model(**inputs).logits
    save(model, processor, tmp_path / "made")
    assert torch.equal(model(**inputs).logits, edited)
    return tmp_path / "made", inputs, edited, plain


def test_the_methods_come_back_with_their_weights(stored):
    folder, inputs, edited, plain = stored
    text = (folder / "methods.yaml").read_text()
    assert text == f"methods:\n- {Bias.__module__}.Bias(at=2)\n"
    assert list(load_file(folder / "methods.safetensors")) == ["Bias.vector"]
    model, _ = mmlm.load(folder)
    assert built_in(model) == (Bias(at=2),)
    assert torch.equal(model(**inputs).logits, edited)
    assert not torch.allclose(edited, plain, atol=1e-2)


def test_plain_transformers_reads_the_folder(stored, tmp_path):
    folder, inputs, _, plain = stored
    torch.save({"inputs": inputs, "logits": plain}, tmp_path / "expected.pt")
    program = f"""
import sys, torch
import mmlm  # some machines have a torchvision that cannot be imported; this hides it
from transformers import LlavaForConditionalGeneration as Model
model, info = Model.from_pretrained({str(folder)!r}, output_loading_info=True)
assert not any(info.values()), info
expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model.eval()(**expected["inputs"]).logits, expected["logits"])
assert "mmlm.engine" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_stored_precision_holds_for_the_methods_too(stored, tmp_path):
    folder, _, _, _ = stored
    model, processor = load(folder)
    save(model, processor, tmp_path / "half", dtype=torch.bfloat16)
    assert (
        load_file(tmp_path / "half" / "methods.safetensors")["Bias.vector"].dtype == torch.bfloat16
    )
    again, _ = load(tmp_path / "half", dtype="auto")
    assert again.mmlm_methods["Bias"].vector.dtype == torch.bfloat16
    assert model.mmlm_methods["Bias"].vector.dtype == torch.float32


def test_a_plain_model_in_the_same_folder_takes_the_methods_away(stored):
    folder, inputs, _, plain = stored
    model, processor = tiny.build("llava")
    save(model, processor, folder)
    assert not list(folder.glob("methods.*"))
    again, _ = load(folder)
    assert built_in(again) == ()
    assert torch.equal(again(**inputs).logits, plain)


def change(folder, edit):
    path = folder / "methods.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("Bias.vector"), r"1 missing: Bias\.vector"),
        (lambda t: t.update(more=torch.ones(1)), "1 unexpected: more"),
        (lambda t: t.update({"Bias.vector": torch.ones(3)}), r"1 of another shape: Bias\.vector"),
    ],
)
def test_weights_that_do_not_fit_are_named(stored, edit, message):
    change(stored[0], edit)
    with pytest.raises(MissingTensors, match=message):
        load(stored[0])


def test_missing_files(stored):
    folder = stored[0]
    specification = (folder / "methods.yaml").read_text()
    (folder / "methods.yaml").unlink()
    with pytest.raises(InputError, match=r"has methods\.safetensors but no methods\.yaml"):
        load(folder)
    (folder / "methods.yaml").write_text(specification)
    (folder / "methods.safetensors").unlink()
    with pytest.raises(MissingTensors, match=r"1 missing: Bias\.vector"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [", "cannot be read"),
        ("other: 3", "must hold `methods:`"),
        ("methods: []", "must hold `methods:`"),
        ("methods: [NoSuchMethod]", "no method 'NoSuchMethod'"),
        ("methods: [VHR(alpha=-1)]", "refused"),
    ],
)
def test_a_specification_that_cannot_be_used(stored, text, message):
    (stored[0] / "methods.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load(stored[0])


def test_broken_weights(stored):
    (stored[0] / "methods.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load(stored[0])


def test_a_folder_of_save_pretrained_is_explained(stored, tmp_path):
    model, processor = load(stored[0])
    model.save_pretrained(tmp_path / "raw")
    processor.save_pretrained(tmp_path / "raw")
    with pytest.raises(MissingTensors, match=r"unexpected: mmlm_methods\.Bias\.vector") as caught:
        load(tmp_path / "raw")
    assert "save_pretrained wrote it" in caught.value.advice
