"""POPE against the authors' scorers and builder, and the published question files."""

import json
import random
from collections import Counter

import pytest
from golden import golden

from benchmarks import pope
from benchmarks.pope import questions as pope_questions

pytestmark = pytest.mark.golden

OURS = {"TP": "tp", "FP": "fp", "TN": "tn", "FN": "fn"}
RATIOS = {
    "accuracy": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "f1",
    "yes_ratio": "yes_ratio",
    "yes": "yes_ratio",
}


def load(root):
    expected = json.loads(next(root.glob("expected*.json")).read_text())
    questions = pope.read_questions(next(root.glob("questions*.jsonl")))
    return expected, questions, pope.match_answers(next(root.glob("answers*.jsonl")), questions)


@pytest.mark.parametrize("parser", ["official", "opera", "vcd"])
@pytest.mark.parametrize("root", golden("pope*"))
def test_parsers_and_formulas(root, parser):
    expected, questions, answers = load(root)
    result = pope.score(answers, [question.label for question in questions], parser)
    for name, value in expected[parser].items():
        if name in OURS:
            assert result.counts[OURS[name]] == value, name
        elif name == "pred":
            assert [int(said) for said in result.predictions] == value
        elif name == "unknow":
            assert result.metrics["unparsed"] == value
        else:
            ours = result.metrics[RATIOS[name.lower()]]
            assert ours == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("root", golden("pope*"))
def test_all_no_is_undefined_where_the_script_crashes(root):
    expected, questions, _ = load(root)
    wanted = expected["official_all_no"]
    assert wanted["raises"] == "ZeroDivisionError"
    labels = [question.label for question in questions]
    result = pope.score(["no"] * len(labels), labels, "official")
    assert {name: result.counts[ours] for name, ours in OURS.items()} == {
        name: wanted[name] for name in OURS
    }
    assert result.metrics["yes_ratio"] == wanted["yes_ratio"]
    assert result.as_json(resamples=5)["metrics"]["precision"]["undefined"] is True


@pytest.mark.parametrize("root", golden("pope*"))
def test_built_files_are_byte_equal(root, tmp_path):
    config = json.loads(next(root.glob("build_config*.json")).read_text())
    lines = next(root.glob("segmentation*.jsonl")).read_text().splitlines()
    pictures = [(record["image"], record["objects"]) for record in map(json.loads, lines)]
    built = next(path for path in sorted(root.glob("built*")) if path.is_dir())
    generator = random.Random(config["seed"])
    for kind in pope.KINDS:
        questions = pope.build_questions(
            pictures,
            kind,
            generator,
            negatives=config["sample_num"],
            template=config["template"],
            compat=True,
        )
        pope.write_questions(tmp_path / "ours.json", questions)
        official = built / f"{config['dataset']}_pope_{kind}.json"
        assert (tmp_path / "ours.json").read_bytes() == official.read_bytes()
    counts = built / f"{config['dataset']}_ground_truth_objects.json"
    assert json.dumps(pope_questions.object_counts(pictures)) == counts.read_text()
    together = built / f"{config['dataset']}_co_occur.json"
    assert json.dumps(pope_questions.co_occurrence(pictures)) == together.read_text()


PUBLISHED = [
    (prefix, version, kind)
    for prefix, version in {
        "coco": "coco-2023-11",
        "legacy_coco": "coco-legacy",
        "aokvqa": "aokvqa",
        "gqa": "gqa",
    }.items()
    for kind in pope.KINDS
]


@pytest.mark.parametrize(("prefix", "version", "kind"), PUBLISHED)
def test_published_files_load_and_are_recognised(data_folder, prefix, version, kind):
    questions = pope.read_questions(data_folder / "pope" / f"{prefix}_{kind}.jsonl.gz")
    assert pope.recognise(questions) == (version, kind)
    assert len({question.image for question in questions}) == 500
    labels = Counter(question.label for question in questions)
    short = (version, kind) == ("coco-legacy", "random")
    assert labels == {"yes": 1500, "no": 1410 if short else 1500}
    per_image = Counter(question.image for question in questions)
    assert set(per_image.values()) == {6} if not short else set(per_image.values()) <= {3, 4, 5, 6}


def test_october_2023_is_told_apart_by_its_spelling(data_folder):
    questions = pope.read_questions(data_folder / "pope" / "legacy_coco_adversarial.jsonl.gz")
    misspelled = next(i for i, q in enumerate(questions) if "imange" in q.text)
    questions[misspelled] = questions[misspelled]._replace(
        text=questions[misspelled].text.replace("imange", "image")
    )
    assert pope.recognise(questions) == ("coco-2023-10", "adversarial")
    assert pope.recognise(questions[:-1]) is None


def test_llava_average_of_the_legacy_files(data_folder):
    results = {}
    for kind in pope.KINDS:
        questions = pope.read_questions(data_folder / "pope" / f"legacy_coco_{kind}.jsonl.gz")
        labels = [question.label for question in questions]
        answers = ["Yes" if i % 3 else "No" for i in range(len(labels))]
        results[kind] = pope.score(answers, labels, "official", version="coco-legacy")
    summary = pope.summarize(results)
    mean = sum(result.metrics["f1"] for result in results.values()) / 3
    assert summary.llava_average == pytest.approx(mean)
