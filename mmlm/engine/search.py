"""The ``search`` site: a method's own loop in the place of ``generate``'s.

Inside the block ``generate`` prepares everything as ever (inputs, cache, processors, stopping
criteria) and then hands over to the method, which gets a :class:`Search`. That runs the model: one
prefill, then passes in which every row looks at several next tokens at once. The candidates of a
row stand side by side behind its cache, at the same position and hidden from one another, so that
looking costs one pass over one cache, and going on with a candidate costs none.

Prompts of a batch go on independently: one may be taken back while the others are not. Their rows
then have columns in the cache that are no part of their text, which the mask keeps closed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from mmlm.engine.beams import Beams, Choice
from mmlm.errors import IncompatibleMethods, LayoutError, UnsupportedModel

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["Search", "searching", "through_search"]

#: Sites that a search cannot share a model with, and why.
_CLASHING: dict[str, str] = {
    "logits": "edits the logits of one next token, while a search looks at several at once",
    "mask": "makes attention masks of its own",
    "tokens": "removes positions from the cache",
    "visual_tokens": "removes positions from the cache",
}
#: What a search does not do, with the values that ask for nothing.
_UNAVAILABLE: dict[str, tuple[Any, ...]] = {
    "custom_generate": (None,),
    "do_sample": (None, False),
    "guidance_scale": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "cache_implementation": (None, "dynamic", "dynamic_full"),
    "token_healing": (None, False),
}


def searching(session: Session) -> int | None:
    """Number of the method that searches, if one does.

    Raises:
        IncompatibleMethods: If two do, or another method acts where a search cannot let it.
    """
    users = session.users("search")
    if not users:
        return None
    methods = session.methods
    first = methods[users[0]]
    if len(users) > 1:
        raise IncompatibleMethods(
            f"{first.label} and {methods[users[1]].label} both bring a search of their own.",
            advice="Use one of them.",
        )
    for method in methods:
        if method is first:
            continue
        if method.branches:
            raise IncompatibleMethods(
                f"{first.label} reorders beams in its own way, which the auxiliary rows of "
                f"{method.label} cannot follow.",
                advice="Use one of them.",
            )
        for site, why in _CLASHING.items():
            if site in method.sites:
                raise IncompatibleMethods(
                    f"{first.label} cannot run with {method.label}, which {why}.",
                    advice="Use one of them.",
                )
        if not method.rewinds:
            raise IncompatibleMethods(
                f"{first.label} takes tokens back, while {method.label} keeps count of them.",
                advice="Use one of them.",
            )
    return users[0]


def through_search(
    session: Session,
    number: int,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Runs ``generate`` with the method's loop.

    Args:
        session: The attachment.
        number: The searching method.
        original: The model's own ``generate``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        IncompatibleMethods: If the call asks for something that a search cannot do.
    """
    method = session.methods[number]
    bound = inspect.signature(original).bind_partial(*args, **kwargs).arguments
    given = {**bound, **bound.pop("kwargs", {})}
    _refuse(session, number, given)
    streamer = given.pop("streamer", None)
    config = copy.deepcopy(given.get("generation_config"))
    if config is None:
        given["num_beams"] = method.beams
    else:  # transformers warns about arguments beside a whole configuration
        config.num_beams = method.beams
        given["generation_config"] = config

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        return method.search(
            Search(
                session,
                number,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                model_kwargs,
            )
        )

    result = original(**given, custom_generate=loop)
    if streamer is not None:  # a search may take tokens back, so they are sent when all are sure
        ids = (result if isinstance(result, Tensor) else result.sequences).cpu()
        first = given.get("input_ids", given.get("inputs"))
        prompt = 0 if first is None else first.shape[1]
        streamer.put(ids[:, :prompt])
        streamer.put(ids[0, prompt:] if len(ids) == 1 else ids[:, prompt:])
        streamer.end()
    return result


def _refuse(session: Session, number: int, given: Mapping[str, Any]) -> None:
    method = session.methods[number]
    own = getattr(session.model, "generation_config", None)
    config = given.get("generation_config")

    def setting(name: str) -> Any:
        for value in (given.get(name), getattr(config, name, None), getattr(own, name, None)):
            if value is not None:
                return value
        return None

    for name, harmless in _UNAVAILABLE.items():
        value = setting(name)
        if value not in harmless:
            raise IncompatibleMethods(
                f"{method.label} runs a search of its own, which cannot run with {name}={value!r}.",
                advice=f"Pass {name}={harmless[-1]!r}.",
            )
    beams = given.get("num_beams") or getattr(config, "num_beams", None)
    if beams not in (None, 1, method.beams):
        raise IncompatibleMethods(
            f"{method.label} searches with {method.beams} beams, but num_beams={beams} was given.",
            advice="Leave num_beams out, and choose the beams in the method.",
        )
    wanted = setting("num_return_sequences") or 1
    if wanted > method.beams:
        raise IncompatibleMethods(
            f"{method.label} has {method.beams} beams, fewer than num_return_sequences={wanted}.",
            advice="Ask for at most as many sequences as there are beams.",
        )
    rows = given.get("input_ids", given.get("inputs"))
    if given.get("prefix_allowed_tokens_fn") is not None and rows is not None and len(rows) > 1:
        raise IncompatibleMethods(
            f"{method.label} lets every prompt of a batch go on by itself, which "
            "prefix_allowed_tokens_fn cannot follow.",
            advice="Generate one prompt at a time.",
        )


