"""CrossLMM: what is refused, and the edges of its inputs (section 7 of the method's contract)."""

import checks
import pytest
import tiny
import torch

import mmlm
from mmlm import attach, build_in
from mmlm.engine.attach import MARK
from mmlm.engine.build_in import take_out
from mmlm.engine.weights import store
from mmlm.errors import LayoutError, MissingTensors, UnsupportedModel
from mmlm.methods.cross_blocks import cross_attend
from mmlm.methods.crosslmm import CrossLMM


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_more_cells_than_states_is_refused_before_anything_runs():
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match=r"grid = 5, but a picture has 4 x 4 features"):
        attach(model, CrossLMM(grid=5)).__enter__()


def test_more_cells_than_states_of_one_picture():
    """A family whose pictures have any size says it when the picture comes."""
    model, processor = tiny.shared("qwen3_vl")
    with (
        attach(model, CrossLMM(grid=4)),
        pytest.raises(ValueError, match="grid = 4, but a picture has"),
    ):
        logits(model, checks.batch(processor))


def test_a_grid_that_is_no_square_must_be_said():
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    # 12 states: 3 x 4.
    projector = model.model.multi_modal_projector
    projector.register_forward_pre_hook(lambda module, args: (args[0][:, :12],))
    ids = inputs["input_ids"]
    image = model.config.image_token_id
    keep = torch.ones_like(ids, dtype=torch.bool)
    for row in range(2):
        keep[row, (ids[row] == image).nonzero().flatten()[:4]] = False
    inputs = {
        **inputs,
        "input_ids": ids[keep].view(2, -1),
        "attention_mask": inputs["attention_mask"][keep].view(2, -1),
    }
    with (
        attach(model, CrossLMM(grid=2)),
        pytest.raises(ValueError, match="12 states, which is no square grid") as caught,
    ):
        logits(model, inputs)
    assert "source_grid" in caught.value.advice
    with attach(model, CrossLMM(grid=2, source_grid=(3, 4))):
        logits(model, inputs)
        assert getattr(model, MARK).layout.visual.sum(-1).tolist() == [4, 4]
    with (
        attach(model, CrossLMM(grid=2, source_grid=(2, 4))),
        pytest.raises(ValueError, match="12 states, not 2 x 4"),
    ):
        logits(model, inputs)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_every_must_be_a_positive_integer(every):
    with pytest.raises(ValueError, match="every"):
        CrossLMM(every=every)


def test_every_beyond_the_layers_is_refused():
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match="every = 5, but the model has 4 layers"):
        attach(model, CrossLMM(grid=2, every=5)).__enter__()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grid", -1),
        ("pooling", "max"),
        ("kv_source", "llm"),
        ("v2v_scope", "row"),
        ("t2v_cache", "pooled"),
        ("t2v_cache", "pooled:0"),
        ("t2v_cache", "int4"),
        ("newline", "some"),
        ("v2v", 2),
        ("source_grid", (3,)),
        ("source_grid", (0, 4)),
    ],
)
def test_values_out_of_their_range_name_the_parameter(name, value):
    with pytest.raises(ValueError, match=name):
        CrossLMM(**{name: value})


def test_placeholders_without_pictures_are_refused():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    features = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with (
        attach(model, CrossLMM(grid=2)),
        pytest.raises(ValueError, match="nothing to look back at"),
    ):
        logits(model, {**inputs, "mm_encoder_outputs": {"image": features}})


def test_text_alone_is_left_as_it_is():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS, [[], []])
    plain = logits(model, inputs)
    tokens = checks.generate(model, inputs, do_sample=False)
    with attach(model, CrossLMM(grid=2, every=1, gate=2.0)):
        # A prompt with pictures before it must leave nothing behind.
        logits(model, checks.batch(processor))
        assert torch.equal(logits(model, inputs), plain)
        assert torch.equal(checks.generate(model, inputs, do_sample=False), tokens)


def test_a_row_without_a_picture_gets_exact_zeros():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(1)], []])
    added = []
    with attach(model, CrossLMM(grid=2, every=1, gate=2.0)):
        blocks = getattr(model, MARK).lent["CrossLMM"]
        for part in (*blocks.v2v.values(), *blocks.t2v.values()):
            part.register_forward_hook(lambda m, a, y: added.append(y))
        logits(model, inputs)
    assert len(added) == 8
    assert all(torch.equal(y[1], torch.zeros_like(y[1])) for y in added)
    assert all(y[0].abs().max() > 1e-3 for y in added)


