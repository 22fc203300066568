"""DyVTE: golden vectors, a naive reference, examples by hand, the spec's acceptance list."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch
from golden import golden
from torch.utils.flop_counter import FlopCounterMode

import mmlm
from mmlm import Anatomy, DyVTE, attach, build_in, measured
from mmlm.engine import flops
from mmlm.engine.weights import store
from mmlm.errors import IncompatibleMethods, UnsupportedModel
from mmlm.methods.routers import AFTER_IMAGE, ALL_TEXT, BETWEEN, NO_TEXT, Pooling, Router
from mmlm.model.checkpoint import save
from tests.engine.test_pruning import masked
from tests.methods.dyvte_cases import (
    Forced,
    Fresh,
    alone,
    golden_model,
    inputs_of,
    layout_of,
    naive_exit,
    read_golden,
    visual_of,
)

LAYERS = 4  # of the tiny models
MIXED = (
    "describe the image in detail .",
    "is there a dog in the picture ?",
    "what is shown here ?",
    "the quick brown fox jumps over the lazy dog .",
    "is a cat on the couch ? answer yes or no .",
    "describe .",
)
COUNTS = (1, 3, 0, 1, 3, 1)
PLAN = (0, 2, -1, LAYERS - 1, -1, 2)


def greedy(model, inputs, **options):
    return checks.generate(model, inputs, do_sample=False, **options)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def exits(model):
    return [record["dyvte"]["exit_layer"] for record in measured(model)]


def routers_file(model, routers, path, **settings):
    """A file of these routers, as a training leaves it."""
    build_in(model, DyVTE(**settings))
    model.mmlm_methods["DyVTE"].load_state_dict(routers)
    store(model, "DyVTE", path)
    mmlm.engine.build_in.take_out(model)
    return str(path)


# ---- acceptance 1: golden vectors ----


@pytest.mark.golden
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("path", golden("dyvte/infer_*.npz"))
@torch.no_grad()
def test_acceptance_1_golden_inference(path, implementation, tmp_path):
    data, config = read_golden(path)
    model, routers, prefix, visual = golden_model(data, config)
    model.set_attn_implementation(implementation)
    hidden = routers["0.w1.weight"].shape[0]
    file = routers_file(model, routers, tmp_path / "routers.safetensors", hidden=hidden)
    embeds = data["inputs_embeds"]
    real = torch.ones(embeds.shape[:2], dtype=torch.bool)
    layout = layout_of(real, prefix, visual)
    read = []
    with attach(model, DyVTE(weights_file=file, hidden=hidden), layout=layout):
        for router in model._mmlm_session.lent["DyVTE"].values():
            router.w1.register_forward_pre_hook(lambda module, args: read.append(args[0][0]))
        output = model(inputs_embeds=embeds, use_cache=True)
        record = measured(model)[0]["dyvte"]
        assert record["exit_layer"] == int(data["exit_layer"])
        assert record["text"] == "after the last image"
        asked = len(data["gate_logits"])
        close(torch.stack(read)[:asked], data["gate_inputs"])
        close(torch.tensor(list(record["gate_logits"].values()))[:asked], data["gate_logits"])
        close(output.logits[0, -1], data["prefill_logits_last"], 1e-4)
        assert lengths_of(output) == data["kv_len_after_prefill"].tolist()
        text = states_of(model, embeds)[0, prefix + visual :]
        close(text, data["final_text_hidden"], 1e-4)
        output = model(inputs_embeds=embeds, use_cache=True)  # a prompt begins anew
        last = output.logits[:, -1]
        n_steps = sum(re.fullmatch(r"step\d+_logits", name) is not None for name in data)
        for step in range(n_steps):
            token = last.argmax(-1, keepdim=True)
            assert int(token) == int(data["greedy_tokens"][step])
            output = model(input_ids=token, past_key_values=output.past_key_values)
            last = output.logits[:, -1]
            close(last[0], data[f"step{step}_logits"], 1e-4)
            assert lengths_of(output) == data[f"step{step}_kv_len"].tolist()
        if n_steps:
            assert int(last.argmax()) == int(data["greedy_tokens"][n_steps])
        else:  # no exit: the authors' code fails here, ours goes on as the plain model does
            ours = steps_after(model, output, 3)
    if not n_steps:
        plain = steps_after(model, model(inputs_embeds=embeds, use_cache=True), 3)
        assert torch.equal(ours, plain)


def states_of(model, embeds):
    """States behind the last norm, of all positions."""
    return model.model(inputs_embeds=embeds).last_hidden_state


def lengths_of(output):
    return [layer.get_seq_length() for layer in output.past_key_values.layers]


def steps_after(model, output, n):
    """The last position's logits of n greedy steps on a cache."""
    logits = [output.logits[:, -1]]
    for _ in range(n):
        token = logits[-1].argmax(-1, keepdim=True)
        output = model(input_ids=token, past_key_values=output.past_key_values)
        logits.append(output.logits[:, -1])
    return torch.stack(logits)


