"""Pictures, a reader of marked objects, and a short way to run the pipeline."""

import random
import re
import zlib
from dataclasses import dataclass

import pytest
from tiny import picture

from data_tools.detectors import Detector, Finding
from data_tools.generators.scripted import ScriptedGenerator
from data_tools.pictures import Picture
from data_tools.records import StageOutput
from data_tools.sentinel.objects import ObjectExtractor, ObjectMention
from data_tools.sentinel.pipeline import SentinelPipeline
from data_tools.stages import run_stage


class MarkedWords(ObjectExtractor):
    """Every word in CAPITALS is an object; its dictionary form is the word in lower case."""

    def __init__(self):
        self.read = []

    @property
    def facts(self):
        return {"name": "marked"}

    def extract(self, sentences):
        self.read += sentences
        return [
            [
                ObjectMention(m[0], m[0].lower(), m[0].lower(), m.start(), m.end())
                for m in re.finditer(r"\b[A-Z]{2,}\b", sentence)
            ]
            for sentence in sentences
        ]


@pytest.fixture
def marked():
    return MarkedWords()


@pytest.fixture
def some_picture(tmp_path):
    path = tmp_path / "one.png"
    picture().save(path)
    return Picture.read("one", path)


@pytest.fixture
def records(tmp_path):
    """Makes records of so many pictures, a.png, b.png ... in the temporary folder."""

    def make(count):
        names = [f"{n:03d}" for n in range(count)]
        for name in names:
            if not (tmp_path / f"{name}.png").exists():
                picture(int(name), (8, 8)).save(tmp_path / f"{name}.png")
        return [{"id": n, "image": f"{n}.png", "question": "describe"} for n in names]

    return make


@pytest.fixture
def run(tmp_path):
    """Runs a stage into a new folder and returns the statuses and the open-able output."""
    count = iter(range(100))

    def run(pipeline, rows, shard=None, folder=None):
        folder = folder or tmp_path / f"out{next(count)}"
        more = {} if shard is None else {"shard": shard}
        output = StageOutput(folder, {"run": 1}, pipeline.kinds, total=len(rows), **more)
        statuses = run_stage(pipeline, rows, output)
        return statuses, output

    return run


@dataclass(frozen=True)
class Hashed(Detector):
    """Accepts about two thirds of all names, decided by picture and name."""

    salt: int = 0

    @property
    def facts(self):
        return {"salt": self.salt}

    def detect(self, picture, names):
        return {
            name: Finding(zlib.crc32(f"{self.salt} {picture.id} {name}".encode()) % 3 > 0)
            for name in names
        }


@dataclass(frozen=True)
class Fixed(Detector):
    """Accepts the same names in every picture."""

    present: tuple = ("dog", "cup")

    @property
    def facts(self):
        return {"present": self.present}

    def detect(self, picture, names):
        return {name: Finding(name in self.present) for name in names}


WORDS = "DOG CAT BALL TREE LAMP CUP FORK CAR".split()


def talk(identifier, context, seed):
    """Ten sentences with up to two objects; some captions end after a few sentences."""
    rng = random.Random(seed)
    if context.count(".") >= 2 + rng.randrange(6):
        return [""] * 10
    samples = []
    for _ in range(10):
        words = rng.sample(WORDS, rng.randrange(3))
        samples.append(f"Look: {' and '.join(words) or 'nothing'}." if rng.random() < 0.95 else "")
    return samples


@pytest.fixture
def talking():
    """A pipeline whose generator says something else for every seed."""

    def make(**options):
        settings = options.pop("settings", None)
        return SentinelPipeline(
            ScriptedGenerator(talk), MarkedWords(), [Hashed(), Hashed(1)], settings, **options
        )

    return make


@pytest.fixture
def fixed():
    """A detector that accepts the same names in every picture."""
    return Fixed()
