"""``mmlm calibrate conflict-heads``: what it writes PH3 reads; samples of the world and of COCO."""

import json
from pathlib import Path

import pytest
from tiny import picture, shared

import mmlm
from benchmarks.coco import Picture
from decoding.head_records import HeadLists, HeadRecord, read_record
from mmlm.cli import main
from mmlm.cli.calibrate.conflict_heads import Calibrate, _show, best_fraction
from mmlm.cli.calibrate.conflict_samples import (
    Batches,
    Sample,
    SampleOptions,
    _question,
    _together,
    answer_token,
    samples,
)
from mmlm.cli.frame import Terminal

COMMAND = ("calibrate", "conflict-heads")


@pytest.fixture(scope="module")
def embedded():
    return mmlm.load("embedded")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The captions' samples of the embedded world; two runs, to be compared."""
    folder = tmp_path_factory.mktemp("heads")
    for name in ("a.json", "b.json"):
        more = ["--kind", "presence", "--count", "150", "--form", "direct", "--batch_size", "75"]
        assert main([*COMMAND, "--output", str(folder / name), *more, "--quiet"]) == 0
    return folder


@pytest.mark.slow
def test_the_same_command_writes_the_same_file_and_ph3_reads_it(written, embedded):
    record = read_record(written / "a.json")
    assert (written / "a.json").read_text() == (written / "b.json").read_text()
    assert record.shape == (8, 6)
    assert record.model == "embedded"
    assert record.samples["kept"] >= 30
    assert record.settings["form"] == "direct"
    assert record.settings["kinds"] == ["presence"]
    assert set(record.sweep) == {"plain", "image", "memory"}
    # The one head that looks an object up (see docs/effects.md).
    assert record.lists.image[0] == (4, 4)
    method = mmlm.PH3(heads_file=str(written / "a.json"), towards="memory", fraction=0.01)
    assert method.pruned == ((4, (4,)),)
    with method(embedded[0]):
        pass


def test_best_fraction_by_hand():
    shares = [(0.01, 0.5), (0.02, 0.3), (0.05, 0.3), (0.1, 0.6)]
    assert best_fraction(shares, 0.5, "image") == 0.02
    assert best_fraction(shares, 0.5, "memory") == 0.1
    assert best_fraction(shares, 0.3, "image") is None
    assert best_fraction([], 0.5, "memory") is None


@pytest.fixture
def coco(tmp_path):
    """Six pictures: tables with chairs, streets with cars, one table without a chair."""
    objects = [("dining table", "chair", "cup"), ("dining table", "chair"), ("car", "person"),
               ("car", "person", "bus"), ("dining table", "cup"), ("person", "cup")]  # fmt: skip
    names = sorted({name for own in objects for name in own})
    for number in range(len(objects)):
        picture(number, (60 + number, 50)).save(tmp_path / f"{number}.png")
    content = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(len(objects))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": n, "category_id": names.index(name)}
            for n, own in enumerate(objects)
            for name in own
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path, objects


def test_questions_about_coco_pictures(coco):
    path, objects = coco
    found = samples(SampleOptions(instances=path))
    assert len(found) == 6
    for one in found:
        shown, other = (objects[int(p.stem)] for p in (one.picture, one.donor))
        name = one.question.split(" in the image?")[0].removeprefix("Is there a ").strip()
        name = name.removeprefix("n ")
        assert (one.image == "Yes") == (name in shown) != (name in other)
        assert {one.image, one.memory} == {"Yes", "No"}
    by_picture = {int(one.picture.stem): one for one in found}
    # A table without a chair: if it is asked for what is absent, then for a chair.
    if by_picture[4].memory == "Yes":
        assert by_picture[4].question.startswith("Is there a chair in the image?")
    assert samples(SampleOptions(instances=path)) == found
    assert len(samples(SampleOptions(instances=path, count=2))) == 2


