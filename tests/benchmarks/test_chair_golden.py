"""CHAIR against what the authors' scorers print, for every golden set of the format."""

import gzip
import json
from pathlib import Path

import pytest
from golden import folder, golden

from benchmarks import chair

pytestmark = pytest.mark.golden

FILES = {"pattern": "pattern", "wordnet": "wordnet", "wordnet_pr": "wordnet"}
OURS = {
    "CHAIRs": "chair_s",
    "CHAIRi": "chair_i",
    "Recall": "recall",
    "Precision": "precision",
    "F1": "f1",
}


def chair_folders():
    # The two golden sets differ in format: fabricated annotations, or logs with the val2014 table.
    found = [p for p in golden("chair*") if "log" not in p.id]
    return found or golden("chair")


def log_folders():
    return [p for p in golden("chair*") if "log" in p.id] or golden("chair_*logs*")


def read_lines(path: Path) -> list[dict]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def annotations(root: Path, kind: str) -> list[Path]:
    return sorted((root / "annotations").glob(f"{kind}_*.json"))


def compare(metrics: dict, expected: dict) -> None:
    for official, ours in OURS.items():
        if official in expected:
            assert metrics[ours] == pytest.approx(expected[official], abs=1e-12), official
    if "Len" in expected:
        assert metrics["mean_length"] / 100 == pytest.approx(expected["Len"], abs=1e-12)


def captions_file(root: Path, expected: dict) -> Path:
    """The captions file with as many lines as there are expected sentences."""
    wanted = [sentence["caption"] for sentence in expected["sentences"]]
    for path in sorted(root.glob("captions*.jsonl")):
        if [line["caption"] for line in read_lines(path)] == wanted:
            return path
    raise FileNotFoundError(f"no captions*.jsonl in {root} belongs to the expected sentences")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("root", chair_folders())
def test_every_sentence_and_all_totals(root, file):
    variant = FILES[file]
    expected = json.loads(next(root.glob(f"expected_*{file}.json")).read_text())
    truth = chair.truth_from_coco(
        annotations(root, "instances"), annotations(root, "captions"), variant
    )
    result = chair.score(read_lines(captions_file(root, expected)), truth, variant)
    # Pictures without any object need not stand in the scorers' table.
    official = {int(image): objects for image, objects in expected["gt_objects"].items()}
    assert {image: sorted(truth[image]) for image in truth} == {
        image: official.get(image, []) for image in truth
    }
    assert official.keys() <= truth.keys()
    assert len(result.per_caption) == len(expected["sentences"])
    scheme = "pai" if file == "wordnet_pr" else "original"
    for ours, theirs in zip(result.per_caption, expected["sentences"], strict=True):
        assert ours.objects == theirs["mscoco_generated_words"]
        words = [[mention.word, mention.node] for mention in ours.hallucinated]
        assert words == theirs["mscoco_hallucinated_words"]
        assert sorted(ours.truth) == theirs["mscoco_gt_words"]
        assert len(ours.reading.words) == len(theirs["words"])
        assert ours.hallucination_idxs(scheme) == theirs["hallucination_idxs"]
        assert int(bool(ours.hallucinated)) == theirs["metrics"]["CHAIRs"]
    compare(result.metrics, expected["overall_metrics"])


@pytest.mark.parametrize("root", chair_folders())
def test_file_without_objects_is_undefined_where_the_scorers_crash(root):
    expected = json.loads(next(root.glob("expected_noobject*.json")).read_text())
    captions = read_lines(next(root.glob("captions_noobject*.jsonl")))
    for file, error in expected.items():
        assert error == "ZeroDivisionError"
        truth = chair.truth_from_coco(annotations(root, "instances"), variant=FILES[file])
        record = chair.score(captions, truth, FILES[file]).as_json()["metrics"]
        assert record["chair_i"]["value"] is None
        assert record["chair_i"]["undefined"] is True
        assert record["chair_i"]["denominator"] == 0
        assert record["chair_s"]["value"] == 0


@pytest.mark.parametrize("root", log_folders())
def test_released_captions_of_a_real_model(root):
    truth = chair.truth_of_val2014()
    for path in sorted(root.glob("expected*.json")):
        for log, variants in json.loads(path.read_text()).items():
            captions = chair.read_captions(next(root.glob(f"{log}*")))
            assert len(captions) == 500
            for file, expected in variants.items():
                compare(chair.score(captions, truth, FILES[file]).metrics, expected)


@pytest.mark.parametrize("root", log_folders())
def test_opera500_is_the_picture_list_of_the_llava_log(root):
    logged = chair.read_captions(next(root.glob("llava-1.5*")))
    assert chair.subset_ids("opera500") == sorted(line["image_id"] for line in logged)


def test_shipped_tables_equal_the_data_they_were_made_from(data_folder):
    import numpy as np

    from mmlm.language.tables import load_table

    for name in ("synonyms", "double_words", "pattern_singularize", "wordnet_lemmas"):
        source = json.loads((folder("MMLM_DATA", "data") / "chair" / f"{name}.json").read_text())
        assert load_table(f"{name}.json") == source
    with np.load(data_folder / "chair" / "coco_val2014_objects.npz") as table:
        images = {int(image) for image in table["image_ids"]}
    assert set(chair.truth_of_val2014()) == images


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("root", chair_folders())
def test_metrics_of_every_caption(root, file):
    expected = json.loads(next(root.glob(f"expected_*{file}.json")).read_text())
    truth = {int(image): set(found) for image, found in expected["gt_objects"].items()}
    result = chair.score(read_lines(captions_file(root, expected)), truth, FILES[file])
    for ours, theirs in zip(result.per_caption, expected["sentences"], strict=True):
        for official, name in OURS.items():
            value = ours.metrics[name]
            if official in theirs["metrics"]:
                # Where a quotient does not exist the scorers store 0.
                assert (value or 0) == pytest.approx(theirs["metrics"][official], abs=1e-12)
            elif name in ("precision", "f1") and file == "wordnet_pr":
                assert value is None
