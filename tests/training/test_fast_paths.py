"""Features once and shared prefix give the loss and the gradients of the plain rows."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import preference_batches
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from preference_toy import write_pairs
from trl import DPOConfig, DPOTrainer

from mmlm import Method, build_in
from mmlm.engine.method import Paper
from training.errors import FastPathRefused
from training.fast import install_features_once, install_length_guard, install_shared_prefix
from training.fast.flex import block_mask, rule
from training.fast.models import anatomy_of, vision_parameters
from training.fast.pairs import CHOSEN, PREFIX, REJECTED, PackedPairs
from training.launch import leave
from training.preference.rows import read_rows
from training.preference.trainer import VLPreferenceTrainer

# TRL asks transformers by the names before v6.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

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
        if checkpointing:  # as train() does
            trainer.model.activation_checkpointing_enable(settings.activation_checkpointing_kwargs)
            assert trainer.model.is_activation_checkpointing
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


def step(trainer, inputs, handles=()):
    """Loss and gradients of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    for handle in handles:
        handle.expect(inputs)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    for handle in handles:  # what is recomputed for the gradients must not need the announcement
        handle.expect(None)
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
    """Pictures or tiles or patches that enter each pass of the vision towers from now on."""
    seen = []

    def hook(module, args, kwargs):
        seen.append(len((*args, *kwargs.values())[0]))

    for model in filter(None, (trainer.model, trainer.ref_model)):
        anatomy_of(model).tower.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def compare(trainer, inputs, paths=PATHS):
    """Every choice of paths against the plain rows."""
    loss, grads = step(trainer, inputs)
    assert abs(float(loss) - math.log(2)) > 1e-5
    assert all(bool(g.any()) for n, g in grads.items() if "lora_" in n), "nothing is learned"
    for chosen in paths:
        handles = install(trainer, chosen)
        found, other = step(trainer, inputs, handles)
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


def test_acceptance_9_a_model_that_gives_fewer_states_is_refused(trainer_of):
    model, processor = tiny.build("llava")
    guard = install_length_guard(model)
    inputs = preference_batches.batch(processor)
    trainer = trainer_of(model, processor, adapters=True)
    step(trainer, inputs)

    def shorten(module, args, output):
        output.last_hidden_state = output.last_hidden_state[:, 3:]
        return output

    model.model.language_model.register_forward_hook(shorten)
    with pytest.raises(ValueError, match="disable visual token pruning for preference training"):
        step(trainer, inputs)
    guard.remove()
    with pytest.raises(RuntimeError, match="size"):
        step(trainer, inputs)


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_7_the_tower_sees_each_picture_once(family, adapters, trainer_of):
    model, processor = tiny.build(family)
    freeze_vision(model)
    trainer = trainer_of(model, processor, adapters=adapters)
    inputs = preference_batches.batch(processor)
    seen = count_towers(trainer)
    step(trainer, inputs)
    plain = list(seen)
    assert len(plain) == 2
    once = plain[0] // 2
    for paths, passes in ((PATHS[0], 1), (PATHS[1], 2), (PATHS[2], 1)):
        handles = install(trainer, paths)
        step(trainer, inputs, handles)  # in which the shared prefix is checked once per model
        seen.clear()
        step(trainer, inputs, handles)
        assert seen == [once] * passes
        for handle in handles:
            handle.remove()


def test_with_a_reference_cache_the_tower_still_runs_once(trainer_of):
    model, processor = tiny.build("llava")
    freeze_vision(model)
    trainer = trainer_of(model, processor, adapters=True)
    inputs = preference_batches.batch(processor)
    cached = dict(
        zip(
            ("ref_chosen_logps", "ref_rejected_logps"),
            trainer.compute_ref_log_probs(trainer.model, inputs),
            strict=True,
        )
    )
    loss, _ = step(trainer, inputs)
    trainer.precompute_ref_logps = True
    handles = install(trainer, PATHS[2])
    seen = count_towers(trainer)
    found, _ = step(trainer, {**inputs, **cached}, handles)
    assert len(seen) == 1  # the check of the first pass finds the features, too
    seen.clear()
    step(trainer, {**inputs, **cached}, handles)
    assert len(seen) == 1
    assert abs(float(found - loss)) <= 1e-5


def test_a_reference_with_another_tower_has_its_own_features(trainer_of):
    model, processor = tiny.build("llava")
    freeze_vision(model)
    trainer = trainer_of(model, processor)
    for p in vision_parameters(anatomy_of(trainer.ref_model)).values():
        p.data *= 1.5
    compare(trainer, preference_batches.batch(processor))
    handles = install(trainer, PATHS[0])
    seen = count_towers(trainer)
    step(trainer, preference_batches.batch(processor), handles)
    assert len(seen) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_7_a_trained_tower_gets_its_gradients_through_a_shared_prefix(
    family, trainer_of
):
    model, processor = tiny.build(family)
    trainer = trainer_of(model, processor)
    compare(trainer, preference_batches.batch(processor), paths=PATHS[1:2])
    grads = [p.grad for p in vision_parameters(anatomy_of(trainer.model)).values()]
    assert sum(bool(g is not None and g.any()) for g in grads) > 5


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_trained_vision_is_refused(part):
    model, _ = tiny.build("llava")
    freeze_vision(model)
    install_features_once(model).remove()
    next(getattr(model.model, part).parameters()).requires_grad_(True)
    with pytest.raises(FastPathRefused, match=part) as caught:
        install_features_once(model)
    assert isinstance(caught.value, ValueError)
    assert caught.value.advice