# ---- the naive reference, and examples by hand ----


@pytest.mark.parametrize("threshold", [0.0, 2.0, 3.0])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
@torch.no_grad()
def test_a_naive_loop_exits_alike(family, threshold):
    """Loops over positions and layers, without cache, batch or hooks."""
    model, processor = tiny.shared(family)
    method = Fresh(threshold=threshold)
    with attach(model, method):
        routers = model._mmlm_session.lent["Fresh"]
        layer_and_logits = []
        for row in (0, 1, 4):
            inputs = alone(processor, MIXED, COUNTS, row)
            z = checks.next_logits(model, inputs)
            layer_and_logits.append((inputs, z, measured(model)[0]["dyvte"]))
    for inputs, z, record in layer_and_logits:
        layer, logits, expected = naive_exit(
            model, inputs, {int(n): r for n, r in routers.items()}, threshold
        )
        assert record["exit_layer"] == layer
        close(torch.tensor(list(record["gate_logits"].values())), logits)
        close(z, expected)


def test_the_naive_loop_sees_exits_at_several_layers():
    """Otherwise the comparison above would compare one case."""
    model, processor = tiny.shared("llava")
    found = set()
    for threshold in (0.0, 2.0, 3.0):
        with attach(model, Fresh(threshold=threshold)):
            for row in (0, 1, 4):
                checks.next_logits(model, alone(processor, MIXED, COUNTS, row))
                found.update(exits(model))
    assert len(found) > 3


@torch.no_grad()
def test_a_router_by_hand():
    """Two inputs, two hidden units: z = W2 gelu(W1 [mean ; last])."""
    router = Router(width=1, hidden=2)
    router.w1.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    router.w2.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    z = router(torch.tensor([[1.0, 2.0]]))[0]

    def gelu(x):  # the exact one: x times the normal distribution function
        return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))

    close(z, torch.tensor([gelu(1.0), 2 * gelu(3.0)]))


def rows(text):
    """v visual, t text, . padding: the masks of one row per word."""
    marks = [list(word) for word in text.split()]
    visual = torch.tensor([[c == "v" for c in word] for word in marks])
    return visual, torch.tensor([[c == "t" for c in word] for word in marks])


def test_which_text_is_read_by_hand():
    visual, real_text = rows("tvvttt .tvvvt vttvvv ttvvvv tttttt vvvvvv vttvtt")
    pooling = Pooling.of(visual, real_text)
    assert pooling.rule.tolist() == [
        AFTER_IMAGE,
        AFTER_IMAGE,
        BETWEEN,
        ALL_TEXT,
        ALL_TEXT,
        NO_TEXT,
        AFTER_IMAGE,
    ]
    x = torch.tensor([10.0, 20, 30, 40, 50, 60])[None, :, None].expand(7, 6, 1)
    assert pooling.features(x).tolist() == [
        [45, 60],  # mean of 40 and 50; the last one
        [60, 60],  # one token is its own mean
        [20, 30],  # nothing behind the last image: what stands behind the first
        [10, 20],  # nothing behind the first either: all text
        [30, 60],  # no image: never asked
        [0, 0],  # no text: never asked
        [50, 60],  # behind the last of two images
    ]


