"""Training with MMA: what collators hand over, packed rows, runs, preference pairs."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from test_preference_trainer import arguments
from test_sft_recipe import _config, _losses, _train, _weights, folder  # noqa: F401
from transformers.masking_utils import create_causal_mask

from mmlm import MMA, TokenLayout, attach, build_in
from mmlm.engine.build_in import built_in
from mmlm.engine.layout import ANSWER
from mmlm.engine.masks.turns import ROLES, Handed, of_template
from mmlm.errors import InputError
from mmlm.model.checkpoint import load
from tests.training import preference_toy
from tests.training.sft_rows import example, row, text
from training.__main__ import main
from training.errors import FastPathRefused
from training.lora import lora_config
from training.preference.collator import VisionPreferenceCollator
from training.preference.rows import PreferenceRow, read_rows
from training.preference.trainer import VLPreferenceTrainer
from training.settings import LoraSettings
from training.sft.collator import SFTCollator
from training.sft.documents import IGNORED
from training.sft.encoding import Encoder
from training.sft.packing import rope_index
from training.turns import refuse_several_answers

PAIRS = [
    (row(1, ("what is it ?", "a cat on a couch ."), name="a"), [tiny.picture(0, (100, 60))]),
    (row(0, ("is it a train ?", "yes ."), ("and a dog ?", "no ."), name="b"), []),
    (
        row(2, ("describe the image .", "the fox jumps ."), ("more ?", "two people ."), name="c"),
        [tiny.picture(1), tiny.picture(2, (40, 90))],
    ),
]  # fmt: skip


def _layout(model, batch):
    from mmlm import Anatomy

    anatomy = Anatomy(model)
    return TokenLayout.from_ids(
        batch["input_ids"],
        batch.get("attention_mask"),
        image_ids=anatomy.image_ids,
        wrapper_ids=anatomy.wrapper_ids,
        framing=anatomy.family.framing,
        right=True,
    )


# ---- what is handed over -------------------------------------------------------------------------


@pytest.mark.parametrize("turns", ["known", "needed"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3"])
def test_the_collator_and_the_chat_template_tell_the_same_turns(family, turns):
    model, processor = tiny.shared(family)
    encoder = Encoder(processor, "none", turns=turns)
    batch = SFTCollator(encoder)([example(pair) for pair in PAIRS])
    plain = _layout(model, batch)
    told = Handed(batch[ROLES]).told(plain)
    read = of_template(
        plain, batch["input_ids"], processor, needed=turns == "needed", strange=pytest.fail
    )
    assert torch.equal(told.seg == ANSWER, batch["labels"] != IGNORED)
    assert torch.equal(told.seg, read.seg)
    assert int(told.turn.max()) > 0
    method = MMA(prompt_end="marker" if turns == "needed" else "header")
    assert torch.equal(method.opened_keys(told), method.opened_keys(read))
    assert bool(told.behind.any()) is (turns == "needed")
    assert torch.equal(told.behind & told.real, read.behind & told.real) or turns == "known"
    learned = Handed(batch[ROLES]).supervised(plain)
    assert torch.equal(learned, batch["labels"] != IGNORED)


def test_models_without_such_methods_get_no_roles():
    _, processor = tiny.shared("llava")
    assert ROLES not in SFTCollator(Encoder(processor, "none"))([example(PAIRS[0])])


def test_answers_do_not_leak_through_the_image():
    """Other answers: states of images and prompts stay, bit for bit, in all layers."""
    model, processor = tiny.build("llava")
    build_in(model, MMA(), processor=processor)
    batch = SFTCollator(Encoder(processor, "eos", turns="known"))([example(p) for p in PAIRS])
    learned = batch["labels"] != IGNORED
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][learned] = batch["input_ids"][learned].flip(0)
    first_turn = learned.cumsum(-1) == 0  # what no answer stands before

    def states(given):
        with torch.no_grad():
            return torch.stack(model(**given, output_hidden_states=True).hidden_states)

    one, two = states(batch), states(other)
    where = first_turn & batch["attention_mask"].bool()
    assert torch.equal(one[:, where], two[:, where])
    assert not torch.allclose(one[:, learned], two[:, learned], atol=1e-3)


# ---- packed rows ---------------------------------------------------------------------------------


def _gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_acceptance_9_packed_documents_equal_separate_rows(family):
    model, processor = tiny.build(family)
    build_in(model, MMA(), processor=processor)
    model.train()
    encoder = Encoder(processor, "eos", turns="known")
    alone = SFTCollator(encoder)
    batches = [alone([example(pair)]) for pair in PAIRS]
    counts = [int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches]
    outputs = [model(**batch) for batch in batches]
    loss = sum(o.loss * n / sum(counts) for o, n in zip(outputs, counts, strict=True))
    loss.backward()
    expected = _gradients(model)
    packed = SFTCollator(encoder, packed=True, rope=rope_index(model), pad_to_multiple_of=8)(
        [example(*PAIRS)]
    )
    together = model(**packed)
    torch.testing.assert_close(together.loss, loss, atol=1e-5, rtol=1e-5)
    logits = torch.cat([o.logits[0] for o in outputs])
    torch.testing.assert_close(together.logits[0, : len(logits)], logits, atol=1e-5, rtol=1e-5)
    together.loss.backward()
    found = _gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    build_free = copy.deepcopy(model)
    from mmlm.engine.build_in import take_out

    take_out(build_free)
    packed.pop(ROLES)
    assert (build_free(**packed).loss - loss).abs() > 1e-3  # so that MMA is known to have acted


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2"])
def test_acceptance_9_packed_documents_under_other_kernels(kernel, monkeypatch):
    from transformers.integrations import flex_attention as flex

    monkeypatch.setattr(
        flex,
        "compile_friendly_flex_attention",
        lambda q, k, v, training=False, **more: flex.flex_attention(q, k, v, **more),
    )
    model, processor = tiny.build("llava")
    build_in(model, MMA(), processor=processor)
    batch = SFTCollator(Encoder(processor, "eos", turns="known"), packed=True)([example(*PAIRS)])
    with torch.no_grad():
        expected = model(**batch).logits
        model.get_decoder().config._attn_implementation_internal = kernel
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_acceptance_9_the_librarys_or_function_would_open_other_cells():
    """Eleven tokens in two documents: a closure over row indices is asked about positions."""
    model, _ = tiny.shared("llava")
    image, t = model.config.image_token_id, 40
    ids = torch.tensor([[t, image, image, t, t, image, t, image, image, t, t]])
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])
    seen = ids[0] == image
    documents = torch.tensor([0] * 5 + [1] * 6)
    same = documents[:, None] == documents[None]
    index = torch.arange(11)
    right = same & ((index[:, None] >= index) | (seen[:, None] & ~seen[None]))
    naive = create_causal_mask(
        config=model.config.text_config,
        inputs_embeds=torch.zeros(1, 11, 64),
        attention_mask=None,
        past_key_values=None,
        position_ids=places,
        or_mask_function=lambda b, h, q, k: seen[q] & ~seen[k] & (k > q),
    )
    assert int((naive[0, 0] != right).sum()) >= 5
    masks = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True
        )
    )
    roles = TokenLayout.from_ids(ids, None, image_ids=(image,))
    embeds = torch.zeros(1, 11, model.config.text_config.hidden_size)
    with torch.no_grad(), attach(model, MMA(), layout=_with_documents(roles, documents)):
        model(inputs_embeds=embeds, position_ids=places, use_cache=False)
    handle.remove()
    assert torch.equal(masks[0][0, 0], right)


def _with_documents(roles, documents):
    from dataclasses import replace

    return replace(roles, doc=documents[None].to(roles.doc.dtype))


def test_documents_are_told_by_positions_that_start_again():
    """Without a layout, from ids: position ids alone keep pictures from other documents."""
    model, processor = tiny.shared("llava")
    one, two = (
        tiny.inputs(processor, [text], [[tiny.picture(n)]])
        for n, text in enumerate(["what is it ?", "is there a dog ?"])
    )
    n, m = one["input_ids"].shape[1], two["input_ids"].shape[1]
    packed = {
        "input_ids": torch.cat([one["input_ids"], two["input_ids"]], 1),
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
        "position_ids": torch.cat([torch.arange(n), torch.arange(m)])[None],
        "use_cache": False,
    }
    with torch.no_grad(), attach(model, MMA(scope="all_prompts")):
        together = model(**packed).logits
        apart = [model(**x).logits for x in (one, two)]
    torch.testing.assert_close(together, torch.cat(apart, 1), atol=1e-5, rtol=0)


# ---- runs ----------------------------------------------------------------------------------------

MMA_TEXT = "MMA()"


def test_a_run_with_mma_is_stored_with_it_and_goes_on_from_a_checkpoint(folder, tmp_path):  # noqa: F811
    options = {"data__packing": True, "data__max_length": 96, "optimisation__epochs": 2.0}
    causal = _train(folder, tmp_path / "causal", **options)
    output = _train(folder, tmp_path / "mma", model__methods=[MMA_TEXT], **options)
    assert _losses(output) != _losses(causal)
    model, _ = load(str(output / "model"))
    assert built_in(model) == (MMA(),)
    # Half of it, then the rest from its checkpoint.
    half = {**options, "model__methods": [MMA_TEXT], "saving__every": 1}
    whole = _train(folder, tmp_path / "whole", **half)
    again = tmp_path / "again"
    _train(folder, again, **half)
    (again / "finished.json").unlink()
    last = sorted(again.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for checkpoint in last[1:]:
        for path in sorted(checkpoint.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        checkpoint.rmdir()
    _train(folder, again, **half)
    assert _losses(again) == pytest.approx(_losses(whole), abs=1e-6)
    before, after = _weights(whole / "model"), _weights(again / "model")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-5)


def test_roles_reach_a_model_with_adapters(folder, tmp_path, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(
        MMA, "check_supervised", lambda self, layout, learned: seen.append((layout, learned))
    )
    _train(
        folder,
        tmp_path / "out",
        model__methods=[MMA_TEXT],
        model__lora={"r": 2, "alpha": 4},
        data__packing=True,
        data__max_length=96,
        export=[],
    )
    assert seen
    for layout, learned in seen:
        assert bool((learned <= (layout.seg == ANSWER)).all())
        assert bool(learned.any())


def test_several_answers_under_all_prompts_are_refused_before_the_first_step(folder, tmp_path):  # noqa: F811
    model, processor = tiny.build("llava")
    build_in(model, MMA(scope="all_prompts"), processor=processor)
    rows = [pair[0] for pair in PAIRS]
    refuse_several_answers(model, rows[:1])
    with pytest.raises(ValueError, match=r"row 'b' has 2 answers to learn from"):
        refuse_several_answers(model, rows)


def test_paligemma_is_refused_with_the_reason():
    _, processor = tiny.build("paligemma")
    with pytest.raises(InputError, match="reads its whole prompt both ways"):
        Encoder(processor, turns="known")


# ---- preference pairs ----------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    return read_rows([str(preference_toy.write_pairs(tmp_path, count=4))])


def _trainer(tmp_path, pairs, *, policy=True, reference=None, lora=True, fast=()):
    models = []
    for methods in (policy, reference):
        if methods is None:
            models.append(None)
            continue
        model, processor = tiny.build("llava")
        if methods:
            build_in(model, MMA(), processor=processor)
        models.append(model)
    return VLPreferenceTrainer(
        models[0],
        models[1],
        arguments(tmp_path / "out"),
        train_dataset=pairs,
        processing_class=processor if reference is not None else tiny.build("llava")[1],
        peft_config=lora_config(models[0], LoraSettings(r=4, alpha=8)) if lora else None,
        fast=fast,
    )


def _run(made):
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_a_context_and_answers_are_closed_to_the_image():
    model, processor = tiny.shared("llava")
    picture = tiny.picture(1)
    one = PreferenceRow(
        id="r",
        images=(picture,),
        prompt=({"role": "user", "content": [{"type": "image"}, text("what ?")]},),
        chosen="a dog .",
        rejected="a train .",
        context="a cat .",
    )
    for turns in ("known", "needed"):
        batch = VisionPreferenceCollator(processor, turns=turns)([one])
        told = Handed(batch[ROLES]).told(_layout(model, batch))
        scored = batch["completion_mask"].bool()
        said = told.seg == ANSWER
        assert bool((said & ~scored).any())  # the context
        assert bool((scored <= said).all())
        ids = batch["input_ids"][0]
        words = processor.tokenizer.decode(ids[said[0]])
        assert words.split()[:3] == ["a", "cat", "."]
        assert bool(told.behind.any()) is (turns == "needed")
        keys = MMA().opened_keys(told)
        assert bool(keys.any())
        assert not bool((keys & said).any())
        assert torch.equal(keys[0], keys[1])  # both answers have the same rectangle


def test_preference_training_starts_at_equal_models_and_learns(tmp_path, pairs):
    losses = _run(_trainer(tmp_path, pairs))
    assert losses[0] == pytest.approx(0.69314718, abs=1e-6)
    assert losses[1] < losses[0]
    full = _run(_trainer(tmp_path, pairs, reference=True, lora=False))
    assert full[0] == pytest.approx(0.69314718, abs=1e-6)


@pytest.mark.parametrize("lora", [True, False])
def test_roles_reach_policy_and_reference_through_the_trainer(tmp_path, pairs, lora, monkeypatch):
    """TRL puts a forward of its own in the place of the model's."""
    seen = []
    check = MMA.check_supervised

    def watch(self, layout, supervised):
        seen.append((layout.seg == ANSWER, supervised))
        check(self, layout, supervised)

    monkeypatch.setattr(MMA, "check_supervised", watch)
    made = _trainer(tmp_path, pairs, lora=lora, reference=None if lora else True)
    expected = made.data_collator(pairs)
    made.train()
    assert len(seen) == 4  # two steps, policy and reference
    for said, learned in seen:
        assert bool((learned <= said).all())
        assert int(learned.sum()) == int(expected["completion_mask"].sum())
        assert int(said.sum()) > int(learned.sum())  # contexts


