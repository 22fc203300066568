"""DARA: examples by hand, whole-matrix references, and the spec's acceptance list by number."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmlm import DARA, Anatomy, Method, TokenLayout, attach, build_in
from mmlm.engine.attention import editor as attention
from mmlm.engine.method import Paper
from mmlm.engine.weights import store
from mmlm.methods.dara import Factors, explicit_slots, image_slots, place_images
from mmlm.model.checkpoint import load, save
from tests.methods.dara_cases import (
    HEADS,
    beam_search,
    built,
    drawn,
    gains,
    grown,
    last,
    prompt,
    slots_by_hand,
    whole_matrix,
)

NEW = 20
MODES = ("score", "weight")


def generate(model, inputs, n=NEW, **options):
    ids = model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, **options)
    return ids[:, inputs["input_ids"].shape[1] :]


# ---- slots, by hand ----


@pytest.mark.parametrize(
    ("count", "images", "rules", "expected"),
    [
        (5, 5, {}, (0, 1, 2, 3, 4)),
        (3, 5, {}, None),
        (3, 5, {"align": "query_last"}, (0, 1, 4)),
        (1, 5, {"align": "query_last"}, (4,)),  # zero-shot: only the query's
        (6, 5, {"align": "query_last"}, None),
        (7, 5, {"overflow": "last_demo"}, (0, 1, 2, 3, 3, 3, 4)),
        (4, 5, {"overflow": "last_demo"}, None),
        (1, 1, {}, (0,)),
        (3, 2, {"overflow": "last_demo"}, (0, 0, 1)),
    ],
)
def test_where_the_images_of_a_prompt_go(count, images, rules, expected):
    assert place_images(count, images, **rules) == expected


def test_images_are_counted_anew_in_every_document_of_a_packed_row():
    text, image = 7, 9
    ids = torch.tensor([[image, image, text, image, text, image, text, image, image, text]])
    layout = TokenLayout.from_ids(ids, None, image_ids=(image,))
    doc = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]], dtype=layout.doc.dtype)
    packed = TokenLayout(**{**vars(layout), "doc": doc})
    assert image_slots(packed, 2).tolist() == [[0, 0, -1, 1, -1, 0, -1, 1, 1, -1]]
    with pytest.raises(ValueError, match=r"row 0 has 4 images.* S = 2"):
        image_slots(layout, 2)
    alone = TokenLayout(**{**vars(layout), "doc": torch.where(ids == text, 0, doc)})
    alone.doc[0, 7:] = 2
    with pytest.raises(ValueError, match=r"row 0 \(document 1\) has 1 images"):
        image_slots(alone, 2)


@pytest.mark.parametrize("family", tiny.ALL)
def test_a_picture_of_several_tiles_is_one_image(family):
    model, processor = tiny.shared(family)
    pictures = [[tiny.picture(1), tiny.picture(2, (112, 56)), tiny.picture(3, (56, 112))]]
    inputs = tiny.inputs(processor, ["describe"], pictures)
    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Look(DARA):
        def begin(self, prompt):
            seen["layout"] = prompt.full_layout
            return None

    with attach(model, Look(images=3)):
        last(model, inputs)
    slots, layout = image_slots(seen["layout"], 3), seen["layout"]
    assert torch.equal(slots >= 0, layout.visual)
    assert slots[layout.visual].unique_consecutive().tolist() == [0, 1, 2]


# ---- the acceptance list ----


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in tiny.FAMILIES),
        ("llava", torch.bfloat16),
        ("qwen2_5_vl", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_acceptance_01_dara_that_is_off_or_all_ones_is_the_plain_model(family, mode, dtype):
    model, processor = tiny.shared(family)
    if dtype != torch.float32:
        model, processor = tiny.build(family)
        model.to(dtype)
    inputs = prompt(processor, (1, 1))
    expected, tokens = last(model, inputs), generate(model, inputs)
    for method in (DARA(mode=mode).neutral(), DARA(mode=mode, align="query_last", layers=(0, 2))):
        with attach(model, method):
            assert torch.equal(last(model, inputs), expected)
            assert torch.equal(generate(model, inputs), tokens)
    # Where they may learn, ones go through the kernel, and nothing changes either.
    trained, _ = built(family, 1.0, mode=mode, align="query_last", layers=(0, 2))
    trained.to(dtype)
    assert {p.dtype for p in trained.mmlm_methods.parameters()} == {torch.float32}
    found = trained(**inputs).logits[:, -1]
    assert found.requires_grad
    if mode == "score":
        assert torch.equal(found, expected)
    else:  # rows that may learn are computed in plain torch
        near = 1e-5 if dtype == torch.float32 else 0.2
        torch.testing.assert_close(found, expected, atol=near, rtol=near)


def _with_heads(heads, kv_heads):
    cls, config, processor = tiny._BUILDERS["llava"](2)
    text = config.text_config
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = heads, kv_heads, 8
    torch.manual_seed(0)
    model = cls(config).eval()
    model.generation_config.pad_token_id = 1
    return model, processor


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2), (7, 1)])
@torch.no_grad()
def test_acceptance_02_03_dara_equals_whole_matrices(heads, kv_heads, mode):
    """Columns times factors before the softmax, or weights times factors and renormalised."""
    model, processor = _with_heads(heads, kv_heads)
    counts, factors = (3, 1), drawn(2, heads, 3)
    inputs = prompt(processor, counts)
    assert not inputs["attention_mask"].all()
    slots = slots_by_hand(model, inputs, counts, 3)
    by_layer = {n: gains(factors[n], slots) for n in (0, 1)}
    plain = last(model, inputs)
    heads_of_first = []
    model.get_decoder().layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: heads_of_first.append(args[0])
    )
    with whole_matrix(model, by_layer, mode):
        whole = model(**inputs, use_cache=True)
        token = whole.logits[:, -1:].argmax(-1)
        later = model(**_step(inputs, token), past_key_values=whole.past_key_values)
    build_in(model, DARA(images=3, layers=(0, 1), align="query_last", mode=mode))
    model.mmlm_methods.DARA.set_factors(factors)
    ours = model(**inputs, use_cache=True)
    after = model(**_step(inputs, token), past_key_values=ours.past_key_values)
    seen, step, found, found_step = heads_of_first
    real = inputs["attention_mask"].bool()
    for mine, theirs in ((found[real], seen[real]), (found_step, step)):
        assert float((mine - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max().clamp(min=1))
    for mine, theirs in ((ours, whole), (after, later)):  # behind another layer with factors
        torch.testing.assert_close(mine.logits[:, -1], theirs.logits[:, -1], atol=2e-5, rtol=1e-5)
    assert float((whole.logits[:, -1] - plain).abs().max()) > 1e-3


def _step(inputs, token):
    mask = functional.pad(inputs["attention_mask"], (0, 1), value=1)
    places = (mask.cumsum(-1) - 1)[:, -1:]
    return {
        "input_ids": token, "attention_mask": mask, "position_ids": places, "use_cache": True,
    }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_acceptance_03_weights_and_scores_by_hand(mode):
    """Scores 0, log 2, 0 and a factor 3 on the middle key, worked out on paper."""
    s, g = torch.tensor([0.0, 2.0, 0.0]).log1p(), torch.tensor([1.0, 3.0, 1.0])
    if mode == "weight":  # a = 1/5, 3/5, 1/5 -> 1, 9, 1 of 11
        expected = torch.tensor([1.0, 9.0, 1.0]) / 11
        found = (s + g.log()).softmax(-1)
    else:  # exp(3 log 3) = 27
        expected = torch.tensor([1.0, 27.0, 1.0]) / 29
        found = (s * g).softmax(-1)
    torch.testing.assert_close(found, expected)
    acting = Factors((0,), 1, 1, mode, init=3.0)()[0].detach()
    assert float(acting) == pytest.approx(3.0 if mode == "score" else torch.tensor(3.0).log())


@pytest.mark.parametrize(
    ("layers", "heads", "images", "count"),
    [(1, 28, 5, 140), (1, 32, 5, 160), (28, 28, 5, 3920)],
)
@pytest.mark.parametrize("mode", MODES)
def test_acceptance_04_dara_learns_layers_times_heads_times_images(
    layers, heads, images, count, mode
):
    module = Factors(tuple(range(layers)), heads, images, mode)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == count
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert bool((module.factors() == 1).all())


def _norm(module, x):
    scale = x.square().mean(-1, keepdim=True) + module.variance_epsilon
    return module.weight * x * scale.rsqrt()


@pytest.mark.parametrize("mode", MODES)
def test_acceptance_05_dara_gradients_equal_central_differences(mode):
    model, processor = built("qwen2_5_vl", drawn(2, images=4), images=4, layers=(0, 1),
                             align="query_last", mode=mode)  # fmt: skip
    model.double()
    inputs = prompt(processor, (3, 2))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    factors = model.mmlm_methods.DARA
    for norm in model.get_decoder().modules():
        if type(norm).__name__.endswith("RMSNorm"):  # the library's rounds to fp32
            norm.forward = functools.partial(_norm, norm)

    def loss():
        return model(**inputs).logits[:, -1].square().mean()

    loss().backward()
    for layer, theta in factors.theta.items():
        assert bool((theta.grad[:, (0, 1, 3)] != 0).all()), layer
        assert bool((theta.grad[:, 2] == 0).all()), "no prompt has a third demonstration"
    for layer, head, image in ((0, 2, 0), (0, 5, 3), (1, 7, 1)):
        theta = factors.theta[layer]
        start, slope = float(theta.detach()[head, image]), 0.0
        with torch.no_grad():  # the central difference of fourth order
            for steps, share in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
                theta[head, image] = start + steps * 0.02
                slope += share * float(loss()) / (12 * 0.02)
            theta[head, image] = start
        assert float(theta.grad[head, image]) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_acceptance_06_dara_leaves_a_text_only_prompt_alone(mode):
    model, processor = built("llava", drawn(images=2), images=2, mode=mode)
    plain, _ = tiny.shared("llava")
    inputs = prompt(processor, (0, 0))
    assert torch.equal(last(model, inputs), last(plain, inputs))
    assert torch.equal(generate(model, inputs, 6), generate(plain, inputs, 6))
    mixed = prompt(processor, (2, 0))  # beside a row with images, too, bit for bit
    found, expected = last(model, mixed), last(plain, mixed)
    assert torch.equal(found[1], expected[1])
    assert not torch.allclose(found[0], expected[0], atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_acceptance_07_dara_changes_the_columns_of_its_image_only(mode):
    factors = torch.ones(1, HEADS, 3)
    factors[0, 5, 1] = 2.5
    model, processor = built("llava", factors, images=3, layers=(0,), mode=mode)
    plain, _ = tiny.build("llava")
    for one in (model, plain):
        one.set_attn_implementation("eager")
    inputs = prompt(processor, (3,))
    slots = slots_by_hand(model, inputs, (3,), 3)[0]
    ours = model(**inputs, output_attentions=True).attentions[0][0]
    theirs = plain(**inputs, output_attentions=True).attentions[0][0]
    others = slots != 1
    assert torch.equal(ours[:5], theirs[:5])
    assert torch.equal(ours[6:], theirs[6:])
    last_row, plain_row = ours[5, -1], theirs[5, -1]
    assert not torch.allclose(last_row[slots == 1], plain_row[slots == 1], atol=1e-4)
    for row in range(len(slots)):
        found, expected = ours[5, row][others], theirs[5, row][others]
        torch.testing.assert_close(
            found / found.sum(), expected / expected.sum(), atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_acceptance_08_a_vanishing_weight_masks_the_image(family):
    factors = torch.ones(1, HEADS, 2)
    factors[:, :, 0] = 1e-6
    model, processor = built(family, factors, images=2, layers=(1,), mode="weight")
    plain, _ = tiny.shared(family)
    inputs = prompt(processor, (2,))
    closed = slots_by_hand(plain, inputs, (2,), 2) == 0
    before = last(plain, inputs)
    with whole_matrix(plain, {}, closed=(1, 2, closed)):
        expected = last(plain, inputs)
    # Rows inside the image that see nothing else keep themselves in either case but for the first.
    torch.testing.assert_close(last(model, inputs), expected, atol=1e-4, rtol=0)
    assert float((before - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_acceptance_09_dara_with_a_cache_equals_without(mode):
    model, processor = built("llava", drawn(2), layers=(0, 1), align="query_last", mode=mode)
    plain, _ = tiny.shared("llava")
    inputs = prompt(processor, (2, 3, 5))
    tokens = generate(model, inputs, 6)
    for step in range(6):
        z = last(model, grown(inputs, tokens[:, :step]))
        z[:, 3] = -torch.inf
        assert torch.equal(z.argmax(-1), tokens[:, step])
    assert not torch.equal(tokens, generate(plain, inputs, 6))
    static = generate(model, inputs, 6, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, tokens)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_acceptance_09_two_beams_with_a_cache_equal_two_without(mode):
    model, processor = built("llava", drawn(2), layers=(0, 1), align="query_last", mode=mode)
    both = prompt(processor, (2, 3))
    found = generate(model, both, 4, num_beams=2)
    for row in range(2):
        one = {k: v[row : row + 1] for k, v in both.items() if k != "pixel_values"}
        one["pixel_values"] = both["pixel_values"][:2] if row == 0 else both["pixel_values"][2:]
        assert torch.equal(beam_search(model, one, 4)[0], found[row])
    several = generate(model, both, 4, num_beams=2, num_return_sequences=2)
    assert torch.equal(several[::2], found)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_acceptance_10_dara_is_the_same_under_sdpa_eager_and_flex(family):
    model, processor = built(family, drawn(2, images=3), images=3, layers=(0, 1))
    inputs = prompt(processor, (3, 3))
    found = {}
    for kernel in ("sdpa", "eager", "flex_attention"):
        model.set_attn_implementation({"text_config": kernel})  # after it was built in
        with torch.compiler.set_stance("force_eager"):
            found[kernel] = last(model, inputs)
    for kernel in ("eager", "flex_attention"):
        torch.testing.assert_close(found[kernel], found["sdpa"], atol=1e-5, rtol=1e-5)
    plain, _ = tiny.shared(family)
    assert not torch.allclose(found["sdpa"], last(plain, inputs), atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash kernels run on a GPU")
def test_acceptance_10_dara_is_the_same_under_flash():
    pytest.importorskip("flash_attn")
    model, processor = built("llava", drawn(2, images=3), images=3, layers=(0, 1))
    model.to("cuda", torch.bfloat16)
    inputs = {k: v.cuda() for k, v in prompt(processor, (3, 3)).items()}
    expected = last(model, inputs)
    model.set_attn_implementation({"text_config": "flash_attention_2"})
    torch.testing.assert_close(last(model, inputs), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_acceptance_11_dara_is_stored_and_read_back(tmp_path, mode):
    parameters = {"images": 3, "layers": (0, 2), "mode": mode}
    model, processor = built("llava", drawn(2, images=3), **parameters)
    plain, _ = tiny.shared("llava")
    inputs = prompt(processor, (3,))
    expected = last(model, inputs)
    save(model, processor, tmp_path / "model")
    again, _ = load(str(tmp_path / "model"))
    assert torch.equal(last(again, inputs), expected)
    file = str(tmp_path / "factors.safetensors")
    store(model, "DARA", file)
    with attach(plain, DARA(weights_file=file, **parameters)):
        assert torch.equal(last(plain, inputs), expected)
    # Reading only the files that plain transformers knows, the model is plain.
    bare = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(last(bare, inputs), last(plain, inputs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 4}, r"layer 0, 8 heads x 3 images; .* needs .*layer 0, 8 heads x 4 images"),
        ({"layers": (0, 1)}, r"holds 'score' factors of layer 0, .*'score' factors of layer 1"),
        ({"layers": (2,)}, "factors of layer 0"),
        ({"mode": "weight"}, r"holds 'score' factors.* needs 'weight' factors"),
        ("heads", "8 heads x 3 images; .* 7 heads x 3 images"),
    ],
)
def test_acceptance_11_factors_of_something_else_are_refused(tmp_path, changes, message):
    model, _ = built("llava", drawn(images=3), images=3)
    file = str(tmp_path / "factors.safetensors")
    store(model, "DARA", file)
    other, more = (tiny.shared("llava")[0], changes)
    if changes == "heads":
        other, more = _with_heads(7, 1)[0], {}
    method = DARA(**{"images": 3, "weights_file": file, **more})
    with pytest.raises(ValueError, match=message), attach(other, method):
        pass
    with pytest.raises(ValueError, match=message):
        build_in(other, method)


@pytest.mark.parametrize("mode", MODES)
def test_acceptance_12_dara_learns_and_nothing_else_does(mode):
    """50 steps towards a fixed next token; through activation checkpointing as without."""
    model, processor = built("llava", 1.0, images=3, align="query_last", mode=mode)
    inputs = prompt(processor, (3, 2))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "DARA" not in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("DARA" in name)
    factors = model.mmlm_methods.DARA
    wanted = torch.tensor([17, 23])

    def loss():
        return functional.cross_entropy(model(**inputs, use_cache=False).logits[:, -1], wanted)

    loss().backward()
    slow = factors.theta[0].grad.clone()
    factors.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss().backward()
    torch.testing.assert_close(factors.theta[0].grad, slow, atol=1e-6, rtol=1e-4)
    model.activation_checkpointing_disable()
    model.eval()
    optimiser = torch.optim.AdamW(factors.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(50):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert bool((factors.factors() != 1).all())


@pytest.mark.parametrize(
    ("check", "family"),
    [
        (checks.batch_equals_single_rows, "gemma3"),
        (checks.beams_equal_static_beams, "qwen2_5_vl"),
        (checks.sdpa_equals_eager, "llava_next"),
        (checks.no_square_tensor, "llava"),
        (checks.two_images, "idefics3"),
        (checks.leaves_no_trace, "paligemma"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_the_weight_mode_keeps_the_contract(check, family):
    """The other mode stands in the matrix of all methods."""
    check(DARA(mode="weight", layers=(0, 1), images=3, align="query_last", init=6.0), family)


# ---- the error table ----


def _refused(model, inputs, method, match):
    with attach(model, method), pytest.raises(ValueError, match=match):
        model(**inputs)


def test_error_more_images_than_slots():
    model, processor = tiny.shared("llava")
    _refused(model, prompt(processor, (2, 3)), DARA(images=2, init=2.0), r"row 1 has 3 .* S = 2")


def test_error_fewer_images_than_slots():
    model, processor = tiny.shared("llava")
    _refused(model, prompt(processor, (3, 2)), DARA(images=3, init=2.0), r"row 1 has 2 .* S = 3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s + 3 * (s == 1), "from -1 .* to 1 .*got 4"),
        (lambda s: s - 5, "got -6"),
        (lambda s: s[:, :-1], r"shape \[2, \d+\].* got torch.int64 \[2, \d+\]"),
        (lambda s: s.repeat(2, 1)[:3], r"got torch.int64 \[3, "),
        (lambda s: torch.zeros_like(s), "which is no image feature"),
    ],
    ids=("above", "below", "shorter", "rows", "on_text"),
)
def test_error_slots_that_cannot_be(change, message):
    model, processor = tiny.shared("llava")
    inputs = prompt(processor, (2, 2))
    slots = change(slots_by_hand(model, inputs, (2, 2), 2))
    with explicit_slots(model, slots):
        _refused(model, inputs, DARA(images=2, init=2.0), message)


def test_error_embeddings_without_slots():
    model, processor = tiny.shared("llava")
    embeds = model.get_input_embeddings()(prompt(processor, (0,))["input_ids"])
    _refused(model, {"inputs_embeds": embeds}, DARA(init=2.0), "inputs_embeds only")


@pytest.mark.parametrize(
    ("mode", "value", "allowed"),
    [
        ("score", float("nan"), "finite, got nan"),
        ("score", float("inf"), "finite, got inf"),
        ("weight", 0.0, r"finite and > 0 \(mode 'weight'\), got 0.0"),
        ("weight", -1.0, "got -1.0"),
        ("weight", float("inf"), "got inf"),
    ],
)
def test_error_factors_that_mean_nothing(mode, value, allowed):
    model, processor = built("llava", 1.0, images=2, mode=mode)
    factors = model.mmlm_methods.DARA
    wrong = torch.ones(1, HEADS, 2)
    wrong[0, 3, 1] = value
    with pytest.raises(ValueError, match=rf"{allowed} at .* = \(0, 3, 1\)"):
        factors.set_factors(wrong)
    if value == -1.0:
        return  # no logarithm leads there
    with torch.no_grad():  # as a training that went astray would leave them
        theta = factors.theta[0]
        theta[3, 1] = value - 1 if mode == "score" else torch.tensor(value).log()
    with pytest.raises(ValueError, match=r"\(0, 3, 1\)"):
        last(model, prompt(processor, (2,)))


def test_error_factors_of_another_shape():
    with pytest.raises(ValueError, match=r"\[1, 8, 2\], got \[3, 2\]"):
        Factors((0,), 8, 2, "score").set_factors(torch.ones(3, 2))


def test_error_a_layer_that_is_not_there():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match="layer 4 does not exist; the model has layers 0 to 3"),
        attach(model, DARA(layers=(4,))),
    ):
        pass


@pytest.mark.parametrize(
    ("kernel", "mode", "message"),
    [
        ("flash_attention_2", "weight", "adds to scores, which attention 'flash_attention_2'"),
        ("paged|sdpa", "score", r"'paged\|sdpa' keeps its own keys"),
        ("sparse_attention", "score", "keeps its own keys"),
    ],
)
def test_error_kernels_that_cannot(kernel, mode, message):
    model, _ = tiny.build("llava")
    model.get_decoder().config._attn_implementation_internal = kernel
    with pytest.raises(ValueError, match=message):
        build_in(model, DARA(mode=mode))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"images": 0}, "images must be an integer >= 1"),
        ({"mode": "other"}, "mode must be one of 'score', 'weight'"),
        ({"align": "first"}, "align must be one of"),
        ({"overflow": "drop"}, "overflow must be one of"),
        ({"init": 0.0}, "init must be a finite number > 0"),
        ({"layers": (0, 0)}, "layers must be different"),
        ({"layers": ("a",)}, "layers must be a non-empty list"),
        ({"weights_file": 3}, "weights_file must be a path"),
        ({"images": 1, "overflow": "last_demo"}, "needs images >= 2"),
    ],
)
def test_error_parameters_out_of_range(parameters, message):
    with pytest.raises(ValueError, match=message):
        DARA(**parameters)


# ---- what else the docstring says ----


def test_a_query_of_two_pictures_gets_slots_from_its_user():
    """Two demonstrations, and a query that shows two pictures: both have the query's factor."""
    model, processor = built("llava", drawn(images=3), images=3)
    plain, _ = tiny.shared("llava")
    inputs = prompt(processor, (4,))
    slots = slots_by_hand(plain, inputs, (4,), 4).clamp(max=2)
    with explicit_slots(model, slots):
        found = last(model, inputs)
        beams = generate(model, inputs, 4, num_beams=2)
    with whole_matrix(plain, {0: gains(drawn(images=3)[0], slots)}):
        torch.testing.assert_close(found, last(plain, inputs), atol=1e-5, rtol=1e-5)
    assert beams.shape == (1, 4)
    with pytest.raises(ValueError, match="has 4 images"):
        last(model, inputs)


