"""Two processes under DeepSpeed: reference cache, checkpoint and export lose nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_toy
from peft import PeftModel
from tiny import build

from mmlm.model.checkpoint import load, save
from training.export import export
from training.stored import find_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
CASES = ("2-lora", "3-lora", "3-full")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    save(*build("llava"), folder / "model")
    (folder / "data.json").write_text(json.dumps(trl_toy.rows(folder)))
    return folder


@pytest.fixture(scope="module", params=CASES)
def done(request, work):
    """The run of one case, made by two processes."""
    stage, kind = request.param.split("-")
    script = Path(__file__).with_name("sharded_process.py")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(free_port()), str(script), str(work), stage, kind),
    ]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return work / f"zero{stage}-{kind}", kind


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


def test_losses_are_those_of_one_process_without_a_cache(done, work, tmp_path):
    from saving_process import lora

    run, kind = done
    data = json.loads((work / "data.json").read_text())
    options = {"lora": lora(0.0)} if kind == "lora" else {"ref_model": load(work / "model")[0]}
    plain = trl_toy.trainer(data, tmp_path, **options)
    plain.train()
    losses = json.loads((run / "finished.json").read_text())["losses"]
    assert losses == pytest.approx(trl_toy.losses(plain).tolist(), abs=1e-4)


def test_each_process_stored_its_share(done):
    run, kind = done
    parts = sorted(run.parent.glob(f"cache-{kind}-{run.name[4]}/part-*.jsonl"))
    assert [part.name for part in parts] == ["part-0-of-2.jsonl", "part-1-of-2.jsonl"]
    assert [len(part.read_text().splitlines()) for part in parts] == [3, 3]


def test_the_checkpoint_is_complete(done):
    run, _ = done
    marker = json.loads((run / "checkpoint-3" / "complete.json").read_text())
    assert (marker["processes"], marker["last"]) == (2, True)
    assert sum(name.endswith("optim_states.pt") for name in marker["files"]) == 2
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"]


def test_the_export_is_whole_and_what_the_checkpoint_holds(done, work, tmp_path):
    run, kind = done
    found = find_checkpoint(run)
    model, processor = found.load(str(work / "model") if kind == "lora" else "")
    what = {"lora": "merged", "full": "model"}[kind]
    export(model, processor, tmp_path / what, what)
    exported = load(run / what)[0].state_dict()
    same(exported, load(tmp_path / what)[0].state_dict())
    untrained = load(work / "model")[0].state_dict()
    assert any(not torch.equal(exported[name], untrained[name]) for name in exported)


def test_the_adapter_is_whole(done, work):
    run, kind = done
    if kind == "full":
        assert not (run / "adapter").exists()
        return
    model = PeftModel.from_pretrained(load(work / "model")[0], run / "adapter")
    same(model.merge_and_unload().state_dict(), load(run / "merged")[0].state_dict())


def test_a_checkpoint_of_shards_alone(done, tmp_path):
    """As ZeRO-3 leaves it when it is not told to gather the weights."""
    run, kind = done
    if kind == "lora":  # PEFT's file is gathered, whatever it is told
        assert (run / "checkpoint-3" / "adapter_model.safetensors").exists()
        return
    shutil.copytree(run / "checkpoint-3", tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    model, _ = find_checkpoint(tmp_path / "shards").load()
    same(model.state_dict(), load(run / "model")[0].state_dict())
