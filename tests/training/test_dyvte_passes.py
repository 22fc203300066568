"""Judging exits: golden vectors, a naive reference, examples by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
from golden import golden

from mmlm import Anatomy, build_in
from mmlm.methods.dyvte import DyVTE
from mmlm.methods.routers import Router
from tests.engine.test_pruning import masked
from tests.methods.dyvte_cases import golden_model, read_golden
from training.exits.labels import ExitRule, Measured, exit_shares
from training.exits.passes import SharedPass, last_answers
from training.exits.trainer import drawn_layers, router_loss
from training.sft.documents import IGNORED


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- acceptance 2: golden vectors ----


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("dyvte/train_*.npz"))
def test_acceptance_2_golden_dyvte_training(path):
    data, config = read_golden(path)
    model, weights, prefix, visual = golden_model(data, config)
    real = data["attention_mask"].bool()
    index = torch.arange(real.shape[1]).expand_as(real)
    where = (index >= prefix) & (index < prefix + visual)
    layers = data["exit_layers"].tolist()
    # The golden model is frozen by nobody: what learns must not depend on it.
    shared = SharedPass(model, where, real, last_answers(data["labels"]), layers)
    inputs = {"inputs_embeds": data["inputs_embeds"], "attention_mask": real.long()}
    shared.run(model, {**inputs, "use_cache": False})
    for layer in layers:
        router = Router(config["hidden_size"], weights[f"{layer}.w1.weight"].shape[0])
        router.w1.weight.data = weights[f"{layer}.w1.weight"].clone()
        router.w2.weight.data = weights[f"{layer}.w2.weight"].clone()
        outcome = shared.outcome(layer)
        labels = ExitRule().label(outcome.agree, outcome.ce_with, outcome.ce_without)
        logits = router(shared.features(layer))
        loss = router_loss(logits, labels, torch.ones(2))
        loss.backward()
        close(logits.detach(), data[f"e{layer}_gate_logits"])
        close(outcome.ce_with, data[f"e{layer}_loss_with_visual"])
        close(outcome.ce_without, data[f"e{layer}_loss_without_visual"])
        assert labels.tolist() == data[f"e{layer}_gate_labels"].tolist()
        close(loss.detach(), data[f"e{layer}_gate_loss"])
        close(router.w2.weight.grad, data[f"e{layer}_grad_w2"])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- a naive reference: masks instead of removal, row after row ----


def answered(processor, family, counts=(1, 3), seed=0):
    """Prompts followed by answers, padded on the right as in a training."""
    prompts = ["describe the image in detail .", "is there a dog in the picture ?"]
    rows = []
    draw = torch.Generator().manual_seed(seed)
    for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        pictures = [[tiny.picture(10 * number + k) for k in range(count)]]
        one = tiny.inputs(processor, [prompt], pictures)
        answer = torch.randint(5, 250, (1, 3 + 2 * number), generator=draw)
        rows.append((one, answer))
    length = max(one["input_ids"].shape[1] + answer.shape[1] for one, answer in rows)
    batch, labels = {}, []
    for one, answer in rows:
        n = one["input_ids"].shape[1]
        rest = length - n - answer.shape[1]
        padded = {
            "input_ids": torch.cat([one["input_ids"], answer, torch.ones(1, rest).long()], 1),
            "attention_mask": torch.nn.functional.pad(
                torch.ones(1, n + answer.shape[1]).long(), (0, rest)
            ),
        }
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in one:
                padded[name] = torch.nn.functional.pad(one[name], (0, length - n))
        for name, value in {**one, **padded}.items():
            batch.setdefault(name, []).append(value)
        labels.append(torch.nn.functional.pad(answer, (n, rest), value=IGNORED))
    rows_of = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
    tensors = {
        name: torch.cat(values)
        for name, values in batch.items()
        if name in rows_of or values[0].ndim < 5
    }
    return tensors, torch.cat(labels)


FAMILIES = [f for f in tiny.FAMILIES if f in ("llava", "qwen3_vl", "gemma3", "internvl")]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_pass_of_the_text_equals_hiding_the_visual_keys(family):
    """Duplicated rows with masked keys, the authors' way, against our short passes."""
    model, processor = tiny.build(family)
    model.set_attn_implementation("eager" if family == "gemma3" else "sdpa")
    inputs, labels = answered(processor, family)
    anatomy = Anatomy(model)
    real = inputs["attention_mask"].bool()
    where = torch.isin(inputs["input_ids"], torch.tensor(anatomy.image_ids)) & real
    answers = last_answers(labels)
    layers = (0, 1, 3)
    shared = SharedPass(model, where, real, answers, layers)
    shared.run(model, {**inputs, "use_cache": False, "logits_to_keep": 1})

    def logits(model, inputs):
        return model(**inputs, use_cache=False).logits.float()

    plain = logits(model, inputs)
    for layer in layers:
        hidden = plain
        if layer < 3:
            hidden = masked(model, inputs, where, range(layer + 1, 4), logits)
        outcome = shared.outcome(layer)
        for row in range(2):
            columns = (answers.labels[row] != IGNORED).nonzero()[:, 0]
            target = answers.labels[row, columns]
            a, b = plain[row, columns - 1], hidden[row, columns - 1]
            cross_entropy = torch.nn.functional.cross_entropy
            close(outcome.ce_with[row], cross_entropy(a, target), 2e-5)
            close(outcome.ce_without[row], cross_entropy(b, target), 2e-5)
            close(outcome.agree[row], (a.argmax(-1) == b.argmax(-1)).float().mean())
        states = []
        handle = anatomy.layers[layer].register_forward_hook(
            lambda m, a, out, states=states: states.append(out)
        )
        model(**inputs, use_cache=False)
        handle.remove()
        features = shared.features(layer)
        for row in range(2):
            last_visual = int(where[row].nonzero().max())
            x = states[0][row, last_visual + 1 : int(answers.start[row])]
            close(features[row], torch.cat([x[:-1].mean(0), x[-1]]))
    if family == "llava":
        assert not torch.allclose(shared.outcome(0).ce_with, shared.outcome(0).ce_without)


