"""The row sites: against hooks-free references that build whole attention matrices."""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

import checks
import pytest
import tiny
import torch
from shapes import largest, record_shapes
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Method, attach
from mmlm.engine.attention import editor as attention
from mmlm.engine.method import Paper

PAPER = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="here")


@dataclass(frozen=True, kw_only=True)
class Rowed(Method):
    """What the test methods share."""

    paper: ClassVar[Paper] = PAPER
    want: Literal["last", "tail", "all"] = "last"
    at: tuple[int, ...] = (1, 2)

    def neutral(self):
        return self

    @property
    def rows(self):
        return self.want

    def acts_in(self, anatomy, layer):
        return layer in self.at

    def begin(self, prompt):
        return prompt

    def visual(self, prompt, x):
        grown = x.shape[-1] - prompt.layout.length
        return functional.pad(prompt.layout.visual, (0, grown))[:, None, None]


@dataclass(frozen=True, kw_only=True)
class Boost(Rowed):
    """Raises the scores of image keys."""

    gamma: float = 0.7

    def scores(self, state, layer, rows, s):
        return self.gamma * s.abs() * self.visual(state, s)


@dataclass(frozen=True, kw_only=True)
class BoostAll(Boost):
    """The same, and says that the kernel is not needed."""

    edits_all_heads: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Move(Rowed):
    """Moves part of the text's weight to the image, in even heads."""

    by: float = 0.5

    def weights(self, state, layer, rows, a):
        visual = self.visual(state, a)
        share = (a * visual).sum(-1, keepdim=True)
        moved = self.by * (1 - share)
        new = torch.where(visual, a * (1 + moved / share.clamp(min=1e-9)), a * (1 - self.by))
        even = torch.arange(a.shape[1]) % 2 == 0
        return torch.where(even[:, None, None] & (share > 0), new, a)


@dataclass(frozen=True, kw_only=True)
class Gain(Rowed):
    """Multiplies the keys of the image in head 3."""

    by: float = 1.6

    def keys(self, state, layer):
        total = state.past + (state.layout.length if state.past == 0 else 1)
        visual = functional.pad(state.layout.visual, (0, total - state.layout.length))
        gain = torch.ones(visual.shape[0], 8, total)
        gain[:, 3] = torch.where(visual, self.by, 1.0)
        return gain


@dataclass(frozen=True, kw_only=True)
class Means(Rowed):
    """Surveys the column means of all rows; then closes the heaviest column but the first."""

    def begin(self, prompt):
        return {"prompt": prompt, "sum": {}, "seen": []}

    def survey(self, state, layer, rows, a):
        state["seen"].append(a.shape[2])
        if a.shape[-1] == state["prompt"].layout.length:
            real = state["prompt"].layout.real.gather(1, rows)[:, None, :, None]
            state["sum"][layer] = state["sum"].get(layer, 0) + (a * real).sum(2)

    def weights(self, state, layer, rows, a):
        column = state["sum"][layer][..., 1:].argmax(-1) + 1
        closed = functional.one_hot(column, a.shape[-1])[:, :, None].bool()
        left = a.masked_fill(closed, 0)
        return left / left.sum(-1, keepdim=True).clamp(min=1e-9)


