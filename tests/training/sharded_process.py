"""One process of several under DeepSpeed: reference cache, training, export. Run by the tests.

Arguments: folder of the work, ZeRO stage, "lora" or "full".
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), *map(str, Path(__file__).parents[1:3])]

# ruff: noqa: E402, I001  (the path above first, then the package, which installs a guard)
import mmlm  # noqa: F401
import torch
import transformers

from training.arguments import deepspeed_file
from training.checkpoints import open_run, train
from training.export import export
from training.launch import leave, start_deepspeed
from training.preference.precompute import precompute_ref, use_reference_cache
from training.saving import Saving

start_deepspeed()
import trl_toy
from saving_process import lora
from mmlm.model.checkpoint import load


def main(work, stage, kind):
    transformers.utils.logging.set_verbosity_error()
    data = json.loads((work / "data.json").read_text())
    output = work / f"zero{stage}-{kind}"
    saving = Saving(every=2, keep=1)
    settings = {
        **saving.arguments(),
        "deepspeed": json.loads(deepspeed_file(f"zero{stage}").read_text()),
        "per_device_train_batch_size": 1,
        "max_steps": 3,
    }
    arguments = trl_toy.arguments(output, **settings)  # first: parameters are divided on loading
    with open_run(output, {"stage": stage}) as run:
        model, processor = load(work / "model")
        reference = load(work / "model")[0] if kind == "full" else None
        made = trl_toy.trainer(
            data, output, model=model, processor=processor, ref_model=reference,
            arguments=arguments, lora=lora(0.0) if kind == "lora" else None,
            callbacks=saving.callbacks(),
        )  # fmt: skip
        cache = precompute_ref(made, work / f"cache-{kind}-{stage}")
        use_reference_cache(made, cache)
        train(made, run)
        what = "model" if kind == "full" else "merged"
        export(made.model, processor, output / what, what)
        if kind == "lora":
            export(made.model, processor, output / "adapter", "adapter")
        run.finish({"losses": trl_toy.losses(made).tolist()})
    torch.distributed.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
