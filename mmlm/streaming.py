"""One answer, piece by piece, while the model is still generating; can be stopped at any token."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import mmlm
from mmlm.errors import InputError
from mmlm.runner import GenerateSettings, generation_config, seeded

if TYPE_CHECKING:
    import torch

    from mmlm.engine.method import Method

__all__ = ["AnswerStream"]


class AnswerStream:
    """Generates one answer in a thread; iterating gives its text as it comes.

        with AnswerStream(model, processor, inputs, [VHR()], GenerateSettings()) as stream:
            for piece in stream:
                print(piece, end="", flush=True)
        stream.text, stream.n_tokens

    An exception in the loop, Ctrl-C included, does not end the answer: the loop may be entered
    again. Leaving the ``with`` block stops the generation and waits for its thread.

    Beam search decides at its end only, so the whole answer then comes as one piece.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor.
        inputs: What :func:`mmlm.inputs.prepare` made of one conversation.
        methods: Methods that are attached while the model generates.
        settings: How to generate; ``batch_size`` does not matter.

    Attributes:
        text: The answer so far; complete once the iteration has ended.
        n_tokens: New tokens, the end token included; known once the iteration has ended.
        token_ids: These tokens, in order; known once the iteration has ended.
        records: What probes among the methods measured about the answer, by the name of the
            measurement (:func:`mmlm.measured`); known once the iteration has ended.
        model: The model that answers.
        processor: Its processor.
        stopped: Whether :meth:`stop` cut the answer short.

    Raises:
        InputError: If ``inputs`` holds more than one row. Errors of the model and of the methods
            are raised by the iteration.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs: dict[str, torch.Tensor],
        methods: Sequence[Method] = (),
        settings: GenerateSettings | None = None,
    ) -> None:
        if inputs["input_ids"].shape[0] != 1:
            raise InputError(
                f"{inputs['input_ids'].shape[0]} conversations were given to a stream.",
                advice="Stream one conversation; mmlm.runner answers many at once.",
            )
        self.text = ""
        self.n_tokens = 0
        self.token_ids: tuple[int, ...] = ()
        self.records: dict[str, Any] = {}
        self.stopped = False
        self.model = model
        self.processor = processor
        self._inputs = inputs
        self._methods = tuple(methods)
        self._settings = replace(settings or GenerateSettings(), batch_size=1)
        self._stop = threading.Event()
        self._finished = False

    def stop(self) -> None:
        """Ends the answer after the token that is being computed; may be called anywhere."""
        self._stop.set()

    def __enter__(self) -> Self:
        """Starts the generation."""
        from transformers import TextIteratorStreamer

        self._streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._answer = self._executor.submit(self._generate)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the generation if it still runs, and waits for its thread."""
        self._stop.set()
        self._executor.shutdown()

    def __iter__(self) -> Iterator[str]:
        """The pieces that have not been read yet."""
        return self

    def __next__(self) -> str:
        """The next piece; raises what went wrong in the thread."""
        if self._finished:
            raise StopIteration
        for piece in self._streamer:
            # The first token of many tokenizers decodes with a blank before it.
            piece = piece if self.text else piece.lstrip()
            if piece:
                self.text += piece
                return piece
        return self._finish()

    def _finish(self) -> str:
        """Takes the whole answer over from the thread; returns what was not streamed of it."""
        self._finished = True
        answer, self.records = self._answer.result()
        streamed, self.text = (
            self.text,
            self.processor.decode(answer, skip_special_tokens=True).strip(),
        )
        self.token_ids = tuple(answer.tolist())
        self.n_tokens = len(self.token_ids)
        return "" if streamed else self.text

    def _generate(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """The new tokens, and what was measured about them."""
        import torch

        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.stopped = self._stop.is_set()
            return torch.full((ids.shape[0],), self.stopped, device=ids.device)

        greedy_or_sampled = self._settings.num_beams == 1
        try:
            # Attached here, in the thread that generates, and for exactly as long.
            with (
                seeded(self._settings.seed, ["stream"], self.model.device),
                mmlm.attach(self.model, *self._methods, processor=self.processor),
            ):
                tokens = self.model.generate(
                    **self._inputs,
                    generation_config=generation_config(self.model, self._settings),
                    streamer=self._streamer if greedy_or_sampled else None,
                    stopping_criteria=[stop],
                )
                answer = tokens[0, self._inputs["input_ids"].shape[1] :]
                measures = any(method.measures for method in self._methods)
                measured = mmlm.measured(self.model, [len(answer)]) if measures else []
                return answer, dict(*measured)
        finally:
            # generate() does this only if it succeeds; the reader would wait for ever.
            self._streamer.text_queue.put(self._streamer.stop_signal)
