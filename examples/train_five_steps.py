"""Five steps of C-DPO on pairs that the model made of itself.

python examples/preference_pairs.py && python examples/train_five_steps.py
"""

import json
from pathlib import Path

import mmlm
from mmlm.cli import main

pairs = Path("runs/preference_pairs/pairs.jsonl")
output = Path("runs/train_five_steps")
recipe = "--recipe.init_args."
command = ["train", "--config", "train/world/preference", "--output", str(output),
           recipe + "data.files", f"[{pairs}]",
           recipe + "optimisation.steps", "5", recipe + "optimisation.batch_size", "4",
           recipe + "optimisation.rows_per_pass", "4"]  # fmt: skip
assert main(command) == 0
last = json.loads((output / "finished.json").read_text())
print(last["steps"], "steps; the loss is a number:", last["log"][-1]["train_loss"] > 0)
model, processor = mmlm.load(output / "model")  # a folder that plain transformers reads, too
print(type(model).__name__, "|", type(processor).__name__)
