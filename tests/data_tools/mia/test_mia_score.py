"""Scoring answers: ratios and perplexity by the stage, statuses one by one, batches."""

from __future__ import annotations

import math

import pytest
import scenes
import tiny
import torch

import data_tools.mia.score as module
from data_tools.mia.forced import force
from data_tools.mia.prompting import prompted
from data_tools.mia.score import ScoreSettings, ScoreStage, check_answers
from data_tools.mia.seen import check_attention
from mmlm.errors import InputError
from mmlm.inputs import prepare

TOKENS = [[20, 30, 40, 3], [25, 35, 3], [50, 51, 52, 53, 3], [60, 61, 62, 3]]


def answered(root, *wanted, **more):
    """Records with answers."""
    return [
        record
        | {
            "response": "some words",
            "n_tokens": len(tokens),
            "tokens": tokens,
            "log_max": -0.5,
            "corrupt_target": None,
        }
        | more
        for record, tokens in zip(scenes.records(root, *wanted), TOKENS, strict=False)
    ]


def score(records, root, settings=None, family="llava", model=None):
    own, processor = tiny.shared(family)
    stage = ScoreStage(model or own, processor, root, settings or ScoreSettings(batch_size=3))
    return {outcome.id: outcome for outcome in stage.process(records)}


def line(outcome):
    (own,) = outcome.lines["scores"]
    return own


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "idefics3"])
def test_batches_by_length_score_as_one_by_one(tmp_path, family):
    records = answered(tmp_path, ("sequence", 3), ("grid", 4), ("pip", 2), ("sequence", 2))
    together = score(records, tmp_path, family=family)
    alone = score(records, tmp_path, ScoreSettings(batch_size=1), family=family)
    for record in records:
        a, b = line(together[record["id"]]), line(alone[record["id"]])
        assert together[record["id"]].status == "ok"
        assert a["ratios"] == pytest.approx(b["ratios"], abs=2e-5)
        assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-4)
        assert len(a["ratios"]) == record["n_images"]
        assert sum(a["ratios"]) == pytest.approx(1, abs=1e-5)
        assert a["ratio"] == a["ratios"][record["target_index"] - 1]


def test_a_score_is_what_its_forced_pass_gives(tmp_path):
    (record,) = answered(tmp_path, ("sequence", 3))
    model, processor = tiny.shared("llava")
    prompt = prompted(record, tmp_path, None)
    inputs = prepare(processor, [prompt.conversation], [list(prompt.pictures)])
    (one,) = force(model, processor, inputs, [record["tokens"]])
    own = line(score([record], tmp_path)[record["id"]])
    total = sum(one.attention["images"])
    assert own["ratios"] == pytest.approx([a / total for a in one.attention["images"]], abs=1e-5)
    mean = sum(one.log_probs) / len(record["tokens"])  # the end token counts
    assert own["ppl"] == pytest.approx(math.exp(-mean), rel=1e-5)
    assert own["layer"] == 2


def test_parity_means_over_keys_and_most_probable_tokens(tmp_path):
    (record,) = answered(tmp_path, ("sequence", 2))
    model, processor = tiny.shared("llava_next")
    prompt = prompted(record, tmp_path, None)
    inputs = prepare(processor, [prompt.conversation], [list(prompt.pictures)])
    (one,) = force(model, processor, inputs, [record["tokens"]])
    found = score([record], tmp_path, ScoreSettings(parity=True), family="llava_next")
    means = [s / k for s, k in zip(one.attention["images"], one.attention["keys"], strict=True)]
    own = line(found[record["id"]])
    assert own["ratios"] == pytest.approx([m / sum(means) for m in means], abs=1e-5)
    assert own["ppl"] == pytest.approx(math.exp(-sum(one.log_max) / 4), rel=1e-5)


