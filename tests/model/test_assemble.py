import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mmlm.model.assemble import (
    SPECIAL_TOKENS,
    assemble,
    unknown_words,
    word_processor,
    word_tokenizer,
)

WORDS = ["user", "assistant", ":", ".", ",", "?", "a", "cat", "dog", "is", "there", "hot"]
FIRST = len(SPECIAL_TOKENS)
IDS = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *WORDS])}


def ids(text):
    return [IDS[word] for word in text.split()]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def processor():
    return word_processor(WORDS, image_size=16, patch_size=8)


def picture(side=16):
    return Image.new("RGB", (side, side), (255, 0, 64))


def user(text, images=1):
    parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": "user", "content": parts}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("is there a cat ?", "is there a cat ?"),
        ("Is there a CAT, a dog?", "is there a cat , a dog ?"),
        ("cat.dog", "cat . dog"),
        ("  a\tcat\n\n. ", "a cat ."),
        ("a zebra!", "a <unk> <unk>"),
        ("<bos>user:<image>a cat<eos>", "<bos> user : <image> a cat <eos>"),
        ("", ""),
        ("a ca\u0074 .", "a cat ."),
        ("hot dog", "hot dog"),
        ("日本語 cat 🙂", "<unk> cat <unk>"),
    ],
)
def test_words(tokenizer, text, words):
    encoded = tokenizer(text)["input_ids"]
    assert encoded == ids(words)
    assert tokenizer.decode(encoded) == words
    assert tokenizer(tokenizer.decode(encoded))["input_ids"] == encoded


def test_specials_have_their_ids_and_are_skipped(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(FIRST))
    named = (
        tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id,
        tokenizer.unk_token_id, tokenizer.image_token_id,
    )  # fmt: skip
    assert named == (0, 1, 2, 3, 4)
    assert tokenizer.decode(ids("<bos> a cat . <eos> <pad>"), skip_special_tokens=True) == "a cat ."


def test_unknown_words_are_named(tokenizer):
    assert unknown_words(tokenizer, "Is there a Zebra, a zebra or a cat?") == [
        "Zebra",
        "zebra",
        "or",
    ]
    assert unknown_words(tokenizer, "is there a CAT?") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "a"], r"more than once: \['a'\]"),
        (["a", "<eos>"], "more than once"),
        (["hot dog"], "'hot dog' is split into"),
        (["it's"], "is split into"),
        (["Cat"], "lower-case"),
    ],
)
def test_a_vocabulary_that_cannot_work_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        word_tokenizer(words)


def test_chat_template_ids_by_hand(processor):
    turns = [
        user("Is there a cat?"),
        {"role": "assistant", "content": "a dog ."},
        user("a hot dog?", images=0),
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    got = processor(text=[text], images=[picture()], return_tensors="pt")["input_ids"][0].tolist()
    assert got == ids(
        "<bos> user : <image> <image> <image> <image> is there a cat ? assistant : a dog . <eos> "
        "user : a hot dog ? assistant :"
    )
    direct = processor.apply_chat_template(
        [{**turns[0], "content": [{"type": "image", "image": picture()}, turns[0]["content"][1]]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert direct["input_ids"][0].tolist() == [*got[:12], *ids("assistant :")]
    assert direct["pixel_values"].shape == (1, 3, 16, 16)


def test_assistant_spans_come_from_the_template(processor):
    turns = [
        user("a cat ?", 0),
        {"role": "assistant", "content": [{"type": "text", "text": "a ."}]},
    ]
    out = processor.apply_chat_template(
        [*turns, *turns], tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        return_tensors="pt",
    )  # fmt: skip
    mask = torch.as_tensor(out["assistant_masks"]).bool()
    assert out["input_ids"][mask].tolist() == ids("a . <eos> a . <eos>")


def test_other_roles_are_refused(processor):
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="role system is unknown"):
        processor.apply_chat_template([{"role": "system", "content": "a"}])


def test_two_images_in_a_prompt_and_left_padding(processor):
    texts = [
        processor.apply_chat_template([user("a cat ?", n)], add_generation_prompt=True)
        for n in (2, 1)
    ]
    out = processor(
        text=texts, images=[[picture()] * 2, [picture()]], return_tensors="pt", padding=True
    )
    two, one = out["input_ids"].tolist()
    assert two.count(IDS["<image>"]) == 8
    assert one.count(IDS["<image>"]) == 4
    assert one[:4] == [0] * 4
    assert out["attention_mask"][1].tolist() == [0] * 4 + [1] * (len(one) - 4)
    assert out["pixel_values"].shape == (3, 3, 16, 16)


def test_pixels_by_hand(processor):
    pixels = processor.image_processor(picture(), return_tensors="pt")["pixel_values"]
    for channel, value in enumerate((255, 0, 64)):
        want = torch.full((16, 16), (value - 127.5) / 64)
        torch.testing.assert_close(pixels[0, channel], want, rtol=1e-5, atol=1e-6)
    for shape in ((40, 16), (9, 300), (1, 1)):
        out = processor.image_processor(Image.new("RGB", shape), return_tensors="pt")
        assert out["pixel_values"].shape == (1, 3, 16, 16)


def configs(tied=True):
    vision = CLIPVisionConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=20, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return vision, text


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_the_parts_are_taken_over(tied):
    vision, text = configs(tied)
    torch.manual_seed(1)
    tower, language = CLIPVisionModel(vision), LlamaForCausalLM(text)
    model = assemble(tower, language, image_token_id=4)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    pixels = torch.randn(1, 3, 16, 16)
    states = model.model.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(states, tower(pixels).last_hidden_state)
    tokens = torch.tensor([[1, 7, 9, 3]])
    torch.testing.assert_close(model(input_ids=tokens).logits, language(input_ids=tokens).logits)
    # A copy: training the whole leaves the parts alone.
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert language.lm_head.weight.abs().sum() > 0


def test_choices_reach_the_config():
    vision, text = configs()
    model = assemble(
        vision, text, image_token_id=4, vision_feature_layer=-2,
        vision_feature_select_strategy="full", projector_activation="silu",
    )  # fmt: skip
    config = model.config
    assert (config.image_token_id, config.vision_feature_layer) == (4, -2)
    assert (config.vision_feature_select_strategy, config.image_seq_length) == ("full", 5)
    assert config.tie_word_embeddings
    assert model.model.multi_modal_projector.act.__class__.__name__ == "SiLUActivation" or (
        config.projector_hidden_act == "silu"
    )


@pytest.mark.parametrize("token", [20, -1])
def test_an_image_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=rf"image_token_id is {token}, .* ids 0 to 19"):
        assemble(*configs(), image_token_id=token)