def test_features_follow_the_columns_that_are_left():
    visual, real_text = rows("tvvttt ttvttt")
    pooling = Pooling.of(visual, real_text)
    x = torch.randn(2, 6, 3)
    kept = torch.tensor([[-1, 0, 3, 4, 5], [0, 1, 3, 4, 5]])
    left = x.gather(1, kept.clamp(min=0)[..., None].expand(-1, -1, 3))
    close(pooling.features(left, kept), pooling.features(x))


# ---- acceptance 3: nothing happens ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_acceptance_3_a_router_that_never_fires_changes_no_bit(family):
    model, processor = tiny.shared(family)
    for count in (1, 4):
        inputs = inputs_of(processor, list(MIXED[:count]), COUNTS[:count])
        plain = checks.next_logits(model, inputs)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=20, min_new_tokens=20)
        with attach(model, Fresh(threshold=math.inf)):
            assert torch.equal(checks.next_logits(model, inputs), plain)
            record = measured(model)[0]["dyvte"]
            assert list(record["gate_logits"]) == ["0", "1", "2", "3"]  # all were asked
            assert record["exit_layer"] == -1
            ours = model.generate(**inputs, do_sample=False, max_new_tokens=20, min_new_tokens=20)
            assert torch.equal(ours, tokens)


# ---- acceptance 4 and 5: what is removed ----


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_acceptance_4_upper_layers_hold_text_only(layer):
    """Keys above the exit equal those of a run of the text rows alone through these layers."""
    model, processor = tiny.shared("llava")
    inputs = alone(processor, MIXED, COUNTS, 0)
    n, visual = inputs["input_ids"].shape[1], visual_of(model, inputs)[0]
    text = (~visual).nonzero()[:, 0]
    with attach(model, DyVTE.fixed(layer=layer)):
        output = model(**inputs, use_cache=True)
    above = LAYERS - layer - 1
    assert lengths_of(output) == [n] * (layer + 1) + [len(text)] * above
    decoder, given = model.get_decoder(), {}
    handle = decoder.layers[layer + 1].register_forward_pre_hook(
        lambda m, a, k: given.update(x=a[0], **k), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    x = given["x"][:, text]
    cos, sin = (part[:, text] for part in given["position_embeddings"])
    mask = torch.ones(1, 1, len(text), len(text), dtype=torch.bool).tril()
    for number in range(layer + 1, LAYERS):
        block = decoder.layers[number]
        states = block.input_layernorm(x)
        k = block.self_attn.k_proj(states).view(1, len(text), -1, block.self_attn.head_dim)
        half = k.shape[-1] // 2
        turned = torch.cat([-k[..., half:], k[..., :half]], -1)
        k = k * cos[:, :, None] + turned * sin[:, :, None]
        close(output.past_key_values.layers[number].keys, k.transpose(1, 2))
        x = block.forward(x, attention_mask=mask, position_embeddings=(cos, sin))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_acceptance_5_removal_equals_masking(family):
    """States of all text positions, against a run that only hides the visual keys."""
    model, processor = tiny.shared(family)
    inputs = inputs_of(processor, list(MIXED[:3]), COUNTS[:3])
    gone = visual_of(model, inputs)

    def run(model, inputs):
        return model.model(**inputs).last_hidden_state

    expected = masked(model, inputs, gone, range(2, LAYERS), run)
    with attach(model, DyVTE.fixed(layer=1)):
        states = run(model, inputs)
    text = inputs["attention_mask"].bool() & ~gone
    close(states[text], expected[text])


# ---- acceptance 6: mixed batches ----


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", ["exact", "split"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_acceptance_6_rows_of_a_mixed_batch_equal_single_runs(family, batch, implementation):
    model, processor = tiny.build(family)
    model.set_attn_implementation(implementation)
    inputs = inputs_of(processor, list(MIXED), COUNTS)
    with attach(model, Forced(plan=PLAN, batch=batch)):
        together, logits = greedy(model, inputs), checks.next_logits(model, inputs)
        assert exits(model) == list(PLAN)
    for row, plan in enumerate(PLAN):
        with attach(model, Forced(plan=(plan,))):
            single = alone(processor, MIXED, COUNTS, row)
            assert torch.equal(greedy(model, single)[0], together[row])
            close(checks.next_logits(model, single)[0], logits[row], 2e-4)


# ---- acceptance 7: operations ----


@pytest.mark.parametrize("layer", [0, 1, 3])
@torch.no_grad()
def test_acceptance_7_counted_operations_follow_the_formula(layer):
    """(e+1) F(T) + (L-1-e) F(T-V) + head, and the routers that were asked."""
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    config, width = model.config.text_config, model.config.text_config.hidden_size
    inputs = alone(processor, MIXED, COUNTS, 4)
    visual = visual_of(model, inputs)[0]
    n, v = len(visual), int(visual.sum())
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    anatomy = Anatomy(model)
    layout = mmlm.TokenLayout.from_ids(inputs["input_ids"], None, image_ids=anatomy.image_ids)
    method = Forced(plan=(layer,), hidden=64)
    with attach(model, method, layout=layout), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeds, logits_to_keep=1)
    lengths = [n if number <= layer else n - v for number in range(LAYERS)]
    routers = (layer + 1) * (2 * 2 * width * 64 + 2 * 64 * 2)
    pooling = (layer + 1) * 2 * 2 * width * int((~visual).sum())  # at most: the text is averaged
    expected = flops.prefill(config, lengths) + routers
    assert expected <= counter.get_total_flops() <= expected + pooling
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.001 + pooling / expected)
    saved = flops.prefill(config, [n] * LAYERS) - flops.prefill(config, lengths)
    assert saved == (LAYERS - 1 - layer) * (
        flops.decoder_layer(config, n) - flops.decoder_layer(config, n - v)
    )


