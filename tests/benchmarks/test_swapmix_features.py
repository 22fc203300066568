"""SwapMix on features: what the decoder gets, regions, donors, files, refusals."""

import json

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmlm
from benchmarks.swapmix.boxes import Thing, read_things
from benchmarks.swapmix.donors import AskedBox, BoxedPicture, Donors
from benchmarks.swapmix.feature_swap import FeatureSwap
from benchmarks.swapmix.features import capture, features_of, similar
from benchmarks.swapmix.regions import nearest, region
from mmlm.cli.bench.swapped_features import _questions
from mmlm.errors import InputError, LayoutError
from mmlm.token_brightness import KNOWN
from mmlm.token_places import Footprints, footprints

FAMILIES = [family for family in tiny.FAMILIES if family in KNOWN]
PROMPTS = ["describe the image in detail .", "is there a dog ?"]


def first_input(model, inputs, *methods):
    """What the first decoder layer gets, and the logits."""
    found = []

    def look(module, arguments, named):
        found.append((arguments[0] if arguments else named["hidden_states"]).clone())

    with mmlm.attach(model, *methods), torch.inference_mode():
        handle = mmlm.Anatomy(model).layers[0].register_forward_pre_hook(look, with_kwargs=True)
        try:
            logits = model(**inputs).logits
        finally:
            handle.remove()
    return found[0], logits


def visual(model, inputs):
    return torch.isin(inputs["input_ids"], torch.tensor(mmlm.Anatomy(model).image_ids))


@pytest.fixture
def donors(tmp_path):
    """Writes the features of two pictures to a file."""

    def write(family):
        model, processor = tiny.shared(family)
        path = tmp_path / f"{family}.safetensors"
        capture(model, processor, {"a": tiny.picture(1), "b": tiny.picture(2)}, path)
        return model, processor, str(path)

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_acceptance_14_an_object_in_its_own_place_changes_no_bit(family, donors):
    model, processor, path = donors(family)
    inputs = tiny.inputs(processor, PROMPTS[:1], [[tiny.picture(1)]])
    tokens = tuple(range(int(visual(model, inputs).sum())))
    swap = FeatureSwap(donors=path, moves=(("a", tokens, tokens),))
    (before, plain), (after, swapped) = (first_input(model, inputs, *m) for m in ((), (swap,)))
    assert torch.equal(before, after)
    assert torch.equal(plain, swapped)


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_acceptance_14_nothing_changes_outside_the_region(family, donors):
    model, processor, path = donors(family)
    inputs = tiny.inputs(processor, PROMPTS[:1], [[tiny.picture(1)]])
    where = visual(model, inputs)[0].nonzero()[:, 0]
    old = (0, 2, len(where) - 1)
    swap = FeatureSwap(donors=path, moves=(("b", old, (1, 1, 0)),))
    (before, plain), (after, swapped) = (first_input(model, inputs, *m) for m in ((), (swap,)))
    region_columns = where[list(old)]
    elsewhere = torch.ones(before.shape[1], dtype=torch.bool)
    elsewhere[region_columns] = False
    assert torch.equal(before[:, elsewhere], after[:, elsewhere])
    features = load_file(path)["b"]
    assert torch.equal(after[0, region_columns], features[[1, 1, 0]])
    assert not torch.equal(plain, swapped)
    assert torch.equal(first_input(model, inputs)[1], plain)  # nothing stays behind


def test_rows_have_their_own_swaps_and_padding_does_not_matter(donors):
    model, processor, path = donors("llava")
    pictures = [[tiny.picture(1)], [tiny.picture(3)]]
    moves = (("b", (0, 5), (3, 4)), ("a", (7,), (2,)))
    both = FeatureSwap(donors=path, moves=moves)
    inputs = tiny.inputs(processor, PROMPTS, pictures)
    together = first_input(model, inputs, both)[1][:, -1]
    for row, (prompt, shown, move) in enumerate(zip(PROMPTS, pictures, moves, strict=True)):
        alone = tiny.inputs(processor, [prompt], [shown])
        single = first_input(model, alone, FeatureSwap(donors=path, moves=(move,)))[1][0, -1]
        torch.testing.assert_close(together[row], single, atol=1e-5, rtol=1e-4)
    # A row without tokens is left alone.
    half = FeatureSwap(donors=path, moves=(moves[0], ("", (), ())))
    assert torch.equal(first_input(model, inputs, half)[0][1], first_input(model, inputs)[0][1])
    # One entry stands for all rows.
    one = FeatureSwap(donors=path, moves=moves[:1])
    each = FeatureSwap(donors=path, moves=moves[:1] * 2)
    assert torch.equal(first_input(model, inputs, one)[1], first_input(model, inputs, each)[1])


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_decoding_goes_on_from_the_swapped_prompt(beams, donors):
    model, processor, path = donors("llava")
    pictures = [[tiny.picture(1)], [tiny.picture(3)]]
    whole = tuple(range(16))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    inputs = tiny.inputs(processor, PROMPTS, pictures)
    swap = FeatureSwap(donors=path, moves=(("b", whole, whole), ("a", whole, whole)))
    with swap(model):
        found = model.generate(**inputs, **options)
    # Every token is replaced: they are the other pictures.
    other = tiny.inputs(processor, PROMPTS, [[tiny.picture(2)], [tiny.picture(1)]])
    assert torch.equal(found, model.generate(**other, **options))
    assert not torch.equal(found, model.generate(**inputs, **options))


