"""Preference pairs from a model's own sentences (SENTINEL), on pictures whose truth is known.

python examples/preference_pairs.py
"""

import json
from pathlib import Path

from mmlm.cli import main

folder = Path("runs/preference_pairs")
command = ["data", "sentinel", "--config", "data/world_sentinel", "--output", str(folder),
           "--world.count", "8", "--overwrite", "true", "--quiet"]  # fmt: skip
assert main(command) == 0
pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
print(len(pairs), "pairs from 8 pictures; the first:")
for name in ("question", "context", "chosen", "rejected", "rejected_hallucinated"):
    print(f"  {name}: {pairs[0][name]}")
