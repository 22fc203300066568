"""``mmlm calibrate heads --kind``: maps that HeadAblation reads; pictures, boxes and needles."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import mmlm
from data_tools.world import SPLITS, scene
from mmlm.cli import main
from mmlm.cli.calibrate import head_maps
from mmlm.cli.calibrate.head_maps import _source, needles, pictures
from mmlm.cli.calibrate.questions import QuestionOptions
from mmlm.engine.head_maps import HeadMap
from mmlm.engine.head_scores import Region
from mmlm.errors import InputError, UnsupportedModel
from mmlm.head_measures import (
    Grounded,
    retrieval_heads,
    tokens_of_boxes,
    tokens_of_mask,
    visual_heads,
)
from mmlm.head_measures.runs import _ended
from mmlm.head_measures.visual import _named
from mmlm.token_places import Footprints, footprints

COMMAND = ("calibrate", "heads")


def grid(n):
    """n x n tokens, each of which shows one cell."""
    number = torch.arange(n * n)
    return Footprints(torch.eye(n)[number // n], torch.eye(n)[number % n])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "heads.json"
    assert main([*COMMAND, "--kind", "visual", "--count", "8", "--output", str(path)]) == 0
    return path


# ---- places ----


def test_a_mask_must_cover_ten_of_64_pixels():
    mask = np.zeros((16, 16), bool)
    mask[0, :8] = mask[1, :2] = True  # ten pixels of token 0
    mask[8:10, 8:12] = True  # eight of token 3
    assert tokens_of_mask(grid(2), mask) == (0,)
    mask[10, 8:10] = True
    assert tokens_of_mask(grid(2), mask) == (0, 3)


def test_a_box_has_the_tokens_whose_centres_lie_in_it():
    # Centres are at 8 and 24 across, at 4 and 12 down.
    assert tokens_of_boxes(grid(2), [(0, 0, 9, 5)], (32, 16)) == (0,)
    assert tokens_of_boxes(grid(2), [(7, 3, 25, 5)], (32, 16)) == (0, 1)
    assert tokens_of_boxes(grid(2), [(9, 0, 23, 16)], (32, 16)) == ()
    assert tokens_of_boxes(grid(2), [(0, 0, 9, 5), (20, 10, 32, 16)], (32, 16)) == (0, 3)


def test_a_box_ends_before_a_centre_on_its_right_or_lower_edge():
    assert tokens_of_boxes(grid(2), [(8, 4, 24, 12)], (32, 16)) == (0,)


def test_row_ends_belong_to_no_region():
    places = grid(2)
    ends = Footprints(
        torch.cat([places.down, torch.zeros(1, 2)]), torch.cat([places.across, torch.zeros(1, 2)])
    )
    assert tokens_of_boxes(ends, [(0, 0, 32, 32)], (32, 32)) == (0, 1, 2, 3)
    assert tokens_of_mask(ends, np.ones((8, 8), bool)) == (0, 1, 2, 3)


def test_objects_that_no_token_shows_have_no_region():
    one = Grounded(
        Image.new("RGB", (16, 16)),
        "?",
        masks={"dog": np.ones((16, 16), bool), "cat": np.zeros((16, 16), bool)},
        boxes={"car": [(0, 0, 8, 8)], "dog": [(0, 0, 1, 1)]},
    )
    assert one.regions(grid(2)) == {"car": (0,), "dog": (0, 1, 2, 3)}
    assert one.names == {"dog", "cat", "car"}


def test_words_count_at_their_first_token():
    _, processor = mmlm.load("embedded")
    ids = processor.tokenizer("a dog and a fire hydrant and a cat .", add_special_tokens=False)[
        "input_ids"
    ]
    text, named = _named(processor, ids, frozenset({"dog", "fire hydrant"}), ["fire hydrant"])
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert [(one.name, one.true, one.region) for one in named] == [
        ("dog", True, None),
        ("fire hydrant", True, 0),
        ("cat", False, None),
    ]
    assert [words[one.step].strip("▁Ġ ") for one in named] == ["dog", "fire", "cat"]
    assert text.startswith("a dog")


def test_an_answer_is_up_to_its_first_end_token():
    assert _ended([5, 2, 7, 2], 2) == [5, 2]
    assert _ended([5, 3, 7], [2, 3]) == [5, 3]
    assert _ended([5, 7], [2, 3]) == _ended([5, 7], None) == [5, 7]


# ---- the commands ----


def test_a_map_of_visual_heads_is_what_head_ablation_reads(written):
    found = HeadMap.load(written)
    model, _ = mmlm.load("embedded")
    anatomy = mmlm.Anatomy(model)
    assert found.shape == (anatomy.n_layers, anatomy.n_heads)
    assert found.counted["samples"] == 8
    assert found.counted["steps"] > 10
    assert found.facts["weights"] == mmlm.engine.identity.fingerprint(model)
    assert found.facts["dtype"] == "float32"
    assert found.facts["model"] == "embedded"  # as it was asked for, and not where it lies
    assert found.facts["attention"] == model.config._attn_implementation
    assert found.facts["seed"] == 0
    assert set(found.counted) == {"samples", "counted", "steps", "left_out_of_focus"}
    assert 0 < found.counted["counted"] <= 8
    assert 0 < found.score.max() <= 1
    method = mmlm.HeadAblation(heads_file=str(written), top=3)
    assert sum(len(heads) for _, heads in method.ablated) == 3
    with mmlm.attach(model, method):
        pass


def test_the_same_pictures_give_the_same_map(written):
    model, processor = mmlm.load("embedded")
    samples = list(pictures(QuestionOptions(count=8), None))
    again = visual_heads(model, processor, samples, batch_size=3)
    for name, value in HeadMap.load(written).values.items():
        torch.testing.assert_close(again.values[name], value, atol=1e-6, rtol=1e-6)


def grey(**places):
    return Grounded(Image.new("RGB", (80, 80), "grey"), "describe the image .", **places)


def test_error_no_scored_word():
    model, processor = mmlm.load("embedded")
    samples = list(pictures(QuestionOptions(count=2), None))
    some = visual_heads(model, processor, [samples[0], grey(), samples[1]])
    alone = visual_heads(model, processor, samples)
    assert (some.counted["samples"], some.counted["counted"]) == (3, 2)
    assert some.counted["steps"] == alone.counted["steps"]
    torch.testing.assert_close(some.score, alone.score, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="whose place is known"):
        visual_heads(model, processor, [grey()])


def test_rows_without_attention_on_the_image_are_left_out_of_focus_and_counted(monkeypatch):
    def region(image_mass):
        mass = torch.tensor([[0.1, image_mass / 2]])
        seen = torch.tensor([[True, True]])
        return Region(2, 8, seen, seen, mass, torch.tensor([[0.4, image_mass]]))

    monkeypatch.setattr("mmlm.probes.visual_heads.scored", lambda *_: [region(0.2), region(0.0)])
    model, processor = mmlm.load("embedded")
    samples = list(pictures(QuestionOptions(count=1), None))
    anatomy = mmlm.Anatomy(model)
    assert (anatomy.n_layers, anatomy.n_heads) == (8, 6)
    found = visual_heads(model, processor, samples)
    assert found.counted["left_out_of_focus"] == 1  # of two rows of two heads
    assert found.values["focus"].tolist() == [[pytest.approx(1.0), pytest.approx(2.0)]]


def test_error_a_family_whose_tokens_have_no_place(monkeypatch):
    model, processor = tiny.shared("llava")
    monkeypatch.setattr("mmlm.token_brightness.KNOWN", frozenset())
    with pytest.raises(UnsupportedModel, match="Which image token of llava shows which part"):
        visual_heads(model, processor, [grey(boxes={"dog": [(0, 0, 9, 9)]})])


@pytest.mark.parametrize("more", [-1, 1])
def test_error_a_picture_that_takes_other_tokens_in_a_prompt(more, monkeypatch):
    model, processor = mmlm.load("embedded")
    places = footprints(model, processor, (80, 80))
    kept = torch.arange(places.tokens + more).clamp(max=places.tokens - 1)
    other = Footprints(places.down[kept], places.across[kept])
    monkeypatch.setattr("mmlm.token_places.footprints", lambda *_: other)
    said = f"{places.tokens} image tokens in a prompt and {other.tokens} alone"
    with pytest.raises(InputError, match=said):
        visual_heads(model, processor, [grey()], max_new_tokens=2)


def test_default_lengths_of_answers(monkeypatch):
    kept = []

    def run(*given, max_new_tokens, **more):
        kept.append(max_new_tokens)
        return 0

    monkeypatch.setattr(head_maps, "run", run)
    for words in (("visual",), ("text",), ("text", "--max_new_tokens", "7")):
        assert main([*COMMAND, "--kind", *words]) == 0
    assert kept == [84, 50, 7]


def test_the_whole_map_is_drawn(tmp_path, capsys):
    figure = tmp_path / "heads.png"
    given = [*COMMAND, "--kind", "visual", "--count", "2", "--output", str(tmp_path / "h.json")]
    assert main([*given, "--figure", str(figure)]) == 0
    assert Image.open(figure).width > 100
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"\d+ scored tokens of 2 of 2 pictures", said)
    for wrong in ("heads.gif", "absent/heads.png"):
        assert main([*given, "--figure", wrong]) == 2
        assert "--figure must be a .png or .svg" in " ".join(capsys.readouterr().err.split())
    assert main([*COMMAND, "ACT", "--figure", str(figure)]) == 2
    assert "--figure is for maps" in " ".join(capsys.readouterr().err.split())


def test_maps_go_over_maps_only(written, tmp_path, capsys):
    other = tmp_path / "heads.json"
    other.write_text("{}")
    assert main([*COMMAND, "--kind", "visual", "--output", str(other)]) == 2
    assert "is no map of heads" in " ".join(capsys.readouterr().err.split())
    assert other.read_text() == "{}"
    assert main([*COMMAND, "--kind", "visual", "--output", "absent/heads.json"]) == 2
    assert "no folder 'absent'" in " ".join(capsys.readouterr().err.split())


def test_maps_are_of_300_samples_unless_another_number_is_given():
    assert len(list(needles(QuestionOptions()))) == 300
    assert len(list(needles(QuestionOptions(count=4)))) == 4
    assert _source(QuestionOptions(), None, True) == "pictures of the world, train 0, 300"


def test_masks_of_the_world_are_those_of_their_objects():
    seen = 0
    for index, one in enumerate(pictures(QuestionOptions(count=6, seed=2), None)):
        truth = scene(SPLITS["train"], 2, index, "train")
        assert set(one.masks) == truth.classes
        for name, mask in one.masks.items():
            boxes = np.zeros_like(mask)
            for i in truth.instances:
                if i.name == name:
                    boxes[i.y : i.y + i.height, i.x : i.x + i.width] = True
            assert not (mask & ~boxes).any()
            seen += bool(mask.any())
    assert seen > 6


def test_seeds_draw_other_needles_and_pictures():
    texts = [[one.needle for one in needles(QuestionOptions(count=9, seed=s))] for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    first = {next(needles(QuestionOptions(count=1, seed=seed))).needle for seed in range(6)}
    assert len(first) > 1  # not only by what the captions before it drew
    shown = [next(iter(pictures(QuestionOptions(count=2, seed=s), None))) for s in (0, 0, 1)]
    assert shown[0].image.tobytes() == shown[1].image.tobytes() != shown[2].image.tobytes()


# ---- files ----


def coco(tmp_path, **changes):
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 32, "height": 16}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 5]},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [20, 10, 12, 6]} | changes,
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    return path


def test_boxes_of_a_coco_file(tmp_path):
    (one,) = pictures(QuestionOptions(), coco(tmp_path))
    assert one.boxes == {"dog": [[0, 0, 9, 5], [20, 10, 32, 16]]}
    assert one.regions(grid(2)) == {"dog": (0, 3)}


def test_pictures_without_an_object_do_not_count(tmp_path):
    path = coco(tmp_path)
    content = json.loads(path.read_text())
    content["images"].insert(0, {"id": 3, "file_name": "b.png", "width": 32, "height": 16})
    path.write_text(json.dumps(content))
    (one,) = pictures(QuestionOptions(count=1), path)
    assert one.names == {"dog"}


def test_annotations_without_a_box_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"annotation 1 has no box"):
        list(pictures(QuestionOptions(), coco(tmp_path, bbox=[])))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ((), "give a method"),
        (("ACT", "--kind", "visual"), "give a method"),
        (("--kind", "visual", "--threshold", "1"), "threshold must be above 0 and below 1"),
        (("--kind", "text", "--instances", "x.json"), "--instances is for --kind visual"),
        (("--kind", "visual", "--skip_bad"), "--skip_bad is for --kind text"),
        (("--kind", "visual", "--max_new_tokens", "0"), "max_new_tokens must be at least 1"),
        (("--kind", "visual", "--split", "no"), "There is no split 'no'"),
    ],
)
def test_refused_options(words, match, capsys):
    assert main([*COMMAND, *words]) == 2
    assert match in " ".join(capsys.readouterr().err.split())


def test_error_threshold_out_of_range():
    for measure in (visual_heads, retrieval_heads):
        with pytest.raises(ValueError, match="threshold must be above 0"):
            measure(None, None, [], threshold=0.0)


def test_maps_may_be_ranked_by_another_value(tmp_path, capsys):
    path = tmp_path / "norms.json"
    given = ["--kind", "visual", "--count", "3", "--output", str(path)]
    assert main([*COMMAND, *given, "--rank", "query_norm"]) == 0
    found = HeadMap.load(path)
    assert found.rank == "query_norm"
    assert len(mmlm.HeadAblation(heads_file=str(path), top=2).ablated) >= 1
    capsys.readouterr()
    assert main([*COMMAND, *given, "--rank", "set_score"]) == 2
    assert "rank must be one of: hit_rate" in " ".join(capsys.readouterr().err.split())
    assert main([*COMMAND, "ACT", "--rank", "score"]) == 2
    assert "--rank is for maps" in " ".join(capsys.readouterr().err.split())
