"""VISTA: hand-computed examples, an uncached reference, the common acceptance tests by number."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack

import checks
import passes
import pytest
import tiny
import torch

from decoding.vcd import VCD
from decoding.vhr import VHR
from decoding.vista import VISTA, augment, steer, steering_vector
from mmlm import Anatomy, TokenLayout, attach

EPS = torch.finfo(torch.float32).eps


# ---- the equations, by hand ----


def test_a_position_along_the_vector_keeps_its_direction():
    # x = 2 e1, V = 5 e1: cos(x, -V) = -1, so y = 0.5 e1 and x' = 2 unit(1.5 e1).
    x, v = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[5.0, 0.0]])
    torch.testing.assert_close(steer(x, v, 0.5), x)


def test_a_position_across_the_vector_is_turned_by_lambda():
    # x = 2 e2, V = 5 e1: cos = 0, y = 0.5 e1, x' = 2 (0.5, 1) / sqrt(1.25).
    x, v = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[5.0, 0.0]])
    expected = 2 * torch.tensor([[[0.5, 1.0]]]) / math.sqrt(1.25)
    torch.testing.assert_close(steer(x, v, 0.5), expected)


def test_a_position_against_the_vector_is_turned_by_up_to_twice_lambda():
    # x = (-3, 4), |x| = 5; V along e1: cos(x, -V) = 0.6, y = 0.25 * 1.6 e1 = 0.4 e1.
    x, v = torch.tensor([[[-3.0, 4.0]]]), torch.tensor([[0.1, 0.0]])
    turned = torch.tensor([[[-0.6 + 0.4, 0.8]]])
    torch.testing.assert_close(steer(x, v, 0.25), 5 * turned / turned.norm())


def test_the_mixture_by_hand():
    # 0.3 * [1, 3] + 0.7 * [2, 0] = [1.7, 0.9]; as a delta on [2, 0]: [-0.3, 0.9].
    z, late = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 3.0]])
    torch.testing.assert_close(augment(z, late, 0.3), torch.tensor([[-0.3, 0.9]]))


def test_properties_of_the_steering():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 7, 16, generator=generator)
    v = torch.randn(3, 16, generator=generator)
    after = steer(x, v, 0.4)
    torch.testing.assert_close(after.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(after, steer(x, v * 9, 0.4))  # only the direction of V counts

    def towards(y):
        return torch.cosine_similarity(y, v[:, None], dim=-1)

    assert bool((towards(after) >= towards(x)).all())
    torch.testing.assert_close(steer(x, v, 0.0), x)
    assert torch.equal(steer(torch.zeros(1, 1, 16), v[:1], 0.4), torch.zeros(1, 1, 16))


# ---- an uncached reference ----


def prompt_without_image(model, inputs):
    """Ids without placeholders and frames, one row."""
    anatomy = Anatomy(model)
    family = anatomy.family
    layout = TokenLayout.from_ids(
        inputs["input_ids"],
        None,
        image_ids=anatomy.image_ids,
        wrapper_ids=anatomy.wrapper_ids,
        framing=family.framing,
    )
    keep = ~(layout.visual | layout.frame)
    return inputs["input_ids"][keep][None]


def last_states(model, inputs):
    """Each layer's output at the last position, by plain hooks."""
    kept, handles = [], []
    for layer in model.get_decoder().layers:
        handles.append(
            layer.register_forward_hook(
                lambda m, a, out: kept.append((out[0] if isinstance(out, tuple) else out)[:, -1])
            )
        )
    z = model(**inputs, use_cache=False).logits[:, -1]
    for handle in handles:
        handle.remove()
    return kept, z


def naive_steer(x, v, strength):
    """The formula position by position."""
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            one, size = x[b, i], float(x[b, i].norm())
            unit, direction = one / size, v / v.norm()
            against = max(0.0, float(unit @ -direction))
            turned = unit + strength * (1 + against) * direction
            out[b, i] = size * turned / turned.norm()
    return out


