"""`mmlm serve` over HTTP, with the official client and by hand: answers, streams, refusals."""

import io
import json
import struct
import zlib

import httpx
import openai
import pytest
from PIL import Image
from served import asking, data_url, image_part, png, single, user
from tiny import picture

import mmlm
from mmlm.inputs import message, prepare
from mmlm.runner import GenerateSettings, Request, generate_all
from mmlm.streaming import AnswerStream

QUESTION = "describe the image ."


# ---- answers ---------------------------------------------------------------------------------


def test_the_official_client(served, embedded):
    client = served.client()
    expected = single(embedded, QUESTION, 0)
    answer = client.chat.completions.create(
        model="embedded", messages=[user(image_part(0), QUESTION)], max_tokens=8
    )
    [choice] = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if expected.n_tokens == 8 else "stop")
    assert answer.usage.completion_tokens == expected.n_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + expected.n_tokens
    assert answer.usage.prompt_tokens > 100  # the picture counts
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "embedded")


def test_the_models_are_listed(served):
    client = served.client()
    assert [model.id for model in client.models.list()] == ["embedded", "embedded+VHR(alpha=2.0)"]
    assert client.models.retrieve("embedded+VHR(alpha=2.0)").object == "model"
    assert client.models.retrieve("embedded+VAR").id == "embedded+VAR"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_methods_by_name_and_by_field(served, embedded):
    plain = served.text(image_part(1), QUESTION)
    method = mmlm.VHR(alpha=8.0)
    expected = single(embedded, QUESTION, 1, methods=[method]).text
    assert expected != plain == single(embedded, QUESTION, 1).text
    by_name = served.ask(image_part(1), QUESTION, model="embedded+VHR(alpha=8.0)")
    by_field = served.ask(image_part(1), QUESTION, mmlm_methods=["VHR(alpha=8.0)"])
    for answer in (by_name, by_field):
        assert answer["choices"][0]["message"]["content"] == expected
        assert answer["model"] == "embedded+VHR(alpha=8.0)"
        assert answer["mmlm_methods"] == [method.text]


def test_pictures_stand_where_the_message_has_them(served, embedded):
    parts = ["compare ", image_part(0), " and ", image_part(1), " ."]
    expected = single(embedded, "compare <image 1> and <image 2> .", 0, 1, marked=True)
    assert served.text(*parts) == expected.text
    before = served.text(image_part(0), image_part(1), "compare and .")
    assert before == single(embedded, "compare and .", 0, 1).text


def test_a_conversation_of_several_turns(served, embedded):
    first = served.ask(image_part(0), QUESTION)["choices"][0]["message"]
    messages = [user(image_part(0), QUESTION), first, user("what is left of it ?")]
    request = Request("x", (picture(0),), QUESTION, follow_ups=("what is left of it ?",))
    [result] = generate_all(*embedded, [request], (), GenerateSettings(max_new_tokens=8))
    response = served.post({"model": "embedded", "messages": messages, "max_tokens": 8})
    assert response.json()["choices"][0]["message"]["content"] == result.turns[1].text


def test_no_picture_at_all(served, embedded):
    assert served.text("hello") == single(embedded, "hello").text


def test_an_answer_that_has_begun_goes_on(served):
    whole = served.text(image_part(2), QUESTION, max_tokens=12).split()
    begun = " ".join(whole[:4])
    body = asking(image_part(2), QUESTION, max_tokens=8, continue_final_message=True)
    body["messages"].append({"role": "assistant", "content": begun})
    body["add_generation_prompt"] = False
    answer = served.post(body).json()["choices"][0]["message"]["content"].split()
    assert answer[: len(whole) - 4] == whole[4:]


