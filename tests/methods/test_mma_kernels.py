"""MMA under every attention kernel: sdpa, eager, flex, and flash kernels in two parts."""

import mma_cases as cases
import pytest
import tiny
import torch
from mma_cases import layout
from shapes import assert_no_square, record_shapes
from transformers.integrations import flex_attention as flex_module

from mmlm import MMA, attach, build_in
from mmlm.engine.masks import split_attention
from mmlm.engine.masks.flash_kernels import Cuts, kernel_for
from mmlm.engine.masks.split_attention import attend, plan_of
from mmlm.errors import UnsupportedAttention

KERNELS = ["eager", "flex_attention", "flash_attention_2"]


def set_kernel(model, name):
    """Also the name of a kernel whose package is not there: nothing but its name is used."""
    model.get_decoder().config._attn_implementation_internal = name


@pytest.fixture
def uncompiled(monkeypatch):
    """Flex kernels without a compiler: the same function, run as it is written."""
    monkeypatch.setattr(
        flex_module,
        "compile_friendly_flex_attention",
        lambda q, k, v, training=False, **more: flex_module.flex_attention(q, k, v, **more),
    )


def logits(model, processor, inputs):
    with torch.no_grad(), attach(model, MMA(), processor=processor):
        return model(**inputs).logits


def two_images(processor):
    """Left-padded rows: one picture; two pictures with text between; none."""
    prompts = [*cases.PROMPTS, "the quick brown fox ?"]
    pictures = [[tiny.picture(1)], [tiny.picture(2), tiny.picture(3)], []]
    return tiny.inputs(processor, prompts, pictures)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_acceptance_10_kernels_agree_in_float32(family, kernel, uncompiled):
    model, processor = tiny.build(family)
    inputs = two_images(processor)
    expected = logits(model, processor, inputs)
    set_kernel(model, kernel)
    found = logits(model, processor, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    assert bool(torch.isfinite(found).all())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", KERNELS)
def test_acceptance_10_kernels_agree_in_bfloat16(kernel, uncompiled):
    """Of the attention's outputs, as the error of one layer: logits add up those of all."""
    model, processor = tiny.build("llava")
    model = model.to(torch.bfloat16)
    inputs = two_images(processor)
    outputs = []
    handle = (
        model.get_decoder()
        .layers[0]
        .self_attn.register_forward_hook(lambda m, a, out: outputs.append(out[0].float()))
    )
    for name in ("sdpa", kernel):
        set_kernel(model, name)
        logits(model, processor, inputs)
    handle.remove()
    real = inputs["attention_mask"].bool()
    assert (outputs[0][real] - outputs[1][real]).abs().max() <= 2e-2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_keeps_windows_and_the_familys_own_openings(uncompiled):
    model, processor = tiny.build("gemma3")
    inputs = cases.padded_pair(processor)
    expected = logits(model, processor, inputs)
    set_kernel(model, "flex_attention")
    # The library builds the family's own masks with a compiler, which is slow here.
    found = None
    with pytest.MonkeyPatch.context() as patch:
        import transformers.masking_utils as library

        build = library.create_block_mask
        patch.setattr(library, "create_block_mask", lambda **k: build(**{**k, "_compile": False}))
        found = logits(model, processor, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


def test_split_decodes_like_sdpa_and_leaves_plain_passes_to_the_kernel(monkeypatch):
    """Prompts go through both parts; decoding steps and prompts without images never do."""
    model, processor = tiny.build("llava")
    inputs = two_images(processor)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with attach(model, MMA(), processor=processor):
        expected = model.generate(**inputs, **options)
    calls = []

    def stand_in(module, query, key, value, attention_mask, **kwargs):
        calls.append(query.shape[2])
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, None, None].bool()
        function = torch.nn.functional.scaled_dot_product_attention
        y = function(query, key, value, mask, scale=kwargs["scaling"], enable_gqa=True)
        return y.transpose(1, 2), None

    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    AttentionInterface.register("flash_attention_2", stand_in)
    try:
        set_kernel(model, "flash_attention_2")
        with attach(model, MMA(), processor=processor):
            assert torch.equal(model.generate(**inputs, **options), expected)
    finally:
        AttentionInterface.register("flash_attention_2", before)
    assert set(calls) == {1}


def gradients(model, processor, inputs, **more):
    model.zero_grad()
    labels = inputs["input_ids"].clone()
    labels[:, : -len("ab")] = -100
    roles = torch.zeros_like(labels)
    roles[:, -2:] = 1
    with attach(model, MMA(), processor=processor):
        model(**inputs, labels=labels, mmlm_roles=roles, use_cache=False, **more).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_split_has_the_gradients_of_sdpa_also_where_layers_are_recomputed(family, reentrant):
    model, processor = tiny.build(family)
    inputs = cases.padded_pair(processor)
    model.train()
    expected = gradients(model, processor, inputs)
    set_kernel(model, "flash_attention_2")
    if reentrant is not None:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, processor, inputs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


def test_split_makes_no_square_matrix():
    model, processor = tiny.build("llava")
    inputs = tiny.inputs(
        processor, [" ".join(["the quick brown fox jumps ."] * 20)], [[tiny.picture(1)]]
    )
    n = inputs["input_ids"].shape[1]
    assert n > 150
    set_kernel(model, "flash_attention_2")
    with attach(model, MMA()), torch.no_grad():
        with pytest.MonkeyPatch.context() as patch, record_shapes() as shapes:
            patch.setattr(split_attention, "_CHUNK", n)  # one query at a time
            model(**inputs)
    assert_no_square(shapes, n)


# ---- the two parts, by themselves ----------------------------------------------------------------


def _plan(roles):
    from mmlm.engine.masks.openings import opened_at

    rule = MMA().mask(None, roles)

    def opens(row, q, k):
        return opened_at([rule], roles, torch.full_like(q, row), q, k, None)

    return plan_of(opens, roles.rows, roles.doc)


#: Padding in front, two pictures around text, two documents in the second row.
ROLES = layout(
    ["..pvvppvppaa", "vpvppavvppaa"],
    doc=[[0] * 12, [0] * 6 + [1] * 6],
)


def test_a_plan_by_hand():
    plan = _plan(ROLES)
    assert plan.own.tolist() == [*range(2, 12), *range(12, 24)]
    assert plan.documents == (0, 10, 16, 22)
    assert plan.asks.tolist() == [3, 4, 7, 12, 14, 18, 19]
    assert plan.groups[0] == (0, 2, 3, 4, 5, 7)
    told = plan.told.tolist()
    pieces = [told[a:b] for a, b in zip(plan.groups[1][:-1], plan.groups[1][1:], strict=True)]
    assert pieces == [[5, 6, 8, 9], [8, 9], [13, 15, 16], [15, 16], [20, 21]]
    assert _plan(layout(["vaa"])) is None


@pytest.mark.parametrize("window", [None, 3])
def test_split_equals_one_softmax_in_float64(window):
    """Forward and backward, grouped heads, against a masked softmax."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 12, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, 2, 12, 8, generator=draw, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    g = torch.randn(2, 12, 4, 8, generator=draw, dtype=torch.float64)
    g[0, :2] = 0  # padding
    seen = cases.allowed(MMA(), ROLES)
    if window:
        index = torch.arange(12)
        seen &= index[None, None] > index[None, :, None] - window
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    scores = (q @ wide[0].mT * 0.3).masked_fill(~seen[:, None], -torch.inf)
    expected = (scores.softmax(-1).nan_to_num() @ wide[1]).transpose(1, 2)
    right = torch.autograd.grad(expected, (q, k, v), g)
    found = attend(_plan(ROLES), q, k, v, scaling=0.3, sliding_window=window)
    mine = torch.autograd.grad(found, (q, k, v), g)
    torch.testing.assert_close(found[0, 2:], expected[0, 2:], atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(found[1], expected[1], atol=1e-13, rtol=1e-12)
    assert not found[0, :2].any()
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


def test_the_kernel_gives_the_log_sum_exp():
    q, k, v = torch.randn(3, 5, 2, 4).unbind()
    out, l = kernel_for(torch.device("cpu")).forward(q, k, v, Cuts((0, 5), (0, 5), False), 0.5)
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.5
    torch.testing.assert_close(l, scores.logsumexp(-1).T)
    torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "exact with dropout"),
        ({"softcap": 30.0}, "exact with softcap"),
        ({"s_aux": torch.ones(4)}, "exact with attention sinks"),
    ],
    ids=["dropout", "softcap", "sinks"],
)
def test_what_cannot_be_split_is_refused(options, message):
    heads = torch.randn(3, 2, 4, 12, 8).unbind()
    with pytest.raises(ValueError, match=message):
        attend(_plan(ROLES), *heads, **options)
    longer = torch.randn(2, 4, 14, 8)
    with pytest.raises(ValueError, match="meets a cache of 14"):
        attend(_plan(ROLES), heads[0], longer, longer)


def test_a_kernel_that_gives_other_numbers_is_found_out(monkeypatch):
    right = kernel_for(torch.device("cpu"))

    class Wrong:
        def forward(self, *given):
            out, l = right.forward(*given)
            return out, l / 0.7  # in another unit

        backward = right.backward

    monkeypatch.setattr(split_attention, "kernel_for", lambda device: Wrong())
    monkeypatch.setattr(split_attention, "_CHECKED", set())
    with pytest.raises(UnsupportedAttention, match="other numbers than a plain softmax"):
        split_attention.checked_kernel(torch.device("cpu"), torch.float32, 8)


def test_error_1_flash_without_a_kernel_for_the_split(monkeypatch):
    model, _ = tiny.build("llava")
    set_kernel(model, "flash_attention_2")
    monkeypatch.setattr(split_attention, "kernel_for", lambda device: None)
    with pytest.raises(ValueError, match=r"'flash_attention_2'.* silently stay causal") as caught:
        with attach(model, MMA()):
            pass
    assert "sdpa" in caught.value.advice
    assert "flex_attention" in caught.value.advice
    with pytest.raises(ValueError, match="silently stay causal"):
        build_in(model, MMA())


def test_a_later_turn_that_opens_something_is_refused_under_flash():
    model, processor = tiny.build("llava")
    first = cases.talk(processor, [cases.user("what is it ?", 1)], [tiny.picture(1)])
    second = cases.talk(processor, [cases.user("a dog ?", 1)], [tiny.picture(2)])
    set_kernel(model, "flash_attention_2")
    n, m = first["input_ids"].shape[1], second["input_ids"].shape[1]
    with attach(model, MMA(), processor=processor), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        second["attention_mask"] = torch.ones(1, n + m, dtype=torch.long)
        with pytest.raises(UnsupportedAttention, match="later turn"):
            model(**second, past_key_values=cache)