def test_adapters_in_the_tower_are_refused_also_when_they_come_later(trainer_of):
    model, processor = tiny.build("llava")
    freeze_vision(model)
    handle = install_features_once(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*\.q_proj"))
    for p in adapted.parameters():  # frozen, but the reference would be without them
        p.requires_grad_(False)
    with pytest.raises(FastPathRefused, match="adapted"):
        adapted(**tiny.inputs(processor, ["a cat"], [[tiny.picture()]]))
    handle.remove()


def test_features_follow_the_pictures():
    model, processor = tiny.build("llava")
    freeze_vision(model)
    inputs = tiny.inputs(processor, ["a cat", "a dog"], [[tiny.picture(0)], [tiny.picture(1)]])
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    expected = [model(**x).logits for x in (inputs, other, inputs)]
    answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    handle = install_features_once(model)
    assert all(
        torch.equal(model(**x).logits, y)
        for x, y in zip((inputs, other, inputs), expected, strict=True)
    )
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), answer)
    with torch.inference_mode():
        model(**other)
    model(**other).logits.sum().backward()
    model(**inputs)
    inputs["pixel_values"].mul_(0.5)  # the very tensor whose features are kept
    found = model(**inputs).logits
    handle.remove()
    assert torch.equal(found, model(**inputs).logits)
    assert not torch.equal(found, expected[0])


def test_a_copy_encodes_with_its_own_tower():
    model, processor = tiny.build("llava")
    freeze_vision(model)
    handle = install_features_once(model)
    twin = copy.deepcopy(model)
    for p in twin.model.vision_tower.parameters():
        p.data *= 2
    inputs = tiny.inputs(processor, ["a cat"], [[tiny.picture()]])
    found = twin(**inputs).logits
    handle.remove()
    assert not torch.equal(found, model(**inputs).logits)
    vars(twin.model).pop("get_image_features")
    assert torch.equal(found, twin(**inputs).logits)


@dataclass(frozen=True, kw_only=True)
class Mixing(Blind):
    """Every position gets something of what stands behind it."""

    def layer_in(self, state, layer, x):
        return x + 0.1 * x.mean(1, keepdim=True) if layer == 0 else None


def test_the_first_packed_pass_is_compared_with_a_plain_one(trainer_of):
    model, processor = tiny.build("llava")
    build_in(model, Mixing())
    trainer = trainer_of(model, processor, adapters=True)
    handles = install(trainer, PATHS[1])
    with pytest.raises(FastPathRefused, match="other states in packed rows"):
        step(trainer, preference_batches.batch(processor), handles)


