"""The patches site: rows of different length, whole units, other methods' answers, clean-up."""

from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch

from decoding.imbalanced_attention import ImbalancedAttention
from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Anatomy, Method, attach
from mmlm.engine.method import Paper
from mmlm.engine.vision.patch_rows import PackedRows, TileRows
from mmlm.engine.vision.tower import feature_block
from mmlm.errors import IncompatibleMethods, LayoutError

PAPER = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="here")


@dataclass(frozen=True, kw_only=True)
class Leave(Method):
    """Keeps given patches after a block: ``keep[t]`` of tile t, or ``keep[-1]`` of later ones."""

    paper: ClassVar[Paper] = PAPER
    keep: tuple[tuple[int, ...], ...] = ((0,),)
    block: int = 0
    ends: str = "line"
    seen: ClassVar[list] = []

    def neutral(self):
        return Leave(block=-1)

    @property
    def line_ends(self):
        return self.ends

    def acts_in_tower(self, anatomy, block):
        return block == self.block

    def patches(self, state, block, x, look):
        tiles = len(look.sizes)
        self.seen.append((block, tuple(x.shape), tuple(look.scores.shape)))
        own = [self.keep[min(t, len(self.keep) - 1)] for t in range(tiles)]
        n = max(map(len, own))
        found = torch.full((tiles, n), -1)
        for row, numbers in enumerate(own):
            for column, number in enumerate(numbers):
                at = (look.numbers[row] == number).nonzero()
                found[row, column] = int(at[0]) if len(at) else -1
        return found


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def test_tiles_of_different_length_are_padded_and_restored():
    x = torch.arange(2 * 6 * 1.0).view(2, 6, 1)
    rows = TileRows(x, 1, None)
    alive = torch.tensor([[True, False, True, False, True], [False, True, False, False, False]])
    y = rows.cut(x, alive)
    assert rows.numbers.tolist() == [[0, 2, 4], [-1, -1, 1]]
    assert y[0, :, 0].tolist() == [0, 1, 3, 5]
    assert rows.seen().tolist() == [[True] * 4, [True, False, False, True]]
    assert rows.restored(y)[..., 0].tolist() == [[0, 1, 0, 3, 0, 5], [6, 0, 8, 0, 0, 0]]
    assert rows.alive().tolist() == alive.tolist()
    y = rows.cut(y, torch.tensor([[False, True, True], [False, False, True]]))
    assert rows.numbers.tolist() == [[2, 4], [-1, 1]]
    assert rows.restored(y)[..., 0].tolist() == [[0, 0, 0, 3, 0, 5], [6, 0, 8, 0, 0, 0]]


def test_packed_pictures_lose_patches_windows_and_positions():
    x = torch.arange(12.0)[:, None]
    rows = PackedRows(x, [8, 4])
    assert rows.numbers[1].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    alive = torch.zeros(2, 8, dtype=torch.bool)
    alive[0, [4, 5, 6, 7]] = True
    alive[1, [0, 1]] = True
    y = rows.cut(x, alive)
    assert y[:, 0].tolist() == [4, 5, 6, 7, 8, 9]
    pair = (x * 2, x * 3)
    given = {"cu_seqlens": torch.tensor([0, 4, 8, 10, 12], dtype=torch.int32), "max_seqlen": 4}
    new = rows.arguments({**given, "position_embeddings": pair})
    # The first window is empty now, and so is the last.
    assert new["cu_seqlens"].tolist() == [0, 4, 6]
    assert new["cu_seqlens"].dtype == torch.int32
    assert new["max_seqlen"] == 4
    assert new["position_embeddings"][0][:, 0].tolist() == [8, 10, 12, 14, 16, 18]
    assert rows.tokens(y)[0, -4:, 0].tolist() == [4, 5, 6, 7]
    assert rows.tokens(y)[1, -2:, 0].tolist() == [8, 9]
    with pytest.raises(LayoutError, match="no whole features of 4"):
        rows.features(4)
    assert rows.features(2).tolist() == [2, 3, 4]


def test_features_of_broken_units_take_the_next_free_place():
    x = torch.zeros(16, 1)
    rows = PackedRows(x, [16])
    alive = torch.zeros(1, 16, dtype=torch.bool)
    alive[0, [1, 2, 3, 4, 5, 6, 13, 15]] = True  # features begin in units 0 and 1
    rows.cut(x, alive)
    assert rows.features(4).tolist() == [0, 1]
    rows = PackedRows(x, [16])
    alive = torch.zeros(1, 16, dtype=torch.bool)
    alive[0, 8:] = True  # in units 2 and 3: nothing to move
    rows.cut(x, alive)
    assert rows.features(4).tolist() == [2, 3]


