"""The mask site: against masks written out by loops, in every mode of running a model."""

from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch

from decoding.pai import PAI
from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Anatomy, Method, TokenLayout, attach
from mmlm.engine.branches.branch import NoImage, Noised
from mmlm.engine.layout import PROMPT, VISUAL
from mmlm.engine.masks.openings import opened
from mmlm.engine.method import Paper
from mmlm.errors import IncompatibleMethods, LayoutError

PAPER = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="here")


@dataclass(frozen=True, kw_only=True)
class SeeQuestion(Method):
    """Image positions see later text of their turn."""

    paper: ClassVar[Paper] = PAPER
    on: bool = True

    def neutral(self):
        return SeeQuestion(on=False)

    def mask(self, state, layout):
        if not self.on or not bool(layout.visual.any()):
            return None
        seg, turn = layout.seg, layout.turn

        def rule(b, q, k):
            asks, told = seg[b, q] == VISUAL, seg[b, k] == PROMPT
            return asks & told & (k > q) & (turn[b, q] == turn[b, k])

        return rule


@dataclass(frozen=True, kw_only=True)
class SeeImage(SeeQuestion):
    """Text before an image sees it."""

    def mask(self, state, layout):
        seg = layout.seg
        return lambda b, q, k: (seg[b, q] == PROMPT) & (seg[b, k] == VISUAL) & (k > q)


@dataclass(frozen=True, kw_only=True)
class SeeAll(SeeQuestion):
    """Everything sees everything, also where nothing may be seen."""

    def mask(self, state, layout):
        return lambda b, q, k: (b + q + k) >= 0


