"""Every exported method x every family x every check, without naming any method."""

import inspect
import itertools
import math
import pickle
import re
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, fields

import cases
import checks
import pytest
import tiny
import torch

import decoding
import mmlm
import mmlm.methods
from mmlm import attach
from mmlm.errors import IncompatibleMethods, InputError, LayoutError, UnsupportedModel

HEADINGS = (
    "Idea",
    "Paper",
    "Equations",
    "Acts at",
    "Cost",
    "Parameters",
    "Shapes",
    "State",
    "Differs",
    "Limits",
    "Raises",
    "Example",
)


def test_every_exported_method_is_in_the_matrix():
    exported = {*decoding.__all__, *mmlm.methods.__all__}
    assert {c.__name__ for c in cases.METHODS} == exported


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("cls", cases.METHODS, ids=lambda c: c.__name__)
def test_contract(cls, family, check):
    model, _ = tiny.shared(family)
    reasons = mmlm.Anatomy(model).supports(cases.strong(cls))
    if reasons:  # only a declared limit may leave a family out, and then attach must refuse
        with (
            pytest.raises(UnsupportedModel, match=re.escape(reasons[0])),
            attach(model, cases.strong(cls)),
        ):
            pass
        return
    check(cases.strong(cls), family)


@pytest.mark.parametrize("cls", cases.METHODS, ids=lambda c: c.__name__)
class TestObject:
    def test_is_frozen_hashable_and_picklable(self, cls):
        method = cls()
        first = fields(cls)[0].name
        with pytest.raises(FrozenInstanceError):
            setattr(method, first, 1)
        assert hash(method) == hash(cls())
        assert pickle.loads(pickle.dumps(method)) == method
        assert method.neutral() != method

    def test_text_form_round_trips(self, cls):
        for method in (cls(), cases.strong(cls), cls().neutral()):
            assert mmlm.parse_method(method.text) == method
            assert mmlm.parse_method(method.label) == method
            assert method.text == repr(method)

    def test_numbers_are_checked(self, cls):
        numeric = [f.name for f in fields(cls) if isinstance(f.default, int | float)]
        assert numeric
        for name in numeric:
            for bad in (math.nan, math.inf, -math.inf, -1e9, "x"):
                if bad == math.inf and (cls.__name__, name) in cases.MAY_BE_INFINITE:
                    continue
                with pytest.raises(ValueError, match=name):
                    cls(**{name: bad})

    def test_docstring_has_the_fixed_headings(self, cls):
        text = inspect.getdoc(cls)
        first = text.splitlines()[0]
        assert len(first) < 80
        assert first.endswith(".")
        found = [h for h in HEADINGS if re.search(rf"^{h}:$", text, re.M)]
        assert found == list(HEADINGS)
        body = re.search(r"^Parameters:\n(.*?)^Shapes:", text, re.M | re.S).group(1)
        named = re.findall(r"^    (\w+): ", body, re.M)
        assert named == [f.name for f in fields(cls)]

    def test_names_its_paper(self, cls):
        assert re.fullmatch(r"\d{4}\.\d{5}", cls.paper.arxiv)
        assert cls.paper.arxiv in inspect.getdoc(cls)


