"""A training that kills itself at a chosen moment of its saving; run as a program by the tests.

Reads lines ["folder", "moment" or null, more settings] and answers each with the exit code of a
process forked for it, so that torch is imported once.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), *map(str, Path(__file__).parents[1:3])]

# ruff: noqa: E402, I001  (the path above first, then the package, which installs a guard)
import mmlm  # noqa: F401
import transformers
import trl_toy
from peft import LoraConfig
from transformers import Trainer, TrainerState

from training import checkpoints
from training.saving import Saving

STEPS = 7
EVERY = 2

#: Where a run can be cut off: owner and name of a function that is called at that moment.
MOMENTS = {
    "before the weights": (Trainer, "save_model"),
    "before the optimizer": (Trainer, "_save_optimizer_and_scheduler"),
    "before the random states": (Trainer, "_save_rng_state"),
    "before the trainer's state": (TrainerState, "save_to_json"),
    "before the disk": (checkpoints, "_flush"),
    "before the marker": (checkpoints, "write_json"),
    "before removing": (checkpoints, "_remove_old"),
    "while removing": (checkpoints.shutil, "rmtree"),
}


def lora(dropout=0.1):
    return LoraConfig(
        r=4, lora_dropout=dropout, target_modules=r".*language_model.*\.(q_proj|v_proj)"
    )


def kill_at(moment, from_step):
    """Makes this process kill itself at the moment, once the training has come to a step."""
    owner, name = MOMENTS[moment]
    plain = getattr(owner, name)
    reached = [0]

    class Counts(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            reached[0] = state.global_step

    def deadly(*args, **more):
        if reached[0] >= from_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **more)

    setattr(owner, name, deadly)
    return Counts()


def trained(folder, moment=None, callbacks_more=(), **options):
    """Trains in a folder, from where an earlier run was cut off; the trainer."""
    output = Path(folder)
    saving = Saving(every=EVERY, keep=1)
    callbacks = [*saving.callbacks(), *callbacks_more]
    if moment:
        callbacks.append(kill_at(moment, 6))
    settings = {
        **saving.arguments(),
        "max_steps": STEPS,
        "disable_dropout": False,
        "train_sampling_strategy": "random",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        **options,
    }
    with checkpoints.open_run(output, {"steps": STEPS}) as run:
        if run.finished:
            return None
        pictures = output.parent / "pictures"
        pictures.mkdir(exist_ok=True)
        rows = trl_toy.rows(pictures, 9)
        made = trl_toy.trainer(rows, output, lora=lora(), callbacks=callbacks, **settings)
        checkpoints.train(made, run)
        run.finish({"losses": trl_toy.losses(made).tolist()})
    return made


def main():
    transformers.utils.logging.set_verbosity_error()
    for line in sys.stdin:
        folder, moment = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr
            trained(folder, moment)
            os._exit(0)
        print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
