"""The whole pipeline with scripted parts: one picture by hand, then what must hold for all runs."""

import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from data_tools.detectors.scripted import ScriptedDetector
from data_tools.done import read_kind
from data_tools.generators import GeneratorError, Sample
from data_tools.generators.scripted import ScriptedGenerator
from data_tools.merging import merge_shards
from data_tools.sentinel.pipeline import SentinelPipeline
from data_tools.sentinel.settings import SentinelSettings
from data_tools.sentinel.summary import summarise
from mmlm.sharding import Shard

FIRST = "A DOG sits."
SECOND = "Beside the DOG is a CUP."


@pytest.fixture
def by_hand(marked):
    """Picture 000 holds a dog and a cup, and is described in two steps."""

    def make(**settings):
        script = {
            ("000", ""): [FIRST, "A CAT sits.", FIRST, "It is nice."],
            ("000", FIRST): ["The DOG eats.", SECOND, "A CAT eats.", "The FOG is here."],
            ("000", f"{FIRST} The DOG eats."): ["", "", "", "The CUP."],
        }
        detectors = [
            ScriptedDetector(findings={"000": ["dog", "cup", "fog"]}, name="one"),
            ScriptedDetector(findings={"000": ["dog", "cup"]}, name="two"),
        ]
        options = {"n": 4, "coherence": "all", "max_sentences": 2, **settings}
        return SentinelPipeline(
            ScriptedGenerator(script), marked, detectors, SentinelSettings(**options)
        )

    return make


def only(outcomes):
    (outcome,) = outcomes
    (image,) = outcome.lines["images"]
    return outcome, outcome.lines.get("pairs", []), image