def test_only_the_first_picture_of_a_row_is_swapped(donors):
    model, processor, path = donors("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], [[tiny.picture(1), tiny.picture(3)]])
    swap = FeatureSwap(donors=path, moves=(("b", (16,), (0,)),))
    with pytest.raises(LayoutError, match="no token 16; its first picture has 16"):
        first_input(model, inputs, swap)


def test_another_turn_is_not_swapped(donors):
    model, processor, path = donors("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], [[tiny.picture(1)]])
    n, more, found = inputs["input_ids"].shape[1], torch.tensor([[5, 6, 7] * 9]), []
    with mmlm.attach(model, FeatureSwap(donors=path, moves=(("b", (0, 1), (0, 1)),))):
        with torch.inference_mode():
            cache = model(**inputs, use_cache=True).past_key_values
        handle = (
            mmlm.Anatomy(model)
            .layers[0]
            .register_forward_pre_hook(
                lambda _, args, named: found.append(args[0] if args else named["hidden_states"]),
                with_kwargs=True,
            )
        )
        mask = torch.ones(1, n + more.shape[1], dtype=torch.long)
        with torch.inference_mode():
            model(input_ids=more, attention_mask=mask, past_key_values=cache)
        handle.remove()
    assert torch.equal(found[0], model.get_input_embeddings()(more))


def test_the_setting_is_plain_text_and_its_neutral_form_does_nothing():
    swap = FeatureSwap(donors="f.safetensors", moves=(("a", (1, 2), (3, 4)),))
    assert mmlm.parse_method(swap.text) == swap
    assert swap.neutral() == FeatureSwap()
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], [[tiny.picture(1)]])
    assert torch.equal(first_input(model, inputs, FeatureSwap())[1], first_input(model, inputs)[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moves": (("a", (1, 2), (3,)),), "donors": "f"}, "as many new tokens"),
        ({"moves": (("a", (1, 1), (3, 4)),), "donors": "f"}, "each old token once"),
        ({"moves": ((7, (1,), (3,)),), "donors": "f"}, "must be \\(donor"),
        ({"moves": (("a", (-1,), (3,)),), "donors": "f"}, "tokens >= 0"),
        ({"moves": (("a", (1,), (3,)),)}, "donors must name a file"),
    ],
)
def test_error_impossible_moves(settings, message):
    with pytest.raises(ValueError, match=message):
        FeatureSwap(**settings)


def test_error_moves_that_do_not_fit_the_batch(donors, tmp_path):
    model, processor, path = donors("llava")
    inputs = tiny.inputs(processor, PROMPTS, [[tiny.picture(1)], [tiny.picture(2)]])

    def run(*moves, file=path):
        first_input(model, inputs, FeatureSwap(donors=file, moves=moves))

    one = ("a", (0,), (0,))
    with pytest.raises(LayoutError, match="3 moves for 2 rows"):
        run(one, one, one)
    with pytest.raises(LayoutError, match="Row 0: there is no token 16; its first picture has 16"):
        run(("a", (16,), (0,)))
    with pytest.raises(LayoutError, match="no token 99; the donor 'a' has 16"):
        run(("a", (0,), (99,)))
    with pytest.raises(InputError, match="The donor 'c' is not in"):
        run(("c", (0,), (0,)))
    with pytest.raises(InputError, match="The donor 'a' is not in"):
        run(one, file=str(tmp_path / "nowhere"))
    narrow = tmp_path / "narrow.safetensors"
    save_file({"a": torch.zeros(16, 5)}, narrow)
    with pytest.raises(LayoutError, match="5 numbers per token, the model 64"):
        run(one, file=str(narrow))
    assert first_input(model, inputs)[1].shape[0] == 2  # the model is as it was


# --- regions --------------------------------------------------------------------------------------


def grid(rows, columns):
    """A picture seen as one grid of tokens."""
    down = torch.eye(rows).repeat_interleave(columns, 0)
    return Footprints(down, torch.eye(columns).repeat(rows, 1))