@pytest.mark.parametrize("family", tiny.ALL)
def test_a_picture_is_what_its_patches_are_and_no_neighbour_matters(family):
    """Tiles that keep different patches in one batch equal each alone; the masks hide filling."""
    model, processor = tiny.shared(family)
    unit = Anatomy(model).patches_per_feature
    units = {1: ((0,), (3, 7, 9)), 4: ((0,), (1, 2))}[unit]
    anatomy = Anatomy(model)
    if hasattr(anatomy.tower, "spatial_merge_size"):
        members = [[4 * u + i for i in range(4)] for u in range(4)]
    else:
        of = anatomy.feature_of_patch(torch.arange(16), 16).tolist()
        members = [[p for p in range(16) if of[p] == u] for u in range(max(of) + 1)]
    first, second = (tuple(p for u in own for p in members[u]) for own in units)
    if family in ("llava_next", "llava_onevision", "idefics3", "smolvlm", "internvl"):
        pictures = [[tiny.picture(1, (56, 56))], [tiny.picture(2, (56, 56))]]
        tiles = 2 if family in ("llava_next", "llava_onevision") else 1
    else:
        pictures, tiles = [[tiny.picture(1)], [tiny.picture(2, (64, 64))]], 1
    inputs = tiny.inputs(processor, checks.PROMPTS, pictures)
    method = Leave(keep=(first,) * tiles + (second,), block=feature_block(anatomy) - 1)
    Leave.seen.clear()
    with attach(model, method):
        together = logits(model, inputs)
        singles = [
            logits(model, tiny.inputs(processor, checks.PROMPTS[row : row + 1], [pictures[row]]))
            for row in range(1)
        ]
    with attach(model, Leave(keep=(second,), block=method.block)):
        singles.append(logits(model, tiny.inputs(processor, checks.PROMPTS[1:], [pictures[1]])))
    for row, single in enumerate(singles):
        torch.testing.assert_close(together[row], single[0], atol=2e-4, rtol=1e-4)
    assert len(Leave.seen) == 3
    assert not torch.allclose(together, logits(model, inputs), atol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_kernels_agree_on_rows_of_different_length(implementation):
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    method = Leave(keep=((0, 1, 2), (3, 4, 5, 6, 7)))
    with attach(model, method):
        expected = logits(model, inputs)
    model.set_attn_implementation(implementation)
    with attach(model, method):
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_blocks_behind_the_features_run_only_if_nothing_left():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    last = model.model.vision_tower.encoder.layers[-1]
    ran = []
    last.mlp.register_forward_hook(lambda m, a, out: ran.append(1))
    with attach(model, Leave(keep=((0, 1),))):
        logits(model, inputs)
        assert not ran
    with attach(model, Leave(keep=(tuple(range(16)),))):
        logits(model, inputs)
        assert len(ran) == 1
    assert "forward" not in vars(last)


def test_error_half_a_unit():
    model, processor = tiny.shared("internvl")
    with (
        attach(model, Leave(keep=((0, 1),))),
        pytest.raises(LayoutError, match="parts of image features"),
    ):
        logits(model, checks.batch(processor))


def test_error_no_patch_is_left():
    model, processor = tiny.shared("llava")
    with (
        attach(model, Leave(keep=((1,), ()))),
        pytest.raises(LayoutError, match="leaves no patch of a tile"),
    ):
        logits(model, checks.batch(processor))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Leave(keep=((1,),)), "both choose patches"),
        (ImbalancedAttention(), "all patches in the vision tower"),
    ],
)
def test_error_methods_that_cannot_be_beside_it(other, message):
    model, _ = tiny.shared("llava")
    for pair in ((Leave(), other), (other, Leave())):
        with pytest.raises(IncompatibleMethods, match=message) as caught, attach(model, *pair):
            pass
        assert type(other).__name__ in str(caught.value)
        assert "Leave" in str(caught.value)


@pytest.mark.parametrize(
    "other", [VCD(alpha=1.0, beta=0.1), VHR(text_branch="lockstep"), VHR()], ids=lambda m: m.label
)
def test_renumbered_prompts_decode_alike_fused_and_apart(other):
    """Auxiliary rows in the main cache, and in caches of their own: the same tokens."""

    @dataclass(frozen=True, kw_only=True)
    class Closed(Leave):
        def renumbers(self, anatomy):
            return True

    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    method = Closed(keep=((0, 1, 2), (3, 4, 5, 6, 7)))
    with attach(model, method, other):
        fused = checks.generate(model, inputs, do_sample=False, suppress_tokens=[3])
        with torch.no_grad():
            stepwise = checks._stepwise(model, inputs)
        if not other.riders:
            static = checks.generate(
                model,
                inputs,
                do_sample=False,
                suppress_tokens=[3],
                cache_implementation="static",
                disable_compile=True,
            )
            assert torch.equal(fused, static)
    same = (fused == stepwise) | (stepwise == 3).cumsum(-1).bool()
    assert bool(same.all())
    with attach(model, Leave(keep=method.keep), other):  # positions with gaps
        gaps = logits(model, inputs)
    with attach(model, method, other):
        assert not torch.allclose(gaps, logits(model, inputs), atol=1e-3)