def test_rows_with_different_numbers_of_pictures():
    """The shorter row's keys are padded, and it comes out as alone."""
    model, processor = tiny.shared("llava")
    own = [[tiny.picture(1)], [tiny.picture(2), tiny.picture(3), tiny.picture(4)]]
    with attach(model, CrossLMM(grid=2, every=1, gate=1.0)):
        both = logits(model, tiny.inputs(processor, checks.PROMPTS, own))[:, -1]
        state = getattr(model, MARK).states[0]
        assert state.keys.sum(-1).tolist() == [16, 48]
        for row, prompt in enumerate(checks.PROMPTS):
            alone = logits(model, tiny.inputs(processor, [prompt], [own[row]]))[:, -1]
            torch.testing.assert_close(alone[0], both[row], atol=1e-4, rtol=1e-4)


def test_a_picture_with_nothing_behind_it():
    model, processor = tiny.shared("llava")
    batch = processor(
        text=["what is <image>", "<image>"],
        images=[[tiny.picture(1)], [tiny.picture(2)]],
        padding=True,
        return_tensors="pt",
        padding_side="left",
    )
    with attach(model, CrossLMM(grid=2, every=1, gate=1.0)):
        found = logits(model, dict(batch))
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"every": 2}, "made with every = 4, but every = 2"),
        ({"kv_source": "projected"}, "made with kv_source = 'tower', but kv_source = 'projected'"),
        ({"temporal_pos": True}, "made with temporal_pos = False, but temporal_pos = True"),
    ],
    ids=str,
)
def test_weights_of_other_settings_are_refused_naming_both(tmp_path, changed, message):
    model, _ = tiny.build("llava")
    path = str(tmp_path / "blocks.safetensors")
    build_in(model, CrossLMM(grid=2))
    store(model, "CrossLMM", path)
    take_out(model)
    with pytest.raises(ValueError, match=message):
        attach(model, CrossLMM(grid=2, weights_file=path, **changed)).__enter__()
    with attach(model, CrossLMM(grid=2, weights_file=path)):  # the very same
        pass


def test_weights_of_another_model_are_refused_with_their_names(tmp_path):
    model, _ = tiny.build("llava")
    path = str(tmp_path / "blocks.safetensors")
    build_in(model, CrossLMM(grid=2))
    store(model, "CrossLMM", path)
    other, _ = tiny.build("paligemma")
    with pytest.raises(MissingTensors, match=r"v2v\.0\.\w+"):
        attach(other, CrossLMM(grid=2, weights_file=path)).__enter__()


def test_stored_weights_come_back(tmp_path):
    model, processor = tiny.build("llava")
    inputs = checks.batch(processor)
    path = str(tmp_path / "blocks.safetensors")
    build_in(model, CrossLMM(grid=2, gate=1.0))
    with torch.no_grad():
        for parameter in model.mmlm_methods.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trained = logits(model, inputs)
    store(model, "CrossLMM", path)
    names = {n for n, _ in model.mmlm_methods.named_parameters()}
    assert {"CrossLMM.v2v.0.gate", "CrossLMM.t2v.0.k_proj.weight"} <= names
    take_out(model)
    with attach(model, CrossLMM(grid=2, weights_file=path)):
        assert torch.equal(logits(model, inputs), trained)
        method = mmlm.parse_method(CrossLMM(grid=2, weights_file=path).text)
        assert method.weights_file == path


def test_scores_of_a_float16_model_do_not_overflow(monkeypatch):
    """Queries and keys whose product is far beyond 65504, the largest number of float16.

    What a kernel does inside differs from one to the other, so it must not get float16 at all.
    """
    seen, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append({q.dtype, k.dtype, v.dtype})
        return kernel(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    q = torch.full((1, 1, 1, 8), 200.0, dtype=torch.float16)
    k = torch.cat([q, q * 0.99], dim=2) * 10
    v = torch.tensor([[[[1.0] * 8, [3.0] * 8]]], dtype=torch.float16)
    y = cross_attend(q, k, v)
    assert seen == [{torch.float32}]
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, v[:, :, :1])


def test_layers_that_run_attention_and_mlp_side_by_side_are_refused():
    model, _ = tiny.build("llava")
    model.model.language_model.layers[0].use_parallel_residual = True
    with pytest.raises(UnsupportedModel, match="side by side"):
        attach(model, CrossLMM(grid=2)).__enter__()


def test_layers_that_scale_their_sums_are_refused():
    model, _ = tiny.build("llava")
    model.model.language_model.layers[0].residual_multiplier = 0.2
    with pytest.raises(UnsupportedModel, match="scales what it adds"):
        attach(model, CrossLMM(grid=2)).__enter__()


def test_more_frames_than_the_table_has(monkeypatch):
    from mmlm.methods import cross_blocks

    model, processor = tiny.shared("llava_next")
    monkeypatch.setattr(cross_blocks, "FRAMES", 2)
    with (
        attach(model, CrossLMM(grid=2, temporal_pos=True)),
        pytest.raises(LayoutError, match="temporal_pos knows 2"),
    ):
        logits(model, checks.batch(processor))
