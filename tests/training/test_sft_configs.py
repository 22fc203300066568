"""The shipped recipes of supervised fine-tuning: they parse, and say what LLaVA's papers say."""

from pathlib import Path

import pytest
import tiny

import configs
from mmlm.inputs import use_chat_template
from tests.training.sft_rows import row
from training.config import build_parser
from training.sft.documents import IGNORED
from training.sft.encoding import Encoder
from training.sft.packing import FAMILIES

FOLDER = Path(configs.__file__).parent / "train"
NAMES = [
    *("crosslmm/stage1", "crosslmm/stage2"),
    *("llava/pretrain", "llava/sft", "llava/sft_lora"),
    *("world/crosslmm_1", "world/crosslmm_2"),
    *("world/mma", "world/mma_causal", "world/pooled_1", "world/pooled_2", "world/sft"),
]


def _recipe(name):
    parser = build_parser()
    given = parser.parse_args(["--config", str(FOLDER / f"{name}.yaml")])
    return parser.instantiate(given)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_parse_and_name_their_launch(name):
    built = _recipe(name)
    assert type(built.recipe).__name__ == "SFT"
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"--module training --config train/{name}\n" in text
    assert "emory" in text


def test_every_recipe_of_sft_is_tested_here():
    found = [path for path in FOLDER.rglob("*.yaml") if "training.sft.recipe" in path.read_text()]
    assert sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in found) == NAMES


def test_values_of_llava_1_5():
    one, two, lora = (_recipe(f"llava/{n}").recipe for n in ("pretrain", "sft", "sft_lora"))
    for stage in (one, two, lora):
        given = stage.optimisation
        assert (given.schedule, given.warmup, given.epochs, given.weight_decay) == (
            "cosine", 0.03, 1.0, 0.0,
        )  # fmt: skip
    assert (one.optimisation.learning_rate, one.optimisation.batch_size) == (1e-3, 256)
    assert (two.optimisation.learning_rate, two.optimisation.batch_size) == (2e-5, 128)
    assert (lora.optimisation.learning_rate, lora.optimisation.projector_learning_rate) == (
        2e-4, 2e-5,
    )  # fmt: skip
    assert (lora.model.lora.r, lora.model.lora.alpha) == (128, 256)
    assert one.model.learns == ("projector",)
    assert two.model.learns == lora.model.learns == ("language", "projector")
    assert two.deepspeed == "zero3"
    assert all(stage.optimisation.accumulation(8) for stage in (one, two, lora))
    assert "llava" in FAMILIES


def test_values_of_crosslmm():
    """The paper's, where it states one; both arms of the small comparison are alike."""
    one, two = (_recipe(f"crosslmm/{n}").recipe for n in ("stage1", "stage2"))
    assert (one.optimisation.learning_rate, one.optimisation.batch_size) == (1e-3, 512)
    assert (two.optimisation.learning_rate, two.optimisation.batch_size) == (1e-5, 128)
    assert one.model.methods == ("CrossLMM(grid=3, every=4)",)
    assert (one.model.learns, one.model.method_parts) == (
        ("projector", "methods"), ("CrossLMM.v2v",),
    )  # fmt: skip
    assert two.model.learns == ("language", "projector", "methods")
    assert not two.model.method_parts
    for stage in ("1", "2"):
        cross, pooled = (_recipe(f"world/{n}_{stage}").recipe for n in ("crosslmm", "pooled"))
        assert cross.optimisation == pooled.optimisation
        assert cross.data == pooled.data
        assert set(cross.model.learns) - {"methods"} == set(pooled.model.learns)


def test_stage_one_shows_a_picture_and_its_caption_alone():
    _, processor = tiny.build("llava")
    use_chat_template(processor, str(FOLDER / "llava" / "plain.jinja"))
    encoder = Encoder(processor, "none")
    [document], _ = encoder([row(1, ("describe it .", "a cat ."))], [[tiny.picture()]])
    words = processor.tokenizer.decode(document.ids)
    assert words == "<image>" * 16 + "a cat .\n"
    kept = document.labels[document.labels != IGNORED]
    assert processor.tokenizer.decode(kept) == "a cat ."
