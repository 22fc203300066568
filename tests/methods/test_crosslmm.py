"""CrossLMM: pooled tokens in the decoder, cross-attention to the unpooled ones."""

import itertools

import checks
import crosslmm_naive as naive
import pytest
import tiny
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from mmlm import attach, build_in
from mmlm.engine.attach import MARK
from mmlm.engine.build_in import take_out
from mmlm.methods.cross_blocks import CrossAttention, Shape, Store, cross_attend
from mmlm.methods.cross_state import seen_by_visual
from mmlm.methods.crosslmm import CrossLMM, pool_grid

WITHOUT = {"v2v": False, "t2v": False}


def greedy(model, inputs, n=20, **options):
    ids = model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, **options)
    return ids[:, inputs["input_ids"].shape[1] :]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def written(processor, texts, pictures):
    """A batch whose texts say where the pictures stand."""
    return dict(
        processor(
            text=texts, images=pictures, padding=True, return_tensors="pt", padding_side="left"
        )
    )


# ---- acceptance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_1_closed_gates_equal_the_model_on_pooled_tokens(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    with attach(model, CrossLMM(grid=1, every=1, **WITHOUT)):
        plain, tokens = logits(model, inputs), greedy(model, inputs)
    with attach(model, CrossLMM(grid=1, every=1)):
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(greedy(model, inputs), tokens)
    with attach(model, CrossLMM(grid=1, every=1, gate=0.5)):
        assert not torch.allclose(logits(model, inputs)[:, -1], plain[:, -1], atol=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_2_whole_grid_and_closed_gates_equal_the_base_model(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    plain, tokens = logits(model, inputs), greedy(model, inputs)
    method = CrossLMM(grid=0, every=1)
    with attach(model, method):
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(greedy(model, inputs), tokens)
    if family in ("llava", "llava_next"):  # the same by its number
        with attach(model, CrossLMM(grid=4, every=1, newline="keep")):
            assert torch.equal(logits(model, inputs), plain)


def test_acceptance_3_pooling_is_the_mean_of_windows():
    x = torch.randn(2, 27, 27, 5)
    means = torch.stack(
        [
            torch.stack(
                [x[:, 9 * i : 9 * i + 9, 9 * j : 9 * j + 9].mean((1, 2)) for j in range(3)], 1
            )
            for i in range(3)
        ],
        1,
    )
    torch.testing.assert_close(pool_grid(x, 3), means, atol=1e-6, rtol=0)
    for mode in ("average", "bilinear"):
        flat = torch.full((1, 24, 24, 3), 0.7)
        torch.testing.assert_close(pool_grid(flat, 4, mode), torch.full((1, 4, 4, 3), 0.7))
    # 2 x 2 from 3 x 3 by hand: bilinear takes (0.25, 1.75), windows overlap by the middle line.
    line = torch.tensor([1.0, 2.0, 4.0]).repeat(3, 1)[None, ..., None]
    torch.testing.assert_close(pool_grid(line, 2)[0, 0, :, 0], torch.tensor([1.5, 3.0]))
    torch.testing.assert_close(
        pool_grid(line, 2, "bilinear")[0, 0, :, 0], torch.tensor([1.25, 3.5])
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("masked", ["nothing", "keys", "rows"])
def test_acceptance_4_one_block_equals_a_plain_reference(kv_heads, masked):
    shape = Shape(width=24, heads=4, kv_heads=kv_heads, head_dim=5, bias=True, out_bias=True)
    block = CrossAttention(shape, 14, eps=1e-6, std=0.3, gate=0.8, frames=7)
    torch.nn.init.normal_(block.frame.weight)
    for norm in (block.q_norm, block.kv_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    for part in (block.q_proj, block.k_proj, block.v_proj, block.o_proj):
        torch.nn.init.normal_(part.bias)
    x = torch.randn(4, 6, 24, requires_grad=True)  # two rows, twice each
    z, number = torch.randn(2, 9, 14, requires_grad=True), torch.randint(7, (2, 9))
    keys = rows = None
    if masked != "nothing":
        keys = torch.rand(2, 9) < 0.6
        keys[1] = False  # a row without a picture
    if masked == "rows":
        rows = torch.rand(4, 6, 9) < 0.5
        rows[0, 2] = False
    y = block(x, *block.keys_values(z, number), keys, rows)
    expected = naive.block(block, x, z, number, keys, rows)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=0)
    if masked != "nothing":
        assert torch.equal(y[2:], torch.zeros_like(y[2:]))
    if masked == "rows":
        assert torch.equal(y[0, 2], torch.zeros(24))
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, z, *block.parameters()])


def test_acceptance_4_by_hand():
    """One head of width 1, two originals: scores 0 and ln 3, values 1 and 5, so 0.25 + 3.75 = 4."""
    q = torch.tensor([[[[1.0]]]])
    k = torch.tensor([[[[0.0], [3.0]]]]).log().nan_to_num(neginf=0.0)
    v = torch.tensor([[[[1.0], [5.0]]]])
    torch.testing.assert_close(cross_attend(q, k, v).item(), 4.0)
    torch.testing.assert_close(cross_attend(q, k, v, torch.tensor([[True, False]])).item(), 1.0)


@pytest.mark.parametrize("scope", ["own", "video", "all"])
def test_acceptance_5_nothing_looks_ahead(scope):
    model, processor = tiny.shared("llava")
    text = ["the cat <image> sits on <image> a couch"]
    a, b, c = (tiny.picture(n) for n in range(3))
    method = CrossLMM(grid=2, every=1, gate=1.0, v2v_scope=scope)
    first = written(processor, text, [[a, b]])
    where = (first["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    begins = int(where[16])
    with attach(model, method):
        one = logits(model, first)
        two = logits(model, written(processor, text, [[a, c]]))
        three = logits(model, written(processor, text, [[c, b]]))
    assert torch.equal(one[:, :begins], two[:, :begins])
    assert not torch.allclose(one[:, -1], two[:, -1], atol=1e-3)
    # Words before the first picture see nothing; those between the two see the first.
    assert torch.equal(one[:, : int(where[0])], three[:, : int(where[0])])
    between = slice(int(where[15]) + 1, begins)
    assert not torch.allclose(one[:, between], three[:, between], atol=1e-3)


def test_acceptance_5_text_does_not_reach_the_pooled_tokens():
    model, processor = tiny.shared("llava")
    found = []
    method = CrossLMM(grid=2, every=1, gate=1.0)
    for text in ("the <image> is red", "the <image> was blue"):
        with attach(model, method):
            block = getattr(model, MARK).lent["CrossLMM"].v2v["0"]
            block.register_forward_hook(lambda m, a, y: found.append(y))
            logits(model, written(processor, [text], [[tiny.picture(1)]]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert found[0].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "gemma3"])
def test_acceptance_6_decoding_equals_a_full_pass_and_batches_equal_single_rows(family):
    model, processor = tiny.shared(family)
    pictures = [[], [tiny.picture(1)], [tiny.picture(2), tiny.picture(3, (80, 60))]]
    prompts = ["is it red ?", "describe the image in detail .", "what is there ?"]
    batch = tiny.inputs(processor, prompts, pictures)
    with attach(model, CrossLMM(grid=1, every=2, gate=1.0)):
        made = model.generate(
            **batch,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = made.sequences[:, batch["input_ids"].shape[1] :]
        for row, (prompt, own) in enumerate(zip(prompts, pictures, strict=True)):
            alone = tiny.inputs(processor, [prompt], [own])
            assert torch.equal(greedy(model, alone, 6)[0], new[row])
            whole = dict(alone)
            whole["input_ids"] = torch.cat([alone["input_ids"], new[row : row + 1]], dim=1)
            more = torch.ones_like(new[row : row + 1])
            whole["attention_mask"] = torch.cat([alone["attention_mask"], more], dim=1)
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in alone:
                    whole[name] = torch.cat([alone[name], 0 * more], dim=1)
            again = logits(model, whole)[0, -7:-1]
            steps = torch.stack([x[row] for x in made.logits])
            torch.testing.assert_close(steps, again, atol=1e-4, rtol=1e-4)


def test_acceptance_7_gradients_in_the_first_and_in_the_second_step():
    model, processor = tiny.build("llava", layers=2)
    inputs = checks.batch(processor)
    build_in(model, CrossLMM(grid=2, every=1))
    model.train()
    blocks, projector = model.mmlm_methods["CrossLMM"], model.model.multi_modal_projector
    model.requires_grad_(False)
    blocks.requires_grad_(True)
    projector.requires_grad_(True)
    learned = [*blocks.parameters(), *projector.parameters()]
    optimizer = torch.optim.SGD(learned, lr=0.5)
    labels = inputs["input_ids"]

    def moved():
        optimizer.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        return {n for n, p in blocks.named_parameters() if p.grad is not None and p.grad.any()}

    assert moved() == {n for n, _ in blocks.named_parameters() if n.endswith(".gate")}
    assert all(p.grad.any() for p in projector.parameters())
    optimizer.step()
    assert moved() == {n for n, _ in blocks.named_parameters()}


def test_acceptance_7_the_published_number_of_parameters():
    """42.68 M of stage 1 on Qwen2.5-1.5B's shapes, norms and gates left out."""
    from training.model import choose_what_learns, count_parameters
    from training.settings import ModelSettings

    text = Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=2000,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=2,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=1)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    build_in(model, CrossLMM(grid=3, kv_source="projected"))
    settings = ModelSettings(learns=("projector", "methods"), method_parts=("CrossLMM.v2v",))
    choose_what_learns(model, settings)
    blocks = model.mmlm_methods["CrossLMM"]
    small = sum(
        p.numel() for n, p in blocks.v2v.named_parameters() if "norm" in n or n.endswith("gate")
    )
    learning = count_parameters(model)[0]
    assert round((learning - small) / 1e6, 2) == 42.68
    frozen = [*model.model.vision_tower.parameters(), *model.model.language_model.parameters()]
    assert not any(p.requires_grad for p in [*frozen, *blocks.t2v.parameters()])
    both = [*blocks.v2v.parameters(), *model.model.multi_modal_projector.parameters()]
    assert learning == sum(p.numel() for p in both)


def test_acceptance_8_a_detail_that_pooling_destroys_is_learned():
    assert naive.learned(CrossLMM(grid=1, every=1)) > 0.95
    assert naive.learned(CrossLMM(grid=1, every=1, **WITHOUT)) < 0.4  # chance: 0.25


# ---- the whole against a naive model -------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_source": "projected"},
        {"pooling": "bilinear", "grid": 3},
        {"v2v": False},
        {"t2v": False, "every": 2},
        {"temporal_pos": True, "v2v_scope": "all"},
    ],
    ids=str,
)
def test_whole_passes_equal_a_naive_model(changes):
    model, processor = tiny.build("llava")
    inputs = written(
        processor,
        ["the cat <image> sits on <image> a couch", "is there a <image> dog"],
        [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)]],
    )
    method = CrossLMM(**{"grid": 2, "every": 1, "gate": 1.0, **changes})
    build_in(model, method)
    blocks = model.mmlm_methods["CrossLMM"]
    for block in [*blocks.v2v.values(), *blocks.t2v.values()]:
        if block.frame is not None:
            torch.nn.init.normal_(block.frame.weight)
    ours = logits(model, inputs)[:, -1]
    expected = naive.forward(model, blocks, inputs, method)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    take_out(model)


