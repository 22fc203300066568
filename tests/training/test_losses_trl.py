"""Our formulas against TRL's own trainer, on a batch with pictures and a reference that differs."""

from __future__ import annotations

import ast
import math
import re

import preference_batches
import pytest
import tiny
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from trl import DPOConfig, DPOTrainer

from training.losses import dpo
from training.losses.settings import DIVERGENCES, LOSS_TYPES, LossSettings

QUIET = {"use_cpu": True, "bf16": False, "activation_checkpointing": False}
MIXED = {"types": ("sigmoid", "bco_pair", "sft"), "weights": (0.8, 0.2, 1.0)}
SETTINGS = {
    **{name: {"types": (name,), "label_smoothing": 0.1} for name in LOSS_TYPES},
    **{f"sigmoid_{name}": {"f_divergence_type": name} for name in DIVERGENCES},
    "hinge_alpha_1": {
        "types": ("hinge",),
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 1.0,
    },
    "ld_alpha": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
    "wpo_mixed": {"use_weighting": True, "types": ("ipo", "nca_pair"), "weights": (2.0, 0.5)},
    "discopop_tau": {"types": ("discopop",), "discopop_tau": 0.5},
    "mixed": MIXED,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """TRL's trainer with a batch of three pairs, and a reference of other weights."""
    model, processor = tiny.build("llava")
    reference, _ = tiny.build("llava")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.model.language_model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    trainer = DPOTrainer(
        model,
        reference,
        DPOConfig(
            str(tmp_path_factory.mktemp("trl")),
            max_length=None,
            use_weighting=True,
            report_to=[],
            **QUIET,
        ),
        processing_class=processor,
        train_dataset=Dataset.from_list([{"images": []}]),
        data_collator=list,
    )
    trainer.batch = preference_batches.batch(processor)
    return trainer


def token_logps(model, inputs):
    """[2B, S - 1] log p and log sum_v p(v)^2, from the model's plain logits."""
    labels = inputs["input_ids"][:, 1:]
    more = {k: v for k, v in inputs.items() if k != "completion_mask"}
    logps = model(**more).logits[:, :-1].double().log_softmax(-1)
    squares = (2 * logps).logsumexp(-1)
    return logps.gather(2, labels[..., None])[..., 0], squares


def configure(trainer, settings):
    trainer.loss_types = list(settings.types)
    trainer.loss_weights = list(settings.all_weights)
    for name in (
        "beta",
        "label_smoothing",
        "ld_alpha",
        "use_weighting",
        "f_divergence_type",
        "f_alpha_divergence_coef",
    ):
        setattr(trainer, name, getattr(settings, name))
    trainer.args.discopop_tau = settings.discopop_tau


@pytest.mark.parametrize("name", SETTINGS)
def test_acceptance_1_trl_computes_the_formula_and_its_gradient(trained, name):
    settings = LossSettings(beta=0.3, **SETTINGS[name])
    configure(trained, settings)
    model, inputs = trained.model, trained.batch
    model.zero_grad()
    theirs = trained._compute_loss(model, inputs, return_outputs=False)
    theirs.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.zero_grad()
    policy, squares = token_logps(model, inputs)
    with torch.no_grad():
        reference, _ = token_logps(trained.ref_model, inputs)
    mask = inputs["completion_mask"][:, 1:]
    ours = dpo.preference_loss(policy, reference, mask, settings, squares)
    ours.backward()
    assert theirs.item() == pytest.approx(ours.item(), rel=2e-5)
    mine = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(mine) == len(gradients) > 10
    scale = max(g.abs().max().item() for g in mine)
    assert scale > 1e-4
    for one, other in zip(gradients, mine, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * scale)


def test_acceptance_6_nll_is_the_token_mean_cross_entropy_of_the_chosen(trained):
    model, inputs = trained.model, trained.batch
    configure(trained, LossSettings())
    with torch.no_grad():
        plain = trained._compute_loss(model, inputs, return_outputs=False)
        configure(trained, LossSettings(types=("sigmoid", "sft"), weights=(1.0, 0.7)))
        mixed = trained._compute_loss(model, inputs, return_outputs=False)
        more = {k: v for k, v in inputs.items() if k != "completion_mask"}
        logits = model(**more).logits
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    half = len(labels) // 2
    nll = cross_entropy(logits[:half, :-1].flatten(0, 1), labels[:half, 1:].flatten())
    assert mixed.item() == pytest.approx(plain.item() + 0.7 * nll.item(), rel=1e-5)


def test_our_names_are_those_that_trl_knows(trained):
    configure(trained, LossSettings())
    trained.loss_types = ["none of them"]
    with pytest.raises(ValueError, match="Unknown loss type") as caught:
        trained._compute_loss(trained.model, trained.batch, return_outputs=False)
    listed = re.search(r"\[.*\]", str(caught.value), re.DOTALL)[0]
    assert tuple(ast.literal_eval(listed)) == LOSS_TYPES == tuple(dpo.LOSSES)


def test_trl_reads_the_settings(tmp_path):
    settings = LossSettings(
        types=("robust", "hinge"),
        weights=(0.5, 2.0),
        beta=0.2,
        label_smoothing=0.3,
        ld_alpha=0.5,
        use_weighting=True,
        f_divergence_type="forward_kl",
        f_alpha_divergence_coef=0.25,
        discopop_tau=0.125,
    )
    config = DPOConfig(str(tmp_path), **QUIET, **settings.for_trl())
    assert (config.loss_type, config.loss_weights) == (["robust", "hinge"], [0.5, 2.0])
    assert (config.beta, config.label_smoothing, config.ld_alpha) == (0.2, 0.3, 0.5)
    assert config.use_weighting
    assert config.f_divergence_type == "forward_kl"
    assert (config.f_alpha_divergence_coef, config.discopop_tau) == (0.25, 0.125)


def test_trl_reads_the_defaults(tmp_path):
    config = DPOConfig(str(tmp_path), **QUIET)
    for name, value in LossSettings().for_trl().items():
        assert getattr(config, name) == value, name


# ---- at the formulas ----


def tokens():
    generator = torch.Generator().manual_seed(3)
    policy, reference = -torch.rand(2, 4, 6, generator=generator, dtype=torch.float64)
    return policy, reference, torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]] * 2)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_sentinel_acceptance_13_5_loss_is_ln_2_at_the_start_for_any_beta(beta):
    policy, _, mask = tokens()
    settings = LossSettings(beta=beta)
    assert dpo.preference_loss(policy, policy, mask, settings).item() == math.log(2)
    assert not dpo.rewards(policy, policy, mask, settings).any()


