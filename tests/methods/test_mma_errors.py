"""What MMA refuses, one test per row of its table of errors, and what it does not."""

import mma_cases as cases
import pytest
import tiny
import torch
from mma_cases import layout, masks_of

from mmlm import MMA, attach, build_in
from mmlm.engine.masks.turns import ROLES, encoded
from mmlm.methods.mma import rows_without_question

# Row 1, flash kernels, stands in test_mma_kernels.py; the reference of DPO in
# tests/training/test_mma_training.py.


@pytest.fixture
def one(request):
    model, processor = tiny.shared("llava")
    return (
        model,
        processor,
        cases.talk(processor, [cases.user("is there a dog ?", 1)], [tiny.picture(1)]),
    )


@pytest.mark.parametrize("way", ["labels", "roles"])
def test_error_2_a_supervised_label_inside_the_rectangle(one, way):
    model, processor, inputs = one
    n = inputs["input_ids"].shape[1]
    learned = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    learned[0, n - 3] = True
    said = torch.zeros_like(learned)
    given = {**inputs, "use_cache": False}
    if way == "labels":
        given["labels"] = inputs["input_ids"].masked_fill(~learned, -100)
    else:
        given[ROLES] = encoded(torch.zeros_like(inputs["input_ids"]), said, learned=learned)
    with attach(model, MMA(), processor=processor):
        with pytest.raises(ValueError, match=f"position {n - 3} of row 0 is learned"):
            model(**given)
    safe = torch.zeros_like(learned)
    safe[0, 0] = True  # before the image
    labels = inputs["input_ids"].masked_fill(~safe, -100)
    with attach(model, MMA(), processor=processor):
        model(**inputs, labels=labels, use_cache=False)


def test_error_3_several_supervised_turns_under_all_prompts():
    model, processor = tiny.shared("llava")
    messages = [
        cases.user("what is it ?", 1), cases.assistant("a cat ."),
        cases.user("a dog ?"), cases.assistant("no ."),
    ]  # fmt: skip
    inputs = cases.talk(processor, messages, [tiny.picture(1)], add_generation_prompt=False)
    with attach(model, MMA(), processor=processor), torch.no_grad():
        model(**inputs)
        said = model._mmlm_session.layout.seg == 3
    labels = inputs["input_ids"].masked_fill(~said, -100)
    assert int(said.sum()) > 3
    with attach(model, MMA(), processor=processor):
        model(**inputs, labels=labels, use_cache=False)
    with attach(model, MMA(scope="all_prompts"), processor=processor):
        with pytest.raises(ValueError, match=r"turns \[0, 1\] of row 0 are learned"):
            model(**inputs, labels=labels, use_cache=False)
        last = torch.where(torch.arange(labels.shape[1]) < labels.shape[1] - 3, -100, labels)
        model(**inputs, labels=last, use_cache=False)


def test_error_4_embeddings_without_a_layout(one):
    model, _processor, inputs = one
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with attach(model, MMA()), pytest.raises(ValueError, match="inputs_embeds only"):
        model(inputs_embeds=embeds)
    roles = layout(["p" * 2 + "v" * 4 + "p" * (embeds.shape[1] - 6)])
    with attach(model, MMA(), layout=roles), masks_of(model) as masks, torch.no_grad():
        model(inputs_embeds=embeds)
    assert int(masks[0].triu(1).sum()) == 4 * (embeds.shape[1] - 6)


@pytest.mark.parametrize(
    ("seg", "message"),
    [
        ("pvvpp", r"do not fit inputs of shape \(1, \d+\)"),
        (None, r"seg holds 4 in row 0 at position 3; 0 \(padding\)"),
    ],
    ids=["shape", "values"],
)
def test_error_5_a_layout_that_does_not_fit(one, seg, message):
    model, _processor, inputs = one
    n = inputs["input_ids"].shape[1]
    roles = layout([seg or [2, 2, 2, 4, *[2] * (n - 4)]])
    with attach(model, MMA(), layout=roles), pytest.raises(ValueError, match=message):
        model(**inputs)


def test_error_6_a_prompt_in_chunks(one):
    model, _processor, inputs = one
    with attach(model, MMA()), pytest.raises(ValueError, match="chunked prefill"):
        model.generate(**inputs, prefill_chunk_size=4, max_new_tokens=1)


