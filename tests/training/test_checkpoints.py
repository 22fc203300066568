"""Checkpoints: what a kill leaves behind, where a run goes on, what is kept, what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import trl_toy
from saving_process import EVERY, MOMENTS, STEPS, lora, trained
from transformers import TrainerState

from mmlm.errors import InputError
from training import gather
from training.checkpoints import (
    MARKER,
    CompleteCheckpoints,
    complete_checkpoints,
    open_run,
    train,
)
from training.saving import Saving

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def finished_losses(folder):
    return json.loads((folder / "finished.json").read_text())["losses"]


def steps_kept(folder):
    return [int(path.name.partition("-")[2]) for path in complete_checkpoints(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    made = trained(folder)
    return folder, {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """Runs trainings in processes of their own; gives their exit codes."""
    said = tmp_path_factory.mktemp("process") / "stderr"
    with said.open("w") as errors:
        starter = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("saving_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )

    def run(folder, moment=None):
        print(json.dumps([str(folder), moment]), file=starter.stdin, flush=True)
        for line in starter.stdout:
            if line.startswith("code "):  # libraries write there too
                return int(line.split()[1])
        raise AssertionError(said.read_text())

    yield run
    starter.communicate()
    assert starter.returncode == 0, said.read_text()


class TestKill:
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_acceptance_12_a_kill_while_saving_loses_nothing_but_that_checkpoint(
        self, process, whole, tmp_path, moment
    ):
        run = tmp_path / "run"
        assert process(run, moment) == -signal.SIGKILL
        before = steps_kept(run)
        # Dropping the old one comes last, when the new one is complete.
        assert before == {"before removing": [4, 6], "while removing": [6]}.get(moment, [4])
        assert process(run) == 0
        assert finished_losses(run) == pytest.approx(finished_losses(whole[0]), abs=1e-6)
        assert len(finished_losses(run)) == STEPS
        assert steps_kept(run) == [STEPS]
        assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{STEPS}"}

    def test_a_finished_run_is_left_alone(self, process, whole):
        before = sorted((path, path.stat().st_mtime_ns) for path in whole[0].rglob("*.json"))
        assert process(whole[0]) == 0
        assert before == sorted((p, p.stat().st_mtime_ns) for p in whole[0].rglob("*.json"))


class TestResume:
    def test_acceptance_12_resume_reproduces_losses_and_weights(self, whole, tmp_path):
        run = tmp_path / "run"

        class Stop(Exception):
            pass

        class Stops(transformers.TrainerCallback):
            def on_step_begin(self, args, state, control, **more):
                if state.global_step == 5:
                    raise Stop

        with pytest.raises(Stop):
            trained(run, callbacks_more=[Stops()])
        made = trained(run)
        losses = torch.tensor(finished_losses(run))
        torch.testing.assert_close(
            losses, torch.tensor(finished_losses(whole[0])), rtol=0, atol=1e-6
        )
        for name, tensor in made.model.state_dict().items():
            torch.testing.assert_close(tensor, whole[1][name], rtol=0, atol=1e-6)

    def test_a_run_cut_off_after_its_last_step_makes_no_further_one(self, whole, tmp_path):
        run = tmp_path / "run"
        trained(run)
        (run / "finished.json").unlink()
        made = trained(run)
        assert made.state.global_step == STEPS
        assert finished_losses(run) == finished_losses(whole[0])
        for name, tensor in made.model.state_dict().items():
            assert torch.equal(tensor, whole[1][name])

    def test_the_library_alone_would_make_one_step_too_many(self, tmp_path, monkeypatch):
        """Why `train` steps in; when this fails, transformers has changed and it need not."""
        run = tmp_path / "run"
        trained(run)
        (run / "finished.json").unlink()
        marker = run / f"checkpoint-{STEPS}" / MARKER
        marker.write_text(json.dumps({**json.loads(marker.read_text()), "last": False}))
        assert trained(run).state.global_step == STEPS + 1


class TestIncomplete:
    def spoiled(self, tmp_path, spoil):
        """Two complete checkpoints, the later one spoiled; what is said and resumed from."""
        run = tmp_path / "run"
        run.mkdir()
        for step in (2, 4):
            folder = run / f"checkpoint-{step}"
            folder.mkdir()
            (folder / "weights").write_bytes(b"12345678")
            marker = {"step": step, "processes": 1, "last": False, "files": {"weights": 8}}
            (folder / MARKER).write_text(json.dumps(marker))
        (run / "run.json").write_text(json.dumps({"a": 1, "information": {}}))
        spoil(run / "checkpoint-4")
        with open_run(run, {"a": 1}) as opened:
            return opened.resume_from, run

    def test_whole_ones_are_kept(self, tmp_path):
        resumed, run = self.spoiled(tmp_path, lambda folder: None)
        assert resumed == run / "checkpoint-4"

    def test_without_marker(self, tmp_path, capsys):
        resumed, run = self.spoiled(tmp_path, lambda folder: (folder / MARKER).unlink())
        assert resumed == run / "checkpoint-2"
        assert not (run / "checkpoint-4").exists()
        assert "checkpoint-4 is not complete" in capsys.readouterr().err

    def test_a_file_cut_short(self, tmp_path, capsys):
        resumed, run = self.spoiled(tmp_path, lambda folder: os.truncate(folder / "weights", 5))
        assert resumed == run / "checkpoint-2"
        assert "weights missing or of another size" in capsys.readouterr().err

    def test_a_file_missing(self, tmp_path):
        resumed, run = self.spoiled(tmp_path, lambda folder: (folder / "weights").unlink())
        assert resumed == run / "checkpoint-2"

    def test_steps_are_ordered_as_numbers(self, tmp_path):
        resumed, run = self.spoiled(
            tmp_path, lambda folder: folder.rename(folder.with_name("checkpoint-10"))
        )
        assert resumed == run / "checkpoint-10"


class TestRefused:
    def test_another_configuration_with_the_names_of_its_fields(self, tmp_path):
        old = {"recipe": {"lr": 1e-5, "beta": 0.1}, "seed": 0}
        with open_run(tmp_path, old, {"command": ["a"]}):
            pass
        with open_run(tmp_path, old, {"command": ["b"]}):  # information may differ
            pass
        new = {"recipe": {"lr": 1e-5, "beta": 0.2}, "seed": 1}
        with (
            pytest.raises(InputError, match=r"recipe\.beta was 0\.1, now 0\.2; seed was 0, now 1"),
            open_run(tmp_path, new),
        ):
            pass

    def test_two_at_once(self, tmp_path):
        with (
            open_run(tmp_path, {}),
            pytest.raises(InputError, match="another process is training"),
            open_run(tmp_path, {}),
        ):
            pass
        with open_run(tmp_path, {}):
            pass

    def test_checkpoints_of_another_program(self, tmp_path):
        (tmp_path / "checkpoint-5").mkdir()
        with pytest.raises(InputError, match=r"no run\.json"), open_run(tmp_path, {}):
            pass
        assert (tmp_path / "checkpoint-5").exists()

    def test_another_number_of_processes(self, tmp_path):
        marker = {"step": 2, "processes": 4, "last": False, "files": {}}
        with open_run(tmp_path, {}):
            (tmp_path / "checkpoint-2").mkdir()
            (tmp_path / "checkpoint-2" / MARKER).write_text(json.dumps(marker))
        with pytest.raises(InputError, match="made by 4 processes, now there are 1") as caught:
            open_run(tmp_path, {}).__enter__()
        assert "Start 4 processes" in caught.value.advice

    def test_a_damaged_run_record(self, tmp_path):
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(InputError, match="damaged"), open_run(tmp_path, {}):
            pass

    def test_the_librarys_own_limit(self, tmp_path):
        with pytest.raises(ValueError, match="save_total_limit = 3: leave it None"):
            trained(tmp_path / "run", save_total_limit=3)

    def test_processes_that_have_not_met(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(RuntimeError, match="no process group yet"), open_run(tmp_path, {}):
            pass


def saved(output, step, state, keep, last=False):
    """Lets the callback complete a checkpoint of a run; the steps that stay."""
    (output / f"checkpoint-{step}" / "deep").mkdir(parents=True)
    (output / f"checkpoint-{step}" / "deep" / "file").write_text("x")
    args = transformers.TrainingArguments(output_dir=str(output), use_cpu=True, report_to=[])
    control = transformers.TrainerControl(should_training_stop=last)
    state.global_step = step
    CompleteCheckpoints(keep).on_save(args, state, control)
    return steps_kept(output)


class TestKept:
    def test_the_newest(self, tmp_path):
        state = TrainerState()
        kept = [saved(tmp_path, step, state, keep=2) for step in (5, 10, 15, 100)]
        assert kept == [[5], [5, 10], [10, 15], [15, 100]]

    @pytest.mark.parametrize("keep", [1, 2])
    def test_the_best_and_the_last_in_any_case(self, tmp_path, keep):
        state = TrainerState()
        saved(tmp_path, 5, state, keep)
        state.best_global_step = 5
        state.best_model_checkpoint = str(tmp_path / "checkpoint-5")
        assert saved(tmp_path, 10, state, keep) == [5, 10]
        assert saved(tmp_path, 15, state, keep) == [5, 15]
        state.best_global_step = 20
        state.best_model_checkpoint = str(tmp_path / "checkpoint-20")
        assert saved(tmp_path, 20, state, keep) == {1: [20], 2: [15, 20]}[keep]

    def test_the_best_of_a_folder_that_was_moved(self, tmp_path):
        state = TrainerState()
        saved(tmp_path, 5, state, 1)
        state.best_global_step = 5
        state.best_model_checkpoint = None  # what the library makes of a path that is gone
        assert saved(tmp_path, 10, state, 1) == [5, 10]

    def test_three_with_the_best_among_them(self, tmp_path):
        state = TrainerState()
        saved(tmp_path, 5, state, 3)
        state.best_global_step = 5
        kept = [saved(tmp_path, step, state, 3) for step in (10, 15, 20)]
        assert kept == [[5, 10], [5, 10, 15], [5, 15, 20]]

    def test_the_marker_names_every_file(self, tmp_path):
        saved(tmp_path, 5, TrainerState(), 1, last=True)
        marker = json.loads((tmp_path / "checkpoint-5" / MARKER).read_text())
        assert marker == {"step": 5, "processes": 1, "last": True, "files": {"deep/file": 1}}


class TestBest:
    def evaluated(self, folder, metrics, keep=1, saving=None, stop=None):
        """A run whose evaluations give these values of a metric, by step."""
        saving = saving or Saving(every=EVERY, keep=keep, best="score", greater_is_better=True)
        callbacks = saving.callbacks()
        pictures = folder.parent / "pictures"
        pictures.mkdir(exist_ok=True)
        rows = trl_toy.rows(pictures, 8)
        options = {**saving.arguments(), "max_steps": 8}
        weights = {}

        class Stop(Exception):
            pass

        class Watches(transformers.TrainerCallback):
            def on_save(self, args, state, control, model, **more):
                state_now = model.state_dict()
                weights[state.global_step] = {n: t.clone() for n, t in state_now.items()}

            def on_step_begin(self, args, state, control, **more):
                if state.global_step == stop:
                    raise Stop

        with open_run(folder, {}) as run:
            made = trl_toy.trainer(
                rows, folder, lora=lora(0.0), callbacks=[*callbacks, Watches()],
                eval_dataset=rows[:2], **options,
            )  # fmt: skip
            plain = made.evaluate

            def evaluate(**more):
                score = {"eval_score": metrics[made.state.global_step]}
                made.callback_handler.on_evaluate(
                    made.args, made.state, made.control, {**plain(**more), **score}
                )
                return score

            made.evaluate = evaluate
            try:
                train(made, run)
            except Stop:
                return None
        return made, weights

    def test_the_run_ends_with_the_best_weights(self, tmp_path):
        scores = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.2}
        made, weights = self.evaluated(tmp_path / "run", scores)
        assert steps_kept(tmp_path / "run") == [4, 8]
        for name, tensor in made.model.state_dict().items():
            assert torch.equal(tensor, weights[4][name])
        changed = [n for n in weights[4] if not torch.equal(weights[4][n], weights[8][n])]
        assert changed

    def test_resumed_after_its_last_step_too(self, tmp_path):
        scores = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.2}
        _, weights = self.evaluated(tmp_path / "run", scores)
        made, _ = self.evaluated(tmp_path / "run", scores)
        for name, tensor in made.model.state_dict().items():
            assert torch.equal(tensor, weights[4][name])

    def test_early_stopping_counts_on_after_a_resume(self, tmp_path):
        saving = Saving(
            every=EVERY, keep=1, best="score", greater_is_better=True, patience=2, min_gain=0.05
        )
        # 0.92 is no gain of 0.05, so the second evaluation without one is at step 6.
        scores = {2: 0.9, 4: 0.92, 6: 0.1, 8: 0.95}
        whole, _ = self.evaluated(tmp_path / "whole", scores, saving=saving)
        assert whole.state.global_step == 6
        assert self.evaluated(tmp_path / "run", scores, saving=saving, stop=5) is None
        made, _ = self.evaluated(tmp_path / "run", scores, saving=saving)
        assert made.state.global_step == 6
        again, _ = self.evaluated(tmp_path / "run", scores, saving=saving)
        assert again.state.global_step == 6


class TestSettings:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"every": 0}, "every = 0"),
            ({"keep": 0}, "keep = 0"),
            ({"patience": 0, "best": "loss"}, "patience = 0"),
            ({"min_gain": -1.0}, "min_gain = -1.0"),
            ({"patience": 3}, "give `best`"),
        ],
    )
    def test_refused(self, values, message):
        with pytest.raises(ValueError, match=message):
            Saving(**values)

    def test_no_evaluation_unless_asked_for(self):
        assert "eval_strategy" not in Saving().arguments()
        assert not Saving().evaluates
        assert Saving(best="loss").arguments()["eval_steps"] == 100


def test_an_error_of_the_first_process_reaches_the_caller():
    def fails():
        raise InputError("no", advice="yes")

    with pytest.raises(InputError, match="no"):
        gather.on_main(fails)
    assert gather.on_main(lambda: 3) == 3
