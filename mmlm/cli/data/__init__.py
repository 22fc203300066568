"""``mmlm data``: makes data, and brings official files onto this machine.

How to add a sub-command: write ``mmlm/cli/data/<name>.py`` with an options dataclass, a ``run`` and
a ``COMMAND``, as for any command (see :mod:`mmlm.cli`), and add it to ``COMMANDS`` below.
"""

from __future__ import annotations

from mmlm.cli.data import convert, fetch, listing, merge, mia, micl, report, sentinel, world

__all__ = ["COMMANDS"]

COMMANDS = {
    "world": world.COMMAND,
    "sentinel": sentinel.COMMAND,
    "mia": mia.COMMANDS,
    "micl": micl.COMMAND,
    "merge": merge.COMMAND,
    "report": report.COMMAND,
    "convert": convert.COMMAND,
    "list": listing.COMMAND,
    "fetch": fetch.COMMAND,
}