def reference(model, method, inputs):
    """Last-position logits with the edit in a whole eager attention matrix, written anew."""
    layout = {}
    anatomy_layers = model.get_decoder().layers

    def eager(module, query, key, value, attention_mask, scaling, **kwargs):
        heads = query.shape[1]
        key = key.repeat_interleave(heads // key.shape[1], 1)
        value = value.repeat_interleave(heads // value.shape[1], 1)
        s = query @ key.transpose(-1, -2) * scaling
        n = s.shape[-1]
        visual, real = layout["visual"], layout["real"]
        seen = torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, None]
        at = module.layer_idx in method.at
        rows = torch.zeros(s.shape[0], 1, n, 1, dtype=torch.bool)
        for b in range(s.shape[0]):
            end = int(visual[b].nonzero().max())
            first = {"last": n - 1, "tail": end + 1, "all": 0}[method.want]
            rows[b, :, first:] = True
        key_visual = visual[:, None, None]
        if at and isinstance(method, Boost):
            s = torch.where(rows, s + method.gamma * s.abs() * key_visual, s)
        if at and isinstance(method, Gain):
            gained = s.clone()
            gained[:, 3] = torch.where(key_visual[:, 0], s[:, 3] * method.by, s[:, 3])
            s = torch.where(rows, gained, s)
        a = s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1)
        if at and isinstance(method, Move):
            new = a.clone()
            for h in range(0, heads, 2):
                share = (a[:, h] * key_visual[:, 0]).sum(-1, keepdim=True)
                moved = method.by * (1 - share)
                raised = a[:, h] * (1 + moved / share.clamp(min=1e-9))
                edited = torch.where(key_visual[:, 0], raised, a[:, h] * (1 - method.by))
                new[:, h] = torch.where(share > 0, edited, a[:, h])
            a = torch.where(rows, new, a)
        if at and isinstance(method, Means):
            total = (a * real[:, None, :, None]).sum(2)
            column = total[..., 1:].argmax(-1) + 1
            left = a.masked_fill(functional.one_hot(column, n)[:, :, None].bool(), 0)
            new = left / left.sum(-1, keepdim=True).clamp(min=1e-9)
            a = torch.where(rows, new, a)
        return (a @ value).transpose(1, 2).contiguous(), None

    ids = inputs["input_ids"]
    with attach(model, Watch()) as watched, torch.no_grad():
        watched(**inputs)
        found = watched._mmlm_session.layout
        layout.update(visual=found.visual, real=found.real)
    name = "whole_matrix_reference"
    attention.AttentionInterface.register(name, eager)
    attention.AttentionMaskInterface.register(name, attention.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation_internal = name
    try:
        with torch.no_grad():
            return model(**inputs).logits[:, -1], ids, anatomy_layers
    finally:
        config._attn_implementation_internal = before


@dataclass(frozen=True, kw_only=True)
class Watch(Method):
    """Sees inputs of layers, so that a layout is made."""

    paper: ClassVar[Paper] = PAPER

    def neutral(self):
        return self

    def layer_in(self, state, layer, x):
        return None


EDITS = (Boost, BoostAll, Move, Gain, Means)


@pytest.mark.parametrize(
    ("cls", "want"),
    [
        *((cls, want) for cls in (Boost, BoostAll, Move) for want in ("last", "tail", "all")),
        (Gain, "all"),  # a scaled key is scaled for every query
        (Means, "all"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_rows_equal_the_whole_matrix(family, cls, want):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    method = cls(want=want)
    expected, _, _ = reference(model, method, inputs)
    plain = checks.next_logits(model, inputs)
    with attach(model, method):
        found = checks.next_logits(model, inputs)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("cls", EDITS, ids=lambda c: c.__name__)
def test_small_chunks_change_nothing(cls, monkeypatch):
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, cls(want="all")):
        whole = checks.next_logits(model, inputs)
    monkeypatch.setattr(attention, "_CHUNK", 2 * 8 * 40 * 3)  # three rows at a time
    with attach(model, cls(want="all")):
        pieces = checks.next_logits(model, inputs)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


def test_a_survey_sees_every_row_once_before_any_edit(monkeypatch):
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    n = inputs["input_ids"].shape[1]
    monkeypatch.setattr(attention, "_CHUNK", 2 * 8 * n * 5)
    with attach(model, Means(want="all")), torch.no_grad():
        model(**inputs)
        seen = model._mmlm_session.states[0]["seen"]
    assert len(seen) > 4
    assert sum(seen) == 2 * n


@pytest.mark.parametrize("cls", [Boost, Move], ids=lambda c: c.__name__)
def test_unchanged_heads_and_rows_keep_the_kernels_bits(cls):
    """Rows before the wanted ones, heads a method left alone and image-free rows."""
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(1)], []])
    seen = {}

    def keep(name):
        def hook(module, args):
            seen[name] = args[0].detach().unflatten(-1, (8, -1)).clone()

        return hook

    for name, methods in (("plain", ()), ("edited", (cls(at=(2,)),))):
        handle = (
            model.get_decoder().layers[2].self_attn.o_proj.register_forward_pre_hook(keep(name))
        )
        with attach(model, *methods):
            checks.next_logits(model, inputs)
        handle.remove()
    plain, edited = seen["plain"], seen["edited"]
    assert torch.equal(plain[:, :-1], edited[:, :-1])
    assert torch.equal(plain[1], edited[1])
    odd = torch.arange(8) % 2 == 1
    changed = (plain[0, -1] != edited[0, -1]).any(-1)
    assert changed.tolist() == (torch.ones(8, dtype=torch.bool) if cls is Boost else ~odd).tolist()