def test_the_formula_gives_the_published_savings():
    """Section 7: LLaVA-1.5-7B, 576 visual and 64 text tokens, causal."""
    from types import SimpleNamespace

    seven = SimpleNamespace(
        hidden_size=4096,
        num_attention_heads=32,
        intermediate_size=11008,
        num_hidden_layers=32,
        vocab_size=32000,
    )
    whole = flops.prefill(seven, [640] * 32, causal=True)
    assert whole / 1e12 == pytest.approx(8.40, abs=0.01)
    for layer, saved in {7: 67.6, 11: 56.3, 15: 45.0, 17: 39.4, 19: 33.8, 23: 22.5}.items():
        lengths = [640] * (layer + 1) + [64] * (31 - layer)
        left = flops.prefill(seven, lengths, causal=True) + (layer + 1) * 33_600_000
        assert 100 * (1 - left / whole) == pytest.approx(saved, abs=0.06)


# ---- batches: sync, split, beams ----


@torch.no_grad()
def test_sync_exits_when_enough_rows_have_voted():
    model, processor = tiny.shared("llava")
    inputs = inputs_of(processor, list(MIXED), COUNTS)
    plan = (0, 1, -1, 2, -1, 2)  # votes of the five rows with an image: 1, 2, 4, 4

    def left(share):
        with attach(model, Forced(plan=plan, batch="sync", sync_share=share)):
            checks.next_logits(model, inputs)
            return exits(model)

    assert left(0.2) == [0, 0, -1, 0, 0, 0]
    assert left(0.4) == [1, 1, -1, 1, 1, 1]
    assert left(0.8) == [2, 2, -1, 2, 2, 2]
    assert left(1.0) == [-1] * 6


@torch.no_grad()
def test_split_runs_two_short_batches_and_fills_the_same_cache():
    model, processor = tiny.shared("llava")
    inputs = inputs_of(processor, list(MIXED), COUNTS)
    widths, caches = {}, {}
    for batch in ("exact", "split"):
        seen = widths[batch] = []
        handle = (
            model.get_decoder()
            .layers[3]
            .mlp.register_forward_hook(lambda m, a, y, seen=seen: seen.append(tuple(y.shape[:2])))
        )
        with attach(model, Forced(plan=PLAN, batch=batch)):
            caches[batch] = model(**inputs, use_cache=True).past_key_values
            kept = model._mmlm_session.kept >= 0
        handle.remove()
    n = inputs["input_ids"].shape[1]
    assert widths["exact"] == [(6, n)]
    (short, long) = widths["split"]
    assert short[0] + long[0] == 6
    assert short[0] == 4  # three rows that left, and the one without an image
    assert short[1] < long[1] == n
    for ours, theirs in zip(caches["split"].layers, caches["exact"].layers, strict=True):
        seen = kept if ours.keys.shape[2] == kept.shape[1] else slice(None)
        close(ours.keys.transpose(1, 2)[seen], theirs.keys.transpose(1, 2)[seen])
        close(ours.values.transpose(1, 2)[seen], theirs.values.transpose(1, 2)[seen])