@pytest.mark.filterwarnings("ignore:Several methods rewrite attention weights")
@pytest.mark.parametrize(
    "pair",
    list(itertools.combinations(cases.METHODS, 2)),
    ids=lambda pair: "-".join(cls.__name__ for cls in pair),
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pairs_run_in_either_order_or_refuse(pair, family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    a, b = cases.strong(pair[0], pair[1]), cases.strong(pair[1], pair[0])
    if any(mmlm.Anatomy(model).supports(method) for method in (a, b)):
        with pytest.raises(UnsupportedModel), attach(model, a, b):
            pass
        return
    refusal = None
    ordered = all("weights" in method.sites - method.only_looks for method in (a, b))
    said = pytest.warns(UserWarning, match="one after another") if ordered else nullcontext()
    try:
        with said, attach(model, a, b, processor=processor):
            ab = checks.generate(model, inputs, do_sample=False)
    except IncompatibleMethods as error:
        refusal = str(error)
    if refusal is not None:
        assert type(a).__name__ in refusal
        assert type(b).__name__ in refusal
        return
    with attach(model, b, a, processor=processor):
        ba = checks.generate(model, inputs, do_sample=False)
    assert ordered or torch.equal(ab, ba)
    with attach(model, a, processor=processor):
        alone = checks.visible(model, inputs, a, b)
    with attach(model, a, b, processor=processor):
        both = checks.visible(model, inputs, a, b)
    assert not torch.allclose(alone, both, atol=1e-4)


@pytest.mark.parametrize("cls", cases.METHODS, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk_size": 4}, "chunked prefill"),
        ({"prompt_lookup_num_tokens": 2}, "prompt-lookup decoding"),
        ({"assistant_model": "MODEL"}, "assisted decoding"),
        ({"use_cache": False}, "use_cache=False"),
        ({"past_key_values": "CACHE"}, "filled before"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_modes_that_would_go_wrong_silently_are_refused(cls, options, message):
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    options = dict(options)
    if "assistant_model" in options:
        options["assistant_model"] = model
    if "past_key_values" in options:
        options["past_key_values"] = model(**inputs, use_cache=True).past_key_values
    with (
        attach(model, cases.strong(cls), processor=processor),
        pytest.raises(IncompatibleMethods, match=message),
    ):
        model.generate(**inputs, max_new_tokens=2, **options)


def test_chunked_prefill_in_the_generation_config_is_refused():
    model, processor = tiny.build("llava")
    model.generation_config.prefill_chunk_size = 4
    with (
        attach(model, cases.strong(cases.METHODS[0])),
        pytest.raises(IncompatibleMethods, match="chunked"),
    ):
        model.generate(**checks.batch(processor), max_new_tokens=2)


def test_nested_use_is_refused_and_the_outer_block_goes_on():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    a, b = cases.strong(cases.METHODS[0]), cases.strong(cases.METHODS[1])
    with attach(model, a, processor=processor):
        expected = checks.next_logits(model, inputs)
        with (
            pytest.raises(IncompatibleMethods, match=type(a).__name__),
            attach(model, b, processor=processor),
        ):
            pass
        assert torch.equal(checks.next_logits(model, inputs), expected)


def test_no_methods_install_nothing():
    model, _ = tiny.shared("llava")
    before = checks._footprint(model)
    with attach(model) as same:
        assert same is model
        assert checks._footprint(model) == before


def test_a_foreign_cache_is_refused():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    foreign = model(**inputs, use_cache=True).past_key_values
    token = inputs["input_ids"][:, :1]
    with (
        attach(model, cases.strong(cases.METHODS[0])),
        pytest.raises(LayoutError, match="not filled inside"),
    ):
        model(input_ids=token, past_key_values=foreign, use_cache=True)


@pytest.mark.parametrize("cls", cases.METHODS, ids=lambda c: c.__name__)
def test_right_padding_is_refused(cls):
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    inputs["attention_mask"] = inputs["attention_mask"].flip(-1)
    with attach(model, cases.strong(cls)), pytest.raises(LayoutError, match="padded on the right"):
        model(**inputs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("VHR(alpha=", "is not a method"),
        ("Nope(alpha=1)", "no method 'Nope'"),
        ("VHR(strength=1)", "no parameter 'strength'"),
        ("VHR(alpha=nan)", "must be a finite number"),
        ("VHR(alpha=-1)", "must be a finite number > 0"),
        ("VHR(2.0)", "positional"),
        ("VHR(alpha=__import__('os'))", "not a literal"),
        ("VHR(**{})", "positional"),
        ("os.system(command='true')", "not a subclass"),
        ("no_such_package.Thing()", "cannot be imported"),
        ("3", "is not a method"),
        ("", "is not a method"),
    ],
)
def test_bad_method_texts_are_refused_with_advice(text, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        mmlm.parse_method(text)
    assert caught.value.advice


def test_shapes_in_signatures_are_checked_while_testing():
    from decoding import vhr

    with pytest.raises(Exception, match="Type-check error"):
        vhr.divergence(torch.zeros(1, 2, 3), torch.zeros(1, 3, 3))
