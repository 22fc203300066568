"""What a stage leaves on the disk: nothing lost, nothing twice, nothing of another run."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from data_tools.done import finished
from data_tools.merging import merge_shards
from data_tools.records import Outcome, StageOutput, read_kind
from mmlm.errors import InputError
from mmlm.sharding import Shard

RUN = {"command": "data scripted", "seed": 0}
KINDS = ("pairs", "images")
WHOLE = Shard()


def outcome(number, pairs=2, status="ok"):
    lines = {
        "pairs": [{"id": f"r{number}-{k}", "text": f"é {number}"} for k in range(pairs)],
        "images": [{"image_id": f"r{number}"}],
    }
    return Outcome(f"r{number}", status, lines, seconds=0.25)


def fill(folder, numbers, shard=WHOLE, **options):
    with StageOutput(folder, RUN, KINDS, shard, **options) as output:
        output.write([outcome(number, pairs=number % 3) for number in numbers])


def texts(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out"


def test_nothing_is_written_before_the_block(folder):
    output = StageOutput(folder, RUN, KINDS)
    assert not folder.exists()
    with pytest.raises(ValueError, match="inside `with output:`"):
        output.write([outcome(1)])


def test_lines_by_kind_and_the_last_word(folder):
    fill(folder, [2, 0])
    assert json.loads((folder / "run.json").read_text()) == RUN
    assert texts(folder)["done.jsonl"].decode() == (
        '{"id": "r2", "status": "ok", "seconds": 0.25, "lines": {"pairs": 2, "images": 1}}\n'
        '{"id": "r0", "status": "ok", "seconds": 0.25, "lines": {"pairs": 0, "images": 1}}\n'
    )
    read = dict(read_kind(folder, "pairs"))
    assert [line["id"] for line in read["r2"]] == ["r2-0", "r2-1"]
    assert read["r0"] == []
    output = StageOutput(folder, RUN, KINDS)
    assert output.done == {"r2": "ok", "r0": "ok"}
    assert [line["id"] for line in output.lines("pairs")] == ["r2-0", "r2-1"]


@pytest.mark.parametrize("half", ["pairs", "images", "done"])
def test_a_half_line_is_dropped(folder, half):
    fill(folder, [1, 2])
    before = texts(folder)
    with (folder / f"{half}.jsonl").open("ab") as stream:
        stream.write(b'{"id": "r7", "sta')
    fill(folder, [])
    assert texts(folder) == before


def test_lines_without_their_done_line_are_dropped(folder):
    fill(folder, [1, 2])
    before = texts(folder)
    with (folder / "pairs.jsonl").open("ab") as stream:
        stream.write(b'{"id": "r7-0"}\n{"id": "r7-1"}\n{"id": "r')
    # Readers leave them out, too.
    assert [key for key, _ in read_kind(folder, "pairs")] == ["r1", "r2"]
    fill(folder, [])
    assert texts(folder) == before
    fill(folder, [7])
    assert [len(lines) for _, lines in read_kind(folder, "pairs")] == [1, 2, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_done_line_before_its_lines_is_damage(folder, kind):
    """No kill leaves that: lines are synced first."""
    fill(folder, [1, 2])
    lines = (folder / f"{kind}.jsonl").read_bytes().splitlines(keepends=True)
    (folder / f"{kind}.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(InputError, match="fewer lines than done counts"):
        fill(folder, [])
    with pytest.raises(InputError, match="fewer lines than done counts"):
        list(read_kind(folder, kind))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json\n", "line 3 is no JSON"),
        (b'{"id": "\xff"}\n', "line 3 is no JSON"),
        (b"[1]\n", "line 3 is no JSON object"),
        (b'{"id": "r9"}\n', "line 3 does not say which record is done"),
        (b'{"id": 9, "status": "ok", "lines": {}}\n', "line 3 does not say"),
        (b'{"id": "r1", "status": "ok", "lines": {}}\n', "second time that 'r1' is done"),
    ],
)
def test_a_done_file_changed_by_hand_is_refused(folder, line, message):
    fill(folder, [1, 2])
    with (folder / "done.jsonl").open("ab") as stream:
        stream.write(line)
    with pytest.raises(InputError, match=message):
        StageOutput(folder, RUN, KINDS)


def test_a_line_changed_by_hand_is_refused(folder):
    fill(folder, [1, 2])
    path = folder / "pairs.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"id": "r2-0"', b'{"id": r2-0"'))
    with pytest.raises(InputError, match=r"pairs.jsonl' is damaged: line 2 is no JSON"):
        list(read_kind(folder, "pairs"))


def test_an_unknown_kind(folder):
    with (
        StageOutput(folder, RUN, ("pairs",)) as output,
        pytest.raises(ValueError, match="no lines of kind 'images'"),
    ):
        output.write([outcome(1)])
    with pytest.raises(InputError, match="no lines of the kind 'captions'"):
        list(read_kind(folder, "captions"))


def test_a_record_is_done_once(folder):
    with StageOutput(folder, RUN, KINDS) as output:
        output.write([outcome(1)])
        assert output.done == {"r1": "ok"}
        with pytest.raises(ValueError, match="'r1' is done already"):
            output.write([outcome(1)])
    with pytest.raises(ValueError, match="'r1' is done already"):
        fill(folder, [1])
    with pytest.raises(ValueError, match="'r2' is done already"):
        fill(folder, [2, 2])


def test_another_run_is_refused_and_says_what_differs(folder):
    fill(folder, [1])
    with pytest.raises(InputError, match="seed was 0, now 1") as error:
        StageOutput(folder, {**RUN, "seed": 1}, KINDS)
    assert "--resume_anyway" in error.value.advice
    output = StageOutput(folder, RUN, KINDS)
    output.add_facts({})
    with pytest.raises(InputError, match="weights was None, now sha"):
        output.add_facts({"weights": "sha"})


def test_information_is_not_compared(folder):
    fill(folder, [1])
    assert StageOutput(folder, {**RUN, "information": {"host": "b"}}, KINDS).done == {"r1": "ok"}


def test_resume_anyway_goes_on_under_the_old_record(folder):
    fill(folder, [1])
    with StageOutput(folder, {**RUN, "seed": 1}, KINDS, resume_anyway=True) as output:
        assert output.done == {"r1": "ok"}
        output.write([outcome(2)])
    assert json.loads((folder / "run.json").read_text()) == RUN


def test_overwrite_removes_what_the_stage_wrote_and_nothing_else(folder):
    fill(folder, [1])
    fill(folder, [], Shard(0, 2))
    (folder / "notes.txt").write_text("mine")
    fill(folder, [2], overwrite=True)
    assert [line["id"] for line in finished(folder / "done.jsonl")] == ["r2"]
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        *("run.json", "done.jsonl", "pairs.jsonl", "images.jsonl", "notes.txt")
    }


def test_overwrite_of_one_shard_keeps_its_siblings(folder):
    """All shards of a run are started with the same options, at once or one after the other."""
    fill(folder, [1, 5])
    numbers = {i: [n for n in range(12) if Shard(i, 2).owns(f"r{n}")] for i in (0, 1)}
    fill(folder, numbers[0], Shard(0, 2), overwrite=True)
    assert not (folder / "done.jsonl").exists()
    fill(folder, numbers[1], Shard(1, 2), overwrite=True)
    assert merge_shards(folder)["done"] == 12
    with StageOutput(folder, {**RUN, "seed": 3}, KINDS, Shard(0, 2), overwrite=True) as output:
        assert output.done == {}
    assert json.loads((folder / "run.json").read_text())["seed"] == 3
    assert not (folder / "done.shard-1-of-2.jsonl").exists()
    assert not (folder / "done.jsonl").exists()


def test_two_processes_on_one_output(folder):
    with StageOutput(folder, RUN, KINDS) as first:
        first.write([outcome(1)])
        with pytest.raises(InputError, match="Another process is writing"):
            fill(folder, [2])
        with pytest.raises(InputError, match="Another process is writing"):
            fill(folder, [2], overwrite=True)
        first.write([outcome(3)])
        with StageOutput(folder, RUN, KINDS, Shard(1, 2)):
            pass  # another part is another file
    assert [line["id"] for line in finished(folder / "done.jsonl")] == ["r1", "r3"]


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_run_record(folder, content):
    fill(folder, [1])
    (folder / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json' is damaged"):
        StageOutput(folder, RUN, KINDS)
    fill(folder, [2], overwrite=True)
    assert StageOutput(folder, RUN, KINDS).done == {"r2": "ok"}


def test_a_missing_run_record(folder):
    fill(folder, [1])
    (folder / "run.json").unlink()
    with pytest.raises(InputError, match=r"has no run\.json"):
        StageOutput(folder, RUN, KINDS)


def test_the_output_is_a_file(folder):
    folder.write_text("x")
    with pytest.raises(InputError, match="is no folder"):
        StageOutput(folder, RUN, KINDS)


class Full:
    """A stream whose disk has room for so many more bytes, then none: a short write."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def write(self, data):
        os.write(self.stream.fileno(), data[: self.room])
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name):
        return getattr(self.stream, name)


