"""Methods that shorten the prompt beside others: as on a prompt shortened by hand, or refused."""

import functools
import itertools
import math
from contextlib import nullcontext

import checks
import crosslmm_naive
import pruning_cases
import pytest
import torch
from pruning_cases import deep, naive_pass

from decoding.act import ACT
from decoding.var import VAR
from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Anatomy, TokenLayout, attach, build_in, measured
from mmlm.errors import IncompatibleMethods
from mmlm.methods.crosslmm import CrossLMM
from mmlm.methods.dyvte import DyVTE
from mmlm.methods.flowcut import FlowCut
from mmlm.methods.mma import MMA

TARGET = 6
FLOWCUT = FlowCut(target=TARGET)
SHORTENING = {"DyVTE": DyVTE(exit_layer=1), "MMA": MMA()}
DECODING = {
    "nothing": None,
    "VHR": VHR(alpha=2.0),
    "VAR": VAR(
        move_fraction=0.9,
        min_nonsink_ratio=0.0,
        min_visual_mass=0.0,
        tau=0.9,
        sink_dims=(2, 7),
        include_last_layer=True,
    ),
    # Rows of attention in front of every removal.
    "ACT": ACT(heads_by_layer=((1, (0, 1, 2, 5)),), beta=0.1, theta=0.03),
}


@functools.cache
def shared_deep():
    model, processor = deep()
    inputs = checks.batch(processor)
    return model, inputs, shortened(model, inputs)


@torch.no_grad()
def shortened(model, inputs):
    """The prompts with the features of a tower run by hand: embeddings, mask, layout."""
    tower, rows = model.model.vision_tower, []
    image = model.config.image_token_id
    for ids, real, pixels in zip(
        inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], strict=True
    ):
        _, features, _ = naive_pass(tower, pixels, TARGET)
        visual = model.model.multi_modal_projector(features)
        ids = ids[real.bool()]
        at = (ids == image).nonzero().flatten()
        short = torch.cat([ids[: at[0] + TARGET], ids[at[-1] + 1 :]])
        embeds = model.get_input_embeddings()(short)
        embeds[at[0] : at[0] + TARGET] = visual
        rows.append((short, embeds))
    n = max(len(ids) for ids, _ in rows)
    ids, mask = torch.ones(len(rows), n, dtype=torch.long), torch.zeros(len(rows), n).long()
    embeds = torch.zeros(len(rows), n, rows[0][1].shape[-1])
    for row, (short, states) in enumerate(rows):
        ids[row, n - len(short) :] = short
        mask[row, n - len(short) :] = 1
        embeds[row, n - len(short) :] = states
    anatomy = Anatomy(model)
    layout = TokenLayout.from_ids(ids, mask, image_ids=anatomy.image_ids)
    given = {"inputs_embeds": embeds, "attention_mask": mask}
    return {**given, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}, layout


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def outcome(model, inputs, *methods, layout=None):
    """Logits, or the refusal."""
    try:
        with attach(model, *methods, layout=layout) if methods else nullcontext():
            return logits(model, inputs)
    except IncompatibleMethods as refusal:
        return refusal


@pytest.mark.filterwarnings("ignore:Several methods rewrite attention weights")
@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("names", [(), ("DyVTE",), ("MMA",), ("DyVTE", "MMA")], ids="+".join)
def test_flowcut_beside_others_equals_them_on_a_shortened_prompt(names, decoding):
    model, inputs, (short, layout) = shared_deep()
    others = [SHORTENING[name] for name in names]
    others += [DECODING[decoding]] if DECODING[decoding] is not None else []
    expected = outcome(model, short, *others, layout=layout)
    for order in itertools.permutations([FLOWCUT, *others]):
        found = outcome(model, inputs, *order)
        if isinstance(expected, IncompatibleMethods):
            assert str(found) == str(expected)
            named = [type(method).__name__ for method in others]
            assert sum(name in str(found) for name in named) >= 2
        else:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if others and not isinstance(expected, IncompatibleMethods):
        assert not torch.allclose(expected, outcome(model, short), atol=1e-3), "nothing acted"


