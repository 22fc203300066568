"""Extra losses inside the trainer: equal to plain passes by hand, trained with, and resumed."""

from __future__ import annotations

import math

import preference_batches
import pytest
import tiny
import torch
from datasets import Dataset
from preference_toy import write_pairs
from torch.nn.functional import cross_entropy, logsigmoid
from trl import DPOConfig

from mmlm.errors import InputError
from training.lora import lora_config
from training.losses import EXTRA_LOSSES
from training.losses.anchors import Anchor
from training.losses.auxiliary import AuxiliaryBatches, AuxiliarySFT
from training.losses.masked_image import MaskedImage, cover
from training.losses.mdpo import MDPO, crop
from training.losses.pixels import change_pictures
from training.losses.povid import POVID, noised
from training.losses.rlhf_v import RLHFV, token_weights
from training.losses.shared import random_stream
from training.preference.rows import read_rows
from training.preference.trainer import VLPreferenceTrainer
from training.settings import LoraSettings

BETA = 0.3
SEED = 11
FAMILIES = ("llava", "qwen2_5_vl", "idefics3")
LOSSES = (
    MDPO(weight=0.5, conditional=2.0),
    MaskedImage(block=7),
    POVID(),
    RLHFV(shortest=1),
    Anchor(delta=0.1),
    AuxiliarySFT(weight=0.25),
)


def arguments(folder, **values):
    given = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "beta": BETA,
        "max_length": None,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
    }
    return DPOConfig(str(folder), **{**given, **values})


def auxiliary(processor):
    """One fixed text as the other data: the labels are the last four tokens."""
    ids = processor.tokenizer("people watch a train in the station .", return_tensors="pt")

    def collate(examples):
        rows = torch.cat([ids["input_ids"]] * len(examples))
        labels = torch.full_like(rows, -100)
        labels[:, -4:] = rows[:, -4:]
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}

    return AuxiliaryBatches(range(5), collate, 2)


def build(folder, family, losses, train_dataset, fast=(), **values):
    model, processor = tiny.build(family)
    trainer = VLPreferenceTrainer(
        model,
        args=arguments(folder, **values),
        train_dataset=train_dataset,
        processing_class=processor,
        peft_config=lora_config(model, LoraSettings(r=4, alpha=8)),
        extra_losses=losses,
        auxiliary=auxiliary(processor),
        fast=fast,
    )
    return trainer, processor


@pytest.fixture(scope="module", params=FAMILIES)
def step(request, tmp_path_factory):
    """A trainer whose policy has left the reference, and a batch of one, two and no pictures."""
    folder = tmp_path_factory.mktemp("step")
    rows = Dataset.from_list([{"images": []}])
    trainer, processor = build(folder, request.param, (), rows)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trainer._seed_of_pass = lambda: SEED
    trainer.batch = preference_batches.batch(processor)
    return trainer


# ---- by plain passes ----


