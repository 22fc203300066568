"""Auxiliary prompts of every family against the plain model on the prompt they stand for.

A branch is right if its logits are those of an ordinary forward pass over inputs that the family's
own processor makes: with other pixels, or without a picture. Deep-stacked features, type ids,
3-D positions, scaled embeddings and padding tiles all have to be right for that.
"""

from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch

from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Anatomy, Method, TokenLayout, attach
from mmlm.engine.branches.blanks import without_blanks
from mmlm.engine.branches.branch import Branch, Flat, NoImage, Noised, Same
from mmlm.engine.method import Paper


@dataclass(frozen=True, kw_only=True)
class Look(Method):
    """Keeps a branch's logits and changes nothing."""

    paper: ClassVar[Paper] = Paper(
        title="made for a test", arxiv="0000.00000", year=2026, venue="-"
    )
    branch: Branch

    def neutral(self):
        return self

    @property
    def branches(self):
        return (self.branch,)

    def begin(self, prompt):
        return []

    def logits(self, state, z):
        state.append(z[self.branch])


def branch_logits(family, branch, inputs):
    """The branch's logits at the first position, [B, V]."""
    model, processor = tiny.shared(family)
    with attach(model, Look(branch=branch), processor=processor), torch.no_grad():
        model(**inputs)
        [z] = model._mmlm_session.states[0]
    return z


def plain_logits(family, inputs):
    return checks.next_logits(tiny.shared(family)[0], inputs)


def text_inputs(family):
    """The prompts as if no picture had been there: what stands before it and after it.

    Tokenized apart, for the picture's tokens keep the words beside it apart too.
    """
    _, processor = tiny.shared(family)
    parts = [["user: ", f"{text} assistant:"] for text in checks.PROMPTS]
    if family == "paligemma":  # whose processor adds a start token and a line break
        parts = [[before, f"<s>{after}\n"] for before, after in parts]
    rows = [[i for part in row for i in processor.tokenizer(part)["input_ids"]] for row in parts]
    options = {"return_tensors": "pt", "padding_side": "left"}
    batch = dict(processor.tokenizer.pad({"input_ids": rows}, **options))
    if family == "paligemma":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return batch


@pytest.mark.parametrize("family", tiny.ALL)
def test_a_prompt_without_its_image_is_the_text_around_it(family):
    inputs = checks.batch(tiny.shared(family)[1])
    found = branch_logits(family, NoImage(), inputs)
    expected = plain_logits(family, text_inputs(family))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("branch", [Noised(kept=0.3, seed=7), Flat()], ids=["noised", "flat"])
def test_another_image_is_the_prompt_with_other_pixels(family, branch):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    anatomy = Anatomy(model)
    changed = dict(inputs)
    changed["pixel_values"] = branch.repaint(
        anatomy, inputs["pixel_values"], inputs.get("image_grid_thw")
    )
    expected = plain_logits(family, changed)
    assert not torch.allclose(expected, plain_logits(family, inputs), atol=1e-3)
    found = branch_logits(family, branch, inputs)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("branch", [Noised(kept=1.0, seed=0), Same()], ids=["unchanged", "same"])
def test_the_same_image_is_the_prompt_itself(family, branch):
    inputs = checks.batch(tiny.shared(family)[1])
    found = branch_logits(family, branch, inputs)
    torch.testing.assert_close(found, plain_logits(family, inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "llava_next"])
def test_noise_leaves_padding_tiles_alone(family):
    """A row with fewer tiles than its neighbour: its padding is told by its zeros."""
    _, processor = tiny.shared(family)
    small = tiny.picture(1, (20, 60))
    inputs = tiny.inputs(processor, checks.PROMPTS, [[small], [tiny.picture(2), tiny.picture(3)]])
    alone = tiny.inputs(processor, checks.PROMPTS[:1], [[small]])
    assert (
        alone["pixel_values"].shape[1] < inputs["pixel_values"].shape[1] or family == "llava_next"
    )
    branch = Noised(kept=0.3, seed=7)
    together = branch_logits(family, branch, inputs)[0]
    torch.testing.assert_close(
        together, branch_logits(family, branch, alone)[0], atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "method", [VHR(), VCD(), VHR(text_branch="lockstep")], ids=lambda m: m.label
)
def test_left_padded_qwen2_5_vl_rows_equal_single_runs(method):
    checks.batch_equals_single_rows(method, "qwen2_5_vl")


