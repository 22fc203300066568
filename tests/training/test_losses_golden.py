"""Our formulas of the preference losses against vectors made by TRL 1.16 in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import arrays, golden

from training.losses import dpo
from training.losses.pairs import answer_logps
from training.losses.settings import LossSettings

pytestmark = pytest.mark.golden

EXACT = 1e-10
#: What each name in the vectors means, see their README; {gamma} is in the file.
NAMES = {
    "sigmoid": {},
    "sigmoid_sft": {"types": ("sigmoid", "sft"), "weights": (1.0, "gamma")},
    "sft": {"types": ("sft",)},
    "sigmoid_norm": {"types": ("sigmoid_norm",)},
    "ipo": {"types": ("ipo",)},
    "hinge": {"types": ("hinge",)},
    "robust_ls0.1": {"types": ("robust",), "label_smoothing": 0.1},
    "sigmoid_ls0.1": {"label_smoothing": 0.1},
    "sigmoid_ld0.5": {"ld_alpha": 0.5},
    "sigmoid_ld0": {"ld_alpha": 0.0},
    "sigmoid_wpo": {"use_weighting": True},
    "apo_zero": {"types": ("apo_zero",)},
    "mpo": {"types": ("sigmoid", "bco_pair", "sft"), "weights": (0.8, 0.2, 1.0)},
}


def settings(name: str, beta: float, gamma: float) -> LossSettings:
    fields = dict(NAMES[name])
    weights = fields.get("weights")
    if weights:
        fields["weights"] = tuple(gamma if w == "gamma" else w for w in weights)
    return LossSettings(beta=beta, **fields)


def names_in(file) -> set[str]:
    suffix = "_batch_loss"
    return {key[3 : -len(suffix)] for key in file if key.endswith(suffix)}


@pytest.mark.parametrize("path", golden("trl_dpo*/*.npz"))
def test_acceptance_1_the_vectors_hold_no_name_that_is_not_compared(path):
    with np.load(path) as data:
        assert names_in(data.files) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", golden("trl_dpo*/*.npz"))
def test_acceptance_1_losses_and_gradients_equal_the_vectors(path, name):
    data = arrays(path)
    mask = data["completion_mask"][:, 1:]
    reference, squares = data["ref_token_logps"], data["log_sum_sq_probs"]
    for number, beta in enumerate(data["betas"].tolist()):
        wanted = {
            key: data[f"b{number}_{name}_{key}"]
            for key in ("batch_loss", "pair_loss", "grad_token_logps")
        }
        chosen = settings(name, beta, data["gamma"].item())
        policy = data["policy_token_logps"].clone().requires_grad_()
        batch = dpo.preference_loss(policy, reference, mask, chosen, squares)
        batch.backward()
        pairs = dpo.pair_losses(policy.detach(), reference, mask, chosen, squares)
        torch.testing.assert_close(batch.detach(), wanted["batch_loss"], rtol=0, atol=EXACT)
        torch.testing.assert_close(pairs, wanted["pair_loss"], rtol=0, atol=EXACT)
        torch.testing.assert_close(policy.grad, wanted["grad_token_logps"], rtol=0, atol=EXACT)
        assert policy.grad[mask == 0].eq(0).all()


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_ld0.5"])
@pytest.mark.parametrize("path", golden("trl_dpo*/*.npz"))
def test_acceptance_1_answer_logps_and_rewards_equal_the_vectors(path, name):
    data = arrays(path)
    mask = data["completion_mask"][:, 1:]
    policy, reference = data["policy_token_logps"], data["ref_token_logps"]
    for number, beta in enumerate(data["betas"].tolist()):
        chosen = settings(name, beta, data["gamma"].item())
        logps = answer_logps(policy, mask, chosen.ld_alpha)
        rewards = dpo.rewards(policy, reference, mask, chosen)
        for row, side in enumerate(("chosen", "rejected")):
            prefix = f"b{number}_{name}_{side}"
            torch.testing.assert_close(logps[row], data[f"{prefix}_logps"], rtol=0, atol=EXACT)
            torch.testing.assert_close(rewards[row], data[f"{prefix}_reward"], rtol=0, atol=EXACT)
