"""How the training program ends: with its own exit code, and nothing left undone."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, threading, time
from training.launch import end
class Late:
    def __del__(self):
        print("torn down")
late = Late()
atexit.register(print, "exit function")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("said", end=" ")
end(int("{code}"))
"""


@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize(("world", "torn_down"), [("1", True), ("2", False)])
def test_exit_functions_run_and_nothing_said_is_lost(code, world, torn_down):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(code=code)],
        env={**os.environ, "WORLD_SIZE": world},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["said thread", "exit function"]
    # With others around the interpreter is not taken down: that is where it can abort.
    assert ("torn down" in lines) is torn_down
