"""The pool and attended sites: pooled features at the right places, in every family."""

from dataclasses import dataclass
from typing import ClassVar

import checks
import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Anatomy, Method, attach
from mmlm.engine.attach import MARK
from mmlm.engine.method import Paper
from mmlm.engine.vision.cells import cell_of, central, closeness, spread
from mmlm.errors import LayoutError

PAPER = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="here")
FAMILIES = tuple(tiny._BUILDERS)


@dataclass(frozen=True, kw_only=True)
class Mean(Method):
    """Means over ``cells`` x ``cells`` windows, and the originals in the state."""

    paper: ClassVar[Paper] = PAPER
    cells: int = 1
    ends: str = "none"
    kind: str = "tower"

    def neutral(self):
        return Mean(cells=0)

    @property
    def originals(self):
        return self.kind

    @property
    def line_ends(self):
        return self.ends

    def renumbers(self, anatomy):
        return anatomy.one_axis

    def begin(self, prompt):
        return prompt.originals(self)

    def pool(self, state, x, side):
        n = self.cells * side
        if not self.cells or x.shape[1:3] == (n, n):
            return None
        return functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), n).permute(0, 2, 3, 1)


@dataclass(frozen=True, kw_only=True)
class Keep(Method):
    """Keeps the first image features of each tile."""

    paper: ClassVar[Paper] = PAPER
    first: int = 3

    def neutral(self):
        return Keep(first=10_000)

    def visual_tokens(self, state, features):
        index = torch.arange(min(self.first, features.shape[1]))
        return index.expand(features.shape[0], -1)


@dataclass(frozen=True, kw_only=True)
class Add(Method):
    """Adds to the stream between attention and MLP, and keeps what it saw."""

    paper: ClassVar[Paper] = PAPER
    by: float = 1.0
    seen: ClassVar[list] = []

    def neutral(self):
        return Add(by=0.0)

    def attended(self, state, layer, x):
        Add.seen.append((layer, x))
        return torch.full_like(x, self.by)


def projected(model, inputs):
    """What enters the projector, and what leaves it, in a plain pass."""
    found = {}

    def keep(module, args, output):
        found["x"], found["y"] = args[0], output

    handle = Anatomy(model).projector.register_forward_hook(keep)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found["x"], found["y"]


def entered(model, inputs, *methods):
    """Embeddings that enter the decoder, and the layout they have."""
    found = {}

    def keep(module, args, kwargs):
        found["embeds"] = kwargs["inputs_embeds"]
        found["places"] = kwargs["position_ids"]

    with attach(model, *methods), torch.no_grad():
        handle = Anatomy(model).text.register_forward_pre_hook(keep, with_kwargs=True)
        model(**inputs)
        handle.remove()
        session = getattr(model, MARK)
        return found["embeds"], found["places"], session.layout, session.states[0]


def grid(x):
    side = int(x.shape[1] ** 0.5)
    return x.unflatten(1, (side, side))


