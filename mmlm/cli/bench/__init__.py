"""``mmlm bench``: ask a model a benchmark's questions, store the answers, score them.

One file per benchmark; `mmlm.cli.bench.common` is the course they share.
"""

from mmlm.cli.bench import chair, pope

__all__ = ["COMMANDS"]

COMMANDS = {
    "chair": chair.COMMAND,
    "pope": pope.COMMAND,
}
