"""How this process belongs to the others of its training, whoever started them.

`deepspeed --module training`, `accelerate launch -m training`, `torchrun -m training` and plain
`mmlm train` say who they are in the same variables of the environment. What is left for us is what
they do not do on a machine without a GPU, and to say what happened when one of them dies.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from mmlm.errors import InputError

__all__ = [
    "end",
    "is_main_process",
    "leave",
    "rank",
    "refuse_idle_devices",
    "say",
    "start_deepspeed",
    "watch_for_lost_processes",
    "world",
]

# What torch.distributed and DeepSpeed say when the other end of a connection is gone.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "NCCL communicator was aborted",
    "NCCL error",
    "Application timeout caused pair closure",
)


def rank() -> int:
    """The number of this process among all of them, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes train together, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the files that all of them share."""
    return rank() == 0


def say(text: str) -> None:
    """Prints one line on the error stream, in one process of the training."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def refuse_idle_devices() -> None:
    """Refuses one process beside several GPUs, for which the Trainer would copy the model around.

    Raises:
        InputError: no launcher started this process, and it sees more than one GPU.
    """
    import torch

    if "RANK" not in os.environ and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        raise InputError(
            f"One process sees {count} GPUs: preference losses cannot be computed by copies of one "
            "model in one process.",
            advice=f"Launch `deepspeed --num_gpus {count} --module training ...` or `torchrun "
            f"--nproc-per-node {count} -m training ...`; for one GPU set CUDA_VISIBLE_DEVICES=0.",
        )


def start_deepspeed() -> None:
    """Makes DeepSpeed's communication ready where it would not do so by itself.

    On a machine without a GPU the Trainer reads the number of processes before DeepSpeed knows it,
    so the communication is started here, over gloo. A single process that no launcher started gets
    the variables that a launcher would have set; DeepSpeed would ask MPI for them.
    """
    import torch

    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed import ops

    # It would be compiled for a minute at its first use; gloo does the same work.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def leave() -> None:
    """Ends this process's part in the communication, if it has one.

    A process that exits without it now and then aborts (a thread of gloo outlives the interpreter),
    and the launcher calls a finished training failed.
    """
    # Not imported here: whoever communicates has imported it.
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        # A thread of gloo that lets go of its last work needs the interpreter for it, and ending
        # the group waits for that thread without giving the interpreter away: a deadlock, seen
        # with a debugger in torch 2.13. Threads that are given a moment first are done with it.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def end(code: int) -> NoReturn:
    """Ends a program that is one process of a training.

    Threads of the communication library can outlive `leave`; on a busy machine one of them now and
    then aborts the interpreter while it takes itself down ("terminate called without an active
    exception"), and the launcher calls a finished training failed. So what Python does at its end
    is done here, and the rest is left out. A training of one process ends as usual.

    Args:
        code: The program's exit code.
    """
    if world() > 1:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def watch_for_lost_processes(output: Path) -> Iterator[None]:
    """Ends this process with a plain message when another one of the training is gone.

    The launcher ends the remaining processes by itself; without this their last words would be a
    trace of the communication library.

    Args:
        output: folder of the training, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not any(sign in str(error) for sign in _LOST):
            raise
        print(
            f"error: process {rank()} of {world()} lost its connection to another process of this "
            f"training, which was ended or died ({str(error).splitlines()[0]})\n"
            f"Checkpoints in {output} are complete: run the same command again, and it goes on "
            "from the last one.",
            file=sys.stderr,
            flush=True,
        )
        # Not sys.exit: closing the broken connections in order would wait for the lost process.
        os._exit(1)
