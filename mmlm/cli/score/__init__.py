"""``mmlm score``: score stored answers again, without the model. One file per benchmark."""

from mmlm.cli.score import (
    amber,
    chair,
    hallusionbench,
    micl,
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
    "micl": micl.COMMAND,
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
