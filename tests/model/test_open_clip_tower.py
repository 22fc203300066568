"""Towers of open_clip as stock vision models: equal hidden states, or a refusal."""

import json

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tiny import picture
from transformers import CLIPVisionModel, SiglipVisionModel

from mmlm.errors import InputError, UnsupportedModel
from mmlm.model import open_clip_tower
from mmlm.model.open_clip_source import image_processor, open_clip_model
from mmlm.model.open_clip_tower import from_open_clip
from mmlm.model.towers import load_tower
from tests.model.towers_and_languages import clip, siglip

CLIP_CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 32, "layers": 3, "width": 40, "head_width": 10, "patch_size": 8,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip


def visual_of(model):
    return getattr(model, "visual", model)


TOWERS = {
    "quick gelu": lambda: clip(),
    "gelu": lambda: clip(quick_gelu=False),
    "layer scale": lambda: clip(ls_init_value=0.3),
    "pooled by attention": lambda: clip(attentional_pool=True, attn_pooler_heads=2),
    "average pooling": lambda: clip(pool_type="avg", final_ln_after_pool=True),
    "sine positions": lambda: clip(pos_embed_type="sin_cos_2d"),
    "siglip": lambda: siglip(),
    "siglip, tanh": lambda: siglip(act_layer="gelu_tanh"),
    "siglip, layer scale": lambda: siglip(init_values=0.3),
}


@pytest.mark.parametrize("name", TOWERS)
def test_every_hidden_state_is_the_originals(name):
    model = TOWERS[name]()
    visual = visual_of(model)
    before = {key: value.clone() for key, value in visual.state_dict().items()}
    tower = from_open_clip(model)
    assert type(tower) is (SiglipVisionModel if "siglip" in name else CLIPVisionModel)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = tower(pixels, output_hidden_states=True).hidden_states
        for layer in (-3, -2, -1):
            out = visual.forward_intermediates(
                pixels, indices=[layer], intermediates_only=True, output_fmt="NLC"
            )["image_intermediates"][0]
            skip = got[layer].shape[1] - out.shape[1]
            scale = max(1.0, float(out.abs().max()))
            torch.testing.assert_close(got[layer][:, skip:], out, rtol=0, atol=1e-5 * scale)
    assert all(torch.equal(value, before[key]) for key, value in visual.state_dict().items())
    assert not tower.training


def test_the_last_norm_is_taken_over():
    model = clip()
    with torch.no_grad():
        model.visual.ln_post.weight.uniform_(0.5, 1.5)
        pixels = torch.randn(1, 3, 32, 32)
        want = model.visual.ln_post(
            model.visual.forward_intermediates(
                pixels, indices=[-1], intermediates_only=True, output_fmt="NLC",
                output_extra_tokens=True,
            )["image_intermediates_prefix"][0][:, 0]
        )  # fmt: skip
        torch.testing.assert_close(from_open_clip(model)(pixels).pooler_output, want)


def test_a_tower_on_half_precision_is_copied_in_full():
    model = clip().half()
    tower = from_open_clip(model)
    assert tower.dtype == torch.float32
    assert model.visual.conv1.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: clip(layers=[1, 1, 1, 1], width=8, patch_size=None), "no vision transformer"),
        (lambda: clip(no_ln_pre=True), "no_ln_pre"),
        (lambda: clip(qk_norm=True), "CustomResidualAttentionBlock"),
        (lambda: clip(image_size=[32, 16]), r"not square: \(32, 16\)"),
        (lambda: siglip("vit_base_patch16_224", global_pool="token"), "1 tokens before"),
        (lambda: siglip(qk_norm=True), "norms of queries"),
        (lambda: siglip(pre_norm=True), "a norm before the first block"),
        (lambda: siglip(act_layer="relu"), "its activation is ReLU"),
        (lambda: torch.nn.Linear(2, 2), "no vision transformer"),
    ],
)
def test_towers_without_a_stock_class_are_refused(make, why):
    with pytest.raises(UnsupportedModel, match=why) as caught:
        from_open_clip(make())
    assert "SigLIP" in caught.value.advice


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("_activation", lambda visual, module: "gelu"),
        ("_thirds", lambda name, w, b: THIRDS(name, w.roll(40, 0), b)),
        ("_thirds", lambda name, w, b: THIRDS(name, torch.cat([w[40:80], w[:40], w[80:]]), b)),
        ("_scaled", lambda name, linear, scale: open_clip_tower._affine(name, linear)),
    ],
)
def test_a_wrong_copy_is_noticed(monkeypatch, function, wrong):
    monkeypatch.setattr(open_clip_tower, function, wrong)
    with pytest.raises(UnsupportedModel, match=r"layer 1 differs by"):
        from_open_clip(clip(ls_init_value=0.3))


