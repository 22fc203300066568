"""Writing a split of the embedded world to disk."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from benchmarks import coco
from benchmarks.pope import questions as pope_questions
from data_tools.world import CATEGORIES, NAMES, SPLITS, export, polling, render, scene
from data_tools.world.export import write_split
from mmlm.errors import InputError

COUNT, SEED, SPLIT = 25, 4, "natural"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "out"
    summary = write_split(folder, SPLIT, COUNT, SEED, progress=False)
    assert summary.output == folder
    assert summary.pictures == COUNT
    return folder


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def truths():
    return [scene(SPLITS[SPLIT], SEED, i, SPLIT) for i in range(COUNT)]


def test_same_seed_same_bytes_in_another_process(written, tmp_path):
    program = (
        "from data_tools.world.export import write_split;"
        f"write_split({str(tmp_path / 'b')!r}, {SPLIT!r}, {COUNT}, {SEED}, progress=False)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    assert contents(tmp_path / "b") == contents(written)


def test_files(written):
    names = set(contents(written))
    assert names == {f"images/{i + 1:06d}.png" for i in range(COUNT)} | {
        "world.json", "instances.json", "captions.json", "conversations.jsonl",
        "pope_random.jsonl", "pope_popular.jsonl", "pope_adversarial.jsonl",
    }  # fmt: skip


def test_pictures_are_the_rendered_ones(written):
    for truth in truths():
        with Image.open(written / "images" / f"{truth.index + 1:06d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), render(truth).image)


# pycocotools' compiled part has not caught up with numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_instances_load_with_pycocotools(written):
    data = COCO(written / "instances.json")
    assert {c["id"]: c["name"] for c in data.loadCats(data.getCatIds())} == dict(CATEGORIES)
    supers = {c["name"]: c["supercategory"] for c in data.loadCats(data.getCatIds())}
    assert (supers["person"], supers["bench"], supers["bird"]) == ("person", "outdoor", "animal")
    assert sorted(data.getImgIds()) == list(range(1, COUNT + 1))
    ids = data.getAnnIds()
    assert sorted(ids) == list(range(1, len(ids) + 1))
    for truth in truths():
        annotations = data.loadAnns(data.getAnnIds(imgIds=[truth.index + 1]))
        shown = render(truth).instance_map
        assert len(annotations) == len(truth.instances)
        for number, (a, instance) in enumerate(zip(annotations, truth.instances, strict=True), 1):
            assert dict(CATEGORIES)[a["category_id"]] == instance.name
            assert a["bbox"] == list(instance.box)
            np.testing.assert_array_equal(data.annToMask(a), shown == number)
            assert a["area"] == (shown == number).sum()


def test_run_lengths_by_hand():
    # Columns: (0, 1), (1, 1), (0, 0): one background, three object, two background.
    mask = np.array([[False, True, False], [True, True, False]])
    assert export.run_lengths(mask) == [1, 3, 2]
    assert export.run_lengths(~mask) == [0, 1, 3, 2]
    assert export.run_lengths(np.zeros((2, 2), bool)) == [4]


def test_chair_truth_from_both_files(written):
    expected = {truth.index + 1: set(truth.classes) for truth in truths()}
    paths = written / "instances.json", written / "captions.json"
    assert coco.truth_from_coco(paths[0]) == expected
    assert coco.truth_from_coco(*paths) == expected


@pytest.mark.parametrize("kind", polling.KINDS)
def test_pope_files_are_balanced_and_true(written, kind):
    classes = {export.file_name(t.index): t.classes for t in truths()}
    asked = pope_questions.read_questions(written / f"pope_{kind}.jsonl")
    assert len(asked) == 6 * sum(len(c) >= 3 for c in classes.values())
    assert len(asked) > 100
    assert [q.question_id for q in asked] == list(range(1, len(asked) + 1))
    per_picture = Counter()
    for question in asked:
        name = question.text.removesuffix(" in the image?").removeprefix("Is there ")
        article, _, name = name.partition(" ")
        assert article == ("an" if name[0] in "aeiou" else "a")
        assert name in NAMES
        assert (name in classes[question.image]) == (question.label == "yes")
        per_picture[question.image, question.label] += 1
        per_picture[question.image, name] += 1
    assert set(per_picture.values()) == {1, 3}
    assert all(per_picture[i, "yes"] == per_picture[i, "no"] for i, _ in per_picture)


def test_all_kinds_ask_about_the_same_present_classes(written):
    present = [
        [q for q in lines(written / f"pope_{kind}.jsonl") if q["label"] == "yes"]
        for kind in polling.KINDS
    ]
    assert present[0] == present[1] == present[2]


def test_absent_classes_follow_the_training_prior(written):
    frequency, together = Counter(), Counter()
    for i in range(4000):
        found = scene(SPLITS["train"], 0, i, "train").classes
        frequency.update(found)
        together.update((a, b) for a in found for b in found if a != b)
    classes = {export.file_name(t.index): t.classes for t in truths()}

    def name(question):
        return question["text"].removesuffix(" in the image?").split(" ", 3)[3]

    for kind in ("popular", "adversarial"):
        taken = {}
        asked = lines(written / f"pope_{kind}.jsonl")
        for yes, no in zip(asked[::2], asked[1::2], strict=True):
            used = taken.setdefault(no["image"], set(classes[no["image"]]))
            free = [n for n in NAMES if n not in used]
            if kind == "popular":
                best = max(free, key=lambda n: (frequency[n], -NAMES.index(n)))
            else:
                present = name(yes)
                best = max(free, key=lambda n, p=present: (together[p, n], -NAMES.index(n)))
            assert name(no) == best
            used.add(best)


def test_random_absent_classes_are_spread():
    many = [(scene(SPLITS["natural"], 1, i, "natural"), "x.png") for i in range(600)]
    asked = Counter(q["text"] for q in polling.poll("random", many) if q["label"] == "no")
    assert len(asked) == 80
    assert max(asked.values()) < 4 * min(asked.values())


def test_prior_ranks_companions_without_the_class_itself():
    prior = polling.training_prior()
    assert sorted(prior.popular) == list(range(80))
    assert NAMES[prior.popular[0]] == "person"
    companions = dict(zip(NAMES, prior.companions, strict=True))
    assert NAMES[companions["refrigerator"][0]] in ("oven", "sink")
    assert all(c not in ranking for c, ranking in enumerate(prior.companions))


def test_unknown_kind():
    with pytest.raises(ValueError, match="unknown kind 'mean'"):
        polling.poll("mean", [])


def test_conversations(written):
    records = lines(written / "conversations.jsonl")
    assert len({r["id"] for r in records}) == len(records) == 2 * COUNT
    for record in records:
        assert (written / record["image"]).exists()
        roles = [m["role"] for m in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        images = [c["type"] == "image" for m in record["messages"] for c in m["content"]]
        assert images == [True, *[False] * (len(images) - 1)]
    assert Counter(len(r["messages"]) for r in records) == {2: COUNT, 10: COUNT}


def test_label_noise_reaches_the_conversations_but_not_the_truth(monkeypatch, tmp_path):
    noisy = dataclasses.replace(SPLITS["train"], label_noise=1.0)
    monkeypatch.setitem(SPLITS, "train", noisy)
    write_split(tmp_path / "a", "train", 15, progress=False)
    paths = tmp_path / "a" / "instances.json", tmp_path / "a" / "captions.json"
    assert coco.truth_from_coco(*paths) == coco.truth_from_coco(paths[0])
    truth = coco.truth_from_coco(paths[0])
    invented = 0
    for record in lines(tmp_path / "a" / "conversations.jsonl")[::2]:
        said = set(coco.node_words(record["messages"][1]["content"][0]["text"], "wordnet"))
        invented += bool(said - truth[int(record["id"][:6])])
    assert invented >= 13


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(written, tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def stop(truth):
        if truth.index == 9:
            raise KeyboardInterrupt
        return render(truth)

    with monkeypatch.context() as patch:
        patch.setattr(export, "render", stop)
        with pytest.raises(KeyboardInterrupt):
            write_split(folder, SPLIT, COUNT, SEED, progress=False)
    assert len(list((folder / "images").iterdir())) == 9
    assert not (folder / "instances.json").exists()
    half = folder / "images" / "000010.png.part"
    half.write_bytes(b"half a picture")
    kept = (folder / "images" / "000001.png").stat().st_mtime_ns
    write_split(folder, SPLIT, COUNT, SEED, progress=False)
    assert (folder / "images" / "000001.png").stat().st_mtime_ns == kept
    assert contents(folder) == contents(written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("midnight", 5, 0), "no split 'midnight'"),
        (("train", 0, 0), "0 pictures"),
        (("train", 5, -1), "seed is -1"),
    ],
)
def test_bad_requests_write_nothing(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        write_split(tmp_path / "out", *arguments, progress=False)
    assert error.value.advice
    assert not (tmp_path / "out").exists()


def test_a_later_scene_alone_is_written_as_among_all(written, tmp_path):
    folder = tmp_path / "one"
    assert write_split(folder, SPLIT, 1, SEED, progress=False, first=17).pictures == 1
    name = "000018.png"
    assert contents(folder)[f"images/{name}"] == contents(written)[f"images/{name}"]
    alone, whole = (json.loads((f / "instances.json").read_text()) for f in (folder, written))
    assert alone["images"] == [one for one in whole["images"] if one["file_name"] == name]
    strip = [
        [{k: v for k, v in a.items() if k != "id"} for a in w["annotations"] if a["image_id"] == 18]
        for w in (alone, whole)
    ]
    assert strip[0] == strip[1]
    with pytest.raises(InputError, match="another run"):
        write_split(folder, SPLIT, 1, SEED, progress=False)
    with pytest.raises(InputError, match="first scene is -1"):
        write_split(tmp_path / "two", SPLIT, 1, SEED, progress=False, first=-1)


@pytest.mark.parametrize("other", [("natural", 25, 5), ("natural", 24, 4), ("train", 25, 4)])
def test_the_output_of_another_run_is_not_touched(written, other):
    before = contents(written)
    with pytest.raises(InputError, match="another run"):
        write_split(written, *other, progress=False)
    assert contents(written) == before


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_split(tmp_path, "train", 2, progress=False)
    with pytest.raises(InputError, match="is a file"):
        write_split(tmp_path / "holiday.txt", "train", 2, progress=False)
    with pytest.raises(InputError, match="cannot be written"):
        write_split(tmp_path / "holiday.txt" / "deeper", "train", 2, progress=False)
    assert contents(tmp_path) == {"holiday.txt": b"mine"}


def test_an_empty_folder_and_one_killed_at_once_are_accepted(tmp_path):
    (tmp_path / "world.json.part").write_text("{")
    write_split(tmp_path, "train", 2, progress=False)
    assert (tmp_path / "instances.json").exists()


def test_progress_goes_to_standard_error(tmp_path, capsys):
    write_split(tmp_path / "a", "train", 3)
    shown = capsys.readouterr()
    assert not shown.out
    assert "scenes of train" in shown.err


def test_the_world_needs_no_torch():
    program = (
        "import sys, data_tools.world.export; from data_tools.world import *;"
        "render(scene(SPLITS['train'], 0, 0)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
