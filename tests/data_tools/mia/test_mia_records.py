"""Lines of the stages: joined by id, checked, shuffled, merged."""

import json

import pytest

from data_tools.mia.filters import Filter, Thresholds, records_to_filter
from data_tools.mia.merging import merge
from data_tools.mia.planning import ComposeSettings
from data_tools.mia.records import (
    ANSWER,
    COMPOSE,
    FILTER,
    SCORE,
    check_instruction,
    joined,
    locate,
    shuffled,
    stored_path,
)
from data_tools.records import StageOutput
from data_tools.stages import run_stage
from mmlm.errors import InputError
from mmlm.sharding import Shard

SETTINGS = ComposeSettings(tile=40, formats={"sequence": 1.0, "grid": 1.0}, grid={2: 1, 4: 1})


def answer(record):
    """A wrong answer, except for one record that is refused."""
    if record["id"].startswith("coco3-sequence"):
        return None
    return {"response": f"not {record['answer']}", "n_tokens": 3, "corrupt_target": None,
            "model": "scripted", "decode": {}}  # fmt: skip


def score(record):
    ratio = len(record["response"]) % 7 / 10
    return {"ratio": ratio, "ratios": [ratio], "ppl": 1.5, "layer": 1}


def filtered(root, shard=None):
    shard = shard or Shard()
    output = StageOutput(root / FILTER.name, {"t": 1}, FILTER.kinds, shard)
    return run_stage(Filter(Thresholds()), records_to_filter(root, shard), output)


def test_records_are_joined_by_id(tmp_path, make_sources, run_compose, run_scripted):
    run_compose(tmp_path, make_sources(8), SETTINGS)
    run_scripted(tmp_path, answer, score)
    records = joined(tmp_path, (COMPOSE, ANSWER, SCORE))
    assert [record["id"] for record in records] == sorted(record["id"] for record in records)
    assert len(records) == 15  # one was refused
    for record in records:
        assert record["response"] == f"not {record['answer']}"
        assert record["question"]
        assert record["ratio"] == score(record)["ratio"]


def test_shards_read_their_part_of_shards_or_of_a_whole(
    tmp_path, make_sources, run_compose, run_scripted
):
    sources = make_sources(8)
    run_compose(tmp_path / "whole", sources, SETTINGS)
    expected = joined(tmp_path / "whole", (COMPOSE,))
    for index in range(2):
        run_compose(tmp_path / "parts", sources, SETTINGS, Shard(index, 2))
    for root in (tmp_path / "whole", tmp_path / "parts"):
        parts = [joined(root, (COMPOSE,), Shard(index, 2)) for index in range(2)]
        assert all(parts)
        together = sorted((one for part in parts for one in part), key=lambda one: one["id"])
        assert together == expected
    with pytest.raises(InputError, match="there in shards only") as caught:
        joined(tmp_path / "parts", (COMPOSE,))
    assert "mmlm data mia merge" in caught.value.advice
    with pytest.raises(InputError, match="not there yet") as caught:
        joined(tmp_path / "whole", (COMPOSE, ANSWER))
    assert "mmlm data mia answer" in caught.value.advice


def test_merged_shards_equal_the_whole_run(tmp_path, make_sources, run_compose, run_scripted):
    sources = make_sources(10)
    run_compose(tmp_path / "whole", sources, SETTINGS)
    run_scripted(tmp_path / "whole", answer, score)
    counts = filtered(tmp_path / "whole")
    whole = merge(tmp_path / "whole", seed=5)
    assert whole.shards == {}
    assert whole.pairs == counts["ok"] > 3
    for index in range(3):
        run_compose(tmp_path / "parts", sources, SETTINGS, Shard(index, 3))
        run_scripted(tmp_path / "parts", answer, score, Shard(index, 3))
        filtered(tmp_path / "parts", Shard(index, 3))
    merged = merge(tmp_path / "parts", seed=5)
    assert merged.shards == {"compose": 20, "answer": 20, "score": 19, "filter": 19}
    assert merged.output.read_bytes() == whole.output.read_bytes()
    # Merged again, the same; with another seed the same pairs in another order.
    assert merge(tmp_path / "parts", seed=5) == merged
    before = whole.output.read_text().splitlines()
    merge(tmp_path / "whole", seed=6)
    after = whole.output.read_text().splitlines()
    assert sorted(before) == sorted(after)
    assert before != after != sorted(after)


def test_merge_says_which_stage_is_behind(tmp_path, make_sources, run_compose, run_scripted):
    run_compose(tmp_path, make_sources(6), SETTINGS)
    with pytest.raises(InputError, match="answer has not worked on 12 records that compose left"):
        merge(tmp_path)
    run_scripted(tmp_path, answer, score)
    with pytest.raises(InputError, match="filter has not worked on 11 records") as caught:
        merge(tmp_path)
    assert "mmlm data mia filter" in caught.value.advice
    assert not (tmp_path / "pairs.jsonl").exists()


def test_shuffled_depends_on_ids_and_seed_only():
    lines = [{"id": f"r{n}"} for n in range(50)]
    assert shuffled(lines, 1) == shuffled(lines[::-1], 1)
    assert shuffled(lines, 1) != shuffled(lines, 2)
    assert shuffled(lines, 1) != lines
    assert sorted(json.dumps(one) for one in shuffled(lines, 1)) == sorted(map(json.dumps, lines))


def test_paths_are_relative_to_the_run(tmp_path):
    inside, outside = tmp_path / "out" / "world" / "1.png", tmp_path / "1.png"
    assert stored_path(tmp_path / "out", inside) == "world/1.png"
    assert stored_path(tmp_path / "out", outside) == str(outside)
    for path in (inside, outside):
        assert locate(tmp_path / "out", stored_path(tmp_path / "out", path)) == path


def instruction(**changed):
    fields = {
        "id": "r",
        "format": "grid",
        "n_images": 2,
        "images": ["g.png"],
        "target_index": 1,
        "tiles": [[0, 0, 9, 9], [9, 0, 18, 9]],
        "prompt_segments": [{"type": "image"}, {"type": "text", "text": "?"}],
    }
    return fields | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": ["a", "b"]}, "1 image segments for 2 images"),
        ({"prompt_segments": [{"type": "text", "text": "<image>"}]}, "0 image segments for 1"),
        ({"prompt_segments": [{"type": "image"}] * 3}, "3 image segments for 1"),
        ({"n_images": 5}, "grid is made of 2, 3, 4, 6, 9 pictures, got 5"),
        ({"format": "collage"}, "format must be one of sequence, grid, pip"),
        ({"target_index": 0}, "target_index must be from 1 to 2, got 0"),
        ({"target_index": 3}, "target_index must be from 1 to 2, got 3"),
        ({"tiles": []}, "2 tiles are needed, got 0"),
    ],
)
def test_failure_instruction_that_contradicts_itself(changed, message):
    check_instruction(instruction())
    with pytest.raises(ValueError, match=message):
        check_instruction(instruction(**changed))
