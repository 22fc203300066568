"""A LLaVA from parts: it computes what the parts compute, and plain transformers reads it."""

import pytest
import torch
from tiny import picture
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import mmlm
from mmlm.errors import InputError, MissingTensors, UnsupportedModel
from mmlm.inputs import message
from mmlm.model.checkpoint import save
from mmlm.model.compose import compose
from mmlm.model.open_clip_tower import from_open_clip
from mmlm.model.towers import load_tower
from tests.model.towers_and_languages import CHATML, LANGUAGES, clip, language, siglip, tokenizer

SIZES = {
    "image_size": 32, "patch_size": 8, "hidden_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
SQUARE = {"height": 32, "width": 32}


def vit(name):
    """A tower of transformers, its image processor, its tokens before the patches."""
    torch.manual_seed(8)
    return {
        "clip": lambda: (
            CLIPVisionModel(CLIPVisionConfig(intermediate_size=48, **SIZES)),
            CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
            1,
        ),
        "siglip": lambda: (
            SiglipVisionModel(SiglipVisionConfig(intermediate_size=48, **SIZES)),
            SiglipImageProcessor(size=SQUARE),
            0,
        ),
        "dinov2": lambda: (
            Dinov2Model(Dinov2Config(**SIZES)),
            BitImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
            1,
        ),
        "registers": lambda: (
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **SIZES)),
            BitImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
            4,
        ),
        "vit": lambda: (
            ViTModel(ViTConfig(intermediate_size=48, **SIZES)),
            ViTImageProcessor(size=SQUARE),
            1,
        ),
    }[name]()


