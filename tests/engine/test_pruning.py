"""The tokens and visual_tokens sites: removing positions equals masking them, in every mode."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch

from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Anatomy, Method, attach
from mmlm.engine.branches.branch import NoImage, Same
from mmlm.engine.method import Paper
from mmlm.engine.removal.columns import Survivors, marked
from mmlm.errors import IncompatibleMethods, LayoutError, UnsupportedModel

PAPER = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="here")


@dataclass(frozen=True, kw_only=True)
class Drop(Method):
    """Drops every ``every``-th visual position from a layer on; 1 drops all."""

    paper: ClassVar[Paper] = PAPER
    layer: int = 2
    every: int = 1

    def neutral(self):
        return type(self)(layer=self.layer, every=10_000)

    def acts_in(self, anatomy, layer):
        return layer == self.layer

    def begin(self, prompt):
        return prompt

    def tokens(self, state, layer, x):
        layout = state.layout.gather(state.kept)
        assert x.shape[1] == layout.length
        order = state.layout.visual.long().cumsum(-1)
        order = order.gather(1, state.kept.clamp(min=0))
        goes = layout.visual & (order % self.every == 0)
        index = torch.arange(layout.length).expand(layout.rows, -1)
        return torch.where(goes, -1, index)


@dataclass(frozen=True, kw_only=True)
class DropInFirstRow(Drop):
    """Drops visual positions of the batch's first row only: rows of different length."""

    def tokens(self, state, layer, x):
        keep = super().tokens(state, layer, x).clone()
        keep[state.layout.rows // 2 :] = torch.arange(x.shape[1])
        return keep


@dataclass(frozen=True, kw_only=True)
class DropFeatures(Method):
    """Drops every ``every``-th image feature of each tile before the decoder."""

    paper: ClassVar[Paper] = PAPER
    every: int = 3

    def neutral(self):
        return DropFeatures(every=10_000)

    def visual_tokens(self, state, features):
        index = torch.arange(features.shape[1])
        keep = index[(index + 1) % self.every != 0]
        return keep.expand(features.shape[0], -1)


def hidden_keys(anatomy, inputs, gone, layers):
    """Masks that hide bool [B, N] ``gone`` as keys in some layers, by hooks of the test's own."""

    def hide(layer, module, args, kwargs):
        mask, x = kwargs.get("attention_mask"), args[0]
        new = x.shape[1]
        cache = kwargs.get("past_key_values")
        before = 0 if cache is None else int(cache.get_seq_length(layer))
        width = before + new if mask is None else mask.shape[-1]
        if mask is None:
            mask = torch.ones(1, 1, new, width, dtype=torch.bool).tril(width - new)
        seen = torch.ones(x.shape[0], width, dtype=torch.bool)
        copies = x.shape[0] // gone.shape[0]
        own = gone.repeat_interleave(copies, 0)
        # A sliding cache has dropped its oldest columns.
        shift = max(before + new - width, 0)
        own = own[:, shift : shift + width]
        seen[:, : own.shape[1]] = ~own
        if mask.dtype == torch.bool:
            mask = mask & seen[:, None, None]
        else:
            mask = mask.masked_fill(~seen[:, None, None], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    return [
        anatomy.layers[i].register_forward_pre_hook(functools.partial(hide, i), with_kwargs=True)
        for i in layers
    ]


def masked(model, inputs, gone, layers, run):
    handles = hidden_keys(Anatomy(model), inputs, gone, layers)
    try:
        return run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def visual(model, inputs):
    return torch.isin(inputs["input_ids"], torch.tensor(Anatomy(model).image_ids))


def every(model, inputs, n):
    where = visual(model, inputs)
    return where & (where.long().cumsum(-1) % n == 0)


def greedy(model, inputs, **options):
    return checks.generate(model, inputs, do_sample=False, **options)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("n", [1, 3])
def test_removal_equals_masking(family, n):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    gone = every(model, inputs, n)
    expected = masked(model, inputs, gone, (2, 3), checks.next_logits)
    tokens = masked(model, inputs, gone, (2, 3), greedy)
    with attach(model, Drop(every=n)):
        close(checks.next_logits(model, inputs), expected)
        assert torch.equal(greedy(model, inputs), tokens)
    assert not torch.allclose(expected, checks.next_logits(model, inputs), atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_that_keep_different_numbers(family):
    """The longer row is padded in none of its layers, the shorter on the left."""
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    gone = every(model, inputs, 1)
    gone[1] = False
    tokens = masked(model, inputs, gone, (2, 3), greedy)
    expected = masked(model, inputs, gone, (2, 3), checks.next_logits)
    with attach(model, DropInFirstRow()):
        close(checks.next_logits(model, inputs), expected)
        assert torch.equal(greedy(model, inputs), tokens)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_eager_static_cache_and_beams(family):
    model, processor = tiny.build(family)
    inputs = checks.batch(processor)
    gone = every(model, inputs, 2)
    beams = masked(model, inputs, gone, (1, 2, 3), lambda m, i: greedy(m, i, num_beams=3))
    with attach(model, Drop(every=2, layer=1)):
        tokens = greedy(model, inputs)
        static = greedy(model, inputs, cache_implementation="static", disable_compile=True)
        assert torch.equal(greedy(model, inputs, num_beams=3), beams)
    assert torch.equal(static, tokens)
    model.set_attn_implementation("eager")
    with attach(model, Drop(every=2, layer=1)):
        assert torch.equal(greedy(model, inputs), tokens)


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_caches_shrink_layer_by_layer(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    n, gone = inputs["input_ids"].shape[1], every(model, inputs, 1)
    kept = int((inputs["attention_mask"].bool() & ~gone).sum(-1).max())
    with attach(model, Drop(layer=2)):
        output = model(**inputs, use_cache=True)
    lengths = [layer.get_seq_length() for layer in output.past_key_values.layers]
    assert lengths == [n, n, kept, kept]
    assert output.logits.shape[1] == n


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("cls", [Drop, DropFeatures])
def test_the_neutral_setting_is_bit_equal(family, cls):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    plain, tokens = checks.next_logits(model, inputs), greedy(model, inputs)
    with attach(model, cls().neutral()):
        assert torch.equal(checks.next_logits(model, inputs), plain)
        assert torch.equal(greedy(model, inputs), tokens)


def test_several_removals_leave_the_intersection_in_any_order():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    both = every(model, inputs, 2) | every(model, inputs, 3)
    expected = masked(model, inputs, both, (2, 3), checks.next_logits)
    with attach(model, Drop(every=2), Drop(every=3)):
        first = checks.next_logits(model, inputs)
    with attach(model, Drop(every=3), Drop(every=2)):
        assert torch.equal(checks.next_logits(model, inputs), first)
    close(first, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_removal_in_stages(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    early, late = every(model, inputs, 2), every(model, inputs, 1)

    def run(function):
        handles = hidden_keys(Anatomy(model), inputs, early, (1, 2))
        handles += hidden_keys(Anatomy(model), inputs, late, (3,))
        result = function(model, inputs)
        for handle in handles:
            handle.remove()
        return result

    expected, tokens = run(checks.next_logits), run(greedy)
    with attach(model, Drop(every=2, layer=1), Drop(layer=3)):
        close(checks.next_logits(model, inputs), expected)
        assert torch.equal(greedy(model, inputs), tokens)


@torch.no_grad()
def test_outputs_keep_their_places_and_what_left_stays_as_it_was():
    """Logits have N positions; a position that left carries the state it left with."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    gone = every(model, inputs, 1)
    real = inputs["attention_mask"].bool()
    states = []
    handle = (
        model.get_decoder().layers[1].register_forward_hook(lambda m, a, out: states.append(out))
    )
    with attach(model, Drop(layer=2)):
        logits = model(**inputs).logits
    handle.remove()
    expected = masked(model, inputs, gone, (2, 3), lambda m, i: m(**i).logits)
    close(logits[real & ~gone], expected[real & ~gone])
    left = model.lm_head(model.get_decoder().norm(states[0]))
    close(logits[gone], left[gone])


def test_gradients_equal_those_of_masking():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    gone = every(model, inputs, 1)
    hidden = gone | (inputs["attention_mask"] == 0)
    # The first text position after the image is predicted from a position that left.
    after = torch.zeros_like(gone)
    after[:, 1:] = gone[:, :-1]
    labels = inputs["input_ids"].masked_fill(hidden | after, -100)

    def gradients(m, i):
        m.zero_grad()
        m(**i, labels=labels, use_cache=False).loss.backward()
        return [p.grad.clone() for p in m.parameters() if p.grad is not None]

    expected = masked(model, inputs, gone, (2, 3), gradients)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with attach(model, Drop(layer=2)):
            found = gradients(model, inputs)
        for g, e in zip(found, expected, strict=True):
            torch.testing.assert_close(g, e, atol=1e-5, rtol=1e-4)


def test_rows_without_an_image_are_left_alone():
    model, processor = tiny.shared("llava")
    mixed = tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(1)], []])

    @dataclass(frozen=True, kw_only=True)
    class DropText(Drop):
        def tokens(self, state, layer, x):
            return torch.arange(x.shape[1] - 2, x.shape[1]).expand(x.shape[0], -1)

    plain = checks.next_logits(model, mixed)
    with attach(model, DropText()):
        z = checks.next_logits(model, mixed)
    close(z[1], plain[1])
    assert not torch.allclose(z[0], plain[0], atol=1e-3)


@torch.no_grad()
def test_a_later_turn_sees_what_is_left():
    model, processor = tiny.shared("llava")
    first = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    more = torch.randint(5, 300, (1, 7), generator=torch.Generator().manual_seed(0))
    gone = every(model, first, 2)

    def both(m, i):
        cache = m(**i, use_cache=True).past_key_values
        return m(input_ids=more, past_key_values=cache).logits

    expected = masked(model, first, gone, (2, 3), both)
    with attach(model, Drop(every=2)):
        close(both(model, first), expected)


@torch.no_grad()
def test_auxiliary_prompts_keep_all_positions():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    lengths = []

    @dataclass(frozen=True, kw_only=True)
    class Look(Method):
        paper: ClassVar[Paper] = PAPER

        def neutral(self):
            return self

        def begin(self, prompt):
            lengths.append(prompt.run(Same(), layers=(3,)).layers[3])

        def layer_in(self, state, layer, x):
            return None

    states = []
    handle = (
        model.get_decoder()
        .layers[3]
        .register_forward_hook(lambda m, a, out: states.append(out[:, -1]))
    )
    model(**inputs)
    with attach(model, Drop(layer=1), Look()):
        model(**inputs)
    handle.remove()
    close(lengths[0], states[0])
    # A contrast: main rows are pruned, the branch is not, and both follow the beams.
    with attach(model, Drop(every=2), VCD(alpha=0.7)):
        greedy(model, inputs)
        beams = greedy(model, inputs, num_beams=3)
    assert beams.shape[0] == 2


def naive_contrast(model, inputs, gone, method):
    """Greedy tokens of VCD beside a masked main pass, without any cache, one step after another."""
    tokens, longer = [], dict(inputs)
    branch = method.branches[0]
    noised = branch.repaint(Anatomy(model), inputs["pixel_values"], inputs.get("image_grid_thw"))
    for _ in range(checks.NEW):
        wide = torch.nn.functional.pad(gone, (0, longer["input_ids"].shape[1] - gone.shape[1]))
        places = (longer["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        longer["position_ids"] = places
        main = masked(model, longer, wide, (2, 3), checks.next_logits)
        other = checks.next_logits(model, {**longer, "pixel_values": noised})
        z = (1 + method.alpha) * main - method.alpha * other
        floor = main.max(-1, keepdim=True).values + torch.log(torch.tensor(method.beta))
        token = z.masked_fill(main < floor, -torch.inf).argmax(-1, keepdim=True)
        tokens.append(token)
        longer["input_ids"] = torch.cat([longer["input_ids"], token], 1)
        longer["attention_mask"] = torch.cat([longer["attention_mask"], torch.ones_like(token)], 1)
    return torch.cat(tokens, 1)


def test_a_contrast_beside_a_removal_equals_the_naive_loop():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    method = VCD(alpha=0.7, beta=0.1)
    expected = naive_contrast(model, inputs, every(model, inputs, 2), method)
    with attach(model, Drop(every=2), method):
        assert torch.equal(greedy(model, inputs), expected)


# ---- visual_tokens -----------------------------------------------------------------------------


def dropped(model, inputs, n):
    """Positions of every n-th feature of each tile, found from features that carry their number."""
    anatomy = Anatomy(model)
    numbers = []

    where = visual(model, inputs)
    if "image_grid_thw" in inputs:  # all pictures are one row of features
        order = where.flatten().long().cumsum(0).view(where.shape)
        return where & (order % n == 0)

    def number(module, args, out):
        index = torch.arange(out.shape[-2]).expand(out.shape[:-1])
        numbers.append(index)
        return (index + 1.0)[..., None].expand_as(out).to(out.dtype)

    kept = {}

    def catch(module, args, kwargs):
        kept["embeds"] = kwargs["inputs_embeds"]

    handles = [
        anatomy.projector.register_forward_hook(number),
        anatomy.text.register_forward_pre_hook(catch, with_kwargs=True),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    scale = 1.0
    if model.config.model_type == "paligemma":
        scale = model.config.text_config.hidden_size**0.5
    values = (kept["embeds"][..., 0] * scale).round().long()
    flat = kept["embeds"].std(-1) < 1e-4  # a line end is a vector of its own
    return where & flat & (values % n == 0)


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "llava_onevision"])
def test_dropped_features_equal_masked_positions(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    gone = dropped(model, inputs, 3)
    assert bool(gone.any())
    layers = range(4)
    expected = masked(model, inputs, gone, layers, checks.next_logits)
    tokens = masked(model, inputs, gone, layers, greedy)
    beams = masked(model, inputs, gone, layers, lambda m, i: greedy(m, i, num_beams=3))
    with attach(model, DropFeatures(every=3)):
        close(checks.next_logits(model, inputs), expected)
        assert torch.equal(greedy(model, inputs), tokens)
        assert torch.equal(greedy(model, inputs, num_beams=3), beams)
        static = greedy(model, inputs, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, tokens)


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_methods_see_the_shorter_prompt_only(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)

    @dataclass(frozen=True, kw_only=True)
    class Look(Method):
        paper: ClassVar[Paper] = PAPER

        def neutral(self):
            return self

        def begin(self, prompt):
            return [prompt.layout]

        def layer_in(self, state, layer, x):
            state.append(x.shape[1])

    with attach(model, DropFeatures(every=2), Look()):
        output = model(**inputs, use_cache=True)
        layout, *widths = model._mmlm_session.states[1]
    assert widths == [layout.length] * 4
    assert layout.length < inputs["input_ids"].shape[1]
    assert [c.get_seq_length() for c in output.past_key_values.layers] == widths
    assert int(layout.visual.sum()) < int(visual(model, inputs).sum())
    # What is no feature stays.
    real = inputs["attention_mask"].bool()
    rest = real & ~visual(model, inputs)
    assert int((layout.real & ~layout.visual).sum()) == int(rest.sum())


def test_features_of_several_methods_leave_the_intersection():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    gone = dropped(model, inputs, 2) | dropped(model, inputs, 3)
    expected = masked(model, inputs, gone, range(4), checks.next_logits)
    with attach(model, DropFeatures(every=2), DropFeatures(every=3)):
        close(checks.next_logits(model, inputs), expected)


def test_features_and_then_positions_of_a_layer():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    gone, rest = dropped(model, inputs, 2), every(model, inputs, 1)

    def run(function):
        handles = hidden_keys(Anatomy(model), inputs, gone, (0, 1))
        handles += hidden_keys(Anatomy(model), inputs, rest, (2, 3))
        result = function(model, inputs)
        for handle in handles:
            handle.remove()
        return result

    expected, tokens = run(checks.next_logits), run(greedy)
    with attach(model, DropFeatures(every=2), Drop(layer=2)):
        close(checks.next_logits(model, inputs), expected)
        assert torch.equal(greedy(model, inputs), tokens)


def test_auxiliary_prompts_lack_the_same_features():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    gone, method = dropped(model, inputs, 2), VCD(alpha=0.7, beta=0.1)
    tokens, longer = [], dict(inputs)
    noised = method.branches[0].repaint(Anatomy(model), inputs["pixel_values"], None)
    for _ in range(checks.NEW):
        wide = torch.nn.functional.pad(gone, (0, longer["input_ids"].shape[1] - gone.shape[1]))
        longer["position_ids"] = (longer["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        main = masked(model, longer, wide, range(4), checks.next_logits)
        changed = {**longer, "pixel_values": noised}
        other = masked(model, changed, wide, range(4), checks.next_logits)
        z = 1.7 * main - 0.7 * other
        floor = main.max(-1, keepdim=True).values + torch.log(torch.tensor(0.1))
        token = z.masked_fill(main < floor, -torch.inf).argmax(-1, keepdim=True)
        tokens.append(token)
        longer["input_ids"] = torch.cat([longer["input_ids"], token], 1)
        longer["attention_mask"] = torch.cat([longer["attention_mask"], torch.ones_like(token)], 1)
    with attach(model, DropFeatures(every=2), method):
        assert torch.equal(greedy(model, inputs), torch.cat(tokens, 1))


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_branches_of_every_kind_run_beside_dropped_features(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    found = []

    @dataclass(frozen=True, kw_only=True)
    class Look(Method):
        paper: ClassVar[Paper] = PAPER

        def neutral(self):
            return self

        def begin(self, prompt):
            for branch in (Same(), NoImage(), NoImage(kind="columns")):
                found.append(prompt.run(branch, layers=(3,)).layers[3])

        def layer_in(self, state, layer, x):
            return None

    states = []
    handle = (
        model.get_decoder()
        .layers[3]
        .register_forward_hook(lambda m, a, out: states.append(out[:, -1]))
    )
    with attach(model, DropFeatures(every=2)):
        model(**inputs)
    with attach(model, Look()):
        model(**inputs)
    same_without, text_only, columns = found[:3]
    del found[:]
    with attach(model, DropFeatures(every=2), Look()):
        model(**inputs)
    handle.remove()
    close(found[0], states[0])
    close(found[1], text_only)
    if family != "gemma3":  # there a window of an auxiliary prompt counts the columns left
        close(found[2], columns)
    assert not torch.allclose(found[0], same_without, atol=1e-3)


@torch.no_grad()
def test_riding_rows_beside_dropped_features():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    gone = dropped(model, inputs, 2)
    method = VHR(text_branch="lockstep")
    with attach(model, DropFeatures(every=2), method):
        z = checks.next_logits(model, inputs)
        assert greedy(model, inputs).shape == (2, checks.NEW)
    with attach(model, method):
        places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        gone = torch.cat([gone, torch.zeros_like(gone)])
        handles = hidden_keys(Anatomy(model), inputs, gone, range(4))
        expected = checks.next_logits(model, {**inputs, "position_ids": places})
    for handle in handles:
        handle.remove()
    assert z.shape == expected.shape


# ---- refusals ----------------------------------------------------------------------------------


def test_the_last_position_must_stay():
    model, processor = tiny.shared("llava")

    @dataclass(frozen=True, kw_only=True)
    class DropLast(Drop):
        def tokens(self, state, layer, x):
            return torch.arange(x.shape[1] - 1).expand(x.shape[0], -1)

    with attach(model, DropLast()), pytest.raises(LayoutError, match="drops the last position"):
        checks.next_logits(model, checks.batch(processor))


def test_a_column_that_does_not_exist():
    with pytest.raises(LayoutError, match="M keeps column 7, but there are 7"):
        marked(torch.tensor([[7, 0]]), 7, "M")
    assert marked(torch.tensor([[2, -1]]), 3, "M").tolist() == [[False, False, True]]


def test_what_cannot_be_together():
    model, _ = tiny.shared("llava")

    @dataclass(frozen=True, kw_only=True)
    class Whole(Method):
        paper: ClassVar[Paper] = PAPER
        needs_all_visual: ClassVar[bool] = True

        def neutral(self):
            return self

        def layer_in(self, state, layer, x):
            return None

    with pytest.raises(IncompatibleMethods, match=r"Whole needs all image positions, and Drop"):
        with attach(model, Drop(), Whole()):
            pass
    with pytest.raises(IncompatibleMethods, match=r"VHR.* lays rows into the prefill"):
        with attach(model, Drop(), VHR(text_branch="lockstep")):
            pass


def test_flex_attention_is_refused():
    model, _ = tiny.build("llava")
    model.get_decoder().config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModel, match="block masks"), attach(model, Drop()):
        pass


@torch.no_grad()
def test_a_continued_pass_needs_positions_after_features_were_dropped():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    token = torch.tensor([[5], [6]])
    n = inputs["input_ids"].shape[1]
    with attach(model, DropFeatures(every=2)):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(LayoutError, match="does not tell the positions"):
            model(input_ids=token, past_key_values=cache)
    with attach(model, DropFeatures(every=2)):
        cache = model(**inputs, use_cache=True).past_key_values
        places = torch.full((2, 1), n)
        z = model(input_ids=token, past_key_values=cache, position_ids=places).logits[:, -1]
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], token], 1)}
    longer["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    gone = torch.nn.functional.pad(dropped(model, inputs, 2), (0, 1))
    close(z, masked(model, longer, gone, range(4), checks.next_logits))


def test_survivors_by_hand():
    alive = torch.tensor([[False, True, False, True], [True, True, False, True]])
    chosen = Survivors.of(alive)
    assert chosen.valid.tolist() == [[False, True, True], [True, True, True]]
    assert chosen.index[:, 1:].tolist() == [[1, 3], [1, 3]]
    assert (chosen.length, chosen.width, chosen.whole) == (3, 4, False)
    x = torch.arange(8.0).view(2, 4, 1)
    assert chosen.take(x)[:, 1:, 0].tolist() == [[1, 3], [5, 7]]
    back = chosen.put(-chosen.take(x), x)
    assert back[..., 0].tolist() == [[0, -1, 2, -3], [-4, -5, 6, -7]]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    cut = chosen.take_mask(mask)
    assert cut[0, 0].tolist()[1:] == [[False, True, False], [False, True, True]]
    assert cut[1, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