def test_a_region_is_the_tokens_that_the_box_covers():
    seen = grid(4, 4)
    assert region(seen, (0.25, 0.5, 0.25, 0.25)) == (9,)
    assert region(seen, (0, 0, 1, 0.25)) == (0, 1, 2, 3)
    # 10/64 of a token is enough: here the box reaches 0.4 of a token to the right and down.
    assert region(seen, (0.25, 0.25, 0.35, 0.35)) == (5, 6, 9, 10)
    assert region(seen, (0.25, 0.25, 0.28, 0.28)) == (5,)  # 0.12 of a token is not
    assert region(seen, (0.3, 0.3, 0.02, 0.02)) == ()
    assert region(seen, (0.25, 0.25, 10 / 64 / 4, 0.25)) == (5,)  # 10/64, no more and no less


def test_each_token_gets_the_one_at_its_place_in_the_other_region():
    seen = grid(4, 4)
    assert nearest(seen, (0, 1, 4, 5), seen, (10, 11, 14, 15)) == (10, 11, 14, 15)
    assert nearest(seen, (0, 1, 4, 5), seen, (7,)) == (7, 7, 7, 7)
    # Four columns from two: the left ones from the left, the right ones from the right.
    assert nearest(seen, (0, 1, 2, 3), seen, (8, 9)) == (8, 8, 9, 9)
    assert nearest(seen, (0, 4, 8, 12), seen, (1, 5, 9, 13)) == (1, 5, 9, 13)


def test_an_overview_takes_from_the_overview():
    # The picture once as a whole (4 tokens) and once fine (16).
    fine, whole = grid(4, 4), grid(2, 2)
    spread = torch.eye(2).repeat_interleave(2, 1) / 2
    both = Footprints(
        torch.cat([whole.down @ spread, fine.down]), torch.cat([whole.across @ spread, fine.across])
    )
    tokens = tuple(range(20))
    assert nearest(both, tokens, both, tokens) == tokens
    # Of a quarter of the picture the overview has one token: all of the overview get that one.
    assert nearest(both, (0, 1, 2, 3), both, (0, 4, 5, 8, 9)) == (0, 0, 0, 0)
    assert nearest(both, (4, 5, 8, 9), both, (0, 4, 5, 8, 9)) == (4, 5, 8, 9)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in ("llava", "qwen3_vl")])
def test_regions_of_real_processors_lie_where_the_box_is(family):
    model, processor = tiny.shared(family)
    seen = footprints(model, processor, (112, 112))
    top = set(region(seen, (0, 0, 1, 0.5)))
    bottom = set(region(seen, (0, 0.5, 1, 0.5)))
    assert top
    assert bottom
    assert not top & bottom
    assert max(top) < min(bottom)


# --- donors ---------------------------------------------------------------------------------------


def boxed(name, *things):
    tidy = [Thing(n, g, box) for n, g, box in things]
    return BoxedPicture.of(name, Image.new("RGB", (4, 4)), tidy, grid(4, 4))


CORNER, OTHER, LOW = (0, 0, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), (0, 0.5, 0.5, 0.5)
PICTURES = [
    boxed("1", ("dog", "animal", CORNER), ("cup", "kitchen", OTHER)),
    boxed("2", ("cat", "animal", CORNER), ("car", "vehicle", OTHER)),
    boxed("3", ("dog", "animal", CORNER), ("bus", "vehicle", LOW)),
    boxed("4", ("dog", "animal", OTHER), ("cow", "animal", LOW)),
]


def asked(features, kinds=("object", "attribute"), swaps=2, question=None):
    draws = Donors(PICTURES, features)
    question = question or AskedBox("existence", "cup", "is there a cup ?", "yes")
    return draws.asked(PICTURES[0], 0, question, kinds, swaps)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return {str(n): torch.randn(16, 8, generator=generator) for n in range(1, 5)}


def test_the_object_asked_for_stays_and_others_are_exchanged(features):
    found = asked(features)
    assert {v.facts["swapped"] for v in found.variants} == {"dog"}
    objects = [v for v in found.variants if v.swap == "object"]
    assert [v.near for v in objects] == [True, False]
    assert "dog -> c" in objects[0].note  # a cat or a cow
    assert objects[1].note in ("dog -> car of 2", "dog -> bus of 3")
    for variant in found.variants:
        assert variant.facts["old_tokens"] == [0, 1, 4, 5]
        assert len(variant.facts["new_tokens"]) == 4
        assert variant.facts["donor"] != "1"
    assert asked(features) == found  # seeded


def test_what_is_asked_for_never_comes_in(features):
    question = AskedBox("existence", "cat", "is there a cat ?", "no")
    found = asked(features, ("object",), 9, question)
    names = {variant.note.split(" -> ")[1].split(" of ")[0] for variant in found.variants}
    assert names == {"cow", "car", "bus"}


