"""``mmlm data mia``: from a file of questions to shuffled pairs, in one go or in steps."""

import json

import pytest
from tiny import picture

from mmlm.cli import main
from mmlm.cli.data.mia import run as running
from mmlm.cli.data.mia.run import OneModel

FORMATS = ("--compose.sequence", "{2: 1}", "--compose.grid", "{4: 1}", "--compose.tile", "40")
# A tiny random model is never sure of anything, so perplexity and length drop nothing.
LOOSE = ("--filter.max_len_ratio", "1000", "--filter.min_len_ratio", "0")
# One at a time: then even the last digit of a ratio does not depend on its neighbours in a batch.
SHORT = ("--answer.max_new_tokens", "6", "--answer.batch_size", "1", "--score.batch_size", "1")


@pytest.fixture
def sources(tmp_path):
    """Six questions about six pictures."""
    folder = tmp_path / "data" / "coco"
    folder.mkdir(parents=True)
    records = []
    for number in range(6):
        picture(number, (100, 90)).save(folder / f"{number}.png")
        answer = f"A thing called {number} ."
        record = {"id": f"s{number}", "question": "What is this ?", "answer": answer}
        records.append({**record, "image": f"coco/{number}.png"})
    path = tmp_path / "data" / "sources.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def mia(*arguments):
    return main(["data", "mia", *map(str, arguments), "--quiet"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def finished(sources, tmp_path, tiny_folder):
    """A run of all stages with the tiny model."""
    root = tmp_path / "whole"
    assert mia("run", "--sources", sources, "--output", root, "--model", tiny_folder,
               *FORMATS, *SHORT, *LOOSE) == 0  # fmt: skip
    return root


def test_run_does_all_stages(finished):
    instructions = lines(finished / "compose" / "instructions.jsonl")
    assert len(instructions) == 18
    kept = lines(finished / "filter" / "pairs.jsonl")
    dropped = lines(finished / "filter" / "dropped.jsonl")
    scored = {one["id"] for one in lines(finished / "score" / "scores.jsonl")}
    assert {one["id"] for one in kept + dropped} == scored
    assert len(scored) >= 15  # a random model may write an image token, which cannot be scored
    pairs = lines(finished / "pairs.jsonl")
    assert pairs
    assert sorted(one["id"] for one in pairs) == sorted(one["id"] for one in kept)
    for one in pairs:
        assert one["chosen"].startswith("A thing called")
        assert 0 <= one["ratio"] <= 1
        assert one["ppl"] > 1.1
        assert one["meta"]["thresholds"]["ppl"] == 1.1
    for one in dropped:
        assert one["reason"]


def test_steps_and_shards_give_the_same_pairs(finished, sources, tmp_path, tiny_folder):
    root = tmp_path / "steps"
    for index in range(2):
        shard = ("--output", root, "--shard", f"{index}/2")
        assert mia("compose", "--sources", sources, *FORMATS, *shard) == 0
        model = ("--model", tiny_folder)
        assert mia("answer", *model, *SHORT[:4], *shard) == 0
        assert mia("score", *model, *SHORT[4:], *shard) == 0
        assert mia("filter", *LOOSE, *shard) == 0
    assert mia("merge", root) == 0
    # Composed pictures lie under either root, sources beside both: lines are equal to the byte.
    assert (root / "pairs.jsonl").read_bytes() == (finished / "pairs.jsonl").read_bytes()


def test_a_finished_run_is_not_run_again(finished, sources, tiny_folder, monkeypatch, capsys):
    before = (finished / "pairs.jsonl").read_bytes()
    monkeypatch.setattr(running, "OneModel", lambda: pytest.fail)
    common = ("--output", finished, "--model", tiny_folder, *FORMATS, *SHORT, *LOOSE)
    assert mia("run", "--sources", sources, *common, "--json") == 0
    assert (finished / "pairs.jsonl").read_bytes() == before
    counts = json.loads(capsys.readouterr().out)["stages"]
    assert counts["compose"] == counts["answer"] == {"ok": 18}
    assert sum(counts["score"].values()) == 18
    assert sum(counts["filter"].values()) == counts["score"]["ok"]
    # Other settings would mix two runs.
    assert mia("run", "--sources", sources, *common, "--compose.seed", 1) == 2
    assert "compose.seed was 0, now 1" in capsys.readouterr().err
    assert mia("run", "--sources", sources, *common, "--filter.ppl", 1.5) == 2
    assert (finished / "pairs.jsonl").read_bytes() == before


def test_one_model_for_both_stages():
    opened = []

    def open_model(*arguments, measured):
        opened.append(measured)
        return object(), object()

    model = OneModel(open_model)
    first = model("options", "terminal", None, measured=False)
    assert model("options", "terminal", None, measured=True) is first
    assert opened == [True]  # what scoring needs is checked before anything is answered


def test_refilter_equals_a_fresh_filter(finished, capsys):
    other = ("--filter.sequence", "{2: 0.5}", "--filter.parity", "true")
    assert mia("refilter", "--output", finished, "--name", "strict", *other) == 0
    again = {name: (finished / "filter-strict" / f"{name}.jsonl").read_bytes()
             for name in ("pairs", "dropped")}  # fmt: skip
    assert len(lines(finished / "pairs-strict.jsonl")) == len(again["pairs"].splitlines())
    assert mia("filter", "--output", finished, *other) == 2  # the folder holds other thresholds
    assert mia("filter", "--output", finished, *other, "--overwrite", "true") == 0
    for name, content in again.items():
        assert (finished / "filter" / f"{name}.jsonl").read_bytes() == content
    assert mia("refilter", "--output", finished, "--name", "a/b") == 2
    assert mia("refilter", "--output", finished, "--name", "two", "--filter.grid", "{2: 0.5}") == 2
    assert "no threshold for a grid of 4" in capsys.readouterr().err
    assert not (finished / "filter-two").exists()


IMAGES_FIRST = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""A chat template that puts all pictures of a message before its text, as LLaVA-1.5's does."""


def test_acceptance_7_and_8_the_target_survives_the_export(finished, tmp_path, tiny_folder):
    template = tmp_path / "images_first.jinja"
    template.write_text(IMAGES_FIRST)
    targets = {one["id"]: one["target_index"] for one in lines(finished / "pairs.jsonl")}
    model = ("--model", str(tiny_folder), "--chat_template", str(template))
    for form, more in (("trl", ()), ("trl-text", model)):
        output = tmp_path / f"{form}.jsonl"
        export = ["data", "convert", str(finished / "pairs.jsonl"), "--to", form, *more]
        assert main([*export, "--output", str(output), "--quiet"]) == 0
        rows = lines(output)
        assert {row["id"] for row in rows} == set(targets)
        sequences = [row for row in rows if "sequence2" in row["id"]]
        assert sequences
        for row in sequences:
            target = targets[row["id"]]
            if form == "trl-text":
                head = "Image1:<image>\nImage2:<image>\n"
                assert f"{head}In Image{target}, what is this ?" in row["prompt"]
                continue
            first, image, second, other, asked = row["prompt"][0]["content"]
            assert image["type"] == other["type"] == "image"
            assert (first["text"], second["text"]) == ("Image1:", "\nImage2:")
            assert asked["text"].startswith(f"\nIn Image{target}, ")


def test_sheet(finished, tmp_path, capsys):
    from PIL import Image

    assert mia("sheet", finished, "--count", 3) == 0
    assert mia("sheet", finished, "--show", "pairs", "--to", tmp_path / "p.png", "--json") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(finished / "instructions.png")
    assert len(json.loads(said[1])["examples"]) >= 3
    for path in (finished / "instructions.png", tmp_path / "p.png"):
        with Image.open(path) as image:
            assert image.width > 1200
    assert mia("sheet", finished, "--count", 0) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compose",), "Sources are a file or scenes of the embedded world"),
        (("compose", "--source.world", 3, "--compose.grid", "{5: 1}"), "2, 3, 4, 6, 9 pictures"),
        (("compose", "--source.world", 3, "--compose.sequence", "{4: 1}"), "needs 3 companions"),
        (("answer",), "mmlm data mia compose"),
        (("filter",), "mmlm data mia compose"),
        (("refilter", "--name", "x"), "Run the stage first"),
        (("run", "--source.world", 3, "--filter.ppl", 0.5), "ppl must be at least 1"),
    ],
)
def test_refused_before_any_work(arguments, message, tmp_path, capsys):
    assert mia(*arguments, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/**/*.jsonl.*"))
    assert not (tmp_path / "out" / "compose").exists()


def test_many_failures_are_reported(sources, tmp_path):
    for number in (0, 1):
        (sources.parent / "coco" / f"{number}.png").write_bytes(b"")
    options = ("--sources", sources, "--compose.formats", "{pip: 1.0}")
    assert mia("compose", *options, "--output", tmp_path / "out") == 3  # 2 of 6
    picture(0, (100, 90)).save(sources.parent / "coco" / "0.png")
    assert mia("compose", *options, "--output", tmp_path / "other") == 0  # 1 of 6


@pytest.mark.parametrize("name", ["world_mia", "mia_llava15", "mia_authors"])
def test_shipped_settings_are_read(name, tmp_path, capsys):
    config = ("--config", f"data/{name}", "--output", tmp_path)
    assert main(["data", "mia", "run", *map(str, config), "--print_config"]) == 0
    assert "thresholds" not in capsys.readouterr().out  # the group is called filter


@pytest.mark.slow
def test_the_embedded_world_gives_pairs(tmp_path):
    root = tmp_path / "world"
    assert mia("run", "--config", "data/world_mia", "--source.world", 5, "--output", root,
               "--compose.formats", "{sequence: 1.0}") == 0  # fmt: skip
    pairs = lines(root / "pairs.jsonl")
    assert pairs
    assert all(not path.startswith("/") for one in pairs for path in one["images"])


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ({"ok": 1, "long_answer": 5, "empty_response": 5}, 0),
        ({"ok": 4, "too_long": 1}, 0),
        ({"ok": 3, "too_long": 1}, 3),
        ({"ok": 3, "unreadable_image": 1, "long_answer": 1}, 0),
    ],
)
def test_exit_code_counts_what_failed_and_not_what_gives_no_pair(tmp_path, statuses, code):
    from collections import Counter

    from mmlm.cli.data.mia.common import report
    from mmlm.cli.frame import Terminal

    assert report(Terminal(quiet=True), tmp_path, {"answer": Counter(statuses)}) == code