@pytest.mark.parametrize("kind", [*KINDS, "done"])
@pytest.mark.parametrize("room", [0, 1, 12, 18])
def test_a_full_disk_in_the_middle_of_a_write(folder, kind, room):
    with StageOutput(folder, RUN, KINDS) as output:
        output.write([outcome(1)])
        output._streams[kind] = Full(output._streams[kind], room)
        with pytest.raises(OSError, match="No space left"):
            output.write([outcome(2, pairs=3)])
        assert "r2" not in output.done
        # Going on would give these lines to another record.
        with pytest.raises(ValueError, match="an earlier write failed"):
            output.write([outcome(3)])
    with StageOutput(folder, RUN, KINDS) as output:
        assert output.done == {"r1": "ok"}
        output.write([outcome(2, pairs=3)])
        output.write([outcome(3)])
    with StageOutput(folder.with_name("whole"), RUN, KINDS) as output:
        output.write([outcome(1), outcome(2, pairs=3), outcome(3)])
    assert texts(folder) == texts(folder.with_name("whole"))


def test_a_line_that_is_no_json_loses_nothing(folder):
    wrong = Outcome("r2", "ok", {"pairs": [{"id": "r2-0"}], "images": [{"score": float("nan")}]})
    with StageOutput(folder, RUN, KINDS) as output:
        output.write([outcome(1)])
        with pytest.raises(ValueError, match="JSON compliant"):
            output.write([wrong])
    fill(folder, [3])
    assert [key for key, _ in read_kind(folder, "pairs")] == ["r1", "r3"]
    assert [line["id"] for line in StageOutput(folder, RUN, KINDS).lines("pairs")][:2] == [
        *("r1-0", "r1-1")
    ]


