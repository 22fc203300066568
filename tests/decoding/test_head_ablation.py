"""HeadAblation: hand examples, naive references, files of heads and their controls, refusals."""

from __future__ import annotations

import checks
import pytest
import tiny
import torch
from passes import next_passes

from decoding.head_ablation import HeadAblation, blinded, head_gains, levelled
from mmlm import PAI, VHR, Anatomy, StreamingHeads, attach
from mmlm.engine.head_maps import HeadMap
from mmlm.engine.selections import by_layer
from mmlm.errors import IncompatibleMethods, UnsupportedModel

HEADS = ((1, (0, 5)), (2, (3,)))
PROMPTS = ["describe the image in detail .", "is there a dog ?", "what is shown here now ?"]
PICTURES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)], [tiny.picture(4)]]


def batch(processor, n=3):
    return tiny.inputs(processor, PROMPTS[:n], PICTURES[:n])


def run(model, inputs, *methods, **options):
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False} | options
    with attach(model, *methods):
        return model.generate(**inputs, **given, output_logits=True, return_dict_in_generate=True)


def assert_equal(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


# ---- by hand ----


def test_gains_by_hand():
    assert head_gains(torch.tensor([0.0, 1, 0]), 0.25).flatten().tolist() == [1, 0.25, 1]


def test_level_scores_by_hand():
    s = torch.tensor([[[[1.0, -2, 3]], [[4.0, 5, 6]]]])
    delta = levelled(s, torch.tensor([1.0, 0]), 0.0)
    assert (s + delta).tolist() == [[[[0, 0, 0]], [[4, 5, 6]]]]
    half = s + levelled(s, torch.tensor([1.0, 0]), 0.5)
    assert half[0, 0].tolist() == [[0.5, -1, 1.5]]


def test_blind_rows_by_hand():
    a = torch.tensor([[[[0.2, 0.6, 0.2]], [[0.2, 0.6, 0.2]]]])
    visual = torch.tensor([[0.0, 1, 0]])
    got = blinded(a, visual, torch.tensor([1.0, 0]), 0.0)
    torch.testing.assert_close(got[0, :, 0], torch.tensor([[0.5, 0, 0.5], [0.2, 0.6, 0.2]]))
    half = blinded(a, visual, torch.tensor([1.0, 0]), 0.5)
    torch.testing.assert_close(half[0, 0, 0], torch.tensor([0.2, 0.3, 0.2]) / 0.7)


def test_rows_of_the_image_alone_and_rows_without_it_stay():
    a = torch.tensor([[[[0.4, 0.6, 0.0], [0.0, 0.0, 1.0]]]])
    visual = torch.tensor([[1.0, 1, 0]])
    assert torch.equal(blinded(a, visual, torch.ones(1), 0.0), a)


# ---- against naive references ----


def test_probes_acceptance_6_zero_is_a_model_without_those_columns():
    model, processor = tiny.build("llava")
    inputs = batch(processor)
    ablated = run(model, inputs, HeadAblation(heads_by_layer=HEADS))
    plain = run(model, inputs)
    anatomy = Anatomy(model)
    for layer, heads in HEADS:
        weight = anatomy.o_proj(layer).weight
        d = weight.shape[1] // anatomy.n_heads
        with torch.no_grad():
            for head in heads:
                weight[:, head * d : (head + 1) * d] = 0
    assert_equal(run(model, inputs), ablated)
    assert not torch.equal(plain.logits[0], ablated.logits[0])


@pytest.mark.parametrize("kind", ["zero", "uniform", "blind"])
def test_probes_acceptance_6_gain_1_changes_no_bit(kind):
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    plain = run(model, inputs)
    for method in (
        HeadAblation(kind=kind, gain=1.0, heads_by_layer=HEADS),
        HeadAblation(kind=kind, gain=1.0),
    ):
        assert_equal(run(model, inputs, method), plain)
    assert_equal(run(model, inputs, HeadAblation().neutral()), plain)
    assert not torch.equal(
        run(model, inputs, HeadAblation(kind=kind, heads_by_layer=HEADS)).logits[1],
        plain.logits[1],
    )


def captured(model, inputs, method, layer):
    """Head outputs [B, N, H, d] and values [B, H, N, d] of the first pass."""
    anatomy = Anatomy(model)
    kept = {}
    attention = anatomy.attention(layer)
    with attach(model, method), torch.no_grad():
        hooks = [
            anatomy.o_proj(layer).register_forward_pre_hook(
                lambda m, args: kept.update(heads=anatomy.split_heads(args[0]))
            ),
            attention.v_proj.register_forward_hook(lambda m, a, out: kept.update(values=out)),
        ]
        model(**inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
    d = kept["heads"].shape[-1]
    values = kept["values"].unflatten(-1, (-1, d)).transpose(1, 2)
    return kept["heads"], values.repeat_interleave(anatomy.n_heads // values.shape[1], 1)


@pytest.mark.parametrize("steps", ["all", "decode"])
def test_probes_acceptance_6_uniform_heads_give_the_mean_of_visible_values(steps):
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    method = HeadAblation(kind="uniform", steps=steps, heads_by_layer=((0, (2, 6)),))
    heads, values = captured(model, inputs, method, 0)
    plain, _ = captured(model, inputs, HeadAblation(gain=1.0), 0)
    real = inputs["attention_mask"][:, None, :, None].float()
    means = (values * real).cumsum(2) / real.cumsum(2).clamp(min=1)
    asked = slice(-1, None) if steps == "decode" else slice(0, None)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        where = mask.clone()
        where[: -1 if steps == "decode" else 0] = False
        for head in (2, 6):
            torch.testing.assert_close(
                heads[row, where, head], means[row, head, where], atol=1e-5, rtol=0
            )
        rest = mask & ~where
        assert torch.equal(heads[row, rest], plain[row, rest])
    others = [0, 1, 3, 4, 5, 7]
    assert torch.equal(heads[:, asked][:, :, others], plain[:, asked][:, :, others])


def test_probes_acceptance_6_blind_heads_see_no_image():
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    inputs = batch(processor)
    method = HeadAblation(kind="blind", heads_by_layer=((1, (0, 3)),))
    with attach(model, method), torch.no_grad():
        edited = model(**inputs, output_attentions=True).attentions[1]
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True).attentions[1]
    image = torch.isin(inputs["input_ids"], torch.tensor(Anatomy(model).image_ids))
    for row in range(3):
        last = int(image[row].nonzero()[-1])
        behind = edited[row, [0, 3], last + 1 :]
        assert not behind[..., image[row]].any()
        torch.testing.assert_close(behind.sum(-1), torch.ones(behind.shape[:2]))
        assert torch.equal(edited[row, :, : last + 1], plain[row, :, : last + 1])
        assert torch.equal(edited[row, [1, 2, 4]], plain[row, [1, 2, 4]])


@pytest.mark.parametrize("kind", ["zero", "uniform", "blind"])
@pytest.mark.parametrize("steps", ["all", "decode"])
def test_probes_acceptance_7_cache_batch_and_failures(kind, steps):
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    method = HeadAblation(kind=kind, steps=steps, heads_by_layer=HEADS)
    for check in (
        checks.batch_equals_single_rows,
        checks.leaves_no_trace,
        checks.survives_a_failing_forward,
        checks.inputs_stay_untouched,
    ):
        check(method, "llava")
    if steps == "all":
        # One pass over prompt and answer is what the cached steps were.
        checks.cache_paths_agree(method, "llava")
        out = run(model, inputs, method)
        whole = {
            **inputs,
            "input_ids": out.sequences,
            "attention_mask": torch.cat(
                [inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1
            ),
        }
        with attach(model, method), torch.no_grad():
            z = model(**whole, use_cache=False).logits
        for step, logits in enumerate(out.logits):
            torch.testing.assert_close(z[:, step - 5], logits, atol=2e-4, rtol=1e-4)


def test_decode_starts_with_the_last_row_of_the_prompt():
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    for kind in ("zero", "uniform", "blind"):
        method = HeadAblation(kind=kind, steps="decode", heads_by_layer=((1, (0,)),))
        edited, _ = captured(model, inputs, method, 1)
        plain, _ = captured(model, inputs, HeadAblation(gain=1.0), 1)
        assert torch.equal(edited[:, :-1], plain[:, :-1])
        assert not torch.equal(edited[:, -1, 0], plain[:, -1, 0])


def test_new_tokens_of_one_pass_are_all_edited():
    """A search looks at several next tokens at once: three of them in a pass are three passes."""
    model, processor = tiny.shared("llava")
    inputs = batch(processor, 1)
    new, found = torch.tensor([[5, 6, 7]]), []
    for sizes in ((3,), (1, 1, 1)):
        with attach(model, HeadAblation(steps="decode", heads_by_layer=HEADS)):
            found.append(next_passes(model, inputs, new, sizes))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_steps_follow_the_kind():
    assert HeadAblation(kind="uniform").rows == "last"
    assert HeadAblation(kind="uniform", steps="all").rows == "all"
    assert HeadAblation(kind="blind").rows == "tail"
    assert HeadAblation(kind="blind", steps="decode").rows == "last"
    assert HeadAblation(kind="zero").rows == "none"
    assert {HeadAblation(kind=k).sites for k in ("zero", "uniform", "blind")} == {
        frozenset({"heads"}),
        frozenset({"scores"}),
        frozenset({"weights"}),
    }


def test_an_ablated_head_is_gone_without_an_image_too():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, ["is there a dog ?"], [[]])
    plain = run(model, inputs)
    assert not torch.equal(
        run(model, inputs, HeadAblation(heads_by_layer=HEADS)).logits[0], plain.logits[0]
    )
    for kind in ("uniform", "blind"):
        assert_equal(run(model, inputs, HeadAblation(kind=kind, heads_by_layer=HEADS)), plain)


# ---- files ----


def write(tmp_path, shape=(4, 8), **facts):
    score = torch.linspace(0.9, 0.0, shape[0] * shape[1], dtype=torch.float64).reshape(shape)
    path = tmp_path / "heads.json"
    found = HeadMap(
        kind="visual", values={"hit_rate": score}, rank="hit_rate", threshold=0.85, facts=facts
    )
    found.save(path)
    return str(path), found


def test_heads_of_a_file(tmp_path):
    path, found = write(tmp_path)
    assert HeadAblation(heads_file=path).ablated == ((0, (0, 1)),) == by_layer(found.heads)
    assert HeadAblation(heads_file=path, top=10).ablated == ((0, tuple(range(8))), (1, (0, 1)))
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    given = run(model, inputs, HeadAblation(heads_by_layer=((0, (0, 1, 2)),)))
    assert_equal(run(model, inputs, HeadAblation(heads_file=path, top=3)), given)


def test_controls_are_other_heads_of_the_same_layers(tmp_path):
    path, _ = write(tmp_path)
    own = HeadAblation(heads_file=path, top=3).ablated
    drawn = {HeadAblation(heads_file=path, top=3, control=seed).ablated for seed in range(5)}
    assert len(drawn) > 1
    for ((layer, heads),) in drawn:
        assert layer == 0
        assert len(heads) == 3
        assert not set(heads) & set(own[0][1])


def test_other_weights_get_a_warning(tmp_path):
    path, _ = write(tmp_path, weights="sha256:other", model="that one")
    model, _ = tiny.shared("llava")
    method = HeadAblation(heads_file=path)
    with pytest.warns(UserWarning, match="other weights"), attach(model, method):
        pass


# ---- errors ----


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"kind": "none"}, "kind must be one of"),
        ({"gain": -0.1}, "gain must be a finite number >= 0"),
        ({"gain": float("inf")}, "gain must be a finite number >= 0"),
        ({"steps": "prompt"}, "steps must be one of"),
        ({"top": 0, "heads_file": "x"}, "top must be an integer >= 1"),
        ({"control": -1, "heads_file": "x"}, "control must be an integer >= 0"),
        ({"top": 3}, "choose among the heads of heads_file"),
        ({"control": 1}, "choose among the heads of heads_file"),
        ({"heads_by_layer": HEADS, "heads_file": "x"}, "excludes heads_file"),
        ({"heads_by_layer": ()}, "not empty"),
        ({"heads_by_layer": ((1, (2, 2)),)}, "every layer and head once"),
        ({"heads_file": "missing.json"}, "there is no file 'missing.json'"),
    ],
)
def test_error_values_out_of_range(parameters, match):
    with pytest.raises(ValueError, match=match):
        HeadAblation(**parameters)