def test_beams_and_a_static_cache_give_the_same():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, CrossLMM(grid=2, every=2, gate=1.0)):
        beams = greedy(model, inputs, 8, num_beams=3)
        assert torch.equal(
            beams,
            greedy(
                model, inputs, 8, num_beams=3, cache_implementation="static", disable_compile=True
            ),
        )
        # K copies of one row are K beams that never part.
        for row, prompt in enumerate(checks.PROMPTS):
            own = [[tiny.picture(1)], [tiny.picture(2, (90, 60))]][row]
            alone = greedy(model, tiny.inputs(processor, [prompt], [own]), 8, num_beams=3)
            assert torch.equal(alone[0], beams[row])


@pytest.mark.parametrize("cache", ["fp8", "pooled:4", "pooled:2"])
def test_smaller_stores(cache):
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    whole, small = {}, {}

    def run(method, kept):
        with attach(model, method), torch.no_grad():
            out = model(**inputs, use_cache=True)
            state = getattr(model, MARK).states[0]
            kept.update(state.stores)
            token = out.logits[:, -1:].argmax(-1)
            mask = inputs["attention_mask"]
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            return model(
                input_ids=token,
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=out.past_key_values,
            ).logits[:, -1]

    full = run(CrossLMM(grid=2, every=2, gate=1.0), whole)
    less = run(CrossLMM(grid=2, every=2, gate=1.0, t2v_cache=cache), small)
    ratio = small[0].bytes / whole[0].bytes
    k, _ = whole[0].get()
    if cache == "fp8":
        assert ratio == 0.25
        close = (small[0].get()[0] - k).abs() <= 0.07 * k.abs() + 1e-3 * k.abs().max()
        assert close.all()
        assert not torch.equal(full, less)
        torch.testing.assert_close(full, less, atol=0.2, rtol=0.05)
    elif cache == "pooled:4":  # as many cells as states
        assert ratio == 1
        torch.testing.assert_close(full, less, atol=1e-4, rtol=1e-4)
    else:
        assert ratio == 0.25
        grid = k.view(2, 2, 2, 2, 2, 2, -1)  # rows, heads, cells and columns down and across
        means = grid.mean((3, 5)).flatten(2, 3)
        torch.testing.assert_close(small[0].get()[0], means)
        assert not torch.allclose(full, less, atol=1e-3)