class Plain:
    """What the losses need, from the model's plain logits and one pass after the other."""

    def __init__(self, trainer):
        self.model, self.batch, self.step_seed = trainer.model, trainer.batch, SEED
        self.config = trainer.model.get_base_model().config
        self.mask = self.batch["completion_mask"][:, 1:]
        self.pairs = len(self.mask) // 2
        self.ratios = self.token_ratios(self.batch, self.batch["input_ids"])
        self.won, self.lost = (self.ratios * self.mask).sum(1).chunk(2)

    def token_ratios(self, inputs, ids):
        """[R, S - 1] log policy / reference of given tokens."""
        more = {k: v for k, v in inputs.items() if k != "completion_mask"}

        def logps():
            every = self.model(**more).logits[:, :-1].log_softmax(-1)
            return every.gather(2, ids[:, 1:, None])[..., 0]

        with torch.no_grad(), self.model.disable_adapter():
            reference = logps()
        return logps() - reference

    def chosen(self):
        """The chosen rows and their pictures: half of every tensor."""
        return {k: v[: len(v) // 2] for k, v in self.batch.items()}

    def chosen_under(self, change, name):
        """[B] log ratio of the chosen answers under changed pictures."""
        stream = random_stream(self, name)
        other = change_pictures(self.chosen(), self.config, lambda p: change(p, stream))
        ratios = self.token_ratios(other, other["input_ids"])
        return (ratios * self.mask[: self.pairs]).sum(1)


def expected(loss, plain):
    """The term, written out once more."""
    won = plain.won
    match loss:
        case MDPO():
            under = plain.chosen_under(lambda p, stream: crop(p, stream, 0.01, 0.2), "MDPO")
            pictures = -logsigmoid(BETA * (won - under)).mean()
            return 2.0 * pictures - logsigmoid(BETA * won).mean()
        case MaskedImage():
            under = plain.chosen_under(lambda p, stream: cover(p, stream, 0.3, 7), "MaskedImage")
            return -logsigmoid(BETA * (won - under)).mean()
        case Anchor():
            return -logsigmoid(BETA * won - 0.1).mean()
        case RLHFV():
            weights = token_weights(plain.batch["input_ids"], plain.mask, 3.0, shortest=1)
            assert weights.unique().tolist() == [0, 1, 3]
            better, worse = (plain.ratios * weights).sum(1).chunk(2)
            return -logsigmoid(BETA * (better - worse)).mean()
        case POVID():
            stream = random_stream(plain, "POVID")
            noisy = change_pictures(plain.chosen(), plain.config, lambda p: noised(p, stream, 500))
            noisy.pop("completion_mask")
            with torch.no_grad():
                likeliest = plain.model(**noisy).logits.argmax(-1).roll(1, 1)
            ratios = plain.token_ratios(plain.chosen(), likeliest)
            under = (ratios * plain.mask[: plain.pairs]).sum(1)
            return -logsigmoid(BETA * (won - under)).mean()


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("loss", LOSSES[:5], ids=lambda loss: type(loss).__name__)
def test_the_step_equals_plain_passes(step, loss):
    step.extra_losses = (loss,)
    theirs = step._compute_loss(step.model, step.batch, False)
    theirs.backward()
    got = gradients(step.model)

    plain = Plain(step)
    main = -logsigmoid(BETA * (plain.won - plain.lost)).mean()
    wanted = loss.weight * expected(loss, plain)
    if not loss.replaces_main:
        assert wanted.item() > 0.01
        wanted = wanted + main
    wanted.backward()
    assert theirs.item() == pytest.approx(wanted.item(), rel=1e-5)
    by_hand = gradients(step.model)
    assert got.keys() == by_hand.keys()
    assert all("lora" in name for name in got)
    scale = max(gradient.abs().max().item() for gradient in by_hand.values())
    assert scale > 1e-3
    for name, gradient in by_hand.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-4 * scale)


def test_the_auxiliary_step_equals_plain_cross_entropy(step):
    step.extra_losses = ()
    main = step._compute_loss(step.model, step.batch, False).item()
    step.extra_losses = (AuxiliarySFT(weight=0.25),)
    total = step._compute_loss(step.model, step.batch, False)
    other = dict(step.auxiliary(SEED))
    labels = other.pop("labels")
    with torch.no_grad():
        logits = step.model(**other).logits
    nll = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert total.item() == pytest.approx(main + 0.25 * nll.item(), rel=1e-5)
    total.backward()
    assert gradients(step.model)


def test_fast_paths_show_changed_pictures_too(step, tmp_path):
    """Features of the clean pictures must not be used for the others."""
    family = step.model.get_base_model().config.model_type
    rows = Dataset.from_list([{"images": []}])
    losses = (MDPO(), POVID(), RLHFV(shortest=1))
    fast, _ = build(tmp_path, family, losses, rows, fast=("features_once", "shared_prefix"))
    fast.model.load_state_dict(step.model.state_dict())
    fast._seed_of_pass = lambda: SEED
    step.extra_losses = losses
    with torch.no_grad():
        plain, quick = (t._compute_loss(t.model, step.batch, False) for t in (step, fast))
    assert quick.item() == pytest.approx(plain.item(), rel=1e-5)


def test_the_reference_cache_serves_losses_of_whole_answers_only(step):
    plain = Plain(step)
    with torch.no_grad(), step.model.disable_adapter():
        more = {k: v for k, v in step.batch.items() if k != "completion_mask"}
        logps = step.model(**more).logits[:, :-1].log_softmax(-1)
        logps = logps.gather(2, step.batch["input_ids"][:, 1:, None])[..., 0]
        chosen, rejected = (logps * plain.mask).sum(1).chunk(2)
    cached = {**step.batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    step.extra_losses = (MDPO(), Anchor())
    with torch.no_grad():
        wanted = step._compute_loss(step.model, step.batch, False).item()
        step.precompute_ref_logps = True
        try:
            assert step._compute_loss(step.model, cached, False).item() == pytest.approx(wanted)
            step.extra_losses = (RLHFV(),)
            with pytest.raises(InputError, match="sums from a cache"):
                step._compute_loss(step.model, cached, False)
        finally:
            step.precompute_ref_logps = False


# ---- trained ----


def train(folder, pairs, losses, *, resume=None, steps, **values):
    trainer, _ = build(folder, "llava", losses, read_rows([str(pairs)]), max_steps=steps, **values)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, {e["step"]: e for e in trainer.state.log_history if "loss" in e}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), count=8, texts_only=(3,))


