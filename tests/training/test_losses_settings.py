"""What a loss may consist of: every refusal says what was given and what is allowed."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from mmlm.errors import InputError
from training.losses import EXTRA_LOSSES, parse_extra_loss
from training.losses.anchors import Anchor
from training.losses.auxiliary import AuxiliarySFT
from training.losses.masked_image import MaskedImage
from training.losses.mdpo import MDPO
from training.losses.povid import POVID
from training.losses.rlhf_v import RLHFV
from training.losses.settings import LOSS_TYPES, LossSettings, check_loss

CLASSES = (Anchor, AuxiliarySFT, MDPO, MaskedImage, POVID, RLHFV)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"types": ("sigmoid", "cdpo")}, r"'cdpo' is unknown; there are: sigmoid, hinge, .*norm"),
        ({"types": ()}, "no loss type is given; there are: sigmoid"),
        ({"types": ("sft", "sft")}, "named twice"),
        ({"types": ("sigmoid", "sft"), "weights": (1.0,)}, r"1 loss weights .* 2 loss types"),
        ({"weights": (1.0, 2.0)}, r"2 loss weights .* 1 loss types"),
        ({"weights": (math.nan,)}, "weight must be a finite number, got nan"),
        ({"beta": 0}, "beta must be a finite number > 0, got 0"),
        ({"beta": -0.1}, "got -0.1"),
        ({"beta": math.inf}, "got inf"),
        ({"beta": math.nan}, "got nan"),
        ({"label_smoothing": 0.5}, r"in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, "got -0.1"),
        ({"types": ("exo_pair",)}, "exo_pair takes the logarithm"),
        ({"ld_alpha": 1.5}, r"in \[0, 1\] or absent, got 1.5"),
        ({"ld_alpha": -1}, "got -1"),
        ({"types": ("aot",), "use_weighting": True}, "with aot, which sorts"),
        ({"types": ("sigmoid", "aot_unpaired"), "use_weighting": True}, "aot_unpaired, which"),
        ({"types": ("sigmoid", "sft"), "use_weighting": True}, "sft, which has one value"),
        ({"f_divergence_type": "kl"}, "'kl' is unknown; there are: reverse_kl, forward_kl"),
        (
            {"types": ("sigmoid", "bco_pair"), "f_divergence_type": "forward_kl"},
            "bco_pair is defined with reverse_kl only, not with forward_kl; .*sigmoid",
        ),
        ({"discopop_tau": 0.0}, "discopop_tau must be a finite number > 0"),
        ({"f_alpha_divergence_coef": math.inf}, "f_alpha_divergence_coef must be finite"),
    ],
)
def test_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"types": LOSS_TYPES, "weights": (0.5,) * len(LOSS_TYPES), "label_smoothing": 0.49},
        {"ld_alpha": 0.0},
        {"ld_alpha": 1.0},
        {"types": ("sigmoid", "sft"), "weights": (1.0, 0.0), "f_divergence_type": "js_divergence"},
        {"use_weighting": True, "types": ("sigmoid", "bco_pair")},
    ],
)
def test_settings_are_accepted(fields):
    settings = LossSettings(**fields)
    assert settings.all_weights == fields.get("weights", (1.0,) * len(settings.types))


def test_weights_default_to_one_each():
    assert LossSettings(types=("sigmoid", "sft")).all_weights == (1.0, 1.0)


@pytest.mark.parametrize(
    ("extra", "more", "message"),
    [
        ([MDPO()], {"ld_alpha": 0.5}, "ld_alpha cannot be combined with MDPO"),
        ([Anchor(), Anchor(weight=2.0)], {}, "Anchor is given twice"),
    ],
)
def test_extra_losses_that_cannot_go_together(extra, more, message):
    with pytest.raises(ValueError, match=message):
        check_loss(["sigmoid"], None, 0.1, extra=extra, **more)


def test_two_losses_cannot_both_replace_the_main_one():
    class Other(RLHFV):
        pass

    with pytest.raises(ValueError, match="RLHFV and Other both replace"):
        check_loss(["sigmoid"], None, 0.1, extra=[RLHFV(), Other()])


def test_extra_losses_that_go_together():
    check_loss(["sigmoid"], None, 0.1, extra=[RLHFV(), Anchor(), MaskedImage()])


# ---- extra losses: fields and text form ----


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        *((cls, {"weight": 0}, "weight must be a finite number > 0, got 0") for cls in CLASSES),
        *((cls, {"weight": math.nan}, "got nan") for cls in CLASSES),
        (Anchor, {"delta": math.inf}, "delta must be a finite number, got inf"),
        (Anchor, {"weight": True}, "got True"),
        (MDPO, {"conditional": -1}, "conditional must be a finite number >= 0"),
        (MDPO, {"anchor": -1}, "anchor must be a finite number >= 0"),
        (MDPO, {"smallest": 0}, "smallest must be a finite number > 0 and <= 1"),
        (MDPO, {"largest": 1.1}, "largest must be .* <= 1, got 1.1"),
        (MDPO, {"smallest": 0.5, "largest": 0.4}, "largest must be .* >= 0.5 and <= 1, got 0.4"),
        (MaskedImage, {"ratio": 0}, "ratio must be a finite number > 0 and <= 1"),
        (MaskedImage, {"block": 0}, "block must be an integer >= 1, got 0"),
        (MaskedImage, {"block": 1.5}, "got 1.5"),
        (POVID, {"noise_step": 1000}, "noise_step must be an integer >= 0 and <= 999"),
        (RLHFV, {"gamma": 0}, "gamma must be a finite number > 0"),
        (RLHFV, {"shortest": 0}, "shortest must be an integer >= 1"),
    ],
)
def test_parameters_are_refused(cls, fields, message):
    with pytest.raises(ValueError, match=f"^{cls.__name__}: .*{message}"):
        cls(**fields)


def test_every_loss_is_listed_and_equals_its_text_form():
    assert set(EXTRA_LOSSES) == {cls.__name__ for cls in CLASSES}
    for cls in CLASSES:
        loss = cls(weight=0.25)
        assert parse_extra_loss(repr(loss)) == loss
        assert parse_extra_loss(cls.__name__) == cls()


def test_published_weights():
    weights = {cls.__name__: cls().weight for cls in CLASSES}
    assert weights == {
        "Anchor": 1.0,
        "AuxiliarySFT": 1.0,
        "MDPO": 1.0,
        "MaskedImage": 0.2,
        "POVID": 0.5,
        "RLHFV": 1.0,
    }
    assert (RLHFV().gamma, POVID().noise_step, MaskedImage().ratio) == (3.0, 500, 0.3)
    assert (MDPO().smallest, MDPO().largest) == (0.01, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mDPO", "no loss 'mDPO'; there are: Anchor, AuxiliarySFT, MDPO"),
        ("MDPO(strength=1)", "MDPO has no parameter 'strength'; it has: weight, conditional"),
        ("MDPO(weight=-1)", "weight must be a finite number > 0"),
        ("MDPO(1.0)", "positional"),
        ("MDPO(", "not a loss: .*never closed"),
    ],
)
def test_text_forms_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_extra_loss(text)


def test_settings_are_checked_without_torch():
    code = (
        "import sys, training.losses, training.losses.settings as s; s.LossSettings(); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
