import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.world.stream import WorldStream
from mmlm.errors import InputError
from mmlm.model.checkpoint import load
from tests.training.toy import Colours, recipe, run, settings
from training.__main__ import main
from training.config import build_parser
from training.scratch.batches import WINDOW, Buckets
from training.scratch.language import answer_loss
from training.scratch.packing import IGNORED
from training.scratch.recipe import Shape
from training.scratch.source import Source, Tail
from training.scratch.vision import normalise, patch_labels, patch_loss

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "train" / "world").glob("seed*.yaml"))


def test_patch_labels_by_hand():
    maps = np.zeros((1, 8, 8), np.uint8)
    maps[0, :4, :4] = 2  # first patch: whole
    maps[0, :2, 4:6] = 1  # second patch: 4 pixels of class 1 ...
    maps[0, 0, 6] = 3  # ... and one of class 3
    maps[0, 4, :3] = 3  # third patch: 3 pixels, too few
    assert patch_labels(maps, 4, 3, least=4 / 16).tolist() == [[2, 1, 0, 0]]
    assert patch_labels(maps, 4, 3, least=3 / 16).tolist() == [[2, 1, 3, 0]]
    assert patch_labels(maps, 4, 3).tolist() == [[2, 1, 3, 0]]  # 10/64 of 16 pixels: 2.5


def test_patch_loss_by_hand():
    # Scores are the states themselves: ln of (1/2, 1/4, 1/4) and of (1/4, 1/2, 1/4).
    states = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]]).log()
    loss, accuracy = patch_loss(torch.nn.Identity(), states, torch.tensor([[0, 2]]))
    # background weighs 0.25: (0.25 ln 2 + ln 4) / 1.25
    assert loss.item() == pytest.approx((0.25 * math.log(2) + math.log(4)) / 1.25)
    assert accuracy.item() == 0.0


def test_pixels_equal_the_processor():
    from PIL import Image

    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    processor = recipe()._processor()
    want = processor.image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalise(image[None], 127.5, 64.0), want, rtol=1e-5, atol=1e-6)


def test_buckets_take_every_example_once_and_alike_lengths_together():
    lengths = np.random.default_rng(1).integers(5, 60, 10_000)
    buckets = Buckets(lambda i: int(lengths[i]), lambda n: n, 6, seed=0)
    batches = [buckets.batch(step) for step in range(2 * WINDOW)]
    indices = [index for batch in batches for index, _ in batch]
    assert sorted(indices) == list(range(2 * WINDOW * 6))
    assert {index for batch in batches[:WINDOW] for index, _ in batch} == set(range(WINDOW * 6))
    spread = [max(n for _, n in batch) - min(n for _, n in batch) for batch in batches]
    assert np.mean(spread) < 15
    order = [batch[0][1] for batch in batches[:WINDOW]]
    assert order != sorted(order)
    again = Buckets(lambda i: int(lengths[i]), lambda n: n, 6, seed=0)
    assert again.batch(11) == batches[11]