def test_perplexity_of_the_answer_spares_the_later_layers(tmp_path, monkeypatch):
    (record,) = answered(tmp_path, ("sequence", 2))
    asked = []
    real = module.force

    def watched(*args, probabilities, **more):
        asked.append(probabilities)
        return real(*args, probabilities=probabilities, **more)

    monkeypatch.setattr(module, "force", watched)
    early = line(score([record], tmp_path, ScoreSettings(perplexity="answer"))[record["id"]])
    whole = line(score([record], tmp_path)[record["id"]])
    assert asked == [False, True]
    assert early["ratios"] == whole["ratios"]
    assert early["ppl"] == pytest.approx(math.exp(0.5), rel=1e-5)


def test_another_layer_gives_other_ratios(tmp_path):
    (record,) = answered(tmp_path, ("sequence", 2))
    zero = line(score([record], tmp_path, ScoreSettings(layer=0))[record["id"]])
    assert zero["layer"] == 0
    assert zero["ratios"] != line(score([record], tmp_path)[record["id"]])["ratios"]


def test_noise_of_the_answer_is_there_again(tmp_path):
    (record,) = answered(tmp_path, ("sequence", 2))
    noisy = record | {"corrupt_target": 225.0}
    plain, disturbed = (line(score([one], tmp_path)[record["id"]]) for one in (record, noisy))
    assert plain["ratios"] != disturbed["ratios"]
    assert disturbed == line(score([noisy], tmp_path)[record["id"]])


def test_a_response_from_elsewhere_is_tokenised(tmp_path):
    (record,) = answered(tmp_path, ("sequence", 2))
    del record["tokens"]
    _, processor = tiny.shared("llava")
    ids = processor.tokenizer("some words", add_special_tokens=False)["input_ids"]
    expected = line(score([record | {"tokens": [*ids, 3]}], tmp_path)[record["id"]])
    assert line(score([record], tmp_path)[record["id"]]) == expected


def test_what_is_left_is_scored_in_the_batches_of_the_whole_run(tmp_path, monkeypatch):
    records = answered(tmp_path, ("sequence", 3), ("sequence", 2), ("sequence", 2), ("pip", 2))
    model, processor = tiny.shared("llava")
    settings, sizes, real = ScoreSettings(batch_size=2), [], module.force

    def counted(model, processor, inputs, responses, **more):
        sizes.append(len(responses))
        return real(model, processor, inputs, responses, **more)

    monkeypatch.setattr(module, "force", counted)
    stage = ScoreStage(model, processor, tmp_path, settings, records)
    whole = {outcome.id: outcome.lines for outcome in stage.process(records)}
    for left in ([records[1]], records[2:], records[:1]):
        again = {outcome.id: outcome.lines for outcome in stage.process(left)}
        assert again == {record["id"]: whole[record["id"]] for record in left}  # to the bit
    assert set(sizes) == {2}


# ---- failures: one test per row ----


@pytest.mark.parametrize(
    "more", [{"n_tokens": 1, "tokens": [3]}, {"response": " "}], ids=["end at once", "no words"]
)
def test_failure_an_empty_response_has_no_ratio(tmp_path, more):
    records = answered(tmp_path, ("sequence", 2), **more)
    found = score(records, tmp_path)[records[0]["id"]]
    assert found.status == "empty_response"
    own = line(found)
    assert (own["ratio"], own["ratios"], own["ppl"]) == (None, [], None)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_failure_no_attention_keeps_the_perplexity(tmp_path, monkeypatch, value):
    (record,) = answered(tmp_path, ("sequence", 2))
    real = module.force

    def blind(*args, **more):
        return [
            module.Forced({**one.attention, "images": [value, value]}, one.log_probs, one.log_max)
            for one in real(*args, **more)
        ]

    monkeypatch.setattr(module, "force", blind)
    found = score([record], tmp_path)[record["id"]]
    assert found.status == "no_attention"
    assert line(found)["ratio"] is None
    assert line(found)["ppl"] > 1


