"""The beams of one prompt between two steps of a search, as ``generate(num_beams=...)`` keeps them.

What counts as finished, how lengths are weighed and when a prompt ends is the library's own code
for beam search: a search method changes the scores of the next tokens and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Beams", "Choice"]

_NEVER = -1e9  # the library's score of a beam that must not be taken


@dataclass(frozen=True, eq=False)
class Choice:
    """What one step chose for one prompt.

    Attributes:
        beams: The beams after the step.
        parents: int64 [K]; the beam before the step that each running beam goes on from.
        tokens: int64 [K]; its new token.
    """

    beams: Beams
    parents: Tensor
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class Beams:
    """Running and finished beams of one prompt. Steps return new objects, so old ones can be kept.

    Attributes:
        prompt: Positions of the prompt.
        length: Positions of the running beams, prompt included.
        running: int64 [1, K, max]; tokens of the running beams, filled up to the largest length.
        scores: fp32 [1, K]; their summed log-probabilities.
        origins: int32 [1, K, max - prompt]; parent of each of their tokens.
        done: Like ``running``, of the best finished beams.
        done_scores: fp32 [1, K]; scores of those, weighed by length.
        done_origins: Like ``origins``.
        finished: bool [1, K]; which entries of ``done`` are filled.
        hopeful: bool [1, 1]; whether a running beam may still beat the finished ones.
        over: bool []; whether the prompt's search has ended.
    """

    prompt: int
    length: int
    running: Tensor
    scores: Tensor
    origins: Tensor
    done: Tensor
    done_scores: Tensor
    done_origins: Tensor
    finished: Tensor
    hopeful: Tensor
    over: Tensor

    @classmethod
    def start(cls, ids: Int[Tensor, "K N"], config: Any) -> Beams:
        """The beams of a prompt before its first token.

        Args:
            ids: The prompt's tokens, once per beam.
            config: The call's generation configuration.
        """
        k, n = ids.shape
        pad, end = config._pad_token_tensor, config._eos_token_tensor
        fill = -1 if end is None else int(end[0] if pad is None else pad)
        running = ids.new_full((1, k, config.max_length), fill)
        running[0, :, :n] = ids
        scores = torch.zeros(1, k, device=ids.device)
        scores[:, 1:] = _NEVER  # all beams are equal: only the first may be continued
        origins = ids.new_full((1, k, config.max_length - n), -1, dtype=torch.int32)
        return cls(
            prompt=n,
            length=n,
            running=running,
            scores=scores,
            origins=origins,
            done=running.clone(),
            done_scores=torch.full_like(scores, _NEVER),
            done_origins=origins,
            finished=torch.zeros_like(scores, dtype=torch.bool),
            hopeful=torch.ones(1, 1, dtype=torch.bool, device=ids.device),
            over=torch.zeros((), dtype=torch.bool, device=ids.device),
        )

    @property
    def ids(self) -> Int[Tensor, "K n"]:
        """Tokens of the running beams, prompt included."""
        return self.running[0, :, : self.length]

    @property
    def answer(self) -> Int[Tensor, "K n"]:
        """Tokens of the running beams after the prompt."""
        return self.running[0, :, self.prompt : self.length]

    def advance(
        self, model: Any, config: Any, criteria: Any, log_probs: Float[Tensor, "K V"]
    ) -> Choice:
        """One step of beam search.

        Args:
            model: The model, for its library's helpers.
            config: The call's generation configuration.
            criteria: The call's stopping criteria.
            log_probs: Scores of the next token of each running beam.
        """
        k, vocabulary = log_probs.shape
        ends = 0 if config._eos_token_tensor is None else len(config._eos_token_tensor)
        kept = max(2, 1 + ends) * k
        best, sequences, origins = model._get_top_k_continuations(
            accumulated_log_probs=(self.scores[0, :, None] + log_probs).reshape(1, k * vocabulary),
            running_sequences=self.running,
            running_beam_indices=self.origins,
            cur_len=self.length,
            decoder_prompt_len=self.prompt,
            do_sample=False,
            beams_to_keep=kept,
            num_beams=k,
            batch_size=1,
        )
        stops = criteria(sequences[0, :, : self.length + 1], None)[None]
        running, scores, running_origins = model._get_running_beams_for_next_iteration(
            topk_log_probs=best,
            topk_running_sequences=sequences,
            topk_running_beam_indices=origins,
            next_token_hits_stopping_criteria=stops,
            num_beams=k,
        )
        rules = {"early_stopping": config.early_stopping, "length_penalty": config.length_penalty}
        done, done_scores, done_origins, finished = model._update_finished_beams(
            sequences=self.done,
            topk_running_sequences=sequences,
            beam_scores=self.done_scores,
            topk_log_probs=best,
            beam_indices=self.done_origins,
            topk_running_beam_indices=origins,
            is_early_stop_heuristic_unsatisfied=self.hopeful,
            is_sent_finished=self.finished,
            next_token_hits_stopping_criteria=stops,
            top_num_beam_mask=torch.arange(kept, device=stops.device) < k,
            num_beams=k,
            cur_len=self.length,
            decoder_prompt_len=self.prompt,
            **rules,
        )
        hopeful = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=self.hopeful,
            running_beam_scores=scores,
            beam_scores=done_scores,
            is_sent_finished=finished,
            cur_len=self.length + 1,
            max_length=config.max_length,
            decoder_prompt_len=self.prompt,
            **rules,
        )
        goes_on = model._beam_search_has_unfinished_sequences(
            hopeful, finished, stops, config.early_stopping
        )
        step = self.length - self.prompt
        after = Beams(
            prompt=self.prompt,
            length=self.length + 1,
            running=running,
            scores=scores,
            origins=running_origins,
            done=done,
            done_scores=done_scores,
            done_origins=done_origins,
            finished=finished,
            hopeful=hopeful,
            over=~goes_on,
        )
        return Choice(after, running_origins[0, :, step].long(), running[0, :, self.length])
