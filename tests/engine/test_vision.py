"""The vision_layer and mlp sites, tower attention, and the way from patches to positions."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch
from transformers import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from decoding.vcd import VCD
from decoding.vista import VISTA
from mmlm import Anatomy, Method, attach
from mmlm.engine.branches.branch import Same
from mmlm.engine.method import Paper
from mmlm.engine.vision import tower
from mmlm.engine.vision.sight import Sight
from mmlm.engine.vision.tower import (
    attention_received,
    class_attention,
    feature_block,
    tower_query_key,
)
from mmlm.errors import LayoutError, UnsupportedModel

PAPER = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="here")
PICTURES = [[tiny.picture(1), tiny.picture(3, (50, 90))], [tiny.picture(2, (90, 60))]]


@dataclass(frozen=True, kw_only=True)
class Scale(Method):
    """Multiplies what enters one tower block."""

    paper: ClassVar[Paper] = PAPER
    by: float = 2.0
    at: int = 1

    def neutral(self):
        return Scale(by=1.0)

    def begin_vision(self, anatomy):
        return []

    def vision_layer(self, state, block, x):
        state.append((block, tuple(x.shape)))
        return x * self.by if block == self.at else None


@dataclass(frozen=True, kw_only=True)
class Shift(Scale):
    """Adds to what enters one tower block."""

    def vision_layer(self, state, block, x):
        return x + self.by if block == self.at else None


@dataclass(frozen=True, kw_only=True)
class Look(Method):
    """Only looks, and keeps in a list what it finds when its prompt begins."""

    paper: ClassVar[Paper] = PAPER
    found: ClassVar[list] = []
    only_looks: ClassVar[frozenset] = frozenset({"vision_layer"})

    def neutral(self):
        return self

    def begin_vision(self, anatomy):
        return []

    def vision_layer(self, state, block, x):
        state.append((block, tuple(x.shape)))

    def begin(self, prompt):
        self.found.append(self.at_begin(prompt))

    def at_begin(self, prompt):
        return prompt.seen(self)


@pytest.fixture(autouse=True)
def _nothing_found():
    Look.found.clear()


def scaled_by_hand(model, inputs, edit, at=1):
    block = Anatomy(model).tower_blocks[at]
    handle = block.register_forward_pre_hook(
        lambda m, a, k: ((edit(a[0]), *a[1:]), k) if a else (a, {**k, "x": None}),
        with_kwargs=True,
    )
    z = checks.next_logits(model, inputs)
    handle.remove()
    return z


# ---- the site ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_edit_equals_a_plain_hook(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    expected = scaled_by_hand(model, inputs, lambda x: x * 3)
    with attach(model, Scale(by=3.0)):
        assert torch.equal(checks.next_logits(model, inputs), expected)


def test_edits_run_in_the_given_order():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, Scale(), Shift()):
        first = checks.next_logits(model, inputs)
    with attach(model, Shift(), Scale()):
        second = checks.next_logits(model, inputs)
    assert torch.equal(first, scaled_by_hand(model, inputs, lambda x: x * 2 + 2))
    assert torch.equal(second, scaled_by_hand(model, inputs, lambda x: (x + 2) * 2))


def test_the_edit_reaches_generate_and_its_beams():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    block = Anatomy(model).tower_blocks[1]
    for options in ({}, {"num_beams": 3}):
        handle = block.register_forward_pre_hook(lambda m, a: (a[0] * 3, *a[1:]))
        expected = checks.generate(model, inputs, do_sample=False, **options)
        handle.remove()
        plain = checks.generate(model, inputs, do_sample=False, **options)
        with attach(model, Scale(by=3.0)):
            edited = checks.generate(model, inputs, do_sample=False, **options)
        assert torch.equal(edited, expected)
        assert not torch.equal(edited, plain)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_was_seen_is_known_when_the_prompt_begins(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    tokens = checks.generate(model, inputs, do_sample=False, num_beams=2)
    with attach(model, Look()):
        assert torch.equal(checks.next_logits(model, inputs), plain)
        assert torch.equal(checks.generate(model, inputs, do_sample=False, num_beams=2), tokens)
    called, generated = Look.found
    assert called == generated
    assert [block for block, _ in called] == list(range(len(Anatomy(model).tower_blocks)))
    assert len({shape for _, shape in called}) == 1
    assert len(called[0][1]) == 3


def test_a_prompt_without_pictures_does_not_see_the_last_ones():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    text = tiny.inputs(processor, checks.PROMPTS, [[], []])
    with attach(model, Look()):
        checks.next_logits(model, inputs)
        checks.next_logits(model, text)
        checks.generate(model, text, do_sample=False)
        model.get_image_features(inputs["pixel_values"])
        checks.next_logits(model, text)  # encoded, but no part of the prompt
    assert Look.found[0]
    assert Look.found[1:] == [None, None, None]


def test_auxiliary_passes_are_not_seen():
    """The noised picture of another method runs through the tower as well, and stays plain."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    contrast = VCD(alpha=1.0, beta=0.0)
    plain = checks.next_logits(model, inputs)
    with attach(model, contrast):
        noised = 2 * plain - checks.next_logits(model, inputs)
    scaled = scaled_by_hand(model, inputs, lambda x: x * 3)
    with attach(model, Scale(by=3.0), contrast):
        both = checks.next_logits(model, inputs)
    torch.testing.assert_close(both, 2 * scaled - noised, atol=1e-4, rtol=0)
    with attach(model, Look(), VCD()):
        checks.next_logits(model, inputs)
    assert [block for block, _ in Look.found[0]] == [0, 1, 2]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pictures_are_encoded_once(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    calls = Counter()
    handle = (
        Anatomy(model).tower_blocks[0].register_forward_hook(lambda *a: calls.update(["block"]))
    )
    with attach(model, VISTA()):
        checks.next_logits(model, inputs)
        assert calls["block"] == 1
        checks.generate(model, inputs, do_sample=False, num_beams=3)
        assert calls["block"] == 2
    handle.remove()


def test_nothing_remains_after_an_exception_in_the_tower():
    model, processor = tiny.build("llava_next")
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    before = checks._footprint(model)

    @dataclass(frozen=True, kw_only=True)
    class Fail(Scale):
        def vision_layer(self, state, block, x):
            raise MemoryError("made up")

    with attach(model, Fail()):
        assert "get_image_features" in vars(model.model)
        for _ in range(2):
            with pytest.raises(MemoryError):
                checks.next_logits(model, inputs)
        assert model._mmlm_session.seeing is None
    assert checks._footprint(model) == before
    assert torch.equal(checks.next_logits(model, inputs), plain)


# ---- from patches to positions ----


def merged_embeds(model, inputs):
    """What enters the text decoder."""
    kept = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: kept.append(k["inputs_embeds"]), with_kwargs=True
    )
    checks.next_logits(model, inputs)
    handle.remove()
    return kept[0]


