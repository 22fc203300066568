"""Trains, measures and installs the embedded model: what `make embedded-model` runs.

    python tools/build_embedded_model.py [--seed 0]

About an hour and a half on two cores. It may be stopped at any time: the same command goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the three steps; the first that fails ends the rest.

    Returns:
        The exit code of the last step that ran.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, choices=(0, 1), help="which configuration")
    name = f"seed{parser.parse_args().seed}"
    run, scores = f"runs/world/{name}", f"docs/results/{name}.json"
    steps = (
        ["-m", "training", "--config", f"configs/train/world/{name}.yaml"],
        ["tools/measure_embedded.py", "scores", "--model", f"{run}/model", "--name", name],
        ["tools/release_embedded.py", "--run", run, "--scores", scores],
    )
    for step in steps:
        print("$ python " + " ".join(step), flush=True)
        code = subprocess.run([sys.executable, *step], cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
