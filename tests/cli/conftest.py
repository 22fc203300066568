"""Fixtures of the command line's tests: a tiny model on disk, pictures, a file of questions."""

import json

import pytest
from tiny import build, picture


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder that `--model` takes: a tiny random LLaVA with its processor."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model, processor = build("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def write_questions(tmp_path):
    """Writes questions (dictionaries) to a JSON lines file with pictures 0.png ... 3.png beside."""
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")

    def write(questions, name="in.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(question) + "\n" for question in questions))
        return path

    return write


@pytest.fixture
def questions():
    """Nine questions on four pictures, with prompts of different lengths."""
    return [
        {"id": f"q{n}", "image": f"{n % 4}.png", "prompt": "what is this ? " * (1 + n % 3)}
        for n in range(9)
    ]


@pytest.fixture(autouse=True)
def _nothing_was_fetched(tmp_path, monkeypatch):
    """Official files that someone has downloaded on this machine play no part."""
    monkeypatch.setenv("MMLM_DATA_DIR", str(tmp_path / "no-official-files"))
