"""CrossLMM in supervised fine-tuning: its two stages, gates, recomputed activations."""

import json
import os
import shutil
import subprocess
import sys

import checks
import pytest
import tiny
import torch
from test_sft_recipe import _config, _losses, _train, _weights, folder  # noqa: F401

from mmlm import build_in
from mmlm.engine.build_in import built_in
from mmlm.errors import InputError
from mmlm.methods.crosslmm import CrossLMM
from mmlm.model.checkpoint import load
from training.__main__ import main
from training.model import choose_what_learns, load_for_training
from training.settings import ModelSettings

METHOD = "CrossLMM(grid=2, every=2)"
STAGE_1 = {
    "model__methods": [METHOD],
    "model__learns": ["projector", "methods"],
    "model__method_parts": ["CrossLMM.v2v"],
    "optimisation__epochs": 2.0,
}


def _blocks(path):
    model, _ = load(str(path / "model"))
    assert built_in(model) == (CrossLMM(grid=2, every=2),)
    return {n: p.detach().clone() for n, p in model.mmlm_methods["CrossLMM"].named_parameters()}


def test_two_stages(folder, tmp_path):  # noqa: F811
    """Stage 1: projector and V2V, nothing else. Stage 2 goes on from it and opens T2V too."""
    first = _train(folder, tmp_path / "one", **STAGE_1)
    before, after = _weights(folder / "model"), _weights(first / "model")
    changed = {name for name, x in after.items() if not torch.equal(before[name], x)}
    assert changed
    assert all("multi_modal_projector" in name for name in changed)
    model, _ = load_for_training(ModelSettings(name=str(folder / "model"), methods=(METHOD,)))
    fresh = dict(model.mmlm_methods["CrossLMM"].named_parameters())
    one = _blocks(first)
    moved = {name for name, x in one.items() if not torch.equal(fresh[name].detach(), x)}
    assert moved == {name for name in one if name.startswith("v2v.")}
    assert float(one["t2v.0.gate"]) == 0

    second = _train(
        folder,
        tmp_path / "two",
        model__name=str(first / "model"),
        model__learns=["language", "projector", "methods"],
        model__lora={"r": 2, "alpha": 4},
        export=["merged"],
    )
    model, _ = load(str(second / "merged"))
    two = dict(model.mmlm_methods["CrossLMM"].named_parameters())
    assert float(two["t2v.0.gate"].detach()) != 0
    assert not torch.equal(two["v2v.0.q_proj.weight"], one["v2v.0.q_proj.weight"])


def test_gates_do_not_decay(folder, tmp_path):  # noqa: F811
    """With a decay that eats every matrix, open gates stay where the gradient puts them."""
    options = {
        **STAGE_1,
        "model__methods": ["CrossLMM(grid=2, every=2, gate=1.0)"],
        "optimisation__learning_rate": 1e-3,
        "optimisation__weight_decay": 500.0,  # half of a weight in a step
    }
    output = _train(folder, tmp_path / "out", **options)
    model, _ = load(str(output / "model"))
    blocks = dict(model.mmlm_methods["CrossLMM"].named_parameters())
    assert 0.9 < float(blocks["v2v.0.gate"].detach()) < 1.1
    fresh, _ = tiny.build("llava", layers=2)
    build_in(fresh, CrossLMM(grid=2, every=1))
    whole = fresh.mmlm_methods["CrossLMM"].v2v["0"].q_proj.weight
    assert blocks["v2v.0.q_proj.weight"].norm() < 0.2 * whole.norm()


