import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from mmlm.model.assemble import assemble, word_tokenizer
from tests.training.toy import SHAPE, WORDS, Colours
from training.scratch.alignment import AlignmentStage
from training.scratch.attention import DENSE, PACKED, dense, packed
from training.scratch.packing import IGNORED, Text, block_mask, encode, pad, positions


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


def test_labels_stand_on_answers_and_their_end_only(tokenizer):
    [text] = encode(tokenizer, [[("is there ?", "yes ."), ("a red ?", "no .")]], 40)
    words = tokenizer.convert_ids_to_tokens(text.ids)
    assert words == (
        "is there ? assistant : yes . <eos> user : a red ? assistant : no . <eos>".split()
    )
    labelled = [w for w, label in zip(words, text.labels, strict=True) if label != IGNORED]
    assert labelled == "yes . <eos> no . <eos>".split()
    kept = [label for label in text.labels if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(kept) == labelled


def test_a_turn_that_does_not_fit_is_left_out_whole(tokenizer):
    turns = [("is there ?", "yes ."), ("a red ?", "no .")]
    whole, cut, first = (encode(tokenizer, [turns], n)[0] for n in (18, 17, 8))
    assert len(whole.ids) == 18
    assert cut == first == encode(tokenizer, [turns[:1]], 99)[0]
    # A later turn that would fit is not taken either: the conversation has ended.
    skipping = [turns[0], ("a red ? a red ? a red ?", "no ."), turns[0]]
    assert encode(tokenizer, [skipping], 18)[0] == first
    with pytest.raises(ValueError, match="takes 8 tokens, max_tokens is 7"):
        encode(tokenizer, [turns], 7)


def test_positions_restart_after_the_prefix():
    assert positions([3, 2, 4]).tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6]]


def test_block_mask_by_hand():
    allowed = (block_mask([2, 1, 2], torch.float32)[0, 0] == 0).int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


@pytest.mark.parametrize("segments", [[5], [4, 3], [3, 2, 4, 1]])
def test_packed_attention_equals_masked_attention(segments):
    torch.manual_seed(0)
    length = sum(segments)
    q, k, v = torch.randn(3, 2, 3, length, 8).unbind(0)
    mask = block_mask(segments, torch.float32)
    want = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    got, _ = packed(None, q, k, v, mask, 0.3, segments=segments)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_dense_attention_equals_plain_and_refuses_a_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind(0)
    want = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(dense(None, q, k, v, None, 0.3)[0], want.transpose(1, 2))
    with pytest.raises(ValueError, match="takes no mask"):
        dense(None, q, k, v, torch.zeros(1), 0.3)


def test_attention_functions_are_registered():
    assert AttentionInterface()[DENSE] is dense
    assert AttentionInterface()[PACKED] is packed


def _stage(tokenizer):
    torch.manual_seed(0)
    model = assemble(
        SHAPE.vision_config(),
        SHAPE.text_config(len(tokenizer)),
        image_token_id=tokenizer.image_token_id,
    )
    with torch.no_grad():
        for parameter in model.parameters():  # so that attention and positions matter
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return AlignmentStage(
        model, tokenizer, Colours(), 6, max_tokens=30, question_tokens=30, question_weight=0.7,
        tower_rate=0.3, pixel_mean=127.5, pixel_std=64.0, residual_dtype=torch.float32, seed=0,
    )  # fmt: skip


def _plain_loss(model, tokenizer, pixels, texts):
    """Mean loss over all labelled tokens, one text a row, through the stock model."""
    prefix = tokenizer("<bos> user :" + " <image>" * 4, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for picture, text in zip(pixels, texts, strict=True):
        logits = model(
            input_ids=torch.tensor([prefix + text.ids]), pixel_values=picture[None]
        ).logits[0]
        targets = torch.tensor([IGNORED] * len(prefix) + text.labels)[1:]
        n = int((targets != IGNORED).sum())
        loss = nn.functional.cross_entropy(logits[:-1], targets, ignore_index=IGNORED)
        total, count = total + n * loss, count + n
    return total / count


def test_packed_loss_equals_the_losses_of_separate_rows(tokenizer):
    stage = _stage(tokenizer)
    batch = stage.batch(0, 0, 1)
    drawn = stage._buckets.batch(0)
    got = stage(**batch)
    got["loss"].backward()
    model = stage.model
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    captions = _plain_loss(model, tokenizer, batch["pixels"], [texts[0] for _, texts in drawn])
    questions = _plain_loss(model, tokenizer, batch["pixels"], [texts[1] for _, texts in drawn])
    torch.testing.assert_close(got["caption_loss"], captions)
    torch.testing.assert_close(got["question_loss"], questions)
    (captions + 0.7 * questions).backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-6, msg=name
        )


def test_padding_is_on_the_right_and_carries_no_loss():
    ids, labels = pad([Text([5, 6], [IGNORED, 6]), Text([7], [7])], 0)
    assert ids.tolist() == [[5, 6], [7, 0]]
    assert labels.tolist() == [[IGNORED, 6], [7, IGNORED]]
