"""Extra losses: numbers by hand, where gradients go, draws that repeat, every family's pictures."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import ImageOps

from mmlm.errors import UnsupportedModel
from training.losses import ExtraLoss, total_loss
from training.losses.anchors import Anchor
from training.losses.auxiliary import AuxiliarySFT
from training.losses.masked_image import MaskedImage, cover
from training.losses.mdpo import MDPO, crop
from training.losses.pixels import change_pictures
from training.losses.povid import POVID, noised
from training.losses.rlhf_v import RLHFV, changed_tokens, token_weights
from training.losses.shared import chosen_rows, random_stream

BETA = 0.5
#: One pair of four positions; the first is the prompt. The chosen answer has three tokens, the
#: rejected one two.
IDS = torch.tensor([[1, 11, 12, 13], [1, 11, 14, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
POLICY = torch.tensor([[-1.0, -2.0, -1.0], [-3.0, -1.0, -50.0]])
REFERENCE = torch.tensor([[-2.0, -2.0, -3.0], [-1.0, -1.0, -70.0]])
#: l_w = 1 + 0 + 2 = 3 and l_l = -2 + 0 = -2.


def soft(z: float) -> float:
    """-log sigma(z)."""
    return math.log(1 + math.exp(-z))


class Passes:
    """A step whose numbers are given."""

    def __init__(self, again=None, logits=None, auxiliary=None, seed=7):
        self.inputs = {
            "input_ids": IDS,
            "completion_mask": torch.cat([torch.zeros(2, 1, dtype=torch.long), MASK], 1),
            "pixel_values": torch.rand(2, 3, 12, 12) + 0.1,
        }
        self.config = SimpleNamespace(model_type="tiny")
        self.beta, self.step_seed, self.mask = BETA, seed, MASK
        self.policy, self.reference = POLICY.clone().requires_grad_(), REFERENCE
        self.asked = []
        self._again, self._logits, self._auxiliary = again, logits, auxiliary

    def ratios(self):
        sums = ((self.policy - self.reference) * self.mask).sum(1)
        return sums[:1], sums[1:]

    def again(self, inputs):
        self.asked.append(inputs)
        return self._again

    def logits(self, inputs):
        self.asked.append(inputs)
        return self._logits

    def auxiliary(self):
        return self._auxiliary


def other_picture():
    """Policy and reference under another picture: l_w(v') = -1, gradient wanted."""
    policy = torch.tensor([[-2.0, -2.0, -2.0]], requires_grad=True)
    return policy, torch.tensor([[-2.0, -1.0, -2.0]])


# ---- by hand ----


def test_mdpo_by_hand():
    # l_w(v) = 3, l_w(v') = -1: conditional at 0.5 * 4, anchor at 0.5 * 3.
    passes = Passes(again=other_picture())
    loss, log = MDPO(conditional=0.5, anchor=2.0)(passes)
    assert loss.item() == pytest.approx(0.5 * soft(2.0) + 2.0 * soft(1.5))
    assert log["mdpo/conditional"] == pytest.approx(soft(2.0))
    assert log["mdpo/anchor"] == pytest.approx(soft(1.5))
    assert log["mdpo/picture/margins"] == pytest.approx(2.0)
    assert log["mdpo/picture/accuracies"] == 1.0
    loss, _ = MDPO()(passes)
    assert loss.item() == pytest.approx(soft(2.0) + soft(1.5))


def test_mdpo_shows_the_chosen_rows_with_a_crop():
    passes = Passes(again=other_picture())
    MDPO()(passes)
    (asked,) = passes.asked
    assert asked["input_ids"].tolist() == IDS[:1].tolist()
    assert asked["completion_mask"].tolist() == [[0, 1, 1, 1]]
    assert asked["pixel_values"].shape == (1, 3, 12, 12)
    assert not torch.equal(asked["pixel_values"], passes.inputs["pixel_values"][:1])


def test_masked_image_by_hand():
    passes = Passes(again=other_picture())
    loss, log = MaskedImage(ratio=0.5)(passes)
    assert loss.item() == pytest.approx(soft(2.0))
    assert log == {"masked/picture/accuracies": 1.0, "masked/picture/margins": 2.0}
    before, after = passes.inputs["pixel_values"][:1], passes.asked[0]["pixel_values"]
    assert (before != after).any(1).float().mean().item() == 0.5


def test_anchor_by_hand():
    # Reward 0.5 * 3 = 1.5.
    loss, log = Anchor(delta=1.0)(Passes())
    assert loss.item() == pytest.approx(soft(0.5))
    assert log == {"anchor/reached": 1.0}
    loss, log = Anchor(delta=2.0)(Passes())
    assert loss.item() == pytest.approx(soft(-0.5))
    assert log == {"anchor/reached": 0.0}


def test_rlhf_v_by_hand():
    # Answers 11 12 13 and 11 14: with runs of one token only 12 13 and 14 differ; weights 1 3 3
    # and 1 3. l_w = 1 * 1 + 3 * 0 + 3 * 2 = 7, l_l = 1 * -2 + 3 * 0 = -2.
    loss, log = RLHFV(shortest=1)(Passes())
    assert loss.item() == pytest.approx(soft(0.5 * 9))
    assert log["rlhf_v/margins"] == pytest.approx(4.5)
    assert log["rlhf_v/accuracies"] == 1.0
    assert log["rlhf_v/changed"] == pytest.approx(3 / 5)
    # N = 7 and 4.
    loss, _ = RLHFV(shortest=1, average=True)(Passes())
    assert loss.item() == pytest.approx(soft(0.5 * (1 + 0.5)))
    # gamma 1 is plain DPO.
    loss, log = RLHFV(gamma=1.0)(Passes())
    assert loss.item() == pytest.approx(soft(0.5 * 5))
    assert log["rlhf_v/changed"] == 0.0


def test_povid_by_hand():
    # The likeliest tokens under noise, at the columns that predict 11, 12, 13: 11, 5, 6.
    logits = torch.zeros(1, 4, 20)
    for column, token in enumerate((11, 5, 6, 9)):
        logits[0, column, token] = 1.0
    passes = Passes(logits=logits, again=other_picture())
    loss, log = POVID()(passes)
    assert loss.item() == pytest.approx(soft(2.0))
    assert log["povid/changed"] == pytest.approx(2 / 3)
    assert log["povid/margins"] == pytest.approx(2.0)
    noisy, clean = passes.asked
    assert clean["labels"].tolist() == [[-100, 11, 5, 6]]
    assert clean["input_ids"].tolist() == IDS[:1].tolist()
    assert torch.equal(clean["pixel_values"], passes.inputs["pixel_values"][:1])
    assert "labels" not in noisy
    assert not torch.equal(noisy["pixel_values"], clean["pixel_values"])


def test_povid_scores_no_token_that_the_pair_does_not():
    passes = Passes(logits=torch.zeros(1, 4, 20), again=other_picture())
    passes.mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    POVID()(passes)
    assert passes.asked[1]["labels"].tolist() == [[-100, -100, 0, 0]]


def test_auxiliary_by_hand():
    logps = torch.tensor([[-1.0, -math.inf], [-4.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    loss, log = AuxiliarySFT()(Passes(auxiliary=(logps, mask)))
    assert loss.item() == 2.0
    assert log == {"auxiliary/tokens": 3.0}
    loss.backward()
    torch.testing.assert_close(logps.grad, -mask / 3)
    nothing, _ = AuxiliarySFT()(Passes(auxiliary=(logps, 0 * mask)))
    assert nothing.item() == 0.0


# ---- where gradients go ----


def gradient(loss, passes):
    loss(passes)[0].backward()
    return passes.policy.grad


@pytest.mark.parametrize(
    ("loss", "slope"),
    [
        # d/dl_w: -beta (1 - sigma(beta margin)).
        (MDPO(anchor=0.0), -BETA / (1 + math.exp(2.0))),
        (MDPO(conditional=0.0), -BETA / (1 + math.exp(1.5))),
        (MaskedImage(), -BETA / (1 + math.exp(2.0))),
        (Anchor(), -BETA / (1 + math.exp(1.5))),
        (POVID(), -BETA / (1 + math.exp(2.0))),
    ],
)
def test_the_chosen_answer_is_pushed_and_the_rejected_one_left_alone(loss, slope):
    policy, reference = other_picture()
    passes = Passes(again=(policy, reference), logits=torch.zeros(1, 4, 20))
    grad = gradient(loss, passes)
    torch.testing.assert_close(grad, torch.tensor([[slope] * 3, [0.0] * 3]))
    if passes.asked and getattr(loss, "conditional", 1.0):
        torch.testing.assert_close(policy.grad, torch.full((1, 3), -slope))


def test_rlhf_v_pushes_changed_tokens_harder():
    grad = gradient(RLHFV(shortest=1), Passes())
    slope = -BETA / (1 + math.exp(4.5))
    torch.testing.assert_close(grad, slope * torch.tensor([[1.0, 3.0, 3.0], [-1.0, -3.0, 0.0]]))


@pytest.mark.parametrize("loss", [MDPO(), MaskedImage(), POVID(), RLHFV(), Anchor()])
def test_unscored_columns_may_hold_anything(loss):
    def values(junk):
        policy, reference = other_picture()
        passes = Passes(again=(policy, reference), logits=torch.zeros(1, 4, 20))
        passes.mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
        if isinstance(loss, RLHFV):
            passes.policy = torch.where(passes.mask > 0, POLICY, junk).requires_grad_()
        elif passes._again:
            passes._again = torch.where(passes.mask[:1] > 0, policy, junk), reference
        value, _ = loss(passes)
        value.backward()
        assert passes.policy.grad.isfinite().all()
        return value.item()

    assert values(math.nan) == values(-5.0)


# ---- changed tokens ----


@pytest.mark.parametrize(
    ("first", "second", "shortest", "one_sided", "expected"),
    [
        ("a man with a dog", "a man with a cat", 3, False, ([4], [4])),
        # A run of one equal word between two changes is too short to count.
        ("b b b x and y c c c", "b b b p and q c c c", 3, False, ([3, 4, 5], [3, 4, 5])),
        ("b b b x and y c c c", "b b b p and q c c c", 1, False, ([3, 5], [3, 5])),
        # What has no counterpart counts only if asked for.
        ("one two three", "one two three and more", 3, False, ([], [])),
        ("one two three", "one two three and more", 3, True, ([], [3, 4])),
        ("on a red mat sits", "on a red big mat sits", 3, False, ([3, 4], [3, 4, 5])),
        ("x y", "p q", 3, False, ([0, 1], [0, 1])),
        ("same words here", "same words here", 3, True, ([], [])),
        ("", "new", 3, False, ([], [])),
        ("", "new", 3, True, ([], [0])),
    ],
)
def test_changed_tokens(first, second, shortest, one_sided, expected):
    found = changed_tokens(first.split(), second.split(), shortest=shortest, one_sided=one_sided)
    assert found == expected


def test_frequent_tokens_count_in_long_answers_too():
    # 300 equal tokens of two kinds: difflib's default would call both junk and find no run.
    long = [1, 2] * 150
    assert changed_tokens([8, *long], [9, 9, *long]) == ([0], [0, 1])


def test_token_weights_follow_the_mask():
    # Prompts of one and two tokens; a pad behind the shorter answer; the unscored get 0.
    ids = torch.tensor([[9, 9, 1, 2, 3, 4, 0], [9, 1, 2, 3, 7, 5, 6]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    weights = token_weights(ids, mask, 3.0)
    assert weights.tolist() == [[0, 1, 1, 1, 3, 0], [1, 1, 1, 3, 3, 3]]


# ---- together with the main loss ----


def test_total_is_the_weighted_sum():
    passes = Passes(again=other_picture())
    main = torch.tensor(10.0, requires_grad=True)
    loss, log = total_loss(main, (Anchor(weight=2.0), MaskedImage(weight=0.5)), passes)
    assert loss.item() == pytest.approx(10 + 2 * soft(1.5) + 0.5 * soft(2.0))
    assert log["loss/Anchor"] == pytest.approx(soft(1.5))
    assert log["loss/MaskedImage"] == pytest.approx(soft(2.0))
    loss.backward()
    assert main.grad.item() == 1.0


def test_a_replacing_loss_leaves_nothing_of_the_main_one():
    main = torch.tensor(math.inf, requires_grad=True)
    loss, _ = total_loss(main, (Anchor(), RLHFV(gamma=1.0, weight=2.0)), Passes())
    assert loss.item() == pytest.approx(soft(1.5) + 2 * soft(2.5))
    loss.backward()
    assert main.grad is None


def test_a_loss_of_ones_own_needs_one_method():
    class Half(ExtraLoss):
        def __call__(self, passes):
            return passes.policy.sum() * 0.5, {"half": 1.0}

    _, log = total_loss(torch.tensor(0.0), (Half(),), Passes())
    assert log == {"loss/Half": -29.0, "half": 1.0}
    with pytest.raises(TypeError, match="abstract"):
        ExtraLoss()


# ---- draws ----


@pytest.mark.parametrize("loss", [MDPO(), MaskedImage(), POVID()])
def test_draws_repeat_with_the_step_and_leave_the_global_generator_alone(loss):
    def shown(seed):
        torch.manual_seed(0)
        passes = Passes(again=other_picture(), logits=torch.zeros(1, 4, 20), seed=seed)
        before = torch.get_rng_state()
        loss(passes)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(5)  # whatever else happens between two runs
        return passes.asked[0]["pixel_values"]

    first = shown(7)
    torch.rand(3)
    assert torch.equal(first, shown(7))
    assert not torch.equal(first, shown(8))


def test_two_losses_of_a_step_draw_different_numbers():
    step = SimpleNamespace(step_seed=3)
    one, other, again = (
        torch.rand(4, generator=random_stream(step, name)) for name in ("MDPO", "POVID", "MDPO")
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# ---- what is done to a picture ----


def test_crops_show_one_to_twenty_percent():
    """Coordinates as colours: the range of each says which part is shown."""
    size = 200
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    picture = torch.stack([rows, columns]).float()
    areas, lefts = [], []
    for number in range(200):
        shown = crop(picture, torch.Generator().manual_seed(number), 0.01, 0.2)
        assert shown.shape == picture.shape
        height, width = (shown[i].max() - shown[i].min() + 1 for i in range(2))
        areas.append((height * width / size**2).item())
        lefts.append(shown[1].min().item())
        assert 0.7 < height / width < 1.4
    assert 0.008 < min(areas) < 0.03
    assert 0.18 < max(areas) < 0.21
    assert max(lefts) > 100 > 20 > min(lefts)


def test_covered_blocks_hold_the_mean():
    picture = torch.arange(2 * 6 * 8).view(2, 6, 8).float()
    covered = cover(picture, torch.Generator().manual_seed(0), 0.5, 4)
    changed = (covered != picture).any(0)
    # 2 x 2 blocks, the lower ones cut to two rows: two of four are covered.
    blocks = [changed[:4, :4], changed[:4, 4:], changed[4:, :4], changed[4:, 4:]]
    assert sorted(bool(b.all()) for b in blocks) == [False, False, True, True]
    assert sorted(bool(b.any()) for b in blocks) == [False, False, True, True]
    assert covered[:, changed].unique().tolist() == [picture.mean().item()]


def test_single_pixels_are_covered_by_the_share():
    picture = torch.rand(3, 10, 10)
    for ratio, count in ((0.3, 30), (0.005, 1), (1.0, 100)):
        covered = cover(picture, torch.Generator().manual_seed(0), ratio, 1)
        assert (covered != picture).any(0).sum() == count


def test_noise_of_step_500_by_the_schedule():
    # abar_500 by the authors' formula, written out as a loop.
    kept = 1.0
    for s in range(501):
        x = -6 + 12 * s / 999
        kept *= 1 - (1 / (1 + math.exp(-x)) * (0.5e-2 - 1e-5) + 1e-5)
    noise = noised(torch.zeros(3, 200, 200), torch.Generator().manual_seed(0), 500)
    assert noise.std().item() == pytest.approx(math.sqrt(1 - kept), rel=0.01)
    assert noise.mean().abs() < 0.01
    shifted = noised(torch.full((3, 200, 200), 2.0), torch.Generator().manual_seed(0), 500)
    torch.testing.assert_close(
        shifted - noise, torch.full_like(noise, 2 * math.sqrt(kept)), rtol=1e-5, atol=1e-5
    )


# ---- the layouts of ten families ----


def batch(family, pictures):
    """Inputs with the pictures of two rows, and the configuration."""
    model, processor = tiny.shared(family)
    return tiny.inputs(processor, ["what is shown ?"] * 2, pictures), model.config


@pytest.mark.parametrize("family", tiny.ALL)
def test_a_mirrored_batch_is_the_batch_of_mirrored_pictures(family):
    """The processor is the judge: tiles are mirrored in place, so one square tile a picture."""
    pictures = [[tiny.picture(0, (56, 56))], [tiny.picture(1, (56, 56))]]
    mirrored = [[ImageOps.mirror(picture) for picture in row] for row in pictures]
    inputs, config = batch(family, pictures)
    wanted, _ = batch(family, mirrored)
    found = change_pictures(inputs, config, lambda picture: picture.flip(-1))
    assert not torch.allclose(inputs["pixel_values"], wanted["pixel_values"], atol=0.1)
    one_tile = family not in ("llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm")
    if one_tile:
        torch.testing.assert_close(found["pixel_values"], wanted["pixel_values"], rtol=0, atol=1e-5)
    back = change_pictures(found, config, lambda picture: picture.flip(-1))
    assert torch.equal(back["pixel_values"], inputs["pixel_values"])
    for key in inputs:
        assert key == "pixel_values" or found[key] is inputs[key]


@pytest.mark.parametrize("family", tiny.ALL)
def test_the_model_sees_the_change_in_every_family(family):
    """Cropped pictures pass through the model and change what it says."""
    inputs, config = batch(
        family, [[tiny.picture(0, (60, 100))], [tiny.picture(1, (120, 60)), tiny.picture(2)]]
    )
    model, _ = tiny.shared(family)
    stream = torch.Generator().manual_seed(0)
    cropped = change_pictures(inputs, config, lambda p: crop(p, stream, 0.01, 0.2))
    assert cropped["pixel_values"].dtype == inputs["pixel_values"].dtype
    with torch.no_grad():
        clean, other = (model(**x).logits[:, -1] for x in (inputs, cropped))
    assert other.isfinite().all()
    assert ((clean - other).abs().amax(1) > 1e-5).all()


@pytest.mark.parametrize("family", ["llava_next", "idefics3", "llava_onevision"])
def test_padding_tiles_stay_zero(family):
    inputs, config = batch(
        family, [[tiny.picture(0, (56, 56))], [tiny.picture(1, (112, 112)), tiny.picture(2)]]
    )
    pixels = inputs["pixel_values"]
    pads = pixels.flatten(-3).eq(0).all(-1)
    assert pads.any()
    found = change_pictures(inputs, config, lambda picture: picture + 100)["pixel_values"]
    assert found[pads].eq(0).all()
    assert found[~pads].gt(50).all()


def test_only_the_picture_itself_is_changed_in_a_padded_tile():
    pixels = torch.zeros(1, 3, 5, 6)
    pixels[..., :4, :2] = 1.0
    pixels[0, :, 1, 1] = pixels[0, 0, 3] = pixels[0, 2, :, 1] = 0.0  # black is no padding
    shapes = []

    def change(picture):
        shapes.append(tuple(picture.shape))
        return picture + 1

    found = change_pictures({"pixel_values": pixels}, None, change)["pixel_values"]
    assert shapes == [(3, 4, 2)]
    assert found.sum() == pixels.sum() + 3 * 4 * 2
    assert found[..., 4:, :].eq(0).all()
    assert found[..., 2:].eq(0).all()
    assert pixels.max() == 1.0


def test_rows_of_text_alone_come_back_as_they_are():
    inputs = {"input_ids": IDS, "attention_mask": IDS, "completion_mask": IDS}
    assert change_pictures(inputs, None, pytest.fail) == inputs


@pytest.mark.parametrize(
    ("inputs", "config", "message"),
    [
        ({"images": IDS}, SimpleNamespace(model_type="odd"), "odd cannot be changed: images"),
        (
            {"pixel_values": torch.ones(2, 4, 6)},
            SimpleNamespace(model_type="odd"),
            r"pixel_values of shape \[2, 4, 6\]",
        ),
        ({"pixel_values": torch.ones(4, 6)}, SimpleNamespace(), r"of shape \[4, 6\]"),
        (
            {"pixel_values": torch.ones(1, 3, 4, 4), "pixel_values_videos": torch.ones(1)},
            SimpleNamespace(),
            "pixel_values_videos",
        ),
        (
            {"pixel_values": torch.ones(4, 24), "image_grid_thw": torch.tensor([[1, 2, 2]])},
            SimpleNamespace(model_type="odd", vision_config=SimpleNamespace(patch_size=2)),
            "packed patches and no spatial_merge_size",
        ),
    ],
)
def test_unknown_layouts_are_refused(inputs, config, message):
    with pytest.raises(UnsupportedModel, match=message) as caught:
        change_pictures(inputs, config, pytest.fail)
    assert "Anchor" in caught.value.advice


def test_the_chosen_half_has_its_own_pictures():
    inputs = {
        "input_ids": IDS,
        "pixel_values": torch.arange(6.0).view(6, 1),
        "image_grid_thw": torch.tensor([[1, 1, 3], [1, 1, 3]]),
        "ref_chosen_logps": torch.zeros(1),
    }
    half = chosen_rows(inputs)
    assert set(half) == {"input_ids", "pixel_values", "image_grid_thw"}
    assert half["input_ids"].tolist() == IDS[:1].tolist()
    assert half["pixel_values"].flatten().tolist() == [0, 1, 2]
    assert half["image_grid_thw"].tolist() == [[1, 1, 3]]
