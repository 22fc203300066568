"""`mmlm chat` in a real terminal: keys, Ctrl-C, blocks of lines, the history, colours."""

import os
import re
import sys

import pexpect
import pytest
from tiny import picture

PROMPT = "\n> "
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def start(tiny_folder, tmp_path):
    """Starts a session in a pseudo-terminal; all of a test share a history."""
    picture(0).save(tmp_path / "0.png")
    running = []

    def begin(*argv, model=str(tiny_folder), **environment):
        variables = {
            **{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")},
            "TERM": "xterm-256color",
            "INPUTRC": "/dev/null",
            "XDG_STATE_HOME": str(tmp_path / "state"),
            "PYTHONWARNINGS": "",
            **environment,
        }
        child = pexpect.spawn(
            sys.executable,
            ["-m", "mmlm", "chat", "--model", model, *argv],
            env=variables,
            cwd=str(tmp_path),
            dimensions=(40, 200),
            encoding="utf-8",
            timeout=180,
            echo=True,
        )
        running.append(child)
        child.expect_exact("/help lists the commands")
        child.expect_exact(PROMPT)
        return child

    yield begin
    for child in running:
        child.close(force=True)


def said(child, entry):
    """Sends a line and gives what is shown up to the next prompt, without escapes."""
    child.sendline(entry)
    child.expect_exact(PROMPT)
    return ESCAPES.sub("", child.before).replace("\r", "")


def interrupt(child):
    """Ctrl-C at a prompt, until it is seen.

    Python's readline overlooks a signal that comes just before it waits for a key; then the next
    one, or a key, is needed.
    """
    for _ in range(10):
        child.sendintr()
        if child.expect_exact(["(/quit leaves)", pexpect.TIMEOUT], timeout=10) == 0:
            break
    # One may have been seen late: whatever it showed comes before this.
    child.sendline("/unknown")
    child.expect_exact("There is no command '/unknown'")
    child.expect_exact(PROMPT)


def quit_(child):
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.wait()
    return child.exitstatus


def test_a_session(start, tmp_path):
    """One session, as starting a process takes seconds: everything that keys do."""
    child = start("--image", "0.png", "--generate.max_new_tokens", "1500")
    # Ctrl-C stops the answer and not the program; what was said so far stands in the conversation.
    child.sendline("what is this ?")
    child.expect_exact("what is this ?\r\n")
    child.expect(r"\w")  # the answer has begun
    child.sendintr()
    child.expect_exact(" [stopped]")
    child.expect(r"\[(\d+) tokens in [\d.]+ s")
    assert 0 < int(child.match[1]) < 1500
    child.expect_exact(PROMPT)
    # Ctrl-C at the prompt and inside a block drops what was typed.
    child.send("half a li")
    child.expect_exact("half a li")
    interrupt(child)
    child.sendline('"""a block')
    child.expect_exact("... ")
    interrupt(child)
    # A mistake is explained and the session goes on.
    assert "Did you mean '/save'?" in said(child, "/sav x")
    # Blocks, lines that go on, and what stands in the file in the end.
    child.sendline("/compare")
    child.expect_exact("There is no method to compare with")
    child.expect_exact(PROMPT)
    assert "1 turns written to talk.json" in said(child, "/save talk.json")
    assert (tmp_path / "talk.json").is_file()
    # TAB completes commands, methods and files.
    child.send("/met\t")
    child.expect_exact("/method ")
    child.send("VH\t")
    child.expect_exact("VHR ")
    assert "method: VHR" in said(child, "")
    child.send("/image 0\t")
    child.expect_exact("0.png")
    assert "A new conversation begins" in said(child, "")
    assert quit_(child) == 0
    # What was typed is there in the next session, and private.
    history = tmp_path / "state" / "mmlm" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    lines = history.read_text().splitlines()
    assert lines[0] == "what is this ?"
    assert "half a li" not in lines
    assert lines[-2:] == ["/image 0.png ", "/quit"]


def test_the_next_session_remembers_and_ends_with_ctrl_d(start, tmp_path):
    history = tmp_path / "state" / "mmlm" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text("/method VHR(alpha=3.0)\n")
    child = start()
    child.send("\x1b[A")  # the arrow up
    child.expect_exact("/method VHR(alpha=3.0)")
    assert "method: VHR(alpha=3.0)" in said(child, "")
    child.sendline("/scene \\")
    child.expect_exact("... ")
    assert "world natural 12" in said(child, "natural 12")
    shown = said(child, "/look")
    assert "▀" * 40 in shown
    assert "world natural 12" in shown
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    assert len(history.read_text().splitlines()) == 4  # one of each session before, three of this


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_of_what_is_known(start, tmp_path, no_color):
    variables = {"NO_COLOR": no_color} if no_color else {}
    child = start("--scene", "7", "--history", "false", model="embedded", **variables)
    child.sendline("describe the image in detail .")
    child.expect_exact(PROMPT)
    answer = child.before
    assert "found: boats, ball; invented: birds" in answer
    assert ("\x1b[32mboats\x1b[0m" in answer) is not bool(no_color)
    mark = "\x1b[1;4mbirds\x1b[0m" if no_color else "\x1b[1;4;31mbirds\x1b[0m"
    assert mark in answer
    if no_color:
        assert "cannot be drawn without colours" in said(child, "/look")
    assert quit_(child) == 0
    assert not (tmp_path / "state").exists()