def test_the_kernel_runs_once_with_a_key_per_query_head_and_the_cache_stays_raw():
    model, processor = built("llava", drawn(images=2), images=2, layers=(1,))
    plain, _ = tiny.shared("llava")
    inputs = prompt(processor, (2, 2))
    calls = []

    def counted(module, query, key, *args, **kwargs):
        if hasattr(module, "layer_idx"):  # not the vision tower's
            calls.append((module.layer_idx, key.shape[1], module.num_key_value_groups))
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    attention.ALL_ATTENTION_FUNCTIONS["sdpa"] = counted
    try:
        cache = model(**inputs, use_cache=True).past_key_values
    finally:
        del attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert calls == [(0, 2, 4), (1, 8, 1), (2, 2, 4), (3, 2, 4)]
    theirs = plain(**inputs, use_cache=True).past_key_values
    for layer in (0, 1):  # the first whose input differs is layer 2
        assert torch.equal(cache.layers[layer].keys, theirs.layers[layer].keys)
    assert cache.layers[1].keys.shape[1] == 2


PAPER = Paper(title="made for a test", arxiv="0000.00000", year=2026, venue="here")


@dataclass(frozen=True, kw_only=True)
class Leaves(Method):
    """Every third position but the last leaves, before layer ``at``."""

    paper: ClassVar[Paper] = PAPER
    at: int = 1

    def neutral(self):
        return self

    def acts_in(self, anatomy, layer):
        return layer == self.at

    def tokens(self, state, layer, x):
        index = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        return torch.where((index % 3 == 1) & (index < x.shape[1] - 1), -1, index)


