"""The page as it is served, and the command that serves it."""

import json
import re
import socket
import subprocess
import sys
import time

import httpx
import pytest
from PIL import Image

from mmlm.cli import main
from mmlm.cli.options import ModelOptions
from mmlm.cli.web import is_loopback
from mmlm.errors import InputError
from mmlm.web.app import launch, playground
from mmlm.web.messages import friendly, guarded
from mmlm.web.models import Limits, Models


@pytest.fixture(scope="module")
def address():
    limits = Limits(upload_bytes=100_000)
    page = playground(Models(["embedded"], ModelOptions()), limits)
    yield launch(page, limits)
    page.close(verbose=False)


def test_the_page_asks_nobody_else_for_anything(address):
    html = httpx.get(address).text
    assert "fonts.googleapis" not in html
    # Addresses that a browser follows by itself; links in the description of a page are no such.
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:[^"]+)"', html)
    assert [url for url in loaded if not url.startswith(address)] == []
    styles = httpx.get(f"{address}theme.css").text
    assert "http" not in styles.replace("http://www.w3.org", "")


def test_every_element_that_tests_and_links_name_is_there(address):
    config = httpx.get(f"{address}config").json()
    ids = {part["props"].get("elem_id") for part in config["components"]}
    wanted = {"model", "picture", "draw", "scene-number", "truth", "question", "ask", "stop"}
    wanted |= {"new-talk", "answers", "link", "save-settings", "load-settings", "shade"}
    wanted |= {f"method-{n}{part}" for n in range(1, 5) for part in ("", "-text", "-form")}
    assert wanted <= ids
    assert config["analytics_enabled"] is False


def test_a_large_file_is_not_taken(address):
    ok = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"x" * 50_000)})
    assert ok.status_code == 200
    refused = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"x" * 200_000)})
    assert refused.status_code == 413


def uploaded(address, path):
    """What the page's event for a dropped picture answers about a file."""
    config = httpx.get(f"{address}config").json()
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    [event] = [
        one for one in config["dependencies"] if [ids["picture"], "upload"] in one["targets"]
    ]
    data = [None, {"path": path, "meta": {"_type": "gradio.FileData"}}]
    asked = {"data": data, "fn_index": event["id"], "session_hash": "test"}
    httpx.post(f"{address}gradio_api/queue/join", json=asked).raise_for_status()
    with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash=test") as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line else {}
            if message.get("msg") == "process_completed":
                return message
    return None


def test_only_files_that_were_uploaded_are_read(address, tmp_path):
    picture = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(picture)
    answer = uploaded(address, str(picture))
    assert (answer["success"], answer["output"]["error"]) == (False, None)  # no word about why
    files = {"files": ("mine.png", picture.read_bytes())}
    [path] = httpx.post(f"{address}gradio_api/upload", files=files).json()
    answer = uploaded(address, path)
    assert answer["success"] is True
    assert "not known" in answer["output"]["data"][2]


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("example.org", False), ("10.0.0.3", False)],
)  # fmt: skip
def test_who_can_reach_an_address(host, inside):
    assert is_loopback(host) is inside


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--max_upload_mb", "0"], "--max_upload_mb is 0"),
        (["--max_new_tokens", "-1"], "--max_new_tokens is -1"),
        (["--model", "embeded"], "There is no model 'embeded'"),
        (["--also", "nowhere"], "There is no model 'nowhere'"),
        (["--method", "VHX"], "no method 'VHX'"),
        (["--method", "nowhere.Mine"], "cannot be imported"),
        (["--method", "VHR"] * 5, "5 columns of methods"),
        (["--detector", "Nothing"], "no detector 'Nothing'"),
        (["--host", "not a host"], "Nothing can listen at not a host"),
    ],
)
def test_what_the_command_refuses(arguments, said, capsys):
    assert main(["web", *arguments]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "advice: " in text


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["web", "--port", str(port)]) == 2
    assert f"Nothing can listen at 127.0.0.1, port {port}" in capsys.readouterr().err


def test_the_command_serves_until_it_is_stopped():
    command = [sys.executable, "-m", "mmlm", "web", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        try:
            address = json.loads(p.stdout.readline())["address"]
            assert address.startswith("http://127.0.0.1:")
            assert httpx.get(address).status_code == 200
        finally:
            p.send_signal(2)
        _, errors = p.communicate(timeout=60)
    assert p.returncode == 130
    assert "Traceback" not in errors


def test_messages_are_for_people():
    shown = friendly(InputError("a <b> & c", advice="do <this>"))
    assert "&lt;b&gt; &amp; c" in shown.message
    assert "do &lt;this&gt;" in shown.message
    assert "<b>" not in shown.message
    assert "bug" in friendly(KeyError("x")).message
    assert friendly(shown) is shown


def test_guarded_functions_stay_what_they_are():
    import gradio as gr

    @guarded
    def steps():
        yield 1
        raise InputError("two", advice="three")

    running = steps()
    assert next(running) == 1
    with pytest.raises(gr.Error, match="two"):
        next(running)
    assert guarded(lambda x: x + 1)(1) == 2


def test_loading_is_once_for_all_threads(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from mmlm.web import models as module

    calls = []

    def load(options, methods, terminal):
        calls.append(options.id)
        time.sleep(0.05)
        return object(), object()

    monkeypatch.setattr(module, "open_model", load)
    models = Models(["embedded"], ModelOptions())
    with ThreadPoolExecutor(8) as pool:
        loans = list(pool.map(models.open, ["embedded"] * 8))
    assert calls == ["embedded"]
    assert len(set(map(id, loans))) == 1
