"""Grounding DINO by groundingdino-py: equal to the package's own prediction, and its failures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_detectors import NAMES, bert_tokenizer

from data_tools.detectors import groundingdino_package
from data_tools.detectors.grounding import caption, captions
from data_tools.detectors.groundingdino import GroundingDINO
from data_tools.detectors.groundingdino_package import CONFIGS, quiet
from mmlm.errors import InputError, MissingTensors


@pytest.fixture(scope="module")
def plain_model(groundingdino_arguments):
    """The same weights without anything of ours but the adapter."""
    made = groundingdino_package.build(
        groundingdino_arguments["config"], groundingdino_arguments["text_encoder"]
    )
    state = groundingdino_package.read_checkpoint(groundingdino_arguments["checkpoint"])
    made.load_state_dict(state, strict=False)
    return made.eval()


def test_findings_are_those_of_the_package(loaded, plain_model, make_picture):
    """Naive reference: `groundingdino.util.inference.predict` on a picture it encodes itself."""
    with quiet():
        import groundingdino.datasets.transforms as T
        from groundingdino.util.inference import predict

    picture, names = make_picture(110, 70), sorted(NAMES[:8])
    steps = T.Compose(
        [
            T.RandomResize([64], max_size=128),
            T.ToTensor(),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    pixels, _ = steps(picture.image, None)
    with quiet():
        places, scores, phrases = predict(
            plain_model, pixels, caption(names), 0.9, 0.75, device="cpu"
        )
    engine = loaded["groundingdino"].engine
    with torch.inference_mode(), quiet():
        (boxes,) = engine._boxes(picture, [names])
    assert 0 < len(scores) < 12
    assert [box.label.split() for box in boxes] == [_words(phrase) for phrase in phrases]
    assert [box.score for box in boxes] == pytest.approx(scores.tolist(), abs=1e-5)
    size = torch.tensor([110.0, 70.0])
    for box, place in zip(boxes, places, strict=True):
        low, high = (place[:2] - place[2:] / 2) * size, (place[:2] + place[2:] / 2) * size
        expected = [*low.clamp(min=0).tolist(), *torch.minimum(high, size).tolist()]
        assert [box.left, box.top, box.right, box.bottom] == pytest.approx(expected, abs=0.02)


def _words(phrase: str) -> list[str]:
    return [word for word in phrase.split() if word not in ("[CLS]", "[SEP]")]


def test_a_name_in_a_caption_is_encoded_as_if_it_were_alone(plain_model):
    """The adapter's mask: BERT sees "dog ." alike beside anything, as the package means it."""
    tokenizer = plain_model.tokenizer
    features = {}
    hook = plain_model.bert.register_forward_hook(
        lambda module, args, output: features.update(text=output["last_hidden_state"][0])
    )
    pixels = torch.zeros(1, 3, 64, 64)
    seen = []
    with torch.inference_mode(), quiet():
        for text in ("dog .", "horse . dog . cat .", "red car . dog ."):
            plain_model(pixels, captions=[text])
            tokens = tokenizer.tokenize(text)
            seen.append(features["text"][1 + tokens.index("dog")])
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(["dog", "."])])
        zeros = torch.zeros_like(ids)
        alone = plain_model.bert._whole(
            input_ids=ids, token_type_ids=zeros, position_ids=torch.arange(2)[None]
        )
    hook.remove()
    for one in seen:
        torch.testing.assert_close(one, alone.last_hidden_state[0, 0], atol=1e-5, rtol=1e-5)


def test_the_adapter_reads_flat_masks_too(plain_model):
    ids = torch.tensor([[2, 8, 5, 0, 0]])
    mask, zeros = torch.tensor([[1, 1, 1, 0, 0]]), torch.zeros_like(ids)
    with torch.inference_mode():
        padded = plain_model.bert(ids, mask, zeros).last_hidden_state[:, :3]
        bare = plain_model.bert(ids[:, :3], mask[:, :3], zeros[:, :3]).last_hidden_state
    torch.testing.assert_close(padded, bare, atol=1e-5, rtol=1e-5)


def test_checkpoint_names_are_the_released_ones(plain_model):
    names = plain_model.state_dict().keys()
    assert {name.split(".")[1] for name in names if name.startswith("bert.")} == {
        "embeddings", "encoder", "pooler",
    }  # fmt: skip
    assert not any("_whole" in name for name in names)


def test_captions_go_to_the_model_one_by_one(loaded, make_picture, monkeypatch):
    """In a batch the package would mix up the masks of names."""
    engine, passes = loaded["groundingdino"].engine, []
    forward = engine._forward

    def listening(arguments, texts):
        passes.append(texts)
        return forward(arguments, texts)

    monkeypatch.setattr(engine, "_forward", listening)
    loaded["groundingdino"].detect(make_picture(), NAMES)
    assert len(passes) > 4
    assert {len(texts) for texts in passes} == {1}
    words = " ".join(text for texts in passes for text in texts).replace(".", " ").split()
    assert sorted(words) == sorted(NAMES)


# Names and captions.


def test_failure_8_a_long_list_is_split_and_nothing_is_lost():
    tokenizer = bert_tokenizer()
    names = sorted(NAMES)
    groups = list(captions(names, tokenizer, 20))
    assert [name for group in groups for name in group] == names
    assert len(groups) > 1
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        size = len(tokenizer(caption(group), add_special_tokens=False)["input_ids"])
        assert size <= 20
        if following:  # as full as it gets
            more = tokenizer(caption([*group, following[0]]), add_special_tokens=False)
            assert len(more["input_ids"]) > 20


