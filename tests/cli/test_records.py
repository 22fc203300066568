"""Append-only records: what survives a kill, and what is refused."""

import json
import os

import pytest

from mmlm.errors import InputError
from mmlm.records import RecordFile, file_hash, read_lines, run_record_path, write_json

RUN = {"model": "tiny", "methods": ["VHR(alpha=2.0)"], "information": {"version": 1}}


def write(path, records, run=RUN):
    with RecordFile(path, run) as file:
        file.append(records)


def test_lines_and_run_record(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, [{"id": "a", "text": "dög\u2028"}, {"id": 2}])
    assert path.read_text() == '{"id": "a", "text": "dög\u2028"}\n{"id": 2}\n'
    assert json.loads(run_record_path(path).read_text()) == RUN
    assert read_lines(path) == [{"id": "a", "text": "dög\u2028"}, {"id": 2}]


def test_nothing_is_written_before_the_with_block(tmp_path):
    RecordFile(tmp_path / "out.jsonl", RUN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", range(1, 12))
def test_a_half_last_line_is_dropped_wherever_it_was_cut(tmp_path, keep):
    path = tmp_path / "out.jsonl"
    write(path, [{"id": "a"}])
    whole = path.read_bytes()
    path.write_bytes(whole + '{"id": "bé"}'.encode()[:keep])
    records = RecordFile(path, RUN)
    assert list(records.done) == ["a"]
    with records:
        assert path.read_bytes() == whole
        records.append([{"id": "c"}])
    assert [record["id"] for record in read_lines(path)] == ["a", "c"]


def test_done_grows_and_twice_is_refused(tmp_path):
    with RecordFile(tmp_path / "out.jsonl", RUN) as file:
        file.append([{"id": "a"}])
        assert list(file.done) == ["a"]
        with pytest.raises(ValueError, match="'a' was already written"):
            file.append([{"id": "a"}])


def test_append_returns_when_the_lines_are_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    synced = []
    with RecordFile(path, RUN) as file:
        monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_text()))
        file.append([{"id": "a"}, {"id": "b"}])
    assert synced == ['{"id": "a"}\n{"id": "b"}\n']


def test_append_outside_the_block(tmp_path):
    with pytest.raises(ValueError, match="inside"):
        RecordFile(tmp_path / "out.jsonl", RUN).append([{"id": "a"}])


class TestRefusals:
    def refused(self, path, run, *words):
        before = {p: p.read_bytes() for p in path.parent.iterdir()}
        with pytest.raises(InputError) as caught:
            RecordFile(path, run).__enter__()
        assert {p: p.read_bytes() for p in path.parent.iterdir()} == before
        for word in words:
            assert word in str(caught.value)
        assert caught.value.advice

    def test_another_run(self, tmp_path):
        path = tmp_path / "out.jsonl"
        write(path, [{"id": "a"}])
        self.refused(path, RUN | {"methods": []}, "methods was ['VHR(alpha=2.0)'], now []")
        self.refused(path, RUN | {"more": 1}, "more was None, now 1")

    def test_information_is_not_compared(self, tmp_path):
        path = tmp_path / "out.jsonl"
        write(path, [{"id": "a"}])
        assert list(RecordFile(path, RUN | {"information": {"version": 2}}).done) == ["a"]

    def test_no_run_record(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("irreplaceable")
        self.refused(tmp_path / "thesis.txt", RUN, "without its run record")

    def test_damaged_line(self, tmp_path):
        path = tmp_path / "out.jsonl"
        write(path, [{"id": "a"}])
        path.write_bytes(path.read_bytes() + b'{"id": \n{"id": "c"}\n')
        self.refused(path, RUN, "line 2 is no JSON")

    def test_the_same_id_twice(self, tmp_path):
        path = tmp_path / "out.jsonl"
        write(path, [{"id": "a"}])
        path.write_bytes(path.read_bytes() * 2)
        self.refused(path, RUN, "line 2", "'a'", "twice")

    def test_two_writers(self, tmp_path):
        path = tmp_path / "out.jsonl"
        with RecordFile(path, RUN) as file:
            self.refused(path, RUN, "Another process")
            file.append([{"id": "a"}])
        assert list(RecordFile(path, RUN).done) == ["a"]

    def test_folder(self, tmp_path):
        with pytest.raises(InputError, match="no regular file"):
            RecordFile(tmp_path, RUN)
        with pytest.raises(InputError, match="no folder"):
            RecordFile(tmp_path / "none" / "out.jsonl", RUN)


def test_facts_known_later_belong_to_the_run(tmp_path):
    path = tmp_path / "out.jsonl"
    records = RecordFile(path, RUN)
    records.add_facts({"weights": "w1"})
    with records:
        records.append([{"id": "a"}])
    again = RecordFile(path, RUN)  # the weights are not known yet: no refusal
    assert list(again.done) == ["a"]
    with pytest.raises(InputError, match="weights was w1, now w2"):
        again.add_facts({"weights": "w2"})


def test_an_empty_file_is_nobody_s(tmp_path):
    path = tmp_path / "out.jsonl"
    path.touch()
    write_json(run_record_path(path), {"model": "another"})
    write(path, [{"id": "a"}])
    assert json.loads(run_record_path(path).read_text()) == RUN


def test_read_lines(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": 1}\n\n[2]\n')
    with pytest.raises(InputError, match="line 3 is a list"):
        read_lines(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="no UTF-8"):
        read_lines(path)


def test_file_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == (
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
