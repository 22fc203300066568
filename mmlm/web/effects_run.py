"""CHAIR of several ways of decoding on drawn scenes, number by number, for those who watch.

Scoring and comparing are `benchmarks.chair`'s and `benchmarks.reports`'; here the ways only take
turns, a batch each, so that after every round all of them have described the same pictures and can
be compared, and a machine that gets busy half-way slows down all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmlm.cli.configs import effect_label
from mmlm.cli.pictures import WORLD_PROMPT
from mmlm.errors import InputError
from mmlm.web.method_forms import read_methods

if TYPE_CHECKING:
    from benchmarks.chair import ChairResult
    from benchmarks.reports.comparison import Comparison
    from benchmarks.run import Speed
    from mmlm.engine.method import Method
    from mmlm.runner import GenerateSettings, Request, Result
    from mmlm.show.truth import Drawn

__all__ = ["MOST_METHODS", "MOST_PICTURES", "PLAIN", "Plan", "Progress", "measure"]

PLAIN = "plain"
"""Label of decoding without a method, with which everything is compared."""
MOST_METHODS = 4
MOST_PICTURES = 500
"""Beyond this nobody watches; `mmlm bench chair` stores its answers and can be resumed."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        methods: Methods as text, e.g. "VHR(alpha=2.0)", or several joined by " + "; one to four
            of these, each once.
        split: Kind of scenes, a key of `data_tools.world.SPLITS`.
        count: Number of pictures, 1 to 500.
        seed: Of the scenes; not negative.
        question: What is asked about every picture.
        max_new_tokens: Longest caption, in tokens; at least 1.
        batch_size: Pictures per forward pass; the numbers grow by so many pictures. At least 1.
    """

    methods: tuple[str, ...]
    split: str = "natural"
    count: int = 60
    seed: int = 0
    question: str = WORLD_PROMPT
    max_new_tokens: int = 84
    batch_size: int = 12

    def __post_init__(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            InputError: Says what is allowed.
        """
        from data_tools.world import SPLITS

        if not 1 <= len(self.methods) <= MOST_METHODS:
            raise InputError(
                f"{len(self.methods)} methods are chosen.",
                advice=f"Choose one to {MOST_METHODS} methods; plain decoding is always measured.",
            )
        if self.split not in SPLITS:
            raise InputError(
                f"There is no split {self.split!r}.", advice=f"Choose one of {', '.join(SPLITS)}."
            )
        if not 1 <= self.count <= MOST_PICTURES:
            raise InputError(
                f"{self.count} pictures are asked for.",
                advice=f"Ask for 1 to {MOST_PICTURES} here, for more run `mmlm bench chair`.",
            )
        if self.seed < 0:
            raise InputError(f"The seed is {self.seed}.", advice="Give a seed of 0 or more.")
        if not self.question.strip():
            raise InputError("The question is empty.", advice=f"Ask, e.g.: {WORLD_PROMPT}")

    def ways(self) -> dict[str, tuple[Method, ...]]:
        """Ways of decoding by label: plain, then the methods as they are written.

        Raises:
            InputError: If a text is no method, or two are the same.
        """
        ways: dict[str, tuple[Method, ...]] = {PLAIN: ()}
        for text in self.methods:
            label = effect_label(text.strip())
            methods = read_methods(text)
            if not methods or label in ways or methods in ways.values():
                raise InputError(
                    f"{text.strip()!r} is chosen twice, or is no method.",
                    advice="Choose different methods; plain decoding is always measured.",
                )
            ways[label] = methods
        return ways

    def scenes(self) -> list[Drawn]:
        """The pictures with their truth."""
        from mmlm.show.truth import draw_scene

        return [draw_scene(self.split, self.seed, index) for index in range(self.count)]

    def settings(self) -> GenerateSettings:
        """How captions are generated: greedily."""
        from mmlm.runner import GenerateSettings

        return GenerateSettings(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)


@dataclass(frozen=True)
class Progress:
    """What is known so far.

    Attributes:
        done: Captions that were generated, of all ways together.
        total: Captions there will be.
        history: After every round the comparison of all ways on the pictures so far.
        speeds: How long each way took, by label.
        failed: Pictures that are left out, because some way could not describe them.
        reason: Why the first of them could not be described.
        stopped: Whether it was stopped before the end.
    """

    done: int
    total: int
    history: tuple[Comparison, ...] = field(default=(), repr=False)
    speeds: Mapping[str, Speed] = field(default_factory=dict)
    failed: int = 0
    reason: str = ""
    stopped: bool = False

    @property
    def latest(self) -> Comparison | None:
        """The comparison on all pictures so far; None before the first round."""
        return self.history[-1] if self.history else None

    @property
    def finished(self) -> bool:
        """Whether every caption is there."""
        return self.done == self.total


