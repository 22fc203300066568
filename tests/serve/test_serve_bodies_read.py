"""`mmlm.serve.wire`: what a request's body may hold, and what is said to everything else."""

import json

import pytest

from mmlm.serve.refusals import Refusal
from mmlm.serve.wire import read_request

GOOD = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def read(**fields):
    return read_request(json.dumps(GOOD | fields).encode())


def refusal(body):
    with pytest.raises(Refusal) as caught:
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value


def test_the_defaults():
    request = read()
    assert (request.temperature, request.top_p, request.seed) == (None, 1.0, None)
    assert (request.stop, request.stream, request.mmlm_methods) == ([], False, None)
    assert [part.text for part in request.messages[0].parts] == ["hello"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is no JSON"),
        (b"{", "The body is no JSON"),
        (b'{"model": "m",}', "The body is no JSON"),
        (b"\xff\xfe{}", "The body is no JSON"),
        (b'{"model": NaN}', "The body is no JSON"),
        (b'{"model": "\\ud800"}', "The body is no JSON"),
        (b"[" * 100_000, "recursion limit"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
    ],
)
def test_what_is_no_json_object(body, message):
    found = refusal(body)
    assert message in found.message
    assert found.code == "invalid_json"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": None}, "model", "model is missing"),
        ({"model": 3}, "model", "valid string"),
        ({"model": ""}, "model", "at least 1 character"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": ["hi"]}, "messages.0", "valid dictionary"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.role",
            "'system', 'developer', 'user' or 'assistant'",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "text, or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages.0.content.0",
            "'text', 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "is missing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
            "messages.0.content.0.image_url",
            "valid dictionary",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "colour": 1}]},
            "messages.0.colour",
            "There is no field",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "name": "somebody"}]},
            "messages.0.name",
            "None",
        ),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 1e-5}, "temperature", "at least 0.01"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "different things"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a", ""]}, "stop", "is empty"),
        ({"stop": [1]}, "stop.0", "valid string"),
        ({"mmlm_methods": "VHR"}, "mmlm_methods", "valid list"),
        ({"mmlm_methods": ["VHR"] * 17}, "mmlm_methods", "at most 16"),
        ({"stream": 1}, "stream", "valid boolean"),
        ({"n": 2}, "n", "not supported here. Leave it out, or give 1."),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", '"type": "text"'),
        ({"logit_bias": {"5": 100}}, "logit_bias", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"audio": {}}, "audio", "not supported here. Leave it out."),
        ({"tempratur": 1}, "tempratur", "Did you mean temperature?"),
        ({"zzz": 1}, "zzz", "There is no field 'zzz'. Leave it out."),
        ({"add_generation_prompt": False}, "add_generation_prompt", "must be true"),
        ({"continue_final_message": True}, "messages", "continue_final_message is true"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "messages",
            "continue_final_message is false",
        ),
    ],
)
def test_a_field_that_is_wrong_is_named(fields, param, message):
    found = refusal({k: v for k, v in (GOOD | fields).items() if v is not None})
    assert found.param == param
    assert message in found.message


def test_what_asks_for_nothing_is_taken():
    request = read(
        n=1,
        logprobs=False,
        tools=[],
        frequency_penalty=0,
        presence_penalty=0.0,
        response_format={"type": "text"},
        top_k=-1,
        user="somebody",
        metadata={"a": "b"},
        seed=None,
        temperature=None,
        stop="END",
    )
    assert request.stop == ["END"]


def test_an_answer_of_ours_may_come_back():
    sent = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}
    request = read(messages=[*GOOD["messages"], sent | {"annotations": []}, GOOD["messages"][0]])
    assert [message.role for message in request.messages] == ["user", "assistant", "user"]


def test_an_error_never_repeats_a_whole_request():
    huge = "x" * 1_000_000
    parts = [{"type": huge}]
    for fields in (
        {"messages": [{"role": "user", "content": parts}]},
        {huge: 1},
        {"model": [huge]},
    ):
        found = refusal(GOOD | fields)
        assert len(json.dumps(found.body)) < 1000
