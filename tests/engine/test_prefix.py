"""Shared beginnings: the same logits as whole prompts give, and fewer columns run."""

from __future__ import annotations

import checks
import pytest
import tiny
import torch

from decoding.inter import INTER
from mmlm import attach
from mmlm.engine.branches import auxiliary, prefix
from mmlm.engine.branches.branch import Instruction, NoImage, NoText, UniformNoise
from mmlm.engine.branches.prefix import Filled, common_beginning


def filled(origin, mask=None, positions=None):
    origin = torch.tensor(origin)
    mask = origin >= 0 if mask is None else torch.tensor(mask)
    positions = origin.clamp(min=0) if positions is None else torch.tensor(positions)
    return Filled([], mask, positions, origin)


def test_the_common_beginning_by_hand(monkeypatch):
    # Theirs: columns 0 to 5, row 1 padded by two. Ours: row 0 keeps 0, 1, 2 and 5; row 1 keeps
    # 2, 3 and 5 (padded by one). In common: three columns from column 0 and two from column 1.
    monkeypatch.setattr(prefix, "_WORTH", 1)
    source = filled([[0, 1, 2, 3, 4, 5], [-1, -1, 2, 3, 4, 5]])
    ours = filled([[0, 1, 2, 5], [-1, 2, 3, 5]])
    found = common_beginning(ours.mask, ours.positions, ours.origin, source)
    assert found.count.tolist() == [3, 2]
    assert (found.ours.tolist(), found.theirs.tolist()) == ([0, 1], [0, 2])
    assert (found.length, found.rest) == (3, 1)
    index, wanted = found.columns(found.theirs, 3)
    assert index[wanted].tolist() == [0, 1, 2, 2, 3]
    index, wanted = found.whole(4, 3, 2)
    assert [row[kept].tolist() for row, kept in zip(index, wanted, strict=True)] == [
        [0, 1, 2, 3],
        [1, 2, 3],
    ]


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"positions": [[0, 1, 7, 3]]}, 2),  # another place
        ({"mask": [[True, False, True, True]]}, 1),  # hidden in one of them
        ({}, 3),  # never the last column: its logits are wanted
    ],
)
def test_what_counts_as_common(change, count, monkeypatch):
    monkeypatch.setattr(prefix, "_WORTH", 1)
    ours = filled([[0, 1, 2, 3]])
    source = filled([[0, 1, 2, 3]], **change)
    found = common_beginning(ours.mask, ours.positions, ours.origin, source)
    assert found.count.tolist() == [count]


def test_too_little_in_common_is_not_shared():
    ours, source = filled([[0, 1, 2, 9]]), filled([[0, 1, 2, 3]])
    assert common_beginning(ours.mask, ours.positions, ours.origin, source) is None


def test_bases():
    noise = UniformNoise()
    assert NoText().base == "main"
    assert NoText(image=noise).base == noise
    assert Instruction("be brief .").base == "main"
    assert noise.base is None
    assert NoImage().base is None


class Look(INTER):
    """Keeps the logits of the branches in a list of the caller's."""

    seen = None

    def logits(self, state, z):
        type(self).seen.append([z[branch] for branch in self.branches])


def branch_logits(model, processor, inputs, **options):
    """Logits of INTER's branches at every step, and new columns of every auxiliary prefill."""
    Look.seen, columns = [], []

    def note(module, args, kwargs):
        if model._mmlm_session.quiet:
            columns.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    with attach(model, Look(**options), processor=processor):
        model.generate(**inputs, max_new_tokens=3, prefix_allowed_tokens_fn=lambda row, ids: [7])
    handle.remove()
    return Look.seen, columns


def uneven(processor):
    """Words before, behind and between pictures; one, two and no pictures."""
    talks = [
        [{"type": "text", "text": "what is in"}, {"type": "image"}, {"type": "text", "text": "?"}],
        [{"type": "image"}, {"type": "text", "text": "is there a dog in the picture ?"}],
        [
            {"type": "image"},
            {"type": "text", "text": "and"},
            {"type": "image"},
            {"type": "text", "text": "?"},
        ],
        [{"type": "text", "text": "the quick brown fox"}],
    ]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": talk}], add_generation_prompt=True, tokenize=False
        )
        for talk in talks
    ]
    pictures = [tiny.picture(i, (64, 64)) for i in range(4)]
    return dict(
        processor(
            text=texts, images=pictures, padding=True, return_tensors="pt", padding_side="left"
        )
    )


@pytest.mark.parametrize("mask", ["uniform_noise", "columns", "drop"])
@pytest.mark.parametrize("make", [checks.batch, uneven], ids=["batch", "uneven"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_sharing_changes_no_logit(family, make, mask, monkeypatch):
    model, processor = tiny.shared(family)
    inputs = make(processor)
    options = {"image_mask": mask, "allow_text_only": True}
    monkeypatch.setattr(prefix, "_WORTH", 1)
    shared, columns = branch_logits(model, processor, inputs, **options)
    monkeypatch.setattr(auxiliary.Auxiliary, "_has_base", lambda self, branch, main: False)
    whole, more_columns = branch_logits(model, processor, inputs, **options)
    assert sum(rows * new for rows, new in columns) < sum(rows * new for rows, new in more_columns)
    for ours, theirs in zip(shared, whole, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_only_the_rest_of_a_wordless_prompt_is_run():
    """INTER runs one whole prompt (the noised one) and two short ends."""
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    _, columns = branch_logits(model, processor, inputs)
    n = inputs["input_ids"].shape[1]
    behind_image = inputs["input_ids"][0].flip(0).tolist().index(model.config.image_token_id)
    template_end = behind_image - len(
        processor.tokenizer(checks.PROMPTS[0], add_special_tokens=False)["input_ids"]
    )
    assert columns == [(1, n), (2, template_end)]


def test_a_changed_main_cache_is_not_continued():
    """With VHR the main keys are not those of the plain model; the noised ones still are."""
    import mmlm

    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    columns = []

    def note(module, args, kwargs):
        if model._mmlm_session.quiet:
            columns.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    method = mmlm.VHR(heads_by_layer=((1, (0,)),))
    with attach(model, method, INTER(), processor=processor), torch.no_grad():
        model.generate(**inputs, max_new_tokens=1)
    handle.remove()
    noised, whole, rest = columns
    assert noised[1] > whole[1] > rest[1]
