"""FlowCut and ClsPruner against vectors that the authors' own code made."""

import re

import pruning_cases
import pytest
import torch
from golden import golden

from mmlm import TokenLayout, attach, measured
from mmlm.methods.cls_pruner import ClsPruner
from mmlm.methods.flowcut import FlowCut
from mmlm.methods.patch_scores import attention_row

KERNELS = ["sdpa", "eager"]


def cases(arrays, pattern):
    """Groups of a pattern's matches among names of arrays."""
    return sorted({m.groups() for name in arrays if (m := re.fullmatch(pattern, name))})


@pytest.mark.golden
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("path", golden("flowcut/clip_*.npz"))
def test_acceptance_1_clip_keeps_what_the_authors_keep(path, kernel):
    config, weights, arrays = pruning_cases.read(path)
    model, run = pruning_cases.around_clip(config, weights, kernel)
    pixels, found = arrays["pixel_values"], cases(arrays, r"k(\d+)_(single\d+|batch)_keep_idx")
    assert found
    for budget, which in found:
        given = pixels if which == "batch" else pixels[int(which[6:]) :][:1]
        own = {k.removeprefix(f"k{budget}_{which}_"): v for k, v in arrays.items()}
        with attach(model, FlowCut(target=int(budget), batch="coupled")):
            kept, features, lengths = run(given)
        assert torch.equal(kept, own["keep_idx"])
        index = kept[..., None].expand(-1, -1, features.shape[-1])
        torch.testing.assert_close(features.gather(1, index), own["features"], atol=2e-3, rtol=0)
        # The last block is not run: it hands on what the one before made.
        assert lengths == own["seq_len_hidden_states"][1:].tolist()


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("flowcut/clip_*.npz"))
def test_acceptance_1_clip_alone_is_the_same_in_both_modes(path):
    config, weights, arrays = pruning_cases.read(path)
    model, run = pruning_cases.around_clip(config, weights, "sdpa")
    for budget, number in cases(arrays, r"k(\d+)_single(\d+)_keep_idx"):
        with attach(model, FlowCut(target=int(budget))):
            kept, _, _ = run(arrays["pixel_values"][int(number) :][:1])
        assert torch.equal(kept, arrays[f"k{budget}_single{number}_keep_idx"])


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("flowcut/clip_*.npz"))
def test_acceptance_3_coupled_batches_differ_where_the_authors_do(path):
    config, weights, arrays = pruning_cases.read(path)
    model, run = pruning_cases.around_clip(config, weights, "sdpa")
    for (budget,) in cases(arrays, r"singles_equal_batch_k(\d+)"):
        same = arrays[f"singles_equal_batch_k{budget}"]
        alone = torch.cat([arrays[f"k{budget}_single{i}_keep_idx"] for i in range(len(same))])
        with attach(model, FlowCut(target=int(budget))):
            independent, _, _ = run(arrays["pixel_values"])
        with attach(model, FlowCut(target=int(budget), batch="coupled")):
            coupled, _, _ = run(arrays["pixel_values"])
        assert torch.equal(independent, alone)
        assert torch.equal((coupled == alone).all(-1), same)


def stage(path, kernel, positions):
    """The decoder's cut on golden embeddings: states, cache, records, and two steps."""
    config, weights, arrays = pruning_cases.read(path)
    layer, target = int(arrays["prune_layer"]), int(arrays["target_num"])
    model = pruning_cases.around_llama(config, weights)
    model.set_attn_implementation(kernel)
    embeds = arrays["inputs_embeds"]
    rows, length = embeds.shape[:2]
    begin = int(arrays["visual_start"])
    ids = torch.ones(rows, length, dtype=torch.long)
    ids[:, begin : begin + int(arrays["visual_num"])] = 31
    layout = TokenLayout.from_ids(ids, None, image_ids=(31,))
    method = FlowCut(target=10**6, llm_layer=layer, llm_target=target, positions=positions)
    states = []
    hook = model.model.language_model.norm.register_forward_hook(
        lambda m, a, out: states.append(out)
    )
    with torch.no_grad(), attach(model, method, layout=layout):
        output = model(inputs_embeds=embeds, use_cache=True)
        cache, record = output.past_key_values, measured(model)
        lengths = [[layer.keys.shape[2] for layer in cache.layers]]
        keys = cache.layers[-1].keys.clone()
        step = 0
        while f"step{step}_embeds" in arrays:
            model(
                inputs_embeds=arrays[f"step{step}_embeds"],
                past_key_values=cache,
                position_ids=torch.full((rows, 1), length + step),
                use_cache=True,
            )
            lengths.append([layer.keys.shape[2] for layer in cache.layers])
            step += 1
    hook.remove()
    return arrays, record, states, lengths, keys


