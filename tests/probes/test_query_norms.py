"""QueryNorms: the very queries of the model, token by token; a ranking of heads by them."""

from __future__ import annotations

import pytest
import tiny
import torch

import mmlm
from mmlm import QueryNorms, attach, measured
from mmlm.cli.calibrate.head_maps import pictures
from mmlm.cli.calibrate.questions import QuestionOptions
from mmlm.engine.mixture_of_heads import norm_shares
from mmlm.errors import UnsupportedModel
from mmlm.head_measures import observed, visual_heads

PROMPTS = ["describe the image in detail .", "is there a dog ?"]
PICTURES = [[tiny.picture(1), tiny.picture(2)], [tiny.picture(3)]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shares_are_those_of_the_models_own_queries(family):
    model, processor = tiny.build(family)
    inputs = tiny.inputs(processor, PROMPTS, PICTURES)
    anatomy, queries = mmlm.Anatomy(model), {}
    with torch.no_grad():
        for layer in range(anatomy.n_layers):  # a norm that does more than to scale
            anatomy.input_norm(layer).weight.uniform_(-2, 2)
    handles = [
        anatomy.attention(layer).q_proj.register_forward_hook(
            lambda _, args, output, layer=layer: queries.setdefault(layer, []).append(output[:, -1])
        )
        for layer in range(anatomy.n_layers)
    ]
    with attach(model, QueryNorms()):
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        records = [row["query_norms"] for row in measured(model, [3, 2])]
    for handle in handles:
        handle.remove()
    for row, (record, n) in enumerate(zip(records, (3, 2), strict=True)):
        assert record["tokens"] == n
        for layer in range(anatomy.n_layers):
            assert len(queries[layer]) == 3  # the probe's own projection is not seen by hooks
            own = torch.stack(queries[layer])[:n, row].unflatten(-1, (anatomy.n_heads, -1))
            expected = norm_shares(own).mean(0)
            found = torch.tensor(record["shares"][layer])
            torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)


def test_batches_are_singles():
    model, processor = tiny.shared("llava")

    def shares(prompts, pictures):
        with attach(model, QueryNorms(layers=(0, 2))):
            model.generate(**tiny.inputs(processor, prompts, pictures), max_new_tokens=1)
            return [torch.tensor(row["query_norms"]["shares"]) for row in measured(model)]

    for row, together in enumerate(shares(PROMPTS, PICTURES)):
        (alone,) = shares(PROMPTS[row : row + 1], PICTURES[row : row + 1])
        assert together.shape == (2, 8)
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(together.sum(-1), torch.ones(2))


def test_a_second_answer_begins_anew():
    model, processor = tiny.shared("llava")
    inputs, found = tiny.inputs(processor, PROMPTS[1:], PICTURES[1:]), []
    n, more = inputs["input_ids"].shape[1], torch.tensor([[5, 6, 7]])
    with attach(model, QueryNorms()), torch.inference_mode():
        cache = model(**inputs, use_cache=True).past_key_values
        found.append(measured(model)[0]["query_norms"])
        mask = torch.ones(1, n + 3, dtype=torch.long)
        model(input_ids=more, attention_mask=mask, past_key_values=cache, use_cache=True)
        found.append(measured(model)[0]["query_norms"])
    assert [record["tokens"] for record in found] == [1, 1]
    assert found[0]["shares"] != found[1]["shares"]


def test_answers_without_a_token_have_no_shares():
    model, processor = tiny.shared("llava")
    with attach(model, QueryNorms()):
        model.generate(**tiny.inputs(processor, PROMPTS, PICTURES), max_new_tokens=2)
        records = [row["query_norms"] for row in measured(model, [0, 1])]
        more = [row["query_norms"] for row in measured(model, [9, 2])]
    assert records[0]["shares"] is None
    assert [record["tokens"] for record in records] == [0, 1]
    assert [record["tokens"] for record in more] == [2, 2]  # no more than ran


def test_a_map_may_be_ranked_by_query_norms():
    model, processor = mmlm.load("embedded")
    samples = list(pictures(QuestionOptions(count=3), None))
    found = visual_heads(model, processor, samples, rank="query_norm")
    assert found.rank == "query_norm"
    assert torch.allclose(found.score.sum(-1), torch.ones(found.shape[0], dtype=torch.float64))
    weighted, tokens = 0, 0
    seen = list(observed(model, processor, samples, query_norms=True))
    assert len({one.norms["tokens"] for one in seen}) > 1  # longer answers count for more
    for one in seen:
        weighted = weighted + one.norms["tokens"] * torch.tensor(one.norms["shares"])
        tokens += one.norms["tokens"]
    torch.testing.assert_close(found.score, (weighted / tokens).double(), atol=1e-6, rtol=0)
    # What stands behind a shorter answer in a batch is no part of it.
    alone = visual_heads(model, processor, samples, rank="query_norm", batch_size=1)
    torch.testing.assert_close(found.score, alone.score, atol=1e-6, rtol=0)
    plain = visual_heads(model, processor, samples)
    assert set(found.values) - set(plain.values) == {"query_norm"}
    assert torch.equal(found.values["hit_rate"], plain.values["hit_rate"])


def test_layers_are_checked():
    model, _ = tiny.shared("llava")
    with pytest.raises(ValueError, match="layers"):
        QueryNorms(layers=())
    with (
        pytest.raises(ValueError, match="QueryNorms: layer 7 does not exist"),
        attach(model, QueryNorms(layers=(7,))),
    ):
        pass


def test_a_model_without_a_query_projection_is_refused(monkeypatch):
    model, _ = tiny.build("llava")
    anatomy = mmlm.Anatomy(model)
    for layer in range(anatomy.n_layers):
        part = anatomy.attention(layer)
        part.qkv_proj = part.q_proj
        del part.q_proj
    with pytest.raises(UnsupportedModel, match="has no q_proj"), attach(model, QueryNorms()):
        pass