def test_methods_that_want_different_rows_get_their_own():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    got = Counter()

    @dataclass(frozen=True, kw_only=True)
    class Spy(Boost):
        def scores(self, state, layer, rows, s):
            got[self.want, rows.shape[1], s.shape[2]] += 1
            return super().scores(state, layer, rows, s)

    n = inputs["input_ids"].shape[1]
    with attach(model, Spy(want="last"), Spy(want="all")):
        both = checks.next_logits(model, inputs)
    assert set(got) == {("last", 1, 1), ("all", n, n)}
    with attach(model, Spy(want="all"), Spy(want="last")):
        assert torch.equal(checks.next_logits(model, inputs), both)


def test_scores_add_and_weights_follow():
    """Two boosts of g add up to one of 2g; a move is applied to the boosted weights."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, Boost(gamma=0.3), Boost(gamma=0.4)):
        two = checks.next_logits(model, inputs)
    with attach(model, Boost(gamma=0.7)):
        one = checks.next_logits(model, inputs)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)
    with attach(model, Move(), Boost(gamma=0.7)):
        ab = checks.next_logits(model, inputs)
    with attach(model, Boost(gamma=0.7), Move()):
        ba = checks.next_logits(model, inputs)
    assert torch.equal(ab, ba)
    assert not torch.allclose(ab, one, atol=1e-3)


def test_two_rewriters_warn_once_and_keep_their_order():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with pytest.warns(UserWarning, match=r"Move.*then.*Means") as caught:
        with attach(model, Move(), Means(want="all")):
            ab = checks.next_logits(model, inputs)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with attach(model, Means(want="all"), Move()):
            ba = checks.next_logits(model, inputs)
    assert not torch.allclose(ab, ba, atol=1e-4)


@pytest.mark.parametrize("cls", [Boost, BoostAll, Move], ids=lambda c: c.__name__)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_decoding_equals_a_growing_prompt(family, cls):
    """Cached steps see the same rows as one long pass whose new rows are the tail's last."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    method = cls(want="tail")
    with attach(model, method):
        tokens = checks.generate(model, inputs, do_sample=False)
        eager_beams = checks.generate(model, inputs, do_sample=False, num_beams=3)
        static = checks.generate(
            model, inputs, do_sample=False, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(tokens, static)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(checks.NEW):
        grown = {
            **inputs,
            "input_ids": torch.cat([ids, tokens[:, :step]], 1),
            "attention_mask": functional.pad(mask, (0, step), value=1),
        }
        if "mm_token_type_ids" in grown:
            grown["mm_token_type_ids"] = functional.pad(inputs["mm_token_type_ids"], (0, step))
        with attach(model, method):
            z = checks.next_logits(model, grown)
        z[:, 3] = -math.inf  # generate() forbids the end token
        assert torch.equal(z.argmax(-1), tokens[:, step])
    assert eager_beams.shape[1] == checks.NEW


def test_auxiliary_rows_get_the_models_own_attention():
    """Fused branch rows are computed by the kernel even where it is skipped for the main rows."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    methods = (BoostAll(), VCD(), VHR())
    with attach(model, *methods):
        fused = checks.generate(model, inputs, do_sample=False)
        separate = checks.generate(
            model, inputs, do_sample=False, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(fused, separate)


def test_the_kernel_is_skipped_only_when_told():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    calls = Counter()

    def counted(module, query, *args, **kwargs):
        calls[query.shape[2] == 1] += 1
        return sdpa_attention_forward(module, query, *args, **kwargs)

    def count(*methods):
        calls.clear()
        attention.ALL_ATTENTION_FUNCTIONS["sdpa"] = counted
        try:
            with attach(model, *methods):
                checks.generate(model, inputs, do_sample=False)
        finally:
            del attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
        return calls[True]

    assert count() == 4 * (checks.NEW - 1)
    assert count(Boost()) == 4 * (checks.NEW - 1)
    assert count(BoostAll(at=(1, 2))) == 2 * (checks.NEW - 1)


@torch.no_grad()
def test_output_attentions_are_the_edited_ones():
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    inputs = checks.batch(processor)
    with attach(model, Move(at=(2,), by=1.0)):
        found = model(**inputs, output_attentions=True).attentions[2]
    plain = model(**inputs, output_attentions=True).attentions[2]
    visual = inputs["input_ids"] == model.config.image_token_id
    last = found[:, ::2, -1]
    torch.testing.assert_close(
        (last * visual[:, None]).sum(-1), torch.ones_like(last[..., 0]), atol=1e-5, rtol=0
    )
    assert torch.equal(found[:, :, :-1], plain[:, :, :-1])
    assert torch.equal(found[:, 1::2], plain[:, 1::2])


def test_attend_multiplies_the_running_values():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    outputs = {}

    @dataclass(frozen=True, kw_only=True)
    class Attend(Rowed):
        def weights(self, state, layer, rows, a):
            outputs["ours"] = state.attend(a)

    def keep(module, args):
        outputs["kernel"] = args[0][:, -1].unflatten(-1, (8, -1))

    handle = model.get_decoder().layers[2].self_attn.o_proj.register_forward_pre_hook(keep)
    with attach(model, Attend(at=(2,))):
        checks.next_logits(model, inputs)
        with pytest.raises(RuntimeError, match="inside"):
            model._mmlm_session.attend(torch.ones(2, 8, 1, 3))
    handle.remove()
    torch.testing.assert_close(outputs["ours"][:, 0], outputs["kernel"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", EDITS, ids=lambda c: c.__name__)
@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_prompt(cls):
    """Twice the prompt: the largest tensor at most doubles, with all rows asked for."""
    model, processor = tiny.build("llava")
    sizes = []
    for n in (1500, 3000):
        one = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
        filler = torch.randint(10, 200, (1, n), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([one["input_ids"], filler], 1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": one["pixel_values"],
            "logits_to_keep": 1,
        }
        with attach(model, cls(want="all")), record_shapes() as shapes:
            model(**inputs)
        sizes.append(largest(shapes))
    if cls is not Gain:  # which needs no rows of scores, so no chunk is ever filled
        assert sizes[0] >= attention._CHUNK // 2
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 8 * 3000 * 3000 / 4


def test_training_through_edited_rows_gives_gradients():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    with attach(model, Boost(want="all"), Move()):
        model(**inputs).logits.square().mean().backward()
    assert model.get_decoder().layers[2].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_two_threads_with_two_models_give_the_single_thread_results():
    """Nothing that runs is shared: registered functions find their state on the modules."""
    jobs = {}
    for name, seed, methods in (
        ("a", 0, (Boost(), VCD())),
        ("b", 1, (Move(want="all"), VHR())),
        ("c", 2, ()),
    ):
        model, processor = tiny.build("llava", seed=seed)
        jobs[name] = (model, checks.batch(processor), methods)

    def run(name, store):
        model, inputs, methods = jobs[name]
        store[name] = []
        with attach(model, *methods):
            for _ in range(4):
                store[name].append(checks.generate(model, inputs, do_sample=False))

    alone, together = {}, {}
    for name in jobs:
        run(name, alone)
    threads = [threading.Thread(target=run, args=(name, together)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in jobs:
        assert len(together[name]) == 4
        for x, y in zip(alone[name], together[name], strict=True):
            assert torch.equal(x, y)