def naive_vista(model, inputs, method, late):
    """(ids -> edited logits) for one prompt: everything computed anew, steering by plain hooks."""
    text_ids = prompt_without_image(model, inputs)
    with_image, _ = last_states(model, inputs)
    without, _ = last_states(model, {"input_ids": text_ids})
    vectors = [a[0] - b[0] for a, b in zip(with_image, without, strict=True)]

    def edit(ids):
        kept = {}

        def keep(number):
            def hook(module, args, out):
                kept[number] = (out[0] if isinstance(out, tuple) else out)[:, -1]

            return hook

        with ExitStack() as stack:
            for number, layer in enumerate(model.get_decoder().layers):
                part, vector = Anatomy(model).mlp(number), vectors[number]
                steering = part.register_forward_hook(
                    lambda m, a, out, v=vector: naive_steer(out, v, method.strength)
                )
                stack.callback(steering.remove)
                stack.callback(layer.register_forward_hook(keep(number)).remove)
            z = passes.whole_pass(model, inputs, ids)
        mixed = sum(model.lm_head(kept[layer]) for layer in late) / len(late)
        return method.late_weight * mixed + (1 - method.late_weight) * z

    return edit


SETTINGS = (VISTA(), VISTA(strength=0.4, late_weight=0.6, late_layers=(1, 2)))


@pytest.mark.parametrize("method", SETTINGS, ids=lambda m: m.label)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_equals_the_naive_reference(family, method):
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    late = method.late_layers or (2,)
    edit = naive_vista(model, inputs, method, late)
    with attach(model, method):
        z = checks.next_logits(model, inputs)
    torch.testing.assert_close(z, edit(inputs["input_ids"]), atol=2e-4, rtol=0)


# ---- common acceptance tests, by number ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_1_identity(family):
    checks.neutral_is_plain(VISTA(), family)


@pytest.mark.parametrize("method", SETTINGS, ids=lambda m: m.label)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_2_padded_batch_equals_single_runs(family, method):
    checks.batch_equals_single_rows(method, family)


@pytest.mark.parametrize("method", SETTINGS, ids=lambda m: m.label)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_acceptance_3_and_4_cached_and_beams_equal_uncached(family, options, method):
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    edit = naive_vista(model, inputs, method, method.late_layers or (2,))
    # A generated placeholder would ask the uncached passes for another picture.
    options = {**options, "suppress_tokens": [model.config.image_token_id]}
    with attach(model, method):
        ours = checks.generate(model, inputs, do_sample=False, **options)
    expected = passes.generate_recomputed(model, inputs, edit, do_sample=False, **options)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_5_auxiliary_rows_are_counted(family):
    checks.counted_cost(VISTA(), family)
    checks.counted_cost(VISTA(strength=0.0), family)
    assert VISTA().cost.prompt == 2
    assert VISTA(strength=0.0).cost.prompt == 0


@torch.no_grad()
def test_acceptance_6_two_methods_add_their_deltas():
    """SLA beside VCD: both edit the same main logits."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    late, noised = VISTA(strength=0.0), VCD(beta=0.0)
    z = checks.next_logits(model, inputs)
    deltas = []
    for method in (late, noised):
        with attach(model, method):
            deltas.append(checks.next_logits(model, inputs) - z)
    for pair in ((late, noised), (noised, late)):
        with attach(model, *pair):
            both = checks.next_logits(model, inputs)
        torch.testing.assert_close(both, z + sum(deltas), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_acceptance_7_nothing_remains(family):
    checks.leaves_no_trace(VISTA(), family)
    checks.survives_a_failing_forward(VISTA(), family)


@torch.no_grad()
def test_acceptance_8_left_padded_qwen_equals_single_runs_in_generate():
    """3-D positions, no start token; the tiny models share key/value heads everywhere."""
    checks.batch_equals_single_rows(VISTA(strength=0.5), "qwen2_5_vl")


# ---- the two extra prefills ----


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_text_only_prefill_keeps_the_chat_template(family):
    """Its embeddings are those of the template's ids without placeholders and frames."""
    model, processor = tiny.shared(family)
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    kept = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: kept.append(k["inputs_embeds"]), with_kwargs=True
    )
    with attach(model, VISTA()):
        model(**inputs)
    handle.remove()
    ids = prompt_without_image(model, inputs)
    same, without, main = kept
    assert torch.equal(same, main)
    assert torch.equal(without, model.get_input_embeddings()(ids))
    text = processor.tokenizer.decode(ids[0])
    assert "user:" in text
    assert "assistant:" in text
    assert checks.PROMPTS[0] in text