@pytest.mark.parametrize("source", ["tower", "projected"])
def test_recomputed_activations_give_the_same_gradients(source):
    """Also where another prompt ran between the two passes, as reference models do."""
    model, processor = tiny.build("llava", layers=2)
    inputs = checks.batch(processor)
    other = tiny.inputs(processor, checks.PROMPTS[::-1], [[tiny.picture(5)], [tiny.picture(6)]])
    build_in(model, CrossLMM(grid=2, every=1, gate=0.7, kv_source=source))
    model.train()

    def gradients(*, between=False):
        model.zero_grad()
        out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        if between:
            with torch.no_grad():
                model(**other, use_cache=False)
        out.loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert "mmlm_methods.CrossLMM.t2v.1.k_proj.weight" in plain
    model.activation_checkpointing_enable({"use_reentrant": False})
    for found in (gradients(), gradients(between=True)):
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], x) for name, x in plain.items())


def test_rows_padded_on_the_right_learn_as_alone():
    """A training's rows are padded on the right; the loss of each is that of the row alone."""
    model, processor = tiny.build("llava", layers=2)
    build_in(model, CrossLMM(grid=2, every=1, gate=0.7))
    model.train()
    inputs = tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(1)], [tiny.picture(2)]])
    real = inputs["attention_mask"].bool()
    n = int(real.sum(-1).max())
    ids = torch.full((2, n), 1)
    mask = torch.zeros(2, n, dtype=torch.long)
    for row in range(2):
        own = inputs["input_ids"][row][real[row]]
        ids[row, : len(own)], mask[row, : len(own)] = own, 1
    assert not mask.all()
    with torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False
        ).logits
        for row in range(2):
            own = ids[row : row + 1, : int(mask[row].sum())]
            alone = model(
                input_ids=own, pixel_values=inputs["pixel_values"][row : row + 1], use_cache=False
            ).logits
            torch.testing.assert_close(out[row, : own.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


def test_what_is_refused(folder, tmp_path, capsys):  # noqa: F811
    with pytest.raises(ValueError, match="add methods"):
        ModelSettings(learns=("projector",), method_parts=("CrossLMM.v2v",))
    model, _ = load_for_training(ModelSettings(name=str(folder / "model"), methods=(METHOD,)))
    settings = ModelSettings(learns=("methods",), method_parts=("CrossLMM.w2w",))
    with pytest.raises(InputError, match=r"CrossLMM\.w2w") as caught:
        choose_what_learns(model, settings)
    assert "CrossLMM.v2v, CrossLMM.t2v" in caught.value.advice
    packed = {**STAGE_1, "data__packing": True, "data__max_length": 200}
    assert main(["--config", _config(folder, tmp_path / "bad", **packed)]) == 2
    assert "takes a row for one document" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_and_a_resumed_run(folder, tmp_path):  # noqa: F811
    """ZeRO-3 on two processes makes the steps of one; a cut-off run goes on alike."""
    options = {
        **STAGE_1,
        "model__method_parts": [],
        "model__learns": ["language", "projector", "methods"],
        "optimisation__batch_size": 4,
        "optimisation__rows_per_pass": 1,
        "saving__every": 2,
    }
    single = _train(folder, tmp_path / "single", **options)
    two = tmp_path / "two"
    config = _config(folder, two, **options, deepspeed="zero3")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")

    def run():
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "training", "--config", config],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    run()
    expected = _losses(single)
    assert len(expected) == 4
    assert _losses(two) == pytest.approx(expected, abs=1e-4)
    one, both = _blocks(single), _blocks(two)
    for name, x in one.items():
        torch.testing.assert_close(both[name], x, atol=1e-4, rtol=1e-3)
    # The same again from the second step on: the last checkpoint and the end are gone.
    last = json.loads((two / "checkpoint-4" / "trainer_state.json").read_text())
    assert last["global_step"] == 4
    _cut(two, "checkpoint-4")
    run()
    assert _losses(two) == pytest.approx(expected, abs=1e-4)
    again = _blocks(two)
    for name, x in both.items():
        torch.testing.assert_close(again[name], x, atol=1e-6, rtol=1e-5)


def _cut(output, checkpoint):
    """Leaves a run as a kill after its first checkpoint would."""
    shutil.rmtree(output / checkpoint)
    shutil.rmtree(output / "model")
    (output / "finished.json").unlink()
