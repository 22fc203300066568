"""Packed rows compute what separate rows compute, in every family that is not refused."""

import copy

import pytest
import tiny
import torch

from mmlm.errors import InputError, UnsupportedModel
from tests.training.sft_rows import example, row
from training.sft.collator import SFTCollator
from training.sft.documents import IGNORED, Document
from training.sft.encoding import Encoder
from training.sft.packing import FAMILIES, WRONG, check_packing, pack, packed_batch, rope_index

PAIRS = [
    (row(1, ("what is it ?", "a cat on a couch ."), name="a"), [tiny.picture(0, (100, 60))]),
    (row(0, ("is it a train ?", "yes ."), ("and a dog ?", "no ."), name="b"), []),
    (
        row(2, ("describe the image .", "the fox jumps ."), ("more ?", "two people ."), name="c"),
        [tiny.picture(1), tiny.picture(2, (40, 90))],
    ),
    (row(1, ("a dog ?", "no ."), name="d"), [tiny.picture(3, (64, 48))]),
]  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def packable(request):
    model, processor = tiny.build(request.param)
    return model.train(), processor


def _gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _separate(model, encoder):
    """Loss and gradients of the conversations, a forward pass each, all tokens counting alike."""
    collate = SFTCollator(encoder)
    batches = [collate([example(pair)]) for pair in PAIRS]
    counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
    loss = sum(
        model(**batch).loss * n / sum(counts) for batch, n in zip(batches, counts, strict=True)
    )
    loss.backward()
    return loss.detach(), _gradients(model)


@pytest.mark.parametrize("layout", [[[0, 1, 2, 3]], [[2, 0], [3, 1]]], ids=["one", "two"])
def test_packed_rows_have_the_loss_and_gradients_of_separate_rows(packable, layout):
    model, processor = packable
    encoder = Encoder(processor, "eos")
    check_packing(model, rows_per_pass=len(layout))
    want, gradients = _separate(model, encoder)
    collate = SFTCollator(
        encoder, packed=True, rope=rope_index(model), pad_to_multiple_of=8, dummy_picture=True
    )
    batch = collate([example(*(PAIRS[n] for n in group)) for group in layout])
    assert batch["input_ids"].shape[0] == len(layout)
    assert batch["input_ids"].shape[1] % 8 == 0
    assert "attention_mask" not in batch
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), want, atol=1e-5, rtol=1e-5)
    packed = _gradients(model)
    assert packed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "idefics3"])
def test_eager_attention_keeps_documents_apart_too(family):
    model, processor = tiny.build(family)
    model.set_attn_implementation("eager")
    encoder = Encoder(processor, "eos")
    want, _ = _separate(model, encoder)
    batch = SFTCollator(encoder, packed=True, rope=rope_index(model))([example(*PAIRS)])
    torch.testing.assert_close(model(**batch).loss.detach(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("harm", ["use_cache", "position_ids"])
def test_the_comparison_notices_documents_that_see_each_other(harm):
    model, processor = tiny.build("llava")
    encoder = Encoder(processor, "eos")
    want, _ = _separate(model, encoder)
    batch = SFTCollator(encoder, packed=True)([example(*PAIRS)])
    del batch[harm]  # the library's default cache, and positions that run on, hide the documents
    assert (model(**batch).loss.detach() - want).abs() > 1e-3


def test_positions_start_again_and_padding_is_a_document_of_its_own():
    _, processor = tiny.build("llava")
    encoder = Encoder(processor, "eos")
    documents, _ = encoder([r for r, _ in PAIRS], [p for _, p in PAIRS])
    lengths = [len(document.ids) for document in documents]
    batch = SFTCollator(encoder, packed=True)([example(*PAIRS[:3]), example(PAIRS[3])])
    rest = sum(lengths[:3]) - lengths[3]
    assert batch["position_ids"].tolist() == [
        [n for length in lengths[:3] for n in range(length)],
        [*range(lengths[3]), *range(rest)],
    ]
    assert (batch["labels"][1, lengths[3] :] == IGNORED).all()
    assert batch["pixel_values"].shape[0] == 4


def test_the_first_token_of_a_document_is_not_learned_from_the_one_before():
    ids = torch.tensor([5, 6, 7])
    row = [Document(ids, ids.clone(), 0), Document(ids + 3, ids + 3, 0)]
    batch = packed_batch([row], {}, pad_token_id=1, multiple=1, rope=None)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 9, 10]]