def disturbed_embeds(model, inputs, tile, patch):
    """The same after one patch's state was changed where the image features are taken."""
    anatomy = Anatomy(model)

    def disturb(module, args, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[tile, patch + int(anatomy.tower_has_cls)] += 1 + torch.arange(x.shape[-1]) % 3
        return (x, *output[1:]) if isinstance(output, tuple) else x

    # In front of the hook by which the library keeps the states that become features.
    block = anatomy.tower_blocks[feature_block(anatomy)]
    handle = block.register_forward_hook(disturb, prepend=True)
    try:
        return merged_embeds(model, inputs)
    finally:
        handle.remove()


@dataclass(frozen=True, kw_only=True)
class Place(Look):
    """Marks one patch of one tile."""

    found: ClassVar[list] = []
    tile: int = 0
    patch: int = 0

    def at_begin(self, prompt):
        _, (tiles, states, _) = prompt.seen(self)[0]
        marks = torch.zeros(tiles, states - int(prompt.anatomy.tower_has_cls))
        marks[self.tile, self.patch] = 1
        return prompt.place(prompt.merge_patches(marks)[..., None])[..., 0]


def placed(model, inputs, tile, patch):
    Place.found.clear()
    with attach(model, Place(tile=tile, patch=patch)):
        checks.next_logits(model, inputs)
    return Place.found[0]


def towers_with_tiles():
    return [f for f in tiny.FAMILIES if not f.startswith("qwen")]


@pytest.mark.parametrize("family", towers_with_tiles())
def test_a_marked_patch_is_placed_where_its_feature_goes(family):
    """Changes one patch and sees which positions move: no packing code is repeated here."""
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, checks.PROMPTS, PICTURES)
    plain = merged_embeds(model, inputs)
    with attach(model, Look()):
        checks.next_logits(model, inputs)
    tiles, states, _ = Look.found[0][0][1]
    patches = states - int(Anatomy(model).tower_has_cls)
    moved_somewhere = 0
    for tile in range(tiles):
        for patch in {0, 1, patches // 2, patches - 1}:
            moved = (disturbed_embeds(model, inputs, tile, patch) - plain).abs().amax(-1) > 1e-4
            assert torch.equal(placed(model, inputs, tile, patch) > 0, moved), (tile, patch)
            moved_somewhere += int(moved.any())
    assert moved_somewhere >= tiles  # unpadding drops some patches


def test_resized_features_take_their_marks_along():
    """LLaVA-OneVision shrinks many tiles; a mark then spreads over the positions it reaches."""
    model, processor = tiny.build("llava_onevision")
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_1"
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1, (96, 112))]])
    plain = merged_embeds(model, inputs)
    for tile, patch in ((1, 0), (2, 5), (4, 15), (0, 3)):
        moved = (disturbed_embeds(model, inputs, tile, patch) - plain).abs().amax(-1) > 1e-4
        marks = placed(model, inputs, tile, patch)
        assert torch.equal(marks > 1e-6, moved)
        assert 0 <= marks.min() <= marks.max() <= 1