def expected_means(family, model, inputs):
    """One feature per tile, by each family's own order of pooling and projecting."""
    x, y = projected(model, inputs)
    projector = Anatomy(model).projector
    with torch.no_grad():
        if family in ("idefics3", "smolvlm"):  # four patches become one feature
            halves = grid(x).unflatten(1, (2, -1)).unflatten(3, (2, -1)).mean((2, 4))
            return projector.forward(halves.flatten(1, 2))[:, 0]
        if family == "gemma3":  # its projector averages, then norms, then multiplies
            normed = projector.mm_soft_emb_norm.forward(x.mean(1))
            return normed @ projector.mm_input_projection_weight
        if family.startswith("qwen"):
            grids = inputs["image_grid_thw"]
            order = list(y.split([int(g.prod()) // 4 for g in grids]))
            return torch.stack([part.mean(0) for part in order])
        return projector.forward(x.mean(1, keepdim=True))[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pooled_feature_per_tile_enters_where_its_pictures_stood(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    embeds, places, layout, _ = entered(model, inputs, Mean())
    visual = embeds[layout.visual]
    means = expected_means(family, model, inputs)
    torch.testing.assert_close(visual, means, atol=1e-5, rtol=1e-4)
    ids = inputs["input_ids"]
    words = inputs["attention_mask"].bool() & ~torch.isin(
        ids, torch.tensor(Anatomy(model).image_ids)
    )
    assert int((layout.real & ~layout.visual).sum()) == int(words.sum())
    if Anatomy(model).one_axis:  # positions without gaps
        for row in range(2):
            own = places[row][layout.real[row]] if places.shape[0] > 1 else places[0]
            assert (own.diff() == 1).all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_pooled_features_keep_the_position_of_their_cells_centre(family):
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1, (112, 84))]])
    _, whole, _, _ = entered(model, inputs, Mean(cells=0))
    _, places, layout, _ = entered(model, inputs, Mean())
    _, height, width = (inputs["image_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist()
    visual = torch.isin(inputs["input_ids"], torch.tensor(Anatomy(model).image_ids))
    before = whole[..., visual[0]].reshape(whole.shape[0], height, width)
    centre = before[:, (height - 1) // 2, (width - 1) // 2]
    assert torch.equal(places[:, 0, layout.visual[0]][:, 0], centre)


def test_line_ends_of_pictures_in_tiles():
    model, processor = tiny.shared("llava_next")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1, (112, 112))]])
    tiles = 5  # four and the overview
    for ends, count in (("none", 0), ("line", 4), ("all", 8)):  # two tiles, two cells down each
        _, _, layout, _ = entered(model, inputs, Mean(cells=2, ends=ends))
        assert int(layout.visual.sum()) == tiles * 4 + count


