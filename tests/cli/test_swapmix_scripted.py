"""SwapMix on the embedded world with answers whose cause is known, painted but without a model."""

import pytest

from benchmarks import swapmix
from data_tools.world import THEMES, theme_classes
from mmlm.cli.bench.swapped_pictures import painted_questions


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    asked = painted_questions(
        tmp_path_factory.mktemp("swaps"),
        "natural",
        0,
        30,
        types=("existence",),
        kinds=("object", "noise", "clutter"),
        swaps=3,
    )
    return swapmix.task(asked, "world").items


def test_every_noise_is_another_one(items):
    """So is every clutter, where there is any."""
    for swap in ("noise", "clutter"):
        group = [item for item in items if item.facts["swap"] in ("original", swap)][:4]
        assert [item.facts["swap"] for item in group] == ["original", *[swap] * 3]
        shown = {item.request.images[0].read_bytes() for item in group}
        assert len(shown) == 4


def scores(items, answer):
    lines = [
        {
            "id": item.request.id,
            **item.facts,
            "text": "yes" if answer(subject(item.facts), item.facts["objects"]) else "no",
        }
        for item in items
    ]
    return swapmix.score_stored(lines)


def subject(facts):
    words = facts["question"].removesuffix(" in the image ?").removeprefix("is there ").split()
    return " ".join(words[1:])


def theme_of_the_majority(objects):
    """The theme to which most of the objects belong; of several the first."""
    return max(THEMES, key=lambda theme: len(theme_classes(theme.name) & set(objects))).name


def test_probes_acceptance_13_who_looks_at_the_object_alone_does_not_lean_on_context(items):
    found = scores(items, lambda name, objects: name in objects)
    assert found.metrics["accuracy"] == 1
    assert found.metrics["context_reliance"] == 0
    assert found.metrics["noise_reliance"] == found.metrics["clutter_reliance"] == 0
    assert found.metrics["effective_accuracy"] == 1


def test_probes_acceptance_13_who_answers_from_the_theme_leans_on_context(items):
    def guess(name, objects):
        return name in theme_classes(theme_of_the_majority(objects))

    found = scores(items, guess)
    assert 0 < found.metrics["accuracy"] < 1
    assert found.metrics["context_reliance"] > 0
    assert found.metrics["noise_reliance"] == found.metrics["clutter_reliance"] == 0
    assert found.metrics["excess"] == found.metrics["context_reliance"]
    # Companions that fit the scene keep the guess up; strangers take it down.
    assert found.metrics["far_flip_rate"] > found.metrics["near_flip_rate"]