def test_beams_repeat_the_marks():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    single = placed(model, inputs, 1, 3)
    Place.found.clear()
    with attach(model, Place(tile=1, patch=3)):
        checks.generate(model, inputs, do_sample=False, num_beams=3)
    assert torch.equal(Place.found[0], single.repeat_interleave(3, dim=0))
    assert single.sum() == 1


def test_merging_averages_square_blocks():
    sight = Sight(states=[], features=4)
    values = torch.arange(16.0)[None]
    # Rows of the 4 x 4 grid are 0-3, 4-7, ...; the first block holds 0, 1, 4, 5.
    assert sight.merge(values).tolist() == [[2.5, 4.5, 10.5, 12.5]]
    assert Sight(states=[], features=16).merge(values) is values
    with pytest.raises(LayoutError, match="16 patches per tile become 5 features"):
        Sight(states=[], features=5).merge(values)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(LayoutError, match="give 4 features, but the model made 5"):
        Sight(states=[], features=5).pack(torch.zeros(1, 4, 2))
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    keep = torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
    keep[(inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0]] = False
    short = {k: inputs[k][:, keep] for k in ("input_ids", "attention_mask")}
    with (
        attach(model, Place()),
        pytest.raises(LayoutError, match="16 features but the prompts hold 15 placeholders"),
    ):
        model(**short, pixel_values=inputs["pixel_values"])


@torch.no_grad()
def test_features_from_elsewhere_are_refused():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    pixels = inputs.pop("pixel_values")
    encoded = {"image": model.get_image_features(pixels, return_dict=True)}
    with attach(model, Look()):
        model(**inputs, mm_encoder_outputs=encoded)
        assert Look.found == [None]
    with (
        pytest.raises(LayoutError, match="not encoded inside this block"),
        attach(model, Placing()),
    ):
        model(**inputs, mm_encoder_outputs=encoded)


@dataclass(frozen=True, kw_only=True)
class Placing(Look):
    """Places without having seen anything."""

    def at_begin(self, prompt):
        return prompt.place(torch.zeros(1, 16, 1))


# ---- attention inside the tower ----


def eager_tower(family):
    """A model with an eager tower, its pixels, its blocks' inputs and their attention."""
    model, processor = tiny.build(family)
    anatomy = Anatomy(model)
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    entering = {}
    for number, block in enumerate(anatomy.tower_blocks):
        block.register_forward_pre_hook(
            lambda m, a, k, number=number: entering.update(
                {number: a[0] if a else k["hidden_states"]}
            ),
            with_kwargs=True,
        )
    anatomy.tower.set_attn_implementation("eager")
    pixels = inputs["pixel_values"]
    pixels = pixels[0] if pixels.ndim == 5 else pixels
    with torch.no_grad():
        attentions = anatomy.tower(pixels, output_attentions=True, return_dict=True).attentions
    return anatomy, entering, attentions


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
@torch.no_grad()
def test_class_attention_equals_the_eager_tower(family):
    anatomy, entering, attentions = eager_tower(family)
    for block, full in enumerate(attentions):
        ours = class_attention(anatomy, block, entering[block])
        torch.testing.assert_close(ours, full[:, :, 0, 1:], atol=1e-6, rtol=1e-5)
        received = attention_received(anatomy, block, entering[block])
        expected = full[:, :, 1:, 1:].mean(2)
        torch.testing.assert_close(received, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 300, 1 << 22])
@torch.no_grad()
def test_attention_received_equals_the_eager_tower_in_any_chunks(chunk, monkeypatch):
    monkeypatch.setattr(tower, "_CHUNK", chunk)
    anatomy, entering, attentions = eager_tower("llava_onevision")
    for block, full in enumerate(attentions):
        ours = attention_received(anatomy, block, entering[block])
        torch.testing.assert_close(ours, full.mean(2), atol=1e-6, rtol=1e-5)
    with pytest.raises(UnsupportedModel, match="has no class token"):
        class_attention(anatomy, 0, entering[0])


