"""``mmlm train``: the training program in one process.

For several processes launch it yourself: ``deepspeed --module training``, ``accelerate launch -m
training`` or ``torchrun -m training``; the arguments are the same.
"""

from mmlm.cli.frame import HandOver

__all__ = ["COMMAND"]

COMMAND = HandOver(
    summary="train or fine-tune from a configuration file",
    target="training.__main__:main",
    parser="training.config:build_parser",
)
