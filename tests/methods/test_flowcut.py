"""FlowCut: what it computes, what it keeps, and what it refuses."""

import functools
import math
import pickle

import checks
import numpy as np
import pruning_cases
import pytest
import tiny
import torch
from pruning_cases import deep, naive_pass, pictures
from shapes import assert_no_square, record_shapes
from torch.utils.flop_counter import FlopCounterMode

import mmlm
from decoding.vhr import VHR
from mmlm import Anatomy, attach, measured
from mmlm.cli.doctor import examine
from mmlm.engine import flops
from mmlm.errors import LayoutError, UnknownTower, UnsupportedModel
from mmlm.methods.flowcut import FlowCut, block_scores, drop_count
from mmlm.methods.llm_cut import keep_visual, visual_scores
from mmlm.methods.patch_scores import entropy


@functools.cache
def shared_deep():
    return deep()


def batch(processor, counts, size=(56, 56)):
    """Prompts of different length with so many pictures each, of different content."""
    own = iter(pictures(sum(counts) or 1))
    return tiny.inputs(
        processor,
        pruning_cases.PROMPTS[: len(counts)],
        [[next(own) for _ in range(n)] for n in counts],
    )


def kept(model):
    return [row["flowcut"]["kept"] for row in measured(model)]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


# ---- numbers by hand ---------------------------------------------------------------------------


def test_scores_of_a_block_by_hand():
    a = torch.tensor([[0.1, 0.3, 0.0]])
    e = torch.tensor([[0.2, 0.2, 0.4]])
    m = torch.tensor([[2.0, 1.0, 4.0]])
    expected = [[(0.25 + 0.25) * 2, (0.75 + 0.25) * 1, (0 + 0.5) * 4]]
    torch.testing.assert_close(block_scores(a, m, e), torch.tensor(expected))
    torch.testing.assert_close(block_scores(a, m, None), torch.tensor([[0.2, 0.3, 0.0]]))


def test_drops_by_hand():
    there = torch.tensor([16, 16, 16, 5])
    spread = torch.tensor([1.0, 0.5, 0.0, 0.0])
    # (16 - 6) / sqrt(4) * (1 - Hn^2) = 0, 3.75, 5; nothing is above the target in the last tile.
    assert drop_count(there, 6, 4, spread).tolist() == [0, 4, 5, 0]
    assert drop_count(there, 6, 0, spread).tolist() == [10, 10, 10, 0]
    # Half to even: (9 - 6) / sqrt(4) = 1.5 and (11 - 6) / sqrt(4) = 2.5 both give 2.
    assert drop_count(torch.tensor([9, 11]), 6, 4, torch.zeros(2)).tolist() == [2, 2]


def test_acceptance_6_entropy_takes_nothing_times_its_logarithm_as_nothing():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(entropy(p), torch.tensor([0.0, math.log(2)]))


def test_the_decoders_scores_equal_loops():
    torch.manual_seed(1)
    s, v = torch.randn(2, 4, 9), torch.randn(2, 4, 9, 6)
    visual = torch.zeros(2, 9, dtype=torch.bool)
    visual[0, [1, 2, 5, 6]] = True
    found = visual_scores(s, v, visual)
    assert bool(found[1].isinf().all())  # a row without a picture
    at = visual[0].nonzero().flatten()
    a, e = torch.zeros(4), torch.zeros(4)
    for h in range(4):
        a += s[0, h, at].softmax(0) / 4
        e += (v[0, h, at] @ v[0, h, -1] / 6**0.5).softmax(0) / 4
    expected = (a + e) * v[0].mean(0)[at].abs().sum(-1)
    torch.testing.assert_close(found[0, at], expected)
    columns, marks = keep_visual(found, visual, torch.arange(9).expand(2, -1), 2)
    best = sorted(at[expected.topk(2).indices].tolist())
    assert marks[0].nonzero().flatten().tolist() == best
    others = [i for i in range(9) if not visual[0, i]]
    assert sorted(i for i in columns[0].tolist() if i >= 0) == sorted([*best, *others])
    assert columns[1].tolist() == list(range(9))


