"""`mmlm data sentinel`: inputs, refusals, exit codes, resuming, shards; once with the model."""

import json
import random
from pathlib import Path

import pytest
import yaml
from tiny import picture

from data_tools.detectors import parse_detector
from data_tools.done import read_kind
from data_tools.generators.scripted import ScriptedGenerator
from data_tools.sentinel.inputs import PROMPTS
from data_tools.sentinel.settings import SentinelSettings
from data_tools.world import CAPTION_QUESTIONS
from mmlm.cli import main
from mmlm.cli.configs import FOLDER, find_config
from mmlm.cli.data import sentinel

THINGS = "dog cat car person bench bird cup chair".split()


def talk(identifier, context, seed):
    rng = random.Random(seed)
    if context.count(".") > 3:
        return [""] * 4
    return [f"there is a {rng.choice(THINGS)} near a {rng.choice(THINGS)} ." for _ in range(4)]


@pytest.fixture
def scripted(monkeypatch):
    """Puts a scripted generator in the place of the model; counts how often it is opened."""
    opened = []

    def generator(options, terminal):
        opened.append(options)
        return ScriptedGenerator(talk)

    monkeypatch.setattr(sentinel, "_generator", generator)
    return opened


def world(output, *more, count=6):
    common = ["--world.count", str(count), "--settings.n", "4", "--quiet"]
    if "--detector" not in more:  # the script knows nothing of the scenes
        common += ["--detector", "WorldTruth(false_alarms=0.6)"]
    return main(["data", "sentinel", "--output", str(output), *common, *more])


def lines(folder, kind):
    return [line for _, own in read_kind(folder, kind) for line in own]


def contents(folder):
    return {
        kind: sorted((folder / f"{kind}.jsonl").read_bytes().splitlines())
        for kind in ("pairs", "images")
    }


def error_of(capsys):
    return capsys.readouterr().err


