"""Actors give what one process gives, and go on where a run was stopped."""

import functools
import importlib.util
import json
import os
import sys
import warnings

import pytest

from data_tools.ray_stage import check_ray, run_on_ray
from data_tools.records import Outcome, StageOutput
from data_tools.stages import run_stage
from mmlm.errors import InputError

RECORDS = [{"id": f"r{n}", "value": n, "tags": []} for n in range(23)]
ABSENT = importlib.util.find_spec("ray") is None
needs_ray = pytest.mark.skipif(ABSENT, reason="needs Ray: pip install 'mmlm[ray]'")


def make_stage():
    """What an actor calls."""

    class Squares:
        kinds = ("squares", "audit")

        def process(self, records):
            for record in records:
                value = record["value"]
                lines = {"audit": [{"id": record["id"], "tags": record["tags"], "x": None}]}
                if value % 3:
                    lines["squares"] = [{"id": record["id"], "square": value**2, "é": 1.5}] * 2
                yield Outcome(record["id"], "ok" if value % 3 else "none", lines, 0.5)

    return Squares()


@pytest.fixture(scope="module")
def cluster():
    import ray
    from ray import cloudpickle

    # A test module cannot be imported by a worker; a stage of the package can.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
        yield
        ray.shutdown()


def start(folder):
    return StageOutput(folder, {"seed": 0}, make_stage().kinds, total=len(RECORDS))


def contents(folder):
    return {
        path.name: sorted(path.read_bytes().splitlines()) for path in sorted(folder.glob("*.jsonl"))
    }


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_acceptance_6_two_actors_equal_the_plain_run(tmp_path, cluster):
    plain = run_stage(make_stage(), RECORDS, start(tmp_path / "plain"))
    found = run_on_ray(make_stage, RECORDS, start(tmp_path / "ray"), actors=2, batch_size=4)
    assert found == plain == {"ok": 15, "none": 8}
    assert contents(tmp_path / "ray") == contents(tmp_path / "plain")


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_stopped_run_goes_on_with_actors(tmp_path, cluster):
    folder = tmp_path / "out"
    with start(folder) as output:
        output.write(list(make_stage().process(RECORDS[:9])))
    before = (folder / "done.jsonl").read_bytes()
    assert run_on_ray(make_stage, RECORDS, start(folder), actors=2).total() == 23
    assert (folder / "done.jsonl").read_bytes().startswith(before)
    run_stage(make_stage(), RECORDS, start(tmp_path / "plain"))
    assert contents(folder) == contents(tmp_path / "plain")
    assert run_on_ray(make_stage, RECORDS, start(folder), actors=2) == {"ok": 15, "none": 8}


@pytest.mark.parametrize("wrong", [{"actors": 0}, {"actors": 1, "batch_size": 0}])
def test_numbers_are_checked(tmp_path, wrong):
    with pytest.raises(ValueError, match="at least 1"):
        run_on_ray(make_stage, RECORDS, start(tmp_path), **wrong)


def test_without_ray_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="Ray is not installed") as error:
        check_ray()
    assert error.value.advice == "pip install 'mmlm[ray]'"
    with pytest.raises(InputError, match="Ray is not installed"):
        run_on_ray(make_stage, RECORDS, start(tmp_path / "out"), actors=1)
    assert not (tmp_path / "out").exists()


def test_what_travels_is_not_changed():
    """Not even what Arrow would unify: empty lists, missing fields, None."""
    from data_tools.ray_stage import _Worker

    batch = {"record": [json.dumps(record) for record in RECORDS[:4]]}
    sent = [json.loads(text) for text in _Worker(make_stage)(batch)["outcome"]]
    expected = list(make_stage().process(RECORDS[:4]))
    assert [Outcome(*one) for one in sent] == expected


def make_mortal(marker):
    """A stage whose process dies once, in the middle of a batch."""

    class Mortal(type(make_stage())):
        def process(self, records):
            for number, outcome in enumerate(super().process(records)):
                if number == 1 and not marker.exists():
                    marker.touch()
                    os._exit(1)
                yield outcome

    return Mortal()


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_batch_of_a_worker_that_died_goes_to_another(tmp_path, cluster):
    make = functools.partial(make_mortal, tmp_path / "died")
    found = run_on_ray(make, RECORDS, start(tmp_path / "ray"), actors=2, batch_size=4)
    assert (tmp_path / "died").exists()
    assert found == {"ok": 15, "none": 8}
    run_stage(make_stage(), RECORDS, start(tmp_path / "plain"))
    assert contents(tmp_path / "ray") == contents(tmp_path / "plain")


def make_sentinel(folder):
    """SENTINEL on the embedded model, as an actor makes it for itself."""
    import mmlm
    from data_tools.detectors import parse_detector
    from data_tools.generators.huggingface import HFGenerator
    from data_tools.sentinel.objects.make import make_extractor
    from data_tools.sentinel.pipeline import SentinelPipeline
    from data_tools.sentinel.settings import SentinelSettings

    detector = parse_detector("WorldTruth()")
    detector.load()
    generator = HFGenerator(*mmlm.load("embedded"), max_new_tokens=64)
    settings = SentinelSettings(max_sentences=2)
    return SentinelPipeline(generator, make_extractor("rules"), [detector], settings, folder=folder)


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_acceptance_6_sentinel_in_actors_equals_the_plain_run(tmp_path, cluster):
    from data_tools.sentinel.inputs import export_world, world_records

    export_world(tmp_path / "world", "natural", 4, 60)
    records = world_records("world", 4, 0)

    def output(name):
        return StageOutput(tmp_path / name, {}, ("pairs", "images"), total=4)

    run_stage(make_sentinel(tmp_path), records, output("plain"))
    make = functools.partial(make_sentinel, tmp_path)
    assert run_on_ray(make, records, output("ray"), actors=2, batch_size=2).total() == 4
    for kind in ("pairs.jsonl", "images.jsonl"):
        assert contents(tmp_path / "ray")[kind] == contents(tmp_path / "plain")[kind]