# ---- by hand ----


def test_the_last_answer_by_hand():
    x = IGNORED
    labels = torch.tensor([[x, 5, 6, x, x, 7, 8, x], [x, x, x, 9, x, x, x, x]])
    answers = last_answers(labels)
    assert answers.start.tolist() == [5, 3]
    assert answers.labels.tolist() == [[x, x, x, x, x, 7, 8, x], [x, x, x, 9, x, x, x, x]]


def test_error_a_batch_without_any_label():
    labels = torch.tensor([[IGNORED, 5], [IGNORED, IGNORED]])
    with pytest.raises(ValueError, match=r"rows \[1\] of a batch of 2 have no label"):
        last_answers(labels)


def test_the_rule_by_hand():
    agree = torch.tensor([1.0, 1.0, 0.99, 1.0])
    ce_with = torch.tensor([1.0, 1.0, 1.0, 0.0])
    ce_without = torch.tensor([1.02, 1.03, 0.5, 0.0])
    # Exactly 1.03 times is too much, exactly 0.99 too little, and nothing is below 0.
    assert ExitRule().label(agree, ce_with, ce_without).tolist() == [1, 0, 0, 0]
    assert ExitRule(ratio=1.1).label(agree, ce_with, ce_without).tolist() == [1, 1, 0, 0]
    assert ExitRule(agree=0.9).label(agree, ce_with, ce_without).tolist() == [1, 0, 1, 0]


def test_other_rules_on_stored_values():
    labels = {
        ("a", 0): Measured(1.0, 1.0, 1.05),
        ("b", 0): Measured(0.5, 1.0, 1.0),
        ("a", 3): Measured(1.0, 1.0, 1.0),
    }
    assert exit_shares(labels, ExitRule()) == {0: (2, 0.0), 3: (1, 1.0)}
    assert exit_shares(labels, ExitRule(ratio=1.1)) == {0: (2, 0.5), 3: (1, 1.0)}
    assert exit_shares(labels, ExitRule(ratio=1.1, agree=0.4)) == {0: (2, 1.0), 3: (1, 1.0)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"agree": 1.0}, "agree = 1.0"),
        ({"agree": -0.1}, "agree = -0.1"),
        ({"ratio": 0.0}, "ratio = 0.0"),
        ({"ratio": float("inf")}, "ratio = inf"),
    ],
)
def test_error_rule(values, message):
    with pytest.raises(ValueError, match=message):
        ExitRule(**values)


def test_exits_are_drawn_evenly_and_alike_everywhere():
    drawn = [drawn_layers(tuple(range(8)), 4, 0, step) for step in range(400)]
    assert all(len(set(layers)) == 4 for layers in drawn)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=8)
    assert int(counts.min()) > 160  # 200 expected
    assert int(counts.max()) < 240
    assert drawn[7] == drawn_layers(tuple(range(8)), 4, 0, 7)
    assert len(set(drawn)) > 50
    assert drawn_layers((2, 5), 2, 0, 0) == (2, 5)


def test_class_weights_by_hand():
    """Two rows, right and wrong by the same margin; the weights divide by their sum."""
    logits, labels = torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([1, 0])
    right, wrong = torch.log1p(torch.exp(torch.tensor([-2.0, 2.0])))
    close(router_loss(logits, labels, torch.ones(2)), (right + wrong) / 2)
    close(router_loss(logits, labels, torch.tensor([3.0, 1.0])), (right + 3 * wrong) / 4)


@torch.no_grad()
def test_the_shared_pass_of_a_model_with_routers_removes_nothing():
    model, processor = tiny.build("llava")
    inputs, labels = answered(processor, "llava")
    real = inputs["attention_mask"].bool()
    where = torch.isin(inputs["input_ids"], torch.tensor(Anatomy(model).image_ids)) & real

    def outcome():
        shared = SharedPass(model, where, real, last_answers(labels), (1,))
        shared.run(model, {**inputs, "use_cache": False})
        return shared.outcome(1)

    plain = outcome()
    build_in(model, DyVTE(hidden=8, threshold=-1000.0))
    with model.mmlm_methods["DyVTE"].hold():
        held = outcome()
    close(held.ce_with, plain.ce_with, 0)
    close(held.ce_without, plain.ce_without, 0)