def test_donors_share_the_most_objects_otherwise(coco):
    path, objects = coco
    for one in samples(SampleOptions(instances=path)):
        own = int(one.picture.stem)
        shown = set(objects[own])
        (name,) = [n for n in {n for o in objects for n in o} if f" {n} in the" in one.question]

        def apart(number, name=name, shown=shown):
            return len(shown ^ {name} ^ set(objects[number]))

        others = [n for n, o in enumerate(objects) if n != own and (name in o) != (name in shown)]
        assert int(one.donor.stem) in others
        assert apart(int(one.donor.stem)) == min(map(apart, others))


def test_the_most_alike_picture_is_no_donor_without_the_object():
    shown = [("person", "cup"), ("person", "cup"), ("dog", "cup", "bus")]
    pictures = [Picture(n, f"{n}.png", own) for n, own in enumerate(shown)]
    asked = _question(pictures[0], _together(pictures), pictures, Path(), absent=True)
    assert asked.question.startswith("Is there a dog")
    assert asked.donor == Path("2.png")


def test_seed_and_first_choose_the_pictures(coco):
    path, _ = coco

    def pictures(**options):
        return [one.picture for one in samples(SampleOptions(instances=path, **options))]

    assert pictures(first=2) == pictures()[2:]
    assert pictures(first=1, count=3) == pictures()[1:4]
    assert len({tuple(pictures(seed=seed)) for seed in range(4)}) > 1


def test_objects_are_expected_by_how_often_others_stand_beside_them():
    shown = (
        [("person", "cup")] * 4
        + [("person",)] * 4
        + [("person", "fork", "knife"), ("person", "fork")]
    )
    pictures = [Picture(n, f"{n}.png", own) for n, own in enumerate(shown)]
    # A cup stands beside 4 of 10 people and no fork; a knife beside 1 of 10 and 1 of 2: 0.4 < 0.6.
    given = (_together(pictures), pictures, Path())
    asked = _question(pictures[-1], *given, absent=True)
    assert (asked.memory, asked.question[:16]) == ("Yes", "Is there a knife")
    # Of what is there, a fork is the least expected: beside 2 of 10 people, who hold every fork.
    asked = _question(pictures[-1], *given, absent=False)
    assert (asked.image, asked.memory, asked.question[:15]) == ("Yes", "No", "Is there a fork")


def test_batches_have_both_pictures_in_one_length(coco, embedded):
    path, _ = coco
    model, processor = embedded
    options = SampleOptions(instances=path)
    found = samples(options)
    batches = Batches(model, processor, found, options, 4)
    assert len(batches) == 2
    first, second = batches
    assert first.inputs["input_ids"].equal(first.donor["input_ids"])
    assert not first.inputs["pixel_values"].equal(first.donor["pixel_values"])
    assert first.neutral is None
    assert second.kinds == ("coco", "coco")
    assert [one.kinds for one in batches.only([5])] == [("coco",)]


def test_donors_are_as_large_as_the_pictures():
    """Where larger pictures take more positions."""
    model, processor = shared("qwen2_5_vl")
    sizes = ((56, 56), (112, 84))
    pictures = [picture(number, size) for number, size in enumerate(sizes)]
    found = [
        Sample("coco", one, other, "is there a dog ?", "Yes", "No")
        for one, other in (pictures, pictures[::-1])
    ]
    (batch,) = Batches(model, processor, found, SampleOptions(), 2)
    assert batch.inputs["attention_mask"].sum(-1).unique().numel() == 2
    for name in ("input_ids", "attention_mask"):
        assert batch.inputs[name].equal(batch.donor[name])