def test_cells_in_the_padding_leave_and_others_move_to_what_is_left():
    """A flat picture: the tiles' upper and lower lines are padding."""
    model, processor = tiny.shared("llava_next")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1, (112, 56))]])
    _, _, wide, _ = entered(model, inputs, Mean(cells=2))
    flat = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1, (120, 30))]])
    _, _, layout, _ = entered(model, flat, Mean(cells=2))
    plain = (flat["input_ids"] == model.config.image_token_id).sum()
    assert int(plain) < int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert int(wide.visual.sum()) == 3 * 4
    assert int(layout.visual.sum()) == 3 * 4  # two lines are left, in both cells


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["tower", "projected"])
def test_originals_are_the_states_of_their_pictures(family, kind):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    x, y = projected(model, inputs)
    _, _, layout, found = entered(model, inputs, Mean(kind=kind))
    expected = x if kind == "tower" else y
    expected = expected.flatten(0, -2)
    if family == "qwen2_5_vl":  # the projector works in the order of its windows
        assert not torch.allclose(found.states, expected)
        if kind == "tower":
            with torch.no_grad():
                merged = Anatomy(model).projector.forward(found.states)
            _, _, _, other = entered(model, inputs, Mean(kind="projected"))
            torch.testing.assert_close(merged, other.states, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(found.states, expected, atol=1e-5, rtol=1e-5)
    assert found.row.unique().tolist() == [0, 1]
    assert found.picture.unique().tolist() == [0, 1]
    assert found.kept.all()
    # Each frame's placeholders begin where the frame's first feature stands.
    for frame, start in enumerate(found.start_of.tolist()):
        row = int(found.row[found.frame == frame][0])
        if family not in ("llava_next", "llava_onevision"):
            assert found.at[row, start] == frame
        assert layout.visual[row, start]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_frames_of_a_video(family):
    model, processor = tiny.shared(family)
    frames = np.stack([np.asarray(tiny.picture(i, (56, 56))) for i in range(4)])
    video = processor.video_token
    text = video if family == "llava_onevision" else f"<|vision_start|>{video}<|vision_end|>"
    options = {"return_tensors": "pt", "padding": True}
    inputs = dict(processor(text=[f"look {text} what is it"], videos=[frames], **options))
    plain = checks.next_logits(model, inputs)
    with attach(model, Mean(cells=0)):
        assert torch.equal(checks.next_logits(model, inputs), plain)
    x, y = projected(model, inputs)
    embeds, _, layout, found = entered(model, inputs, Mean())
    count = 4 if family == "llava_onevision" else 2  # Qwen joins two frames
    assert found.video.tolist() == [True] * count
    assert found.picture_of.tolist() == [0] * count
    assert [int(found.number[found.frame == f][0]) for f in range(count)] == list(range(count))
    assert int(layout.visual.sum()) == count
    with torch.no_grad():
        if family == "llava_onevision":
            means = Anatomy(model).projector.forward(x.mean(1, keepdim=True))[:, 0]
        else:
            means = y.unflatten(0, (count, -1)).mean(1)
    torch.testing.assert_close(embeds[layout.visual], means, atol=1e-5, rtol=1e-4)


def test_pictures_beside_a_video():
    model, processor = tiny.shared("qwen2_5_vl")
    frames = np.stack([np.asarray(tiny.picture(i, (56, 56))) for i in range(4)])
    text = (
        f"a <|vision_start|>{processor.video_token}<|vision_end|> "
        f"b <|vision_start|>{processor.image_token}<|vision_end|> c"
    )
    inputs = dict(
        processor(text=[text], videos=[frames], images=[tiny.picture(7)], return_tensors="pt")
    )
    _, _, layout, found = entered(model, inputs, Mean())
    assert int(layout.visual.sum()) == 3
    assert sorted(zip(found.video.tolist(), found.start_of.tolist(), strict=True))[0][0] is False
    picture = found.start_of[~found.video]
    assert (picture > found.start_of[found.video].max()).all()


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "qwen3_vl"])
def test_methods_of_visual_tokens_choose_among_the_originals(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    _, _, alone, _ = entered(model, inputs, Mean())
    _, _, layout, found = entered(model, inputs, Mean(), Keep())
    assert int(layout.visual.sum()) == int(alone.visual.sum())
    sizes = torch.bincount(found.frame)
    side = 4 if family in ("idefics3", "qwen3_vl") else 1
    kept = torch.bincount(found.frame, weights=found.kept.float())
    if family == "qwen3_vl":  # all pictures in one row: its first three features
        assert kept.tolist() == [3 * side, 0]
    else:
        assert kept.tolist() == [min(3 * side, n) for n in sizes.tolist()]


def test_without_pooling_methods_of_visual_tokens_act_as_always():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, Keep()):
        plain = checks.next_logits(model, inputs)
    with attach(model, Mean(cells=0), Keep()):
        layout = None
        both = checks.next_logits(model, inputs)
        layout = getattr(model, MARK).layout
    # Renumbered, since one of the methods asks for it.
    assert layout.visual.sum(-1).tolist() == [3, 3]
    assert not torch.equal(plain, both)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_auxiliary_prompts_get_pooled_features_too(family):
    """A noised picture is pooled as the true one is; its rows have the same length."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    lengths = []

    def note(module, args, kwargs):
        lengths.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    for methods in ((Mean(), VCD()), (Mean(), VHR())):
        lengths.clear()
        with attach(model, *methods, processor=processor):
            handle = Anatomy(model).text.register_forward_pre_hook(note, with_kwargs=True)
            together = checks.next_logits(model, inputs)
            handle.remove()
            width = getattr(model, MARK).layout.length
            assert all(n <= width for _, n in lengths)
            pictures = [[tiny.picture(1)], [tiny.picture(2, (90, 60))]]
            for row, prompt in enumerate(checks.PROMPTS):
                alone = tiny.inputs(processor, [prompt], [pictures[row]])
                one = checks.next_logits(model, alone)
                torch.testing.assert_close(one[0], together[row], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_attended_gets_the_stream_behind_the_attention(family):
    """What it sees is what the norm before the MLP gets; what it adds arrives there."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    anatomy, into = Anatomy(model), []
    handles = [
        anatomy.mlp_norm(layer).register_forward_pre_hook(lambda m, a: into.append(a[0]))
        for layer in range(anatomy.n_layers)
    ]
    Add.seen.clear()
    with attach(model, Add(by=0.5)), torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert [layer for layer, _ in Add.seen] == list(range(anatomy.n_layers))
    for (_, x), y in zip(Add.seen, into, strict=True):
        torch.testing.assert_close(x + 0.5, y, atol=1e-5, rtol=1e-5)
    Add.seen.clear()