@torch.no_grad()
def test_split_waits_for_enough_rows():
    model, processor = tiny.shared("llava")
    inputs = inputs_of(processor, list(MIXED), COUNTS)
    calls = []
    handle = (
        model.get_decoder().layers[3].mlp.register_forward_hook(lambda m, a, y: calls.append(1))
    )
    for split_min, expected in ((3, 2), (4, 1)):
        with attach(model, Forced(plan=PLAN, batch="split", split_min=split_min)):
            del calls[:]
            checks.next_logits(model, inputs)
            assert len(calls) == expected
    handle.remove()


def test_split_is_refused_beside_methods_inside_layers():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(IncompatibleMethods, match=r"VHR.* acts inside of layer 3 \(heads\).*DyVTE"),
        attach(model, DyVTE(exit_layer=1, batch="split"), mmlm.VHR()),
    ):
        pass


@pytest.mark.parametrize("batch", ["exact", "split"])
@torch.no_grad()
def test_beams_leave_together_and_share_a_record(batch):
    model, processor = tiny.shared("llava")
    inputs = inputs_of(processor, list(MIXED[:2]), COUNTS[:2])
    gone = visual_of(model, inputs)
    gone[1] = False
    expected = masked(model, inputs, gone, (2, 3), lambda m, i: greedy(m, i, num_beams=3))
    with attach(model, Forced(plan=(1, -1), batch=batch, split_min=1)):
        found = greedy(model, inputs, num_beams=3)
        records = measured(model, [checks.NEW] * 2)
        several = greedy(model, inputs, num_beams=3, num_return_sequences=2)
        four = measured(model, [checks.NEW] * 4)
        with pytest.raises(ValueError, match="5 numbers of tokens for 2 prompts"):
            measured(model, [checks.NEW] * 5)
    assert torch.equal(found, expected)
    assert len(several) == 4
    assert [r["dyvte"]["exit_layer"] for r in records] == [1, -1]
    assert [r["dyvte"]["exit_layer"] for r in four] == [1, 1, -1, -1]


# ---- the record, gates, weights ----


@torch.no_grad()
def test_the_record_says_who_was_asked():
    model, processor = tiny.shared("llava")
    inputs = inputs_of(processor, list(MIXED[:3]), COUNTS[:3])
    with attach(model, Forced(plan=(0, 2, -1))):
        output = model(**inputs, use_cache=True)
        first, second, third = (record["dyvte"] for record in measured(model))
        assert list(first["gate_logits"]) == ["0"]
        assert list(second["gate_logits"]) == ["0", "1", "2"]
        assert third == {
            "exit_layer": -1, "text": "not asked", "gate_logits": {}, "later_turns": 0
        }  # fmt: skip
        more = torch.randint(5, 300, (3, 4))
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
        places = (mask.cumsum(-1) - 1)[:, -4:]
        model(
            input_ids=more,
            attention_mask=mask,
            position_ids=places,
            past_key_values=output.past_key_values,
        )
        assert measured(model)[0]["dyvte"]["later_turns"] == 1


@torch.no_grad()
def test_only_the_chosen_layers_are_asked():
    model, processor = tiny.shared("llava")
    inputs = alone(processor, MIXED, COUNTS, 0)

    def asked(**settings):
        with attach(model, Fresh(threshold=math.inf, **settings)):
            checks.next_logits(model, inputs)
            return list(measured(model)[0]["dyvte"]["gate_logits"])

    assert asked(gate_layers=(0, 2)) == ["0", "2"]
    assert asked(min_layer=1, max_layer=2) == ["1", "2"]
    assert asked(gate_layers=(0, 3), min_layer=1) == ["3"]


