"""How much memory DARA adds to inference: acceptance 15 of its list.

    python tools/measure_dara_memory.py --positions 4096 --output docs/results/dara_memory.json

A LLaVA of random weights with the width of the embedded model's bigger brothers answers a prompt of
N positions with five pictures, with DARA and without, each in a process of its own; the peak is the
process's resident set (CPU) or what CUDA had allocated at most. Mode "score" at all ones but one
factor, so that every key of layer 0 is scaled.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import mmlm  # noqa: F401  (first: it installs the torchvision guard)


def peak(positions: int, mode: str, layers: int, width: int) -> int:
    """Peak memory in bytes of one prompt; ``mode`` "plain" attaches nothing."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from mmlm import DARA, build_in

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=112, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256), max_position_embeddings=positions,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=31999)
    model = LlavaForConditionalGeneration(config).eval().to(device)
    if mode != "plain":
        build_in(model, DARA(mode=mode))  # type: ignore[arg-type]
        factors = torch.ones(1, width // 64, 5)
        factors[0, 0, 0] = 1.1
        model.mmlm_methods.DARA.set_factors(factors)
    each = (112 // 14) ** 2
    ids = torch.randint(5, 31000, (1, positions))
    for n in range(5):
        ids[0, 10 + n * (each + 20) : 10 + n * (each + 20) + each] = 31999
    pixels = torch.randn(5, 3, 112, 112)
    with torch.no_grad():
        model.generate(
            input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device),
            pixel_values=pixels.to(device), max_new_tokens=8, do_sample=False,
        )  # fmt: skip
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--mode", choices=("plain", "score", "weight"))
    given = parser.parse_args()
    if given.mode is not None:
        print(peak(given.positions, given.mode, given.layers, given.width))
        return
    found = {}
    for mode in ("plain", "score", "weight"):
        run = subprocess.run(
            [sys.executable, __file__, "--mode", mode, "--positions", str(given.positions),
             "--layers", str(given.layers), "--width", str(given.width)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[mode] = int(run.stdout.split()[-1])
    result = {
        "positions": given.positions,
        "layers": given.layers,
        "width": given.width,
        "peak_bytes": found,
        "added_share": {m: found[m] / found["plain"] - 1 for m in ("score", "weight")},
    }
    print(json.dumps(result, indent=2))
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