def test_processes_share_a_batch():
    buckets = Buckets(lambda i: i, lambda n: n, 6, seed=0)
    shares = [buckets.batch(3, rank, 2) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(buckets.batch(3))
    stage = recipe()._stage("vision", _run_stub())
    whole, parts = stage.batch(1, 0, 1), [stage.batch(1, rank, 2) for rank in range(2)]
    torch.testing.assert_close(whole["pixels"][0::2], parts[0]["pixels"])
    torch.testing.assert_close(whole["labels"][1::2], parts[1]["labels"])


def _run_stub():
    return run(Path())


def test_tail_shifts_the_stream():
    tail = Tail(Colours(), 100)
    assert isinstance(tail, Source)
    assert tail.texts(3) == Colours().texts(103)
    np.testing.assert_array_equal(tail.picture(3)[0], Colours().picture(103)[0])


def test_stages_take_consecutive_parts_of_the_stream():
    taught = recipe(vision=settings(10, batch_size=8))
    firsts = [taught._first_index(n) for n in ("vision", "language", "projector", "alignment")]
    assert firsts == [0, 80, 80 + 24, 80 + 48]


def _train(taught, output):
    for name in taught.settings:
        taught._train(name, run(output))
    taught._export(output)


def losses(folder, key="loss"):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def test_the_recipe_learns_and_its_model_is_read_by_plain_transformers(tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    taught = recipe(60)
    _train(taught, tmp_path)
    assert np.mean(losses(tmp_path / "vision")[-5:]) < 0.7 * losses(tmp_path / "vision")[0]
    assert np.mean(losses(tmp_path / "language")[-5:]) < 0.7 * losses(tmp_path / "language")[0]
    captions = losses(tmp_path / "alignment", "caption_loss")
    assert np.mean(captions[-5:]) < 0.9 * captions[0]
    model, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    from PIL import Image

    image, _, _ = Colours().picture(5)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=[prompt], images=[Image.fromarray(image)], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    # The exported weights are the trained ones.
    state = torch.load(tmp_path / "alignment" / "snapshot.pt", weights_only=True)["stage"]
    torch.testing.assert_close(model.lm_head.weight, state["model.lm_head.weight"])
    loaded, _ = load(tmp_path / "model")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_refinement_goes_on_from_the_alignment_with_the_patch_head_of_the_tower(tmp_path):
    taught = recipe(8, refinement=settings(8), patch_weight=0.5)
    _train(taught, tmp_path)
    before = _snapshot(tmp_path, "alignment")["stage"]
    head = _snapshot(tmp_path, "vision")["stage"]["patch_head.1.weight"]
    stage = taught._stage("refinement", run(tmp_path))
    torch.testing.assert_close(stage.patch_head[1].weight, head)
    torch.testing.assert_close(stage.model.lm_head.weight, before["model.lm_head.weight"])
    assert stage.rate("model.model.vision_tower.x") == 1.0
    got = stage(**stage.batch(0, 0, 1))
    parts = got["caption_loss"] + 0.7 * got["question_loss"] + 0.5 * got["patch_loss"]
    torch.testing.assert_close(got["loss"], parts)
    exported, _ = load(tmp_path / "model")
    after = _snapshot(tmp_path, "refinement")["stage"]
    torch.testing.assert_close(exported.lm_head.weight, after["model.lm_head.weight"])
    assert not torch.equal(after["patch_head.1.weight"], head)


def test_content_words_count_more():
    head = torch.nn.Identity()
    states = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1.0, 1.0, 1.0]]]).log()
    labels = torch.tensor([[IGNORED, 0, 2]])  # costs ln 2 and ln 4
    plain, same = answer_loss(head, states, labels)
    assert plain.item() == same.item() == pytest.approx(1.5 * math.log(2))
    weighted, unweighted = answer_loss(head, states, labels, torch.tensor([1.0, 1.0, 3.0]))
    assert weighted.item() == pytest.approx((math.log(2) + 3 * math.log(4)) / 4)
    assert unweighted.item() == pytest.approx(plain.item())


def test_emphasis_reaches_the_refinement_alone(tmp_path):
    taught = recipe(3, refinement=settings(3), emphasis=4.0)
    _train(taught, tmp_path)
    assert taught._stage("alignment", run(tmp_path)).word_weight is None
    stage = taught._stage("refinement", run(tmp_path))
    heavy = (stage.word_weight == 4.0).nonzero()[:, 0].tolist()
    tokenizer = taught._processor().tokenizer
    assert sorted(tokenizer.convert_ids_to_tokens(heavy)) == ["blue", "green", "red"]
    assert set(stage.word_weight.tolist()) == {1.0, 4.0}