@torch.no_grad()
def test_a_file_of_all_routers_serves_some_layers(tmp_path):
    model, processor = tiny.build("llava")
    inputs = alone(processor, MIXED, COUNTS, 0)
    build_in(model, Fresh())
    torch.nn.init.normal_(model.mmlm_methods["Fresh"].at(1).w2.weight)
    store(model, "Fresh", tmp_path / "r.safetensors")
    built = checks.next_logits(model, inputs)
    expected = model._mmlm_session.states[0].logits
    mmlm.engine.build_in.take_out(model)
    some = Fresh(weights_file=str(tmp_path / "r.safetensors"), gate_layers=(1,), threshold=math.inf)
    with attach(model, some):
        checks.next_logits(model, inputs)
        z = measured(model)[0]["dyvte"]["gate_logits"]
    assert list(z) == ["1"]
    assert built.shape == (1, model.config.text_config.vocab_size)
    if 1 in expected:
        close(torch.tensor(z["1"]), expected[1][0])


@torch.no_grad()
def test_routers_are_stored_with_the_model(tmp_path):
    model, processor = tiny.build("llava")
    inputs = inputs_of(processor, list(MIXED[:2]), COUNTS[:2])
    build_in(model, DyVTE(hidden=8))
    expected, tokens = checks.next_logits(model, inputs), greedy(model, inputs)
    save(model, processor, tmp_path)
    again, _ = mmlm.load(str(tmp_path))
    close(checks.next_logits(again, inputs), expected, 0)
    assert torch.equal(greedy(again, inputs), tokens)
    names = [n for n in again.state_dict() if "mmlm_methods" in n]
    assert "mmlm_methods.DyVTE.0.w1.weight" in names
    assert len(names) == 2 * LAYERS


@torch.no_grad()
def test_nothing_leaves_in_training_mode_or_while_held():
    model, processor = tiny.build("llava")
    inputs = alone(processor, MIXED, COUNTS, 0)
    plain = checks.next_logits(model, inputs)
    build_in(model, DyVTE(hidden=8, threshold=-1000.0))
    assert not torch.allclose(checks.next_logits(model, inputs), plain, atol=1e-4)
    with model.mmlm_methods["DyVTE"].hold():
        assert torch.equal(checks.next_logits(model, inputs), plain)
    model.train()
    assert torch.equal(checks.next_logits(model, inputs), plain)


def test_xavier_is_how_routers_begin():
    """Uniform within sqrt(6 / (inputs + outputs)), and nearly that far."""
    torch.manual_seed(0)
    router = Router(width=64, hidden=256)
    for matrix in (router.w1.weight, router.w2.weight):
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.98 * bound < float(matrix.detach().abs().max()) <= bound


def test_size_of_the_routers_at_seven_billion():
    """16.8 M parameters per layer with the paper's hidden width, 537 M in all."""
    with torch.device("meta"):
        router = Router(width=4096, hidden=2048)
    assert sum(p.numel() for p in router.parameters()) == 2 * 4096 * 2048 + 4096
    assert 32 * (2 * 4096 * 2048 + 4096) == 537_001_984


# ---- errors and limits: one test per row of section 9 ----


def test_error_number_of_routers(tmp_path):
    model, _ = tiny.build("llava", layers=2)
    build_in(model, DyVTE(hidden=8))
    store(model, "DyVTE", tmp_path / "two.safetensors")
    deeper, _ = tiny.shared("llava")
    file = str(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="holds 2 routers, of the layers 0, 1, but 4 are needed"):
        with attach(deeper, DyVTE(weights_file=file, hidden=8)):
            pass
    with pytest.raises(ValueError, match="2 are needed: one for the layers 1, 3"):
        with attach(deeper, DyVTE(weights_file=file, hidden=8, gate_layers=(1, 3))):
            pass


def test_error_width_of_the_routers(tmp_path):
    model, _ = tiny.build("llava")
    anatomy = Anatomy(model)
    anatomy.width = 32
    from safetensors.torch import save_file

    save_file(DyVTE(hidden=8).modules(anatomy).state_dict(), tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"read states of width 32, the model's have 64"):
        with attach(model, DyVTE(weights_file=str(tmp_path / "narrow.safetensors"), hidden=8)):
            pass
    anatomy.width = 64
    save_file(DyVTE(hidden=8).modules(anatomy).state_dict(), tmp_path / "flat.safetensors")
    with pytest.raises(ValueError, match=r"have hidden=8, the setting says hidden=16"):
        with attach(model, DyVTE(weights_file=str(tmp_path / "flat.safetensors"), hidden=16)):
            pass