def test_the_embedded_model_on_world_scenes(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--max_new_tokens", "40", "--settings.max_sentences", "3", "--json"]
    assert world(out, *arguments, "--detector", "WorldTruth", count=5) == 0
    summary = json.loads(capsys.readouterr().out)
    images, pairs = lines(out, "images"), lines(out, "pairs")
    assert summary["images"] == {
        s: sum(i["status"] == s for i in images) for s in summary["images"]
    }
    assert summary["pairs"] == len(pairs) > 0
    instances = json.loads((out / "world" / "instances.json").read_text())
    names = {one["id"]: one["name"] for one in instances["categories"]}
    truth = {image["id"]: set() for image in instances["images"]}
    for one in instances["annotations"]:
        truth[one["image_id"]].add(names[one["category_id"]])
    for pair in pairs:
        assert (out / pair["images"][0]).is_file()
        assert pair["question"] in CAPTION_QUESTIONS
        present = truth[int(pair["image_id"])]
        known = set(names.values())
        assert set(pair["chosen_objects"]) & known <= present
        assert pair["rejected_hallucinated"]
        assert not set(pair["rejected_hallucinated"]) & present
        assert pair["meta"]["model"] == "embedded"
    run = json.loads((out / "run.json").read_text())
    assert run["loaded"]["generator"]["weights"].startswith("sha256:")


def test_the_table_at_the_end(scripted, tmp_path, capsys):
    assert world(tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "pairs from 6 pictures" in shown
    for word in ("for sentence 2", "hallucinated", "pairs per picture", "ok"):
        assert word in shown


def test_a_run_goes_on_and_a_finished_one_loads_nothing(scripted, tmp_path, capsys):
    out = tmp_path / "out"
    assert world(out) == 0
    before = contents(out)
    done = (out / "done.jsonl").read_text().splitlines(keepends=True)
    (out / "done.jsonl").write_text("".join(done[:2]))
    assert world(out) == 0
    assert contents(out) == before
    assert len(scripted) == 2
    assert world(out, "--images_at_once", "1") == 0  # decides nothing
    assert len(scripted) == 2


def test_acceptance_6_shards_and_their_merge(scripted, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert world(whole, count=9) == 0
    for index in range(4):
        assert world(parts, "--shard", f"{index}/4", count=9) == 0
    assert main(["data", "merge", str(parts), "--quiet"]) == 0
    assert contents(parts) == contents(whole)


def test_a_launcher_divides_the_pictures(scripted, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert world(whole) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert world(parts) == 0
    monkeypatch.delenv("WORLD_SIZE")
    assert main(["data", "merge", str(parts), "--quiet"]) == 0
    assert contents(parts) == contents(whole)


def test_the_output_of_another_run(scripted, tmp_path, capsys):
    out = tmp_path / "out"
    assert world(out) == 0
    before = contents(out)
    assert world(out, "--settings.seed", "1") == 2
    error = error_of(capsys)
    assert "settings.seed was 0, now 1" in error
    assert contents(out) == before
    assert world(out, "--settings.seed", "1", "--resume_anyway") == 0
    assert contents(out) == before
    assert world(out, "--settings.seed", "1", "--overwrite") == 0
    assert contents(out) != before
    assert world(out, "--overwrite", count=3) == 0  # another world as well
    assert len(lines(out, "images")) == 3
    assert len(list((out / "world" / "images").iterdir())) == 3


# Pictures from files and folders.


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures, one of them in a folder of its own."""
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for number in range(3):
        picture(number).save(photos / f"{number}.png")
    picture(3).save(photos / "more" / "0.JPG", format="JPEG")
    (photos / "notes.txt").write_text("no picture")
    return photos


DETECTOR = ["--detector", "test_data_sentinel.Everything()"]


def everything():
    """A detector class of the user's own, by its dotted path."""
    from dataclasses import dataclass

    from data_tools.detectors import Detector, Finding

    @dataclass(frozen=True, kw_only=True)
    class Everything(Detector):
        @property
        def facts(self):
            return {}

        def detect(self, picture, names):
            return {name: Finding(len(name) > 3) for name in names}

    return Everything


Everything = everything()


def describe(output, *arguments):
    common = ["--output", str(output), "--settings.n", "4", "--quiet", *DETECTOR]
    return main(["data", "sentinel", *common, *arguments])


def test_a_folder_of_pictures(scripted, folder, tmp_path):
    out = tmp_path / "out"
    assert describe(out, "--images", str(folder)) == 0
    images = {line["image_id"]: line for line in lines(out, "images")}
    assert set(images) == {"0.png", "1.png", "2.png", "more/0.JPG"}
    assert {line["question"] for line in images.values()} <= set(PROMPTS)
    assert len({line["question"] for line in images.values()}) > 1
    for line in images.values():
        assert (out / line["path"]).is_file()
    assert images["more/0.JPG"]["path"] == "../photos/more/0.JPG"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_pictures(scripted, folder, tmp_path):
    rows = [
        {"id": 7, "image": "0.png", "question": "what?"},
        {"id": "b", "image": "more/0.JPG", "prompt": "and here?"},
    ]
    source = write(folder / "in.jsonl", rows)
    out = tmp_path / "out"
    assert describe(out, "--input", str(source)) == 0
    found = {line["image_id"]: (line["question"], line["path"]) for line in lines(out, "images")}
    assert found == {
        "7": ("what?", "../photos/0.png"),
        "b": ("and here?", "../photos/more/0.JPG"),
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "0.png", "question": "q"}, "`id` must be text, got None"),
        ({"id": True, "image": "0.png", "question": "q"}, "`id` must be text, got True"),
        ({"id": "x", "question": "q"}, "`image` must be text, got None"),
        ({"id": "x", "image": ["0.png"], "question": "q"}, "`image` must be text"),
        ({"id": "x", "image": "0.png"}, "`question` must be text, got None"),
        ({"id": "x", "image": "0.png", "prompt": " "}, "`question` must be text, got ' '"),
        ({"id": "a", "image": "0.png", "question": "q"}, "the id 'a' is there 2 times"),
    ],
)
def test_records_that_are_refused(scripted, folder, tmp_path, capsys, row, message):
    good = {"id": "a", "image": "0.png", "question": "q"}
    source = write(folder / "in.jsonl", [good, row])
    assert describe(tmp_path / "out", "--input", str(source)) == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --input, --images and --world.count"),
        (["--world.count", "3", "--images", "."], "exactly one of"),
        (["--world.count", "-3"], "--world.count is -3"),
        (["--images", "absent"], "There is no folder 'absent'"),
        (["--input", "absent.jsonl"], "There is no file 'absent.jsonl'"),
        (["--images", "."], "No detector is given"),
        (["--world.count", "3", "--detector", "YOLO"], "There is no detector 'YOLO'"),
        (["--world.count", "3", "--detector", "WorldTruth(misses=2.0)"], "misses must be"),
        (["--world.count", "3", "--settings.cross_check", "single:Owl"], "single:WorldTruth"),
        (["--world.count", "3", "--settings.n", "1"], "n must be at least 2"),
        (["--world.count", "3", "--settings.temperature", "0"], "temperature must be > 0"),
        (["--world.count", "3", "--objects.extractor", "nltk"], "nltk"),
        (["--world.count", "3", "--objects.extractor", "factual"], "weights"),
        (["--world.count", "3", "--images_at_once", "0"], "images_at_once must be at least 1"),
        (["--world.count", "3", "--world.split", "moon"], "There is no split 'moon'"),
        (["--world.count", "3", "--shard", "4/4"], "--shard does not take '4/4'"),
    ],
)
def test_requests_that_are_refused(scripted, folder, tmp_path, capsys, monkeypatch, arguments,
                                   message):  # fmt: skip
    monkeypatch.chdir(folder)
    assert main(["data", "sentinel", "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in error_of(capsys)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_an_empty_folder(scripted, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert describe(tmp_path / "out", "--images", str(tmp_path / "empty")) == 2
    assert "holds no picture" in error_of(capsys)


@pytest.mark.parametrize(("broken", "code"), [(1, 0), (2, 3)])
def test_more_than_a_fifth_of_the_pictures_fails(scripted, tmp_path, capsys, broken, code):
    for number in range(5):
        if number < broken:
            (tmp_path / f"{number}.png").write_bytes(b"broken")
        else:
            picture(number).save(tmp_path / f"{number}.png")
    rows = [{"id": str(n), "image": f"{n}.png", "question": "q"} for n in range(5)]
    source = write(tmp_path / "in.jsonl", rows)
    assert describe(tmp_path / "out", "--input", str(source)) == code
    assert len(lines(tmp_path / "out", "images")) == 5
    assert ("40% of the pictures failed" in error_of(capsys)) == (code == 3)


def test_strict(scripted, folder, tmp_path, capsys):
    (folder / "0.png").write_bytes(b"")
    assert describe(tmp_path / "out", "--images", str(folder), "--strict") == 2
    assert "0.png" in error_of(capsys)


def test_sentences_without_objects_are_remarked_on(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.setattr(
        sentinel, "_generator", lambda *_: ScriptedGenerator(lambda *_: ["Ja.", "Nein.", "So."])
    )
    arguments = ["--output", str(tmp_path / "out"), "--images", str(folder), *DETECTOR]
    assert main(["data", "sentinel", *arguments]) == 0
    assert "warning: 100% of the sentences name no object" in error_of(capsys)


def test_what_detectors_found_is_kept(scripted, tmp_path):
    cache = tmp_path / "cache"
    assert world(tmp_path / "a", "--detector_cache", str(cache)) == 0
    assert list(cache.rglob("*.jsonl"))
    assert world(tmp_path / "b", "--detector_cache", str(cache)) == 0
    assert world(tmp_path / "c") == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


# Shipped configurations.

NAMES = sorted(path.stem for path in (FOLDER / "data").glob("*sentinel*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configurations(name, capsys):
    path = find_config(f"data/{name}")
    text = Path(path).read_text()
    assert f"mmlm data sentinel --config data/{name} " in text.partition("\nworld:")[0]
    arguments = ["--config", f"data/{name}", "--output", "out", "--print_config"]
    assert main(["data", "sentinel", *arguments]) == 0
    for detector in yaml.safe_load(text)["detectors"]:
        parse_detector(detector)


def test_the_authors_configuration_is_the_authors_settings():
    content = yaml.safe_load(find_config("data/sentinel_authors").read_text())
    assert SentinelSettings(**content["settings"]) == SentinelSettings.authors()
    paper = yaml.safe_load(find_config("data/sentinel").read_text())
    assert SentinelSettings(**paper["settings"]) == SentinelSettings()
