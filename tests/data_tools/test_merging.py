"""Shards put together: equal to the run in one piece, or refused with what is missing."""

import json
import tracemalloc

import pytest

from data_tools.merging import merge_shards
from data_tools.records import Outcome, StageOutput, read_kind
from mmlm.errors import InputError
from mmlm.sharding import Shard

RUN = {"seed": 0}
KINDS = ("pairs", "images")
IDS = [f"p{n}" for n in range(40)]


WHOLE = Shard()


def run(folder, shard=WHOLE, ids=IDS):
    with StageOutput(folder, RUN, KINDS, shard, total=len(IDS)) as output:
        for one in ids:
            if shard.owns(one):
                pairs = [{"id": f"{one}-{k}", "text": "ü" * k} for k in range(int(one[1:]) % 4)]
                output.write([Outcome(one, "ok", {"pairs": pairs, "images": [{"id": one}]})])


@pytest.fixture
def shards(tmp_path):
    for index in range(4):
        run(tmp_path / "parts", Shard(index, 4))
    return tmp_path / "parts"


def test_acceptance_6_one_shard_is_the_union_of_four(tmp_path, shards):
    run(tmp_path / "whole", ids=sorted(IDS))
    counts = merge_shards(shards)
    assert counts == {"images": 40, "pairs": 60, "done": 40}
    for kind in (*KINDS, "done"):
        name = f"{kind}.jsonl"
        assert (shards / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert list(read_kind(shards, "pairs")) == list(read_kind(tmp_path / "whole", "pairs"))
    # The merged folder counts as one finished run.
    assert len(StageOutput(shards, RUN, KINDS).done) == 40


def test_merging_twice_gives_the_same(shards):
    merge_shards(shards)
    before = {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()}
    merge_shards(shards)
    assert {p.name: p.read_bytes() for p in shards.iterdir() if p.is_file()} == before


def test_a_kind_without_lines_gets_its_empty_file(tmp_path):
    for index in range(2):
        with StageOutput(tmp_path, RUN, KINDS, Shard(index, 2)) as output:
            output.write([Outcome(one, "no_pairs") for one in IDS if Shard(index, 2).owns(one)])
    assert merge_shards(tmp_path) == {"images": 0, "pairs": 0, "done": 40}
    assert [lines for _, lines in read_kind(tmp_path, "pairs")] == [[]] * 40


def test_no_shards(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(InputError, match="holds no shards"):
        merge_shards(tmp_path / "whole")
    with pytest.raises(InputError, match="holds no shards"):
        merge_shards(tmp_path / "absent")


def test_shards_of_several_divisions(shards):
    run(shards, Shard(0, 3))
    with pytest.raises(InputError, match=r"several divisions \(\[3, 4\]\)"):
        merge_shards(shards)


def test_missing_shards_are_named(shards):
    for index in (1, 3):
        (shards / f"done.shard-{index}-of-4.jsonl").unlink()
    with pytest.raises(InputError, match="lacks the shards 1/4, 3/4"):
        merge_shards(shards)


def test_unfinished_shards_are_counted(tmp_path):
    for index in range(2):
        run(tmp_path, Shard(index, 2), ids=IDS[: 20 if index else 40])
    with pytest.raises(InputError, match=r"\d+ of 40 records") as error:
        merge_shards(tmp_path)
    left = [one for one in IDS[20:] if Shard(1, 2).owns(one)]
    assert f"{40 - len(left)} of 40 records" in str(error.value)
    assert "0/2 has" in str(error.value)
    assert not (tmp_path / "done.jsonl").exists()


def test_a_shard_at_work(shards):
    with (
        StageOutput(shards, RUN, KINDS, Shard(2, 4), total=40),
        pytest.raises(InputError, match=r"shard 2/4 .* still at work"),
    ):
        merge_shards(shards)


def test_a_shard_that_lost_lines(shards):
    path = shards / "pairs.shard-2-of-4.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match="fewer lines than done counts"):
        merge_shards(shards)
    assert not (shards / "done.jsonl").exists()
    assert not list(shards.glob(".*.tmp"))


def test_a_record_in_the_wrong_shard(shards):
    line = {"id": "p0", "status": "ok", "seconds": 0, "lines": {}}
    wrong = next(i for i in range(4) if not Shard(i, 4).owns("p0"))
    with (shards / f"done.shard-{wrong}-of-4.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="'p0', which belongs to another shard"):
        merge_shards(shards)


def test_without_a_run_record(shards):
    (shards / "run.json").unlink()
    with pytest.raises(InputError, match=r"run record .* cannot be read"):
        merge_shards(shards)


def test_lines_are_not_held_in_memory(tmp_path):
    text = "x" * 50_000
    for index in range(2):
        with StageOutput(tmp_path, RUN, ("pairs",), Shard(index, 2)) as output:
            for n in range(400):
                if Shard(index, 2).owns(f"p{n}"):
                    output.write([Outcome(f"p{n}", "ok", {"pairs": [{"text": text}]})])
    tracemalloc.start()
    merge_shards(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "pairs.jsonl").stat().st_size > 20_000_000
    assert peak < 2_000_000