def test_the_refinement_has_its_own_source(tmp_path):
    taught = recipe(3, refinement=settings(3), refinement_source=Colours(seed=5))
    _train(taught, tmp_path)
    first = taught._first_index("refinement")
    drawn = taught._stage("refinement", run(tmp_path))._source
    assert drawn.texts(0) == Colours(seed=5).texts(first)
    assert taught._stage("alignment", run(tmp_path))._source.texts(0) == Colours().texts(
        taught._first_index("alignment")
    )


def test_only_the_projector_changes_in_its_stage(tmp_path):
    taught = recipe(4)
    for name in ("vision", "language", "projector"):
        taught._train(name, run(tmp_path))
    read = {
        n: torch.load(tmp_path / n / "snapshot.pt", weights_only=True)["stage"]
        for n in ("vision", "language", "projector")
    }
    for key, tensor in read["projector"].items():
        if ".vision_tower." in key:
            before = read["vision"][key.replace("model.model.vision_tower.", "tower.")]
        elif ".language_model." in key:
            before = read["language"][key.replace("model.model.language_model.", "language.model.")]
        else:
            continue
        torch.testing.assert_close(tensor, before, rtol=0, atol=0, msg=key)


def test_the_tower_learns_at_its_own_rate():
    stage = recipe()._stage("vision", _run_stub())
    assert stage.rate("tower.x") == 1.0
    from training.scratch.alignment import AlignmentStage

    class Bare(AlignmentStage):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self._tower_rate = 0.3

    assert Bare().rate("model.model.vision_tower.encoder.x") == 0.3
    assert Bare().rate("model.model.multi_modal_projector.x") == 1.0


def test_mixed_precision_stays_near_full_precision(tmp_path):
    taught = recipe(3)
    for name in ("vision", "language", "projector", "alignment"):
        taught._train(name, run(tmp_path / "full"))
        taught._train(name, run(tmp_path / "half", precision="bf16"))
        full, half = losses(tmp_path / "full" / name), losses(tmp_path / "half" / name)
        assert full != half
        assert half == pytest.approx(full, rel=0.05)


def test_a_stage_before_its_predecessor_is_refused(tmp_path):
    with pytest.raises(InputError, match="stage 'vision' has not been trained"):
        recipe()._train("projector", run(tmp_path))
    with pytest.raises(InputError, match="stage 'sight' is unknown"):
        recipe().run(run(tmp_path), "sight")


def test_later_settings_leave_earlier_snapshots_valid(tmp_path):
    one, other = run(tmp_path), run(tmp_path)
    base = {"class_path": "x", "init_args": {"vision": 1, "alignment": 2}}
    one.config["recipe"] = base
    other.config["recipe"] = {"class_path": "x", "init_args": {"vision": 1, "alignment": 3}}
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint(without=["alignment"]) == other.fingerprint(without=["alignment"])


def test_shape_out_of_range():
    with pytest.raises(ValueError, match="image_size = 81 is not a multiple"):
        Shape(image_size=81)