@torch.no_grad()
def test_factors_follow_the_positions_that_are_left():
    """DARA in a layer from which positions are gone equals DARA with their keys masked."""
    model, processor = built("llava", drawn(2, images=3), images=3, layers=(0, 2),
                             align="query_last")  # fmt: skip
    plain, _ = tiny.shared("llava")
    counts = (3, 2)
    inputs = prompt(processor, counts)
    slots = slots_by_hand(plain, inputs, counts, 3)
    index = torch.arange(slots.shape[1]).expand(2, -1)
    gone = (index % 3 == 1) & (index < slots.shape[1] - 1)
    by_layer = {n: gains(drawn(2, images=3)[k], slots) for k, n in enumerate((0, 2))}
    with whole_matrix(plain, by_layer, closed=(1, 4, gone)):
        expected = generate(plain, inputs, 4)
        z = last(plain, inputs)
    with attach(model, Leaves()):
        torch.testing.assert_close(last(model, inputs), z, atol=1e-5, rtol=1e-5)
        assert torch.equal(generate(model, inputs, 4), expected)


@dataclass(frozen=True, kw_only=True)
class Thins(Method):
    """Every other image feature never enters; of the second picture nothing does."""

    paper: ClassVar[Paper] = PAPER

    def neutral(self):
        return self

    def visual_tokens(self, state, features):
        index = torch.arange(features.shape[1]).expand(features.shape[0], -1)
        kept = torch.where(index % 2 == 0, index, -1)
        kept[1] = -1
        return kept


