"""Pictures, sources, and scripted answers for the stages of MIA-DPO."""

import numpy as np
import pytest
from PIL import Image

from data_tools.mia.records import ANSWER, COMPOSE, SCORE, joined
from data_tools.mia.sources import Source
from data_tools.records import StageOutput
from data_tools.stages import run_stage
from mmlm.sharding import Shard


@pytest.fixture
def make_sources(tmp_path):
    """Questions about small random pictures of different sizes, on the disk."""

    def make(count, group="coco", folder="pictures"):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        made = []
        for number in range(count):
            path = place / f"{group}{number}.png"
            size = (96 + 8 * (number % 5), 88 + 16 * (number % 3))
            pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(path)
            made.append(
                Source(f"{group}{number}", path, f"What is {number}?", f"A {number}.", group)
            )
        return made

    return make


@pytest.fixture
def run_compose():
    """Plans and composes into OUT, of one shard or whole; returns the statuses."""
    from data_tools.mia.compose import Composer
    from data_tools.mia.planning import plan

    def run(root, sources, settings, shard=None):
        planned = plan(sources, settings)
        shard = shard or Shard()
        output = StageOutput(
            root / COMPOSE.name, {"seed": settings.seed}, COMPOSE.kinds, shard,
            total=len(planned.records),
        )  # fmt: skip
        return run_stage(Composer(root, planned, settings), planned.records, output)

    return run


class Scripted:
    """A stage whose lines a function makes; None makes no line and the status ``refused``."""

    def __init__(self, kind, make):
        self.kinds = (kind,)
        self._make = make

    def process(self, records):
        """One line per record."""
        from data_tools.records import Outcome

        for record in records:
            line = self._make(record)
            lines = {} if line is None else {self.kinds[0]: [{"id": record["id"], **line}]}
            yield Outcome(record["id"], "ok" if lines else "refused", lines)


@pytest.fixture
def run_scripted():
    """Answers and scores every instruction in OUT by two functions of the record."""

    def run(root, answer, score, shard=None):
        shard = shard or Shard()
        for step, make, before in (
            (ANSWER, answer, (COMPOSE,)),
            (SCORE, score, (COMPOSE, ANSWER)),
        ):
            output = StageOutput(root / step.name, {"scripted": True}, step.kinds, shard)
            run_stage(Scripted(step.kinds[0], make), joined(root, before, shard), output)

    return run