def test_files_without_such_heads_are_refused(tmp_path):
    path, found = write(tmp_path)
    with pytest.raises(ValueError, match="33 heads of 4 x 8"):
        HeadAblation(heads_file=path, top=33)
    with pytest.raises(ValueError, match="too few for a control"):
        HeadAblation(heads_file=path, top=6, control=0)
    low = HeadMap(kind="visual", values=found.values, rank="hit_rate", threshold=0.95)
    low.save(path)
    with pytest.raises(ValueError, match=r"no head is above the threshold 0\.95"):
        HeadAblation(heads_file=path)


def test_error_heads_that_do_not_exist():
    model, _ = tiny.shared("llava")
    for heads in (((1, (8,)),), ((4, (0,)),)):
        method = HeadAblation(heads_by_layer=heads)
        with pytest.raises(ValueError, match="HeadAblation: layer"), attach(model, method):
            pass


def test_error_a_file_of_another_shape(tmp_path):
    path, _ = write(tmp_path, shape=(2, 4))
    model, _ = tiny.shared("llava")
    method = HeadAblation(heads_file=path)
    with (
        pytest.raises(ValueError, match="2 layers of 4 heads; the model has 4 of 8"),
        attach(model, method),
    ):
        pass


def test_no_heads_are_refused():
    model, _ = tiny.shared("llava")
    with pytest.raises(UnsupportedModel, match="no heads are given"), attach(model, HeadAblation()):
        pass