@torch.no_grad()
def test_norms_of_queries_and_keys_are_applied():
    """InternViT-6B normalises queries and keys over all heads together."""
    config = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=[56, 56],
        patch_size=[14, 14],
        use_qk_norm=True,
        norm_type="rms_norm",
        attn_implementation="eager",
        initializer_range=0.3,
    )
    model, _ = tiny.build("internvl")
    anatomy = Anatomy(model)
    model.model.vision_tower = InternVLVisionModel(config).eval()
    entering = []
    for block in anatomy.tower_blocks:
        torch.nn.init.normal_(block.attention.q_norm.weight)
        block.register_forward_pre_hook(lambda m, a: entering.append(a[0]))
    full = anatomy.tower(torch.randn(2, 3, 56, 56), output_attentions=True).attentions
    for block in range(2):
        ours = class_attention(anatomy, block, entering[block])
        torch.testing.assert_close(ours, full[block][:, :, 0, 1:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f.startswith("qwen")])
def test_towers_with_rotary_positions_are_refused_by_name(family):
    model, _ = tiny.shared(family)
    with pytest.raises(UnsupportedModel, match=r"VisionBlock\) rotate their queries and keys"):
        tower_query_key(Anatomy(model), 0, torch.zeros(1, 4, 32), slice(0, 1))


def test_a_tower_with_other_names_is_refused_by_name():
    model, _ = tiny.build("llava")
    block = Anatomy(model).tower_blocks[0]
    block.self_attn.fused = block.self_attn.q_proj
    del block.self_attn.q_proj
    with pytest.raises(UnsupportedModel, match="has no q_proj and k_proj"):
        tower_query_key(Anatomy(model), 0, torch.zeros(1, 4, 32), slice(0, 1))
    del block.layer_norm1
    with pytest.raises(UnsupportedModel, match="have no layer_norm1 or layernorm_before"):
        tower_query_key(Anatomy(model), 0, torch.zeros(1, 4, 32), slice(0, 1))


@pytest.mark.parametrize("chosen", [-2, -1, 1, 3, [1, 2], -3])
def test_the_feature_block_makes_the_features(chosen):
    model, processor = tiny.build("llava")
    anatomy = Anatomy(model)
    layers = [chosen] if isinstance(chosen, int) else chosen
    model.config.vision_feature_layer = chosen
    pixels = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])["pixel_values"]
    outputs = []
    for block in anatomy.tower_blocks:
        block.register_forward_hook(lambda m, a, out: outputs.append(out))
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    deepest = max(layers, key=lambda i: i % len(states))
    assert torch.equal(outputs[feature_block(anatomy)], states[deepest])


# ---- the same prompt, run plain; the mlp site ----


@dataclass(frozen=True, kw_only=True)
class Plain(Look):
    """Runs its prompt plain."""

    found: ClassVar[list] = []
    vision_layer = Method.vision_layer

    def at_begin(self, prompt):
        layers = tuple(range(prompt.anatomy.n_layers))
        return prompt.run(Same(), layers=layers, heads=(1,))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_same_prompt_equals_the_plain_pass(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    states = model(**inputs, output_hidden_states=True).hidden_states
    Plain.found.clear()
    with attach(model, Plain()):
        model(**inputs, output_hidden_states=True)
        checks.generate(model, inputs, do_sample=False, num_beams=2)
    called, generated = Plain.found
    for layer in range(Anatomy(model).n_layers - 1):  # the last entry is normalised
        assert torch.equal(called.layers[layer], states[layer + 1][:, -1])
        beams = called.layers[layer].repeat_interleave(2, dim=0)
        torch.testing.assert_close(generated.layers[layer], beams, atol=1e-4, rtol=1e-4)


@dataclass(frozen=True, kw_only=True)
class ScaleMLP(Scale):
    """Multiplies what one layer's MLP adds."""

    vision_layer = Method.vision_layer

    def acts_in(self, anatomy, layer):
        return layer == self.at

    def mlp(self, state, layer, y):
        return y * self.by


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_mlp_equals_a_plain_hook(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    handle = Anatomy(model).mlp(1).register_forward_hook(lambda m, a, out: out * 0.5)
    expected = checks.next_logits(model, inputs)
    handle.remove()
    with attach(model, ScaleMLP(by=0.5)):
        assert torch.equal(checks.next_logits(model, inputs), expected)


@torch.no_grad()
def test_mlp_edits_touch_the_main_rows_only():
    """Fused branch rows and rows without a picture keep their MLP."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, ScaleMLP(by=0.5), VCD()):
        fused = checks.generate(model, inputs, do_sample=False)
        separate = checks.generate(
            model, inputs, do_sample=False, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(fused, separate)
    mixed = tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(1)], []])
    plain = checks.next_logits(model, mixed)
    with attach(model, ScaleMLP(by=0.5)):
        edited = checks.next_logits(model, mixed)
    assert torch.equal(edited[1], plain[1])
    assert not torch.allclose(edited[0], plain[0], atol=1e-4)
