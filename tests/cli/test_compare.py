"""`mmlm compare` from end to end: real runs of a tiny model, and answers from elsewhere."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from mmlm.cli import main

COUNT = 12
SHORT = ("--generate.max_new_tokens", "4", "--quiet")


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """POPE answers of a tiny random model, plain and with a method."""
    root = tmp_path_factory.mktemp("runs")
    for name, method in (("plain", "none"), ("vhr", "VHR(alpha=2.0)")):
        arguments = ["bench", "pope", "--model", str(tiny_folder), "--count", str(COUNT), *SHORT]
        assert main([*arguments, "--output", str(root / name), "--method", method]) == 0
    return root


@pytest.fixture
def compare(runs, tmp_path, capsys):
    """Compares; gives the exit code, what was printed, and the errors."""

    def run(*arguments, output=tmp_path / "out"):
        capsys.readouterr()
        code = main(["compare", *map(str, arguments), "--output", str(output)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def copy(runs, folder, change_lines=None, change_record=None):
    """A copy of the plain run with other lines or another record."""
    folder.mkdir()
    lines = (runs / "plain" / "answers.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    if change_lines:
        records = change_lines(records)
    (folder / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    record = json.loads((runs / "plain" / "answers.jsonl.run.json").read_text())
    if change_record:
        change_record(record)
    (folder / "answers.jsonl.run.json").write_text(json.dumps(record))
    return folder


def test_two_runs(runs, compare, tmp_path):
    code, shown, _ = compare(runs / "plain", runs / "vhr")
    assert code == 0
    assert "changes against plain" in " ".join(shown.split())
    assert "Better on" in shown
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["metric"] == "pope/world-natural/strict"
    assert record["baseline"] == "plain"
    told = record["per_picture"]["vhr"]
    assert told["better"] + told["worse"] + told["same"] == record["pictures"]
    assert record["runs"]["vhr"]["methods"][0].startswith("VHR(alpha=2.0")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h1>vhr against plain</h1>" in page
    assert "data:image/png;base64," in page
    assert "picture not found" not in page
    assert "://" not in page


def test_better_and_worse_point_the_right_way(runs, compare, tmp_path):
    def perfect(lines):
        return [line | {"text": line["label"]} for line in lines]

    def wrong(lines):
        return [line | {"text": {"yes": "no", "no": "yes"}[line["label"]]} for line in lines]

    good, bad = copy(runs, tmp_path / "good", perfect), copy(runs, tmp_path / "bad", wrong)
    code, shown, _ = compare(bad, good, "--json", "--metric", "mean_accuracy")
    assert code == 0
    record = json.loads(shown)
    assert list(record["metrics"]) == ["mean_accuracy"]
    change = record["metrics"]["mean_accuracy"]["runs"]["good"]
    assert (change["value"], change["change"], change["verdict"]) == (1, 1, "better")
    assert len(record["per_picture"]["good"]["better_on"]) == record["pictures"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == record


def test_three_runs_are_corrected_for_each_other(runs, compare, tmp_path):
    other = copy(runs, tmp_path / "other")
    code, shown, told = compare(runs / "plain", runs / "vhr", other / "answers.jsonl")
    assert code == 0
    assert "Holm" in shown
    assert "answers.jsonl gave exactly the same answers as plain" in told


def test_what_else_differs_is_said(runs, compare, tmp_path):
    def loaded(record):
        record["model"]["dtype"] = "bfloat16"

    other = copy(runs, tmp_path / "other", change_record=loaded)
    code, _, told = compare(runs / "plain", other)
    assert code == 0
    assert "other also differs from plain in model.dtype: " in told
    assert "also differs from plain in model.dtype" in (tmp_path / "out/report.html").read_text()


def test_failed_requests_of_all_runs_are_counted(runs, compare, tmp_path):
    def fail(lines):
        return [lines[0] | {"text": None, "error": "no such picture"}, *lines[1:]]

    first, second = copy(runs, tmp_path / "a", fail), copy(runs, tmp_path / "b", fail)
    code, _, told = compare(first, second)
    assert code == 3
    assert "1 requests failed in every run" in told
    code, _, told = compare(first, runs / "plain")
    assert code == 2
    assert "0 have an answer in a only, 1 in plain only" in told


def test_what_cannot_be_compared_is_refused_before_anything_is_written(runs, compare, tmp_path):
    def other_data(record):
        record["data"]["world"]["seed"] = 7

    def other_scorer(record):
        record["information"]["scorer"] = "pope/opera"

    data = copy(runs, tmp_path / "data", change_record=other_data)
    scorer = copy(runs, tmp_path / "scorer", change_record=other_scorer)
    short = copy(runs, tmp_path / "short", lambda lines: lines[:-3])
    total = len((runs / "plain" / "answers.jsonl").read_text().splitlines())
    plain = runs / "plain"
    for arguments, message in (
        ((plain,), "at least two runs"),
        ((plain, plain / "../plain"), "The same run is given twice"),
        ((plain, tmp_path / "absent"), "There is no file or folder"),
        ((plain, data), "different data: data.world.seed is 0 against 7"),
        ((plain, scorer), "is scored as pope/world-natural/strict, scorer as"),
        ((plain, short), f"not finished: {total - 3} of {total} answers"),
        ((plain, runs / "vhr", "--images", tmp_path / "absent"), "There is no folder"),
        ((plain, runs / "vhr", "--metric", "bleu"), "no metric 'bleu'"),
        ((plain, runs / "vhr", "--resamples", "0"), "resamples must be at least 1"),
        ((plain, runs / "vhr", "--seed", "-1"), "seed must not be negative"),
    ):
        code, _, told = compare(*arguments)
        assert code == 2, told
        assert message in told
        assert "advice: " in told
        assert not (tmp_path / "out").exists()
    # The same answers scored in one way can be compared.
    assert compare(plain, scorer, "--variant", "opera")[0] == 0


def test_somebody_elses_page_is_not_replaced(runs, compare, tmp_path):
    (tmp_path / "mine").mkdir()
    page = tmp_path / "mine" / "report.html"
    page.write_text("<html>mine</html>")
    code, _, told = compare(runs / "plain", runs / "vhr", output=tmp_path / "mine")
    assert code == 2
    assert "was not written by `mmlm compare`" in told
    assert page.read_text() == "<html>mine</html>"


def test_pictures_that_are_gone_or_broken_get_a_place_holder(runs, compare, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert compare(runs / "plain", runs / "vhr", "--images", empty)[0] == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image" not in page
    assert page.count("picture not found") == page.count("<article")
    line = json.loads((runs / "plain" / "answers.jsonl").read_text().splitlines()[0])
    (empty / line["image"]).write_bytes(b"no picture")
    assert compare(runs / "plain", runs / "vhr", "--images", empty)[0] == 0


def test_captions_from_elsewhere(compare, tmp_path):
    """COCO's pictures are known by number; their objects ship with mmlm."""
    images = tmp_path / "val2014"
    images.mkdir()
    Image.new("RGB", (500, 300)).save(images / "COCO_val2014_000000000042.jpg")
    for name, caption in (("before", "A dog and a zebra ."), ("after", "A dog .")):
        line = {"image_id": 42, "caption": caption}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    files = (tmp_path / "before.jsonl", tmp_path / "after.jsonl")
    code, shown, told = compare(*files, "--benchmark", "chair", "--images", images, "--json")
    assert code == 0
    record = json.loads(shown)
    assert record["metric"] == "chair/wordnet"
    runs = record["metrics"]["chair_i"]["runs"]
    assert runs["after.jsonl"]["value"] < runs["before.jsonl"]["value"]
    assert record["per_picture"]["after.jsonl"]["better_on"] == ["42"]
    assert "before.jsonl has no run record" in told
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/jpeg" in page
    assert ">zebra</mark>" in page
    code, _, told = compare(*files)
    assert code == 2
    assert "Give --benchmark" in told


def test_help_is_light():
    code = (
        "import sys; from mmlm.cli import main; main(['compare', '--help']); "
        "print([m for m in ('torch', 'transformers', 'nltk', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: mmlm compare RUNS ... [options]")
    assert done.stdout.splitlines()[-1] == "[]"
