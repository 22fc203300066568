"""A column's text and its form are two views of the same methods."""

import dataclasses

import pytest

import mmlm
from mmlm.errors import InputError
from mmlm.web.method_forms import (
    load_methods,
    method_name,
    parameters,
    read_methods,
    start_text,
    with_value,
    write_methods,
)


@pytest.mark.parametrize("name", mmlm.method_names())
def test_every_method_has_a_form_that_reads_back(name):
    text = start_text(name, "embedded")
    [method] = read_methods(text)
    fields = parameters(method)
    assert [field.name for field in fields] == [f.name for f in dataclasses.fields(method)]
    assert all(field.meaning for field in fields)
    for field in fields:
        assert read_methods(with_value(text, 0, field.name, field.shown)) == (method,)


def test_kinds_of_fields():
    kinds = {field.name: field.kind for field in parameters(mmlm.VHR())}
    assert kinds["alpha"] == "float"
    assert kinds["layers"] == "literal"
    assert kinds["outliers"] == "bool"
    assert kinds["text_branch"] == "choice"
    [choice] = [field for field in parameters(mmlm.VHR()) if field.name == "text_branch"]
    assert choice.choices == ("plain", "lockstep")
    assert {f.name: f.kind for f in parameters(mmlm.ICD())}["prefix"] == "str"
    assert {f.name: f.kind for f in parameters(mmlm.VCD())}["noise_step"] == "int"


def test_a_change_writes_the_text_anew():
    assert with_value("VHR(alpha=2.0)", 0, "alpha", 3) == "VHR(alpha=3.0)"
    assert with_value("VHR(alpha=3.0)", 0, "alpha", 2) == "VHR"
    assert with_value("VHR", 0, "layers", "(1, 2)") == "VHR(layers=(1, 2))"
    assert with_value("VHR(layers=(1, 2))", 0, "layers", " ") == "VHR"
    assert with_value("PAI + VCD", 1, "noise_step", 10.0) == "PAI + VCD(noise_step=10)"


def test_a_plus_inside_of_a_text_does_not_cut():
    text = with_value("VHR + ICD", 1, "prefix", "wrong + 'odd'")
    first, second = read_methods(text)
    assert (type(first), second.prefix) == (mmlm.VHR, "wrong + 'odd'")
    assert write_methods((first, second)) == text


@pytest.mark.parametrize("text", ["", "  ", "none", "None", None])
def test_no_method(text):
    assert read_methods(text) == ()


@pytest.mark.parametrize(
    ("text", "name", "value", "said"),
    [
        ("VHR", "alpha", -1, "alpha must be a finite number > 0"),
        ("VHR", "alpha", None, "alpha must be a number, got nothing"),
        ("VHR", "layers", "1, two", "layers is written as Python"),
        ("VHR", "layers", "__import__('os')", "layers is written as Python"),
        ("VCD", "noise_step", 1.5, "noise_step"),
    ],
)
def test_the_class_refuses_values(text, name, value, said):
    with pytest.raises(InputError, match=said) as error:
        with_value(text, 0, name, value)
    assert error.value.advice


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("VHX", "no method 'VHX'"),
        ("VHR(", "not a method"),
        ("VHR(alfa=2)", "no parameter 'alfa'"),
        ("ImageAttention", "is a probe"),
        ("unheard_of.fly", "'unheard_of' is not loaded here"),
        ("VHR + unheard_of.fly(x=1)", "'unheard_of' is not loaded here"),
        ("os.path.join", "not a subclass of mmlm.Method"),
    ],
)
def test_texts_that_are_no_methods(text, said):
    with pytest.raises(InputError, match=said):
        read_methods(text)


def test_a_method_of_ones_own_is_known_once_it_was_loaded(tmp_path, monkeypatch):
    source = """
from dataclasses import dataclass

from decoding.vhr import VHR


@dataclass(frozen=True, kw_only=True)
class Loud(VHR):
    alpha: float = 9.0
"""
    (tmp_path / "own_methods.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    text = "own_methods.Loud(layers=(1,)) + PAI"
    with pytest.raises(InputError, match="'own_methods' is not loaded here"):
        read_methods(text)
    loud, pai = load_methods(text)
    assert (method_name(loud), method_name(pai)) == ("own_methods.Loud", "PAI")
    assert read_methods(text) == (loud, pai)
    assert write_methods((loud, pai)) == text
    assert with_value(text, 0, "alpha", 3) == "own_methods.Loud(alpha=3.0, layers=(1,)) + PAI"
    assert start_text("own_methods.Loud", "embedded") == "own_methods.Loud"
