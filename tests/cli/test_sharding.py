"""Parts of a run: which record belongs where, launchers, and putting them together."""

import json

import pytest

from mmlm.errors import InputError
from mmlm.records import RecordFile
from mmlm.sharding import Shard, merge, this_shard

RUN = {"command": "bench x", "data": {"seed": 0}}
ORDER = [f"q{n}" for n in range(20)]


def write(path, shard, identifiers):
    with RecordFile(shard.path(path), {**RUN, "shard": str(shard)}) as records:
        records.append([{"id": one, "text": f"answer {one}"} for one in identifiers])


def test_every_record_is_in_one_part():
    for count in (1, 2, 3, 7):
        parts = [{one for one in ORDER if Shard(i, count).owns(one)} for i in range(count)]
        assert sorted(one for part in parts for one in part) == sorted(ORDER)


def test_the_rule_is_crc32():
    # crc32("q0") = 0x8D8F7D0B by the standard's table, computed with another program.
    import binascii

    assert Shard(binascii.crc32(b"q0") % 5, 5).owns("q0")


@pytest.mark.parametrize("text", ["1", "4/4", "-1/4", "a/b", "0/0", "1/4/2", "0.5/2"])
def test_a_wrong_part_is_refused(text):
    with pytest.raises(InputError, match="--shard does not take") as error:
        this_shard(text)
    assert "0/4 ... 3/4" in error.value.advice


def test_a_launcher_divides_the_run(monkeypatch):
    assert this_shard() == Shard(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert this_shard() == Shard(2, 4)
    with pytest.raises(InputError, match="launcher has started 4 processes"):
        this_shard("0/2")


def test_one_process_under_a_launcher_is_no_part(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert this_shard("1/2") == Shard(1, 2)


def test_impossible_parts():
    for index, count in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="0 <= i < n"):
            Shard(index, count)


def test_merged_parts_equal_the_whole_run(tmp_path):
    whole = tmp_path / "whole.jsonl"
    with RecordFile(whole, RUN) as records:
        records.append([{"id": one, "text": f"answer {one}"} for one in ORDER])
    parted = tmp_path / "parted.jsonl"
    for index in (2, 0, 1):
        shard = Shard(index, 3)
        _, unfinished = merge(parted, 3, RUN, ORDER)
        assert index in unfinished
        assert not parted.exists()
        write(parted, shard, [one for one in ORDER if shard.owns(one)])
    records, unfinished = merge(parted, 3, RUN, ORDER)
    assert unfinished == []
    assert list(records.done) == ORDER
    assert parted.read_bytes() == whole.read_bytes()
    again, unfinished = merge(parted, 3, RUN, ORDER)
    assert (list(again.done), unfinished) == (ORDER, [])


def test_a_part_of_another_run_is_refused(tmp_path):
    whole = tmp_path / "whole.jsonl"
    for index in range(2):
        shard = Shard(index, 2)
        write(whole, shard, [one for one in ORDER if shard.owns(one)])
    with pytest.raises(InputError, match=r"belongs to another run: data\.seed was 0, now 1"):
        merge(whole, 2, {**RUN, "data": {"seed": 1}}, ORDER)
    assert not whole.exists()


def test_a_part_under_another_number_is_refused(tmp_path):
    whole = tmp_path / "whole.jsonl"
    write(whole, Shard(0, 2), [one for one in ORDER if Shard(0, 2).owns(one)])
    Shard(0, 2).path(whole).rename(Shard(1, 2).path(whole))
    record = "{}.run.json"
    name = record.format(Shard(0, 2).path(whole).name)
    (tmp_path / name).rename(tmp_path / record.format(Shard(1, 2).path(whole).name))
    with pytest.raises(InputError, match=r"shard was 0/2, now 1/2"):
        merge(whole, 2, RUN, ORDER)


class TestOrder:
    """Records that come before their turn."""

    def run(self, path, batches, order=ORDER):
        with RecordFile(path, RUN) as records:
            records.in_order(order)
            for batch in batches:
                records.append([{"id": one} for one in batch if one not in records.done])
            return records

    def test_the_file_is_in_order_whatever_comes_first(self, tmp_path):
        path = tmp_path / "out.jsonl"
        records = self.run(path, [ORDER[5:], ORDER[2:5], ORDER[:2]])
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ORDER
        assert list(records.done) == ORDER
        assert not path.with_name("out.jsonl.early").exists()

    def test_what_waits_survives(self, tmp_path):
        path = tmp_path / "out.jsonl"
        self.run(path, [ORDER[10:], ORDER[1:3]])
        assert path.read_bytes() == b""
        journal = path.with_name("out.jsonl.early")
        with journal.open("ab") as stream:
            stream.write(b'{"id": "q')  # a kill in the middle of a line
        assert set(RecordFile(path, RUN).done) == {*ORDER[10:], *ORDER[1:3]}
        self.run(path, [[ORDER[0]]])
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ORDER[:3]
        self.run(path, [ORDER[3:10]])
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ORDER

    def test_a_kill_between_file_and_journal_doubles_nothing(self, tmp_path):
        path = tmp_path / "out.jsonl"
        self.run(path, [ORDER[1:4]])
        journal = path.with_name("out.jsonl.early")
        waiting = journal.read_bytes()
        self.run(path, [[ORDER[0]]])
        journal.write_bytes(waiting)  # as if the process had died before it removed the journal
        self.run(path, [ORDER[4:]])
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ORDER

    def test_a_file_in_another_order_is_refused(self, tmp_path):
        path = tmp_path / "out.jsonl"
        with RecordFile(path, RUN) as records:
            records.append([{"id": "q1"}])
        with pytest.raises(InputError, match="not in the order of the data set"):
            RecordFile(path, RUN).in_order(ORDER)