def test_a_seed_gives_the_answer_of_the_single_stream(served, embedded):
    model, processor = embedded
    inputs = prepare(processor, [[message("user", QUESTION, 1)]], [[picture(0)]])
    settings = GenerateSettings(
        max_new_tokens=8, do_sample=True, temperature=1.5, top_p=0.9, seed=11
    )
    with AnswerStream(model, processor, inputs, (), settings) as stream:
        list(stream)
    drawn = {"temperature": 1.5, "top_p": 0.9}
    assert served.text(image_part(0), QUESTION, seed=11, **drawn) == stream.text
    other = {served.text(image_part(0), QUESTION, **drawn) for _ in range(4)}
    assert len(other) > 1


def test_a_picture_in_another_format_and_turned_by_its_record(served, embedded):
    image = picture(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.convert("L").save(stream, "JPEG", exif=exif)
    request = Request("x", (stream.getvalue(),), QUESTION)
    [result] = generate_all(*embedded, [request], (), GenerateSettings(max_new_tokens=8))
    part = {"type": "image_url", "image_url": {"url": data_url(stream.getvalue(), "image/jpeg")}}
    assert served.text(part, QUESTION) == result.text


# ---- streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [[], ["VCD()"], ["OPERA(num_beams=2)"]])
def test_a_stream_joins_to_the_answer(served, methods):
    body = asking(image_part(0), QUESTION, max_tokens=20, mmlm_methods=methods)
    whole = served.post(body).json()
    stream = served.client().chat.completions.create(
        **{name: value for name, value in body.items() if name != "mmlm_methods"},
        extra_body={"mmlm_methods": methods},
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole["choices"][0]["finish_reason"]
    assert last.choices == []
    assert last.usage.model_dump(exclude_none=True) == whole["usage"]
    assert len(set(chunk.id for chunk in chunks)) == 1
    if not methods:
        assert sum(map(bool, pieces)) > 3


def test_the_bytes_of_a_stream(served):
    response = served.post(asking("hello", stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    values = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(value["object"] == "chat.completion.chunk" for value in values)
    assert all("usage" not in value for value in values)


def test_stop_sequences(served):
    whole = served.text(image_part(0), QUESTION, max_tokens=12)
    words = whole.split()
    stop = next(word for word in words[2:] if word not in words[:2])
    before = whole[: whole.index(stop)].rstrip()
    for stream in (False, True):
        body = asking(image_part(0), QUESTION, max_tokens=12, stop=[stop, "never"], stream=stream)
        response = served.post(body)
        if stream:
            lines = [x[6:] for x in response.text.split("\n\n") if x.startswith("data: {")]
            chunks = [json.loads(line)["choices"][0] for line in lines]
            text = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
            ending = chunks[-1]
        else:
            [ending] = response.json()["choices"]
            text = ending["message"]["content"]
        assert text == before
        assert (ending["finish_reason"], ending["stop_reason"]) == ("stop", stop)
    kept = served.text(
        image_part(0), QUESTION, max_tokens=12, stop=stop, include_stop_str_in_output=True
    )
    assert kept == whole[: whole.index(stop)] + stop


# ---- refusals --------------------------------------------------------------------------------


def broken(content, kind="image/png"):
    return {"type": "image_url", "image_url": {"url": data_url(content, kind)}}


def address(url):
    return {"type": "image_url", "image_url": {"url": url}}


THIN = png(Image.new("RGB", (1, 4000)))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (broken(b""), "no bytes"),
        (broken(b"not a picture"), "no picture in a known format"),
        (broken(png(picture(0))[:200]), "cannot be read"),
        (address("data:image/png;base64,@@@"), "not base64"),
        (address("data:image/png;base64"), "no comma"),
        (address("data:,hello"), "no picture in a known format"),
        (address(""), "no address"),
        (address("photo.jpg"), "no address"),
        (address("file:///etc/passwd"), "no address"),
        (address("http://[::1"), "no address"),
        (address("https://example.org/a.png"), "not fetched from 'example.org'"),
        (address("http://localhost:1/a.png"), "not fetched from 'localhost:1'"),
        (broken(png(Image.new("1", (5000, 5000)))), "too large"),
    ],
)
def test_a_picture_that_cannot_be_used(served, part, message):
    status, error = served.refusal(asking(image_part(0), part, QUESTION))
    assert status == (403 if "fetched" in message else 400)
    assert message in error["message"]
    assert error["param"] == "messages.0.content.1.image_url"


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found"),
        ({"mmlm_methods": ["VHR(alpha=-1)"]}, 400, "invalid_method"),
        ({"mmlm_methods": ["DARA"], "messages": [user(image_part(0), "x")]}, 400, None),
        ({"mmlm_methods": ["OPERA", "VCD"]}, 400, "invalid_method"),
        ({"mmlm_methods": ["OPERA"], "temperature": 1}, 400, "invalid_value"),
        ({"max_tokens": 513}, 400, "context_length_exceeded"),
        ({"messages": [user("word " * 600)]}, 400, "context_length_exceeded"),
        ({"messages": [user(*[image_part(0)] * 5, "x")]}, 400, "context_length_exceeded"),
        ({"messages": [user(*[image_part(0)] * 9, "x")]}, 400, "too_many_images"),
        ({"messages": [user("x <image> y")]}, 400, "special_token"),
        ({"messages": [user("x <eos> y")]}, 400, "special_token"),
        ({"messages": [{"role": "system", "content": "be kind"}, user("x")]}, 400, None),
        ({"stop": ["x"] * 17}, 400, None),
        ({"n": 2}, 400, "unsupported_parameter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_cannot_be_carried_out(served, change, status, code, stream):
    found, error = served.refusal(asking("hello", stream=stream) | change)
    assert (found, error["code"]) == (status, code)
    assert error["type"] == "invalid_request_error"


def test_the_official_client_gets_its_errors(served):
    client = served.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="embedded", messages=[user("x")], extra_body={"mmlm_methods": ["VHRR"]}
        )
    assert "Did you mean 'VHR'?" in caught.value.body["message"]
    assert caught.value.code == "invalid_method"
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.chat.completions.create(model="embedded", messages=[user("x")], n=2)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 50_000, b'{"model": "embedded"}'])
def test_broken_bodies(served, body):
    assert served.refusal(body)[0] == 400


