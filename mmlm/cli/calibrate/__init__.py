"""``mmlm calibrate``: measures what a method must know about a model, and writes it down.

How to add a target: write ``mmlm/cli/calibrate/<target>.py`` with an options dataclass, a ``run``
and a ``COMMAND``, as for any command (see :mod:`mmlm.cli`), and add it to ``COMMANDS`` below.
:mod:`mmlm.cli.calibrate.common` has what targets share: pictures and questions, and the file they
write, which ``mmlm generate --config FILE`` reads.
"""

from __future__ import annotations

from mmlm.cli.calibrate import conflict_heads, heads, inter_k, sink_dims

__all__ = ["COMMANDS"]

COMMANDS = {
    "conflict-heads": conflict_heads.COMMAND,
    "heads": heads.COMMAND,
    "inter-k": inter_k.COMMAND,
    "sink-dims": sink_dims.COMMAND,
}
