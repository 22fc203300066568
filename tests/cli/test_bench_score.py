"""`mmlm bench` and `mmlm score` from end to end, with a tiny random model."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from benchmarks import chair
from mmlm.cli import main

SHORT = ("--generate.max_new_tokens", "4", "--quiet")


@pytest.fixture
def tiny(tiny_folder):
    return str(tiny_folder)


INSIDE = {5: ("person", "dog", "cup"), 6: ("cat", "car", "bus"), 7: ("bed", "tv", "book")}


@pytest.fixture
def coco(tmp_path):
    """Three pictures in COCO format with three objects each."""
    images = tmp_path / "images"
    images.mkdir()
    for number in INSIDE:
        Image.new("RGB", (40, 30), (number * 30, 90, 60)).save(images / f"{number}.png")
    return images, annotate(tmp_path / "instances.json", INSIDE)


def annotate(path, inside):
    names = sorted({name for found in inside.values() for name in found})
    data = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in inside],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": names.index(name)}
            for i, found in inside.items()
            for name in found
        ],
    }
    path.write_text(json.dumps(data))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bench(kind, model, output, *arguments):
    return main(["bench", kind, "--model", model, "--output", str(output), *SHORT, *arguments])


def test_bench_chair_on_the_world(tiny, tmp_path, capsys):
    assert bench("chair", tiny, tmp_path / "out", "--count", "5", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    stored = lines(tmp_path / "out" / "captions.jsonl")
    assert [line["image_id"] for line in stored] == [1, 2, 3, 4, 5]
    assert all(line["n_tokens"] >= 1 and line["templated"] for line in stored)
    assert scores["metric"] == "chair/wordnet"
    assert scores["counts"]["captions"] == 5
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["counts"] == scores["counts"]
    record = json.loads((tmp_path / "out" / "captions.jsonl.run.json").read_text())
    assert record["data"]["world"]["split"] == "natural"
    assert record["information"]["scorer"] == "chair/wordnet"
    assert record["weights"].startswith("sha256:")
    # The stored lines and the run record are enough to score again.
    assert main(["score", "chair", str(tmp_path / "out" / "captions.jsonl"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["metrics"] == scores["metrics"]
    assert again["counts"]["true_objects"] > 0


def test_interrupted_run_ends_like_an_uninterrupted_one(tiny, tmp_path):
    arguments = ("--count", "5", "--generate.batch_size", "2")
    assert bench("chair", tiny, tmp_path / "whole", *arguments) == 0
    assert bench("chair", tiny, tmp_path / "cut", *arguments) == 0
    whole = (tmp_path / "whole" / "captions.jsonl").read_bytes()
    cut = tmp_path / "cut" / "captions.jsonl"
    assert cut.read_bytes() == whole
    cut.write_bytes(whole[: whole.index(b"\n", len(whole) // 2) + 20])  # whole lines and a half
    assert bench("chair", tiny, tmp_path / "cut", *arguments) == 0
    assert cut.read_bytes() == whole


def test_output_of_another_run_is_refused_and_untouched(tiny, tmp_path, capsys):
    assert bench("chair", tiny, tmp_path, "--count", "2") == 0
    before = (tmp_path / "captions.jsonl").read_bytes()
    assert bench("chair", tiny, tmp_path, "--count", "2", "--prompt", "what is this ?") == 2
    assert "belongs to another run: data.prompt was" in capsys.readouterr().err
    assert (tmp_path / "captions.jsonl").read_bytes() == before


def test_missing_picture_is_an_error_in_its_line(tiny, coco, tmp_path, capsys):
    images, annotations = coco
    (images / "6.png").unlink()
    arguments = ("--images", str(images), "--annotations", str(annotations), "--json")
    assert bench("chair", tiny, tmp_path / "out", *arguments) == 3
    scores = json.loads(capsys.readouterr().out)
    assert scores["failed"] == 1
    assert scores["counts"]["captions"] == 2
    failed = lines(tmp_path / "out" / "captions.jsonl")[1]
    assert failed["caption"] is None
    assert "6.png" in failed["error"]


def test_bench_pope_builds_questions_from_annotations(tiny, coco, tmp_path):
    images, annotations = coco
    arguments = ("--images", str(images), "--annotations", str(annotations), "--suffix", "vcd")
    assert bench("pope", tiny, tmp_path / "out", *arguments) == 0
    stored = lines(tmp_path / "out" / "answers.jsonl")
    assert {line["split"] for line in stored} == {"random", "popular", "adversarial"}
    assert len(stored) == 3 * 3 * 6
    for line in stored:
        assert line["prompt"] == line["question"] + " Please answer this question with one word."
        objects = INSIDE[int(line["image"].removesuffix(".png"))]
        name = line["question"].split(" ", 3)[3].removesuffix(" in the image?")
        assert (name in objects) == (line["label"] == "yes")


def test_pictures_without_enough_objects_give_no_questions(tiny, coco, tmp_path, capsys):
    images, _ = coco
    few = annotate(tmp_path / "few.json", {5: ("dog",), 6: ("cat",)})
    arguments = ("--images", str(images), "--annotations", str(few))
    assert bench("pope", tiny, tmp_path / "out", *arguments) == 2
    assert "There are no questions to ask" in capsys.readouterr().err


def test_bench_pope_with_question_files(tiny, coco, tmp_path, capsys):
    images, _ = coco
    questions = tmp_path / "my_popular.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"question_id": i, "image": "5.png", "text": f"Q{i}?", "label": label})
            + "\n"
            for i, label in enumerate(("yes", "no"), start=1)
        )
    )
    arguments = ("--images", str(images), "--questions", str(questions), "--json")
    assert bench("pope", tiny, tmp_path / "out", *arguments) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores["splits"]) == ["popular"]
    assert scores["splits"]["popular"]["metric"] == "pope/custom/strict"
    output = str(tmp_path / "out" / "answers.jsonl")
    assert main(["score", "pope", output, "--parser", "official", "--json"]) == 0
    official = json.loads(capsys.readouterr().out)
    assert official["splits"]["popular"]["metric"] == "pope/custom/official"
    assert official["splits"]["popular"]["counts"]["answers"] == 2
    assert bench("pope", tiny, tmp_path / "x", "--questions", str(questions)) == 2
    assert "needs the folder of the pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "moon"), "There is no split 'moon'"),
        (("--count", "0"), "--count is 0"),
        (("--seed", "-1"), "--seed is -1"),
        (("--annotations", "x.json"), "--annotations is given without --images"),
        (("--subset", "opera500"), "--images is missing. The official files 'coco-val2014'"),
        (("--images", "absent"), "There is no folder 'absent'"),
        (("--method", "Nothing"), "There is no method 'Nothing'"),
        (("--variant", "spacy"), "--variant does not take 'spacy'"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "chair", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "advice: " in error
    assert list(tmp_path.iterdir()) == []


def test_folder_without_annotations_must_be_val2014(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.jpg")
    assert main(["bench", "chair", "--images", str(tmp_path)]) == 2
    assert "holds no pictures named COCO_val2014" in capsys.readouterr().err


def test_val2014_pictures_need_no_annotations(tiny, tmp_path, capsys):
    image = chair.subset_ids("opera500")[0]
    images = tmp_path / "images"
    images.mkdir()
    for number in (image, 42):
        Image.new("RGB", (8, 8)).save(images / f"COCO_val2014_{number:012d}.jpg")
    arguments = ("--images", str(images), "--subset", "opera500", "--json")
    assert bench("chair", tiny, tmp_path / "out", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["captions"] == 1
    stored = lines(tmp_path / "out" / "captions.jsonl")
    assert [line["image_id"] for line in stored] == [image]
    assert stored[0]["prompt"] == "Please describe this image in detail."


def captions(path, *texts):
    path.write_text("".join(json.dumps({"image_id": 42, "caption": text}) + "\n" for text in texts))
    return str(path)


def test_score_chair_with_baseline(tmp_path, capsys):
    plain = captions(tmp_path / "plain.jsonl", "A dog and a zebra and a bus.")
    better = captions(tmp_path / "better.jsonl", "A dog.")
    assert main(["score", "chair", better, "--baseline", plain, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["metrics"]["chair_i"]["value"] == 0
    assert scores["change"]["chair_i"]["value"] == pytest.approx(-2 / 3)
    assert main(["score", "chair", better, "--baseline", plain]) == 0
    shown = capsys.readouterr().out
    assert "chair/wordnet: 1 captions, 1 picture" in shown
    assert "Paired change" in shown


def test_score_chair_says_which_pictures_it_does_not_know(tmp_path, capsys):
    known = captions(tmp_path / "a.jsonl", "A dog.")
    with open(known, "a") as file:
        file.write('{"image_id": 41, "caption": "A dog."}\n')
    assert main(["score", "chair", known]) == 0
    assert "1 pictures are not in the annotations" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text('{"image_id": 41, "caption": "A dog."}\n')
    assert main(["score", "chair", str(tmp_path / "b.jsonl")]) == 2
    assert "None of the 1 pictures" in capsys.readouterr().err


def test_score_pope_with_a_question_file(tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question_id": 1, "image": "a", "text": "Q?", "label": "yes"}\n')
    answers = tmp_path / "a.jsonl"
    answers.write_text('{"question_id": 1, "text": "Yes."}\n')
    arguments = ["score", "pope", str(answers), "--questions", str(questions), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["means"]["mean_accuracy"]["value"] == 1
    answers.write_text('{"answer": "yes"}\n{"answer": "no"}\n')
    assert main(arguments) == 2
    assert "2 answers for 1 questions" in capsys.readouterr().err


def test_help_is_light():
    code = (
        "import sys; from mmlm.cli import main; main(['bench', 'chair', '--help']);"
        "main(['score', 'pope', '--help']); "
        "print([m for m in ('torch', 'transformers', 'nltk') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
