"""The commands of docs/train-a-llava.md, as written, on tiny parts and files."""

import json
import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, CLIPImageProcessor

from mmlm.cli import main
from mmlm.model.open_clip_tower import from_open_clip
from tests.model.towers_and_languages import CHATML, clip, language, tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "train-a-llava.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
#: What makes two steps of two rows out of LLaVA's hours.
SHORT = [
    f"--recipe.init_args.optimisation.{name}={value}"
    for name, value in {"steps": 2, "batch_size": 2, "rows_per_pass": 2, "warmup": 0.0}.items()
] + ["--recipe.init_args.tracking.progress=never"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the page calls by name: models, data files, configurations."""
    monkeypatch.chdir(tmp_path)
    tower = tmp_path / "openai" / "clip-vit-large-patch14-336"
    from_open_clip(clip()).save_pretrained(tower)
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(tower)
    text = tmp_path / "Qwen" / "Qwen3-0.6B"
    words = tokenizer(CHATML)
    words.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    words.save_pretrained(text)
    language("qwen3", rows=len(words), num_hidden_layers=6).save_pretrained(text)
    for file, folder in (
        ("blip_laion_cc_sbu_558k.json", "data/pretrain"),
        ("llava_v1_5_mix665k.json", "data"),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        tiny.picture(1).save(tmp_path / folder / "1.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat is this ?"},
            {"from": "gpt", "value": "a cat sits on a red couch ."},
        ]
        rows = [{"id": str(n), "image": "1.png", "conversations": turns} for n in range(4)]
        (tmp_path / "data" / file).write_text(json.dumps(rows))
    yamls = [code for kind, code in BLOCK.findall(PAGE.read_text()) if kind == "yaml"]
    for name, code in zip(("pretrain", "finetune"), yamls, strict=True):
        assert f"output: runs/own/{name}\n" in code
        (tmp_path / f"{name}.yaml").write_text(code)
    return tmp_path


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_the_commands_of_the_page(place, capsys):
    lines = [
        line
        for kind, code in BLOCK.findall(PAGE.read_text())
        if kind == "bash"
        for line in code.splitlines()
    ]
    assert [shlex.split(line)[1] for line in lines] == ["assemble", "train", "train", "doctor"]
    for line in lines:
        program, command, *rest = shlex.split(line)
        assert program == "mmlm"
        assert main([command, *rest, *(SHORT if command == "train" else [])]) == 0, line
    start, pretrained, tuned = (
        weights(place / "runs" / "own" / name)
        for name in ("start", "pretrain/model", "finetune/model")
    )
    first = {name for name in start if not torch.equal(start[name], pretrained[name])}
    assert first == {name for name in start if "multi_modal_projector" in name}
    second = {name for name in start if not torch.equal(pretrained[name], tuned[name])}
    assert any("language_model.layers" in name for name in second)
    assert not any("vision_tower" in name for name in second)


def test_the_launch_on_several_gpus_is_understood(place):
    from training.config import build_parser

    [command] = re.findall(r"`(deepspeed [^`]+)`", PAGE.read_text())
    words = command.split()
    assert words[:5] == ["deepspeed", "--num_gpus", "8", "--module", "training"]
    config = build_parser().parse_args(words[5:])
    assert config.recipe.init_args.deepspeed == "zero3"
    assert config.output == "runs/own/finetune"


def test_the_page_says_what_open_clip_supports():
    from mmlm.model.open_clip_tower import SUPPORTED

    page = PAGE.read_text()
    for word in ("ResNet", "ConvNeXt", "EVA", "CLIPA", "SigLIP 2"):
        assert word in SUPPORTED
        assert word in page