@torch.no_grad()
def test_images_are_counted_before_features_are_taken_out():
    model, processor = built("llava", drawn(images=3), images=3)
    plain, _ = tiny.shared("llava")
    inputs = prompt(processor, (3,))
    slots = slots_by_hand(plain, inputs, (3,), 3)
    visual = inputs["input_ids"] == plain.config.image_token_id
    gone = (slots == 1) | (visual & ((visual.long().cumsum(-1) - 1) % 2 == 1))
    with whole_matrix(plain, {0: gains(drawn(images=3)[0], slots)}, closed=(0, 4, gone)):
        expected = last(plain, inputs)
    with attach(model, Thins()):
        torch.testing.assert_close(last(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_packed_rows_are_the_rows_by_themselves():
    """Two prompts in one row, told apart by positions that start again: factors of both."""
    model, processor = built("llava", drawn(images=2), images=2)
    one, other = (prompt(processor, (2,), seed) for seed in (1, 5))
    other["input_ids"], other["attention_mask"] = (
        other[name][:, :-4] for name in ("input_ids", "attention_mask")
    )
    ids = torch.cat([one["input_ids"], other["input_ids"]], 1)
    lengths = [x["input_ids"].shape[1] for x in (one, other)]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(
            input_ids=ids, position_ids=places, use_cache=False,
            pixel_values=torch.cat([one["pixel_values"], other["pixel_values"]]),
        ).logits[0]  # fmt: skip
        alone = [model(**x, use_cache=False).logits[0] for x in (one, other)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_an_attention_that_is_measured_is_the_scaled_one():
    """Beside a probe of attention rows the rows are computed anew; both ways give one result."""
    from mmlm import ImageAttention

    model, processor = built("llava", drawn(images=2), images=2, layers=(2,))
    inputs = prompt(processor, (2, 2))
    expected = last(model, inputs)
    with attach(model, ImageAttention(layer=2)):
        torch.testing.assert_close(last(model, inputs), expected, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True, kw_only=True)
class Everywhere(Method):
    """A gain on every key of every row, text or not."""

    paper: ClassVar[Paper] = PAPER

    def neutral(self):
        return self

    def begin(self, prompt):
        return prompt.layout.seg.shape

    def keys(self, state, layer):
        return torch.full((state[0], HEADS, state[1]), 2.0)


def test_a_row_without_an_image_keeps_its_bits_whatever_its_gains():
    model, processor = tiny.shared("llava")
    inputs = prompt(processor, (1, 0))
    plain = last(model, inputs)
    with attach(model, Everywhere()):
        found = last(model, inputs)
    assert torch.equal(found[1], plain[1])
    assert not torch.allclose(found[0], plain[0], atol=1e-3)


def test_factors_of_two_methods_multiply():
    model, processor = tiny.shared("llava")
    inputs = prompt(processor, (2,))

    @dataclass(frozen=True, kw_only=True)
    class Twin(DARA):
        pass

    with attach(model, DARA(images=2, init=2.0), Twin(images=2, init=1.5)):
        both = last(model, inputs)
    with attach(model, DARA(images=2, init=3.0)):
        torch.testing.assert_close(both, last(model, inputs), atol=1e-5, rtol=1e-5)


def test_a_bounded_score_is_bounded_after_its_factor():
    """The kernel bounds q . (g k); rows that are computed anew must do likewise."""
    call = attention.Call(
        torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), None,
        {"scaling": 1.0, "softcap": 2.0},
    )  # fmt: skip
    gain = torch.rand(1, 4, 3) + 0.5
    rows = attention.AttentionRows(call, 1, 0)
    scaled = attention.AttentionRows(call.scaled(gain), 1, 0)
    found = rows.scores(0, 3, gain)
    torch.testing.assert_close(found, scaled.scores(0, 3))
    assert not torch.allclose(found, rows.scores(0, 3) * gain[:, :, None], atol=1e-3)


def test_keys_are_scaled_in_fp32_and_rounded_once():
    key = torch.randn(1, 1, 4, 8).bfloat16()
    call = attention.Call(key.repeat(1, 2, 1, 1), key, key, None, {})
    gain = torch.tensor([[[1.2345678] * 4, [0.987654321] * 4]])
    expected = (key.float().expand(1, 2, 4, 8) * gain[..., None]).bfloat16()
    assert torch.equal(call.scaled(gain).key, expected)
    assert not torch.equal(key.expand(1, 2, 4, 8) * gain.bfloat16()[..., None], expected)


def test_a_module_stays_in_fp32_and_moves_with_its_model():
    model, _ = built("llava", drawn(images=2), images=2)
    before = model.mmlm_methods.DARA.factors()
    model.half()
    assert model.lm_head.weight.dtype == torch.float16
    assert torch.equal(model.mmlm_methods.DARA.factors(), before)
    model.to("meta")
    assert model.mmlm_methods.DARA.theta[0].device.type == "meta"


def test_what_attach_installs_acts_in_its_layers_only():
    model, processor = tiny.shared("llava")
    asked = Counter()

    @dataclass(frozen=True, kw_only=True)
    class Counts(DARA):
        def keys(self, state, layer):
            asked[layer] += 1
            return super().keys(state, layer)

    with attach(model, Counts(images=2, init=2.0, layers=(1, 3))):
        generate(model, prompt(processor, (2,)), 3)
    assert asked == {1: 3, 3: 3}
    assert Anatomy(model).supports(DARA()) == []
