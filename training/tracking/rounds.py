"""The callback that asks the model about held-out pictures now and then."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mmlm.inputs import load_image
from training.gather import on_main
from training.snapshot import Journal
from training.tracking.samples import HeldOut, answers, kept_random_numbers, resting
from training.tracking.trackers import Shown, send_samples

if TYPE_CHECKING:
    from mmlm.runner import Request, Result
    from training.tracking.settings import Tracking

__all__ = ["SAMPLES", "SampleRounds"]

SAMPLES = "samples.jsonl"
_THUMBNAIL = (256, 256)


class SampleRounds(TrainerCallback):
    """Samples before the first step, every so many steps, after the last, and of the best model.

    Texts go to `samples.jsonl` (`step`, `id`, `prompt`, `text`, `n_tokens`, and `error` where there
    is no answer) and, with the pictures, to the trackers; the scores are a log entry of their own
    with names `eval_...`.

    Args:
        trainer: the Trainer that is watched.
        held_out: pictures and their score.
        settings: when, and how.
        folder: of the run.
        trackers: transformers' callbacks by the trackers' names.
        after: called when a round is over.
    """

    def __init__(
        self,
        trainer: Any,
        held_out: HeldOut,
        settings: Tracking,
        folder: Path,
        trackers: dict[str, Any],
        after: Callable[[], None],
    ) -> None:
        self._trainer, self._held_out, self._settings = trainer, held_out, settings
        self._path, self._trackers, self._after = folder / SAMPLES, trackers, after
        self._last = -1
        self._waits = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        with kept_random_numbers():
            with self._trainer.accelerator.local_main_process_first():
                self._requests: list[Request] = list(self._held_out.requests())
        step = state.global_step
        self._last = on_main(lambda: self._open(step))
        # The trackers are not started yet.
        self._waits = step == 0

    def _open(self, step: int) -> int:
        """Opens the file for a training that goes on from a step; the last step in it, or -1."""
        self._journal = Journal(self._path, step)
        lines = self._path.read_text("utf-8").splitlines()
        return json.loads(lines[-1])["step"] if lines else -1

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        if self._waits:
            self._round(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        # The last round comes before the last checkpoint: whoever has that one has the samples.
        step = state.global_step
        if step % self._settings.sample_every == 0 or step >= state.max_steps:
            self._round(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if best or self._last != state.global_step:
            self._round(state, of_best=best)

    def _round(self, state: Any, *, of_best: bool = False) -> None:
        trainer, settings = self._trainer, self._settings
        self._waits, self._last = False, state.global_step
        results = answers(
            trainer, self._requests, settings.generate, gather=settings.gather_for_samples
        )
        facts = {"weights_of_step": state.best_global_step} if of_best else {}
        with resting(trainer.model):  # TRL tells evaluation from training by the model's mode
            scores = on_main(lambda: self._note(state.global_step, results, facts))
            trainer.log({f"eval_{name}": value for name, value in scores.items()} | facts)
        self._after()

    def _note(
        self, step: int, results: Sequence[Result], facts: dict[str, int]
    ) -> dict[str, float]:
        """Writes the answers down and scores them; on the first process."""
        scores = self._held_out.score({r.id: r.text for r in results if r.error is None})
        for result in results:
            line = {
                "step": step,
                **facts,
                "id": result.id,
                "prompt": result.prompt,
                "text": result.text,
                "n_tokens": result.n_tokens,
            }
            self._journal.write(line if result.error is None else {**line, "error": result.error})
        if self._trackers:
            shown = [_shown(request, r) for request, r in zip(self._requests, results, strict=True)]
            for name, callback in self._trackers.items():
                send_samples(callback, name, step, shown)
        return scores


def _shown(request: Request, result: Result) -> Shown:
    pictures = []
    if result.error is None:
        for source in request.images:
            picture = load_image(source)
            picture.thumbnail(_THUMBNAIL)
            pictures.append(picture)
    return Shown(request.id, pictures, request.prompt, result.text or f"[{result.error}]")
