"""``mmlm bench``: ask a model a benchmark's questions, store the answers, score them.

One file per benchmark; `mmlm.cli.bench.common` is the course they share.
"""

from mmlm.cli.bench import (
    amber,
    chair,
    hallusionbench,
    mmbench,
    mme,
    mmhal,
    mmir,
    multi_image,
    object_halbench,
    pope,
    swapmix,
    text_dominance,
)

__all__ = ["COMMANDS"]

COMMANDS = {
    "amber": amber.COMMAND,
    "chair": chair.COMMAND,
    "hallusionbench": hallusionbench.COMMAND,
    "mmbench": mmbench.COMMAND,
    "mme": mme.COMMAND,
    "mmhal": mmhal.COMMAND,
    "mmir": mmir.COMMAND,
    "object-halbench": object_halbench.COMMAND,
    "pope": pope.COMMAND,
    "swapmix": swapmix.COMMAND,
    "text-dominance": text_dominance.COMMAND,
    **multi_image.COMMANDS,
}