def test_error_uniform_beside_another_method_at_scores():
    model, _ = tiny.shared("llava")
    method = HeadAblation(kind="uniform", heads_by_layer=HEADS)
    for pair in ((method, PAI()), (PAI(), method)):
        with pytest.raises(IncompatibleMethods, match="both act at scores"), attach(model, *pair):
            pass
    with attach(model, method, VHR()):
        pass
    blind = HeadAblation(kind="blind", heads_by_layer=HEADS)
    with attach(model, blind, PAI()):
        pass
    one_after_another = pytest.warns(UserWarning, match="they act one after another")
    with one_after_another, attach(model, blind, StreamingHeads(heads_by_layer=HEADS)):
        pass


def test_error_attention_that_is_asked_for_is_never_the_plain_one():
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    inputs = batch(processor, 1)
    method = HeadAblation(kind="uniform", heads_by_layer=((1, (0,)),))
    with attach(model, method), torch.no_grad():
        edited = model(**inputs, output_attentions=True).attentions[1][0, 0, -1]
    torch.testing.assert_close(edited, torch.full_like(edited, 1 / len(edited)))


def test_error_attention_of_heads_without_output_is_that_of_a_model_without_them():
    model, processor = tiny.build("llava")
    model.set_attn_implementation("eager")
    inputs = batch(processor, 1)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True).attentions
        with attach(model, HeadAblation(heads_by_layer=((1, (0,)),))):
            found = model(**inputs, output_attentions=True).attentions
        weight = Anatomy(model).o_proj(1).weight
        weight[:, : weight.shape[1] // 8] = 0
        expected = model(**inputs, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[2], plain[2])  # its own row is what it was; what follows is not


@pytest.mark.parametrize("kind", ["zero", "uniform", "blind"])
def test_error_attention_that_a_kernel_does_not_give_is_not_given(kind):
    model, processor = tiny.shared("llava")  # sdpa
    with attach(model, HeadAblation(kind=kind, heads_by_layer=((1, (0,)),))), torch.no_grad():
        assert not model(**batch(processor, 1), output_attentions=True).attentions
