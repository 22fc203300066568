"""``mmlm assemble``: a folder from two folders, and every refusal before work is lost."""

import json

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor

from mmlm.cli import main
from mmlm.model.open_clip_tower import from_open_clip
from tests.model.towers_and_languages import CHATML, clip, language, tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two folders: a CLIP tower, a language model."""
    folder = tmp_path_factory.mktemp("parts")
    square = {"height": 32, "width": 32}
    from_open_clip(clip()).save_pretrained(folder / "tower")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(
        folder / "tower"
    )
    language("qwen2", num_hidden_layers=8).save_pretrained(folder / "language")
    tokenizer(CHATML).save_pretrained(folder / "language")
    return ["--vision", str(folder / "tower"), "--language", str(folder / "language")]


def test_writes_a_folder_that_plain_transformers_reads(parts, tmp_path, capsys):
    out = tmp_path / "new" / "llava"
    argv = ["assemble", *parts, "--output", str(out), "--pad_to_multiple_of", "64"]
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert report["parameters"]["model"] == sum(p.numel() for p in model.parameters())
    projector = model.model.multi_modal_projector
    assert report["parameters"]["projector"] == sum(p.numel() for p in projector.parameters())
    assert report["classes"]["language_model"] == "Qwen2Model"
    assert (report["tokens_per_image"], report["image_size"]) == (16, [32, 32])
    assert (report["vocabulary"], report["image_token_id"]) == (384, 330)
    assert report["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert AutoProcessor.from_pretrained(out).image_token == "<image>"
    assert [path.name for path in out.parent.iterdir()] == ["llava"]
    # The next command reads it.
    assert main(["doctor", str(out), "--load", "--json"]) == 0


def test_sizes_for_people(parts, tmp_path, capsys):
    assert main(["assemble", *parts, "--output", str(tmp_path / "llava")]) == 0
    shown = capsys.readouterr().out
    assert "CLIPVisionModel, " in shown
    assert "32 x 32 pixels, 16 tokens" in shown
    assert "331 rows" in shown
    assert "train the projector" in shown


def test_options_reach_the_model(parts, tmp_path):
    out = tmp_path / "llava"
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{% for p in m['content'] %}{{ '<img>' if p['type'] == 'image' "
        "else p['text'] }}{% endfor %}{% endfor %}"
    )
    argv = [
        "--output", str(out), "--feature_layer=-1", "--feature_strategy", "full", "--dtype",
        "bfloat16", "--image_token", "<img>", "--chat_template", str(tmp_path / "own.jinja"),
        "--projector_activation", "silu",
    ]  # fmt: skip
    assert main(["assemble", *parts, *argv]) == 0
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.vision_feature_layer == -1
    assert model.config.vision_feature_select_strategy == "full"
    assert model.config.projector_hidden_act == "silu"
    processor = AutoProcessor.from_pretrained(out)
    assert processor.image_token == "<img>"
    assert "<img>" in processor.chat_template


def test_seeds(parts, tmp_path):
    weights = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        argv = ["assemble", *parts, "--output", str(tmp_path / name), "--seed", str(seed)]
        assert main(argv) == 0
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


@pytest.mark.parametrize(
    ("argv", "words", "advice"),
    [
        (["--vision", "no-such-tower"], "no model 'no-such-tower'", ""),
        (["--language", "no-such-model"], "no model 'no-such-model'", ""),
        (["--language", "missing.gguf"], "no file 'missing.gguf'", "GGUF"),
        (["--vision", "open_clip:ViT-L-14-33"], "no model 'ViT-L-14-33'", "ViT-L-14-336"),
        (["--vision", "open_clip:ViT-L-14"], "without weights", "openai"),
        (["--vision_weights", "openai"], "brings its own", "open_clip"),
        (["--feature_layer", "9"], "hidden states -4 to 3", "-2"),
        (["--chat_template", "no.jinja"], "is no file", "vicuna"),
        (["--pad_to_multiple_of", "0"], "pad_to_multiple_of is 0", "64"),
        (["--feature_strategy", "some"], "some", ""),
        (["--visoin", "x"], "visoin", ""),
    ],
)
def test_refusals(parts, tmp_path, capsys, argv, words, advice):
    out = tmp_path / "llava"
    assert main(["assemble", *parts, "--output", str(out), *argv]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert advice in shown.partition("advice: ")[2]
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_there(parts, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("irreplaceable")
    assert main(["assemble", *parts, "--output", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main(["assemble", *parts, "--output", str(empty)]) == 0
    assert (empty / "config.json").exists()


def test_an_interrupted_write_leaves_no_model(parts, tmp_path, monkeypatch):
    from mmlm.model import checkpoint

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", killed)
    assert main(["assemble", *parts, "--output", str(tmp_path / "llava")]) == 130
    assert not (tmp_path / "llava").exists()
    monkeypatch.undo()
    assert main(["assemble", *parts, "--output", str(tmp_path / "llava")]) == 0
