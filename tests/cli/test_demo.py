"""`mmlm demo` from end to end, with a tiny random model and a handful of pictures."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from mmlm.cli import main

FEW = ("--count", "4", "--questions", "1", "--generate.max_new_tokens", "3", "--quiet")


@pytest.fixture(scope="module")
def demo(tiny_folder, tmp_path_factory):
    """Arguments of a finished demo, and its folder."""
    output = tmp_path_factory.mktemp("demo") / "demo"
    arguments = ["demo", "--model", str(tiny_folder), "--output", str(output), *FEW]
    assert main(arguments) == 0
    return arguments, output


def test_demo_leaves_report_numbers_and_answers(demo):
    _, output = demo
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("<article") >= 4
    assert "://" not in page
    results = json.loads((output / "results.json").read_text())
    assert [run["label"] for run in results["runs"]] == ["plain", "VHR", "VCD"]
    for run in results["runs"]:
        assert run["chair"]["counts"]["captions"] == 4
        assert run["seconds_per_caption"] > 0
        assert run["pope"]["splits"].keys() == {"random", "popular", "adversarial"}
    assert len(results["conclusions"]) == 2
    assert results["facts"]["method VHR"].startswith("VHR(alpha=")
    assert sorted(path.name for path in (output / "pictures").iterdir()) == ["natural-0-4"]


def test_second_demo_uses_the_answers_and_shows_the_same_numbers(demo, monkeypatch):
    arguments, output = demo
    before = json.loads((output / "results.json").read_text())

    def fail(*_, **__):
        raise AssertionError("a stored answer was computed again")

    monkeypatch.setattr("mmlm.runner._Batch._generate", fail)
    monkeypatch.setattr("mmlm.cli.demo._Answers.warm_up", lambda self, ways: None)
    assert main(arguments) == 0
    assert json.loads((output / "results.json").read_text()) == before


def test_other_settings_do_not_mix_with_stored_answers(demo):
    arguments, output = demo
    stored = {path: path.read_bytes() for path in output.glob("answers/*/*.jsonl")}
    assert main([*arguments, "--questions", "2", "--method", "VCD"]) == 0  # captions are kept
    assert main([*arguments, "--method", "VCD(alpha=0.5)", "--data.seed", "1"]) == 0
    assert all(path.read_bytes() == content for path, content in stored.items())
    assert len(list(output.glob("answers/*"))) == 2
    results = json.loads((output / "results.json").read_text())
    assert [run["label"] for run in results["runs"]] == ["plain", "VCD(alpha=0.5)"]


def test_demo_on_pictures_in_coco_format(tiny_folder, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    inside = {5: ("person", "dog", "cup"), 6: ("cat", "car", "bus"), 7: ("bed", "tv", "book")}
    names = sorted({name for found in inside.values() for name in found})
    for number in inside:
        Image.new("RGB", (300, 200), (number * 30, 90, 60)).save(images / f"{number}.png")
    data = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in inside],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": names.index(name)}
            for i, found in inside.items()
            for name in found
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    (images / "7.png").write_bytes(b"")  # cannot be read: its answers fail, the rest goes on
    arguments = ["demo", "--model", str(tiny_folder), "--output", str(tmp_path / "out"), "--json"]
    arguments += ["--images", str(images), "--annotations", str(tmp_path / "instances.json")]
    arguments += ["--method", "VCD", "--generate.max_new_tokens", "3", "--quiet"]
    assert main(arguments) == 3
    results = json.loads(capsys.readouterr().out)
    assert results["runs"][0]["chair"]["counts"]["captions"] == 2
    assert "data:image/jpeg" in (tmp_path / "out" / "report.html").read_text()


def test_all_stands_for_every_method_that_the_model_can_have(tiny_folder, tmp_path, capsys):
    import mmlm

    arguments = ["demo", "--model", str(tiny_folder), "--output", str(tmp_path), *FEW[:-1]]
    arguments += ["--methods", "all", "--count", "1", "--generate.max_new_tokens", "1"]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    labels = [run["label"] for run in results["runs"]]
    told = capsys.readouterr().err
    assert labels[0] == "plain"
    assert "VAR" not in labels  # needs sink dimensions
    assert "no sink dimensions are known" in told
    needs_more = {
        "ACT",
        "HeadAblation",
        "PH3",
        "StreamingHeads",
        "SeeingKnowing",
        "VAR",
        "ZeroTuning",
    }
    assert set(mmlm.method_names("decoding")) - needs_more <= set(labels)


def test_all_on_the_embedded_model_means_the_recommended_settings():
    from mmlm.cli.configs import effect_label, effect_settings
    from mmlm.cli.demo import _ways

    ways, optional = _ways(["all", "VHR(alpha=2.0)"], "embedded")
    recommended = [effect_label(texts[0]) for texts in effect_settings("embedded").values()]
    assert list(ways) == ["plain", *recommended]
    assert "VHR(alpha=2.0)" not in optional
    assert len(optional) == len(ways) - 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "Nothing"), "There is no method 'Nothing'"),
        (("--split", "moon"), "There is no split 'moon'"),
        (("--questions", "0"), "--questions is 0"),
        (("--model", "absent"), "There is no model 'absent'"),
        (("--images", "absent"), "There is no folder 'absent'"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_somebody_elses_page_is_not_replaced(tmp_path, capsys):
    (tmp_path / "report.html").write_text("<html>my own report</html>")
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "was not written by `mmlm demo`" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "<html>my own report</html>"


def test_help_is_light():
    code = (
        "import sys; from mmlm.cli import main; main(['demo', '--help']);"
        "print([m for m in ('torch', 'transformers', 'nltk') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
