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
from mmlm.cli import main
from mmlm.cli.data.on_ray import RayOptions, run_actors
from mmlm.cli.frame import Terminal
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


def test_numbers_of_actors_are_checked(tmp_path):
    options = RayOptions(actors=2, batch_size=0)
    with pytest.raises(InputError, match="must be at least 1"):
        run_actors(make_stage, RECORDS, start(tmp_path), options, Terminal())


def make_nothing():
    raise InputError("There is no model here.", advice="Copy it to the worker.")


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_a_worker_cannot_make_is_said_before_any_work(tmp_path, cluster):
    with pytest.raises(InputError, match="There is no model here") as error:
        run_actors(make_nothing, RECORDS, start(tmp_path / "o"), RayOptions(2, 0), Terminal())
    assert error.value.advice == "Copy it to the worker."
    assert not (tmp_path / "o").exists()


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_acceptance_6_sentinel_in_actors_equals_the_plain_run(tmp_path, cluster):
    """The command on the embedded model, and gone on with in one process."""
    options = ["data", "sentinel", "--config", "data/world_sentinel", "--world.count", "4"]
    options += ["--settings.max_sentences", "2", "--quiet", "--output"]
    assert main([*options, str(tmp_path / "plain")]) == 0
    actors = ["--ray.actors", "2", "--ray.gpus", "0", "--ray.batch_size", "2"]
    assert main([*options, str(tmp_path / "ray"), *actors]) == 0
    assert main([*options, str(tmp_path / "ray")]) == 0
    for kind in ("pairs.jsonl", "images.jsonl"):
        assert contents(tmp_path / "ray")[kind] == contents(tmp_path / "plain")[kind]
    runs = [(tmp_path / name / "run.json").read_bytes() for name in ("plain", "ray")]
    assert runs[0] == runs[1]
