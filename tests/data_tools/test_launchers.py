"""One process per GPU: a launcher's processes divide a run among themselves, and it is merged."""

import subprocess
import sys

import pytest

from data_tools.merging import merge_shards
from mmlm.cli import main

SCRIPT = """
import sys
from pathlib import Path

from data_tools.records import Outcome, StageOutput
from data_tools.stages import run_stage
from mmlm.sharding import this_shard

class Halves:
    kinds = ("halves",)

    def process(self, records):
        for record in records:
            line = {"id": record["id"], "half": record["value"] / 2}
            yield Outcome(record["id"], "ok", {"halves": [line]})

records = [{"id": f"r{n}", "value": n} for n in range(50)]
folder, shard = Path(sys.argv[1]), this_shard()
output = StageOutput(folder, {"run": 1}, Halves.kinds, shard, total=50, overwrite=True)
run_stage(Halves(), records, output)
"""


def torchrun(*arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=400)


def lines(folder):
    return {
        path.name: sorted(path.read_bytes().splitlines())
        for path in folder.glob("*.jsonl")
        if "shard" not in path.name and "done" not in path.name
    }


@pytest.mark.slow
def test_acceptance_6_processes_of_torchrun_equal_one_process(tmp_path):
    """All of them with the same options, --overwrite included, which clears nobody's work."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, script, tmp_path / "plain"], check=True)
    torchrun(script, tmp_path / "two")
    torchrun(script, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "two").glob("done*"))
    assert names == ["done.shard-0-of-2.jsonl", "done.shard-1-of-2.jsonl"]
    assert merge_shards(tmp_path / "two") == {"halves": 50, "done": 50}
    assert lines(tmp_path / "two") == lines(tmp_path / "plain")


@pytest.mark.slow
def test_acceptance_6_sentinel_under_torchrun_equals_one_process(tmp_path):
    """The real command on the embedded model: sampled sentences do not depend on the division."""
    options = ["data", "sentinel", "--config", "data/world_sentinel", "--world.count", "4"]
    options += ["--settings.max_sentences", "2", "--quiet"]
    assert main([*options, "--output", str(tmp_path / "plain")]) == 0
    torchrun("-m", "mmlm", *options, "--output", tmp_path / "two")
    assert main(["data", "merge", str(tmp_path / "two")]) == 0
    assert lines(tmp_path / "two") == lines(tmp_path / "plain")
    assert lines(tmp_path / "plain")["pairs.jsonl"]