def test_a_picture_by_hand(by_hand, records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = by_hand(max_sentences=3)
    outcome, pairs, image = only(pipeline.process(records(1)))
    assert outcome.status == image["status"] == "ok"
    # With "all", the sentence about the cup explores and the one about the dog wins.
    assert image["caption"] == f"{FIRST} {SECOND}"
    assert image["n_sentences"] == 2
    (pair,) = pairs
    meta = pair.pop("meta")
    assert pair == {
        "id": "000-1-0",
        "images": ["000.png"],
        "image_id": "000",
        "question": "describe",
        "context": FIRST,
        "chosen": "The DOG eats.",
        "rejected": "A CAT eats.",
        "chosen_objects": ["dog"],
        "rejected_hallucinated": ["cat"],
        "context_objects": ["dog"],
        "step": 1,
        "chosen_final": False,
        "rejected_final": False,
        "is_final": False,
        "kind": "coherent",
    }
    assert meta["model"] == "scripted"
    assert meta["extractor"] == "marked"
    assert len(meta["detectors"]) == 2
    assert set(meta) == {
        "model", "model_rev", "processor_hash", "seed", "detectors", "thresholds", "extractor",
        "version",
    }  # fmt: skip


def test_the_audit_of_a_picture_by_hand(by_hand, records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, _, image = only(by_hand(max_sentences=3).process(records(1)))
    assert image["factual"] == ["cup", "dog"]
    assert image["uncertain"] == ["fog"]
    assert image["hallucinated"] == ["cat"]
    assert image["rejected_by"] == {"one": ["cat"], "two": ["cat", "fog"]}
    assert image["counts"] == {"dropped_pronoun": 1}
    first, second, third = image["steps"]
    assert first["candidates"] == [
        {"text": FIRST, "class": "agnostic", "objects": [["dog", 2, 5]], "drawn": 2},
        {"text": "A CAT sits.", "class": "hallucinated", "objects": [["cat", 2, 5]], "drawn": 1},
        {
            "text": "It is nice.", "class": "objectless", "objects": [], "drawn": 1,
            "pronoun": True,
        },
    ]  # fmt: skip
    assert (first["ended"], first["next"]) == (0, 0)
    assert [one["class"] for one in second["candidates"]] == [
        "coherent", "agnostic", "hallucinated", "uncertain",
    ]  # fmt: skip
    assert [one.get("chosen") for one in second["candidates"]] == [[0], None, None, None]
    assert [one.get("rejected") for one in second["candidates"]] == [None, None, [0], None]
    assert second["next"] == 1
    # The script knows nothing more: the model ends the caption.
    assert third == {"candidates": [], "ended": 4, "next": None}


def test_a_watched_picture_grows_and_ends_as_an_unwatched_one(
    by_hand, records, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (row,) = records(1)
    outcomes = list(by_hand(max_sentences=3).watch(row))
    images = [outcome.lines["images"][0] for outcome in outcomes]
    assert [len(image["steps"]) for image in images] == [1, 2, 3]
    assert [image["caption"] for image in images] == [FIRST, *[f"{FIRST} {SECOND}"] * 2]
    assert [len(outcome.lines["pairs"]) for outcome in outcomes] == [0, 1, 1]
    (whole,) = by_hand(max_sentences=3).process([row])
    assert (outcomes[-1].status, outcomes[-1].lines) == (whole.status, whole.lines)


def test_the_pairs_of_a_suspicious_picture_are_withheld_at_every_look(
    marked, records, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    script = {
        ("000", ""): ["A FOG sits.", "A CAT sits."],
        ("000", "A FOG sits."): ["The FOG eats.", "A CAT eats."],
    }
    # Fog is outside its vocabulary and counts as there; of what it knows it finds nothing.
    blind = ScriptedDetector(findings={}, vocabulary=frozenset({"cat"}))
    settings = SentinelSettings(n=2, max_sentences=3, out_of_vocabulary="accept")
    pipeline = SentinelPipeline(ScriptedGenerator(script), marked, [blind], settings)
    outcomes = list(pipeline.watch(records(1)[0]))
    assert {outcome.status for outcome in outcomes} == {"suspicious_image"}
    assert [outcome.lines["pairs"] for outcome in outcomes] == [[], [], []]
    counts = [outcome.lines["images"][0]["counts"] for outcome in outcomes]
    assert [one["withheld_pairs"] for one in counts[1:]] == [1, 1]


def test_a_watched_picture_is_forgotten_also_when_nobody_watches_on(
    by_hand, records, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    forgotten = []
    monkeypatch.setattr(
        ScriptedGenerator, "forget", lambda self, gone: forgotten.append([one.id for one in gone])
    )
    watching = by_hand().watch(records(1)[0])
    next(watching)
    assert forgotten == []
    watching.close()
    assert forgotten == [["000"]]


def test_a_watched_picture_that_cannot_be_read_is_told_once(by_hand, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (outcome,) = by_hand().watch({"id": "x", "image": "none.png", "question": "describe"})
    assert outcome.status == "unreadable_image"
    assert "none.png" in outcome.lines["images"][0]["error"]


def test_the_longest_caption(by_hand, records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = by_hand(max_sentences=1)
    _, pairs, image = only(pipeline.process(records(1)))
    assert (image["n_sentences"], len(image["steps"]), pairs) == (1, 1, [])


def test_every_request_has_a_seed_of_its_own(talking, records, tmp_path):
    pipeline = talking(folder=tmp_path)
    list(pipeline.process(records(6)))
    requests = [request for call in pipeline._generator.calls for request in call]
    seeds = {(r.picture.id, r.context, r.seed) for r in requests}
    assert len({seed for _, _, seed in seeds}) == len(requests)
    other = talking(folder=tmp_path, settings=SentinelSettings(seed=1))
    list(other.process(records(6)))
    assert {r.seed for c in other._generator.calls for r in c}.isdisjoint(s for _, _, s in seeds)


def test_a_complete_picture_makes_room_for_the_next(talking, records, tmp_path):
    pipeline = talking(folder=tmp_path, images_at_once=3)
    outcomes = list(pipeline.process(records(9)))
    sizes = [len(call) for call in pipeline._generator.calls]
    assert max(sizes) == 3
    assert sizes[: sizes.index(2) if 2 in sizes else None].count(3) >= 6  # full until the end
    assert sorted(pipeline._generator.forgotten) == sorted(o.id for o in outcomes)


def lines_of(outcomes):
    return {outcome.id: (outcome.status, outcome.lines) for outcome in outcomes}


def test_what_comes_out_for_a_picture_depends_on_nothing_else(talking, records, tmp_path):
    rows = records(12)
    alone = lines_of(itertools.chain(*(talking(folder=tmp_path).process([row]) for row in rows)))
    for size in (1, 5, 50):
        together = talking(folder=tmp_path, images_at_once=size).process(reversed(rows))
        assert lines_of(together) == alone
    assert sum(len(lines["pairs"]) for _, lines in alone.values()) > 10
    with pytest.raises(ValueError, match="images_at_once must be at least 1"):
        talking(images_at_once=0)


def test_pairs_are_what_the_audit_says(talking, records, tmp_path):
    """Every pair again, from the audit alone: a second, plain way to the same result."""
    for outcome in talking(folder=tmp_path).process(records(25)):
        (image,) = outcome.lines["images"]
        context, known, expected = [], set(), []
        for number, step in enumerate(image["steps"]):
            for one in step["candidates"]:
                names = {name for name, _, _ in one["objects"]}
                if names & set(image["hallucinated"]):
                    kind = "hallucinated"
                elif names & set(image["uncertain"]):
                    kind = "uncertain"
                elif names:
                    kind = "coherent" if names & known else "agnostic"
                else:
                    kind = "objectless"
                assert one["class"] == kind
            of = {
                kind: [one["text"] for one in step["candidates"] if one["class"] == kind]
                for kind in ("coherent", "hallucinated")
            }
            both = zip(of["coherent"], of["hallucinated"], strict=False)
            expected += [(number, " ".join(context), *pair) for pair in both]
            if step["next"] is not None:
                chosen = step["candidates"][step["next"]]
                assert chosen["class"] != "hallucinated"
                context.append(chosen["text"])
                known |= {name for name, _, _ in chosen["objects"]}
        made = outcome.lines["pairs"]
        assert [(p["step"], p["context"], p["chosen"], p["rejected"]) for p in made] == expected
        assert image["caption"] == " ".join(context)
        assert (outcome.status == "ok") == bool(expected)


def test_first_sentences_make_pairs_if_they_may(talking, records, tmp_path):
    settings = SentinelSettings(allow_empty_context_pairs=True, allow_agnostic_pairs=True)
    outcomes = talking(folder=tmp_path, settings=settings).process(records(10))
    pairs = [pair for outcome in outcomes for pair in outcome.lines["pairs"]]
    assert {pair["kind"] for pair in pairs} == {"coherent", "agnostic", "empty_context"}
    assert all((pair["kind"] == "empty_context") == (pair["context"] == "") for pair in pairs)


def test_a_sentence_that_ended_the_caption_is_marked(marked, records, tmp_path):
    script = {("000", ""): ["A DOG."] * 2, ("000", "A DOG."): ["One CAT.", Sample("The DOG", True)]}
    pipeline = SentinelPipeline(
        ScriptedGenerator(script),
        marked,
        [ScriptedDetector(findings={"000": ["dog"]})],
        SentinelSettings(n=2),
        folder=tmp_path,
    )
    _, (pair,), image = only(pipeline.process(records(1)))
    assert (pair["chosen_final"], pair["rejected_final"], pair["is_final"]) == (True, False, True)
    assert image["steps"][1]["candidates"][1]["finished"]


class Naming:
    """Says that "It" is the last word in capitals of the sentence before."""

    def resolve(self, context, sentence):
        names = re.findall(r"\b[A-Z]{2,}\b", context)
        return sentence.replace("It", f"The {names[-1]}") if names else sentence


def test_pronouns_that_are_resolved(marked, records, tmp_path):
    """The text stays as the model wrote it; its objects are those of the resolved one."""
    script = {
        ("000", ""): ["A DOG."] * 4,
        ("000", "A DOG."): ["It sits.", "It sees a CAT.", "A DOG.", "It is."],
    }
    findings = {"000": ["dog"]}
    pipeline = SentinelPipeline(
        ScriptedGenerator(script),
        marked,
        [ScriptedDetector(findings=findings)],
        SentinelSettings(n=4, max_sentences=2),
        coreference=Naming(),
        folder=tmp_path,
    )
    _, (pair,), image = only(pipeline.process(records(1)))
    assert (pair["chosen"], pair["rejected"]) == ("It sits.", "It sees a CAT.")
    assert pair["chosen_objects"] == ["dog"]
    assert image["counts"] == {}
    assert image["steps"][1]["candidates"][1]["objects"] == [["dog", 0, 0], ["cat", 10, 13]]


def test_counts_of_a_run(talking, records, run, tmp_path):
    statuses, output = run(talking(folder=tmp_path), records(15))
    summary = summarise(output.folder)
    assert summary.images == statuses
    pairs = output.lines("pairs")
    assert summary.pairs.total() == len(pairs) > 0
    steps = [pair["step"] for pair in pairs]
    assert summary.pairs_by_step == {step: steps.count(step) for step in set(steps)}
    candidates = [c for i in output.lines("images") for s in i["steps"] for c in s["candidates"]]
    assert summary.classes.total() == len(candidates)
    empty = sum(not one["objects"] for one in candidates)
    assert summary.objectless_share == empty / len(candidates) > 0
    assert summary.pairs_per_image == len(pairs) / 15
    assert summary.failed_share == 0


# Acceptance 6: resuming and dividing.


def sorted_lines(folder, kind):
    return sorted((folder / f"{kind}.jsonl").read_bytes().splitlines())


class Stopped(Exception):
    pass


def test_acceptance_6_stopped_after_any_picture(talking, records, run, tmp_path):
    rows = records(20)
    _, whole = run(talking(folder=tmp_path), rows)
    for stop in (1, 7, 19):
        pipeline = talking(folder=tmp_path)
        plain, folder = pipeline.process, tmp_path / f"stopped{stop}"

        def process(todo, plain=plain, stop=stop):
            yield from itertools.islice(plain(todo), stop)
            raise Stopped

        pipeline.process = process
        with pytest.raises(Stopped):
            run(pipeline, rows, folder=folder)
        assert len((folder / "done.jsonl").read_text().splitlines()) == stop
        run(talking(folder=tmp_path), rows, folder=folder)
        for kind in ("pairs", "images"):
            assert sorted_lines(folder, kind) == sorted_lines(whole.folder, kind)
    ids = [pair["id"] for pair in whole.lines("pairs")]
    assert len(ids) == len(set(ids)) > 0


def test_acceptance_6_one_shard_is_the_union_of_four(talking, records, run, tmp_path):
    rows = records(20)
    _, whole = run(talking(folder=tmp_path), rows)
    for index in (2, 0, 3, 1):
        run(talking(folder=tmp_path), rows, Shard(index, 4), tmp_path / "shards")
    merge_shards(tmp_path / "shards")
    for kind in ("pairs", "images"):
        assert sorted_lines(tmp_path / "shards", kind) == sorted_lines(whole.folder, kind)


def test_two_runs_with_one_seed_are_equal(talking, records, run, tmp_path):
    rows = records(10)
    _, one = run(talking(folder=tmp_path), rows)
    _, two = run(talking(folder=tmp_path), rows)
    _, other = run(talking(folder=tmp_path, settings=SentinelSettings(seed=1)), rows)
    for kind in ("pairs", "images"):
        assert one.path(kind).read_bytes() == two.path(kind).read_bytes()
        assert one.path(kind).read_bytes() != other.path(kind).read_bytes()


# Imports once, then runs the pipeline in forked processes, so that a kill costs no second import.
STARTER = """
import os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from conftest import Hashed, MarkedWords, talk
from data_tools.generators.scripted import ScriptedGenerator
from data_tools.records import StageOutput
from data_tools.sentinel.pipeline import SentinelPipeline
from data_tools.stages import run_stage
from mmlm.language.words import penn_tags

def slow(*request):
    time.sleep(0.0005)
    return talk(*request)

base = Path(sys.argv[1])
rows = [{"id": f"{n:03d}", "image": f"{n:03d}.png", "question": "describe"} for n in range(40)]
penn_tags(["it"])
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        pipeline = SentinelPipeline(
            ScriptedGenerator(slow), MarkedWords(), [Hashed(), Hashed(1)], folder=base
        )
        run_stage(pipeline, rows, StageOutput(Path(line.strip()), {"run": 1}, pipeline.kinds))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def starter(tmp_path):
    here = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path), str(here), str(here.parents[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=here.parents[2],
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait()


def test_killed_at_ten_random_moments(starter, records, tmp_path):
    """With a real SIGKILL; then resumed equals uninterrupted after sorting, nothing is twice."""
    records(40)

    def start(folder):
        print(folder, file=starter.stdin, flush=True)
        return int(starter.stdout.readline())

    def end():
        return int(starter.stdout.readline())

    started = time.monotonic()
    start(tmp_path / "whole")
    assert end() == 0
    takes = time.monotonic() - started
    chosen = random.Random()  # any moment must do, so it is another one every time
    killed = 0
    for _ in range(10):
        child = start(tmp_path / "killed")
        time.sleep(chosen.uniform(0, takes / 6))
        with contextlib.suppress(ProcessLookupError):  # it may have ended by then
            os.kill(child, signal.SIGKILL)
        killed += end() == -signal.SIGKILL
    assert killed >= 3
    start(tmp_path / "killed")
    assert end() == 0
    for kind in ("pairs", "images"):
        assert sorted_lines(tmp_path / "killed", kind) == sorted_lines(tmp_path / "whole", kind)
    ids = [pair["id"] for _, own in read_kind(tmp_path / "killed", "pairs") for pair in own]
    assert len(ids) == len(set(ids)) > 30


def test_acceptance_10_a_thousand_pictures(marked, fixed, records, tmp_path, record_property):
    """Five sentences each; memory does not grow with the number of pictures."""
    (row,) = records(1)
    rows = ({**row, "id": str(number)} for number in range(1000))
    lines = [f"Here a {word} and a {other}." for word in ("DOG", "CAT") for other in ("CUP", "CAR")]
    generator = ScriptedGenerator(lambda _id, _context, seed: [*lines, *lines, f"A DOG {seed}."])
    settings = SentinelSettings(max_sentences=5)
    pipeline = SentinelPipeline(generator, marked, [fixed, fixed], settings, folder=tmp_path)
    started, steps, pairs, levels = time.process_time(), 0, 0, {}
    tracemalloc.start()
    for number, outcome in enumerate(pipeline.process(rows)):
        steps += len(outcome.lines["images"][0]["steps"])
        pairs += len(outcome.lines["pairs"])
        for noted in (generator.calls, generator.forgotten, marked.read):
            noted.clear()
        if number in (300, 999):
            # What is read is remembered up to a bound; the rest must not stay.
            pipeline._reader._is_pronoun.cache_clear()
            levels[number] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    record_property("seconds", round(time.process_time() - started, 1))
    assert steps == 5000
    assert pairs == 4 * 2 * 1000  # all but the first sentence: two clean ones, three with a car
    assert levels[999] < levels[300] + 300_000


def test_generator_errors_concern_one_picture(marked, records, tmp_path):
    def script(identifier, context, seed):
        if identifier == "001" and context:
            return GeneratorError("no reply")
        return ["A DOG.", "The DOG.", "A CAT.", "Two DOG."]

    settings = SentinelSettings(n=4, max_sentences=3, allow_empty_context_pairs=True)
    findings = {f"00{n}": ["dog"] for n in range(3)}
    pipeline = SentinelPipeline(
        ScriptedGenerator(script),
        marked,
        [ScriptedDetector(findings=findings)],
        settings,
        folder=tmp_path,
    )
    outcomes = {outcome.id: outcome for outcome in pipeline.process(records(3))}
    assert [outcomes[f"00{n}"].status for n in range(3)] == ["ok", "model_error", "ok"]
    image = outcomes["001"].lines["images"][0]
    assert image["error"] == "no reply"
    assert image["n_sentences"] == 1
    assert len(outcomes["001"].lines["pairs"]) == 1  # made before the error