# --- killed ------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from data_tools.records import Outcome, StageOutput
from data_tools.stages import run_stage

class Script:
    kinds = ("pairs", "images")

    def process(self, records):
        for record in records:
            n = int(record["id"][1:])
            pairs = [{"id": f"r{n}-{k}", "text": "x" * (n * 37 % 5000)} for k in range(n % 4)]
            yield Outcome(record["id"], "ok" if n % 4 else "no_pairs",
                          {"pairs": pairs, "images": [{"image_id": record["id"]}]})

records = [{"id": f"r{n}"} for n in range(int(sys.argv[2]))]
output = StageOutput(Path(sys.argv[1]), {"run": 1}, Script.kinds, total=len(records))
print(run_stage(Script(), records, output))
"""


def test_acceptance_6_killed_at_ten_random_moments(folder):
    """kill -9, resumed: equal to the uninterrupted run, byte by byte, after sorting."""
    chosen = random.Random()  # any moment must do, so it is another one every time
    total, kills = "400", 0
    done = folder / "done.jsonl"
    for _ in range(10):
        before = done.stat().st_size if done.exists() else 0
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), total], stdout=subprocess.DEVNULL
        )
        give_up = time.monotonic() + 120
        while writer.poll() is None and time.monotonic() < give_up:
            if done.exists() and done.stat().st_size > before:
                break
        time.sleep(chosen.uniform(0.0, 0.03))
        writer.send_signal(signal.SIGKILL)
        kills += writer.wait() == -signal.SIGKILL
    assert kills >= 5, "the run is too short to be interrupted"
    for target in (folder, folder.with_name("whole")):
        subprocess.run(
            [sys.executable, "-c", WRITER, str(target), total], check=True, capture_output=True
        )
    killed, whole = texts(folder), texts(folder.with_name("whole"))
    assert killed.keys() == whole.keys() == {"done.jsonl", "images.jsonl", "pairs.jsonl"}
    for name in ("images.jsonl", "pairs.jsonl"):
        assert sorted(killed[name].splitlines()) == sorted(whole[name].splitlines())
    statuses = [
        {line["id"]: (line["status"], line["lines"]) for line in finished(target / "done.jsonl")}
        for target in (folder, folder.with_name("whole"))
    ]
    assert statuses[0] == statuses[1]
    assert len(statuses[0]) == int(total)