def _square(inputs):
    """A causal mask of a left-padded batch, without its padding's columns."""
    real, n = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    return (causal & real[:, None, None]) | torch.eye(n, dtype=torch.bool) & real[:, None, None]


def test_error_7_a_bool_mask_of_the_caller_is_opened_and_padding_stays_closed():
    model, processor = tiny.shared("llava")
    inputs = cases.padded_pair(processor)
    assert not bool(inputs["attention_mask"].all())
    mask = _square(inputs)
    where = {"position_ids": cases.places(inputs)}
    with attach(model, MMA()), masks_of(model) as masks, torch.no_grad():
        expected = model(**inputs, **where).logits
        found = model(**{**inputs, "attention_mask": mask}, **where).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert not bool((masks[1] & ~real[:, None, None]).any())
    assert int((masks[1] & ~mask).sum()) > 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_error_8_a_mask_of_numbers(dtype):
    model, processor = tiny.shared("llava")
    inputs = cases.padded_pair(processor)
    with attach(model, MMA()), pytest.raises(ValueError, match=rf"mask holds {dtype}"):
        model(**{**inputs, "attention_mask": _square(inputs).to(dtype)})


def test_error_9_a_decoder_that_is_not_causal():
    model, _ = tiny.build("llava")
    model.get_decoder().config.is_causal = False
    for use in (lambda: build_in(model, MMA()), lambda: attach(model, MMA()).__enter__()):
        with pytest.raises(ValueError, match="not causal, so there is nothing to open"):
            use()


def test_row_10_an_image_that_nothing_is_asked_about_warns_once_and_is_counted():
    model, processor = tiny.build("llava")
    inputs = cases.talk(processor, [cases.user("what is it ?", 1)], [tiny.picture(1)])
    last = int(cases.visual(model, inputs)[0].nonzero()[-1])
    bare = {
        **inputs,
        "input_ids": inputs["input_ids"][:, : last + 1],
        "attention_mask": inputs["attention_mask"][:, : last + 1],
    }
    with torch.no_grad():
        plain = model(**bare).logits
        with attach(model, MMA()):
            with pytest.warns(UserWarning, match="1 of 1 rows have an image and no prompt text"):
                first = model(**bare).logits
            second = model(**bare).logits
            model(**inputs)
    torch.testing.assert_close(first, plain, atol=1e-6, rtol=1e-5)
    assert torch.equal(first, second)
    assert rows_without_question(model) == 2


def test_a_model_that_reads_its_prompt_both_ways_is_refused():
    model, _ = tiny.build("paligemma")
    with pytest.raises(ValueError, match="reads its whole prompt both ways"):
        with attach(model, MMA()):
            pass


def test_a_later_turn_that_would_change_what_the_cache_holds_is_refused():
    model, processor = tiny.shared("llava")
    first = cases.talk(processor, [cases.user("what is it ?", 1)], [tiny.picture(1)])
    second = cases.talk(processor, [cases.user("a dog ?")], [])
    n, m = first["input_ids"].shape[1], second["input_ids"].shape[1]
    second["attention_mask"] = torch.ones(1, n + m, dtype=torch.long)
    begins = int(cases.visual(model, first)[0].nonzero()[0])
    with attach(model, MMA(scope="all_prompts"), processor=processor), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"position {begins} of the cache") as caught:
            model(**second, past_key_values=cache)
    assert f"Crop it by {n - begins} positions" in caught.value.advice
    with attach(model, MMA(), processor=processor), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        model(**second, past_key_values=cache)


def test_roles_that_do_not_fit_are_refused(one):
    model, _processor, inputs = one
    short = torch.zeros(1, 3, dtype=torch.long)
    with attach(model, MMA()), pytest.raises(ValueError, match=r"mmlm_roles has shape \(1, 3\)"):
        model(**inputs, **{ROLES: short}, use_cache=False)
    said = torch.ones_like(inputs["input_ids"])
    with attach(model, MMA()), pytest.raises(ValueError, match="a picture's and the assistant's"):
        model(**inputs, **{ROLES: said}, use_cache=False)
