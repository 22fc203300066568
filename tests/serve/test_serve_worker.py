"""The model's thread: what is answered together, and what one request may do to the others."""

import asyncio
import dataclasses

import pytest
import torch
from tiny import picture, shared

import mmlm
from mmlm.errors import LayoutError
from mmlm.inputs import message, prepare
from mmlm.serve.jobs import Answer, Choosing, Job
from mmlm.serve.prompts import Prepared
from mmlm.serve.refusals import Refusal
from mmlm.serve.worker import Worker, stands_alone

MODEL = "llava"


def prepared(words=1, pictures=(), tokens=4):
    _, processor = shared(MODEL)
    conversation = (message("user", "what is this ? " * words, len(pictures)),)
    images = tuple(map(picture, pictures))
    inputs = prepare(processor, [conversation], [images])
    return Prepared(conversation, images, "", inputs, inputs["input_ids"].shape[1], tokens)


def answered(make, during=None, batch_size=4):
    """Lets jobs wait, starts a worker, and returns their last events and the sizes of batches."""

    async def main():
        worker = Worker(*shared(MODEL), batch_size)
        sizes, generate = [], worker._generate

        def noted(rows):
            sizes.append(len(rows))
            if during is not None:
                during(worker, rows)
            generate(rows)

        worker._generate = noted
        jobs = make()
        worker._waiting = list(jobs)
        worker.start()
        events = []
        for job in jobs:
            event = None
            while not isinstance(event, Answer | Refusal) and not job.cancelled:
                event = await asyncio.wait_for(job.event(), 60)
            events.append(event)
        await asyncio.to_thread(worker.close)
        return events, sizes

    return asyncio.run(main())


def test_equal_methods_and_like_lengths_go_together():
    order = []

    def note(worker, rows):
        order.append([(row.job.methods, row.job.prompt.n_tokens) for row in rows])

    def make():
        lengths = (1, 9, 2, 3, 8, 1)
        plain = [Job(prepared(words), (), Choosing()) for words in lengths]
        other = Job(prepared(), (mmlm.VCD(),), Choosing())
        return [plain[0], other, *plain[1:]]

    events, sizes = answered(make, note)
    assert sizes == [4, 1, 2]
    assert all(isinstance(event, Answer) for event in events)
    first, second, third = order
    assert max(n for _, n in first) < min(n for _, n in third)
    assert second[0][0] == (mmlm.VCD(),)


def test_the_one_that_waits_longest_goes_first():
    order = []

    def make():
        return [Job(prepared(), (mmlm.VHR(alpha=1.0 + n % 3),), Choosing()) for n in range(6)]

    answered(make, lambda worker, rows: order.append(rows[0].job.methods[0].alpha))
    assert order == [1.0, 2.0, 3.0]


def test_a_job_nobody_waits_for_ends_with_its_next_token():
    def make():
        jobs = [Job(prepared(tokens=400), (), Choosing()), Job(prepared(), (), Choosing())]
        jobs[0].cancelled = True
        return jobs

    events, sizes = answered(make)
    assert sizes == [2]
    assert isinstance(events[1], Answer)


def test_one_that_the_model_refuses_fails_alone():
    def trip(worker, rows):
        if any(len(row.job.prompt.pictures) == 2 for row in rows):
            raise LayoutError("Row 1 has too many pictures.", advice="Send fewer.")

    def make():
        return [Job(prepared(1, range(n)), (), Choosing()) for n in (1, 2, 1)]

    (one, two, three), sizes = answered(make, trip)
    assert sizes == [3, 1, 1, 1]
    assert isinstance(one, Answer)
    assert one == three
    assert (two.status, two.message) == (400, "Row 1 has too many pictures. Send fewer.")


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("no memory"), 503), (RuntimeError("secret words"), 500)],
)
def test_errors_are_split_and_told_without_details(error, status, caplog):
    def trip(worker, rows):
        if len(rows) > 1 or rows[0].job.prompt.n_tokens > 30:
            raise error

    def make():
        return [Job(prepared(words), (), Choosing()) for words in (1, 9, 1)]

    (one, two, three), _ = answered(make, trip)
    assert isinstance(one, Answer)
    assert one == three
    assert two.status == status
    assert "secret" not in two.message
    assert ("secret" in caplog.text) == (status == 500)


def test_a_stream_goes_on_where_it_was_when_a_batch_broke():
    broken = []

    def make():
        return [Job(prepared(tokens=12), (), Choosing(streams=True)) for _ in range(2)]

    def trip(worker, rows):
        if len(rows) == 1:
            return
        take = rows[1].take

        def failing(token):
            if len(broken) == 6:
                raise RuntimeError("in the middle")
            broken.append(token)
            return take(token)

        rows[1].take = failing

    pieces = []
    original = Job.send

    def send(job, event):
        pieces.append((id(job), event))
        original(job, event)

    Job.send = send
    try:
        events, sizes = answered(make, trip)
    finally:
        Job.send = original
    assert sizes == [2, 1, 1]
    jobs = {job for job, _ in pieces}
    for job in jobs:
        own = [event for owner, event in pieces if owner == job]
        assert "".join(own[:-1]) == own[-1].text
    assert events[0] == events[1]


def test_whoever_waits_at_the_end_is_told_so():
    async def main():
        worker = Worker(*shared(MODEL), 4)
        worker.start()
        await asyncio.to_thread(worker.close)
        with pytest.raises(Refusal) as caught:
            worker.submit(Job(prepared(), (), Choosing()))
        return caught.value

    assert asyncio.run(main()).status == 503


def test_what_looks_at_the_whole_batch_stands_alone():
    assert not stands_alone((mmlm.VHR(), mmlm.VCD()))
    assert stands_alone((mmlm.VHR(), mmlm.OPERA()))
    assert stands_alone((mmlm.DoLa(one_layer_per_batch=True),))
    assert stands_alone((mmlm.ONLY(distance_over_batch=True),))
    # A switch that is documented to look at all rows must say so to whoever batches.
    found = []
    for name in mmlm.method_names():
        cls = getattr(mmlm, name)
        for field in dataclasses.fields(cls):
            about = cls.__doc__.partition(f"{field.name}: ")[2][:60]
            if isinstance(field.default, bool) and "for all rows" in about:
                found.append(field.name)
                assert cls(**{field.name: True}).mixes_rows, f"{name}.{field.name}: {about}"
                assert not cls().mixes_rows
    assert len(found) == 2