THIRDS = open_clip_tower._thirds


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(90, 60), (20, 50)])
def test_pictures_are_prepared_as_open_clip_does(mode, size):
    cfg = PreprocessCfg(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), resize_mode=mode)
    model = clip()
    model.visual.preprocess_cfg = cfg.__dict__
    image = picture(3).resize(size, Image.Resampling.BICUBIC)
    want = image_transform_v2(cfg, is_train=False)(image)
    got = image_processor(model, 32)(image, return_tensors="pt")["pixel_values"][0]
    # Both round to whole colours after resizing, in two implementations: at most two levels apart.
    assert float((got - want).abs().max()) <= 2.01 / 255 / 0.2


def test_padded_pictures_are_refused():
    model = clip()
    model.visual.preprocess_cfg = {"size": 32, "resize_mode": "longest"}
    with pytest.raises(UnsupportedModel, match="resized by 'longest'"):
        image_processor(model, 32)


@pytest.fixture
def folder(tmp_path):
    """A folder as `open_clip.push_to_hf_hub` writes it."""
    made = tmp_path / "tower"
    made.mkdir()
    torch.save(clip().state_dict(), made / "open_clip_pytorch_model.bin")
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    (made / "open_clip_config.json").write_text(json.dumps(config))
    return made


@pytest.fixture
def listed(tmp_path):
    """A name in open_clip's list; gone again afterwards."""
    from open_clip import factory

    (tmp_path / "tiny-clip.json").write_text(json.dumps(CLIP_CONFIG))
    paths, configs = list(factory._MODEL_CONFIG_PATHS), dict(factory._MODEL_CONFIGS)
    open_clip.add_model_config(tmp_path)
    yield "tiny-clip"
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(configs)


@pytest.mark.parametrize("prefix", ["", "open_clip:"])
def test_a_folder(folder, prefix):
    tower = load_tower(f"{prefix}{folder}")
    assert torch.equal(
        tower.model.embeddings.class_embedding.detach(), clip().visual.class_embedding.detach()
    )
    assert list(tower.image_processor.image_mean) == [0.1] * 3
    assert (tower.n_patches, tower.n_prefix, tower.patch_size) == (16, 1, 8)


def test_a_name_with_a_file(listed, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(clip().state_dict(), path)
    model = open_clip_model(listed, path)
    assert torch.equal(model.visual.proj, clip().visual.proj)
    tower = load_tower(f"open_clip:{listed}", weights=path)
    assert tower.model.config.hidden_act == "quick_gelu"


def test_random_weights_are_only_given_on_request(listed):
    assert load_tower(f"open_clip:{listed}", weights="random").n_patches == 16
    with pytest.raises(InputError, match="a name without weights"):
        load_tower(f"open_clip:{listed}")


@pytest.mark.parametrize(
    ("name", "weights", "why", "advice"),
    [
        ("ViT-L-14-33", None, "has no model 'ViT-L-14-33'", "ViT-L-14-336"),
        ("ViT-B-32", "opanai", "neither a file nor a tag", "openai"),
        ("ViT-B-32", "openai", "with quick GELU, and open_clip:ViT-B-32 is", "-quickgelu"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "neither a file nor a tag", "Tags"),
    ],
)
def test_names_and_weights_that_do_not_belong_together(name, weights, why, advice):
    with pytest.raises(InputError, match=why) as caught:
        load_tower(f"open_clip:{name}", weights=weights)
    assert advice in caught.value.advice


def test_a_file_whose_pictures_are_not_known(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="prepared differently for its tags"):
        load_tower("open_clip:ViT-L-14", weights=path)


def test_pictures_of_a_siglip_file_are_those_of_its_tag(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(
        open_clip, "create_model", lambda name, **more: given.update(more) or clip()
    )
    path = tmp_path / "weights.bin"
    path.write_bytes(b"x")
    open_clip_model("ViT-B-16-SigLIP", path)
    assert given["force_preprocess_cfg"] == {
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip


def test_files_that_are_no_weights(listed, folder, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot load 'tiny-clip' with weights"):
        load_tower(f"open_clip:{listed}", weights=path)
    with pytest.raises(InputError, match="brings its weights"):
        load_tower(f"open_clip:{folder}", weights=path)
    (folder / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="cannot load"):
        load_tower(f"open_clip:{folder}")