@torch.no_grad()
def test_the_model_is_plain_while_the_vectors_are_taken():
    """Other methods do not reach them, so the order of attaching does not matter."""
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)

    def vectors(*methods):
        with attach(model, *methods):
            model(**inputs)
            index = [type(m) for m in methods].index(VISTA)
            return model._mmlm_session.states[index].vectors

    alone, beside = vectors(VISTA()), vectors(VHR(alpha=4.0), VISTA(strength=0.5))
    assert all(torch.equal(alone[layer], beside[layer]) for layer in range(4))


@torch.no_grad()
def test_without_steering_nothing_is_run_and_no_mlp_is_touched():
    model, _ = tiny.build("llava")  # a shared one may hold hooks that the library installs for good
    with attach(model, VISTA(strength=0.0)):
        assert not Anatomy(model).mlp(0)._forward_hooks
        assert not model.get_decoder().layers[0]._forward_hooks
        assert model.get_decoder().layers[2]._forward_hooks


# ---- one test per line under "Differs" and per error ----


def test_the_vector_is_the_difference_itself():
    # The authors' PCA of one difference adds a unit vector at coordinate 0 of layer 0.
    a, b = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    assert steering_vector(a, b, EPS).tolist() == [[2.0, 0.0]]


def test_a_difference_within_rounding_steers_nothing():
    a = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    b = torch.tensor([[3.0, 4.0 + 1e-6], [3.0, 4.1]])
    vector = steering_vector(a, b, EPS)
    assert vector[0].tolist() == [0.0, 0.0]
    assert vector[1].abs().sum() > 0
    x = torch.ones(2, 1, 2)
    torch.testing.assert_close(steer(x, vector, 0.5)[0], x[0])


@torch.no_grad()
def test_a_window_that_does_not_reach_the_image_gives_no_vector():
    model, processor = tiny.shared("gemma3")
    with attach(model, VISTA()):
        model(**checks.batch(processor))
        vectors = model._mmlm_session.states[0].vectors
    assert bool((vectors[0] == 0).all())
    assert bool((vectors[1] != 0).any())


@torch.no_grad()
def test_the_head_of_the_mean_is_the_mean_of_the_heads():
    model, _ = tiny.shared("llava")
    states = torch.randn(3, 2, 64)
    of_mean = model.lm_head(states.mean(0))
    torch.testing.assert_close(of_mean, model.lm_head(states).mean(0), atol=1e-5, rtol=0)


def test_late_layers_scale_with_depth():
    assert VISTA().chosen_layers(32) == tuple(range(25, 31))
    assert VISTA().chosen_layers(40) == tuple(range(31, 39))
    assert VISTA().chosen_layers(8) == (5, 6)
    assert VISTA().chosen_layers(4) == (2,)
    assert VISTA().chosen_layers(2) == (0,)
    assert VISTA().chosen_layers(1) == (0,)


def test_presets_follow_the_authors():
    assert VISTA.chair() == VISTA() == VISTA(strength=0.17, late_weight=0.3)
    assert VISTA.pope().strength == 0.01
    assert VISTA.mmhal().strength == 0.1


@torch.no_grad()
def test_rows_without_image_are_left_alone():
    checks.image_free_row_is_unchanged(VISTA(), "qwen2_5_vl")


@torch.no_grad()
def test_half_precision_models_are_steered_in_their_precision():
    model, processor = tiny.build("llava")
    model = model.to(torch.bfloat16)
    inputs = checks.batch(processor)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    plain = checks.next_logits(model, inputs)
    with attach(model, VISTA()):
        edited = checks.next_logits(model, inputs)
    assert edited.dtype == torch.bfloat16
    assert edited.isfinite().all()
    assert not torch.allclose(edited, plain, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -0.1}, "strength must be a finite number >= 0, got -0.1"),
        ({"strength": math.nan}, "strength must be a finite number >= 0, got nan"),
        ({"late_weight": 1.5}, "late_weight must be a finite number >= 0 and <= 1, got 1.5"),
        ({"late_layers": ()}, "late_layers must be a non-empty list"),
        ({"late_layers": (2, 2)}, "late_layers must be different and >= 0, got (2, 2)"),
        ({"late_layers": ("a",)}, "late_layers must be a non-empty list of integers, got ('a',)"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VISTA(**arguments)


def test_a_layer_out_of_range_names_the_range():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match="layer 9 does not exist; the model has layers 0 to 3"),
        attach(model, VISTA(late_layers=(9,))),
    ):
        pass