@torch.no_grad()
def test_error_no_visual_mask():
    model, processor = tiny.build("llava")
    embeds = model.get_input_embeddings()(alone(processor, MIXED, COUNTS, 0)["input_ids"])
    with attach(model, DyVTE.fixed(layer=1)), pytest.raises(ValueError, match="inputs_embeds only"):
        model(inputs_embeds=embeds)
    model.config.image_token_id = None
    with pytest.raises(ValueError, match="has no visual placeholder token"):
        with attach(model, DyVTE.fixed(layer=1)):
            pass


def test_error_static_cache():
    model, processor = tiny.shared("llava")
    inputs = alone(processor, MIXED, COUNTS, 0)
    method = DyVTE.fixed(layer=1)
    with attach(model, method), pytest.raises(NotImplementedError, match="a static cache"):
        greedy(model, inputs, cache_implementation="static", disable_compile=True)
    from transformers import StaticCache

    cache = StaticCache(config=model.config.text_config, max_cache_len=200)
    with attach(model, method), pytest.raises(NotImplementedError, match="a static cache"):
        greedy(model, inputs, past_key_values=cache, disable_compile=True)
    with attach(model, method.neutral()):  # which removes nothing
        greedy(model, inputs, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize(("ids", "rule"), [
    ("text image", "all text"),
    ("text image text image", "after the first image"),
    ("image", "no text"),
])  # fmt: skip
@torch.no_grad()
def test_a_prompt_without_text_behind_the_image_is_no_error(ids, rule):
    """The last position is visual then; it makes the next token and stays."""
    model, processor = tiny.shared("llava")
    pixels, image = [], model.config.image_token_id
    row = []
    for word in ids.split():
        row += [image] * 16 if word == "image" else [5, 6, 7]
        if word == "image":
            one = tiny.inputs(processor, [MIXED[0]], [[tiny.picture(len(pixels))]])
            pixels.append(one["pixel_values"])
    inputs = {"input_ids": torch.tensor([row]), "pixel_values": torch.cat(pixels)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with attach(model, Fresh(threshold=-1000.0)):
        output = model(**inputs, use_cache=True)
        record = measured(model)[0]["dyvte"]
    assert record["text"] == rule
    assert record["exit_layer"] == (-1 if rule == "no text" else 0)
    if rule == "no text":
        assert lengths_of(output) == [len(row)] * LAYERS
        return
    left = sum(token != image for token in row) + 1
    assert lengths_of(output) == [len(row), *[left] * (LAYERS - 1)]


@torch.no_grad()
def test_a_text_only_batch_skips_the_routers():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, list(MIXED[:2]), [[], []])
    plain = checks.next_logits(model, inputs)
    with attach(model, Fresh(threshold=-1000.0)):
        asked = []
        for router in model._mmlm_session.lent["Fresh"].values():
            router.register_forward_hook(lambda *a: asked.append(1))
        assert torch.equal(checks.next_logits(model, inputs), plain)
        assert exits(model) == [-1, -1]
    assert not asked


@torch.no_grad()
def test_hidden_states_of_upper_layers_are_shorter():
    """Allowed, and documented under Limits."""
    model, processor = tiny.shared("llava")
    inputs = alone(processor, MIXED, COUNTS, 0)
    n, v = inputs["input_ids"].shape[1], int(visual_of(model, inputs).sum())
    with attach(model, DyVTE.fixed(layer=1)):
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    assert [s.shape[1] for s in states] == [n, n, n, n - v, n - v]


def test_error_no_routers():
    model, _ = tiny.shared("llava")
    with pytest.raises(IncompatibleMethods, match=r"weights that must be trained first") as caught:
        with attach(model, DyVTE()):
            pass
    assert "weights_file" in caught.value.advice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden must be an integer >= 1, got 0"),
        ({"min_layer": -1}, "min_layer must be an integer >= 0"),
        ({"min_layer": 3, "max_layer": 2}, "max_layer must be an integer >= 3, got 2"),
        ({"threshold": math.nan}, "threshold must be a finite number >= -1000"),
        ({"batch": "other"}, "batch must be one of 'exact', 'split', 'sync'"),
        ({"split_min": 0}, "split_min must be an integer >= 1"),
        ({"sync_share": 0.0}, "sync_share must be a finite number > 0 and <= 1"),
        ({"sync_share": 1.1}, "sync_share must be a finite number > 0 and <= 1"),
        ({"gate_layers": (1, 1)}, "gate_layers must be different"),
        ({"gate_layers": "all"}, "gate_layers must be a non-empty list of integers"),
        ({"exit_layer": -1}, "exit_layer must be an integer >= 0"),
        ({"exit_layer": 1, "gate_layers": (1,)}, "not both"),
        ({"exit_layer": 1, "weights_file": "f"}, "not both"),
        ({"weights_file": 3}, "weights_file must be a path, got 3"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DyVTE(**arguments)


@pytest.mark.parametrize("settings", [{"exit_layer": 4}, {"gate_layers": (0, 4)}, {"max_layer": 4}])
def test_a_layer_out_of_range_names_the_range(settings):
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match="layer 4 does not exist; the model has layers 0 to 3"),
        attach(model, DyVTE(**settings)),
    ):
        pass


