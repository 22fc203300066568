"""How many conflict heads to prune: tuned on samples that did not find them, on a wired model."""

from __future__ import annotations

import conflict_toy as toy
import pytest
import torch

from decoding.conflict_heads import Measured, select
from decoding.conflict_runs import measure
from decoding.head_records import read_record
from mmlm import HeadAblation
from mmlm.cli import main
from mmlm.cli.calibrate import conflict_heads
from mmlm.cli.calibrate.conflict_heads import _lists_of_first, _Sweep

COMMAND = ("calibrate", "conflict-heads", "--score", "sum", "--protect_layers", "0", "--quiet")


@pytest.fixture(scope="module")
def wired():
    return toy.build()


@pytest.fixture
def asked(wired, monkeypatch):
    """The command on the wired model; which samples the tuning asked for."""
    found = []

    class Batches:
        def __init__(self, model, processor, *_):
            self.batches = toy.conflicts(processor)

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            return iter(self.batches)

        def only(self, numbers):
            found.append(list(numbers))
            return self

    monkeypatch.setattr(conflict_heads, "open_model", lambda *_: wired)
    monkeypatch.setattr(conflict_heads, "samples", lambda _: [])
    monkeypatch.setattr(conflict_heads, "Batches", Batches)
    return found


def test_the_command_tunes_on_the_half_that_did_not_find_the_heads(wired, asked, tmp_path):
    model, processor = wired
    path = tmp_path / "heads.json"
    assert main([*COMMAND, "--output", str(path)]) == 0
    record = read_record(path)
    assert (record.lists.image, record.lists.memory) == ((toy.IMAGE_HEAD,), (toy.MEMORY_HEAD,))
    halves = select(measure(model, toy.conflicts(processor), score="sum"))
    assert asked == [halves[1]]
    # Half of the answers follow memory: none without the memory head, all without the image head.
    assert record.sweep["plain"] == 0.5
    assert {share for _, share in record.sweep["image"]} == {0.0}
    assert {share for _, share in record.sweep["memory"]} == {1.0}
    assert record.fraction == {"image": 0.005, "memory": 0.005}


def test_attached_methods_act_while_heads_are_found(asked, tmp_path, capsys):
    method = "HeadAblation(heads_by_layer=((0, (4,)),))"  # without it nothing is remembered
    given = ("--output", str(tmp_path / "heads.json"), "--method", method)
    assert main([*COMMAND, *given]) == 2
    assert "Only 0 samples are left of 40" in " ".join(capsys.readouterr().err.split())


def test_attached_methods_act_while_heads_are_tried(wired):
    model, processor = wired
    memory = HeadAblation(heads_by_layer=((0, (4,)),))
    for methods, share in (((), 0.5), ((memory,), 0.0)):
        sweep = _Sweep(model, processor, methods, toy.conflicts(processor))
        assert sweep.share(()) == share


def test_fractions_are_of_all_heads(asked, wired, tmp_path):
    assert main([*COMMAND, "--output", str(tmp_path / "heads.json")]) == 0
    record = read_record(tmp_path / "heads.json")
    tried = []

    class Sweep(_Sweep):
        def share(self, heads):
            tried.append(len(heads))
            return 0.5 - 0.1 * len(heads)

    ranked = tuple((0, head) for head in range(3))
    big = Sweep(None, None, (), None).tuned(
        record.__class__(**{**vars(record), "shape": (8, 6)}), {"image": ranked, "memory": ()}
    )
    # Of 48 heads: 0.24, 0.48, 0.96, 1.44, 2.4, 3.36 and 4.8, at least one, at most all three.
    assert [share for _, share in big.sweep["image"]] == pytest.approx(
        [0.4, 0.4, 0.4, 0.4, 0.3, 0.2, 0.2]
    )
    assert tried == [0, 1, 2, 3]  # nothing is tried twice
    assert big.fraction == {"image": 0.07}


def test_heads_to_try_are_those_of_the_first_half():
    # In the first half head 0 pushes to the image and head 1 to memory, in the second it is turned.
    first = torch.tensor([[[1.0, -2.0]], [[1.1, -2.1]]]).repeat(4, 1, 1)
    pushes = torch.cat([first, -5 * first])
    plain = torch.tensor([1.0, 1, -1, -1]).repeat(4)
    samples = Measured(
        memory=torch.full((16,), 2),
        image=torch.full((16,), 1),
        plain=plain,
        among_ten=torch.ones(16, dtype=torch.bool),
        pushes=pushes,
        says=pushes,
        remembers=pushes,
        kinds=("k",) * 16,
        yes_no=(False,) * 16,
    )
    halves = (list(range(8)), list(range(8, 16)))
    found = _lists_of_first(samples, halves, {"protect_layers": 0})
    assert found == {"image": ((0, 1),), "memory": ((0, 0),)}  # pruned towards that side