@pytest.mark.parametrize("family", tiny.ALL)
def test_lockstep_heads_equal_those_of_a_separate_text_pass(family):
    """Rows laid into the main prefill see the same text as a pass of their own: one layer."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    logits = []
    for kind in ("plain", "lockstep"):
        method = VHR(layers=(1,), text_branch=kind)
        with attach(model, method, processor=processor):
            logits.append(checks.next_logits(model, inputs))
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_a_placeholder_behind_the_embedding_table(family):
    """Some checkpoints' placeholder id is the size of the vocabulary."""
    model, processor = tiny.build(family)
    inputs = checks.batch(processor)
    old, new = model.config.image_token_id, model.get_input_embeddings().num_embeddings
    with attach(model, VCD(), processor=processor):
        expected = checks.next_logits(model, inputs)
    model.config.image_token_id = new
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == old, new)
    with attach(model, VCD(), processor=processor):
        found = checks.next_logits(model, inputs)
    torch.testing.assert_close(found, expected)


class _Pieces:
    """A tokenizer whose line breaks are single tokens in ones, twos, threes and fours."""

    words: ClassVar = ["a", "b", "\n", "\n\n", "\n\n\n", "\n\n\n\n", "\n\nb"]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)

    def __call__(self, text, add_special_tokens):
        if text in self.words:
            return {"input_ids": [self.words.index(text)]}
        return {"input_ids": [self.words.index(c) for c in text]}


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        ("a|\n\n", "\n\n|b", "ab"),
        ("a|\n\n\n", "\n\n|b", "a\nb"),  # a template's line break melted into the blank line
        ("a|\n|\n|\n", "\n|\n|b", "a\nb"),
        ("a|\n\n", "\n\nb", "ab"),
        ("a", "b", "ab"),  # no blank lines: nothing to take out
        ("a|\n", "\n\n|b", "a\nb"),
        ("\n\n", "b", "b"),
        ("a|\n\n", "\n\n\n\n|IMG|\n\n|b", "ab"),  # one token after one image and before the next
        ("a|\n\n", "\n\n|\n\n|IMG|\n\n\n|b", "a\nb"),
    ],
)
def test_blank_lines_around_images(before, after, left):
    pieces, image, start, end = _Pieces(), 90, 91, 92
    spelled = []
    for word in f"{before}|IMG|{after}".split("|"):
        spelled += [start, image, image, end] if word == "IMG" else [pieces.words.index(word)]
    ids = torch.tensor([[0, *spelled], [*spelled, 0]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    layout = TokenLayout.from_ids(ids, mask, image_ids=(image,), wrapper_ids=(start, end))
    new, gone = without_blanks(ids, layout, "\n\n", pieces)
    keep = layout.real & ~layout.visual & ~layout.frame & ~gone
    assert pieces.decode(new[0][keep[0]].tolist()) == left
    assert pieces.decode(new[1][keep[1]].tolist()) == left + "a"
    unchanged = layout.visual | layout.frame | ~layout.real
    assert torch.equal(new[unchanged], ids[unchanged])


def test_without_a_processor_blank_lines_stay():
    model, processor = tiny.shared("gemma3")
    inputs = checks.batch(processor)
    with attach(model, Look(branch=NoImage())), torch.no_grad():
        model(**inputs)
        [without] = model._mmlm_session.states[0]
    assert not torch.allclose(without, branch_logits("gemma3", NoImage(), inputs), atol=1e-4)