@pytest.mark.golden
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("path", golden("flowcut/llm_stage_*.npz"))
def test_acceptance_1_the_decoders_cut_is_the_authors(path, kernel):
    arrays, record, states, lengths, keys = stage(path, kernel, "compact")
    found = torch.tensor([row["flowcut"]["llm_kept"] for row in record])
    assert torch.equal(found, arrays["keep_idx"])
    expected = arrays["prefill_last_hidden_state"]
    torch.testing.assert_close(states[0][:, -expected.shape[1] :], expected, atol=1e-4, rtol=0)
    assert lengths[0] == arrays["kv_len_after_prefill"].tolist()
    torch.testing.assert_close(keys, arrays["k_cache_last_layer"], atol=1e-4, rtol=0)
    for step in range(len(lengths) - 1):
        expected = arrays[f"step{step}_last_hidden_state"]
        torch.testing.assert_close(states[step + 1], expected, atol=1e-4, rtol=0)
        assert lengths[step + 1] == arrays[f"step{step}_kv_len"].tolist()


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("flowcut/llm_stage_*.npz"))
def test_original_positions_choose_the_same_and_compute_others(path):
    arrays, record, _, _, keys = stage(path, "sdpa", "original")
    found = torch.tensor([row["flowcut"]["llm_kept"] for row in record])
    assert torch.equal(found, arrays["keep_idx"])  # scored before anything is renumbered
    assert not torch.allclose(keys, arrays["k_cache_last_layer"], atol=1e-2)


@pytest.mark.golden
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("path", golden("flowcut/qwen2vl_vit_*.npz"))
def test_acceptance_1_qwen_keeps_what_the_authors_keep(path, kernel):
    config, weights, arrays = pruning_cases.read(path)
    model = pruning_cases.around_qwen(config, weights, kernel)
    grid, unit = arrays["grid_thw"], config["spatial_merge_size"] ** 2
    features = int(grid.prod()) // unit
    ids = torch.tensor([[33, *[31] * features, 34, 1]])
    found = cases(arrays, r"t(\d+)_kept_patch_idx")
    assert found
    for (budget,) in found:
        expected = arrays[f"t{budget}_merged"]
        made = []
        with (
            torch.no_grad(),
            attach(model, FlowCut(target=2 * unit * int(budget), unit=1, batch="coupled")),
        ):
            hook = model.model.language_model.register_forward_pre_hook(
                lambda m, a, k, made=made: made.append(k["inputs_embeds"]), with_kwargs=True
            )
            model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == 31).int(),
                pixel_values=arrays["pixel_values"],
                image_grid_thw=grid,
            )
            kept = pruning_cases.kept(model)
            hook.remove()
        assert kept[0].tolist() == arrays[f"t{budget}_kept_patch_idx"].tolist()
        visual = made[0][0, 1 : 1 + len(expected)]
        torch.testing.assert_close(visual, expected, atol=1e-4, rtol=0)


@pytest.mark.golden
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("path", golden("fastervlm/fastervlm_*.npz"))
def test_dominance_acceptance_5_masks_attention_and_features(path, kernel, monkeypatch):
    config, weights, arrays = pruning_cases.read(path)
    model, run = pruning_cases.around_clip(config, weights, kernel)
    seen = []

    def noted(look):
        seen.append(attention_row(look))
        return seen[-1]

    monkeypatch.setattr("mmlm.methods.cls_pruner.attention_row", noted)
    found = cases(arrays, r"k(\d+)_mask")
    assert found
    for (budget,) in found:
        mask = arrays[f"k{budget}_mask"]
        with attach(model, ClsPruner(keep=int(budget))):
            kept, features, _ = run(arrays["pixel_values"])
        assert torch.equal(torch.zeros_like(mask).scatter(1, kept, True), mask)
        torch.testing.assert_close(seen[-1], arrays["cls_attention"], atol=1e-4, rtol=0)
        expected = arrays["features"] * mask[..., None]
        torch.testing.assert_close(features, expected, atol=2e-3, rtol=0)