def test_only_the_announced_rows_run_packed(trainer_of):
    model, processor = tiny.build("llava")
    trainer = trainer_of(model, processor, adapters=True)
    inputs = preference_batches.batch(processor)
    (handle,) = install(trainer, PATHS[1])
    model_inputs = {k: v for k, v in inputs.items() if k != "completion_mask"}
    plain = trainer.model(**model_inputs, use_cache=False).logits
    assert handle.passes == 0
    handle.expect(inputs)
    packed = trainer.model(**model_inputs, use_cache=False).logits
    assert handle.passes == 1
    real = inputs["attention_mask"].bool()
    assert torch.allclose(packed[real], plain[real], atol=1e-4)
    # Another view of the pictures for one side, as losses with an extra pass have it.
    pixels = inputs["pixel_values"].clone()
    pixels[len(pixels) // 2 :] *= 0.5
    trainer.model(**{**model_inputs, "pixel_values": pixels}, use_cache=False)
    assert handle.passes == 1
    handle.expect(None)
    trainer.model(**model_inputs, use_cache=False)
    assert handle.passes == 1


def test_batches_that_are_no_pairs_are_refused():
    model, processor = tiny.build("llava")
    handle = install_shared_prefix(model)
    inputs = preference_batches.batch(processor)
    flipped = {
        **inputs,
        **{n: inputs[n].flip(1) for n in ("input_ids", "attention_mask", "completion_mask")},
    }
    with pytest.raises(FastPathRefused, match="padded on the left"):
        handle.expect(flipped)
    ids = inputs["input_ids"].clone()
    ids[0, 0] += 1
    with pytest.raises(FastPathRefused, match="no token in common"):
        handle.expect({**inputs, "input_ids": ids})
    pixels = inputs["pixel_values"].clone()
    pixels[0] += 1
    with pytest.raises(FastPathRefused, match="pixel_values"):
        handle.expect({**inputs, "pixel_values": pixels})
    ids = inputs["input_ids"].clone()
    ids[0, 1] += 1  # the rows part before the picture
    with pytest.raises(FastPathRefused, match="image token stands behind"):
        handle.expect({**inputs, "input_ids": ids})
    assert handle.batch is None


def test_models_that_cannot_be_packed_are_refused():
    model, processor = tiny.build("llava")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(FastPathRefused, match="flash_attention_2"):
        install_shared_prefix(model)
    model.model.language_model.config._attn_implementation = "sdpa"
    built, _ = tiny.build("llava")
    build_in(built, Opening())
    with pytest.raises(FastPathRefused, match="one answer act on the other"):
        install_shared_prefix(built)
    prompted, _ = tiny.build("llava")
    prompts = get_peft_model(
        prompted, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(FastPathRefused, match="tokens of its own"):
        install_shared_prefix(prompts)
    handle = install_shared_prefix(model)
    model.config.get_text_config().attention_dropout = 0.1
    inputs = preference_batches.batch(processor)
    handle.expect(inputs)
    inputs.pop("completion_mask")
    with pytest.raises(FastPathRefused, match=r"dropout 0\.1"):
        model.train()(**inputs, use_cache=False)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_acceptance_7_both_kernels(family, implementation, trainer_of):
    model, processor = tiny.build(family)
    model.set_attn_implementation(implementation)
    freeze_vision(model)
    trainer = trainer_of(model, processor, adapters=True)
    compare(trainer, preference_batches.batch(processor), paths=PATHS[1:])


def test_two_rows_as_one():
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    scored = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]])
    pairs = PackedPairs.of(ids, mask, scored)
    assert pairs.part.tolist() == [[PREFIX, PREFIX, CHOSEN, CHOSEN, CHOSEN, REJECTED]]
    assert pairs.pack(ids).tolist() == [[5, 6, 7, 8, 9, 1]]
    assert pairs.col.tolist() == [[0, 1, 2, 3, 4, 2]]
    assert pairs.seen()[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],  # the rejected token sees the prefix and itself
    ]
    assert pairs.seen(2)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 1, 0, 0, 0, 1],  # its neighbour in its own row is the prefix's last token
    ]
    states = torch.arange(6.0)[None, :, None]
    assert pairs.unpack(states)[..., 0].tolist() == [[0, 1, 2, 3, 4], [0, 1, 5, 0, 0]]


def test_the_prefix_ends_before_the_first_scored_token_of_either():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    scored = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    pairs = PackedPairs.of(ids, torch.ones_like(ids), scored)
    assert (pairs.part == PREFIX).sum() == 1


@pytest.mark.parametrize("window", [None, 3])
def test_the_rule_for_flex_attention_is_the_dense_mask(window):
    _, processor = tiny.build("llava")
    inputs = preference_batches.batch(processor)
    names = ("input_ids", "attention_mask", "completion_mask")
    pairs = PackedPairs.of(*(inputs[name] for name in names))
    rows, length = pairs.part.shape
    b, q, k = torch.meshgrid(*map(torch.arange, (rows, length, length)), indexing="ij")
    assert torch.equal(rule(pairs, window)(b, 0, q, k), pairs.seen(window))
    with pytest.raises(FastPathRefused, match="no backward pass on a CPU"):
        block_mask(pairs, window)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_acceptance_7_a_training_with_both_paths_is_the_plain_one(checkpointing, tmp_path):
    rows = read_rows([write_pairs(tmp_path)])
    losses = {}
    for fast in ((), ("features_once", "shared_prefix")):
        model, processor = tiny.build("llava")
        freeze_vision(model)
        settings = DPOConfig(
            str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            max_length=None,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            logging_strategy="steps",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
            activation_checkpointing=checkpointing,
        )
        trainer = VLPreferenceTrainer(
            model,
            args=settings,
            train_dataset=rows,
            processing_class=processor,
            peft_config=LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj"),
            fast=fast,
        )
        trainer.train()
        history = trainer.state.log_history
        losses[fast] = [line["rewards/margins"] for line in history if "loss" in line]
    plain, both = losses.values()
    assert len(plain) == 4
    assert max(map(abs, plain)) > 1e-3
    assert both == pytest.approx(plain, abs=1e-5)


def test_acceptance_7_inside_a_data_parallel_wrapper(trainer_of, tmp_path):
    model, processor = tiny.build("llava")
    freeze_vision(model)
    trainer = trainer_of(model, processor, adapters=True)
    inputs = preference_batches.batch(processor)
    loss, grads = step(trainer, inputs)
    trainer.model.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
        handles = [install_features_once(wrapped), install_shared_prefix(wrapped)]
        for handle in handles:
            handle.expect(inputs)
        found = trainer.compute_loss(wrapped, dict(inputs))
        found.backward()
    finally:
        leave()
    assert handles[1].passes == 2
    assert abs(float(found.detach() - loss)) <= 1e-5
    for name, p in trainer.model.named_parameters():
        if name in grads:
            assert torch.allclose(p.grad, grads[name], atol=1e-5, rtol=0)


def test_the_stored_speeds_meet_their_limits():
    path = Path(__file__).parents[2] / "docs/results/training_speed.json"
    stored = json.loads(path.read_text())
    assert stored["overhead"] <= 0.03
    assert stored["faster_than_trl"]["both"] >= 1.6
