"""Answers many requests about pictures: batched, in order, reproducible, one error per bad record.

Batches are always cut from the *whole* list of requests (`mmlm.batching`: questions of like length
together), and every batch seeds its own random numbers from the identifiers in it. A run that was
interrupted and resumed therefore gives the same answers, bit for bit, as one that was not, greedy
or sampled.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mmlm
from mmlm.batching import batches
from mmlm.decoding_settings import GenerateSettings, generation_config
from mmlm.engine.identity import fingerprint
from mmlm.errors import ImageReadError, InputError, LayoutError, MmlmError
from mmlm.inputs import ImageSource, load_image, message, prepare, render
from mmlm.progress import progress_bar

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import GenerationConfig

    from mmlm.engine.method import Method

__all__ = [
    "GenerateSettings",
    "Request",
    "Result",
    "Turn",
    "fingerprint",
    "generate_all",
    "generate_batches",
    "generation_config",
    "seeded",
]


@dataclass(frozen=True)
class Request:
    """One question, or a conversation whose questions are known beforehand.

    Args:
        id: Identifies the request in a run; part of the seed.
        images: The pictures, in the order in which they are shown; may be empty.
        prompt: The question as the user wrote it, without placeholders.
        follow_ups: Further questions. Each is asked in the same conversation, after the model's
            own answers to those before it.
        marked: Whether the prompt says where the pictures stand: ``<image 1>``, ``<image 2>`` and
            so on (see `mmlm.inputs.message`). Otherwise they stand before it.
    """

    id: str
    images: tuple[ImageSource, ...]
    prompt: str
    follow_ups: tuple[str, ...] = ()
    marked: bool = False


@dataclass(frozen=True)
class Turn:
    """One question of a conversation and its answer.

    Args:
        prompt: The question as the user wrote it.
        text: The answer without special tokens; in this form it is fed back to the model.
        n_tokens: New tokens, the end token included.
    """

    prompt: str
    text: str
    n_tokens: int


@dataclass(frozen=True)
class Result:
    """One answer, or those of one conversation.

    Args:
        id: The request's.
        prompt: The question as the user wrote it; of a conversation, the first.
        text: The answer to it without special tokens; empty if there is an error.
        n_tokens: New tokens of all answers, the end tokens included.
        error: Why there is no answer, or None. A conversation fails as a whole.
        templated: What the model was given: the prompt after the chat template; of a
            conversation, everything up to its last answer.
        turns: Every question with its answer if there were follow-ups, the first included.
        measures: What attached probes measured while the first answer was generated, by the name
            under which it is stored; see `mmlm.measured`.
        tokens: Ids of the new tokens of the first answer, the end token included.
    """

    id: str
    prompt: str
    text: str
    n_tokens: int
    error: str | None = None
    templated: str = ""
    turns: tuple[Turn, ...] = ()
    measures: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()


def generate_all(
    model: Any,
    processor: Any,
    requests: Iterable[Request],
    methods: Sequence[Method] = (),
    settings: GenerateSettings | None = None,
    on_result: Callable[[Result], None] | None = None,
    progress: bool = False,
) -> Iterator[Result]:
    """Answers requests one after the other, in their order.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor, with a chat template.
        requests: The requests.
        methods: Methods that are attached while the model generates.
        settings: How to generate.
        on_result: Called with every result just before it is yielded.
        progress: Show a progress bar on standard error.

    Yields:
        One result per request; a request that fails yields a result with ``error``.
    """
    everything = list(requests)
    batches = generate_batches(
        model, processor, everything, methods, settings or GenerateSettings(), progress=progress
    )
    turn = iter(everything)
    early: dict[str, Result] = {}
    expected = next(turn, None)
    for batch in batches:
        early |= {result.id: result for result in batch}
        while expected is not None and expected.id in early:
            result = early.pop(expected.id)
            if on_result is not None:
                on_result(result)
            yield result
            expected = next(turn, None)


def generate_batches(
    model: Any,
    processor: Any,
    requests: Iterable[Request],
    methods: Sequence[Method],
    settings: GenerateSettings,
    *,
    done: Collection[str] = frozenset(),
    progress: bool = False,
    methods_of: Callable[[Sequence[Request]], Sequence[Method]] | None = None,
) -> Iterator[list[Result]]:
    """Answers requests in batches, for callers that store each batch before the next one starts.

    Batches come in the order of `mmlm.batching.batches`, not in that of the requests.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor, with a chat template.
        requests: All requests of the run, also those that are done: they decide how the batches
            are cut.
        methods: Methods that are attached while the model generates.
        settings: How to generate.
        done: Identifiers that need no answer. A batch with only some of them done is computed
            whole, so that the others do not depend on where the last run was interrupted.
        progress: Show a progress bar on standard error.
        methods_of: Methods that are attached beside the others for the requests that are answered
            together, given in the order of their rows; for settings that differ from row to row.

    Yields:
        The results of one batch, without those that were done, in order; never empty.

    Raises:
        InputError: If two requests have the same identifier.
    """
    everything = list(requests)
    counts = Counter(request.id for request in everything)
    if twice := [identifier for identifier, count in counts.items() if count > 1]:
        raise InputError(
            f"The id {twice[0]!r} is given more than once.", advice="Give every request its own id."
        )
    config = generation_config(model, settings)
    failed = 0
    with progress_bar(len(everything), progress, "answers") as advance:
        for batch in batches(processor, everything, settings.batch_size):
            missing = [request.id for request in batch if request.id not in done]
            results = []
            if missing:
                one = _Batch(model, processor, methods, config, settings.seed, methods_of)
                results = one.answer(batch)
                failed += sum(result.error is not None for result in results)
            advance(len(batch), f"{failed} failed" if failed else "")
            if missing:
                yield [result for result in results if result.id in missing]


@dataclass
class _Row:
    """A request on its way: what was answered so far, or why it cannot be."""

    request: Request
    pictures: list[Image.Image] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    templated: str = ""
    error: str | None = None

    @property
    def waits(self) -> bool:
        """Whether there is another question to answer."""
        return self.error is None and len(self.turns) <= len(self.request.follow_ups)

    @property
    def prompt(self) -> str:
        """The next question."""
        return (self.request.prompt, *self.request.follow_ups)[len(self.turns)]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The answered turns and the next question; the pictures stand in or before the first."""
        messages = []
        for turn in self.turns:
            messages += [message("user", turn.prompt), message("assistant", turn.text)]
        messages.append(message("user", self.prompt))
        first = messages[0]["content"][0]["text"]
        n_images, marked = len(self.pictures), self.request.marked
        return [message("user", first, n_images, marked=marked), *messages[1:]]

    @property
    def seed_key(self) -> str:
        """What makes the random numbers of this row's next answer its own."""
        return f"{self.request.id}#{len(self.turns)}" if self.turns else self.request.id

    def result(self) -> Result:
        """What became of the request."""
        if self.error is not None:
            return Result(self.request.id, self.request.prompt, "", 0, error=self.error)
        return Result(
            id=self.request.id,
            prompt=self.request.prompt,
            text=self.turns[0].text,
            n_tokens=sum(turn.n_tokens for turn in self.turns),
            templated=self.templated,
            turns=tuple(self.turns) if self.request.follow_ups else (),
            measures=self.measures,
            tokens=self.tokens,
        )


