"""A generator behind HTTP: any server that speaks OpenAI's chat completions (vLLM, SGLang, ...).

The server does the sampling, and keeps keys and values of prompts if it caches prefixes; this end
only writes prompts and reads sentences. What a server must be able to do, and what is done about
those that cannot, stands in docs/data.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.generators import GeneratorError, Sample, SentenceGenerator, SentenceRequest
from data_tools.generators.chat_prompts import (
    SERVER_STOPS,
    ContinueMode,
    as_sample,
    chat_messages,
    data_url,
    seed_of,
)
from data_tools.generators.common import check_sampling
from data_tools.generators.probing import Habits, find_habits
from data_tools.pictures import Picture
from mmlm.chat_server.client import Answer, ChatServer
from mmlm.chat_server.wire import Choice, read_choices
from mmlm.errors import InputError

__all__ = ["OpenAIGenerator"]

# Servers take what they are not told from the model's generation_config.json; the distribution
# that is sampled shall be the model's own at the given temperature.
_WHOLE_DISTRIBUTION = {"top_p": 1.0}
_WHOLE_DISTRIBUTION_EXTENDED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass
class _Wanted:
    """What is still to be asked for one request, and what was answered.

    Attributes:
        request: The request.
        url: Its picture.
        choices: Replies by the number of the question that brought them.
        n_asked: Questions so far.
        error: Why there is no result.
    """

    request: SentenceRequest
    url: str
    choices: dict[int, list[Choice]] = field(default_factory=dict)
    n_asked: int = 0
    error: str = ""

    @property
    def count(self) -> int:
        """Replies so far."""
        return sum(len(replies) for replies in self.choices.values())


@dataclass(frozen=True)
class _Question:
    """One HTTP request: which samples it is to bring."""

    wanted: _Wanted
    number: int
    n: int


class OpenAIGenerator(SentenceGenerator):
    """Samples sentences from a server.

    Args:
        model: Name of the model on the server.
        server: The server.
        max_tokens: Most new tokens of a sample. One that holds no whole sentence is no sample.
        limit_field: How the server calls that limit.
        continue_mode: How the caption so far is given. "auto": as an open turn, after making sure
            that the server goes on with one; "prefill": without making sure; "ask": in the
            question, for servers that only answer anew.
        samples_per_request: Most samples that one request asks for; None for all.
        parameters: Further fields of every request, e.g. {"chat_template_kwargs": {...}}.

    Raises:
        ValueError: If a number is not positive, or the mode is unknown.
    """

    def __init__(
        self,
        model: str,
        server: ChatServer,
        *,
        max_tokens: int = 512,
        limit_field: str = "max_tokens",
        continue_mode: ContinueMode = "auto",
        samples_per_request: int | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {max_tokens}.")
        if samples_per_request is not None and samples_per_request < 1:
            raise ValueError(f"samples_per_request must be positive, got {samples_per_request}.")
        if continue_mode not in ("auto", "prefill", "ask"):
            raise ValueError(f"continue_mode must be auto, prefill or ask, got {continue_mode!r}.")
        self._model = model
        self._server = server
        self._max_tokens = max_tokens
        self._limit_field = limit_field
        self._mode: ContinueMode = continue_mode
        self._most = samples_per_request
        self._parameters = dict(parameters or {})
        self._habits: Habits | None = None
        self._urls: dict[str, str] = {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """Model, mode and limits. Not the address: shards may use servers of their own."""
        return {
            "generator": "openai",
            "model": self._model,
            "continue_mode": "ask" if self._mode == "ask" else "prefill",
            "max_tokens": self._max_tokens,
            "samples_per_request": self._most,
            "parameters": self._parameters,
        }

    def check(self) -> Habits:
        """Makes sure that the server is there and goes on with captions; asks only once.

        The first `sample_sentences` does so; done before a run, it finds trouble before any work.

        Returns:
            What was found out about the server.

        Raises:
            InputError: If the server cannot be used; says why and what to do.
        """
        if self._habits is None:
            self._habits = find_habits(self._probe, self._mode)
        return self._habits

    def _probe(
        self, messages: list[dict[str, Any]], fields: Mapping[str, Any], tokens: int
    ) -> list[Choice]:
        body = self._body(messages, {"seed": 0, self._limit_field: tokens, **fields})
        answer = self._server.answer(body, read_choices)
        if answer.value is not None:
            return answer.value
        if answer.passing or answer.advice:
            raise self._hopeless(answer)
        raise GeneratorError(answer.reason)

    def _body(self, messages: list[dict[str, Any]], fields: Mapping[str, Any]) -> dict[str, Any]:
        extended = {} if self._mode == "ask" else _WHOLE_DISTRIBUTION_EXTENDED
        return {
            "model": self._model,
            "messages": messages,
            **_WHOLE_DISTRIBUTION,
            **extended,
            self._limit_field: self._max_tokens,
            **fields,
            **self._parameters,
        }

    def sample_sentences(
        self, requests: Sequence[SentenceRequest], n: int, temperature: float
    ) -> list[list[Sample] | GeneratorError]:
        """Samples on the server, several requests at a time.

        Raises:
            InputError: If the server is gone, or refuses everything. What was asked in this call
                is lost and nothing else; the same run can go on later.
        """
        check_sampling(n, temperature)
        self.check()
        wanted = [_Wanted(request, self._url(request.picture)) for request in requests]
        questions = [question for one in wanted for question in self._questions(one, n)]
        while questions:
            questions = self._round(questions, n, temperature)
        return [_result(one, n, self.check().echoes) for one in wanted]

    def forget(self, pictures: Sequence[Picture]) -> None:
        """Drops the encoded pictures."""
        for picture in pictures:
            self._urls.pop(picture.sha256, None)

    def _url(self, picture: Picture) -> str:
        if picture.sha256 not in self._urls:
            self._urls[picture.sha256] = data_url(picture)
        return self._urls[picture.sha256]

    def _questions(self, wanted: _Wanted, n: int) -> Iterator[_Question]:
        """Splits what a request still lacks into questions, each with its own seed."""
        missing = n - wanted.count
        while missing > 0:
            size = min(missing, self._most or missing) if self.check().knows_n else 1
            yield _Question(wanted, wanted.n_asked, size)
            wanted.n_asked += 1
            missing -= size

    def _round(self, questions: Sequence[_Question], n: int, temperature: float) -> list[_Question]:
        """Asks; gives what is to be asked next."""
        bodies = [self._question_body(question, temperature) for question in questions]
        again: list[_Question] = []
        silent: Answer[list[Choice]] | None = None
        with contextlib.closing(self._server.answers(bodies, read_choices)) as answers:
            for answer in answers:
                question = questions[answer.index]
                if answer.value is not None:
                    question.wanted.choices[question.number] = answer.value[: question.n]
                elif answer.advice:
                    raise self._hopeless(answer)
                elif answer.asked:
                    question.wanted.error = question.wanted.error or answer.reason
                    silent = answer if answer.passing else silent
                else:  # others failed, and it was not asked
                    again.append(question)
        if silent is not None:
            self._check_alive(silent)
        waiting = {id(question.wanted) for question in again}
        asked = {id(question.wanted): question.wanted for question in questions}
        for key, one in asked.items():
            if key not in waiting and not one.error:
                again += self._questions(one, n)  # a server may give fewer than it was asked for
        return [question for question in again if not question.wanted.error]

    def _question_body(self, question: _Question, temperature: float) -> dict[str, Any]:
        request = question.wanted.request
        messages, more = chat_messages(
            question.wanted.url, request.question, request.context, self._mode
        )
        fields = {
            "n": question.n,
            "seed": seed_of(request, question.number),
            "temperature": temperature,
        }
        stops = SERVER_STOPS if self.check().keeps_stops else {}
        return self._body(messages, fields | more | stops)

    def _check_alive(self, silent: Answer[Any]) -> None:
        """Tells a request that a server cannot answer from a server that answers nothing."""
        greeting = [{"role": "user", "content": "Hi"}]
        answer = self._server.answer(self._body(greeting, {self._limit_field: 1}), bytes)
        if answer.advice:
            raise self._hopeless(answer)
        if answer.passing:
            raise self._hopeless(silent)

    def _hopeless(self, answer: Answer[Any]) -> InputError:
        if answer.passing:
            return InputError(
                f"The server at {self._server.url} does not answer: {answer.reason}.",
                advice="Start it, then give the same command again: it goes on where it stopped.",
            )
        return InputError(
            f"The server at {self._server.url} refuses the model {self._model}: {answer.reason}.",
            advice=answer.advice
            or "See the server's words; one that takes no vLLM fields needs continue_mode `ask`.",
        )


def _result(wanted: _Wanted, n: int, echoes: bool) -> list[Sample] | GeneratorError:
    if wanted.error:
        return GeneratorError(f"the server gave no sentences: {wanted.error}")
    choices = [one for number in sorted(wanted.choices) for one in wanted.choices[number]][:n]
    if all(choice.refused for choice in choices):
        return GeneratorError("the model refused to reply")
    echo = wanted.request.context if echoes else ""
    return [as_sample(choice, echo) for choice in choices]
