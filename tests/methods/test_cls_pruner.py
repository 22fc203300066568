"""ClsPruner: one cut by the class token's attention."""

import checks
import pruning_cases
import pytest
import tiny
import torch

from mmlm import attach, measured
from mmlm.methods.cls_pruner import ClsPruner
from mmlm.methods.patch_scores import top, unit_sums


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def kept(model):
    return [row["cls_pruner"]["kept"] for row in measured(model)]


def test_the_best_of_each_row_by_hand():
    scores = torch.tensor([[0.1, 0.5, 0.5, 0.3], [0.0, 0.0, 0.0, 0.0]])
    found = top(scores, torch.tensor([2, 3])).tolist()
    # Of equal scores the first wins.
    assert found == [[False, True, True, False], [True, True, True, False]]
    units = torch.tensor([[0, 0, 1, -1]])
    assert unit_sums(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), units, 2).tolist() == [[3.0, 4.0]]


def test_it_keeps_what_the_class_token_looks_at():
    model, processor = pruning_cases.deep()
    inputs = checks.batch(processor)
    model.set_attn_implementation("eager")
    tower = model.model.vision_tower
    with torch.no_grad():
        seen = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    attention = seen.attentions[-2].mean(1)[:, 0, 1:]
    expected = [sorted(row.topk(6).indices.tolist()) for row in attention]
    with attach(model, ClsPruner(keep=6)):
        pruned = logits(model, inputs)
        assert kept(model) == [[row] for row in expected]
    # The prompt by hand: these features of the plain tower, and positions without gaps.
    for row, numbers in enumerate(expected):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        at = (ids == model.config.image_token_id).nonzero().flatten()
        with torch.no_grad():
            states = model.get_input_embeddings()(ids)
            features = seen.hidden_states[-2][row, 1:][numbers]
            visual = model.model.multi_modal_projector(features)
            short = torch.cat([states[: at[0]], visual, states[at[-1] + 1 :]])
            plain = model(inputs_embeds=short[None]).logits[0, -1]
        torch.testing.assert_close(pruned[row], plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("keep", [16, 500])
def test_dominance_acceptance_6_keeping_all_changes_nothing(keep):
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    plain = logits(model, inputs)
    tokens = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    with attach(model, ClsPruner(keep=keep)):
        assert torch.equal(logits(model, inputs), plain)
        again = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert torch.equal(again, tokens)


def test_the_authors_keep_every_line_end():
    model, processor = tiny.shared("llava_next")
    inputs = tiny.inputs(processor, ["what is shown ?"], [[tiny.picture(1, (100, 100))]])
    lengths = {}
    for newline in ("line", "authors"):
        with torch.no_grad(), attach(model, ClsPruner(keep=1, newline=newline)):
            seen = []
            hook = model.model.language_model.layers[0].register_forward_pre_hook(
                lambda m, a, seen=seen: seen.append(a[0].shape[1])
            )
            model(**inputs)
            hook.remove()
            lengths[newline] = seen[0]
            tiles = kept(model)[0]
    lines = {(tile - 1) // 2 * 4 + p // 4 for tile in range(1, 5) for p in tiles[tile]}
    assert lengths["authors"] - lengths["line"] == 8 - len(lines) > 0


@pytest.mark.parametrize("keep", [0, -1, 1.5, "8", None])
def test_error_keep_must_be_a_positive_integer(keep):
    with pytest.raises(ValueError, match="keep must be an integer >= 1"):
        ClsPruner(keep=keep)


def test_error_keep_must_be_a_multiple_of_the_unit():
    model, _ = tiny.shared("qwen2_5_vl")
    with pytest.raises(ValueError, match="multiple of 4, got 9"), attach(model, ClsPruner(keep=9)):
        pass


def test_error_states_that_are_not_finite_name_their_picture():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    inputs["pixel_values"][1] = torch.inf
    with attach(model, ClsPruner(keep=4)), pytest.raises(FloatingPointError, match="image 1 "):
        model(**inputs)