def ready_mask(model, inputs, opens):
    """The mask of a prompt by loops over rows, queries and keys: one per kind of layer."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = torch.isin(ids, torch.tensor([model.config.image_token_id]))
    types = inputs.get("token_type_ids")
    rows, n = ids.shape
    text = model.get_decoder().config
    bidirectional = model.config.model_type in ("gemma3", "paligemma")
    run = torch.zeros_like(ids)  # number of the run of image positions
    for r in range(rows):
        for i in range(1, n):
            run[r, i] = run[r, i - 1] + (visual[r, i] and not visual[r, i - 1])

    def seen(r, q, k, bound):
        if not real[r, k]:
            return False
        see = k <= q
        if bidirectional and visual[r, q] and visual[r, k]:
            see = see or run[r, q] == run[r, k]
        if model.config.model_type == "paligemma" and types is not None:
            see = see or (types[r, q] == 0 and types[r, k] == 0)  # the whole prompt is a prefix
        see = see or opens(bool(visual[r, q]), bool(visual[r, k]), q, k)
        return bool(see) and (bound is None or k > q - bound)

    def made(bound):
        return torch.tensor(
            [[[[seen(r, q, k, bound) for k in range(n)] for q in range(n)]] for r in range(rows)]
        )

    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    masks = {k: made(text.sliding_window if k == "sliding_attention" else None) for k in kinds}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def question(q_image, k_image, q, k):
    return q_image and not k_image and k > q


def with_mask(model, inputs, mask):
    """Last-position logits of a plain model whose decoder is handed ``mask``."""

    def hand(module, args, kwargs):
        return args, {**kwargs, "attention_mask": mask}

    handle = model.get_decoder().register_forward_pre_hook(hand, with_kwargs=True)
    try:
        return checks.next_logits(model, inputs)
    finally:
        handle.remove()


def set_attention(model, name):
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_those_of_a_mask_written_out_by_loops(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    expected = with_mask(model, inputs, ready_mask(model, inputs, question))
    with attach(model, SeeQuestion()):
        z = checks.next_logits(model, inputs)
    assert torch.equal(z, expected)
    if family != "paligemma":  # whose prompts see everything anyway
        assert not torch.allclose(z, checks.next_logits(model, inputs), atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_causal_reference_is_the_model_itself(family):
    """So that the loops above are known to describe the family."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    causal = with_mask(model, inputs, ready_mask(model, inputs, lambda *_: False))
    torch.testing.assert_close(causal, checks.next_logits(model, inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_eager_equals_sdpa(family):
    model, processor = tiny.build(family)
    inputs = checks.batch(processor)
    with attach(model, SeeQuestion()):
        sdpa = checks.next_logits(model, inputs)
    set_attention(model, "eager")
    with attach(model, SeeQuestion()):
        eager = checks.next_logits(model, inputs)
    torch.testing.assert_close(sdpa, eager, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_generation_equals_no_cache(family):
    """Every step anew: the answer's tokens are text that sees everything before it."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    with attach(model, SeeQuestion()):
        tokens = checks.generate(model, inputs, do_sample=False)
    ids, longer = inputs["input_ids"], dict(inputs)
    n = ids.shape[1]
    for step in range(tokens.shape[1]):
        mask = ready_mask(model, longer, lambda qi, ki, q, k: question(qi, ki, q, k) and k < n)
        z = with_mask(model, longer, mask)
        assert torch.equal(z.argmax(-1), tokens[:, step])
        new = tokens[:, step : step + 1]
        longer["input_ids"] = torch.cat([longer["input_ids"], new], 1)
        longer["attention_mask"] = torch.cat([longer["attention_mask"], torch.ones_like(new)], 1)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in longer:
                # An answer is no prefix.
                value = 1 if model.config.model_type == "paligemma" else 0
                tail = torch.full_like(new, value)
                longer[name] = torch.cat([longer[name], tail], 1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_static_cache_and_beams(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    static = {"cache_implementation": "static", "disable_compile": True}
    with attach(model, SeeQuestion()):
        tokens = checks.generate(model, inputs, do_sample=False)
        assert torch.equal(checks.generate(model, inputs, do_sample=False, **static), tokens)
        beams = checks.generate(model, inputs, do_sample=False, num_beams=3)
        plain = checks.generate(model, inputs, do_sample=False, num_beams=1)
    assert torch.equal(plain, tokens)
    assert beams.shape == tokens.shape


def test_a_padded_row_equals_the_row_alone():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    alone = tiny.inputs(processor, checks.PROMPTS[1:], [[tiny.picture(2, (90, 60))]])
    with attach(model, SeeQuestion()), torch.no_grad():
        options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        both = model.generate(**inputs, **options).logits[0]
        one = model.generate(**alone, **options).logits[0]
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=0)


def test_several_rules_open_their_union_in_any_order():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)

    def either(q_image, k_image, q, k):
        return q_image != k_image and k > q

    expected = with_mask(model, inputs, ready_mask(model, inputs, either))
    with attach(model, SeeQuestion(), SeeImage()):
        first = checks.next_logits(model, inputs)
    with attach(model, SeeImage(), SeeQuestion()):
        second = checks.next_logits(model, inputs)
    assert torch.equal(first, second)
    assert torch.equal(first, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_opened_is_bit_equal_and_keeps_the_fast_path(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    with attach(model, SeeQuestion(on=False)):
        assert torch.equal(checks.next_logits(model, inputs), plain)
    text_only = tiny.inputs(processor, ["what is shown here ?"], [[]])
    masks = []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(
        lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True
    )
    with attach(model, SeeQuestion()):
        checks.next_logits(model, text_only)
    checks.next_logits(model, text_only)
    handle.remove()
    assert (masks[0] is None) == (masks[1] is None)


def test_padding_and_other_documents_stay_closed():
    layout = TokenLayout.from_ids(
        torch.tensor([[0, 5, 9, 6, 7]]),
        torch.tensor([[0, 1, 1, 1, 1]]),
        image_ids=(9,),
    )
    layout = TokenLayout(
        seg=layout.seg,
        img=layout.img,
        frame=layout.frame,
        doc=torch.tensor([[-1, 0, 0, 1, 1]], dtype=torch.int16),
        turn=layout.turn,
    )
    rule = SeeAll().mask(None, layout)
    index = torch.arange(7)
    where = opened([rule], layout, index[None, :5, None], index[None, None] - 1, None)
    # Keys -1 .. 5 are asked for; positions 1, 2 are one document and 3, 4 another.
    rows = ["".join("x" if c else "." for c in row) for row in where[0].tolist()]
    assert rows[1:] == ["..xx...", "..xx...", "....xx.", "....xx."]
    near = opened([rule], layout, index[None, :5, None], index[None, None] - 1, 1)
    assert "".join("x" if c else "." for c in near[0, 4].tolist()) == ".....x."


@torch.no_grad()
def test_a_second_turn_on_the_kept_cache():
    """Its image sees its question, and nothing of the first turn moves."""
    model, processor = tiny.shared("llava")
    first = tiny.inputs(processor, [checks.PROMPTS[0]], [[tiny.picture(1)]])
    second = tiny.inputs(processor, [checks.PROMPTS[1]], [[tiny.picture(2)]])
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    n, m = first["input_ids"].shape[1], second["input_ids"].shape[1]
    mask = torch.ones_like(ids)
    whole = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    # A turn's image sees the text of its own turn.
    expected = with_mask(
        model,
        whole,
        ready_mask(
            model, whole, lambda qi, ki, q, k: question(qi, ki, q, k) and (q < n) == (k < n)
        ),
    )
    with attach(model, SeeQuestion()):
        cache = model(**first, use_cache=True).past_key_values
        before = [layer.keys.clone() for layer in cache.layers]
        output = model(
            input_ids=second["input_ids"],
            pixel_values=second["pixel_values"],
            attention_mask=mask,
            past_key_values=cache,
        )
    torch.testing.assert_close(output.logits[:, -1], expected, atol=1e-5, rtol=0)
    assert output.logits.shape[1] == m
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :n], keys)


@torch.no_grad()
def test_rules_hold_in_auxiliary_prompts():
    """A branch with an image has the rule too, one without has nothing to open."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Watch(SeeQuestion):
        def mask(self, state, layout):
            seen.append((layout.rows, layout.length, bool(layout.visual.any())))
            return super().mask(state, layout)

    n = inputs["input_ids"].shape[1]
    with attach(model, Watch(), VCD()):
        checks.generate(model, inputs, do_sample=False)
    assert seen == [(2, n, True), (2, n, True)]
    del seen[:]
    with attach(model, Watch(), VHR(text_branch="plain")):
        checks.generate(model, inputs, do_sample=False)
    assert [s[2] for s in seen] == [False, True]


@torch.no_grad()
def test_a_noised_branch_equals_the_same_prompt_with_noised_pixels():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    branch = Noised(kept=0.25, seed=3)

    @dataclass(frozen=True, kw_only=True)
    class Look(Method):
        paper: ClassVar = PAPER

        def neutral(self):
            return self

        def begin(self, prompt):
            return prompt.run(branch, layers=(3,)).layers[3], prompt.run(NoImage(), layers=(3,))

        def layer_in(self, state, layer, x):
            return None

    with attach(model, SeeQuestion(), Look()):
        model(**inputs)
        noised = model._mmlm_session.states[1][0]
    pixels = branch.repaint(Anatomy(model), inputs["pixel_values"], None)
    states = []
    handle = (
        model.get_decoder()
        .layers[3]
        .register_forward_hook(lambda m, a, out: states.append(out[:, -1]))
    )
    changed = {**inputs, "pixel_values": pixels}
    changed["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with_mask(model, changed, ready_mask(model, changed, question))
    handle.remove()
    torch.testing.assert_close(noised, states[0], atol=2e-5, rtol=0)


@torch.no_grad()
def test_rows_that_ride_in_the_prefill_are_not_opened():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    masks = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda m, a, k: masks.append(k["attention_mask"]), with_kwargs=True
        )
    )
    with attach(model, VHR(text_branch="lockstep")):
        model(**inputs)
    with attach(model, SeeQuestion(), VHR(text_branch="lockstep")):
        model(**inputs)
    handle.remove()
    causal, opened_too = masks
    assert causal.shape[0] == opened_too.shape[0] == 4
    assert torch.equal(causal[2:], opened_too[2:])
    assert torch.equal(opened_too[:2], ready_mask(model, inputs, question))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing):
    """Gradients equal those under a mask handed in, with and without recomputation."""
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ready = ready_mask(model, inputs, question)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "attention_mask": ready}), with_kwargs=True
    )
    expected = gradients()
    handle.remove()
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with attach(model, SeeQuestion()):
        found = gradients()
    assert len(found) == len(expected)
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-6, rtol=1e-5)