def test_world_stream_is_a_source_and_depends_on_index_alone():
    stream, other = WorldStream(seed=3), WorldStream(seed=3)
    assert isinstance(stream, Source)
    other.texts(5)
    other.picture(2)
    assert stream.texts(9) == other.texts(9)
    image, classes, present = stream.picture(9)
    np.testing.assert_array_equal(image, other.picture(9)[0])
    assert image.shape == (80, 80, 3)
    assert set(np.unique(classes)) - {0} <= {c + 1 for c in present}
    assert WorldStream(seed=4).texts(9) != stream.texts(9)
    words = set(stream.vocabulary())
    assert {"dog", "giraffe", "people", "yes", "no", "two"} <= set(stream.content_words()) <= words
    assert not {"the", "a", "image", "of"} & set(stream.content_words())
    for described, asked in (stream.texts(i) for i in range(50)):
        assert len(described) == 1
        assert len(asked) == 5
        text = " ".join(piece for turn in described + asked for piece in turn)
        assert set(text.split()) <= words
    with pytest.raises(ValueError, match="split 'no' is unknown"):
        WorldStream(split="no")
    with pytest.raises(ValueError, match="caption_questions = 0"):
        WorldStream(caption_questions=0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_read(path):
    config = build_parser().parse_args(["--config", str(path)])
    built = build_parser().instantiate(config)
    assert built.recipe.settings["alignment"].steps > 0
    assert f"--config {path.relative_to(ROOT)}" in path.read_text()


def test_there_are_configurations():
    assert len(CONFIGS) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--recipe.init_args.vision.stepps", "3"], "stepps"),
        (["--recipe.init_args.vision.steps", "many"], "many"),
        (["--run.precision", "fp8"], "precision"),
    ],
)
def test_wrong_configurations_are_refused_with_their_path(change, message, capsys, tmp_path):
    arguments = ["--config", str(CONFIGS[0]), "--output", str(tmp_path), *change]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_value_out_of_range_is_refused_before_any_work(capsys, tmp_path):
    steps = ["--recipe.init_args.vision.steps", "0"]
    assert main(["--config", str(CONFIGS[0]), "--output", str(tmp_path), *steps]) == 2
    error = capsys.readouterr().err
    assert "steps = 0, batch_size = 64: both must be at least 1" in error
    assert "Change that value" in error
    assert not list(tmp_path.iterdir())


TOY = """
output: {output}
recipe:
  class_path: training.scratch.recipe.FromScratch
  init_args:
    source: {{class_path: tests.training.toy.Colours, init_args: {{even: true}}}}
    shape: {{image_size: 16, patch_size: 8, vision_width: 16, vision_mlp: 32, vision_layers: 2,
            vision_heads: 2, text_width: 16, text_mlp: 32, text_layers: 2, text_heads: 2,
            max_positions: 64}}
    vision: {{steps: 3, batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 2}}
    language: {{steps: 3, batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 2}}
    projector: {{steps: 3, batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 2}}
    alignment: {{steps: 3, batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 2}}
    max_tokens: 30
    question_tokens: 30
run: {{processes: {processes}, precision: "no", log_every: 1}}
"""


def _program(folder, *arguments, processes=1):
    """The training program as users start it, on the toy world."""
    config = folder / "toy.yaml"
    config.write_text(TOY.format(output=folder, processes=processes))
    launcher = ["-m", "training"]
    if processes > 1:
        several = ["--standalone", "--nproc-per-node", str(processes)]
        launcher = ["-m", "torch.distributed.run", *several, *launcher]
    return subprocess.run(
        [sys.executable, *launcher, "--config", str(config), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def _snapshot(folder, name):
    return torch.load(folder / name / "snapshot.pt", weights_only=True)


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path):
    taught = recipe(3, source=Colours(even=True))
    for name in ("vision", "language", "projector"):
        taught._train(name, run(tmp_path / "one"))
    for name in ("vision", "language"):
        (tmp_path / "two" / name).mkdir(parents=True)
        shutil.copy(tmp_path / "one" / name / "snapshot.pt", tmp_path / "two" / name)
    result = _program(tmp_path / "two", "--only", "projector", processes=2)
    assert result.returncode == 0, result.stderr
    first, second = (_snapshot(tmp_path / n, "projector") for n in ("one", "two"))
    # Texts of one length: the mean of the processes' means is the mean over the batch.
    for key, tensor in first["stage"].items():
        torch.testing.assert_close(tensor, second["stage"][key], rtol=1e-3, atol=1e-4, msg=key)
    assert re.search(r"projector 3/3 .* steps/s", result.stderr)


@pytest.mark.slow
def test_the_program_ends_all_stages_with_the_message_of_the_failing_one(tmp_path):
    recipe(3)._train("vision", run(tmp_path))  # by another configuration
    result = _program(tmp_path)
    assert result.returncode == 2
    assert "belongs to another training" in result.stderr
    assert "stage 'vision' ended with exit code 2" in result.stderr
    assert not (tmp_path / "projector").exists()
    assert "seed: 0" in (tmp_path / "config.yaml").read_text()
