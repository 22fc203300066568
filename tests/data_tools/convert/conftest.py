"""Pictures and files of preferences."""

import json

import pytest
from tiny import picture


@pytest.fixture
def folder(tmp_path):
    """A folder with the pictures 0.png ... 3.png."""
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def put(folder):
    """Writes rows beside the pictures: JSON lines, a JSON list, or any JSON value."""

    def write(rows, name="in.jsonl"):
        path = folder / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            path.write_text(json.dumps(rows), encoding="utf-8")
        return path

    return write
