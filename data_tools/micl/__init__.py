"""Tasks that cannot be solved without looking at their demonstrations, after TrueMICL.

TrueMICL (arXiv 2507.15807) is not published in full; these are procedural tasks with the rules of
its seven, so that any number of items, an exact answer key and clean splits are there. Every task
has a hidden variable, the *latent*: which operator "?" stands for, which attribute is counted. An
*episode* is some demonstrations and a query that share the latent; a question alone never tells it.

    from data_tools.micl import TASKS, episodes

    for episode in episodes(TASKS["operator"], n_shots=4, n=100, seed=0):
        ...                       # episode.demos, episode.query: params, question, answer

* ``tasks.py`` - what a task is; one file per task beside it; ``drawing.py`` - what they share.
* ``episodes.py`` - demonstrations that identify the latent, and the baselines' versions of them.
* ``export.py`` - pictures and JSON lines; from these `benchmarks.micl` scores answers.
"""

from data_tools.micl.character import Character
from data_tools.micl.clock import Clock
from data_tools.micl.count import Count
from data_tools.micl.episodes import Episode, Shown, episodes
from data_tools.micl.operators import Operator
from data_tools.micl.outlier import Outlier
from data_tools.micl.palindrome import Palindrome
from data_tools.micl.sudoku import Sudoku
from data_tools.micl.tasks import Task

__all__ = [
    "TASKS",
    "Episode",
    "Shown",
    "Task",
    "episodes",
]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Operator(), Clock(), Outlier(), Count(), Sudoku(), Palindrome(), Character())
}
"""The seven tasks in the order of the paper's types."""
