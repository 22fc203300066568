"""`--json`, `--quiet`, `NO_COLOR` and pipes mean the same for every command."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

from mmlm.cli import main

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")
#: Commands that run in seconds, with everything that they need; {out} is a new path.
COMMANDS = {
    "methods": ["methods"],
    "one method": ["methods", "VHR"],
    "doctor": ["doctor"],
    "the installation": ["doctor", "--self"],
    "completion": ["completion", "bash"],
    "official files": ["data", "list"],
    "the world": ["data", "world", "--count", "2", "--split", "natural", "--output", "{out}"],
    "one question": ["chat", "--scene", "3", "--prompt", "describe the image ."],
    "inspect": ["inspect", "--scene", "3", "--output", "{out}"],
    "chair": ["bench", "chair", "--count", "2", "--output", "{out}", "--generate.batch_size", "2"],
    "sinks": ["calibrate", "sink-dims", "--count", "2", "--output", "{out}.yaml"],
    "demo": ["demo", "--quick", "--count", "3", "--questions", "1", "--output", "{out}"],
}


@pytest.fixture
def run(tmp_path, capfd):
    def begin(name, *more):
        words = [word.format(out=tmp_path / "out") for word in COMMANDS[name]]
        assert main([*words, *more]) == 0
        return capfd.readouterr()

    return begin


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_all_that_a_program_reads(run, name):
    shown = run(name, "--json", "--quiet")
    values = [json.loads(line) for line in shown.out.splitlines()]
    assert values
    assert shown.err == ""


@pytest.mark.parametrize("name", ["methods", "doctor", "the installation", "the world", "chair"])
def test_a_pipe_gets_text_without_escapes(run, name):
    shown = run(name)
    assert shown.out + shown.err
    assert "\x1b" not in shown.out + shown.err


@pytest.mark.parametrize(
    "argv", [["chat", "--image", "none.png"], ["methods", "x"], ["bench", "x"]]
)
def test_errors_keep_standard_output_clean(argv, capfd):
    assert main([*argv, "--json", "--quiet"]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"error: .+\nadvice: .+\n", shown.err)


def watched(argv, **environment):
    """Runs a command with standard error on a terminal and standard output in a pipe."""
    own, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-m", "mmlm", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**clean, "TERM": "xterm-256color", "COLUMNS": "150", **environment},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(own, 65536)
        except OSError:  # Linux: the other side was closed
            break
        if not part:
            break
        shown += part
    out = child.stdout.read().decode()
    child.stdout.close()
    os.close(own)
    assert child.wait() == 0, shown
    return out, shown.decode()


def test_bars_go_to_the_terminal_and_never_into_the_answer(tmp_path):
    argv = ["calibrate", "sink-dims", "--count", "3", "--output", str(tmp_path / "var.yaml")]
    out, shown = watched([*argv, "--json"])
    assert json.loads(out)["model"] == "embedded"
    assert "prompts" in shown
    assert "3/3" in shown
    assert "loading weights" in shown  # the library's bar, in our words
    assert COLOUR.search(shown)


@pytest.mark.parametrize("quiet", [False, True])
def test_no_color_and_quiet(tmp_path, quiet):
    argv = ["calibrate", "sink-dims", "--count", "3", "--output", str(tmp_path / "var.yaml")]
    out, shown = watched([*argv, *["--quiet"] * quiet], NO_COLOR="1")
    assert "Sink dimensions" in out or "No dimension" in out
    assert (shown == "") is quiet
    assert not COLOUR.search(shown)
