"""Runs every script in examples/ and keeps what it prints, which a test compares.

python tools/run_examples.py [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
#: In this order: training takes the pairs of the script before it. The server's script needs one.
ORDER = (
    "caption",
    "stack_methods",
    "batch_and_resume",
    "stream",
    "look_inside",
    "own_method",
    "score_chair",
    "cut_tokens",
    "preference_pairs",
    "train_five_steps",
)


def main(names: list[str]) -> None:
    """Writes examples/outputs/NAME.txt."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names or ORDER:
            command = [sys.executable, str(EXAMPLES / f"{name}.py")]
            done = subprocess.run(
                command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True
            )
            (EXAMPLES / "outputs" / f"{name}.txt").write_text(done.stdout, encoding="utf-8")
            print(f"{name}: {len(done.stdout.splitlines())} lines")


if __name__ == "__main__":
    main(sys.argv[1:])
