"""The embedded model's card and document say what the committed files say."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmlm.model.checkpoint import embedded_folder

ROOT = Path(__file__).parents[2]
CARD = embedded_folder() / "README.md"
SCORES = ROOT / "docs" / "results" / "seed0.json"


@pytest.fixture(scope="module")
def card():
    return CARD.read_text()


def test_the_tables_are_those_of_the_stored_results():
    tables = [sys.executable, "tools/embedded_tables.py", "--check"]
    assert subprocess.run(tables, cwd=ROOT, check=False).returncode == 0


def test_the_card_names_its_configuration(card):
    config = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1]
    digest = re.search(r"SHA-256 of the configuration below: `([0-9a-f]{64})`", card)[1]
    assert hashlib.sha256(config.encode()).hexdigest() == digest
    command = re.search(r"Made by: `python -m training --config (\S+)`", card)[1]
    assert (ROOT / command).exists()


def test_the_configuration_on_the_card_is_the_shipped_one(card):
    """The file, read by the program, gives every value that the card shows."""
    import yaml

    from training.config import build_parser

    command = re.search(r"--config (\S+)`", card)[1]
    parser = build_parser()
    given = yaml.safe_load(parser.dump(parser.parse_args(["--config", str(ROOT / command)])))
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert shown["seed"] == given["seed"]
    assert _filled(shown["recipe"]) == _filled(given["recipe"])


def _filled(value):
    """Without empty entries, which one way of writing a configuration leaves out."""
    if isinstance(value, dict):
        return {k: _filled(v) for k, v in value.items() if v is not None}
    return value


def test_the_card_shows_the_stored_scores(card):
    for split, result in json.loads(SCORES.read_text())["splits"].items():
        value = 100 * result["metrics"]["chair_i"]["value"]
        assert re.search(rf"\| {split} \| [\d.]+ \| {value:.1f} \|", card)


def test_the_scores_were_measured_on_enough_pictures():
    for result in json.loads(SCORES.read_text())["splits"].values():
        assert result["counts"]["captions"] >= 300
        assert result["no_image"]["counts"]["captions"] >= 300
        for asked in result["pope"].values():
            assert sum(asked["counts"][name] for name in ("tp", "fp", "tn", "fn")) >= 590