def test_a_zero_delta_changes_no_bit():
    model, processor = tiny.shared("gemma3")
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    with attach(model, Add(by=0.0)):
        assert torch.equal(checks.next_logits(model, inputs), plain)


def test_grids_that_do_not_fit_are_refused():
    model, processor = tiny.shared("idefics3")

    @dataclass(frozen=True, kw_only=True)
    class Odd(Mean):
        def pool(self, state, x, side):
            return x[:, :3, :3]

    with (
        attach(model, Odd()),
        pytest.raises(LayoutError, match="3 x 3 states is no whole number of the 2 x 2"),
    ):
        checks.next_logits(model, checks.batch(processor))


# ---- cells, by hand ------------------------------------------------------------------------------


def test_cells_of_a_line():
    assert cell_of(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert cell_of(5, 2).tolist() == [0, 0, 1, 1, 1]  # the middle column begins the second
    assert cell_of(4, 4).tolist() == [0, 1, 2, 3]


def test_central_columns():
    assert central((4, 4), (2, 2)).nonzero().tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert central((9, 9), (3, 3)).nonzero()[:, 1].unique().tolist() == [1, 4, 7]
    assert central((3, 5), (1, 1)).nonzero().tolist() == [[1, 2]]
    for size in range(1, 12):
        for cells in range(1, size + 1):
            assert int(central((size, size), (cells, cells)).sum()) == cells**2


def test_closeness_is_largest_at_the_central_column():
    for size, cells in ((9, 3), (10, 4), (7, 2), (4, 1)):
        near = closeness((size, size), (cells, cells))
        best = near.argmax(0)
        where = central((size, size), (cells, cells)).flatten().nonzero().flatten()
        assert sorted(best.tolist()) == where.tolist()
        assert ((near > 0).sum(1) == 1).all()


def test_spread_repeats_cells():
    pooled = torch.arange(4.0).view(1, 2, 2, 1)
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]).float()
    assert torch.equal(spread(pooled, (4, 4))[0, ..., 0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_attended_in_a_training_is_what_it_is_otherwise(family):
    """Layers in training carry their moment in an argument, which no kernel may get to see."""
    model, processor = tiny.shared(family)
    inputs = {**checks.batch(processor), "use_cache": False}
    with attach(model, Mean(), Add(by=0.5)), torch.no_grad():
        expected = model(**inputs).logits
        model.get_decoder().train()
        try:
            found = model(**inputs).logits
        finally:
            model.eval()
    assert torch.equal(found, expected)
    Add.seen.clear()


@pytest.mark.parametrize("limit", [1, 2])
def test_tiles_that_the_model_resizes(limit):
    """Four tiles of 4 x 4 features, resized together to 4 x 4 or 5 x 5: one place for each tile."""
    model, processor = tiny.build("llava_onevision", layers=1)
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = f"anyres_max_{limit}"
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1, (112, 112))]])
    side = {1: 4, 2: 5}[limit]
    placeholders = torch.isin(inputs["input_ids"], torch.tensor(Anatomy(model).image_ids))
    assert int(placeholders.sum()) == 16 + side * (side + 1)
    embeds, _, layout, found = entered(model, inputs, Mean())
    visual = embeds[layout.visual]
    assert len(visual) == 5
    assert found.at[0, layout.visual[0]].tolist() == [0, 1, 2, 3, 4]
    means = expected_means("llava_onevision", model, inputs)
    if limit == 1:  # every place lies within one tile, so nothing is mixed
        torch.testing.assert_close(visual, means, atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(visual[:2], means[:2], atol=1e-5, rtol=1e-4)
