"""A stranger's walk: every command of docs/get-started.md, as written, one after the other.

Commands that go on until they are stopped (`mmlm web`, `mmlm serve`) are started where they stand
and must answer; only their port is changed, so that tests side by side do not meet.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "get-started.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(bash|sh|output)\n(.*?)^```$", re.M | re.S)
EXAMPLES = ROOT / "examples"
#: Command -> (the port that the page names, a path that answers once it runs).
SERVERS = {"mmlm web": ("7860", "/"), "mmlm serve": ("8000", "/health")}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def environment():
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu", "GRADIO_ANALYTICS_ENABLED": "False", "NO_COLOR": "1",
    }  # fmt: skip


def started(command, port, path, folder):
    """A running server that has answered once."""
    log = (folder / f"{command.split()[1]}.log").open("w")
    server = subprocess.Popen(
        [*command.split(), "--port", port], cwd=folder, env=environment(), stdout=log, stderr=log
    )
    ends = time.monotonic() + 240
    while time.monotonic() < ends:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5):
                return server
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert server.poll() is None, Path(log.name).read_text()
            time.sleep(0.5)
    server.kill()
    raise AssertionError(f"{command} does not answer")


@pytest.mark.slow
def test_the_walk(tmp_path):
    printed, servers, ports = "", [], {}
    try:
        for kind, text in BLOCK.findall(PAGE.partition("## 9.")[0]):
            command = text.strip()
            if kind == "output":
                assert text in printed
            elif command in SERVERS:
                known, path = SERVERS[command]
                ports[known] = free_port()
                servers.append(started(command, ports[known], path, tmp_path))
            elif kind == "bash":
                for known, port in ports.items():
                    text = text.replace(f":{known}/", f":{port}/")
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", text],
                    cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=540,
                )  # fmt: skip
                assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
                printed = done.stdout
        assert '"content":"the image shows a beach scene with two boats' in printed  # the server's
        client = [sys.executable, EXAMPLES / "ask_a_server.py"]
        said = subprocess.check_output(
            [*client, f"http://127.0.0.1:{ports['8000']}/v1"], cwd=tmp_path, text=True
        )
        assert said == (EXAMPLES / "outputs" / "ask_a_server.txt").read_text(encoding="utf-8")
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=60)
    assert len(ports) == 2
    for name in ("look/index.html", "look/inspect.json", "runs/compared/report.html"):
        assert (tmp_path / name).is_file()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
