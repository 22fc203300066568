"""``mmlm data mia``: MIA-DPO, from questions about one picture to pairs about several.

Stages in order: compose, answer, score, filter, merge; ``run`` does all of them. Everything of one
run lies in one folder (`data_tools.mia.records`).
"""

from __future__ import annotations

from mmlm.cli.data.mia import answer, compose, filter, merge, run, score, sheet

__all__ = ["COMMANDS"]

COMMANDS = {
    "run": run.COMMAND,
    "compose": compose.COMMAND,
    "answer": answer.COMMAND,
    "score": score.COMMAND,
    "filter": filter.FILTER,
    "refilter": filter.REFILTER,
    "merge": merge.COMMAND,
    "sheet": sheet.COMMAND,
}