def test_answers_of_the_world_are_the_next_tokens(embedded):
    model, processor = embedded
    options = SampleOptions(count=12, prior="neutral")
    found = samples(options)
    words = processor.tokenizer.convert_ids_to_tokens
    for batch, one in zip(Batches(model, processor, found, options, 1), found, strict=True):
        assert words(batch.image.tolist()) == [one.image]
        assert words(batch.memory.tolist()) == [one.memory]
        text = processor.tokenizer.decode(batch.inputs["input_ids"][0])
        assert text.endswith(one.begun or "assistant :")
        assert (batch.neutral is not None) == bool(one.begun)
        if batch.neutral is not None:
            assert batch.neutral["input_ids"].shape == batch.inputs["input_ids"].shape


def test_first_tokens_of_answers(embedded):
    processor = embedded[1]
    assert answer_token(processor, "user : is it ? assistant :", "yes") == (
        processor.tokenizer.convert_tokens_to_ids("yes")
    )
    assert answer_token(processor, "", "no") == processor.tokenizer.convert_tokens_to_ids("no")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--count", "0"), "count must be at least 1, got 0"),
        (("--seed", "-1"), "must not be negative"),
        (("--protect", "x"), "protect must be LAYER.HEAD, e.g. 3.1, or a file, got 'x'"),
        (("--protect_layers", "-1"), "protect_layers must not be negative"),
        (("--significance", "-1"), "significance must be at least 0"),
        (("--batch_size", "0"), "batch_size must be at least 1"),
        (("--instances", "a.json", "--kind", "theme"), "are for the embedded world"),
        (("--instances", "absent.json"), "absent.json"),
        (("--output", "absent/heads.json"), "There is no folder 'absent'"),
        (("--method", "Nothing"), "There is no method 'Nothing'"),
    ],
)
def test_refusals_before_any_work(arguments, message, capsys):
    assert main([*COMMAND, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_none_of_ours_stays(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text("{}")
    assert main([*COMMAND, "--output", str(path)]) == 2
    assert "exists and is no file of conflict heads" in " ".join(capsys.readouterr().err.split())
    assert path.read_text() == "{}"


def test_too_few_samples_are_an_error_that_counts_them(tmp_path, capsys):
    arguments = ("--kind", "caption", "--count", "3", "--output", str(tmp_path / "h.json"))
    assert main([*COMMAND, *arguments]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "At least 30 are needed" in said
    assert not (tmp_path / "h.json").exists()


def test_protected_heads_are_pairs_or_a_map_of_text_heads(tmp_path):
    import torch

    from mmlm.engine.head_maps import HeadMap

    assert Calibrate(protect=("3.1", "0.12")).protected() == ((3, 1), (0, 12))
    score = torch.tensor([[0.0, 0.5], [0.9, 0.05]])
    found = HeadMap(kind="text", values={"score": score}, rank="score", counted={"steps": 99})
    found.save(tmp_path / "text.json")
    both = (str(tmp_path / "text.json"), "2.0")
    assert Calibrate(protect=both).protected() == ((1, 0), (0, 1), (2, 0))
    with pytest.raises(ValueError, match="there is no file"):
        Calibrate(protect=("absent.json",))


def test_what_is_not_listed_is_said_and_so_is_that_nothing_is(capsys):
    zeros = [[0.0, 0.0], [0.0, 0.0]]
    record = HeadRecord(
        shape=(2, 2),
        lists=HeadLists(
            ((1, 0),),
            (),
            {"in both lists": (), "protected": ((0, 1), (1, 1))},
            {"image": 0.9, "memory": 0.4},
        ),
        values={name: zeros for name in ("pushes", "says", "remembers")},
        samples={"samples": 40, "kept": 32},
        settings={},
        sweep={"plain": 0.25, "image": [], "memory": [(0.005, 0.5)]},
        fraction={"memory": 0.005},
    )
    _show(Calibrate(), record, Terminal())
    said = capsys.readouterr().out
    assert "32 torn samples of 40" in said
    assert "Not listed, in both lists: none." in said
    assert "Not listed, protected: 0.1, 1.1." in said
    assert "{'image': 0.9, 'memory': 0.4}" in said
    assert "Best: 0.5%." in said
