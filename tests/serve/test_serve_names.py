"""`mmlm.serve.names`: methods by the name of the model or by a field; what clients may not name."""

from pathlib import Path

import pytest
import torch

import mmlm
from mmlm.engine.head_maps import HeadMap
from mmlm.errors import InputError
from mmlm.serve.names import Names, joined, split
from mmlm.serve.refusals import Refusal

NAMES = Names("embedded", ("VHR(alpha=2.0)", "VHR() + VAR"))


def refusal(names, model, chosen=None):
    with pytest.raises(Refusal) as caught:
        names.methods(model, chosen)
    return caught.value


def test_what_is_listed():
    assert NAMES.listed == ("embedded", "embedded+VHR(alpha=2.0)", "embedded+VHR()+VAR")
    for name, methods in zip(NAMES.listed[1:], NAMES.offered, strict=True):
        assert NAMES.methods(name, None) == methods


@pytest.mark.parametrize(
    ("model", "chosen", "methods"),
    [
        ("embedded", None, ()),
        ("embedded", [], ()),
        ("embedded", ["none"], ()),
        ("embedded+none", None, ()),
        ("embedded+VHR(alpha=3.0)", None, (mmlm.VHR(alpha=3.0),)),
        ("embedded + VAR + VCD()", None, (mmlm.VAR(), mmlm.VCD())),
        ("embedded", ["VAR", "VCD(alpha=0.5)"], (mmlm.VAR(), mmlm.VCD(alpha=0.5))),
        ("embedded", ["VAR+VCD(alpha=0.5)"], (mmlm.VAR(), mmlm.VCD(alpha=0.5))),
    ],
)
def test_methods_of_a_request(model, chosen, methods):
    assert NAMES.methods(model, chosen) == methods


@pytest.mark.parametrize("model", ["other", "embeddedVHR", "xembedded", "embedded-VHR", "x+VHR"])
def test_another_model_is_not_there(model):
    found = refusal(NAMES, model)
    assert (found.status, found.code) == (404, "model_not_found")
    assert "embedded+VHR(alpha=2.0)" in found.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("VHRR", "Did you mean 'VHR'?"),
        ("VHR(alpha=-1)", "alpha must be"),
        ("VHR(beta=1)", "no parameter 'beta'"),
        ("VHR(2.0)", "positional"),
        ("VHR(alpha=__import__('os'))", "not a literal"),
        ("VHR() VAR()", "not a sum of methods"),
        ("(" * 5000, "longer than"),
        ("(" * 1900, "not a sum of methods"),
        ("", "not a sum of methods"),
        ("os.path()", "clients may not"),
        ("decoding.vcd.VCD(alpha=2.0)", "clients may not"),
        ("DyVTE(weights_file='/etc/passwd')", "weights_file names a file"),
        ("PH3(heads_file='/etc/passwd')", "heads_file names a file"),
        ("StreamingHeads(heads_files=('/etc/passwd',))", "heads_files names a file"),
        ("StreamingHeads(heads_files='/etc/passwd')", "heads_files names a file"),
        ("VHR(heads_by_layer='/etc/a.json')", "heads_by_layer names a file"),
        ("SeeingKnowing(image_heads='/etc/a.json')", "image_heads names a file"),
        ("OPERA(num_beams=500)", "at most 8"),
        ("Confidence()", "changes no answer"),
    ],
)
def test_what_clients_may_not_name(text, message):
    for model, chosen in ((f"embedded+{text}", None), ("embedded", [text])):
        found = refusal(NAMES, model, chosen)
        assert message in found.message
        assert found.status == 400
        assert found.param == ("model" if chosen is None else "mmlm_methods")


def test_methods_are_named_in_one_place():
    assert "in one place" in refusal(NAMES, "embedded+VAR", ["VCD"]).message


def test_nothing_is_imported_for_a_client():
    import sys

    assert "this" not in sys.modules
    refusal(NAMES, "embedded+this.that()")
    assert "this" not in sys.modules


def test_the_operator_may_name_classes_and_files():
    names = Names("m", ("decoding.vhr.VHR(alpha=2.0)", "DyVTE(weights_file='w.safetensors')"))
    assert names.methods("m+decoding.vhr.VHR(alpha=3.0)", None) == (mmlm.VHR(alpha=3.0),)
    assert names.methods("m+DyVTE(weights_file='w.safetensors')", None)[0].weights_file
    assert "names a file" in refusal(names, "m+DyVTE(weights_file='other')").message


def test_a_clients_file_is_not_read(monkeypatch):
    read = []
    monkeypatch.setattr(Path, "is_file", lambda path: read.append(path))
    for text in ("PH3(heads_file='a.json')", "VHR(heads_by_layer='a.json')"):
        assert "names a file" in refusal(NAMES, f"embedded+{text}").message
    assert not read


def test_heads_of_a_file_that_the_operator_names_are_there(tmp_path):
    score = torch.tensor([[0.0, 0.9]], dtype=torch.float64)
    path = tmp_path / "heads.json"
    HeadMap(kind="visual", values={"hit_rate": score}, rank="hit_rate").save(path)
    text = f"VHR(heads_by_layer={str(path)!r})"
    (method,) = Names("m", (text,)).methods(f"m+{text}", None)
    assert method.heads_by_layer == ((0, (1,)),)
    assert "names a file" in refusal(Names("m"), f"m+{text}").message


def test_a_name_with_a_plus_is_refused():
    with pytest.raises(InputError, match="stands between"):
        Names("a+b")


def test_names_are_read_back():
    for methods in ((), (mmlm.VHR(alpha=3.5),), (mmlm.VAR(sink_dims=(1, 2)), mmlm.VCD())):
        name = joined("embedded", methods)
        assert NAMES.methods(name, None) == methods


def test_a_sum_is_split_at_the_top_only():
    assert split("A(x='+')+B(y=(1, 2))") == ["A(x='+')", "B(y=(1, 2))"]
    with pytest.raises(InputError):
        split("A() - B()")