def test_every_loss_is_trained_here():
    assert {type(loss).__name__ for loss in LOSSES} == set(EXTRA_LOSSES)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_training_starts_at_ln_2_and_moves_the_adapters(tmp_path, pairs, loss):
    """Policy and reference are equal at first, so every comparison is undecided."""
    trainer, log = train(tmp_path, pairs, (loss,), steps=2)
    name = type(loss).__name__
    first = {
        "MDPO": 3 * math.log(2),
        "Anchor": math.log(1 + math.exp(0.1)),
        "AuxiliarySFT": log[1].get("loss/AuxiliarySFT"),
    }.get(name, math.log(2))
    assert log[1][f"loss/{name}"] == pytest.approx(first, rel=1e-3)
    main = 0.0 if loss.replaces_main else math.log(2)
    assert log[1]["loss"] == pytest.approx(main + loss.weight * first, rel=1e-3)
    assert all(math.isfinite(log[n]["loss"]) for n in (1, 2))
    assert log[2][f"loss/{name}"] != log[1][f"loss/{name}"]
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n and p.any()]
    assert len(moved) > 10


def test_acceptance_12_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path, pairs):
    losses = (MDPO(), POVID(), AuxiliarySFT())
    values = {
        "steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    _, whole = train(tmp_path / "whole", pairs, losses, **values)
    checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    _, resumed = train(tmp_path / "resumed", pairs, losses, resume=checkpoint, **values)
    for key in ("loss", "mdpo/conditional", "loss/POVID", "loss/AuxiliarySFT"):
        assert resumed[2][key] == pytest.approx(whole[2][key], abs=1e-6), key
    assert whole[2]["loss/AuxiliarySFT"] != whole[1]["loss/AuxiliarySFT"]


# TRL and PEFT still call the library by names that it is about to drop.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_activation_checkpointing_changes_nothing(tmp_path, pairs):
    losses = (MDPO(), POVID(), AuxiliarySFT())
    _, plain = train(tmp_path / "plain", pairs, losses, steps=2)
    _, saved = train(
        tmp_path / "saved",
        pairs,
        losses,
        steps=2,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    assert saved[2]["loss"] == pytest.approx(plain[2]["loss"], abs=1e-5)


# ---- auxiliary batches ----


def test_auxiliary_batches_are_drawn_by_the_seed():
    batches = AuxiliaryBatches(range(100), lambda rows: {"rows": rows}, 3)
    one, other = batches(1)["rows"], batches(2)["rows"]
    assert one == batches(1)["rows"] != other
    assert len(set(one)) == 3
    seen = {row for seed in range(200) for row in batches(seed)["rows"]}
    assert len(seen) > 90
    assert sorted(AuxiliaryBatches(range(2), list, 5)(0)) == [0, 1]


@pytest.mark.parametrize(("examples", "size"), [([], 1), ([1], 0)])
def test_auxiliary_batches_need_rows(examples, size):
    with pytest.raises(ValueError, match=f"got {len(examples)} examples and size {size}"):
        AuxiliaryBatches(examples, list, size)


def test_a_loss_of_other_data_needs_the_data(tmp_path):
    model, processor = tiny.build("llava")
    with pytest.raises(ValueError, match="AuxiliarySFT needs other data"):
        VLPreferenceTrainer(
            model,
            args=arguments(tmp_path),
            train_dataset=Dataset.from_list([{"images": []}]),
            processing_class=processor,
            extra_losses=(AuxiliarySFT(),),
        )
