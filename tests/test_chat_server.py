"""The HTTP client that judges and generators share; how it meets trouble stands in their tests."""

import json
import threading

import pytest
from misbehaving import Clock, completion, echo, hang_up, raw, send, serving, status

from mmlm.chat_server.client import Answer, ChatServer, Patience
from mmlm.chat_server.options import ServerOptions, open_server, patience_of
from mmlm.chat_server.wire import Choice, Passing, Refused, read_choices
from mmlm.errors import InputError


@pytest.fixture
def server():
    with serving() as server:
        yield server


def chat(server, clock=None, **patience):
    clock = clock or Clock()
    return ChatServer(
        server.url,
        patience=Patience(**{"concurrency": 1, "retries": 2, **patience}),
        sleep=clock.sleep,
        now=clock.now,
        jitter=lambda: 1.0,
    )


def body(text="hello"):
    return {"model": "m", "messages": [{"role": "user", "content": text}]}


def texts(content):
    return [choice.text for choice in read_choices(content)]


def test_answers_carry_the_place_of_their_request(server):
    client = chat(server, concurrency=3)
    answers = list(client.answers([body(str(n)) for n in range(7)], texts))
    assert {answer.index: answer.value for answer in answers} == {n: [f"re: {n}"] for n in range(7)}
    assert list(client.answers([], texts)) == []
    assert client.answer(body("one"), texts) == Answer(0, ["re: one"])


def test_what_an_answer_says_about_the_server(server):
    def answer(*behaviours, **patience):
        server.behaviours = [*behaviours]
        return chat(server, **patience).answer(body(), texts)

    assert answer(status(400)) == Answer(0, None, "HTTP 400", silent=True)
    assert answer(status(503)) == Answer(0, None, "HTTP 503", silent=True, passing=True)
    assert answer(hang_up).passing
    refused = answer(status(401))
    assert not refused.passing
    assert "key" in refused.advice
    server.behaviours = [status(401)]
    first, second = chat(server).answers([body(), body()], texts)
    assert first.asked
    assert not second.asked


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"error": {"message": "too\n long", "code": None}}, " (too long)"),
        ({"object": "error", "message": "too long", "code": 400}, " (too long)"),  # SGLang
        ({"error": "too long"}, " (too long)"),
        ({"detail": [{"msg": "field required"}]}, " ([{'msg': 'field required'}])"),
        ({"error": {"message": "x" * 300}}, f" ({'x' * 200})"),
        ({"error": {"message": "\ud800"}}, " (?)"),
        ({"error": None}, ""),
        ({"error": {}}, ""),
        ([1], ""),
        (b"<html>", ""),
        (b"[" * 100_000, ""),
    ],
)
def test_the_server_s_own_words_are_told(server, content, words):
    server.behaviours = [status(400, content)]
    assert chat(server).answer(body(), texts).reason == f"HTTP 400{words}"


def test_a_reader_decides_whether_another_try_helps(server):
    seen = []

    def picky(content):
        seen.append(texts(content))
        if len(seen) < 3:
            raise Passing("not yet")
        return len(seen)

    assert chat(server).answer(body(), picky) == Answer(0, 3)

    def never(content):
        raise Refused("no")

    assert chat(server).answer(body(), never) == Answer(0, None, "no")


def test_the_pace_outlives_a_call(server):
    clock = Clock()
    client = chat(server, clock, per_minute=6)
    for _ in range(3):
        client.answer(body(), texts)
    assert clock.sleeps == [10, 10]
    server.behaviours = [status(429, Retry_After="30"), echo]
    client.answer(body(), texts)
    assert clock.sleeps[2:] == [10, 30]


def test_whoever_closes_the_answers_stops_the_asking(server):
    gate = threading.Event()

    def wait(handler, request):
        gate.wait(5)
        echo(handler, request)

    server.behaviours = [echo, wait]
    answers = chat(server).answers([body(str(n)) for n in range(50)], texts)
    next(answers)
    threading.Timer(0.1, gate.set).start()
    answers.close()
    assert len(server.bodies) <= 3


def choices(*listed, **more):
    return json.dumps({"choices": list(listed), **more}).encode()


def one(text, **more):
    return {"message": {"content": text}, "finish_reason": "stop"} | more


def test_choices_come_in_the_order_of_their_index():
    content = choices(one("b", index=1), one("c", index=2), one("a", index=0))
    assert texts(content) == ["a", "b", "c"]
    assert texts(choices(one("x"), one("y"))) == ["x", "y"]
    assert texts(choices(one("x", index=None), one("y", index="?"))) == ["x", "y"]


@pytest.mark.parametrize(
    ("more", "choice"),
    [
        ({}, Choice("a", "stop")),
        ({"finish_reason": "length"}, Choice("a", "length")),
        ({"finish_reason": None}, Choice("a")),
        ({"finish_reason": 3}, Choice("a")),
        ({"stop_reason": ". "}, Choice("a", "stop", stopped_by=". ")),
        ({"stop_reason": 128001}, Choice("a", "stop")),  # vLLM: an end token
        ({"matched_stop": "! "}, Choice("a", "stop", stopped_by="! ")),
        ({"matched_stop": 2}, Choice("a", "stop")),  # SGLang: an end token
        ({"finish_reason": "content_filter"}, Choice("a", "content_filter", refused=True)),
        ({"message": {"content": None}}, Choice(None, "stop")),
        ({"message": {"content": "\ud800"}}, Choice("?", "stop")),
        ({"message": {"content": None, "refusal": "no"}}, Choice(None, "stop", refused=True)),
    ],
)
def test_what_a_choice_says(more, choice):
    assert read_choices(choices(one("a", **more))) == [choice]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"null", choices(), choices(1), choices({}), choices(one(5))],
)
def test_what_is_no_completion_may_be_one_at_the_next_try(content):
    with pytest.raises(Passing, match="an answer"):
        read_choices(content)


def test_a_key_goes_to_the_server_and_nowhere_else(server, monkeypatch):
    monkeypatch.setenv("OUR_KEY", " sk-secret\n")
    server.behaviours = [status(400, {"error": {"message": "bad sk-secret"}})]
    client = open_server(ServerOptions(base_url=server.url, key_variable="OUR_KEY"), "--x")
    answer = client.answer(body(), texts)
    assert answer.reason == "HTTP 400 (bad ***)"
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in repr(client)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"max_tokens": 0}, r"--x\.max_tokens"),
        ({"retries": -1}, r"--x\.retries"),
        ({"timeout": 0.0}, r"--x\.timeout"),
        ({"per_minute": 0.0}, r"--x\.per_minute"),
        ({"concurrency": 0}, r"--x\.concurrency"),
    ],
)
def test_options_that_cannot_be_are_refused_with_their_names(wrong, text):
    with pytest.raises(InputError, match=text):
        patience_of(ServerOptions(**wrong), "--x")


def test_an_answer_that_comes_compressed_is_not_asked_for(server):
    server.behaviours = [raw(json.dumps(completion("plain")).encode())]
    assert chat(server).answer(body(), texts).value == ["plain"]
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_a_redirect_is_not_followed(server):
    with serving(lambda handler, _: send(handler, 200, completion("stolen"))) as other:
        server.behaviours = [status(307, Location=other.url)]
        answer = chat(server).answer(body(), texts)
        assert answer.reason == "HTTP 307"
        assert other.bodies == []