def test_the_originals_are_let_go_after_the_first_pass():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, CrossLMM(grid=2, every=2, gate=1.0)), torch.no_grad():
        model(**inputs, use_cache=True)
        state = getattr(model, MARK).states[0]
        assert state.z is None
        assert sorted(state.stores) == [0, 2]
        assert not getattr(model, MARK).pooling.passes


@pytest.mark.parametrize("scope", ["own", "video", "all"])
def test_pooled_tokens_see_what_the_scope_says(scope):
    """Which originals each pooled token of each frame sees, asked of the rule itself."""
    model, processor = tiny.shared("llava")
    text, own = ["a <image> b <image> c"], [[tiny.picture(1), tiny.picture(2)]]
    with attach(model, CrossLMM(grid=1, gate=1.0)):
        logits(model, written(processor, text, own))
        state = getattr(model, MARK).states[0]
        layout = getattr(model, MARK).layout
    place = layout.visual[0].nonzero().flatten()[None]
    seen = seen_by_visual(state, place, scope)
    frames = torch.arange(2).repeat_interleave(16)
    for token, other in itertools.product(range(2), range(2)):
        sees = seen[0, token, frames == other]
        assert bool(sees.all()) == (token == other or (scope == "all" and other < token))
        assert sees.all() or not sees.any()


def test_store_of_pruned_originals_counts_only_what_is_left():
    k = torch.arange(4.0).view(1, 1, 4, 1)
    keys = torch.tensor([[True, False, False, False]])
    groups = torch.tensor([[0, 0, 1, 1]])
    store = Store("pooled", k + 1, k + 1, keys, groups)
    assert store.keys.tolist() == [[True, False]]
    assert store.get()[0][0, 0, 0, 0] == 1
