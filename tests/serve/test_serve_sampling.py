"""Draws in a batch are those of each row alone: `RowSampler` against `AnswerStream`."""

import asyncio

import pytest
import torch
from tiny import picture, shared

import mmlm
from mmlm.inputs import message, prepare
from mmlm.runner import GenerateSettings
from mmlm.serve.jobs import Choosing
from mmlm.serve.prompts import Prepared
from mmlm.serve.sampling import RowSampler
from mmlm.serve.worker import Worker
from mmlm.streaming import AnswerStream


def alone(model, processor, question, number, methods, choosing, tokens):
    inputs = prepare(processor, [[message("user", question, 1)]], [[picture(number)]])
    drawn = {"temperature": choosing.temperature, "top_p": choosing.top_p, "do_sample": True}
    settings = GenerateSettings(
        max_new_tokens=tokens, seed=choosing.seed, **(drawn if choosing.temperature else {})
    )
    with AnswerStream(model, processor, inputs, methods, settings) as stream:
        list(stream)
    return stream.text


def together(model, processor, asked, methods, batch_size=8):
    """What a worker answers to questions that all wait when it starts."""
    from mmlm.serve.jobs import Job

    async def main():
        worker = Worker(model, processor, batch_size)
        jobs = []
        for question, number, choosing, tokens in asked:
            conversation = (message("user", question, 1),)
            inputs = prepare(processor, [conversation], [[picture(number)]])
            n = inputs["input_ids"].shape[1]
            prompt = Prepared(conversation, (picture(number),), "", inputs, n, tokens)
            jobs.append(Job(prompt, methods, choosing))
        worker._waiting = list(jobs)
        worker.start()
        events = [await asyncio.wait_for(job.event(), 60) for job in jobs]
        await asyncio.to_thread(worker.close)
        return events

    return asyncio.run(main())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
@pytest.mark.parametrize("methods", [(), (mmlm.VHR(alpha=4.0), mmlm.VCD())])
def test_rows_of_a_batch_draw_as_they_would_alone(family, methods):
    model, processor = shared(family)
    asked = [
        ("what is this ?", 0, Choosing(), 5),
        ("what is this ? " * 3, 1, Choosing(temperature=1.0, seed=7), 8),
        ("what is this ?", 1, Choosing(temperature=1.0, seed=8), 3),
        ("and that ?", 2, Choosing(temperature=0.7, top_p=0.8, seed=7), 8),
        ("what is this ?", 0, Choosing(temperature=2.0, seed=9), 8),
    ]
    answers = together(model, processor, asked, methods)
    expected = [alone(model, processor, q, n, methods, c, t) for q, n, c, t in asked]
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) > 3


def test_a_search_runs_alone_and_equals_the_single_run():
    model, processor = shared("llava")
    methods = (mmlm.OPERA(num_beams=2),)
    asked = [("what is this ?", n, Choosing(), 4) for n in range(3)]
    answers = together(model, processor, asked, methods)
    assert [a.text for a in answers] == [
        alone(model, processor, q, n, methods, c, t) for q, n, c, t in asked
    ]


def test_rows_without_a_draw_are_left_alone():
    sampler = RowSampler([Choosing(), Choosing(temperature=1.0, seed=3)], torch.device("cpu"))
    scores = torch.randn(2, 11)
    before = scores.clone()
    out = sampler(torch.zeros(2, 1, dtype=torch.long), scores)
    assert torch.equal(scores, before)
    assert torch.equal(out[0], scores[0])
    assert out[1].isfinite().sum() == 1


def test_the_draws_have_the_probabilities_of_the_scores():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(1, 1)
    drawn = torch.zeros(3)
    sampler = RowSampler([Choosing(temperature=1.0, seed=1)], torch.device("cpu"))
    for _ in range(2000):
        drawn[sampler(torch.zeros(1, 1, dtype=torch.long), scores).argmax()] += 1
    # Three standard deviations of a count of 2000 draws are at most 0.034 of them.
    assert torch.allclose(drawn / 2000, scores.exp()[0], atol=0.034)
    only = RowSampler([Choosing(temperature=1.0, top_p=0.5, seed=1)], torch.device("cpu"))
    ids = torch.zeros(1, 1, dtype=torch.long)
    assert all(only(ids, scores).argmax() == 0 for _ in range(50))


def test_the_global_random_numbers_are_not_touched():
    before = torch.get_rng_state()
    sampler = RowSampler([Choosing(temperature=1.0, seed=1)], torch.device("cpu"))
    sampler(torch.zeros(1, 1, dtype=torch.long), torch.randn(1, 5, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)
