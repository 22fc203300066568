"""Questions about several pictures: equal for one seed, whole on the disk, every failure named."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_tools.merging import merge_shards
from data_tools.mia import compose as composing
from data_tools.mia.compose import Composer
from data_tools.mia.planning import ComposeSettings, TooFewPictures, plan
from data_tools.mia.prompts import CENTRE_PHRASES
from data_tools.mia.records import ALLOWED, check_instruction, locate
from data_tools.mia.sources import Source
from data_tools.pictures import Picture
from mmlm.inputs import load_image
from mmlm.sharding import Shard

SMALL = {"tile": 48, "margin": 40, "seed": 7}


def files(root):
    """Everything below OUT/compose except run and done files, by name."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted((root / "compose").rglob("*"))
        if path.is_file() and path.suffix in (".jsonl", ".png", ".jpg") and "done" not in path.name
    }


def instructions(root, kind="instructions"):
    text = (root / "compose" / f"{kind}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def one_format(name, n_images=None, **more):
    numbers = {} if n_images is None or name == "pip" else {name: {n_images: 1}}
    return ComposeSettings(**SMALL | {"formats": {name: 1.0}} | numbers | more)


def test_acceptance_6_same_seed_same_bytes(tmp_path, make_sources, run_compose):
    sources = make_sources(14)
    settings = ComposeSettings(**SMALL, refuse_every=5)
    statuses = run_compose(tmp_path / "a", sources, settings)
    run_compose(tmp_path / "b", sources, settings)
    assert statuses == {"ok": 14 * 3 + 5}  # 28 sequences and grids / 5
    assert len(files(tmp_path / "a")) >= 2 + 14 * 2  # two files of lines, all collages
    assert files(tmp_path / "a") == files(tmp_path / "b")
    run_compose(tmp_path / "c", sources, ComposeSettings(**SMALL | {"seed": 8}, refuse_every=5))
    assert instructions(tmp_path / "c") != instructions(tmp_path / "a")


def test_the_order_of_the_sources_is_none_of_the_seed(tmp_path, make_sources, run_compose):
    sources, settings = make_sources(9), ComposeSettings(**SMALL)
    run_compose(tmp_path / "a", sources, settings)
    run_compose(tmp_path / "b", sources[::-1], settings)
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert first.keys() == second.keys()
    for name, content in first.items():
        assert sorted(content.splitlines()) == sorted(second[name].splitlines()), name


def test_acceptance_6_shards_give_the_same_union(tmp_path, make_sources, run_compose):
    sources, settings = make_sources(14), ComposeSettings(**SMALL, refuse_every=5)
    run_compose(tmp_path / "whole", sources, settings)
    expected = files(tmp_path / "whole")
    for count in (2, 4):
        root = tmp_path / f"of{count}"
        for index in random.Random(count).sample(range(count), count):
            run_compose(root, sources, settings, Shard(index, count))
        merge_shards(root / "compose")
        made = {name: content for name, content in files(root).items() if "shard" not in name}
        assert made.keys() == expected.keys()
        for name, content in made.items():
            assert sorted(content.splitlines()) == sorted(expected[name].splitlines()), name


def test_a_resumed_run_composes_only_what_is_missing(
    tmp_path, make_sources, run_compose, monkeypatch
):
    sources, settings = make_sources(12), one_format("grid", 2)
    run_compose(tmp_path / "whole", sources, settings)
    save, saved = composing._save, []

    def full_disk(image, path):
        if len(saved) == 5:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(composing, "_save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run_compose(tmp_path / "cut", sources, settings)
    monkeypatch.setattr(composing, "_save", save)
    assert len(instructions(tmp_path / "cut")) == 5
    assert run_compose(tmp_path / "cut", sources, settings) == {"ok": 12}
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ALLOWED)
def test_every_record_holds_together(name, tmp_path, make_sources, run_compose):
    sources = make_sources(12)
    run_compose(tmp_path, sources, ComposeSettings(**SMALL | {"formats": {name: 1.0}}))
    by_id = {one.id: one for one in sources}
    made = instructions(tmp_path)
    assert len(made) == 12
    for line in made:
        check_instruction(line)
        source = by_id[line["id"].split("-")[0]]
        assert line["id"] == f"{source.id}-{name}{line['n_images']}"
        assert (line["question"], line["answer"]) == (source.question, source.answer)
        assert line["source"] == "coco"
        # The target stands at its place, every companion is another picture.
        assert locate(tmp_path, line["source_images"][line["target_index"] - 1]) == source.image
        assert len(set(line["source_images"])) == line["n_images"]
        assert "what is" in line["prompt_segments"][-1]["text"]
        for path in line["images"]:
            load_image(locate(tmp_path, path))


def test_the_target_s_place_is_drawn(tmp_path, make_sources, run_compose):
    run_compose(tmp_path, make_sources(40), one_format("sequence", 3))
    places = Counter(line["target_index"] for line in instructions(tmp_path))
    assert places.keys() == {1, 2, 3}
    assert min(places.values()) >= 5


def test_pictures_are_where_the_record_says(tmp_path, make_sources, run_compose):
    run_compose(tmp_path, make_sources(9), one_format("grid", 4, tile=64))
    line = instructions(tmp_path)[0]
    canvas = np.asarray(load_image(locate(tmp_path, line["images"][0])))
    for path, (x0, y0, x1, y1) in zip(line["source_images"], line["tiles"], strict=True):
        picture = load_image(locate(tmp_path, path))
        size = (64, int(64 / (picture.width / picture.height)))
        if picture.width < picture.height:
            size = (int(64 * picture.width / picture.height), 64)
        small = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
        tile = canvas[y0:y1, x0:x1]
        # Rows that the label below this tile cannot reach.
        np.testing.assert_array_equal(tile[5 : size[1], : size[0]], small[5:])


def test_pic_in_pic_lays_the_target_on_its_companion(tmp_path, make_sources, run_compose):
    run_compose(tmp_path, make_sources(6), one_format("pip"))
    for line in instructions(tmp_path):
        assert line["target_index"] == 2
        outer = load_image(locate(tmp_path, line["source_images"][0]))
        canvas = np.asarray(load_image(locate(tmp_path, line["images"][0])))
        whole, (x0, y0, x1, y1) = line["tiles"]
        assert whole == [0, 0, *outer.size]
        same = (canvas == np.asarray(outer)).all(axis=2)
        assert same[:y0].all()
        assert same[:, :x0].all()
        assert same[y0:y1, x0:x1].mean() < 0.05
        text = line["prompt_segments"][1]["text"]
        assert text.split(",")[0] in CENTRE_PHRASES


def test_shares_of_formats_and_numbers(make_sources):
    sources = [
        Source(f"s{n}", make_sources(1)[0].image.with_name(f"{n % 40}.png"), "Q?", "A.", "coco")
        for n in range(4000)
    ]
    settings = ComposeSettings(formats={"sequence": 1.0, "grid": 0.5, "pip": 0.25})
    records = plan(sources, settings).records
    counts = Counter(record["format"] for record in records)
    assert counts["sequence"] == 4000
    assert abs(counts["grid"] / 4000 - 0.5) < 0.03
    assert abs(counts["pip"] / 4000 - 0.25) < 0.03
    twos = sum(record["n_images"] == 2 for record in records if record["format"] == "sequence")
    assert abs(twos / 4000 - 20_000 / 36_410) < 0.03  # "about 55 %"
    assert {r["n_images"] for r in records if r["format"] == "grid"} == {2, 3, 4, 6, 9}


def test_limit_draws_sources_and_long_answers_are_left_out(make_sources):
    sources = make_sources(20)
    long = Source("long", sources[0].image, "Q?", "x" * 512, "coco")
    short = Source("short", sources[0].image, "Q?", "x" * 511, "coco")
    planned = plan([*sources, long, short], one_format("sequence", 2))
    assert planned.too_long == 1
    assert "short-sequence2" in {record["id"] for record in planned.records}
    some = plan(sources, one_format("sequence", 2, limit=6)).records
    assert len(some) == 6
    assert some == plan(sources, one_format("sequence", 2, limit=6)).records
    assert [one["id"] for one in some] != [f"coco{n}-sequence2" for n in range(6)]


def test_companions_come_from_the_target_s_set(tmp_path, make_sources, run_compose):
    sources = make_sources(5, "coco") + make_sources(5, "vg")
    run_compose(tmp_path / "own", sources, one_format("sequence", 5))
    for line in instructions(tmp_path / "own"):
        assert all(f"/{line['source']}" in path for path in line["source_images"])
    run_compose(tmp_path / "all", sources, one_format("sequence", 5, companions="all"))
    mixed = [{path.rstrip("0123456789.png") for path in line["source_images"]}
             for line in instructions(tmp_path / "all")]  # fmt: skip
    assert any(len(groups) == 2 for groups in mixed)


def test_one_picture_in_several_records_is_one_companion(make_sources):
    pictures = make_sources(2)
    twice = [Source(f"q{n}", pictures[n % 2].image, "Q?", "A.", "coco") for n in range(6)]
    assert len(plan(twice, one_format("sequence", 2)).records) == 6
    with pytest.raises(TooFewPictures):
        plan(twice, one_format("sequence", 3))


def test_refusals_ask_for_a_picture_that_is_not_there(tmp_path, make_sources, run_compose):
    settings = ComposeSettings(**SMALL | {"formats": {"sequence": 1.0}}, refuse_every=4)
    run_compose(tmp_path, make_sources(12), settings)
    refusals = instructions(tmp_path, "refusals")
    assert len(refusals) == 3
    assert len(instructions(tmp_path)) == 12
    for line in refusals:
        assert line["target_index"] == line["n_images"] + 1
        assert f"In Image{line['n_images'] + 1}, " in line["prompt_segments"][-1]["text"]
        assert f"no Image{line['n_images'] + 1}" in line["answer"]


def test_composed_pictures_are_named_by_content_and_used_again(
    tmp_path, make_sources, run_compose, monkeypatch
):
    sources, settings = make_sources(8), one_format("grid", 2)
    run_compose(tmp_path / "a", sources, settings)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.png")}
    assert len(before) == 8
    for name in ("done", "instructions", "refusals"):
        (tmp_path / "a" / "compose" / f"{name}.jsonl").unlink()
    broken, other_size, *kept = before
    broken.write_bytes(broken.read_bytes()[:100])
    Image.new("RGB", (9, 9)).save(other_size)
    damaged = {broken.read_bytes(), other_size.read_bytes()}
    run_compose(tmp_path / "a", sources, settings)
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
    assert not damaged & {broken.read_bytes(), other_size.read_bytes()}
    load_image(broken)
    # The same two pictures in another order, with other pixels, or another seed: another name.
    planned = plan(sources, settings)
    stage = Composer(tmp_path / "n", planned, settings)
    one, two = (Picture.read("x", source.image) for source in sources[:2])
    names = {stage._shown("grid", pictures)[0][0].name for pictures in ([one, two], [two, one])}
    reseeded = one_format("grid", 2, seed=99)
    other = Composer(tmp_path / "n", plan(sources, reseeded), reseeded)
    names.add(other._shown("grid", [one, two])[0][0].name)
    assert len(names) == 3


def test_jpeg_keeps_its_colours(tmp_path, make_sources, run_compose):
    run_compose(tmp_path, make_sources(4), one_format("grid", 2, picture_format="jpeg"))
    (line, *_) = instructions(tmp_path)
    path = locate(tmp_path, line["images"][0])
    with Image.open(path) as image:
        assert (path.suffix, image.format) == (".jpg", "JPEG")
        assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # no chroma subsampling
        assert max(image.quantization[0]) < 20  # quality 95


# Failures, in the order of the specification's table.


def test_failure_unreadable_companion_is_replaced(tmp_path, make_sources, run_compose):
    sources = make_sources(12)
    broken = sources[3].image
    broken.write_bytes(b"no picture")
    statuses = run_compose(tmp_path, sources, one_format("sequence", 3))
    assert statuses == {"ok": 11, "unreadable_image": 1}
    lines = instructions(tmp_path)
    assert all(str(broken) not in line["source_images"] for line in lines)
    assert all(len(set(line["source_images"])) == 3 for line in lines)


def test_failure_unreadable_target(tmp_path, make_sources, run_compose):
    sources = make_sources(6)
    sources[0].image.unlink()
    statuses = run_compose(tmp_path, sources, one_format("pip"))
    assert statuses == {"ok": 5, "unreadable_image": 1}
    assert "coco0-pip2" not in {line["id"] for line in instructions(tmp_path)}


def test_failure_no_readable_companion(tmp_path, make_sources, run_compose):
    sources = make_sources(3)
    for one in sources[1:]:
        one.image.write_bytes(b"")
    statuses = run_compose(tmp_path, sources, one_format("sequence", 2))
    assert statuses == {"unreadable_image": 2, "unreadable_companions": 1}


def test_failure_five_others_are_tried_and_no_more(
    tmp_path, make_sources, run_compose, monkeypatch
):
    sources = make_sources(30)
    for one in sources[1:]:
        one.image.write_bytes(b"")
    read, tries = Picture.read, []

    def counted(identifier, path):
        tries.append(path)
        return read(identifier, path)

    monkeypatch.setattr(composing.Picture, "read", counted)
    run_compose(tmp_path, sources[:1] + [
        Source(one.id, one.image, "Q?", "x" * 999, "coco") for one in sources[1:]
    ], one_format("sequence", 2))  # fmt: skip
    assert len(tries) == len(set(tries)) == 1 + 1 + 5  # target, companion, five others


def test_failure_too_few_pictures(make_sources):
    sources = make_sources(4, "coco") + make_sources(9, "vg")
    with pytest.raises(ValueError, match=r"'coco' has 3 pictures.*sequence of 5 needs 4") as caught:
        plan(sources, one_format("sequence", 5))
    assert "--compose.companions all" in caught.value.advice
    plan(sources, one_format("sequence", 5, companions="all"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence": {6: 1}}, "sequence is made of 2, 3, 4, 5 pictures, got 6"),
        ({"grid": {5: 1}}, "grid is made of 2, 3, 4, 6, 9 pictures, got 5"),
        ({"formats": {"collage": 1.0}}, "formats are sequence, grid, pip, got 'collage'"),
        ({"formats": {"grid": 1.5}}, r"must be in \[0, 1\]"),
        ({"formats": {"grid": 0.0}}, "one share above 0"),
        ({"grid": {2: 0}}, "grid must have one share above 0"),
        ({"grid": {2: -1, 3: 2}}, "must not be negative"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"tile": 27}, "tile must be at least 28"),
        ({"margin": -1}, "margin must be at least 0"),
        ({"max_answer": 0}, "max_answer must be at least 1"),
        ({"refuse_every": -1}, "refuse_every must be at least 0"),
        ({"style": "world", "sequence": {4: 1}}, "no words for a sequence of 4"),
        ({"style": "world", "sequence": {2: 1}, "refuse_every": 2}, "needs the paper style"),
    ],
)
def test_failure_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ComposeSettings(**options)


def test_failure_inner_picture_too_small(tmp_path, make_sources, run_compose):
    sources = make_sources(4)
    Image.new("RGB", (400, 100)).save(sources[0].image)  # in 96 x 88: 67 x 16 pixels
    for one in sources[1:]:
        Image.new("RGB", (40, 40)).save(one.image)  # in one of 40: 28 x 28
    statuses = run_compose(tmp_path, sources, one_format("pip"))
    assert statuses["too_small"] == 1
    for line in instructions(tmp_path):
        x0, y0, x1, y1 = line["tiles"][1]
        assert min(x1 - x0, y1 - y0) >= 28
