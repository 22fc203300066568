"""Measuring, choosing and ordering the rows of a supervised fine-tuning."""

import collections

import pytest
import tiny
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from mmlm.errors import ImageReadError, InputError
from tests.training.sft_rows import row
from training.errors import ConversationTooLong
from training.sft.buckets import LengthBuckets
from training.sft.collator import SFTCollator
from training.sft.data import Example, Examples, measure
from training.sft.encoding import Encoder
from training.sft.rows import Conversation


@pytest.fixture
def encoder():
    return Encoder(tiny.build("qwen2_5_vl")[1], "eos")


def _on_disk(folder, n_images, *turns, name, size=(64, 64)):
    made = row(n_images, *turns, name=name)
    paths = tuple(str(folder / path) for path in made.images)
    for number, path in enumerate(paths):
        tiny.picture(number, size).save(path)
    return Conversation(made.id, paths, made.messages, made.place)


@pytest.fixture
def rows(tmp_path):
    long = " ".join(["the quick brown fox jumps over the lazy dog ."] * 6)
    return [
        _on_disk(tmp_path, 1, ("what ?", "a dog ."), name="a", size=(100, 60)),
        _on_disk(tmp_path, 1, ("what ?", long), name="b"),
        _on_disk(tmp_path, 0, ("what ?", "a cat ."), name="c"),
        _on_disk(tmp_path, 2, ("what ?", "a cat ."), ("and ?", "no ."), name="d"),
    ]


def test_lengths_are_those_of_the_batches(rows, encoder):
    measured = measure(rows, encoder)
    examples = Examples(rows, measured)
    batch = SFTCollator(encoder)([examples[n] for n in range(4)])
    assert batch["attention_mask"].sum(dim=1).tolist() == list(measured.lengths)
    assert measured.kept == (0, 1, 2, 3)
    assert measured.dropped == {}
    assert examples.lengths == list(measured.lengths)


def test_a_row_that_is_too_long_is_refused_with_its_counts(rows, encoder):
    lengths = measure(rows, encoder).lengths
    # 8 tokens of the picture, 2 around it.
    with pytest.raises(ConversationTooLong) as caught:
        measure(rows, encoder, max_length=60)
    assert str(caught.value) == (
        f"rows.jsonl:b: row 'b' has {lengths[1]} tokens, {encoder.image_tokens(((64, 64),))} of "
        "them of its 1 pictures; max_length is 60."
    )
    assert isinstance(caught.value, ValueError)
    dropped = measure(rows, encoder, max_length=60, overlong="drop")
    assert dropped.kept == (0, 2, 3)
    assert dropped.dropped == {"too long": 1}
    exact = measure(rows, encoder, max_length=max(lengths))
    assert exact.lengths == lengths
    with pytest.raises(InputError, match="None of the 4 rows can be used: 4 too long"):
        measure(rows, encoder, max_length=5, overlong="drop")


def test_a_picture_that_cannot_be_read_is_refused_or_left_out(rows, encoder, tmp_path):
    (tmp_path / "a0.png").write_bytes(b"no picture")
    with pytest.raises(ImageReadError, match=r"a0.png' cannot be read"):
        measure(rows, encoder)
    measured = measure(rows, encoder, on_bad_image="drop")
    assert measured.kept == (1, 2, 3)
    assert measured.dropped == {"unreadable picture": 1}
    for options in ({}, {"capacity": max(measured.lengths)}):
        examples = Examples(rows, measured, **options)
        ids = [one.id for n in range(len(examples)) for one in examples[n].rows]
        assert sorted(ids) == ["b", "c", "d"]


def test_a_picture_that_is_cut_off_is_found_when_it_is_read(rows, encoder, tmp_path):
    whole = (tmp_path / "b0.png").read_bytes()
    (tmp_path / "b0.png").write_bytes(whole[: len(whole) // 2])
    measured = measure(rows, encoder)  # its head is whole
    with pytest.raises(ImageReadError, match=r"rows.jsonl:b: .*damaged or cut off"):
        Examples(rows, measured)[1]
    lenient = Examples(rows, measured, on_bad_image="drop")
    assert [lenient[n].rows[0].id for n in range(4)] == ["a", "c", "c", "d"]
    packed = Examples(rows, measured, capacity=1000, on_bad_image="drop")
    assert len(packed) == 1
    assert sorted(one.id for one in packed[0].rows) == ["a", "c", "d"]
    only = Examples([rows[1]], on_bad_image="drop")
    with pytest.raises(InputError, match="Not one picture of 1 examples"):
        only[0]


def test_packed_examples_hold_every_row_once_and_fit(rows, encoder):
    measured = measure(rows, encoder)
    capacity = max(measured.lengths)
    examples = Examples(rows, measured, capacity=capacity, seed=1)
    ids = [[one.id for one in examples[n].rows] for n in range(len(examples))]
    assert sorted(name for names in ids for name in names) == ["a", "b", "c", "d"]
    assert len(examples) < 4
    assert max(examples.lengths) <= capacity
    assert sum(examples.lengths) == sum(measured.lengths)
    for n in range(len(examples)):
        batch = SFTCollator(encoder, packed=True)([examples[n]])
        assert batch["input_ids"].shape[1] == examples.lengths[n]


LENGTHS = [(n * 37) % 101 + 1 for n in range(203)]


def _order(seed=0, epoch=0):
    buckets = LengthBuckets(LENGTHS, 8, seed)
    buckets.set_epoch(epoch)
    return list(buckets)


def test_buckets_are_reproducible_and_lose_nothing():
    assert sorted(_order()) == list(range(203))
    assert len(LengthBuckets(LENGTHS, 8, 0)) == 203
    assert _order() == _order()
    assert len({tuple(_order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_batches_of_buckets_are_of_similar_length():
    order = _order()
    spread = [
        max(LENGTHS[n] for n in order[i : i + 8]) - min(LENGTHS[n] for n in order[i : i + 8])
        for i in range(0, 200, 8)
    ]
    assert max(spread) <= 8
    first = [LENGTHS[order[i]] for i in range(0, 200, 8)]
    assert first != sorted(first, reverse=True)  # the batches themselves are shuffled


@pytest.mark.parametrize("rows_per_pass", [2, 4])
def test_processes_take_different_rows_of_the_same_batch(rows_per_pass):
    buckets = LengthBuckets(LENGTHS[:200], 8, 0)
    shares = [
        list(BatchSamplerShard(BatchSampler(buckets, rows_per_pass, False), 2, rank))
        for rank in range(2)
    ]
    taken = collections.Counter(n for share in shares for batch in share for n in batch)
    assert len(taken) == 200
    assert set(taken.values()) == {1}
    passes = 8 // (2 * rows_per_pass)
    order = list(buckets)
    for step in range(0, len(shares[0]), passes):
        seen = {n for share in shares for batch in share[step : step + passes] for n in batch}
        assert seen == set(order[step // passes * 8 :][:8])


def test_every_pass_has_a_picture_where_the_tower_is_shared_out(encoder):
    text_only = [row(0, ("what ?", "a dog ."), name=str(n)) for n in range(3)]
    collate = SFTCollator(encoder, dummy_picture=True)
    batch = collate([Example((one,), ((),)) for one in text_only])
    assert batch["input_ids"].shape[0] == 4
    assert batch["image_grid_thw"].shape == (1, 3)
    assert (batch["labels"][3] == -100).all()