def asked(processor, text="what is this ?", images=1):
    parts = [{"type": "image", "image": picture(n)} for n in range(images)]
    return processor.apply_chat_template(
        [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


@pytest.fixture(scope="module")
def composed():
    return compose(clip(), language(), tokenizer=tokenizer(CHATML))


@pytest.mark.parametrize("name", LANGUAGES)
def test_texts_are_continued_as_by_the_language_model_alone(name):
    alone = language(name)
    before = {key: value.clone() for key, value in alone.state_dict().items()}
    model, _ = compose(clip(), alone, tokenizer=tokenizer(CHATML))
    ids = torch.tensor([[2, 40, 99, 7, 200]])
    with torch.no_grad():
        want, got = alone(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(got[..., :330], want, rtol=0, atol=1e-5)
    assert got.shape[-1] == 331
    # What was given stays as it was.
    assert alone.config.vocab_size == 330
    assert all(torch.equal(value, before[key]) for key, value in alone.state_dict().items())


@pytest.mark.parametrize("name", LANGUAGES)
def test_plain_transformers_reads_and_runs_what_was_saved(name, tmp_path):
    model, processor = compose(clip(), language(name), tokenizer=tokenizer(CHATML))
    save(model, processor, tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is LlavaForConditionalGeneration
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = asked(AutoProcessor.from_pretrained(tmp_path))
    own = asked(processor)
    assert torch.equal(inputs["input_ids"], own["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**own).logits, rtol=0, atol=1e-5)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(**inputs, **settings), model.generate(**own, **settings))
    tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert tied is (name in ("qwen2", "gemma", "gemma3"))
    assert mmlm.load(tmp_path)[0].config.image_token_id == 330


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "registers", "vit"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_features_are_the_towers_hidden_states(name, layer):
    tower, image_processor, n_prefix = vit(name)
    model, processor = compose(
        tower, language(), tokenizer=tokenizer(), image_processor=image_processor,
        vision_feature_layer=layer,
    )  # fmt: skip
    inputs = asked(processor, images=2)
    side = inputs["pixel_values"].shape[-1] // 8
    n_tokens = side * side + max(0, n_prefix - 1)
    assert model.config.image_seq_length == n_tokens
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 2 * n_tokens
    with torch.no_grad():
        states = tower.eval()(inputs["pixel_values"], output_hidden_states=True).hidden_states
        kept = states[layer][:, 1 if n_prefix else 0 :]
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        want = model.model.multi_modal_projector(kept)
    torch.testing.assert_close(torch.stack(list(features)), want, rtol=0, atol=1e-6)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_full_keeps_the_class_token():
    model, processor = compose(
        clip(), language(), tokenizer=tokenizer(), vision_feature_select_strategy="full"
    )
    assert model.config.image_seq_length == 17
    assert int((asked(processor)["input_ids"] == processor.image_token_id).sum()) == 17


def test_towers_of_open_clip_and_timm():
    model, processor = compose(siglip(), language(), tokenizer=tokenizer())
    assert type(model.model.vision_tower) is SiglipVisionModel
    assert model.config.vision_feature_select_strategy == "full"
    model.generate(**asked(processor), max_new_tokens=2, do_sample=False)
    model, _ = compose(clip(), language(), tokenizer=tokenizer())
    assert model.config.vision_feature_select_strategy == "default"


def test_the_tower_of_a_whole_clip_and_its_image_processor(tmp_path):
    whole = CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16,
                         "num_hidden_layers": 1, "num_attention_heads": 2},
            vision_config={"intermediate_size": 48, **SIZES},
        )
    )  # fmt: skip
    whole.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no image processor"):
        load_tower(tmp_path)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size=SQUARE, image_mean=[0.1, 0.2, 0.3]
    ).save_pretrained(tmp_path)
    tower = load_tower(tmp_path)
    assert type(tower.model) is CLIPVisionModel
    assert list(tower.image_processor.image_mean) == [0.1, 0.2, 0.3]
    weight = whole.vision_model.embeddings.patch_embedding.weight
    assert torch.equal(tower.model.embeddings.patch_embedding.weight, weight)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tower(tmp_path)


def test_a_checkpoint_without_the_towers_weights(tmp_path):
    language().save_pretrained(tmp_path)
    CLIPVisionConfig(intermediate_size=48, **SIZES).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE).save_pretrained(tmp_path)
    with pytest.raises(MissingTensors, match="does not fill a CLIPVisionModel"):
        load_tower(tmp_path)


def test_a_language_model_from_a_folder_in_half_precision(tmp_path):
    language("qwen3").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        compose(clip(), tmp_path)
    tokenizer(CHATML).save_pretrained(tmp_path)
    model, processor = compose(clip(), tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    prompt = processor.apply_chat_template([message("user", "a", 1)], add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert model.generate(**asked(processor), max_new_tokens=2).shape[0] == 1
    assert compose(clip(), tmp_path, dtype="auto")[0].dtype == torch.float32


def test_the_seed_is_the_projectors_alone():
    parts = clip(), language()
    state = torch.get_rng_state()
    weights = [
        compose(*parts, tokenizer=tokenizer(), seed=seed)[0]
        .model.multi_modal_projector.linear_1.weight.detach()
        for seed in (3, 3, 4)
    ]  # fmt: skip
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert 0.015 < float(weights[0].std()) < 0.025
    assert torch.equal(torch.get_rng_state(), state)
    # Nor does it depend on how the parts came: a tower that is taken as it is draws nothing.
    ready = from_open_clip(parts[0])
    again, _ = compose(ready, parts[1], tokenizer=tokenizer(), seed=3)
    assert torch.equal(again.model.multi_modal_projector.linear_1.weight, weights[0])


def test_the_model_is_ready_for_methods(composed):
    model, processor = composed
    assert not model.training
    with mmlm.attach(model, mmlm.VHR(alpha=2.0)):
        model.generate(**asked(processor), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (PhiConfig, {}),
        (GPTJConfig, {"n_inner": 64, "rotary_dim": 4, "tie_word_embeddings": False}),
        (GraniteConfig, {"logits_scaling": 4.0}),
        (CohereConfig, {}),
        (Gemma2Config, {"head_dim": 12}),
    ],
)
def test_heads_that_do_more_than_a_matrix_are_refused(kind, more):
    with pytest.raises(UnsupportedModel, match="does more than one matrix product"):
        compose(clip(), language(kind, **more), tokenizer=tokenizer())


def test_towers_that_stock_llava_cannot_hold():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    flexible = Siglip2VisionModel(Siglip2VisionConfig(num_patches=16, **sizes))
    given = SiglipImageProcessor(size=SQUARE)
    with pytest.raises(UnsupportedModel, match="cannot hold a Siglip2VisionModel"):
        load_tower(flexible, image_processor=given)
    shrinking = SwinModel(
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                   window_size=4)
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"256 patches became a hidden state of .*64, 16"):
        load_tower(shrinking, image_processor=given)


def test_pictures_that_do_not_fit_the_tower():
    tower, _, _ = vit("clip")
    given = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    with pytest.raises(InputError, match=r"makes \(24, 24\) pixels, which the tower refuses"):
        load_tower(tower, image_processor=given)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"vision_feature_layer": -5}, "hidden states -4 to 3"),
        ({"vision_feature_layer": 4}, "hidden states -4 to 3"),
        ({"vision_weights": "openai"}, "brings its own"),
        ({"tokenizer": None}, "without a tokenizer"),
        ({"tokenizer": "no/such-tokenizer"}, "has no tokenizer"),
        ({"image_processor": "no/such-processor"}, "has no image processor"),
        ({"chat_template": "{{ messages[0]['content'][-1]['text'] }}"}, "0 x <image> for two"),
        ({"chat_template": "{{ messages[0]['content'] + 1 }}"}, "fails on messages with pictures"),
    ],
)
def test_requests_that_cannot_work(more, why):
    with pytest.raises(InputError, match=why) as caught:
        compose(clip(), language(), **{"tokenizer": tokenizer(), **more})
    assert caught.value.advice


def test_a_tower_without_a_class_token_cannot_leave_one_out():
    with pytest.raises(InputError, match="would leave out the first patch"):
        compose(
            siglip(), language(), tokenizer=tokenizer(), vision_feature_select_strategy="default"
        )


@pytest.mark.parametrize(
    ("vision", "text", "error", "why"),
    [
        ("no/such-tower", None, InputError, "no vision tower"),
        (None, "no/such-model", InputError, "no language model"),
        (None, "missing.gguf", InputError, "no file"),
    ],
)
def test_parts_that_are_not_there(vision, text, error, why):
    with pytest.raises(error, match=why):
        compose(vision or clip(), text or language(), tokenizer=tokenizer())


def test_a_folder_that_is_no_language_model(tmp_path):
    vit("clip")[0].save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        compose(clip(), tmp_path)


def test_a_gguf_file_without_the_package_that_reads_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"reading model\.gguf needs the package gguf") as caught:
        compose(clip(), tmp_path / "model.gguf")
    assert "mmlm[gguf]" in caught.value.advice