def test_positions_of_qwen_are_those_of_each_document_alone():
    model, processor = tiny.build("qwen2_5_vl")
    encoder = Encoder(processor, "eos")
    batch = SFTCollator(encoder, packed=True, rope=rope_index(model))([example(*PAIRS)])
    assert batch["position_ids"].shape[0] == 4
    first = 0
    for pair in PAIRS:
        alone = SFTCollator(encoder)([example(pair)])
        n = alone["input_ids"].shape[1]
        got = batch["position_ids"][:, 0, first : first + n]
        first += n
        assert got[0].tolist() == list(range(n))
        if pair[0].images:
            want, _ = model.model.get_rope_index(
                alone["input_ids"],
                mm_token_type_ids=alone["mm_token_type_ids"],
                image_grid_thw=alone["image_grid_thw"],
            )
            assert got[1:].tolist() == want[:, 0].tolist()
            assert got[1].tolist() != got[0].tolist()
        else:
            assert got[1:].tolist() == [list(range(n))] * 3


def test_packing_is_refused_where_it_would_be_wrong():
    for family in WRONG:
        with pytest.raises(UnsupportedModel, match=f"wrong for '{family}'"):
            check_packing(tiny.build(family)[0], 1)
    llava, _ = tiny.build("llava")
    other = copy.deepcopy(llava)
    other.config.text_config.model_type = "opt"
    with pytest.raises(UnsupportedModel, match="decoder 'opt'"):
        check_packing(other, 1)
    llava.config.get_text_config()._attn_implementation = "mmlm_rows_sdpa"
    with pytest.raises(UnsupportedModel, match="mmlm_rows_sdpa"):
        check_packing(llava, 1)
    llava.config.get_text_config()._attn_implementation = "flash_attention_2"
    check_packing(llava, 1)
    with pytest.raises(InputError, match="rows_per_pass is 2"):
        check_packing(llava, 2)


@pytest.mark.parametrize(("family", "pairs"), [("gemma3", PAIRS[1:3]), ("paligemma", PAIRS[::3])])
def test_what_is_refused_is_wrong_indeed(family, pairs):
    model, processor = tiny.build(family)
    encoder = Encoder(processor, "eos")
    collate = SFTCollator(encoder)
    alone = model(**collate([example(pairs[1])])).logits[0]
    packed = model(**SFTCollator(encoder, packed=True)([example(*pairs)])).logits[0]
    assert (packed[-len(alone) :] - alone).abs().max() > 1e-3


def test_pack_fills_rows_without_cutting_or_losing_anything():
    lengths = [7, 3, 5, 5, 2, 8, 10, 1, 4]
    rows = pack(lengths, 10, seed=0)
    assert sorted(n for group in rows for n in group) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in group) <= 10 for group in rows)
    assert len(rows) == 5  # 45 tokens: no fewer rows are possible
    assert pack(lengths, 10, seed=0) == rows
    assert any(pack(lengths, 10, seed=seed) != rows for seed in range(1, 20))
    with pytest.raises(ValueError, match="a document of 10 tokens, rows of 9"):
        pack(lengths, 9, seed=0)


def test_pack_takes_the_longest_first():
    assert {len(pack([2, 2, 2, 8, 8, 8], 10, seed=seed)) for seed in range(10)} == {3}


def test_pack_takes_the_fullest_row_that_still_has_room():
    # Rooms after 8, 7, 6 are 2, 3, 4: the 3 belongs into the middle one, exactly.
    assert {frozenset(group) for group in pack([8, 7, 6, 3], 10, seed=0)} == {
        frozenset({0}), frozenset({1, 3}), frozenset({2}),
    }  # fmt: skip


def test_a_dummy_picture_changes_no_loss_and_reaches_the_tower():
    for packed in (False, True):
        model, processor = tiny.build("llava")
        encoder = Encoder(processor, "eos")
        pair = PAIRS[1]
        plain = SFTCollator(encoder, packed=packed)([example(pair)])
        dummy = SFTCollator(encoder, packed=packed, dummy_picture=True)([example(pair)])
        assert "pixel_values" not in plain
        assert dummy["pixel_values"].shape[0] == 1
        assert dummy["input_ids"].shape[0] == (1 if packed else 2)
        want = model(**plain).loss.detach()
        loss = model(**dummy).loss
        torch.testing.assert_close(loss.detach(), want, atol=1e-6, rtol=1e-6)
        loss.backward()
        touched = [p.grad for p in model.model.multi_modal_projector.parameters()]
        assert all(gradient is not None and not gradient.any() for gradient in touched)
        seen = SFTCollator(encoder, packed=packed, dummy_picture=True)([example(PAIRS[0])])
        assert seen["pixel_values"].shape[0] == 1  # its own picture: no dummy
        assert seen["input_ids"].shape[0] == 1


def test_a_rule_for_positions_needs_no_weights():
    model, _ = tiny.build("qwen3_vl")
    assert not list(rope_index(model).__self__.parameters())
    assert rope_index(tiny.build("llava")[0]) is None