def test_flex_attention_is_refused():
    model, _ = tiny.build("llava")
    model.get_decoder().config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModel, match="block masks"), attach(model, DyVTE.fixed(layer=1)):
        pass


# ---- probes beside an exit ----


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_text_dominance_sees_no_picture_above_an_exit(family, implementation):
    """As in a run in which visual keys are hidden instead, and ``exited`` is what it is called."""
    model, processor = tiny.build(family)
    model.set_attn_implementation(implementation)
    inputs = inputs_of(processor, list(MIXED[:2]), COUNTS[:2])
    gone = visual_of(model, inputs)
    gone[1] = False
    probe = mmlm.TextDominance(layers=(0, 1, 2, 3))

    def records(model, inputs, *methods):
        with attach(model, *methods, probe):
            greedy(model, inputs)
            return [record["text_dominance"] for record in measured(model)]

    hidden = masked(model, inputs, gone, (2, 3), records)
    exited = records(model, inputs, Forced(plan=(1, -1)))
    for ours, expected in zip(exited, hidden, strict=True):
        assert ours["n_visual"] == expected["n_visual"]
        assert ours["queries"] == expected["queries"] == checks.NEW - 1
        for name in ("text", "visual", "instruction", "first_token"):
            assert ours[name] == pytest.approx(expected[name], abs=1e-4)
    assert exited[0]["visual"][2:] == [0, 0]
    if family != "gemma3":  # whose windows have passed the picture
        assert exited[0]["visual"][1] > 0
        assert min(exited[1]["visual"][2:]) > 0


@dataclass(frozen=True, kw_only=True)
class LastRow(mmlm.Method):
    """Notes the position and the weights of the last row."""

    paper: ClassVar = mmlm.TextDominance.paper
    only_looks: ClassVar[frozenset[str]] = frozenset({"weights"})

    @property
    def rows(self):
        return "last"

    def neutral(self):
        return self

    def begin(self, prompt):
        return []

    def weights(self, state, layer, rows, a):
        state.append((layer, rows[:, 0].tolist(), a))


@torch.no_grad()
def test_the_last_row_above_an_exit_has_the_last_position():
    model, processor = tiny.shared("llava")
    inputs = alone(processor, MIXED, COUNTS, 0)
    n, gone = inputs["input_ids"].shape[1], visual_of(model, inputs)[0]
    with attach(model, DyVTE.fixed(layer=1), LastRow()):
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        seen = model._mmlm_session.states[1]
    assert [(layer, rows) for layer, rows, _ in seen] == [
        *((layer, [n - 1]) for layer in range(LAYERS)),
        *((layer, [n]) for layer in range(LAYERS)),
    ]
    for layer, _, a in seen:
        close(a.sum(-1), torch.ones_like(a[..., 0]))
        left = a[..., :n][..., gone]
        assert bool((left == 0).all()) if layer > 1 else bool((left > 0).any())