# ---- the tower ---------------------------------------------------------------------------------


def test_several_cuts_equal_loops_and_the_decoder_sees_the_survivors_only():
    """The whole way by hand: tower, projector, a shorter prompt without gaps, its logits."""
    model, processor = shared_deep()
    inputs = batch(processor, [1, 1, 1])
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    target = 5
    with torch.no_grad():
        naive = [naive_pass(tower, pixels, target) for pixels in inputs["pixel_values"]]
    assert len({tuple(lengths) for _, _, lengths in naive}) > 1, "all pictures are alike"
    assert all(len(set(lengths)) > 3 for _, _, lengths in naive), "there is one cut only"
    with attach(model, FlowCut(target=target)):
        found = logits(model, inputs)
        assert kept(model) == [[patches] for patches, _, _ in naive]
    embed, image = model.get_input_embeddings(), model.config.image_token_id
    for row, (_, features, _) in enumerate(naive):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        at = (ids == image).nonzero().flatten()
        with torch.no_grad():
            states = embed(ids)
            visual = projector(features[None])[0]
            short = torch.cat([states[: at[0]], visual, states[at[-1] + 1 :]])
            plain = model(inputs_embeds=short[None]).logits[0, -1]
        torch.testing.assert_close(found[row], plain, atol=1e-4, rtol=1e-4)


def test_original_positions_keep_the_numbers_of_the_whole_prompt():
    model, processor = shared_deep()
    inputs = batch(processor, [1])
    target = 5
    with torch.no_grad():
        patches, features, _ = naive_pass(
            model.model.vision_tower, inputs["pixel_values"][0], target
        )
        ids = inputs["input_ids"][0]
        at = (ids == model.config.image_token_id).nonzero().flatten()
        states = model.get_input_embeddings()(ids)
        visual = model.model.multi_modal_projector(features[None])[0]
        short = torch.cat([states[: at[0]], visual, states[at[-1] + 1 :]])
        index = torch.arange(len(ids))
        places = torch.cat([index[: at[0]], at[0] + torch.tensor(patches), index[at[-1] + 1 :]])
        plain = model(
            inputs_embeds=short[None],
            attention_mask=torch.ones(1, len(short), dtype=torch.long),
            position_ids=places[None],
        ).logits[0, -1]
    with attach(model, FlowCut(target=target, positions="original")):
        torch.testing.assert_close(logits(model, inputs)[0], plain, atol=1e-4, rtol=1e-4)
    with attach(model, FlowCut(target=target)):
        assert not torch.allclose(logits(model, inputs)[0], plain, atol=1e-3)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_decoding_goes_on_from_the_last_position(positions):
    """What generate decodes step by step equals whole passes over the longer and longer prompt."""
    model, processor = shared_deep()
    inputs = batch(processor, [1, 2])
    with attach(model, FlowCut(target=5, positions=positions)):
        tokens = checks.generate(model, inputs, do_sample=False)
        for step in range(4):
            longer = dict(inputs)
            longer["input_ids"] = torch.cat([inputs["input_ids"], tokens[:, :step]], 1)
            longer["attention_mask"] = torch.cat(
                [inputs["attention_mask"], torch.ones_like(tokens[:, :step])], 1
            )
            assert torch.equal(logits(model, longer).argmax(-1), tokens[:, step])


