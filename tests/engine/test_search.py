"""The search site: what it refuses, what it hands through, and what a look ahead computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import tiny
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from decoding.dola import DoLa
from decoding.opera import OPERA
from decoding.vcd import VCD
from decoding.vhr import VHR
from mmlm import Method, attach
from mmlm.engine.method import Paper
from mmlm.errors import IncompatibleMethods, UnsupportedModel

METHOD = OPERA(num_beams=3, candidates=3)


@dataclass(frozen=True, kw_only=True)
class Looker(Method):
    """Takes one greedy path and writes down what it saw on the way."""

    paper: ClassVar[Paper] = Paper(
        title="made for a test", arxiv="0000.00000", year=2026, venue="-"
    )
    steps: int = 3
    beams: ClassVar[int] = 2

    def neutral(self):
        return self

    def search(self, run):
        seen = {"first": run.prefill(), "looks": [], "rewritten": None}
        everyone = torch.arange(run.rows)
        z, answer = seen["first"], []
        for _ in range(self.steps):
            tokens = z.topk(4).indices
            ahead = run.look(tokens)
            seen["looks"].append((tokens, ahead))
            slots = everyone % 4  # each row goes its own way
            run.keep(everyone, slots, [True] * run.prompts)
            answer.append(tokens[everyone, slots])
            z = ahead[everyone, slots]
        whole = torch.stack(answer, dim=1)
        seen["answer"] = whole
        seen["width"] = run.width
        seen["rewritten"] = run.rewrite(0, whole[: run.beams, :2].flip(0))
        seen["after"] = run.look(tokens)[: run.beams]
        return seen


def last_logits(model, inputs, answers, beams):
    """Whole passes over prompt and answer, one row at a time and without padding."""
    rows = []
    for row, answer in enumerate(answers):
        prompt = row // beams
        real = inputs["attention_mask"][prompt].bool()
        ids = torch.cat([inputs["input_ids"][prompt][real], answer])[None]
        rows.append(model(input_ids=ids, pixel_values=inputs["pixel_values"][prompt][None]))
    return torch.stack([out.logits[0, -1] for out in rows])


@torch.no_grad()
def test_a_look_ahead_sees_each_candidate_as_if_it_stood_alone():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, Looker()):
        seen = model.generate(**inputs, max_new_tokens=4)
    answer = seen["answer"]
    for step, (tokens, ahead) in enumerate(seen["looks"]):
        for c in range(tokens.shape[1]):
            grown = torch.cat([answer[:, :step], tokens[:, c : c + 1]], dim=1)
            expected = last_logits(model, inputs, grown, 2)
            torch.testing.assert_close(ahead[:, c], expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_rewritten_prompt_goes_on_from_its_new_answer():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, Looker()):
        seen = model.generate(**inputs, max_new_tokens=4)
    short = seen["answer"][:2, :2].flip(0)
    expected = last_logits(model, inputs, short, 2)
    torch.testing.assert_close(seen["rewritten"], expected, atol=2e-4, rtol=1e-4)
    tokens = seen["looks"][-1][0][:2]
    for c in range(tokens.shape[1]):
        grown = torch.cat([short, tokens[:, c : c + 1]], dim=1)
        expected = last_logits(model, inputs, grown, 2)
        torch.testing.assert_close(seen["after"][:, c], expected, atol=2e-4, rtol=1e-4)


@dataclass(frozen=True, kw_only=True)
class Other(Looker):
    """A second method with a search."""


@pytest.mark.parametrize(
    ("methods", "names"),
    [
        ((METHOD, Looker()), ("OPERA", "Looker")),
        ((Other(), Looker()), ("Other", "Looker")),
        ((VCD(), METHOD), ("OPERA", "VCD")),
        ((METHOD, DoLa()), ("OPERA", "DoLa")),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x[0], str) else "",
)
def test_methods_that_exclude_each_other_are_both_named(methods, names):
    model, _ = tiny.shared("llava")
    before = checks._footprint(model)
    with pytest.raises(IncompatibleMethods) as caught, attach(model, *methods):
        pass
    assert all(name in str(caught.value) for name in names)
    assert checks._footprint(model) == before


@dataclass(frozen=True, kw_only=True)
class Counts(Looker):
    """Keeps something about generated tokens, as far as anybody knows."""

    search = Method.search

    def layer_in(self, state, layer, x):
        return None


def test_a_method_that_may_keep_count_of_tokens_is_refused():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(IncompatibleMethods, match=r"OPERA.*takes tokens back, while Counts"),
        attach(model, METHOD, Counts()),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "searches with 3 beams, but num_beams=4"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "but num_beams=2 was given"),
        ({"num_return_sequences": 4}, "fewer than num_return_sequences=4"),
        ({"do_sample": True}, "do_sample=True"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"output_hidden_states": True}, "output_hidden_states=True"),
        ({"output_logits": True}, "output_logits=True"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"custom_generate": "somebody/something"}, "custom_generate="),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [5]}, "prefix_allowed_tokens_fn"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_arguments_that_a_search_cannot_honour_are_refused(options, message):
    model, processor = tiny.shared("llava")
    with attach(model, METHOD), pytest.raises(IncompatibleMethods, match=message) as caught:
        model.generate(**checks.batch(processor), max_new_tokens=2, **options)
    assert "OPERA" in str(caught.value)
    assert caught.value.advice


def test_a_cache_that_forgets_is_refused():
    model, processor = tiny.shared("llava")
    cache = DynamicCache(config=tiny.shared("gemma3")[0].config)
    with attach(model, METHOD), pytest.raises(UnsupportedModel, match="takes tokens back"):
        model.generate(**checks.batch(processor), max_new_tokens=2, past_key_values=cache)


@torch.no_grad()
def test_the_same_number_of_beams_may_be_said_again():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    with attach(model, METHOD):
        expected = checks.generate(model, inputs)
        for options in ({"num_beams": 3}, {"num_beams": 1}, {"do_sample": False}):
            assert torch.equal(checks.generate(model, inputs, **options), expected)
        config = GenerationConfig(
            max_new_tokens=6, min_new_tokens=6, pad_token_id=1, eos_token_id=3
        )
        whole = model.generate(**inputs, generation_config=config)
        given = dict(inputs)
        positional = model.generate(given.pop("input_ids"), config, **given)
    assert torch.equal(whole[:, -6:], expected)
    assert torch.equal(positional, whole)


@torch.no_grad()
def test_processors_and_stopping_criteria_of_the_call_are_used():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)

    class Forbid(LogitsProcessor):
        def __call__(self, ids, scores):
            assert ids.shape[0] == scores.shape[0] == 6  # all rows of the call
            scores = scores.clone()
            scores[:, ::2] = -torch.inf
            return scores

    class Stop(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= inputs["input_ids"].shape[1] + 4)

    with attach(model, METHOD):
        ids = model.generate(
            **inputs,
            max_new_tokens=9,
            logits_processor=LogitsProcessorList([Forbid()]),
            stopping_criteria=StoppingCriteriaList([Stop()]),
        )
    new = ids[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] == 4
    assert bool((new % 2 == 1).all())


@torch.no_grad()
def test_the_returned_object_has_sequences_and_scores():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "num_return_sequences": 2}
    with attach(model, METHOD):
        plain = model.generate(**inputs, **options)
        scored = model.generate(**inputs, **options, output_scores=True)
    assert plain.sequences_scores is None
    assert torch.equal(plain.sequences, scored.sequences)
    assert scored.sequences_scores.shape == (4,)
    pairs = scored.sequences_scores.view(2, 2)
    assert bool((pairs[:, 0] >= pairs[:, 1]).all())


@torch.no_grad()
def test_a_streamer_gets_the_answer_at_its_end():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS[:1], [[tiny.picture(1)]])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    with attach(model, METHOD):
        expected = checks.generate(model, inputs)
        checks.generate(model, inputs, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(expected[0])


@torch.no_grad()
def test_a_plain_call_is_a_plain_call():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    expected = checks.next_logits(model, inputs)
    with attach(model, METHOD, VHR(alpha=1.0)):
        assert torch.equal(checks.next_logits(model, inputs), expected)