def test_seeds_draw_others(features):
    question = AskedBox("existence", "cup", "is there a cup ?", "yes")
    given = (PICTURES[0], 0, question, ("object",), 2)
    drawn = [Donors(PICTURES, features, seed).asked(*given).variants for seed in range(6)]
    assert len({tuple(variant.note for variant in found) for found in drawn}) > 1


def test_no_more_looks_are_taken_than_asked_for(features):
    assert len(asked(features, ("attribute",), 1).variants) == 1


def test_what_nobody_has_counted_is_not_asked_for():
    def counts(*things):
        picture = BoxedPicture.of("1", Image.new("RGB", (4, 4)), things, grid(4, 4))
        found = {q.subject: q.answer for seed in range(9) for q in _questions(picture, seed)
                 if q.kind == "count"}  # fmt: skip
        return found

    dog, cup = Thing("dog", "animal", CORNER), Thing("cup", "kitchen", OTHER)
    assert counts(dog, dog, cup) == {"dog": "2", "cup": "1"}
    assert counts(dog, dog, cup._replace(crowd=True)) == {"dog": "2"}
    assert counts(*[dog] * 6, cup) == {"cup": "1"}
    assert counts(*[dog] * 5) == {"dog": "5"}
    assert counts(*[dog] * 6) == {}


def test_another_look_must_look_different(features):
    def looks(features):
        return {v.facts["donor"] for v in asked(features, ("attribute",), 5).variants}

    assert looks(features) == {"3", "4"}
    features["3"][[0, 1, 4, 5]] = features["1"][[0, 1, 4, 5]]  # the same dog
    assert similar(features["3"][[0, 1, 4, 5]], features["1"][[0, 1, 4, 5]]) > 0.99
    assert looks(features) == {"4"}
    # A second dog of the same picture is no other look.
    twins = boxed("1", ("dog", "animal", CORNER), ("dog", "animal", OTHER))
    question = AskedBox("existence", "cup", "is there a cup ?", "no")
    draws = Donors([twins, *PICTURES[1:]], features)
    found = draws.asked(twins, 0, question, ("attribute",), 5).variants
    assert {v.facts["donor"] for v in found} == {"3", "4"}


def test_tokens_that_also_show_what_is_asked_for_are_left_alone(features):
    overlapping = boxed(
        "1", ("dog", "animal", (0, 0, 0.5, 0.5)), ("cup", "kitchen", (0.25, 0, 0.5, 0.5))
    )
    question = AskedBox("existence", "cup", "is there a cup ?", "yes")
    draws = Donors([overlapping, *PICTURES[1:]], features)
    found = draws.asked(overlapping, 0, question, ("object",), 2)
    assert {tuple(v.facts["old_tokens"]) for v in found.variants} == {(0, 4)}
    hidden = boxed("1", ("dog", "animal", CORNER), ("cup", "kitchen", (0, 0, 1, 1)))
    found = Donors([hidden, *PICTURES[1:]], features).asked(hidden, 0, question, ("object",), 2)
    assert not found.variants
    assert found.skipped == 2


# --- files ----------------------------------------------------------------------------------------


def test_features_are_kept_and_not_mixed_up(tmp_path):
    model, processor = tiny.shared("llava")
    path = tmp_path / "deep" / "features.safetensors"
    pictures = {"a": tiny.picture(1)}
    found = capture(model, processor, pictures, path)
    assert found["a"].shape == (16, 64)
    assert torch.equal(found["a"], features_of(model, processor, tiny.picture(1)))
    assert torch.equal(capture(None, None, pictures, path)["a"], found["a"])  # nothing runs again
    with pytest.raises(InputError, match="features of other pictures"):
        capture(model, processor, {"b": tiny.picture(2)}, path)
    assert not mmlm.Anatomy(model).layers[0]._forward_pre_hooks


COCO = {
    "images": [{"id": 7, "file_name": "a.png", "width": 200, "height": 100}],
    "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}],
    "annotations": [
        {"image_id": 7, "category_id": 18, "bbox": [50, 25, 100, 50]},
        {"image_id": 7, "category_id": 18, "bbox": [0, 0, 200, 100], "iscrowd": 1},
    ],
}


def test_boxes_are_read_as_parts_of_the_picture(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(COCO))
    assert read_things(path) == {
        7: (
            Thing("dog", "animal", (0.25, 0.25, 0.5, 0.5)),
            Thing("dog", "animal", (0, 0, 1, 1), True),
        )
    }


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("images", {"width": None}, "picture 7 has no width and height"),
        ("categories", {"supercategory": ...}, "'dog' has no 'supercategory'"),
        ("annotations", {"bbox": [1, 2]}, r"picture 7 has the 'bbox' \[1, 2\]"),
    ],
)
def test_error_a_file_without_boxes(tmp_path, table, change, message):
    data = json.loads(json.dumps(COCO))
    for key, value in change.items():
        data[table][0][key] = value
        if value is ...:
            del data[table][0][key]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        read_things(path)