def test_captions_by_hand():
    tokenizer = bert_tokenizer()
    assert caption(["dog", "Red  car", "dog. cat?"]) == "dog . red car . dog cat ."
    assert list(captions(["dog", "red car", "cat"], tokenizer, 5)) == [["dog", "red car"], ["cat"]]
    assert list(captions(["dog", "red car", "cat"], tokenizer, 99, 1)) == [
        ["dog"], ["red car"], ["cat"],
    ]  # fmt: skip
    assert list(captions(["red car light"], tokenizer, 4)) == [["red car light"]]
    assert list(captions(["red car light", "dog"], tokenizer, 3)) == [["dog"]]
    assert list(captions(["?", "жук", "dog"], tokenizer, 9)) == [["dog"]]


# Loading.


def test_released_configurations_are_read_from_the_package():
    with quiet():
        from groundingdino import config
        from groundingdino.util.slconfig import SLConfig

    backbones = {}
    for name, file in CONFIGS.items():
        path = config.__path__[0] if hasattr(config, "__path__") else ""
        backbones[name] = SLConfig.fromfile(f"{path}/{file}").backbone
    assert backbones == {"SwinB": "swin_B_384_22k", "SwinT_OGC": "swin_T_224_1k"}


def refuse(arguments, error, message, **changes):
    detector = GroundingDINO(**{**arguments, **changes})
    with pytest.raises(error, match=message) as caught:
        detector.load()
    assert caught.value.advice
    return caught.value


def changed(arguments, tmp_path, change):
    state = torch.load(arguments["checkpoint"], weights_only=True)["model"]
    change(state)
    torch.save({"model": state}, tmp_path / "changed.pth")
    return str(tmp_path / "changed.pth")


def test_tensors_out_of_place_are_named(groundingdino_arguments, tmp_path):
    def change(state):
        del state["module.feat_map.bias"]
        state["module.extra.weight"] = torch.zeros(1)
        state["module.level"] = torch.zeros(1)
        state["module.input_proj.0.0.bias"] = torch.zeros(3)

    path = changed(groundingdino_arguments, tmp_path, change)
    text = str(refuse(groundingdino_arguments, MissingTensors, "1 missing", checkpoint=path))
    for part in ("feat_map.bias", "2 unexpected: extra.weight, level", "input_proj.0.0.bias"):
        assert part in text
    assert "label_enc" not in text
    assert "position_ids" not in text


def test_another_configuration_is_refused(groundingdino_arguments, tmp_path):
    text = (
        open(groundingdino_arguments["config"]).read().replace("enc_layers = 1", "enc_layers = 2")
    )
    (tmp_path / "other.py").write_text(text)
    refuse(
        groundingdino_arguments,
        MissingTensors,
        r"missing: .*transformer\.encoder\.layers\.1",
        config=str(tmp_path / "other.py"),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is damaged"),
        (b"no checkpoint at all", "is damaged"),
        ({"weights": {}}, "holds no tensors as 'model'"),
        ([1], "holds no tensors as 'model'"),
        ({"model": GroundingDINO(checkpoint="x")}, "is damaged"),
    ],
    ids=["absent", "empty", "noise", "other keys", "a list", "code"],
)
def test_files_that_are_no_checkpoint(groundingdino_arguments, tmp_path, content, message):
    path = tmp_path / "bad.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    refuse(groundingdino_arguments, InputError, message, checkpoint=str(path))


def test_a_checkpoint_that_was_cut_off(groundingdino_arguments, tmp_path):
    whole = Path(groundingdino_arguments["checkpoint"]).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    refuse(groundingdino_arguments, InputError, "damaged", checkpoint=str(tmp_path / "half.pth"))


def test_absent_configuration_and_text_encoder(groundingdino_arguments, tmp_path):
    refuse(groundingdino_arguments, InputError, "configuration 'Swin'", config="Swin")
    absent = str(tmp_path / "absent")
    refuse(groundingdino_arguments, InputError, "text encoder", text_encoder=absent)


def test_a_device_that_is_not_there(groundingdino_arguments):
    refuse(groundingdino_arguments, InputError, "device", device="cuda:93")
    refuse(groundingdino_arguments, InputError, "device", device="gpu")


@pytest.mark.parametrize("sides", [(16, 100), (200, 100)])
def test_sides_of_the_scaled_picture_are_checked(sides):
    with pytest.raises(ValueError, match="shortest_side must be at least 32"):
        GroundingDINO(checkpoint="x", shortest_side=sides[0], longest_side=sides[1])


def test_the_package_is_left_as_it_was(groundingdino_arguments):
    with quiet():
        import groundingdino.models.GroundingDINO.groundingdino as package
        from groundingdino.models.GroundingDINO import bertwarper
    groundingdino_package.build(
        groundingdino_arguments["config"], groundingdino_arguments["text_encoder"]
    )
    assert package.BertModelWarper is bertwarper.BertModelWarper


def test_facts_name_the_weights(loaded):
    facts = loaded["groundingdino"].facts
    assert facts["weights"].startswith("sha256:")
    other = dataclasses.replace(loaded["groundingdino"], box_threshold=0.4)
    assert facts != other.facts
