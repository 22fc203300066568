"""The report of a SENTINEL run: numbers by hand, examples, what is shown and how it is escaped."""

import json

import pytest

from data_tools.records import Outcome, StageOutput
from data_tools.sentinel.report import GENERATOR, examples, write_report
from data_tools.sentinel.summary import summarise
from data_tools.sentinel.truth import judge_pairs
from data_tools.world.export import write_split
from mmlm.errors import InputError


def candidate(text, kind, objects=(), **more):
    return {"text": text, "class": kind, "objects": list(objects), "drawn": 1, **more}


def image(number, status="ok", **more):
    line = {
        "image_id": f"{number:06d}",
        "path": f"world/images/{number:06d}.png",
        "question": "what is here ?",
        "status": status,
        "caption": "one .",
        "n_sentences": 1,
        "factual": ["dog"],
        "uncertain": ["cup"],
        "hallucinated": ["cat"],
        "rejected_by": {"A": ["cat", "cup"], "B": ["cat"]},
        "boxes": {"dog": {"A": [[10, 20, 40, 60, 0.9]], "B": [[10.2, 20.1, 40, 60, 0.8]]}},
        "counts": {"dropped_equal": 2},
        "steps": [
            {
                "candidates": [candidate("a dog .", "agnostic", [["dog", 2, 5]])],
                "ended": 1,
                "next": 0,
            },
            {
                "candidates": [
                    candidate("the dog <b> .", "coherent", [["dog", 4, 7]], chosen=[0]),
                    candidate("a cat .", "hallucinated", [["cat", 2, 5]], rejected=[0], drawn=3),
                    candidate("a cup .", "uncertain", [["cup", 2, 5]]),
                ],
                "ended": 0,
                "next": 0,
            },
        ],
    }
    return line | more


def pair(number, chosen="the dog <b> .", rejected="a cat .", hallucinated=("cat",)):
    return {
        "id": f"{number:06d}-1-0",
        "images": [f"world/images/{number:06d}.png"],
        "image_id": f"{number:06d}",
        "question": "what is here ?",
        "context": "a dog .",
        "chosen": chosen,
        "rejected": rejected,
        "chosen_objects": ["dog"],
        "rejected_hallucinated": list(hallucinated),
        "context_objects": ["dog"],
        "step": 1,
        "is_final": False,
        "kind": "coherent",
        "meta": {},
    }


def store(folder, outcomes):
    with StageOutput(folder, {"command": "data sentinel", "x": "<&>"}, ("pairs", "images")) as out:
        out.write(outcomes)


def outcome(number, pairs=(), **more):
    line = image(number, **more)
    return Outcome(line["image_id"], line["status"], {"pairs": list(pairs), "images": [line]})


@pytest.fixture
def run(tmp_path):
    """Two pictures of a world, one of them with a pair."""
    write_split(tmp_path / "world", "natural", 3, 0, progress=False)
    store(tmp_path, [outcome(1, [pair(1)]), outcome(2, status="no_pairs")])
    return tmp_path


def test_numbers_by_hand(run):
    summary = summarise(run)
    assert dict(summary.images) == {"ok": 1, "no_pairs": 1}
    assert dict(summary.pairs) == {"coherent": 1}
    assert dict(summary.pairs_by_step) == {1: 1}
    assert dict(summary.classes) == {
        "agnostic": 2,
        "coherent": 2,
        "hallucinated": 2,
        "uncertain": 2,
    }
    assert dict(summary.labels) == {"factual": 2, "uncertain": 2, "hallucinated": 2}
    assert dict(summary.invented) == {"cat": 2}
    assert dict(summary.rejected_by) == {"A": 4, "B": 2}
    assert dict(summary.counts) == {"dropped_equal": 4}
    # 1 + 3 + 1 + 1 sentences and one empty sample in each picture.
    assert summary.drawn == 14
    assert json.loads(json.dumps(summary.as_json()))["invented"] == {"cat": 2}


