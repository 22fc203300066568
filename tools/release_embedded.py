"""Puts a finished training into the package: `mmlm/assets` with its model card.

    python tools/release_embedded.py --run runs/world/seed0 --scores docs/results/seed0.json

The weights are stored in 16 bits; the card holds the command, the configuration and its hash, the
loss curves and the scores. `make embedded-model` trains, measures and then runs this.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from mmlm.model.checkpoint import embedded_folder, load, save

STAGES = {
    "vision": ("patch_loss", "presence_loss"),
    "language": ("loss",),
    "projector": ("caption_loss", "question_loss"),
    "alignment": ("caption_loss", "question_loss"),
    "refinement": ("caption_loss", "question_loss", "patch_loss"),
}
ROWS = 9
"""Rows of a loss table."""
LIMIT = 12_000_000
"""Bytes that the weights may take in the repository."""

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---
# The embedded model

A LLaVA of {parameters:.2f} M parameters that the training program of this project trained from
random weights on the embedded world (procedural pictures in COCO's 80 categories). It is there so
that every command runs offline; it knows nothing but that world: {words} words, pictures of
{size} x {size} pixels. Its errors have the causes known from large models, weak visual evidence
filled in by the prior of the scene, and are measured in `docs/embedded-model.md`.

```python
import mmlm

model, processor = mmlm.load("embedded")
```

Plain `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor` read this folder, too.

* Made by: `{command}`
* SHA-256 of the configuration below: `{digest}`
* Stored in {dtype}; `mmlm.load` widens it to float32 unless told otherwise.
* Time: {minutes:.0f} minutes of training in all stages, two CPU cores.

## Scores

Greedy, 84 new tokens, in percent; measured by `{measure}`.

{scores}

## Loss

{losses}

## Configuration

```yaml
{config}```
"""


def main() -> None:
    """Writes the checkpoint and its card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output folder of the training")
    parser.add_argument("--scores", type=Path, required=True, help="JSON of measure_embedded.py")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--output", type=Path, default=embedded_folder(), help="folder")
    arguments = parser.parse_args()
    release(arguments.run, arguments.scores, arguments.dtype, arguments.output)


def release(run: Path, scores: Path, dtype: str, output: Path) -> None:
    """Writes the checkpoint and its card.

    Args:
        run: output folder of the training.
        scores: what `tools/measure_embedded.py scores` wrote.
        dtype: precision of the stored weights.
        output: folder, usually the package's assets.

    Raises:
        ValueError: the weights take more room than the repository allows.
    """
    import torch

    model, processor = load(run / "model")
    tokens = model.generation_config.max_new_tokens
    save(model, processor, output, dtype=getattr(torch, dtype), max_new_tokens=tokens)
    weights = output / "model.safetensors"
    weights.chmod(0o644)  # a temporary file's permissions would go into the wheel
    size = weights.stat().st_size
    if size > LIMIT:
        raise ValueError(f"the weights take {size} bytes, at most {LIMIT} are allowed")
    config = (run / "config.yaml").read_text()
    logs = {stage: _log(run / stage / "log.jsonl") for stage in STAGES}
    _plot(logs, output / "loss.png")
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        words=len(processor.tokenizer),
        size=model.config.vision_config.image_size,
        command=f"python -m training --config configs/train/world/{run.name}.yaml",
        digest=hashlib.sha256(config.encode()).hexdigest(),
        dtype=dtype,
        minutes=sum(lines[-1]["seconds"] for lines in logs.values()) / 60,
        measure=f"python tools/measure_embedded.py scores --model {run}/model --name {scores.stem}",
        scores=_scores(json.loads(scores.read_text())),
        losses="![Losses of the stages](loss.png)\n\n" + _losses(logs),
        config=config,
    )
    (output / "README.md").write_text(card)


def _log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _losses(logs: dict[str, list[dict[str, Any]]]) -> str:
    """One small table a stage, rows spread evenly over its steps."""
    parts = []
    for stage, lines in logs.items():
        names = STAGES[stage]
        picked = [lines[round(i * (len(lines) - 1) / (ROWS - 1))] for i in range(ROWS)]
        rows = ["| " + stage + " | " + " | ".join(str(line["step"]) for line in picked) + " |"]
        rows.append("| --- |" + " ---: |" * ROWS)
        rows += [
            f"| {name} | " + " | ".join(f"{line[name]:.3g}" for line in picked) + " |"
            for name in names
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _scores(record: dict[str, Any]) -> str:
    """CHAIR and POPE of every split."""
    rows = [
        "| split | CHAIR_s | CHAIR_i | recall | POPE random | popular | adversarial |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for split, result in record["splits"].items():
        values = [result["metrics"][name]["value"] for name in ("chair_s", "chair_i", "recall")]
        values += [kind["metrics"]["accuracy"]["value"] for kind in result["pope"].values()]
        rows.append(f"| {split} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")
    return "\n".join(rows)


def _plot(logs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The losses over the steps, one panel a stage, as a PNG with few colours."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, panels = pyplot.subplots(1, len(logs), figsize=(13, 2.6), layout="constrained")
    for panel, (stage, lines) in zip(panels, logs.items(), strict=True):
        for name in STAGES[stage]:
            panel.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
        panel.set(title=stage, xlabel="step", yscale="log")
        panel.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    pyplot.close(figure)
    Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(path)


if __name__ == "__main__":
    main()