def test_packed_rows_stay_apart_without_a_2d_mask():
    """Position ids that restart: the library splits the documents, and rules do not join them."""
    model, processor = tiny.shared("llava")
    one = tiny.inputs(processor, [checks.PROMPTS[0]], [[tiny.picture(1)]])
    two = tiny.inputs(processor, [checks.PROMPTS[1]], [[tiny.picture(2)]])
    n, m = one["input_ids"].shape[1], two["input_ids"].shape[1]
    ids = torch.cat([one["input_ids"], two["input_ids"]], 1)
    plain = TokenLayout.from_ids(ids, None, image_ids=(model.config.image_token_id,))
    doc = torch.cat([torch.zeros(1, n), torch.ones(1, m)], 1).to(torch.int16)
    layout = TokenLayout(plain.seg, plain.img, plain.frame, doc, plain.turn)
    packed = {
        "input_ids": ids,
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
        "position_ids": torch.cat([torch.arange(n), torch.arange(m)])[None],
        "use_cache": False,
    }
    with torch.no_grad():
        with attach(model, SeeQuestion(), layout=layout):
            together = model(**packed).logits
        with attach(model, SeeQuestion()):
            apart = [model(**x).logits for x in (one, two)]
    torch.testing.assert_close(together, torch.cat(apart, 1), atol=1e-5, rtol=0)


def test_flash_kernels_are_refused_where_the_family_opens_attention_itself():
    model, _ = tiny.build("gemma3")
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' .* silently stay causal"):
        with attach(model, SeeQuestion()):
            pass


def test_flash_kernels_are_refused_beside_methods_that_read_the_mask():
    model, _ = tiny.build("llava")
    model.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(IncompatibleMethods, match=r"PAI.* needs the mask itself.*SeeQuestion"):
        with attach(model, SeeQuestion(), PAI(alpha=0.5)):
            pass


def test_a_decoder_that_is_not_causal_is_refused():
    model, _ = tiny.build("llava")
    model.get_decoder().config.is_causal = False
    with pytest.raises(ValueError, match="not causal, so there is nothing to open"):
        with attach(model, SeeQuestion()):
            pass


def test_a_mask_of_integers_is_refused():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    ready = ready_mask(model, inputs, question).long()
    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "attention_mask": ready}), with_kwargs=True
    )
    with attach(model, SeeQuestion()):
        with pytest.raises(LayoutError, match=r"holds torch\.int64"):
            checks.next_logits(model, inputs)
    handle.remove()
