"""A stage over many records: resumed, in parts, in one piece: always the same lines."""

import itertools

import pytest

from data_tools.merging import merge_shards
from data_tools.records import Outcome, StageOutput, read_kind
from data_tools.stages import check_ids, pending, run_stage, tracked
from mmlm.errors import InputError
from mmlm.sharding import Shard

RECORDS = [{"id": f"r{n}", "value": n} for n in range(17)]


class Squares:
    """Works on several records at once and finishes them out of order."""

    kinds = ("squares",)

    def __init__(self, batch=3, stop_after=None):
        self.batch, self.left = batch, stop_after
        self.seen = []

    def process(self, records):
        source = iter(records)
        while batch := list(itertools.islice(source, self.batch)):
            for record in reversed(batch):
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left = None if self.left is None else self.left - 1
                self.seen.append(record["id"])
                odd = record["value"] % 2
                lines = {"squares": [{"id": record["id"], "square": record["value"] ** 2}]}
                yield Outcome(record["id"], "odd" if odd else "ok", {} if odd else lines)


def start(folder, **options):
    return StageOutput(folder, {"run": 1}, Squares.kinds, total=len(RECORDS), **options)


def squares(folder):
    return sorted(line["square"] for _, lines in read_kind(folder, "squares") for line in lines)


def test_every_record_once_and_statuses_counted(tmp_path):
    stage = Squares()
    assert run_stage(stage, RECORDS, start(tmp_path)) == {"ok": 9, "odd": 8}
    assert sorted(stage.seen) == sorted(record["id"] for record in RECORDS)
    assert squares(tmp_path) == [n * n for n in range(0, 17, 2)]


@pytest.mark.parametrize("stop_after", [0, 1, 4, 16])
def test_a_run_that_was_stopped_goes_on(tmp_path, stop_after):
    with pytest.raises(KeyboardInterrupt):
        run_stage(Squares(stop_after=stop_after), RECORDS, start(tmp_path))
    rest = Squares(batch=4)
    assert run_stage(rest, RECORDS, start(tmp_path)) == {"ok": 9, "odd": 8}
    assert len(rest.seen) == len(RECORDS) - stop_after
    assert squares(tmp_path) == [n * n for n in range(0, 17, 2)]
    again = Squares()
    run_stage(again, RECORDS, start(tmp_path))
    assert again.seen == []


@pytest.mark.parametrize("count", [1, 2, 4])
def test_acceptance_6_parts_of_a_stage_equal_the_whole(tmp_path, count):
    run_stage(Squares(), sorted(RECORDS, key=lambda r: r["id"]), start(tmp_path / "whole"))
    for index in range(count):
        stage = Squares()
        run_stage(stage, RECORDS, start(tmp_path / "parts", shard=Shard(index, count)))
        assert all(Shard(index, count).owns(one) for one in stage.seen)
    if count > 1:
        merge_shards(tmp_path / "parts")
    lines = [
        sorted((folder / "squares.jsonl").read_bytes().splitlines())
        for folder in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert lines[0] == lines[1]


def test_pending_leaves_out_other_shards_and_what_is_done(tmp_path):
    shard = Shard(1, 2)
    mine = [record for record in RECORDS if shard.owns(record["id"])]
    with start(tmp_path, shard=shard) as output:
        output.write([Outcome(mine[0]["id"], "ok")])
        assert pending(RECORDS, output) == mine[1:]


@pytest.mark.parametrize("identifier", [None, "", 7])
def test_ids_are_text(identifier):
    with pytest.raises(InputError, match=r"in\.jsonl, record 2: `id` must be text"):
        check_ids([{"id": "a"}, {"id": identifier}], "in.jsonl")


def test_ids_come_once(tmp_path):
    with pytest.raises(InputError, match="the id 'b' is there 2 times"):
        check_ids([{"id": one} for one in "abcb"], "in.jsonl")
    with pytest.raises(InputError, match="The input: the id 'r0'"):
        run_stage(Squares(), [*RECORDS, RECORDS[0]], start(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_bar_counts_statuses(capsys):
    with tracked(3, show=True) as advance:
        advance(2, "")
        advance(1, "no_pairs")
    assert "1 no_pairs" in capsys.readouterr().err
    with tracked(3, show=False) as advance:
        advance(1, "no_pairs")
    assert capsys.readouterr() == ("", "")
