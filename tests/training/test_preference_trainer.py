"""VLPreferenceTrainer: the start and first step of a training, what learns, what is refused."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from peft import LoraConfig
from trl import DPOConfig

from mmlm.engine.anatomy import Anatomy
from tests.training.preference_toy import write_pairs
from training.lora import llm_linear_regex, lora_config, refuse_targets_outside
from training.model import choose_what_learns, count_parameters, whole_modules
from training.preference.rows import read_rows
from training.preference.trainer import VLPreferenceTrainer
from training.settings import LoraSettings, ModelSettings

ADAPTERS = LoraSettings(r=4, alpha=8)


def arguments(folder, **values):
    given = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "max_length": None,
        "report_to": [],
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return DPOConfig(str(folder), **{**given, **values})


@pytest.fixture
def rows(tmp_path):
    return read_rows([str(write_pairs(tmp_path, count=4))])


def trainer(folder, rows, family="llava", *, lora=True, options=None, **more):
    model, processor = tiny.build(family)
    config = lora_config(model, ADAPTERS) if lora is True else lora
    more.setdefault("ref_model", None if config else tiny.build(family)[0])
    return VLPreferenceTrainer(
        model,
        args=arguments(folder, **(options or {})),
        train_dataset=rows,
        processing_class=processor,
        peft_config=config or None,
        **more,
    )


@pytest.mark.parametrize("lora", [True, None])
def test_acceptance_4_the_start_and_the_first_step(tmp_path, rows, lora):
    made = trainer(tmp_path, rows, lora=lora)
    made.train()
    start, second = (entry for entry in made.state.log_history if "loss" in entry)
    assert start["loss"] == pytest.approx(0.69314718, abs=1e-6)
    assert start["rewards/chosen"] == start["rewards/rejected"] == 0.0
    assert start["rewards/accuracies"] == start["rewards/margins"] == 0.0
    assert second["rewards/margins"] > 0.01
    assert second["loss"] < start["loss"]


@pytest.mark.parametrize("family", tiny.ALL)
def test_acceptance_11_nothing_learns_outside_the_language_model(tmp_path, rows, family):
    made = trainer(tmp_path, rows, family)
    text = {id(p) for p in Anatomy(made.model).text.parameters()}
    learning = [(n, p) for n, p in made.model.named_parameters() if p.requires_grad]
    assert learning
    assert all("lora_" in name and id(p) in text for name, p in learning)
    head = Anatomy(made.model).head
    assert not any(p.requires_grad for p in head.parameters())
    # Two matrices for each of seven linear layers in each decoder layer.
    assert len(learning) == 2 * 7 * len(Anatomy(made.model).layers)
    counted, whole = count_parameters(made.model)
    assert counted == sum(p.numel() for _, p in learning)
    assert whole == sum(p.numel() for p in made.model.parameters())


def test_acceptance_11_one_step_leaves_every_other_weight_alone(tmp_path, rows):
    made = trainer(tmp_path, rows)
    before = {n: p.clone() for n, p in made.model.named_parameters()}
    made.train()
    changed = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize(
    ("learns", "lora", "outside"),
    [
        (("language",), None, ("tower", "projector")),
        (("projector",), None, ("tower", "text", "head")),
        (("language", "projector"), None, ("tower",)),
        (("tower", "projector", "language"), None, ()),
        (("projector", "language"), ADAPTERS, ("tower", "text", "head")),
    ],
)
def test_what_learns(learns, lora, outside):
    model, _ = tiny.build("llava")
    settings = ModelSettings(learns=learns, lora=lora)
    choose_what_learns(model, settings)
    anatomy = Anatomy(model)
    for part in ("tower", "projector", "text", "head"):
        flags = {p.requires_grad for p in getattr(anatomy, part).parameters()}
        assert flags == {part not in outside}, part
    if lora is not None:
        assert whole_modules(model, settings) == ("model.multi_modal_projector",)


def test_targets_by_name_stay_inside_the_language_model():
    model, _ = tiny.build("llava")
    pattern = llm_linear_regex(model, ("q_proj", "v_proj"))
    found = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    assert len(found) == 2 * len(Anatomy(model).layers)
    assert all(".language_model." in name for name in found)
    assert any(name.endswith("vision_tower.encoder.layers.0.self_attn.q_proj")
               for name, _ in model.named_modules())  # fmt: skip
    with pytest.raises(ValueError, match=r"query_key_value: no linear layer.*down_proj"):
        llm_linear_regex(model, ("query_key_value",))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "v_proj"], "outside the language model: model.vision_tower"),
        ("all-linear", "vision tower too"),
        (["lm_head"], "the head .lm_head."),
        (["linear_1"], "multi_modal_projector.linear_1"),
    ],
)
def test_adapters_outside_the_language_model_are_refused(tmp_path, rows, targets, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, rows, lora=LoraConfig(target_modules=targets))


def test_adapters_inside_are_taken():
    model, _ = tiny.build("llava")
    refuse_targets_outside(model, LoraConfig(target_modules=llm_linear_regex(model)))
    refuse_targets_outside(model, LoraConfig(target_modules=["gate_proj"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_free": True}, "padding_free=True does nothing"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True would not reach the loss"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True is TRL's cache"),
        ({"beta": 0.0}, "beta must be a finite number > 0"),
        ({"beta": -0.1}, "beta must be a finite number > 0"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2 loss types"),
        ({"loss_type": ["sigmod"]}, "sigmod"),
    ],
)
def test_switches_that_would_do_nothing_or_harm_are_refused(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path, rows, options=options)


def test_an_unknown_fast_path_is_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="'flash' is unknown; there are features_once"):
        trainer(tmp_path, rows, fast=("flash",))


def test_rows_without_any_picture_are_remarked(tmp_path, rows):
    prompt = ({"role": "user", "content": [{"type": "text", "text": "a"}]},)
    bare = [replace(row, images=(), prompt=prompt) for row in rows]
    with pytest.warns(UserWarning, match="no row has a picture"):
        trainer(tmp_path, bare).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(tmp_path, [rows[0], bare[1]])


def test_our_columns_survive_in_a_table(tmp_path, rows):
    """Without them TRL drops the context, and C-DPO silently becomes DPO."""
    made = trainer(tmp_path, rows)
    made._set_signature_columns_if_needed()
    assert {"context", "id", "chosen_ends", "rejected_ends"} <= set(made._signature_columns)


def test_seeds_of_passes_differ_and_repeat(tmp_path, rows):
    made = trainer(tmp_path, rows)
    made.model.train()
    first = [made._seed_of_pass() for _ in range(3)]
    made.model.eval()
    evaluation = made._seed_of_pass()
    made.state.global_step = 1
    made.model.train()
    second = [made._seed_of_pass() for _ in range(3)]
    assert len({*first, *second, evaluation}) == 7
    again = trainer(tmp_path, rows)
    again.state.global_step = 1
    again.model.train()
    assert [again._seed_of_pass() for _ in range(3)] == second