def test_fast_paths_are_equal_or_refused(tmp_path, pairs):
    plain = _run(_trainer(tmp_path, pairs))
    fast = _run(_trainer(tmp_path, pairs, fast=("features_once",)))
    assert fast == pytest.approx(plain, abs=1e-6)
    with pytest.raises(FastPathRefused, match=r"shared_prefix: MMA acts at mask"):
        _trainer(tmp_path, pairs, fast=("shared_prefix",))


@pytest.mark.parametrize(("policy", "reference"), [(True, False), (False, True)])
def test_error_12_a_reference_with_another_mask_is_refused(tmp_path, pairs, policy, reference):
    with pytest.raises(ValueError, match=r"The policy opens .*MMA|the reference by MMA"):
        _trainer(tmp_path, pairs, policy=policy, reference=reference, lora=False)


# ---- launched ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_of_deepspeed_log_the_losses_of_one(tmp_path):
    from tests.training.test_launches import assert_equal, deepspeed, finished, start

    preference_toy.write_pairs(tmp_path, count=4)
    preference_toy.write_model(tmp_path / "model")
    model = {"name": str(tmp_path / "model"), "lora": {"r": 4, "alpha": 8}, "methods": [MMA_TEXT]}
    paths = {
        name: preference_toy.configuration(
            tmp_path, tmp_path / name, steps=1, export=[], model=model, **more
        )
        for name, more in {"one": {}, "two": {"deepspeed": "zero2"}}.items()
    }
    assert main(["--config", str(paths["one"])]) == 0
    code, text = finished(start(deepspeed(paths["two"])))
    assert code == 0, text
    two, one = (preference_toy.logged(tmp_path / name) for name in ("two", "one"))
    assert_equal(two, one, 2e-6)
