"""Episodes: demonstrations that identify the latent, a query that needs it, and the baselines.

Two rules make an episode a test of learning from the pictures. *Identifiable*: for every other
latent at least one demonstration has another answer, so that the demonstrations leave one latent.
*Ambiguous*: under at least one other latent the query has another answer, so that the query alone
does not tell it (not for tasks with a single rule).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from PIL import Image

from data_tools.micl.tasks import Latent, Params, Split, Task

__all__ = ["CONDITIONS", "Condition", "Embedding", "Episode", "Shown", "episode", "episodes"]

Condition = Literal["full", "zero_shot", "no_images", "shuffled_labels", "shuffled_images"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
"""What is left of the demonstrations: all; none; their words; their parts, wrongly paired."""

Embedding = Callable[[Image.Image], np.ndarray]
"""A picture as a vector, for demonstrations that resemble the query (RICES)."""

TRIES = 3000  # sets of demonstrations that are drawn before an episode is given up
POOL = 64  # items among which the most similar are looked for


@dataclass(frozen=True)
class Shown:
    """A question about a picture with its answer.

    Attributes:
        params: What is in the picture; None if no picture is shown.
        answer: The answer.
    """

    params: Params | None
    answer: str


@dataclass(frozen=True)
class Episode:
    """Demonstrations and a query.

    Attributes:
        id: Tells task, split, seed and number.
        task: The task.
        latent: What the demonstrations and the query share.
        demos: The demonstrations in order.
        query: What is asked, with the right answer.
        others: The answers that the query has under other latents, sorted.
    """

    id: str
    task: Task
    latent: Latent
    demos: tuple[Shown, ...]
    query: Shown
    others: tuple[str, ...]

    def under(self, condition: Condition) -> Episode:
        """The same query with what a baseline leaves of the demonstrations.

        Answers and pictures are shuffled by turning them on by one among *different* answers, so
        that as many demonstrations as possible become wrong and the result is always the same.

        Raises:
            ValueError: For an unknown condition.
        """
        if condition not in CONDITIONS:
            raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, got {condition!r}")
        if condition == "full":
            return self
        if condition == "zero_shot":
            return replace(self, demos=())
        if condition == "no_images":
            return replace(self, demos=tuple(replace(one, params=None) for one in self.demos))
        order = sorted(range(len(self.demos)), key=lambda place: self.demos[place].answer)
        # Half way round a sorted list, equal answers meet only if they are the majority.
        shift = max(1, len(order) // 2)
        partner = {place: order[(at + shift) % len(order)] for at, place in enumerate(order)}
        demos = [
            replace(one, answer=self.demos[partner[place]].answer)
            if condition == "shuffled_labels"
            else replace(one, params=self.demos[partner[place]].params)
            for place, one in enumerate(self.demos)
        ]
        return replace(self, demos=tuple(demos))


def episodes(
    task: Task,
    n_shots: int,
    n: int,
    seed: int,
    *,
    split: Split = "query",
    nearest: Embedding | None = None,
) -> Iterator[Episode]:
    """Draws episodes.

    Args:
        task: The task.
        n_shots: Demonstrations per episode; 0 or more.
        n: Number of episodes.
        seed: Seed; an episode depends on it and on its number, not on ``n``.
        split: Where queries come from: "query" for tests, "support" for training. Demonstrations
            always come from "support".
        nearest: If given, the demonstrations are those that resemble the query most (RICES), of
            64 drawn; they need not identify the latent then.

    Yields:
        The episodes.

    Raises:
        ValueError: If a number is out of range, or so few demonstrations cannot identify the
            latent.
    """
    if n_shots < 0 or n < 1:
        raise ValueError(f"n_shots must be >= 0 and n >= 1, got {n_shots} and {n}")
    for number in range(n):
        yield episode(task, n_shots, seed, number, split=split, nearest=nearest)


def episode(
    task: Task,
    n_shots: int,
    seed: int,
    number: int,
    *,
    split: Split = "query",
    nearest: Embedding | None = None,
) -> Episode:
    """One episode; see `episodes`."""
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode()), split == "query", number])
    latents = task.latents(rng)
    latent = latents[int(rng.integers(len(latents)))]
    query = _query(task, rng, split, latent, latents)
    if nearest is None:
        demos = _demos(task, rng, n_shots, latent, latents, query)
    else:
        demos = _nearest(task, rng, n_shots, latent, latents, query, nearest)
    answers = {task.answer(query, other) for other in latents}
    right = task.answer(query, latent)
    return Episode(
        id=f"{task.name}{'-hard' if task.hard else ''}-{split}-{n_shots}shot-{seed}-{number}",
        task=task,
        latent=latent,
        demos=tuple(Shown(params, task.answer(params, latent)) for params in demos),
        query=Shown(query, right),
        others=tuple(sorted(answers - {right})),
    )


def _query(
    task: Task,
    rng: np.random.Generator,
    split: Split,
    latent: Latent,
    latents: tuple[Latent, ...],
) -> Params:
    while True:
        params = task.item_for(rng, split, latents)
        answers = {task.answer(params, other) for other in latents}
        if task.allows(params, latent) and (len(answers) > 1 or not task.has_latent):
            return params


def _demos(
    task: Task,
    rng: np.random.Generator,
    n_shots: int,
    latent: Latent,
    latents: tuple[Latent, ...],
    query: Params,
) -> list[Params]:
    """Demonstrations that leave one latent only, all different from each other and the query."""
    if n_shots == 0:
        return []
    for _ in range(TRIES):
        demos = _draw(task, rng, n_shots, latent, latents, query)
        if task.covers(demos, latents) and all(
            any(task.answer(params, other) != task.answer(params, latent) for params in demos)
            for other in latents
            if other != latent
        ):
            return demos
    raise ValueError(
        f"{n_shots} demonstrations cannot tell the {len(latents)} latents of {task.name!r} apart "
        f"({TRIES} sets were drawn); use more"
    )


def _draw(
    task: Task,
    rng: np.random.Generator,
    count: int,
    latent: Latent,
    latents: tuple[Latent, ...],
    query: Params,
) -> list[Params]:
    found: list[Params] = []
    for _ in range(100 * count):
        params = task.item_for(rng, "support", latents)
        if task.allows(params, latent) and params != query and params not in found:
            found.append(params)
            if len(found) == count:
                return found
    raise ValueError(
        f"{task.name!r} has fewer than {count} different demonstrations for the latent {latent!r}"
    )


def _nearest(
    task: Task,
    rng: np.random.Generator,
    n_shots: int,
    latent: Latent,
    latents: tuple[Latent, ...],
    query: Params,
    embed: Embedding,
) -> list[Params]:
    """The most similar of a pool, the most similar last, next to the query."""
    pool: list[Params] = []
    while len(pool) < POOL:
        params = task.item_for(rng, "support", latents)
        if task.allows(params, latent) and params != query:
            pool.append(params)  # a small task repeats itself: repeats go below
    pool = [params for at, params in enumerate(pool) if params not in pool[:at]]
    if len(pool) < n_shots:
        raise ValueError(f"{task.name!r} has only {len(pool)} demonstrations, {n_shots} are wanted")
    wanted = _unit(embed(task.draw(query)))
    closeness = [float(_unit(embed(task.draw(params))) @ wanted) for params in pool]
    order = np.argsort(closeness, kind="stable")
    return [pool[int(place)] for place in order[len(order) - n_shots :]]


def _unit(vector: np.ndarray) -> np.ndarray:
    flat = np.asarray(vector, dtype=np.float64).ravel()
    return flat / max(float(np.linalg.norm(flat)), 1e-12)
