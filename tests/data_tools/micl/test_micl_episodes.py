"""Episodes: identifiable, ambiguous, reproducible; baselines; lines and pictures on the disk."""

import json

import numpy as np
import pytest
from PIL import Image

from data_tools.merging import merge_shards
from data_tools.micl import TASKS, episodes
from data_tools.micl.episodes import CONDITIONS, episode
from data_tools.micl.export import EpisodeStage, pixels, prompt, records
from data_tools.micl.settings import MiclSettings
from data_tools.records import StageOutput
from data_tools.stages import run_stage
from mmlm.errors import InputError
from mmlm.sharding import Shard

SHOTS = 4


def other_latents(task, latent):
    """All latents of an episode; of faces, the names the other way round."""
    if task.name != "character":
        return set(task.latents(np.random.default_rng(0)))
    (one, first), (two, second) = json.loads(latent).items()
    return {json.dumps({one: second, two: first})}


@pytest.mark.parametrize("name", TASKS)
def test_demonstrations_leave_one_latent_and_the_query_alone_does_not(name):
    task = TASKS[name]
    for one in episodes(task, SHOTS, 25, seed=3):
        latents = {one.latent} | other_latents(task, one.latent)
        fitting = [
            latent
            for latent in latents
            if all(task.answer(demo.params, latent) == demo.answer for demo in one.demos)
        ]
        assert fitting == [one.latent]
        assert bool(one.others) == task.has_latent
        assert one.query.answer not in one.others
        assert one.query.params not in [demo.params for demo in one.demos]
        assert len({json.dumps(demo.params) for demo in one.demos}) == SHOTS


def test_an_episode_depends_on_seed_and_number_only():
    task = TASKS["count"]
    few, many = list(episodes(task, 4, 3, seed=1)), list(episodes(task, 4, 9, seed=1))
    assert few == many[:3]
    assert episode(task, 4, 1, 2) == few[2]
    assert few[0] != next(episodes(task, 4, 1, seed=2))
    assert few[0] != next(episodes(task, 4, 1, seed=1, split="support"))


def test_queries_are_the_same_under_every_condition_and_number_of_shots():
    task = TASKS["operator"]
    base = episode(task, 4, 0, 5)
    assert {base.under(condition).query.params["a"] for condition in CONDITIONS} == {
        base.query.params["a"]
    }
    assert episode(task, 0, 0, 5).query == base.query
    assert episode(task, 0, 0, 5).demos == ()


def test_training_episodes_do_not_show_their_query():
    # 40 support pairs, and query and demonstrations are all drawn from them.
    for one in episodes(TASKS["operator"], 8, 40, seed=0, split="support"):
        assert one.query.params not in [demo.params for demo in one.demos]


def test_conditions():
    base = episode(TASKS["clock"], 4, 0, 1)
    assert base.under("full") == base
    assert base.under("zero_shot").demos == ()
    assert [demo.params for demo in base.under("no_images").demos] == [None] * 4
    assert [d.answer for d in base.under("no_images").demos] == [d.answer for d in base.demos]
    for condition in ("shuffled_labels", "shuffled_images"):
        shuffled = base.under(condition)
        right = [
            TASKS["clock"].answer(demo.params, base.latent) == demo.answer
            for demo in shuffled.demos
        ]
        assert not any(right)
        assert sorted(d.answer for d in shuffled.demos) == sorted(d.answer for d in base.demos)
    with pytest.raises(ValueError, match="condition must be one of full"):
        base.under("upside_down")


def test_rices_takes_what_resembles_the_query_most_and_puts_the_nearest_last():
    task = TASKS["palindrome"]

    def embed(picture):
        return np.asarray(picture.convert("L").resize((40, 12)), dtype=float) - 255

    one = episode(task, 4, 0, 0, nearest=embed)
    wanted = embed(task.draw(one.query.params)).ravel()
    close = [
        float(np.dot(wanted, v) / np.linalg.norm(v) / np.linalg.norm(wanted))
        for v in (embed(task.draw(demo.params)).ravel() for demo in one.demos)
    ]
    assert close == sorted(close)
    others = [embed(task.draw(d.params)).ravel() for d in episode(task, 4, 0, 0).demos]
    far = [float(np.dot(wanted, v) / np.linalg.norm(v) / np.linalg.norm(wanted)) for v in others]
    assert np.mean(close) > np.mean(far)