def measure(
    model: Any,
    processor: Any,
    plan: Plan,
    *,
    turn: Callable[[], AbstractContextManager[Any]] = nullcontext,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Progress]:
    """Describes the scenes in every way, and compares the ways after every round of batches.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor.
        plan: What is measured.
        turn: Held while the model works on a batch, so that others can use it in between.
        stopped: Asked before every batch; the round that is under way is then left out.

    Yields:
        Progress after every batch; the last one is finished or stopped.

    Raises:
        InputError: If a method does not exist; before any work.
        MmlmError: If a method does not fit the model; before any picture is described.
    """
    from benchmarks.run import Speed

    ways = plan.ways()
    scenes = plan.scenes()
    requests = _requests(plan, scenes)
    truth = {drawn.scene.index: drawn.known.objects for drawn in scenes}
    with turn():
        _try_out(model, processor, requests[0], ways, plan.settings())
    steps = {
        label: _batches(model, processor, requests, methods, plan.settings())
        for label, methods in ways.items()
    }
    scored: dict[str, ChairResult] = {}
    now = Progress(0, len(ways) * len(requests))
    yield now
    while not now.finished:
        before = now
        answers: dict[str, list[Result]] = {}
        for label, batches in steps.items():
            if stopped():
                yield replace(before, stopped=True)
                return
            with turn():
                answers[label], speed = next(batches)
            speeds = {**now.speeds, label: now.speeds.get(label, Speed()) + speed}
            now = replace(now, done=now.done + speed.answers, speeds=speeds)
            if len(answers) < len(steps):
                yield now
        now = _with_round(now, answers, scored, truth)
        yield now


def _requests(plan: Plan, scenes: Sequence[Drawn]) -> list[Request]:
    from mmlm.runner import Request

    question = plan.question.strip()
    return [Request(str(drawn.scene.index), (drawn.image,), question) for drawn in scenes]


def _try_out(
    model: Any,
    processor: Any,
    request: Request,
    ways: Mapping[str, tuple[Method, ...]],
    settings: GenerateSettings,
) -> None:
    """A few tokens in every way: what does not fit is refused now, and first calls are slow."""
    from mmlm.runner import generate_all

    few = replace(settings, max_new_tokens=min(4, settings.max_new_tokens))
    for methods in ways.values():
        for _ in generate_all(model, processor, [request], methods, few):
            pass


def _batches(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    methods: tuple[Method, ...],
    settings: GenerateSettings,
) -> Iterator[tuple[list[Result], Speed]]:
    """The captions of one way, batch by batch, each with its time."""
    from benchmarks.run import Speed
    from mmlm.runner import generate_batches

    batches = generate_batches(model, processor, requests, methods, settings)
    while True:
        start = time.perf_counter()
        results = next(batches, None)
        if results is None:
            return
        seconds = time.perf_counter() - start
        yield results, Speed(seconds, len(results), sum(result.n_tokens for result in results))


def _with_round(
    now: Progress,
    answers: Mapping[str, Sequence[Result]],
    scored: dict[str, ChairResult],
    truth: Mapping[int, Collection[str]],
) -> Progress:
    """Adds a round in which all ways described the same pictures; ``scored`` grows."""
    from benchmarks import chair
    from benchmarks.reports.comparison import Contender, compare

    every = [result for results in answers.values() for result in results]
    bad = {result.id: result.error for result in every if result.error}
    for label, results in answers.items():
        captions = [
            {"image_id": int(result.id), "caption": result.text, "prompt": result.prompt}
            for result in results
            if result.id not in bad
        ]
        if captions:
            scored[label] = _grown(scored.get(label), chair.score(captions, truth))
    reason = now.reason or next(iter(bad.values()), None) or ""
    now = replace(now, failed=now.failed + len(bad), reason=reason)
    if not scored:
        return now
    compared = compare([Contender(label, result) for label, result in scored.items()])
    return replace(now, history=(*now.history, compared))


def _grown(old: ChairResult | None, new: ChairResult) -> ChairResult:
    """Two sets of scored captions as one; scoring all of them again would take ever longer."""
    if old is None:
        return new
    from benchmarks.base import CountTable

    captions = (*old.per_caption, *new.per_caption)
    images = [caption.image_id for caption in captions]
    rows = [caption.counts() for caption in captions]
    return replace(
        new,
        per_caption=captions,
        table=CountTable.build(images, rows, new.table.ratios),
    )