def test_sentinel_acceptance_13_5_rewards_scale_with_beta():
    policy, reference, mask = tokens()
    one, three = (
        dpo.rewards(policy, reference, mask, LossSettings(beta=beta)) for beta in (0.1, 0.3)
    )
    assert one.abs().min() > 0.01
    torch.testing.assert_close(three, 3 * one, rtol=1e-12, atol=0)


def test_sigmoid_by_hand():
    # One pair. Chosen: tokens -1, -2 (the -9 is not scored), reference -2, -2: l_w = 1.
    # Rejected: -3, reference -1: l_l = -2. h = 3, beta 0.5: -log sigma(1.5) = log(1 + e^-1.5).
    policy = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -9.0, -9.0]])
    reference = torch.tensor([[-2.0, -2.0, -7.0], [-1.0, -7.0, -7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = dpo.preference_loss(policy, reference, mask, LossSettings(beta=0.5))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert dpo.rewards(policy, reference, mask, LossSettings(beta=0.5)).tolist() == [[0.5], [-1.0]]
    # ld_alpha 0.25: the second chosen token is beyond the rejected one's length; its ratio is 0.
    # With reference -2, -3 it would be 1 and count a quarter: l_w = 1.25.
    other = torch.tensor([[-2.0, -3.0, -7.0], [-1.0, -7.0, -7.0]])
    loss = dpo.preference_loss(policy, other, mask, LossSettings(beta=0.5, ld_alpha=0.25))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5 * 3.25)))


@pytest.mark.parametrize(
    ("name", "policy", "reference"),
    [
        # Margins of the policy 1 and 3, of the reference 2 and 0.
        ("aot", [1, 3, 0, 0], [2, 0, 0, 0]),
        # Log ratios of chosen answers 1 and 3, of rejected ones 2 and 0.
        ("aot_unpaired", [1, 3, 2, 0], [0, 0, 0, 0]),
    ],
)
def test_aot_compares_the_sorted_values(name, policy, reference):
    # Smallest with smallest, largest with largest: 1 - 0 and 3 - 2. Unsorted it were -1 and 3.
    columns = [torch.tensor(values, dtype=torch.float64)[:, None] for values in (policy, reference)]
    loss = dpo.preference_loss(
        *columns, torch.ones(4, 1), LossSettings(types=(name,), beta=0.5, label_smoothing=0.2)
    )
    right, wrong = math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))
    assert loss.item() == pytest.approx(0.8 * right + 0.2 * wrong, rel=1e-12)


@pytest.mark.parametrize("more", [{"types": ("sigmoid", "sft")}, {"use_weighting": True}])
@pytest.mark.parametrize("worst", [-math.inf, math.nan])
def test_what_stands_in_unscored_columns_does_not_matter(worst, more):
    policy, reference, mask = tokens()
    settings = LossSettings(**more)
    clean = dpo.preference_loss(policy, reference, mask, settings, reference)
    broken = [torch.where(mask > 0, one, worst).requires_grad_() for one in (policy, reference)]
    loss = dpo.preference_loss(*broken, mask, settings, broken[1])
    assert loss.item() == clean.item()
    loss.backward()
    assert broken[0].grad.isfinite().all()


def test_wpo_needs_the_squares():
    policy, reference, mask = tokens()
    with pytest.raises(ValueError, match="log_sum_sq_probs"):
        dpo.preference_loss(policy, reference, mask, LossSettings(use_weighting=True))
