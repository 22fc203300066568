"""Features once and shared prefix give the loss and the gradients of the plain rows."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import preference_batches
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from mmlm import Method, build_in
from mmlm.engine.method import Paper
from training.fast import install_features_once, install_shared_prefix
from training.fast.models import anatomy_of, vision_parameters

FAMILIES = tiny.FAMILIES
PATHS = (("features",), ("shared",), ("features", "shared"))


@pytest.fixture
def trainer_of(tmp_path):
    """Builds TRL's own trainer around a model."""

    def make(model, processor, *, adapters=False, checkpointing=False, **more):
        lora = None
        if adapters:
            layers = r".*(language_model|text_model)\.layers\..*\.(q_proj|v_proj|down_proj)"
            lora = LoraConfig(r=4, lora_alpha=8, target_modules=layers)
        else:
            more.setdefault("ref_model", copy.deepcopy(model))
        settings = DPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=None,
            activation_checkpointing=checkpointing,
        )
        rows = [{"images": [tiny.picture()], "prompt": "<image>", "chosen": "a", "rejected": "b"}]
        trainer = DPOTrainer(
            model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
            peft_config=lora,
            **more,
        )
        generator = torch.Generator().manual_seed(1)
        for name, p in trainer.model.named_parameters():
            # Policy and reference must differ, or every gradient but the last layer's is tiny.
            if "lora_B" in name or (not adapters and name.endswith("o_proj.weight")):
                p.data += torch.randn(p.shape, generator=generator) * 0.02
        return trainer

    return make


def freeze_vision(model):
    for p in vision_parameters(anatomy_of(model)).values():
        p.requires_grad_(False)


def step(trainer, inputs):
    """Loss and gradients of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def install(trainer, paths):
    handles = []
    for name in paths:
        function = {"features": install_features_once, "shared": install_shared_prefix}[name]
        handles.append(function(trainer.model, trainer.ref_model))
    return handles


def count_towers(trainer):
    """Pictures that enter each pass of the vision towers from now on."""
    seen = []
    models = [trainer.model] + ([trainer.ref_model] if trainer.ref_model is not None else [])
    for model in models:
        model_tower = anatomy_of(model).tower
        model_tower.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len((*args, *kwargs.values())[0])),
            with_kwargs=True,
        )
    return seen


def compare(trainer, inputs, paths=PATHS):
    """Every choice of paths against the plain rows."""
    loss, grads = step(trainer, inputs)
    assert abs(float(loss) - math.log(2)) > 1e-5
    assert all(bool(g.any()) for n, g in grads.items() if "lora_" in n), "nothing is learned"
    for chosen in paths:
        handles = install(trainer, chosen)
        for handle in handles:
            handle.expect(inputs)
        found, other = step(trainer, inputs)
        for handle in handles:
            handle.remove()
        if "shared" in chosen:
            assert handles[-1].passes == 2
        assert abs(float(found - loss)) <= 1e-5, chosen
        assert other.keys() == grads.keys()
        worst = max(float((other[n] - grads[n]).abs().max()) for n in grads)
        assert worst <= 1e-5, (chosen, worst)
    again, _ = step(trainer, inputs)
    assert torch.equal(again, loss)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_7_equal_to_plain_rows(family, adapters, checkpointing, trainer_of):
    model, processor = tiny.build(family)
    freeze_vision(model)
    trainer = trainer_of(model, processor, adapters=adapters, checkpointing=checkpointing)
    compare(trainer, preference_batches.batch(processor))


@dataclass(frozen=True, kw_only=True)
class Blind(Method):
    """The decoder sees nothing at visual positions."""

    paper: ClassVar[Paper] = Paper(title="for a test", arxiv="0000.00000", year=2026, venue="here")

    def neutral(self):
        return self

    def begin(self, prompt):
        return prompt.layout.visual

    def layer_in(self, state, layer, x):
        return x.masked_fill(state[..., None], 0) if layer == 0 else None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_9_methods_built_into_the_model_are_trained(family, checkpointing, trainer_of):
    losses = {}
    for built in (False, True):
        model, processor = tiny.build(family)
        freeze_vision(model)
        if built:
            build_in(model, Blind())
        trainer = trainer_of(model, processor, adapters=True, checkpointing=checkpointing)
        inputs = preference_batches.batch(processor)
        losses[built], _ = step(trainer, inputs)
        compare(trainer, inputs)
    assert abs(float(losses[True] - losses[False])) > 1e-4


class Keeping(Blind):
    """Removes half of the visual tokens."""

    def tokens(self, state, layer, x):
        return None


class Choosing(Blind):
    """Chooses image features."""

    def visual_tokens(self, state, features):
        return None


class Opening(Blind):
    """Lets image positions see the text behind them."""

    def mask(self, state, layout):
        return None


@pytest.mark.parametrize("path", [install_features_once, install_shared_prefix])
@pytest.mark.parametrize("method", [Keeping, Choosing])
def test_acceptance_9_models_that_change_the_length_are_refused(method, path):
    model, _ = tiny.build("llava")
    freeze_vision(model)
    build_in(model, method())
    with pytest.raises(ValueError, match="disable visual token pruning for preference training"):
        path(model)