def test_too_few_demonstrations_are_refused():
    with pytest.raises(ValueError, match="1 demonstrations cannot tell the 2 latents"):
        episode(TASKS["character"], 1, 0, 0)
    with pytest.raises(ValueError, match="fewer than 50 different demonstrations"):
        episode(TASKS["operator"], 50, 0, 0)
    with pytest.raises(ValueError, match="n_shots must be >= 0"):
        next(episodes(TASKS["operator"], -1, 1, 0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ("chess",)}, "tasks must be among operator, .* got 'chess'"),
        ({"tasks": ()}, "tasks must be among .* got none"),
        ({"tasks": ("clock", "clock")}, "tasks must differ"),
        ({"n": 0}, "n must be from 1"),
        ({"shots": 33}, "shots must be from 0 to 32"),
        ({"seed": -1}, "seed must be from 0"),
        ({"split": "test"}, "split must be one of support, query"),
        ({"condition": "none"}, "condition must be one of full"),
        ({"demos": "far"}, "demos must be one of random, nearest"),
        ({"shots": 1}, "at least 2 for character"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        MiclSettings(**values)


def test_the_prompt_marks_every_picture_and_ends_where_the_answer_begins():
    one = episode(TASKS["operator"], 2, 0, 0)
    first, second = (demo.answer for demo in one.demos)
    question = "Question: What is the result of this image?\nAnswer:"
    assert prompt(one.task, one.demos) == (
        f"<image 1>\n{question} {first}\n\n<image 2>\n{question} {second}\n\n<image 3>\n{question}"
    )
    assert prompt(one.task, one.under("no_images").demos) == (
        f"{question} {first}\n\n{question} {second}\n\n<image 1>\n{question}"
    )


WHOLE = Shard()


def write(folder, shard=WHOLE, **values):
    settings = MiclSettings(**{"tasks": ("operator", "character"), "n": 6, **values})
    stage = EpisodeStage(settings, folder)
    made = records(settings)
    output = StageOutput(folder, {"n": 6}, stage.kinds, shard, total=len(made))
    run_stage(stage, made, output)
    return output


def test_lines_hold_what_generating_and_scoring_need(tmp_path):
    lines = write(tmp_path).lines("episodes")
    assert [line["id"] for line in lines] == [
        f"{task}-{number:05d}" for task in ("operator", "character") for number in range(6)
    ]
    for line in lines:
        assert len(line["images"]) == SHOTS + 1
        assert line["prompt"].count("<image ") == SHOTS + 1
        task = TASKS[line["task"]]
        for name, params in zip(line["images"], line["params"], strict=True):
            assert Image.open(tmp_path / name).tobytes() == task.draw(params).tobytes()
        assert task.answer(line["params"][-1], line["latent"]) == line["answer"]


def test_shards_together_are_the_whole(tmp_path):
    whole = write(tmp_path / "whole").path("episodes").read_text()
    for index in range(3):
        write(tmp_path / "parts", Shard(index, 3))
    merge_shards(tmp_path / "parts")
    parts = (tmp_path / "parts" / "episodes.jsonl").read_text()
    assert sorted(parts.splitlines()) == sorted(whole.splitlines())
    names = [
        sorted(path.name for path in (tmp_path / folder / "pictures").glob("*.png"))
        for folder in ("whole", "parts")
    ]
    assert names[0] == names[1]


def test_nearest_demonstrations_on_the_disk(tmp_path):
    lines = write(tmp_path, demos="nearest", shots=3).lines("episodes")
    assert all(len(line["demo_answers"]) == 3 for line in lines)
    assert pixels(TASKS["clock"].draw({"p": 1, "q": 2})).shape == (16, 16, 3)


def test_another_run_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(InputError, match="belongs to another run: n was 6, now 7"):
        StageOutput(tmp_path, {"n": 7}, ("episodes",))
