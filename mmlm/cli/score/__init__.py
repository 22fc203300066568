"""``mmlm score``: score stored answers again, without the model. One file per benchmark."""

from mmlm.cli.score import chair, pope

__all__ = ["COMMANDS"]

COMMANDS = {
    "chair": chair.COMMAND,
    "pope": pope.COMMAND,
}