def test_the_wrong_type_of_body(served):
    body = json.dumps(asking("x")).encode()
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Content-Encoding": "gzip"},
    ):
        assert served.refusal(body, headers=headers)[0] == 415
    right = {"Content-Type": "application/json; charset=utf-8"}
    assert served.post(body, headers=right).status_code == 200


def test_addresses_that_are_not_there(served):
    base = served.url.removesuffix("/v1")
    for method, path, status in (
        ("GET", "/", 404),
        ("POST", "/v1/completions", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/docs", 404),
    ):
        response = httpx.request(method, base + path)
        assert response.status_code == status
        assert "POST /v1/chat/completions" in response.json()["error"]["message"]
    assert httpx.get(f"{base}/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert "/v1/chat/completions" in httpx.get(f"{base}/openapi.json").json()["paths"]


def test_a_page_that_pretends_to_be_here_is_refused(served):
    status, error = served.refusal(asking("x"), headers={"Host": "evil.example"})
    assert (status, error["code"]) == (403, "wrong_host")
    port = served.url.split(":")[2].removesuffix("/v1")
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert served.post(asking("x"), headers={"Host": host}).status_code == 200


def test_what_is_no_http(served):
    bad_header = b"POST /v1/chat/completions HTTP/1.1\r\nbad header\r\n\r\n"
    for raw in (b"\x00\x01\x02\r\n\r\n", bad_header):
        with served.connected() as connection:
            connection.sendall(raw)
            assert b" 400 " in connection.recv(4096).splitlines()[0]
    assert served.text("x")
    assert served.settles()


def test_a_large_picture_is_found_before_it_is_decoded(served):
    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # 10 GB of pixels
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    status, error = served.refusal(asking(broken(bomb), "x"))
    assert (status, error["code"]) == (400, "invalid_image")
    assert "too large" in error["message"]
