"""What a link carries comes back as it was, or is refused with words."""

import json

import pytest

from mmlm.errors import InputError
from mmlm.web.settings import Chosen, from_json

MODELS = ("embedded", "owner/other")


def read(text):
    return from_json(text, MODELS, 512)


CHOSEN = Chosen(
    "owner/other",
    ("VHR(alpha=3.0)", "", "PAI + VCD(alpha=0.5)"),
    'is there a "dog" & a cat? ü',
    99,
    {
        "max_new_tokens": 20,
        "do_sample": True,
        "num_beams": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
    },
)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chosen", [CHOSEN, Chosen()])
def test_settings_come_back(chosen, indent):
    assert read(chosen.as_json(indent=indent)) == chosen


def test_what_is_not_there_has_its_default():
    assert read('{"format": "mmlm web 1"}') == Chosen()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "mmlm web 2"}, "'format' is not 'mmlm web 1'"),
        ({"questoin": "x"}, "unknown entry 'questoin'"),
        ({"model": "secret/model"}, "not offered here"),
        ({"model": 3}, "'model' is 3"),
        ({"methods": "VHR"}, "'methods' is 'VHR'"),
        ({"methods": ["VHR"] * 5}, "'methods' is"),
        ({"methods": [1]}, "'methods' is"),
        ({"methods": ["VHR", "VHX"]}, "Method 2: There is no method 'VHX'"),
        ({"methods": ["unheard_of.x"]}, "Method 1: 'unheard_of.x' names a class by its path"),
        ({"question": " "}, "'question' has 1 characters"),
        ({"question": "x" * 4001}, "'question' has 4001"),
        ({"scene": -1}, "'scene' is -1"),
        ({"scene": 1.5}, "'scene' is 1.5"),
        ({"scene": True}, "'scene' is True"),
        ({"generate": []}, "'generate' is"),
        ({"generate": {"batch_size": 4}}, "unknown entry 'generate.batch_size'"),
        ({"generate": {"seed": "0"}}, "'generate.seed' is '0'"),
        ({"generate": {"do_sample": 1}}, "'generate.do_sample' is 1"),
        ({"generate": {"max_new_tokens": 0}}, "max_new_tokens must be at least 1"),
        ({"generate": {"max_new_tokens": 513}}, "this page allows 512"),
        ({"generate": {"do_sample": True, "temperature": float("nan")}}, "temperature must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    with pytest.raises(InputError, match=said) as error:
        read(json.dumps({"format": "mmlm web 1", **change}))
    assert error.value.advice


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "no JSON"), ("{", "no JSON"), ("[1]", "a JSON list"), ("[" * 9000, "no JSON"),
     (" " * 50_001, "50001 characters")],
)  # fmt: skip
def test_texts_that_are_no_settings(text, said):
    with pytest.raises(InputError, match=said):
        read(text)