@pytest.mark.parametrize("target", [16, 17, 1000])
def test_acceptance_2_enough_patches_change_nothing(target):
    model, processor = shared_deep()
    inputs = batch(processor, [1, 2])
    plain = logits(model, inputs)
    tokens = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    seen = []
    tower = model.model.vision_tower
    with torch.no_grad():
        before = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    with attach(model, FlowCut(target=target)):
        hook = tower.register_forward_hook(lambda m, a, out: seen.append(out))
        assert torch.equal(logits(model, inputs), plain)
        again = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        hook.remove()
    assert torch.equal(again, tokens)
    for a, b in zip(seen[0].hidden_states, before.hidden_states, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_acceptance_3_a_picture_keeps_the_same_alone_and_in_a_batch_of_eight():
    model, processor = shared_deep()
    own = pictures(8)
    prompts = ["describe the image in detail ."] * 8
    with attach(model, FlowCut(target=5)):
        logits(model, tiny.inputs(processor, prompts, [[p] for p in own]))
        together = kept(model)
        alone = []
        for picture in own:
            logits(model, tiny.inputs(processor, prompts[:1], [[picture]]))
            alone += kept(model)
    assert together == alone
    with attach(model, FlowCut(target=5, batch="coupled")):
        logits(model, tiny.inputs(processor, prompts, [[p] for p in own]))
        assert kept(model) != alone


def test_acceptance_4_nothing_is_left_behind_and_models_do_not_meet():
    a, processor = shared_deep()
    b, _ = deep(seed=1)
    inputs = batch(processor, [1, 1])
    plain = [logits(model, inputs) for model in (a, b)]
    with attach(a, FlowCut(target=5)):
        one = logits(a, inputs)
        assert torch.equal(logits(b, inputs), plain[1])
        with attach(b, FlowCut(target=9)):
            other = logits(b, inputs)
            assert [len(tiles[0]) for tiles in kept(b)] == [9, 9]
            assert torch.equal(logits(a, inputs), one)
            assert [len(tiles[0]) for tiles in kept(a)] == [5, 5]
    with attach(b, FlowCut(target=9)):
        assert torch.equal(logits(b, inputs), other)
    for model, before in zip((a, b), plain, strict=True):
        assert torch.equal(logits(model, inputs), before)


def test_acceptance_5_no_matrix_of_patches_is_made_in_the_tower():
    cls, config, _ = tiny._llava(2)
    config.vision_config.num_hidden_layers = 6
    config.vision_config.image_size = 14 * 15  # 225 patches, more than any width
    model = cls(config).eval()
    pixels = torch.randn(3, 3, 210, 210)
    pixels[1] *= 0.01
    with torch.no_grad(), attach(model, FlowCut(target=30)), record_shapes() as shapes:
        model.model.get_image_features(pixels)
    assert_no_square(shapes, 100)
    assert any(shape[1] == 31 for _, shape, _ in shapes if len(shape) == 3)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_acceptance_6_attention_that_underflows(scale):
    model, processor = deep()
    inputs = batch(processor, [1, 1])
    for block in model.model.vision_tower.encoder.layers:
        for name in ("q_proj", "k_proj"):
            with torch.no_grad():
                getattr(block.self_attn, name).weight.mul_(scale)
                getattr(block.self_attn, name).bias.mul_(scale)
    with attach(model, FlowCut(target=5)):
        assert bool(logits(model, inputs).isfinite().all())
        assert [len(tiles[0]) for tiles in kept(model)] == [5, 5]


def test_acceptance_6_counts_are_those_of_a_limit():
    """All attention on one patch has entropy 0: the count is (N - K) / sqrt(R), by hand."""
    p = torch.zeros(1, 10)
    p[0, 3] = 1
    spread = entropy(p) / math.log(10)
    assert drop_count(torch.tensor([10]), 2, 4, spread).tolist() == [4]


def test_acceptance_7_left_padded_rows_with_none_one_and_two_pictures_equal_single_ones():
    model, processor = shared_deep()
    counts = [0, 1, 2]
    inputs = batch(processor, counts)
    own = iter(pictures(3))
    singles = [
        tiny.inputs(processor, [text], [[next(own) for _ in range(n)]])
        for text, n in zip(pruning_cases.PROMPTS, counts, strict=True)
    ]
    for method in (
        FlowCut(target=5),
        FlowCut(target=9, llm_layer=1, llm_target=6),
        FlowCut(target=9, llm_layer=1, llm_target=6, positions="original"),
    ):
        with attach(model, method):
            together = checks.generate(model, inputs, do_sample=False)
            rows = kept(model)
            assert [len(tiles) for tiles in rows] == counts
            for row, single in enumerate(singles):
                assert torch.equal(
                    checks.generate(model, single, do_sample=False)[0], together[row]
                )
                assert kept(model) == [rows[row]]


# ---- the decoder's cut --------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_acceptance_8_caches_are_shorter_behind_the_cut(positions):
    model, processor = shared_deep()
    inputs = batch(processor, [1, 1])
    method = FlowCut(target=9, llm_layer=1, llm_target=4, positions=positions)
    n = inputs["input_ids"].shape[1]
    with torch.no_grad(), attach(model, method):
        cache = model(**inputs, use_cache=True).past_key_values
        lengths = [layer.keys.shape[2] for layer in cache.layers]
    entered = n - 16 + 9
    assert lengths == [entered, entered, entered - 9 + 4, entered - 9 + 4]
    single = {k: v[:1] for k, v in inputs.items()}
    with attach(model, method):
        together = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        alone = model.generate(**single, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(together[0], alone[0])


def test_the_decoders_cut_in_the_second_layer_equals_layers_run_by_hand():
    """Compact positions: layers behind the cut run on the survivors as on a prompt of their own."""
    model, processor = shared_deep()
    inputs = batch(processor, [1])
    target, text = 4, model.model.language_model
    with torch.no_grad(), attach(model, FlowCut(target=9, llm_layer=1, llm_target=target)):
        found = model(**inputs).logits[0, -1]
        chosen = measured(model)[0]["flowcut"]["llm_kept"]
    seen = []
    with torch.no_grad(), attach(model, FlowCut(target=9)):
        hook = text.layers[1].register_forward_hook(lambda m, a, out: seen.append(out))
        model(**inputs)
        hook.remove()
    begin = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    x = seen[0]
    columns = [*range(begin), *[begin + i for i in chosen], *range(begin + 9, x.shape[1])]
    x = x[:, columns]
    with torch.no_grad():
        pair = text.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in text.layers[2:]:
            x = layer(x, attention_mask=None, position_embeddings=pair)
        plain = model.lm_head(text.norm(x))[0, -1]
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-4)


def test_a_decoder_target_above_what_entered_cuts_nothing():
    model, processor = shared_deep()
    inputs = batch(processor, [1, 2])
    with attach(model, FlowCut(target=9)):
        plain = logits(model, inputs)
    with attach(model, FlowCut(target=9, llm_layer=1, llm_target=18)):
        torch.testing.assert_close(logits(model, inputs), plain, atol=1e-5, rtol=1e-5)
        assert "llm_kept" in measured(model)[0]["flowcut"]
    with attach(model, FlowCut(target=9, llm_layer=1, llm_target=17)):
        changed = logits(model, inputs)
    torch.testing.assert_close(changed[0], plain[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed[1], plain[1], atol=1e-4)


def test_acceptance_9_operations_are_those_of_the_model():
    model, processor = deep()
    model.set_attn_implementation("eager")
    inputs = batch(processor, [1])
    n = inputs["input_ids"].shape[1]
    text, vision = model.config.text_config, model.config.vision_config
    lengths = [n - 16 + 9] * 2 + [n - 16 + 4] * 2
    with torch.no_grad(), attach(model, FlowCut(target=9, llm_layer=1, llm_target=4)):
        _, _, patches = naive_pass(model.model.vision_tower, inputs["pixel_values"][0], 9)
        with FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
    d, size, width = vision.hidden_size, vision.intermediate_size, text.hidden_size
    tower = 2 * 16 * 3 * 14 * 14 * d  # the convolution
    there = 17
    for left in patches:  # a block runs on what the one before left
        tower += 2 * there * (4 * d * d + 2 * d * size) + 4 * there * there * d
        if there > 10:
            tower += 2 * 2 * there * d  # the class token's two rows
        there = 1 + left
    projector = 2 * 9 * (d * width + width * width)
    # The decoder's cut scores with one row of values; its row of scores is the kernel's again.
    rows = 2 * 2 * (n - 16 + 9) * width
    expected = tower + projector + rows + flops.prefill(text, lengths)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


# ---- families ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "qwen3_vl"])
def test_units_stay_whole(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    with attach(model, FlowCut(target=8)):
        logits(model, inputs)
        rows = kept(model)
    anatomy = Anatomy(model)
    for tiles in rows:
        for patches in tiles:
            assert len(patches) == 8
            if hasattr(anatomy.tower, "spatial_merge_size"):  # units stand together
                assert all(p // 4 * 4 in patches and p // 4 * 4 + 3 in patches for p in patches)
            else:
                units = anatomy.feature_of_patch(torch.tensor(patches), 16).tolist()
                assert all(units.count(u) == 4 for u in units)


def test_qwen_windows_equal_masks_over_all_patches():
    """Blocks with windows on survivors equal full attention under a mask, block by block."""
    model, processor = tiny.build("qwen2_5_vl")
    inputs = tiny.inputs(processor, ["what is shown ?"], [[tiny.picture(3, (112, 84))]])
    tower = model.model.visual
    tower.fullatt_block_indexes = [0, 2]  # a cut inside, then a block with windows
    pruning_cases.sharpen(tower.blocks, "attn", ("qkv",), by=4.0)
    target = 8
    made, seen = [], {}
    hooks = [
        tower.merger.register_forward_hook(lambda m, a, out: made.append(out)),
        tower.blocks[0].register_forward_pre_hook(
            lambda m, a, k: seen.update(x=a[0], pair=k["position_embeddings"]), with_kwargs=True
        ),
        tower.blocks[1].register_forward_pre_hook(
            lambda m, a, k: seen.update(windows=k["cu_seqlens"]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(**inputs)  # without a method: what enters, and the windows
    x, (cosine, sine), windows = seen["x"], seen["pair"], seen["windows"].clone()
    hooks[2].remove()
    method = FlowCut(target=target)
    with torch.no_grad(), attach(model, method):
        plain_features = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"]
        ).pooler_output[0]
    for hook in hooks[:2]:
        hook.remove()
    n = x.shape[0]
    alive, running = torch.ones(n, dtype=torch.bool), None
    segment = torch.bucketize(torch.arange(n), windows[1:].long(), right=True)
    with torch.no_grad():
        for number, block in enumerate(tower.blocks):
            q, k, v = block.attn.qkv(block.norm1(x)).view(n, 3, 4, 8).unbind(1)
            q, k = (
                y * cosine[:, None] + torch.cat([-y[..., 4:], y[..., :4]], -1) * sine[:, None]
                for y in (q, k)
            )
            whole = number in (0, 2)
            together = torch.ones(n, n).bool() if whole else segment[:, None] == segment
            s = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
            s = s.masked_fill(~(together & alive), -torch.inf)
            y = torch.einsum("hqk,khd->qhd", s.softmax(-1).nan_to_num(), v)
            if whole:
                a = torch.einsum("hd,khd->hk", q[alive].mean(0), k) / 8**0.5
                a = a.masked_fill(~alive, -torch.inf).softmax(-1).mean(0)
                score = a * v.mean(1).abs().sum(-1)
                running = score if running is None else 0.5 * running + 0.5 * score
            x = x + block.attn.proj(y.flatten(1))
            x = x + block.mlp(block.norm2(x))
            if whole:
                left, there = 2 - number, int(alive.sum())
                h = -(a[alive] * (a[alive] + 1e-7).log()).sum() / math.log(there)
                drop = (there - target) // 4
                if left:
                    drop = round(float((there - target) / 4 / left**0.5 * (1 - h**2)))
                units = torch.where(alive, running, 0).view(-1, 4).sum(-1)
                units = units.masked_fill(~alive.view(-1, 4)[:, 0], -torch.inf)
                best = units.topk(there // 4 - drop).indices
                alive = torch.zeros(n // 4).bool().index_fill(0, best, True).repeat_interleave(4)
                assert left == 0 or target < int(alive.sum()) < n
        merged = tower.merger(x[alive])
    order = torch.zeros(n // 4, merged.shape[-1])
    order[alive.view(-1, 4)[:, 0]] = merged
    found = plain_features[plain_features.abs().sum(-1) > 0]
    # The tower sorts features out of their windows again, so the sets are compared row by row.
    assert len(found) == target // 4
    distance = (found[:, None] - merged[None]).abs().amax(-1).amin(-1)
    assert float(distance.max()) < 1e-4


@pytest.mark.parametrize(("newline", "ends"), [("line", "some"), ("authors", "none")])
def test_line_ends_of_tiled_pictures(newline, ends):
    model, processor = tiny.shared("llava_next")
    inputs = tiny.inputs(processor, ["what is shown ?"], [[tiny.picture(1, (100, 100))]])
    n = inputs["input_ids"].shape[1]
    entered = []
    with torch.no_grad(), attach(model, FlowCut(target=2, newline=newline)):
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a: entered.append(a[0].shape[1])
        )
        model(**inputs)
        hook.remove()
        tiles = kept(model)[0]
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    stayed = entered[0] - (n - visual) - sum(len(patches) for patches in tiles)
    # Five tiles, four in a grid of 8 x 8: a line of it stays if any of its two tiles keeps a patch.
    lines = {(tile - 1) // 2 * 4 + p // 4 for tile in range(1, 5) for p in tiles[tile]}
    assert len(tiles) == 5
    assert stayed == (len(lines) if ends == "some" else 0)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_videos_are_left_as_they_are(family):
    model, processor = tiny.shared(family)
    frames = np.stack([np.asarray(tiny.picture(i, (56, 56))) for i in range(4)])
    video = processor.video_token
    text = video if family == "llava_onevision" else f"<|vision_start|>{video}<|vision_end|>"
    inputs = processor(text=[f"look {text} what is it"], videos=[frames], return_tensors="pt")
    plain = logits(model, inputs)
    with attach(model, FlowCut(target=4)):
        assert torch.equal(logits(model, inputs), plain)
        assert kept(model) == [[]]


def test_resized_features_are_means_of_what_is_left():
    """OneVision shrinks large pictures: zeros of patches that left must not darken the others."""
    model, processor = tiny.build("llava_onevision")
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_1"
    inputs = tiny.inputs(processor, ["what is shown ?"], [[tiny.picture(1, (112, 112))]])
    with torch.no_grad():  # one projected feature for all patches: every mean is that feature
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.zero_()
        model.model.multi_modal_projector.linear_2.bias.copy_(torch.arange(64.0))
    entered = []
    with torch.no_grad(), attach(model, FlowCut(target=6)):
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a: entered.append(a[0])
        )
        model(**inputs)
        hook.remove()
    own = (entered[0] - torch.arange(64.0)).abs().amax(-1)[0] < 1e-3
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    ends = (entered[0] - model.model.image_newline).abs().amax(-1)[0] < 1e-6
    text = inputs["input_ids"].shape[1] - visual
    assert int(own.sum()) > 6
    assert int(own.sum()) + int(ends.sum()) + text == entered[0].shape[1] < visual + text


def test_blocks_of_two_by_two_leave_together():
    model, processor = shared_deep()
    with attach(model, FlowCut(target=8, unit=4)):
        logits(model, batch(processor, [1, 1]))
        rows = kept(model)
    for ((patches,),) in zip(rows, strict=True):
        corners = {p // 4 // 2 * 2 + p % 4 // 2 for p in patches}
        assert len(patches) == 8
        assert len(corners) == 2


def test_a_class_token_among_the_features_stays():
    cls, config, processor = tiny._llava(2)
    config.vision_config.num_hidden_layers = 5
    config.vision_feature_select_strategy = "full"
    processor.vision_feature_select_strategy = "full"
    torch.manual_seed(0)
    model = cls(config).eval()
    inputs = batch(processor, [1])
    entered = []
    with torch.no_grad(), attach(model, FlowCut(target=5)):
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a: entered.append(a[0].shape[1])
        )
        model(**inputs)
        hook.remove()
        assert [len(tiles[0]) for tiles in kept(model)] == [5]
    assert entered == [inputs["input_ids"].shape[1] - 16 + 5]


def test_beams_report_what_their_row_kept():
    model, processor = shared_deep()
    inputs = batch(processor, [1, 2])
    with attach(model, FlowCut(target=5)):
        logits(model, inputs)
        once = kept(model)
        model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        assert kept(model) == [once[0], once[0], once[1], once[1]]


def test_built_in_it_does_the_same_and_goes_with_the_model():
    plain, processor = shared_deep()
    inputs = batch(processor, [1, 2])
    with attach(plain, FlowCut(target=5)):
        expected = logits(plain, inputs)
    model = mmlm.build_in(deep()[0], FlowCut(target=5))
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(twin, inputs), expected)
    with attach(model, VHR()):  # auxiliary prompts beside a built-in method of the tower
        assert not torch.allclose(logits(model, inputs), expected, atol=1e-3)


# ---- training ----------------------------------------------------------------------------------


def test_gradients_reach_the_pixels_and_the_weights_through_what_is_kept():
    model, processor = deep()
    inputs = batch(processor, [1, 1])
    inputs["pixel_values"].requires_grad_()
    with attach(model, FlowCut(target=5)):
        model(**inputs).logits[:, -1].square().sum().backward()
    assert bool(inputs["pixel_values"].grad.isfinite().all())
    blocks = model.model.vision_tower.encoder.layers
    assert all(float(block.mlp.fc1.weight.grad.abs().sum()) > 0 for block in blocks[:-1])
    assert blocks[-1].mlp.fc1.weight.grad is None  # behind the features nothing runs


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_gradient_checkpointing_repeats_the_selection(family, reentrant):
    """Blocks run again in the backward pass lose what they lost; nothing is chosen anew."""
    if family == "llava":
        model, processor = deep()
    else:
        model, processor = tiny.build(family)
        pruning_cases.sharpen(model.model.visual.blocks, "attn", ("qkv",), by=4.0)
    inputs = checks.batch(processor)
    other = tiny.inputs(processor, ["what is shown ?"], [[tiny.picture(9)]])
    method, found = FlowCut(target=8), []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        with attach(model, method):
            # Two passes before one backward, as trainers of preferences do.
            losses = [
                model(**given, use_cache=False).logits[:, -1].float().square().mean()
                for given in (inputs, other)
            ]
            sum(losses).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    tower = [n for n in found[0] if "vision_tower" in n or "visual" in n]
    assert tower
    # A reentrant checkpoint gives the very first block's input no gradient, but weights get theirs.
    for name in tower:
        if name in found[1] or not reentrant:
            torch.testing.assert_close(found[1][name], found[0][name], atol=1e-5, rtol=1e-4)
    assert sum(name in found[1] for name in tower) > len(tower) // 2


# ---- refusals: one test per row of the table ---------------------------------------------------


@pytest.mark.parametrize("target", [0, -3, 2.5, "64", None, True])
def test_error_target_must_be_a_positive_integer(target):
    with pytest.raises(ValueError, match=r"target must be an integer >= 1, got"):
        FlowCut(target=target)


def test_error_an_unknown_tower_is_named():
    model, _ = tiny.build("llava")
    for block in model.model.vision_tower.encoder.layers:
        block.self_attn.queries = block.self_attn.q_proj
        del block.self_attn.q_proj
    with (
        pytest.raises(NotImplementedError, match="CLIPVisionModel") as caught,
        attach(model, FlowCut(target=5)),
    ):
        pass
    assert isinstance(caught.value, UnknownTower)


def test_a_doctor_tells_of_an_unknown_tower_and_goes_on():
    model, processor = tiny.build("llava")
    for block in model.model.vision_tower.encoder.layers:
        del block.self_attn.q_proj
    found = examine(model, processor)["methods"]
    assert "CLIPVisionModel" in found["FlowCut"][0]
    assert found["VHR"] == []


def test_error_tiled_pictures_without_their_sizes():
    model, processor = tiny.shared("llava_next")
    inputs = checks.batch(processor)
    del inputs["image_sizes"]
    with (
        attach(model, FlowCut(target=5)),
        pytest.raises(ValueError, match="image_sizes is missing"),
    ):
        model(**inputs)
    with attach(model, FlowCut(target=5)), pytest.raises(LayoutError, match="image_sizes"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("layers", [[-2, 1], [1, 3, -2]])
def test_error_features_read_before_the_last_cut(layers):
    model, _ = deep()
    model.config.vision_feature_layer = layers
    with pytest.raises(ValueError, match="before the last cut"), attach(model, FlowCut(target=5)):
        pass


def test_features_of_several_layers_behind_the_last_cut_are_read():
    cls, config, processor = tiny._llava(2)
    config.vision_config.num_hidden_layers = 6
    config.vision_feature_layer = [-3, -2]
    torch.manual_seed(0)
    model = cls(config).eval()
    inputs = batch(processor, [1, 1])
    with attach(model, FlowCut(target=5)):
        assert bool(logits(model, inputs).isfinite().all())
        assert [len(tiles[0]) for tiles in kept(model)] == [5, 5]


def test_error_unit_of_four_needs_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        FlowCut(target=10, unit=4)
    model, _ = tiny.shared("internvl")
    with (
        pytest.raises(ValueError, match="must be a multiple of 4, got 10"),
        attach(model, FlowCut(target=10)),
    ):
        pass


@pytest.mark.parametrize(("family", "bad"), [("llava", 1), ("llava_next", 1), ("qwen2_5_vl", 1)])
def test_error_states_that_are_not_finite_name_their_picture(family, bad):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    pixels = inputs["pixel_values"]
    if family == "qwen2_5_vl":
        pixels[int(inputs["image_grid_thw"][0].prod()) :] = torch.nan
    else:
        pixels[bad] = torch.nan
    with attach(model, FlowCut(target=4)), pytest.raises(FloatingPointError, match=r"image 1 "):
        model(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llm_layer": 1}, "together"),
        ({"llm_target": 5}, "together"),
        ({"llm_layer": -1, "llm_target": 5}, "llm_layer must be an integer >= 0"),
        ({"llm_layer": 1, "llm_target": 0}, "llm_target must be an integer >= 1"),
        ({"positions": "new"}, "positions must be one of"),
        ({"batch": "all"}, "batch must be one of"),
        ({"unit": 2}, "unit must be one of"),
        ({"newline": "all"}, "newline must be one of"),
    ],
)
def test_error_parameters_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FlowCut(**options)


@pytest.mark.parametrize(
    ("family", "options", "kind", "message"),
    [
        ("qwen2_5_vl", {"positions": "compact"}, UnsupportedModel, "cannot be renumbered"),
        ("gemma3", {"positions": "compact"}, UnsupportedModel, "cannot be renumbered"),
        ("qwen2_5_vl", {"unit": 1}, UnsupportedModel, "unit=1 would break"),
        ("internvl", {"unit": 1}, UnsupportedModel, "unit=1 would break"),
        ("llava", {"llm_layer": 3, "llm_target": 2}, ValueError, "no layer behind the cut"),
    ],
)
def test_error_what_a_model_cannot_have(family, options, kind, message):
    model, _ = tiny.shared(family)
    with pytest.raises(kind, match=message), attach(model, FlowCut(target=8, **options)):
        pass


def test_a_layer_asked_for_in_the_call_is_refused():
    model, processor = shared_deep()
    inputs = batch(processor, [1])
    with (
        attach(model, FlowCut(target=5)),
        pytest.raises(LayoutError, match="layer -1 are asked for"),
    ):
        model(**inputs, vision_feature_layer=-1)


def test_its_text_is_a_call():
    method = FlowCut(target=64, llm_layer=1, llm_target=32, unit=4, newline="authors")
    assert mmlm.parse_method(method.text) == method
