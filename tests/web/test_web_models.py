"""Twins: the same weights, hooks of their own, and answers that do not disturb one another."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import tiny

import mmlm
from mmlm.cli.options import ModelOptions
from mmlm.decoding_settings import GenerateSettings
from mmlm.engine.build_in import built_in
from mmlm.errors import InputError
from mmlm.show.conversation import Conversation, Picture
from mmlm.show.truth import draw_scene
from mmlm.streaming import AnswerStream
from mmlm.web.models import Models, twin


@pytest.fixture(scope="module")
def models():
    return Models(["embedded"], ModelOptions())


def asked(index=17):
    drawn = draw_scene(index=index)
    picture = Picture("scene", drawn.image, known=drawn.known)
    return Conversation(pending=(picture,)).with_question("describe the image .")


def answer(model, processor, methods, index=17):
    inputs = asked(index).inputs(model, processor)
    settings = GenerateSettings(max_new_tokens=24)
    with AnswerStream(model, processor, inputs, methods, settings) as stream:
        for _ in stream:
            pass
    return stream.token_ids


def test_a_twin_shares_every_tensor_and_no_module(models):
    original = models.open("embedded")
    with models.borrow("embedded") as loan:
        own, shared = (
            list(chain(m.parameters(), m.buffers())) for m in (loan.model, original.model)
        )
        assert len(own) > 100
        assert all(a is b for a, b in zip(own, shared, strict=True))
        modules = {id(module) for module in original.model.modules()}
        assert not modules & {id(module) for module in loan.model.modules()}
        assert loan.processor.tokenizer is not original.processor.tokenizer


def test_methods_on_one_twin_are_not_on_another(models):
    with models.borrow("embedded") as a, models.borrow("embedded") as b:
        assert a.model is not b.model
        plain = answer(*b, ())
        with mmlm.attach(a.model, mmlm.VHR(alpha=3.0)):
            assert answer(*b, ()) == plain


def test_columns_at_the_same_time_give_what_they_give_alone(models):
    texts = ["VHR(alpha=2.0)", "VCD(alpha=1.0)", "INTER(k=0.02)", "RandomPruner(keep=50)"]
    cases = [(), *((mmlm.parse_method(text),) for text in texts)]
    alone = [answer(*models.open("embedded"), methods) for methods in cases]

    def together(methods):
        with models.borrow("embedded") as loan:
            return answer(*loan, methods)

    for _ in range(2):
        with ThreadPoolExecutor(len(cases)) as pool:
            assert list(pool.map(together, cases)) == alone
    assert len(set(alone)) > 2  # the methods do something


def test_a_loan_that_was_given_back_is_lent_again(models):
    with models.borrow("embedded") as first:
        pass
    with models.borrow("embedded") as second:
        assert second.model is first.model
    with pytest.raises(RuntimeError), models.borrow("embedded"):
        raise RuntimeError
    with models.borrow("embedded") as third:
        assert third.model is first.model


def test_methods_that_are_built_in_are_built_into_the_twin():
    model, processor = tiny.build("llava")
    mmlm.build_in(model, mmlm.MMA())
    loan = twin(model, processor)
    assert built_in(loan.model) == built_in(model) == (mmlm.MMA(),)
    assert loan.model.lm_head.weight is model.lm_head.weight


def test_only_what_is_offered_is_loaded(models):
    with pytest.raises(InputError, match="'other/model' is not offered"):
        models.open("other/model")
    with pytest.raises(InputError, match="no folder"):
        Models(["embeded"], ModelOptions())