class Search:
    """One ``generate`` call, as a search method sees it.

    Rows are beams, those of one prompt side by side. ``K`` below is the number of beams of a
    prompt, ``rows`` all of them.

    Attributes:
        beams: Beams per prompt.
        prompts: Prompts of the call.
        rows: Both multiplied.
    """

    def __init__(
        self,
        session: Session,
        number: int,
        input_ids: Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        kwargs: dict[str, Any],
    ) -> None:
        self._session = session
        self._number = number
        self._model: Any = session.model
        self._ids = input_ids
        self._processors = processors
        self._criteria = criteria
        self._config = config
        self._kwargs = kwargs
        self.beams: int = config.num_beams
        self.rows = input_ids.shape[0]
        self.prompts = self.rows // self.beams
        self._cache: Any = None
        self._length = 0  # columns of the cache that belong to somebody's text
        self._next = input_ids  # position ids of the first answer token, set by prefill()
        self._columns: list[Tensor] = []

    @property
    def state(self) -> Any:
        """The method's own state; there is one after the prefill."""
        return self._session.states[self._number]

    @property
    def has_image(self) -> list[bool]:
        """Which prompts hold an image."""
        shown: list[bool] = self._session.layout.has_image()[:: self.beams].tolist()
        return shown

    def start(self, prompt: int) -> Beams:
        """The beams of a prompt before its first token."""
        return Beams.start(self._ids[self._own(prompt)], self._config)

    def plain(self) -> Any:
        """The library's own beam search, for a setting that changes nothing."""
        return type(self._model)._beam_search(
            self._model,
            self._ids,
            logits_processor=self._processors,
            stopping_criteria=self._criteria,
            generation_config=self._config,
            **self._kwargs,
        )

    # ---- passes --------------------------------------------------------------------------------

    def prefill(self) -> Float[Tensor, "rows V"]:
        """Runs the prompts; returns the logits of the first answer token."""
        output = self._model._prefill(self._ids, self._config, dict(self._kwargs))
        self._cache = output.past_key_values
        others = {type(layer).__name__ for layer in self._cache.layers} - {DynamicLayer.__name__}
        if others:
            raise UnsupportedModel(
                f"{self._session.methods[self._number].label} takes tokens back, which a cache of "
                f"{', '.join(sorted(others))} cannot.",
                advice="Use a model and a cache that keep every position.",
            )
        self._length = self._cache.get_seq_length()
        self._next = self._first_answer_position()
        empty = torch.zeros(0, dtype=torch.long, device=self._ids.device)
        self._columns = [empty] * self.prompts
        return output.logits[:, -1].float()

    def look(self, tokens: Int[Tensor, "rows C"]) -> Float[Tensor, "rows C V"]:
        """Logits after each of several next tokens of each row, as if each stood there alone.

        The candidates stay at the end of the cache until :meth:`keep` takes or drops them. While
        this pass runs, each of its positions counts as the last one of its row.
        """
        count = tokens.shape[1]
        alone = torch.eye(count, dtype=torch.bool, device=tokens.device)
        return self._pass(tokens, alone, self._position(torch.zeros_like(tokens[:1])))

    def keep(
        self, parents: Int[Tensor, "rows"], slots: Int[Tensor, "rows"], taken: list[bool]
    ) -> None:
        """Rows follow their parents, and take one of the parents' candidates along.

        Args:
            parents: The row that each row goes on from.
            slots: Which of the parent's candidates becomes the row's next token.
            taken: For which prompts that is so; the rows of the others only follow.
        """
        n, self._length = self._length, self._length + any(taken)
        rows = torch.arange(self.rows, device=parents.device)
        self._cache.reorder_cache(parents)
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                x = getattr(layer, name)
                if any(taken):
                    x[:, :, n] = x[rows, :, n + slots]
                setattr(layer, name, x[:, :, : self._length])
        for prompt, took in enumerate(taken):
            if took:
                self._columns[prompt] = torch.cat([self._columns[prompt], parents.new_tensor([n])])

    def rewrite(self, prompt: int, answer: Int[Tensor, "K n"]) -> Float[Tensor, "K V"]:
        """Takes a prompt back to other, shorter answers; returns the logits after them.

        Its cache is cropped to the prompt, which all its beams share, and the answers run in one
        pass. There must be no candidates in the cache.
        """
        own, n, count = self._own(prompt), self._length, answer.shape[1]
        tokens = self._ids[:, -1:].repeat(1, count)  # the other prompts' rows do not matter
        tokens[own] = answer
        order = torch.arange(count, device=tokens.device)
        begin = self._ids.shape[1]
        self._columns[prompt] = self._columns[prompt][:0]
        causal = order[:, None] >= order
        position = self._position(order[None].expand(self.rows, -1), from_start=True)
        z = self._pass(tokens, causal, position)[own, -1]
        self._columns[prompt] = begin + order
        ends = [int(columns[-1]) for columns in self._columns if len(columns)]
        self._length = max(ends, default=begin - 1) + 1
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                x = getattr(layer, name)
                x[own, :, begin : begin + count] = x[own, :, n:].clone()
                setattr(layer, name, x[:, :, : self._length])
        return z

    def _pass(self, tokens: Tensor, among: Tensor, positions: Tensor) -> Float[Tensor, "rows C V"]:
        """One pass behind the cache; ``among`` [C, C] says which new tokens see one another."""
        reference = self._cache.layers[0].keys
        closed = torch.finfo(reference.dtype).min
        real = self._session.layout.real
        seen = torch.zeros(self.rows, self._length, dtype=torch.bool, device=tokens.device)
        seen[:, : real.shape[1]] = real
        for prompt, columns in enumerate(self._columns):
            seen[self._own(prompt), columns[:, None]] = True
        mask = torch.cat(
            [
                seen[:, None, None].expand(-1, -1, tokens.shape[1], -1),
                among.expand(self.rows, 1, -1, -1),
            ],
            dim=-1,
        )
        additive = torch.zeros_like(mask, dtype=reference.dtype).masked_fill(~mask, closed)
        self._session.wanted.parallel = True
        try:
            output = self._model(
                input_ids=tokens,
                attention_mask=additive,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
            )
        finally:
            self._session.wanted.parallel = False
        logits: Tensor = output.logits
        return logits.float()

    def _position(self, offset: Tensor, *, from_start: bool = False) -> Tensor:
        """Position ids [..., rows, C] of new tokens; ``offset`` is added to each row's next one."""
        if from_start:
            return self._next + offset
        lengths = [len(columns) for columns in self._columns]
        done = torch.tensor(lengths, device=self._ids.device).repeat_interleave(self.beams)
        return self._next + done[:, None] + offset

    def _first_answer_position(self) -> Tensor:
        """Position ids [..., rows, 1] that follow the prompt's; every axis of its own."""
        positions = self._session.prompt_positions()
        if positions is None:
            raise LayoutError(
                "The model made its position ids by itself, so a search cannot go on from them.",
                advice="Pass the processor's input_ids and attention_mask.",
            )
        last = positions.amax(-1, keepdim=True) + 1
        if last.ndim == 3:  # text goes on from the largest of the picture's three axes
            axes = last[-3:].amax(0, keepdim=True).expand(3, -1, -1)
            last = torch.cat([last[:-3], axes])
        return last

    def _own(self, prompt: int) -> slice:
        return slice(prompt * self.beams, (prompt + 1) * self.beams)

    # ---- steps ---------------------------------------------------------------------------------

    def columns(self, prompt: int) -> Int[Tensor, "n"]:
        """The cache's columns that hold a prompt's answer so far, in order."""
        return self._columns[prompt]

    @property
    def width(self) -> int:
        """Columns of the cache without candidates."""
        return self._length

    def advance(
        self, beams: Mapping[int, Beams], log_probs: Mapping[int, Float[Tensor, "K V"]]
    ) -> dict[int, Choice]:
        """One beam-search step of some prompts, after the call's own processors.

        Args:
            beams: The beams of each prompt.
            log_probs: Scores of their next tokens.
        """
        scores: dict[int, Tensor] = {}
        lengths: dict[int, list[int]] = {}
        for prompt, own in beams.items():
            lengths.setdefault(own.length, []).append(prompt)
        for prompts in lengths.values():
            scores.update(self._processed(prompts, beams, log_probs))
        return {
            prompt: own.advance(self._model, self._config, self._criteria, scores[prompt])
            for prompt, own in beams.items()
        }

    def _processed(
        self, prompts: list[int], beams: Mapping[int, Beams], log_probs: Mapping[int, Tensor]
    ) -> dict[int, Tensor]:
        """Scores of prompts of one length after the processors.

        Processors know the call's rows by number, so they get all of them; those of prompts that
        have ended or stand elsewhere are copies, and what becomes of them is not read.
        """
        standing = [b if b in prompts else prompts[0] for b in range(self.prompts)]
        ids = torch.cat([beams[b].ids for b in standing])
        scores = self._processors(ids, torch.cat([log_probs[b] for b in standing]))
        return {prompt: scores[self._own(prompt)] for prompt in prompts}

    def result(self, ended: list[Beams]) -> Any:
        """What ``generate`` returns: the best sequences of every prompt."""
        wanted = self._config.num_return_sequences
        sequences: Any = torch.cat([beams.done[0, :wanted] for beams in ended])
        origins = torch.cat([beams.done_origins[0, :wanted] for beams in ended])
        longest = int((origins >= 0).sum(-1).max())
        sequences = sequences[:, : self._ids.shape[1] + longest]
        if not self._config.return_dict_in_generate:
            return sequences
        scores = torch.cat([beams.done_scores[0, :wanted] for beams in ended])
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences,
            sequences_scores=scores if self._config.output_scores else None,
        )
