"""docs/serve.md as written, and our own programs as clients."""

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path

from served import asking, image_part, single

from data_tools.generators.openai import OpenAIGenerator
from mmlm.chat_server.client import ChatServer, Patience
from mmlm.chat_server.wire import read_choices
from mmlm.serve.limits import Limits
from mmlm.serve.wire import ChatRequest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def test_the_pages_code_prints_what_the_page_says(served, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = dict(re.findall(r"^```(py|out)\n(.*?)^```$", PAGE, re.M | re.S))
    code = blocks["py"].replace("http://localhost:8000/v1", served.url)
    assert code != blocks["py"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "docs/serve.md", "exec"), {})
    assert printed.getvalue() == blocks["out"]


def test_the_page_names_every_field_and_every_limit_it_quotes():
    for name in ChatRequest.model_fields:
        assert f"`{name}`" in PAGE, name
    limits = {field.name: field.default for field in dataclasses.fields(Limits)}
    for name, value in re.findall(r"`--limits\.(\w+)`(?: \((\d+)(?: s)?\))?", PAGE):
        assert name in limits
        assert not value or float(value) == limits[name]


def test_our_own_client_reads_the_answers(served, embedded):
    server = ChatServer(served.url, patience=Patience(retries=0))
    expected = single(embedded, "describe the image .", 0)
    answer = server.answer(asking(image_part(0), "describe the image ."), read_choices)
    assert [choice.text for choice in answer.value] == [expected.text]
    refused = server.answer(asking("x", n=2), read_choices)
    assert "n is not supported here" in refused.reason
    word = expected.text.split()[3]
    stopped = server.answer(
        asking(image_part(0), "describe the image .", stop=[word]), read_choices
    )
    assert stopped.value[0].stopped_by == word


def test_the_generator_of_preference_data_finds_what_it_needs(served):
    server = ChatServer(served.url, patience=Patience(retries=0))
    habits = OpenAIGenerator("embedded", server, max_tokens=40).check()
    assert habits.keeps_stops
    assert not habits.echoes
    assert not habits.knows_n


def test_the_page_quotes_the_stored_load():
    found = json.loads((ROOT / "benchmarks" / "results" / "serve-cpu.json").read_text())
    assert found["good_that_differ_from_their_single_run"] == 0
    assert found["broken_without_4xx_and_message"] == 0
    memory = ", ".join(map(str, found["resident_mib"]["after_each_200"]))
    for line in (
        f"| good answers | {found['good']}, of them different from their single run: 0 |",
        f"| broken requests | {found['broken']}, of them without a 4xx and a message: 0 |",
        f"1,000 requests | {memory} MiB |",
        f"The {found['good']} answers are to {found['distinct_good']} different requests and "
        f"{found['distinct_answers']} different texts.",
    ):
        assert line in PAGE
