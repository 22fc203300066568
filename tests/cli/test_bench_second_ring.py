"""`mmlm bench` and `mmlm score` for SwapMix and MMIR from end to end, on a tiny model."""

import json

import pytest
from PIL import Image
from tiny import picture

from mmlm.cli import main

SHORT = ("--generate.max_new_tokens", "3", "--quiet")


@pytest.fixture
def bench(tiny_folder, tmp_path):
    def run(name, *arguments, output="out"):
        where = ("--model", str(tiny_folder), "--output", str(tmp_path / output))
        return main(["bench", name, *where, *SHORT, *arguments])

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- SwapMix --------------------------------------------------------------------------------------

FEW = ("--count", "2", "--swaps", "1", "--generate.batch_size", "16")


def test_swapmix_paints_asks_and_scores(bench, tmp_path, capsys):
    assert bench("swapmix", *FEW, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["metric"] == "swapmix/world"
    stored = lines(tmp_path / "out" / "answers.jsonl")
    assert {line["swap"] for line in stored} == {
        "original",
        "object",
        "attribute",
        "noise",
        "clutter",
    }
    originals = [line for line in stored if line["swap"] == "original"]
    assert {line["type"] for line in originals} == {"existence", "count", "relation"}
    assert first["metrics"]["other_answers"]["denominator"] == len(stored)
    moved = next(line for line in stored if line["swap"] == "object")
    old, new = moved["note"].split(" -> ")
    assert moved["swapped"] == old != new
    file = str(tmp_path / "out" / "answers.jsonl")
    assert main(["score", "swapmix", file, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == first["metrics"]


def test_swapmix_goes_on_where_it_was_stopped(bench, tmp_path):
    assert bench("swapmix", *FEW, "--kind", "noise") == 0
    file = tmp_path / "out" / "answers.jsonl"
    complete = file.read_bytes()
    file.write_bytes(complete[: len(complete) // 2])
    pictures = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    assert bench("swapmix", *FEW, "--kind", "noise") == 0
    assert file.read_bytes() == complete
    assert pictures == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}


def test_swapmix_of_captions(bench, tmp_path, capsys):
    arguments = ("--question", "caption", "--kind", "object", "--json")
    assert bench("swapmix", *FEW, *arguments) == 0
    scores = json.loads(capsys.readouterr().out)
    assert "lost_words" in scores["metrics"]
    assert all(line["objects"] for line in lines(tmp_path / "out" / "answers.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--swaps", "0"), "--swaps is 0"),
        (("--kind", "noise", "--kind", "noise"), "--kind is noise, noise"),
        (("--split", "night"), "There is no split 'night'"),
        (("--kind", "colour"), "colour"),
        (("--level", "features", "--kind", "noise"), "--level features knows no --kind noise"),
        (("--level", "features", "--question", "caption"), "knows no --question caption"),
    ],
)
def test_swapmix_refuses_before_any_work(bench, tmp_path, arguments, message, capsys):
    assert bench("swapmix", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_swapmix_paints_its_own_pictures_only(bench, tmp_path, capsys):
    instances = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [{"image_id": 1, "category_id": 1}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    given = ("--images", str(tmp_path), "--annotations", str(tmp_path / "instances.json"))
    assert bench("swapmix", *given) == 2
    assert "Only the embedded world can paint" in capsys.readouterr().err


def test_swapmix_on_features_of_any_boxed_pictures(bench, tmp_path, capsys):
    """Two photographs with boxes; what is in them does not matter to a random model."""
    names = {1: "dog", 2: "cat", 3: "car"}
    boxes = [(1, 1, [0, 0, 28, 28]), (1, 3, [28, 28, 28, 28]), (2, 2, [0, 28, 28, 28])]
    instances = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 56, "height": 56} for i in (1, 2)],
        "categories": [
            {"id": i, "name": name, "supercategory": "animal" if i < 3 else "vehicle"}
            for i, name in names.items()
        ],
        "annotations": [
            {"image_id": image, "category_id": kind, "bbox": box} for image, kind, box in boxes
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    for number in (1, 2):
        picture(number).resize((56, 56)).save(tmp_path / f"{number}.png")
    given = ("--images", str(tmp_path), "--annotations", str(tmp_path / "instances.json"))
    arguments = ("--level", "features", *given, "--generate.batch_size", "4", "--json")
    assert bench("swapmix", *arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["metric"] == "swapmix/features"
    assert "noise_reliance" not in first["metrics"]
    stored = lines(tmp_path / "out" / "answers.jsonl")
    swaps = [line for line in stored if line["swap"] != "original"]
    assert {line["note"] for line in swaps if line["picture"] == "1"} <= {
        "dog -> cat of 2",
        "car -> cat of 2",
    }
    assert all(line["old_tokens"] and line["donor"] for line in swaps)
    # The answers are those of single rows: every row gets its own swap.
    alone = ("--level", "features", *given, "--generate.batch_size", "1")
    assert bench("swapmix", *alone, output="alone") == 0
    again = lines(tmp_path / "alone" / "answers.jsonl")
    assert [line["text"] for line in again] == [line["text"] for line in stored]


def test_swapmix_on_features_of_the_world(bench, tmp_path):
    arguments = ("--level", "features", "--count", "3", "--swaps", "1")
    assert bench("swapmix", *arguments, "--generate.batch_size", "16") == 0
    stored = lines(tmp_path / "out" / "answers.jsonl")
    assert {line["swap"] for line in stored} <= {"original", "object", "attribute"}
    assert len(list((tmp_path / "out").glob("features-*.safetensors"))) == 1


def test_swapmix_on_features_needs_boxes(bench, tmp_path, capsys):
    picture(1).save(tmp_path / "COCO_val2014_000000000042.jpg")
    assert bench("swapmix", "--level", "features", "--images", str(tmp_path)) == 2
    assert "--annotations" in capsys.readouterr().err


def test_error_swapmix_on_features_of_an_unknown_family(bench, monkeypatch, capsys):
    monkeypatch.setattr("mmlm.token_brightness.KNOWN", frozenset())
    assert bench("swapmix", "--level", "features", "--count", "2") == 2
    assert "Which image token of llava shows which part" in capsys.readouterr().err


# --- MMIR -----------------------------------------------------------------------------------------


@pytest.fixture
def mmir_data(tmp_path):
    folder = tmp_path / "MMIR"
    (folder / "images").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (8, 8), (90, 60, 30 * number)).save(folder / "images" / f"{number}.png")
    entries = [
        {
            "source": ("web page", "slides", "poster")[index % 3],
            "gt_ans": [1],
            "image": f"{index % 2}.png",
            "question": "what ?",
            "descs": "[1] a title\n[2] a date",
        }
        for index in range(534)
    ]
    for setting in ("mcq", "open"):
        (folder / f"questions_{setting}.json").write_text(json.dumps(entries))
    return str(folder)


def test_mmir_multiple_choice(bench, mmir_data, tmp_path, capsys):
    arguments = ("--data", mmir_data, "--generate.batch_size", "64", "--json")
    assert bench("mmir", *arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["metric"] == "mmir/official/mcq"
    assert first["statuses"] == {"unparsed": 534}  # a random model writes no tags
    assert first["official"]["overall"] == 0
    file = tmp_path / "out" / "answers.jsonl"
    given = lines(file)
    for line in given:
        line["text"] = "<ans>1</ans>"
    file.write_text("".join(json.dumps(line) + "\n" for line in given))
    assert main(["score", "mmir", str(file), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["official"] == {"web": 100, "office": 100, "poster": 100, "overall": 100}
    # The same answers as words: first nobody judges, then two judges, each under its own name.
    for line in given:
        line |= {"setting": "open", "text": "<ans>the title</ans>"}
    file.write_text("".join(json.dumps(line) + "\n" for line in given))
    assert main(["score", "mmir", str(file)]) == 2
    assert "--judge match" in capsys.readouterr().err
    assert main(["score", "mmir", str(file), "--judge", "match", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metric"] == "mmir/open-match"
    assert main(["score", "mmir", str(file), "--json"]) == 0  # the verdicts stand beside
    assert json.loads(capsys.readouterr().out)["metrics"]["overall"]["value"] == 1
    replies = tmp_path / "replies.jsonl"
    replies.write_text(
        "".join(json.dumps({"id": str(i), "reply": "<id>2</id>"}) + "\n" for i in range(534))
    )
    scripted = ("--judge", "scripted", "--judge.replies", str(replies))
    assert main(["score", "mmir", str(file), *scripted, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["metric"] == "mmir/official/open/scripted/own-prompt"
    assert scores["official"]["overall"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--setting", "open"), "--judge match"),
        (("--judge", "match"), "multiple choice needs none"),
        (("--setting", "open", "--judge", "openai"), "needs --judge.model"),
    ],
)
def test_mmir_refuses_before_any_work(bench, mmir_data, tmp_path, arguments, message, capsys):
    assert bench("mmir", "--data", mmir_data, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mmir_needs_its_data(bench, capsys):
    assert bench("mmir") == 2
    assert "--data is missing" in capsys.readouterr().err
