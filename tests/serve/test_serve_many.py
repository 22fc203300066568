"""Two hundred requests of sixteen clients at once: good ones, broken ones, and ones that leave.

Every good request must get the answer of its single run, whoever asked beside it; every broken one
a 4xx with a message; and nothing may be left behind.
"""

import gc
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from served import asking, head, image_part, running, single, user

import mmlm
from mmlm.serve.jobs import Job
from mmlm.serve.limits import Limits

METHODS = ((), (mmlm.VHR(alpha=8.0),), (mmlm.VCD(),), (mmlm.ImbalancedAttention(), mmlm.PAI()))
QUESTIONS = (
    "describe the image .",
    "is there a dog in the image ?",
    "what is left of the tree ?",
    "hello",
)
BROKEN = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    json.dumps({"model": "embedded"}).encode(),
    json.dumps(asking("x", model="gpt-4o")).encode(),
    json.dumps(asking("x", mmlm_methods=["VHR(alpha=-1)"])).encode(),
    json.dumps(asking("x", temperature="hot")).encode(),
    json.dumps(asking("x <image> y")).encode(),
    json.dumps(asking("x", max_tokens=10_000)).encode(),
    json.dumps(
        asking({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "x")
    ).encode(),
    json.dumps(
        asking({"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}, "x")
    ).encode(),
    json.dumps(asking(*[image_part(0)] * 9, "x")).encode(),
)


def good(number):
    """A good request: its body, and the single run that it must equal."""
    draw = random.Random(number)
    question = draw.choice(QUESTIONS)
    pictures = [draw.randrange(6) for _ in range(draw.choice((0, 1, 1, 1, 2)))]
    methods = draw.choice(METHODS)
    tokens = draw.choice((3, 8, 16))
    body = {
        "messages": [user(*map(image_part, pictures), question)],
        "max_tokens": tokens,
        "stream": draw.random() < 0.3,
    }
    texts = [method.text for method in methods]
    if draw.random() < 0.5:
        body |= {"model": "+".join(["embedded", *texts])}
    else:
        body |= {"model": "embedded", "extra_body": {"mmlm_methods": texts}}
    return body, (question, tuple(pictures), methods, tokens)


def ask(client, body):
    answer = client.chat.completions.create(**body)
    if not body["stream"]:
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


@pytest.fixture(scope="module")
def many():
    with running(limits=Limits(requests=20)) as served:
        yield served


def leave(served, number):
    """Sends a whole request, or half of one, and goes away."""
    body = json.dumps(asking(image_part(0), "x", max_tokens=100, stream=number % 2 == 0)).encode()
    with served.connected() as connection:
        connection.sendall(head(len(body)) + body[: len(body) // (1 + number % 3)])


@pytest.mark.slow
def test_two_hundred_requests_of_sixteen_clients(many, embedded):
    wrong, clients = [], threading.local()

    def one(number):
        if number % 10 == 7:
            return leave(many, number)
        if number % 4 == 3:
            status, error = many.refusal(BROKEN[number % len(BROKEN)])
            if not 400 <= status < 500:
                wrong.append((number, status, error))
            return None
        if not hasattr(clients, "own"):
            # Who leaves may hold a place for a moment longer: 429.
            clients.own = many.client().with_options(max_retries=20)
        body, case = good(number)
        return case, ask(clients.own, body)

    with ThreadPoolExecutor(16) as pool:
        results = [result for result in pool.map(one, range(200)) if result]
    assert not wrong
    assert len(results) > 120
    expected = {}
    for case, text in results:
        if case not in expected:
            question, pictures, methods, tokens = case
            run = single(embedded, question, *pictures, methods=methods, max_new_tokens=tokens)
            expected[case] = run.text
        assert text == expected[case], case
    # Different cases have different answers, so a mix-up would show.
    assert len(set(expected.values())) > 25
    assert many.settles()
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Job]


def test_requests_that_wait_together_are_answered_together(many, embedded):
    batches = []
    original = many.service.worker._answer

    def noted(jobs):
        batches.append(len(jobs))
        original(jobs)

    many.service.worker._answer = noted
    try:
        with ThreadPoolExecutor(12) as pool:
            texts = list(pool.map(lambda n: many.text(image_part(n % 4), "hello"), range(12)))
    finally:
        many.service.worker._answer = original
    assert sum(batches) == 12
    assert max(batches) > 1
    assert texts == [single(embedded, "hello", n % 4).text for n in range(12)]


def test_a_client_that_asks_too_much_at_once_is_told_to_wait(many):
    client = many.client()

    def one(_):
        try:
            client.chat.completions.create(
                model="embedded", messages=[user("hello")], max_tokens=30
            )
        except openai.RateLimitError as error:
            return int(error.response.headers["Retry-After"])
        return 0

    with ThreadPoolExecutor(40) as pool:
        waits = list(pool.map(one, range(40)))
    assert waits.count(0) >= 20
    assert many.settles()