def test_the_page_shows_picture_boxes_and_marked_sentences(run):
    text = write_report(run).read_text()
    assert GENERATOR in text[:600]
    assert "1 preference pairs from 2 pictures" in text
    assert text.count('<article class="card example">') == 1
    # Two detectors drew nearly the same box: it is drawn once.
    assert text.count("<rect ") == 1
    assert '<rect class="factual" x="10.0"' in text
    assert 'viewBox="0 0 80 80"' in text
    assert 'the <mark class="good" title="dog">dog</mark> &lt;b&gt;.' in text
    assert 'a <mark class="bad" title="cat">cat</mark>.' in text
    assert "&lt;&amp;&gt;" in text  # the run record
    assert "<b>" not in text.replace("<b style", "")
    assert "http" not in text.replace("http://www.w3.org", "")


def test_it_is_written_again_but_never_over_somebody_elses(run):
    first = write_report(run).read_text()
    assert write_report(run).read_text() == first
    (run / "report.html").write_text("<html>mine</html>")
    with pytest.raises(InputError, match="was not written by `mmlm data sentinel`"):
        write_report(run)


def test_examples_are_the_same_whatever_the_order_of_the_lines(tmp_path):
    numbers = list(range(30))
    store(tmp_path / "a", [outcome(n, [pair(n)]) for n in numbers])
    store(tmp_path / "b", [outcome(n, [pair(n)]) for n in reversed(numbers)])
    ids = [{line["image_id"] for line, _ in examples(tmp_path / d, 5)} for d in "ab"]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 5
    assert ids[0] != {f"{n:06d}" for n in range(5)}  # not the first ones: they may be all alike


def test_a_picture_that_was_moved_away_is_named(run):
    (run / "world" / "images" / "000001.png").unlink()
    assert "000001.png" in write_report(run).read_text()


def test_without_pairs_there_is_a_page_all_the_same(tmp_path):
    store(tmp_path, [outcome(0, status="no_objects", steps=[], counts={})])
    text = write_report(tmp_path).read_text()
    assert "0 preference pairs" in text
    assert "Examples" not in text
    assert "Against the truth" not in text


def test_pairs_against_the_truth_by_hand(tmp_path):
    write_split(tmp_path / "world", "natural", 3, 0, progress=False)
    data = json.loads((tmp_path / "world" / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in data["categories"]}
    first = data["images"][0]["id"]
    there = [names[a["category_id"]] for a in data["annotations"] if a["image_id"] == first]
    absent = [name for name in names.values() if name not in there and " " not in name]
    seen, gone, other = there[0], absent[0], absent[1]
    pairs = [
        pair(1, f"a {seen} .", f"a {gone} .", [gone]),
        pair(1, f"a {seen} and a {gone} .", f"a {other} .", [other]),  # the chosen one is wrong
        pair(1, f"a {seen} .", f"a {seen} again .", [seen]),  # the rejected one is right
    ]
    for number, one in enumerate(pairs):
        one["id"] = str(number)
    store(tmp_path, [outcome(1, pairs)])
    found = judge_pairs(tmp_path)
    assert (found.pairs, found.rejected_right, found.chosen_right) == (3, 2, 2)
    assert (found.named_right, found.named) == (2, 3)
    assert found.wrong == ("1", "2")
    assert found.as_json()["chosen_precision"] == pytest.approx(2 / 3)
    assert "2 of 3" in write_report(tmp_path).read_text()


def test_pictures_of_no_world_have_no_judgement(tmp_path):
    store(tmp_path, [outcome(0, [pair(0)])])
    assert judge_pairs(tmp_path) is None


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="holds no finished records"):
        write_report(tmp_path)


def test_a_picture_that_its_world_does_not_have(tmp_path):
    write_split(tmp_path / "world", "natural", 3, 0, progress=False)
    store(tmp_path, [outcome(7, [pair(7)])])
    with pytest.raises(InputError, match=r"000007\.png.* is not in its truth"):
        judge_pairs(tmp_path)