def test_failure_a_prompt_longer_than_the_context(tmp_path):
    model, _ = tiny.build("llava")
    model.config.text_config.max_position_embeddings = 100
    records = answered(tmp_path, ("sequence", 2), ("sequence", 5))
    found = score(records, tmp_path, model=model)
    assert [found[record["id"]].status for record in records] == ["ok", "too_long"]
    assert found[records[1]["id"]].lines == {}


def test_failure_an_unreadable_picture(tmp_path):
    records = answered(tmp_path, ("sequence", 2), ("grid", 4))
    (tmp_path / records[0]["images"][1]).write_bytes(b"no picture")
    found = score(records, tmp_path)
    assert [found[r["id"]].status for r in records] == ["unreadable_image", "ok"]


def test_failure_an_image_token_in_the_response(tmp_path):
    model, _ = tiny.shared("llava")
    (record,) = answered(tmp_path, ("sequence", 2))
    record["tokens"] = [20, model.config.image_token_id, 3]
    assert score([record], tmp_path)[record["id"]].status == "image_token_in_response"


def test_failure_out_of_memory_makes_batches_smaller(tmp_path, monkeypatch):
    records = answered(tmp_path, ("sequence", 2), ("sequence", 2), ("sequence", 2))
    expected = score(records, tmp_path)
    real, sizes = module.force, []

    def narrow(model, processor, inputs, responses, **more):
        sizes.append(len(responses))
        if len(responses) > 1 or responses[0] == tuple(TOKENS[2]):
            raise torch.OutOfMemoryError
        return real(model, processor, inputs, responses, **more)

    monkeypatch.setattr(module, "force", narrow)
    found = score(records, tmp_path)
    assert sizes[0] == 3
    statuses = [found[record["id"]].status for record in records]
    assert statuses == ["ok", "ok", "out_of_memory"]
    for record in records[:2]:
        ratios = line(expected[record["id"]])["ratios"]
        assert line(found[record["id"]])["ratios"] == pytest.approx(ratios, abs=2e-5)


def test_failure_attention_that_cannot_be_seen_is_found_at_the_start(monkeypatch):
    import mmlm

    model, processor = tiny.build("llava")
    check_attention(model, processor, None)
    attention = mmlm.Anatomy(model).attention(2)
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **more: (hidden_states, None))
    with pytest.raises(NotImplementedError, match="Layer 2"):
        check_attention(model, processor, None)


# ---- settings ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention": "both"},
        {"perplexity": "none"},
        {"attention": "answer"},
        {"batch_size": 0},
        {"layer": -1},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must"):
        ScoreSettings(**wrong)


def test_settings_that_need_more_than_the_answers_hold_are_refused(tmp_path):
    records = answered(tmp_path, ("sequence", 2))
    check_answers(records, ScoreSettings())
    check_answers(records, ScoreSettings(perplexity="answer"))
    with pytest.raises(InputError, match="no attention"):
        check_answers(records, ScoreSettings(attention="answer", perplexity="answer"))
    del records[0]["log_max"]
    with pytest.raises(InputError, match="no probabilities"):
        check_answers(records, ScoreSettings(perplexity="answer"))


def test_no_model_is_needed_where_everything_was_measured(tmp_path):
    (record,) = answered(tmp_path, ("sequence", 2))
    record["attention"] = {"layer": 5, "ratios": [0.25, 0.75], "parity": [0.5, 0.5]}
    settings = ScoreSettings(attention="answer", perplexity="answer")
    assert not settings.needs_model
    (outcome,) = ScoreStage(None, None, tmp_path, settings).process([record])
    own = line(outcome)
    assert own["ratios"] == [0.25, 0.75]
    assert own["layer"] == 5
    parity = ScoreSettings(attention="answer", perplexity="answer", parity=True)
    (outcome,) = ScoreStage(None, None, tmp_path, parity).process([record])
    assert line(outcome)["ratios"] == [0.5, 0.5]