@pytest.mark.parametrize("names", [(), ("DyVTE",), ("MMA",)], ids="+".join)
def test_a_noised_picture_has_the_same_places(names):
    """VCD's second prompt: features of the whole tower at the places that FlowCut keeps."""
    model, inputs, _ = shared_deep()
    others = [SHORTENING[name] for name in names]
    alpha = 1.0
    vcd = VCD(alpha=alpha, beta=0.0)
    with attach(model, FLOWCUT):
        logits(model, inputs)
        kept = [row["flowcut"]["kept"][0] for row in measured(model)]
    main = outcome(model, inputs, FLOWCUT, *others)
    found = outcome(model, inputs, FLOWCUT, *others, vcd)
    # What VCD takes from its noised prompt, read off from its own logits without FlowCut.
    image = model.config.image_token_id
    pixels = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda m, a: pixels.append(a[0]))
    outcome(model, inputs, vcd)
    hook.remove()
    noised = next(p for p in pixels if not torch.equal(p, inputs["pixel_values"]))
    for row, numbers in enumerate(kept):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        at = (ids == image).nonzero().flatten()
        with torch.no_grad():
            features = model.model.vision_tower(
                noised[row : row + 1], output_hidden_states=True
            ).hidden_states[-2][0, 1:]
            embeds = model.get_input_embeddings()(ids).clone()
            embeds[at] = model.model.multi_modal_projector(features)
            stays = torch.ones(len(ids), dtype=torch.bool)
            stays[at] = False
            stays[at[numbers]] = True
            short, layout = (
                embeds[stays][None],
                TokenLayout.from_ids(ids[stays][None], None, image_ids=(image,)),
            )
        # Masks hold in auxiliary prompts too; positions leave (DyVTE) in the main one only.
        masks = [method for method in others if "mask" in method.sites]
        given = {"inputs_embeds": short, "attention_mask": torch.ones(short.shape[:2]).long()}
        second = outcome(model, given, *masks, layout=layout)[0]
        expected = (1 + alpha) * main[row] - alpha * second
        torch.testing.assert_close(found[row], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_source", ["tower", "projected"])
def test_crosslmm_pools_and_looks_at_what_flowcut_leaves(kv_source):
    model, processor = deep()
    inputs = checks.batch(processor)
    method = CrossLMM(grid=2, every=2, gate=0.8, kv_source=kv_source)
    build_in(model, method)
    blocks = model.mmlm_methods["CrossLMM"]
    found = outcome(model, inputs, FLOWCUT)
    model, _ = deep()  # the same weights, without hooks
    project, image = model.model.multi_modal_projector, model.config.image_token_id
    for row, pixels in enumerate(inputs["pixel_values"]):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        at = (ids == image).nonzero().flatten()
        with torch.no_grad():
            numbers, features, _ = naive_pass(model.model.vision_tower, pixels, TARGET)
            cells = [[] for _ in range(4)]
            for number, feature in zip(numbers, features, strict=True):
                cells[number // 4 // 2 * 2 + number % 4 // 2].append(feature)
            small = [project(torch.stack(cell).mean(0)) for cell in cells if cell]
            z = features if kv_source == "tower" else project(features)
            embeds = model.get_input_embeddings()(ids)
            x = torch.cat([embeds[: at[0]], torch.stack(small), embeds[at[-1] + 1 :]])
            kinds = [-1] * int(at[0]) + [0] * len(small) + [-1] * (len(ids) - int(at[-1]) - 1)
            expected = crosslmm_naive._row(
                model, blocks, x, kinds, z, [0] * len(z), [int(at[0])], method
            )
        torch.testing.assert_close(found[row], expected, atol=1e-3, rtol=1e-3)
    assert math.isfinite(float(found.sum()))


@pytest.mark.filterwarnings("ignore:Several methods rewrite attention weights")
@pytest.mark.parametrize("decoding", ["VHR", "VAR"])
def test_crosslmm_and_flowcut_run_with_decoding_methods_or_refuse(decoding):
    model, processor = deep()
    inputs = checks.batch(processor)
    build_in(model, CrossLMM(grid=2, every=2, gate=0.8))
    plain = outcome(model, inputs, FLOWCUT)
    found = outcome(model, inputs, FLOWCUT, DECODING[decoding])
    if isinstance(found, IncompatibleMethods):
        assert decoding in str(found) or "runs an auxiliary prompt" in str(found)
        assert "CrossLMM" in str(found)
        return
    assert not torch.allclose(found, plain, atol=1e-3)
    for row in range(2):  # each row as alone
        single = pruning_cases.row_of(inputs, row)
        alone = outcome(model, single, FLOWCUT, DECODING[decoding])
        torch.testing.assert_close(alone[0], found[row], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_decoders_cut_stands_beside_an_exit(layer):
    """FlowCut cuts before layer 2; DyVTE takes the rest before a later layer, or all before it."""
    model, inputs, _ = shared_deep()
    both = FlowCut(target=9, llm_layer=1, llm_target=4)
    exit_layer = DyVTE(exit_layer=2 if layer else 1)
    with attach(model, both, exit_layer):
        tokens = checks.generate(model, inputs, do_sample=False)
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
    n = inputs["input_ids"].shape[1] - 16 + 9
    lengths = [x.keys.shape[2] for x in cache.layers]
    assert lengths == [n, n, n - 9 + (4 if layer else 0), n - 9]
    for row in range(2):
        single = pruning_cases.row_of(inputs, row)
        with attach(model, both, exit_layer):
            assert torch.equal(checks.generate(model, single, do_sample=False)[0], tokens[row])
