"""Several pictures in one prompt: the features of picture k stand at placeholder k."""

import pytest
import tiny
import torch

from mmlm.errors import InputError
from mmlm.inputs import message, prepare
from mmlm.runner import GenerateSettings, Request, generate_all

# PaliGemma's processor moves all pictures to the front.
FAMILIES = [family for family in tiny.FAMILIES if family != "paligemma"]
A, B = tiny.picture(1), tiny.picture(2)


def seen(family, text, pictures):
    """What the language model gets for a marked prompt: ids [N], embeddings [N, d], logits [V]."""
    model, processor = tiny.shared(family)
    talk = [message("user", text, len(pictures), marked=True)]
    inputs = prepare(processor, [talk], [pictures])
    caught = {}

    def look(module, args, kwargs):
        caught["embeddings"] = kwargs["inputs_embeds"][0]

    # Idefics3 calls it text_model.
    inner = getattr(model.model, "language_model", None) or model.model.text_model
    handle = inner.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
    finally:
        handle.remove()
    return inputs["input_ids"][0], caught["embeddings"], logits


def features(family, text, pictures):
    ids, embeddings, _ = seen(family, text, pictures)
    return embeddings[ids == image_token(family)]


def image_token(family):
    config = tiny.shared(family)[0].config
    return getattr(config, "image_token_id", None) or config.image_token_index


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_picture_k_stand_at_placeholder_k(family):
    alone = {"a": features(family, "<image 1>", [A]), "b": features(family, "<image 1>", [B])}
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    text = "is <image 1> a dog or is <image 2> a dog ?"
    ids, embeddings, _ = seen(family, text, [A, B])
    places = (ids == image_token(family)).nonzero()[:, 0]
    count = len(alone["a"])
    assert len(places) == 2 * count
    torch.testing.assert_close(embeddings[places[:count]], alone["a"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embeddings[places[count:]], alone["b"], atol=1e-5, rtol=1e-4)
    # The words between the marks stand between the pictures.
    between = ids[places[count - 1] + 1 : places[count]]
    assert " a dog or is " in tiny.shared(family)[1].tokenizer.decode(between)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_two_pictures_changes_the_logits(family):
    text = "is <image 1> a dog or is <image 2> a dog ?"
    logits = seen(family, text, [A, B])[2]
    assert not torch.allclose(logits, seen(family, text, [B, A])[2], atol=1e-4)
    torch.testing.assert_close(logits, seen(family, text, [A, B])[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_marked_and_plain_requests_equals_single_ones(family):
    model, processor = tiny.shared(family)
    requests = [
        Request("0", (A, B), "is <image 1> like <image 2> ?", marked=True),
        Request("1", (B,), "what is shown here ?"),
        Request("2", (B, A), "the <image 1> and the <image 2>", marked=True),
    ]

    def answers(batch_size):
        settings = GenerateSettings(max_new_tokens=6, batch_size=batch_size)
        return [
            (one.text, one.templated)
            for one in generate_all(model, processor, requests, settings=settings)
        ]

    single = answers(1)
    assert answers(3) == single
    assert "is " in single[0][1].partition(" like ")[0]


def content(text, n_images):
    return message("user", text, n_images, marked=True)["content"]


def test_parts_of_a_marked_message():
    image = {"type": "image"}
    assert content("a <image 1> b<image 2>", 2) == [
        {"type": "text", "text": "a "},
        image,
        {"type": "text", "text": " b"},
        image,
    ]
    # A mark that comes again only names its picture.
    assert content("<image 1>, see <image 1>", 1) == [
        image,
        {"type": "text", "text": ", see <image 1>"},
    ]
    assert content("words", 0) == [{"type": "text", "text": "words"}]
    assert content("", 0) == [{"type": "text", "text": ""}]
    # Without `marked`, marks are text like any other.
    assert message("user", "<image 1>", 1)["content"] == [
        image,
        {"type": "text", "text": "<image 1>"},
    ]


@pytest.mark.parametrize(
    ("text", "n_images"),
    [("no mark", 1), ("<image 2> <image 1>", 2), ("<image 1> <image 3>", 2), ("<image 1>", 0)],
)
def test_marks_that_do_not_fit_the_pictures(text, n_images):
    with pytest.raises(InputError, match=f"A prompt with {n_images} pictures has"):
        content(text, n_images)


def test_a_wrong_mark_is_the_error_of_its_request_alone():
    model, processor = tiny.shared("llava")
    requests = [
        Request("good", (A,), "is <image 1> a dog ?", marked=True),
        Request("bad", (A,), "is <image 2> a dog ?", marked=True),
    ]
    settings = GenerateSettings(max_new_tokens=2, batch_size=2)
    good, bad = generate_all(model, processor, requests, settings=settings)
    assert good.error is None
    assert "A prompt with 1 pictures has <image 2>" in bad.error