@dataclass(frozen=True)
class _Batch:
    """Answers one batch, turn by turn; a row that cannot be answered leaves it with an error."""

    model: Any
    processor: Any
    methods: Sequence[Method]
    config: GenerationConfig
    seed: int
    methods_of: Callable[[Sequence[Request]], Sequence[Method]] | None = None

    def answer(self, batch: Sequence[Request]) -> list[Result]:
        rows = [_Row(request) for request in batch]
        for row in rows:
            try:
                row.pictures = [load_image(source) for source in row.request.images]
            except ImageReadError as error:
                row.error = str(error)
        while waiting := [row for row in rows if row.waits]:
            self._answer_or_split(waiting)
        return [row.result() for row in rows]

    def _answer_or_split(self, rows: list[_Row]) -> None:
        """Answers the next question of all rows together; if some row prevents it, of each alone.

        A processor (ValueError: e.g. a picture of 1 x 1000 pixels) or the layout refuses a batch
        as a whole, without telling which row it means.
        """
        try:
            inputs = prepare(
                self.processor,
                [row.conversation for row in rows],
                [row.pictures for row in rows],
                device=self.model.device,
                dtype=self.model.dtype,
            )
        except (ValueError, ZeroDivisionError, MmlmError) as error:
            self._split(rows, error)
            return
        try:
            self._generate(rows, inputs)
        except LayoutError as error:
            self._split(rows, error)

    def _split(self, rows: list[_Row], error: Exception) -> None:
        if len(rows) == 1:
            rows[0].error = str(error)
            return
        for row in rows:
            self._answer_or_split([row])

    def _generate(self, rows: list[_Row], inputs: dict[str, torch.Tensor]) -> None:
        import torch

        keys = [row.seed_key for row in rows]
        methods = list(self.methods)
        if self.methods_of is not None:
            methods += self.methods_of([row.request for row in rows])
        try:
            with (
                seeded(self.seed, keys, self.model.device),
                mmlm.attach(self.model, *methods, processor=self.processor),
            ):
                tokens = self.model.generate(**inputs, generation_config=self.config)
                answers = tokens[:, inputs["input_ids"].shape[1] :].cpu()
                ends = self.model.generation_config.eos_token_id
                lengths = [_length(answer, ends) for answer in answers]
                measured = mmlm.measured(self.model, lengths) if self.methods else []
                measured = measured or [{} for _ in rows]
        except torch.OutOfMemoryError as error:
            raise MmlmError(
                f"The device ran out of memory with {len(rows)} requests at once.",
                advice="Lower generate.batch_size or max_new_tokens, or choose a smaller dtype.",
            ) from error
        for row, answer, length, found in zip(rows, answers, lengths, measured, strict=True):
            row.measures = row.measures or found
            row.tokens = row.tokens or tuple(answer[:length].tolist())
            row.templated = render(self.processor, row.conversation)
            text = self.processor.decode(answer, skip_special_tokens=True).strip()
            row.turns.append(Turn(row.prompt, text, length))


def _length(answer: torch.Tensor, ends: int | list[int] | None) -> int:
    """Number of tokens up to the first end token, which counts; the padding behind it does not."""
    stops = [ends] if isinstance(ends, int) else ends or []
    for position, token in enumerate(answer.tolist(), start=1):
        if token in stops:
            return position
    return len(answer)


@contextlib.contextmanager
def seeded(seed: int, ids: Sequence[str], device: torch.device) -> Iterator[None]:
    """Seeds torch from a run's seed and a batch's identifiers; restores its state afterwards.

    Identifiers, not the position: which batches ran before in this process must not matter.

    Args:
        seed: The run's seed.
        ids: The identifiers in the batch.
        device: Where the model runs.
    """
    import torch

    digest = hashlib.sha256("\0".join([str(seed), *ids]).encode()).digest()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(digest[:8]) >> 1)
        yield
