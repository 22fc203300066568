import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import mmlm
from mmlm.errors import InputError, MissingTensors, UnsupportedModel
from mmlm.inputs import prepare
from mmlm.model.assemble import assemble, word_processor
from mmlm.model.checkpoint import embedded_folder, load, save
from tests.model.test_assemble import WORDS, configs, user


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = assemble(*configs(), image_token_id=4)
    processor = word_processor(WORDS, image_size=16, patch_size=8)
    save(model, processor, folder, max_new_tokens=7)
    return folder, model


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_saved_is_loaded(made):
    folder, model = made
    loaded, processor = load(folder)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not loaded.training
    assert processor.tokenizer.padding_side == "left"
    settings = loaded.generation_config
    assert (settings.max_new_tokens, settings.do_sample) == (7, False)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)
    assert model.generation_config.max_new_tokens is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_precision(made, tmp_path, dtype):
    folder, model = made
    _, processor = load(folder)
    save(model, processor, tmp_path, dtype=getattr(torch, dtype))
    stored, _ = load(tmp_path, dtype="auto")
    assert stored.dtype == getattr(torch, dtype)
    assert model.dtype == torch.float32
    wide, _ = load(tmp_path)
    assert wide.dtype == torch.float32
    want = model.lm_head.weight.to(getattr(torch, dtype)).float()
    torch.testing.assert_close(wide.lm_head.weight, want, rtol=0, atol=0)
    assert load(folder, dtype=dtype)[0].dtype == getattr(torch, dtype)


def test_attention_is_chosen(made):
    folder, _ = made
    eager, processor = load(folder, attention="eager")
    sdpa, _ = load(folder)
    assert eager.config._attn_implementation == "eager"
    image = Image.new("RGB", (16, 16), (9, 200, 30))
    inputs = prepare(processor, [[user("a cat ?")]], [[image]])
    torch.testing.assert_close(eager(**inputs).logits, sdpa(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_missing_tensor_is_named(copy):
    edit(copy, lambda tensors: tensors.pop(_name(tensors, "multi_modal_projector.linear_1.bias")))
    with pytest.raises(MissingTensors, match=r"1 missing: .*multi_modal_projector\.linear_1\.bias"):
        load(copy)


def test_an_unexpected_tensor_is_named(copy):
    edit(copy, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(MissingTensors, match=r"1 unexpected: .*extra\.weight"):
        load(copy)


def test_a_tensor_of_another_shape_is_named(copy):
    def shorten(tensors):
        name = _name(tensors, "linear_2.bias")
        tensors[name] = tensors[name][:3].clone()

    edit(copy, shorten)
    with pytest.raises(MissingTensors, match=r"1 of another shape: .*linear_2\.bias"):
        load(copy)


def _name(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c", ""])
def test_a_missing_folder(name):
    with pytest.raises(InputError, match="there is no folder"):
        load(name)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        load(tmp_path)


def test_an_unknown_id_offline():
    with pytest.raises(InputError, match="no model 'nobody/nothing'") as caught:
        load("nobody/nothing")
    assert "--model embedded" in caught.value.advice


def test_a_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights of .* cannot be read"):
        load(copy)


def test_a_folder_without_a_processor(copy):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(InputError, match="processor"):
        load(copy)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("bert", "is a 'bert' model"), ("nonsense", "unknown to this version")],
)
def test_models_of_other_kinds(copy, model_type, message):
    path = copy / "config.json"
    path.write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedModel, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "dtype 'int8'"), ({"attention": "fast"}, "attention 'fast'")],
)
def test_unknown_options(made, options, message):
    with pytest.raises(InputError, match=message):
        load(made[0], **options)


@pytest.fixture(scope="module")
def loaded():
    return mmlm.load("embedded")


class TestEmbedded:
    def test_plain_transformers_reads_it(self, loaded):
        model, info = LlavaForConditionalGeneration.from_pretrained(
            embedded_folder(), output_loading_info=True, dtype=torch.float32
        )
        assert not any(info.values())
        torch.testing.assert_close(model.state_dict(), loaded[0].state_dict())
        processor = AutoProcessor.from_pretrained(embedded_folder())
        assert type(processor).__name__ == "LlavaProcessor"
        assert len(processor.tokenizer) == model.config.text_config.vocab_size

    def test_it_is_small(self):
        assert (embedded_folder() / "model.safetensors").stat().st_size < 12_000_000

    def test_it_knows_the_words_of_the_world(self, loaded):
        from data_tools.world import vocabulary

        tokenizer = loaded[1].tokenizer
        text = " ".join(vocabulary())
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_prompt_ids(self, loaded):
        _, processor = loaded
        image = Image.new("RGB", (80, 80))
        out = prepare(processor, [[user("Describe the image.")]], [[image]])
        words = processor.tokenizer.convert_ids_to_tokens(out["input_ids"][0].tolist())
        assert words == [
            "<bos>", "user", ":", *["<image>"] * 100, *"describe the image . assistant :".split()
        ]  # fmt: skip

    def test_padded_rows_equal_single_rows(self, loaded):
        from data_tools.world import SPLITS, render, scene

        model, processor = loaded
        images = [
            Image.fromarray(render(scene(SPLITS["natural"], 0, i, "natural")).image)
            for i in range(3)
        ]
        chats = [[user("describe the image .")], [user("is there a dog in the image ?")]]
        chats.append([user("describe the image .", 2)])
        pictures = [[images[0]], [images[1]], images[1:]]
        batch = prepare(processor, chats, pictures)
        together = model.generate(**batch, max_new_tokens=20)[:, batch["input_ids"].shape[1] :]
        for row, (chat, shown) in enumerate(zip(chats, pictures, strict=True)):
            single = prepare(processor, [chat], [shown])
            alone = model.generate(**single, max_new_tokens=20)[0, single["input_ids"].shape[1] :]
            assert together[row, : len(alone)].tolist() == alone.tolist()
            assert set(together[row, len(alone) :].tolist()) <= {0}
