"""`mmlm serve` as a process: the word when it is ready, SIGTERM, Ctrl-C, wrong options."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from served import asking, image_part

from mmlm.cli import main


@contextlib.contextmanager
def process(*options, **environment):
    command = [sys.executable, "-m", "mmlm", "serve", "--port", "0", "--json", *options]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        line = started.stdout.readline()
        assert line, started.stderr.read()
        started.facts = json.loads(line)
        yield started
    finally:
        started.kill()
        started.communicate()


def ends(started):
    out, err = started.communicate(timeout=60)
    return started.returncode, out, err


def test_sigterm_lets_running_requests_end_and_takes_no_new_ones():
    with process("--method", "VHR(alpha=2.0)") as server:
        url = server.facts["url"]
        assert server.facts["models"] == ["embedded", "embedded+VHR(alpha=2.0)"]
        # The embedded model never ends this: 300 tokens at least, streamed.
        body = asking(image_part(0), "describe the image .", stream=True, max_tokens=300)
        body |= {"temperature": 50.0, "seed": 1}
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] in ("length", "stop")
        code, out, err = ends(server)
        assert (code, out) == (0, "")
        assert "Traceback" not in err
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")


def test_what_does_not_end_in_time_is_cut_off():
    with process("--limits.grace", "0.3", "--limits.timeout", "60") as server:
        url = f"{server.facts['url']}/chat/completions"
        body = asking("x", max_tokens=400, temperature=50.0, stream=True)
        failures = []

        def ask():
            try:
                with httpx.stream("POST", url, json=body, timeout=60) as response:
                    got.set()
                    for _ in response.iter_lines():
                        pass
            except httpx.HTTPError as error:
                failures.append(error)

        got = threading.Event()
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        assert got.wait(60)
        server.send_signal(signal.SIGTERM)
        code, _, err = ends(server)
        for thread in threads:
            thread.join(30)
        assert code == 0
        assert "internal error" not in err


def test_ctrl_c():
    with process() as server:
        server.send_signal(signal.SIGINT)
        code, _, err = ends(server)
        assert code == 130
        assert "Traceback" not in err


def test_a_key_comes_from_the_environment_and_is_never_shown():
    with process(MMLM_SERVE_KEY="s3cret-key") as server:
        url = server.facts["url"]
        assert httpx.get(f"{url}/models").status_code == 401
        headers = {"Authorization": "Bearer s3cret-key"}
        assert httpx.get(f"{url}/models", headers=headers).status_code == 200
        server.send_signal(signal.SIGTERM)
        code, out, err = ends(server)
        assert code == 0
        assert "s3cret" not in out + err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port must be from 0 to 65535"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--limits.timeout", "0"], "timeout must be positive"),
        (["--limits.requests", "-1"], "requests must be positive"),
        (["--temperature", "0.001"], "temperature must be 0 or"),
        (["--allow_hosts", "http://example.org"], "is no host"),
        (["--allow_hosts", "example.org/a"], "is no host"),
        (["--method", "VHRR"], "Did you mean 'VHR'?"),
        (["--method", "VHR()-VAR()"], "not a sum of methods"),
        (["--method", "OPERA+VCD"], "OPERA"),
        (["--name", "a+b"], "stands between"),
        (["--model", "nothing"], "There is no model"),
        (["--host", "192.0.2.1"], "cannot listen"),
    ],
)
def test_what_makes_serving_impossible(options, message, capsys):
    assert main(["serve", "--port", "0", *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "advice: " in shown.err


def test_a_port_that_is_taken_is_found_before_the_model_is_loaded(capsys, monkeypatch):
    import mmlm.cli.serve

    monkeypatch.setattr(mmlm.cli.serve, "open_model", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_a_package_that_is_missing(capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    assert main(["serve", "--port", "0"]) == 2
    assert "pip install 'mmlm[serve]'" in capsys.readouterr().err
