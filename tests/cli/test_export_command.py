"""``mmlm export``: what is taken of a run, what is written, what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build, inputs, picture

import mmlm
from mmlm.cli import main
from mmlm.engine.build_in import built_in
from mmlm.model.checkpoint import load
from training.export import export


def logits(model, processor):
    with torch.no_grad():
        return model(**inputs(processor, ["what is this ?"], [[picture(0)]])).logits


def shaken(tiny_folder, seed):
    """A model with an adapter, as a trainer holds it."""
    model, processor = load(tiny_folder)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    ).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return wrapped, processor


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """The folder of a run: three checkpoints, the second the best, the third incomplete."""
    folder = tmp_path_factory.mktemp("run") / "sentinel"
    folder.mkdir()
    record = {
        "recipe": {"init_args": {"model": {"name": "owner/base"}, "beta": 0.1}},
        "information": {"command": ["--config", "x.yaml"], "revision": "abcdef"},
    }
    (folder / "run.json").write_text(json.dumps(record))
    models = {}
    for step in (2, 4, 6):
        model, processor = shaken(tiny_folder, step)
        checkpoint = folder / f"checkpoint-{step}"
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        state = {
            "best_model_checkpoint": "/elsewhere/checkpoint-2",
            "log_history": [{"loss": 0.6, "step": 1}, {"loss": 0.4, "step": step}],
        }
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        if step != 6:
            marker = {"step": step, "processes": 1, "last": False, "files": {}}
            (checkpoint / "complete.json").write_text(json.dumps(marker))
        models[step] = model
    return folder, models, processor


def test_a_run_gives_its_best_checkpoint_merged(run, tmp_path, capsys):
    folder, models, processor = run
    assert main(["export", str(folder), "--output", str(tmp_path / "x"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {
        "checkpoint": str(folder / "checkpoint-2"),
        "what": "merged",
        "output": str(tmp_path / "x"),
    }
    model, own = load(tmp_path / "x")
    assert torch.allclose(logits(model, own), logits(models[2], processor), atol=1e-4)
    assert not torch.allclose(logits(model, own), logits(models[4], processor), atol=1e-2)
    card = (tmp_path / "x" / "README.md").read_text()
    for part in ("base_model: owner/base", '"beta": 0.1', "`abcdef`", "| loss | 0.4 |", "x.yaml"):
        assert part in card


def test_a_checkpoint_by_name_as_an_adapter(run, tiny_folder, tmp_path, capsys):
    from peft import PeftModel

    folder, models, processor = run
    chosen = folder / "checkpoint-4"
    output = tmp_path / "new" / "adapter"
    assert main(["export", str(chosen), "--output", str(output), "--what", "adapter"]) == 0
    assert f"adapter of {chosen} written to {output}" in capsys.readouterr().out
    model = PeftModel.from_pretrained(load(tiny_folder)[0], output).eval()
    assert torch.equal(logits(model, processor), logits(models[4], processor))


def test_a_whole_model_of_a_training_without_adapter(tiny_folder, tmp_path):
    assert main(["export", str(tiny_folder), "--output", str(tmp_path / "x"), "--quiet"]) == 0
    ours, theirs = load(tmp_path / "x")[0], load(tiny_folder)[0]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])


def test_another_precision(run, tmp_path):
    folder, _, _ = run
    output = tmp_path / "x"
    assert main(["export", str(folder), "--output", str(output), "--dtype", "bfloat16"]) == 0
    assert load(output, dtype="auto")[0].dtype == torch.bfloat16


def test_methods_stored_beside_an_adapter_come_back(tiny_folder, tmp_path):
    model, processor = load(tiny_folder)
    mmlm.build_in(model, mmlm.VHR(alpha=1.5), processor=processor)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["gate_proj"]))
    export(wrapped, processor, tmp_path / "adapter", "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "x")]) == 0
    assert list(built_in(load(tmp_path / "x")[0])) == [mmlm.VHR(alpha=1.5)]


class TestRefused:
    def refused(self, capsys, *arguments):
        assert main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    def test_no_folder(self, tmp_path, capsys):
        said = self.refused(capsys, tmp_path / "none", "--output", tmp_path / "x")
        assert "There is no folder" in said

    def test_an_output_that_exists(self, run, tmp_path, capsys):
        (tmp_path / "file").write_text("mine")
        said = self.refused(capsys, run[0], "--output", tmp_path)
        assert "exists already" in said
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_checkpoint_that_is_not_complete(self, run, tmp_path, capsys):
        said = self.refused(capsys, run[0] / "checkpoint-6", "--output", tmp_path / "x")
        assert "not complete" in said
        assert f"'{run[0]}' for its last complete checkpoint" in said

    def test_a_run_without_any(self, tmp_path, capsys):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text("{}")
        said = self.refused(capsys, tmp_path / "run", "--output", tmp_path / "x")
        assert "no complete checkpoint yet" in said

    def test_what_the_checkpoint_is_not(self, run, tiny_folder, tmp_path, capsys):
        output = ("--output", tmp_path / "x")
        assert "holds an adapter" in self.refused(capsys, run[0], *output, "--what", "model")
        said = self.refused(capsys, tiny_folder, *output, "--what", "adapter")
        assert "holds a whole model" in said
        assert "--what model" in said

    def test_no_weights(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        said = self.refused(capsys, tmp_path / "empty", "--output", tmp_path / "x")
        assert "holds no weights" in said

    def test_a_base_for_a_whole_model(self, tiny_folder, tmp_path, capsys):
        said = self.refused(capsys, tiny_folder, "--output", tmp_path / "x", "--base", tiny_folder)
        assert "it has no base" in said

    def test_an_adapter_that_names_no_base(self, run, tiny_folder, tmp_path, capsys):
        import shutil

        shutil.copytree(run[0] / "checkpoint-2", tmp_path / "a")
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = None
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
        said = self.refused(capsys, tmp_path / "a", "--output", tmp_path / "x")
        assert "--base" in said
        arguments = ["export", tmp_path / "a", "--output", tmp_path / "x", "--base", tiny_folder]
        assert main(list(map(str, arguments))) == 0

    def test_an_adapter_of_a_wider_or_another_kind_of_model(self, run, tmp_path, capsys):
        for family in ("paligemma", "idefics3"):
            model, processor = build(family)
            model.save_pretrained(tmp_path / family)
            processor.save_pretrained(tmp_path / family)
            said = self.refused(
                capsys, run[0], "--output", tmp_path / "x", "--base", tmp_path / family
            )
            assert "does not fit" in said
            assert not (tmp_path / "x").exists()

    def test_an_adapter_of_another_model(self, run, tmp_path, capsys):
        model, processor = build("llava", layers=6)
        model.save_pretrained(tmp_path / "deep")
        processor.save_pretrained(tmp_path / "deep")
        said = self.refused(capsys, run[0], "--output", tmp_path / "x", "--base", tmp_path / "deep")
        assert "does not fit" in said
        assert "8 missing" in said
        assert not (tmp_path / "x").exists()


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom mmlm.cli import main\nmain(['export', '--help'])\n"
        "print(sorted({'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--what" in done.stdout
