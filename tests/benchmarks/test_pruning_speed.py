"""The benchmark of pruned first passes counts the operations that really run."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import pruning_speed
from benchmarks.speed_model import Shape, build_model
from mmlm import FlowCut, attach

SMALL = Shape(layers=4, width=64, heads=4, intermediate=96, tower=(5, 32, 2), side=56)


@pytest.mark.parametrize(
    "method", [None, FlowCut(target=6), FlowCut(target=6, llm_layer=1, llm_target=4)]
)
def test_operations_are_those_that_run(method):
    model = build_model(SMALL)
    model.set_attn_implementation("eager")
    run = pruning_speed._Run(model, 2)
    methods = () if method is None else (method,)
    counted = run.operations(methods, causal=False)
    with torch.no_grad(), attach(model, *methods), FlopCounterMode(display=False) as counter:
        model(**run.inputs, use_cache=True, logits_to_keep=1)
    # Rows that scores are made of come on top.
    assert counted <= counter.get_total_flops() <= 1.01 * counted


def test_a_run_writes_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(pruning_speed, "SHAPE", SMALL)
    cases = (
        pruning_speed.Case("16 -> 4", 1, FlowCut(target=4), 1.0),
        pruning_speed.Case("32 -> 4", 2, FlowCut(target=4, llm_layer=1, llm_target=4), 1.0),
    )
    monkeypatch.setattr(pruning_speed, "measure", lambda m, repeats: measured(m, cases, repeats))
    output = tmp_path / "found.json"
    pruning_speed.main(["--repeats", "1", "--output", str(output)])
    rows = json.loads(output.read_text())["first passes"]
    assert [row["case"] for row in rows] == ["16 -> 4", "32 -> 4"]
    assert all(
        row["predicted"] > 1 and row["bar"] == pytest.approx(row["predicted"] / 2, abs=1e-3)
        for row in rows
    )


measured = pruning_speed.measure
