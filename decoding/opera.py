"""OPERA: over-trust penalty and retrospection-allocation.

Paper: "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty
and Retrospection-Allocation", Huang et al., CVPR 2024, arXiv 2311.17911.
Sources read: the paper and the authors' repository shikiw/OPERA for its constants and for what it
does differently from the paper; no code is copied.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.beams import Beams, Choice
from mmlm.engine.method import Cost, Method, Paper, Prompt, Rows
from mmlm.engine.search import Search

__all__ = [
    "OPERA",
    "candidate_scores",
    "column_scores",
    "most_common",
    "over_trust",
    "strongest_head",
]

_UNIT = math.log(1e-7)  # the authors' factor of every column score
_EARLY = 10  # answer tokens that are judged by their look at the image, and never gone back to
_OUTSIDE = 999.0  # how far tokens outside the candidate set rank behind it (authors' code)


def strongest_head(a: Float[Tensor, "B H R K"]) -> Float[Tensor, "B R K"]:
    """The largest weight over the heads for every key, renormalised over all keys."""
    top = a.amax(1)
    return top / top.sum(-1, keepdim=True)


def column_scores(
    log_phi: Float[Tensor, "K n"], w: Float[Tensor, "K C n1"], scale: float
) -> Float[Tensor, "K C n1"]:
    """``log prod_i (scale * w_ij)`` of each answer column j, with one more row i (Eq. 5).

    Args:
        log_phi: The same of the rows so far, for their ``n`` columns.
        w: Weights of each candidate's row on the answer so far and on itself, ``n + 1`` columns.
        scale: The factor sigma.
    """
    before = functional.pad(log_phi, (0, 1))[:, None]
    return before + (scale * w).log()


def over_trust(log_phi: Float[Tensor, "K C n"]) -> tuple[Float[Tensor, "K C"], Int[Tensor, "K C"]]:
    """The largest column score of each candidate and the column that has it (Eq. 6)."""
    best = log_phi.max(-1)
    # Products of many large weights leave the range of any float; a huge penalty says the same.
    return (best.values + _UNIT).exp().clamp(max=1e30), best.indices


def candidate_scores(
    z: Float[Tensor, "K V"],
    tokens: Int[Tensor, "K C"],
    penalty: Float[Tensor, "K C"],
) -> Float[Tensor, "K V"]:
    """Log-probabilities of the next token over the candidates, penalised (Eq. 7).

    Args:
        z: Raw logits.
        tokens: Candidates of each beam.
        penalty: What is subtracted from their logits.
    """
    chosen = (z.gather(1, tokens) - penalty).log_softmax(-1)
    outside = z - z.amax(-1, keepdim=True) - _OUTSIDE
    return outside.scatter(1, tokens, chosen)


def most_common(x: Int[Tensor, "*rows n"]) -> Int[Tensor, "*rows"]:
    """The most common value of each row; the smallest of several."""
    count = (x[..., :, None] == x[..., None, :]).sum(-1)
    often = count == count.amax(-1, keepdim=True)
    return x.masked_fill(~often, torch.iinfo(x.dtype).max).amin(-1)


@dataclass
class _State:
    """What is kept for one prompt batch; ``rows`` are filled while a search looks ahead."""

    visual: Tensor
    looking: bool = False
    rows: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class _Step:
    """One prompt before one of its tokens was chosen; what a rollback brings back.

    Attributes:
        beams: The beams.
        log_phi: fp32 [K, n]; log column scores of the answer's n tokens, without the unit.
        history: int64 [K, n + 1]; where the largest score was, in this step and each before.
        chosen: Beam and token, as one number, of what was chosen; set afterwards.
        rejected: The same of what was chosen here before a rollback.
    """

    beams: Beams
    log_phi: Tensor
    history: Tensor
    chosen: Tensor | None = None
    rejected: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class _Track:
    """One prompt's way through the search."""

    beams: Beams
    has_image: bool
    log_phi: Tensor
    history: Tensor
    steps: list[_Step] = field(default_factory=list)
    dropped: int = 0  # steps that have left the window
    tries: Counter[int] = field(default_factory=Counter)
    over: bool = False

    @property
    def step(self) -> int:
        """Tokens in the answer so far."""
        return self.beams.length - self.beams.prompt


@dataclass(frozen=True)
class _Ahead:
    """What looking at candidates gave: logits [rows, C, V] and attention [rows, C, K]."""

    tokens: Tensor
    logits: Tensor
    attention: Tensor


@dataclass(frozen=True, kw_only=True)
class OPERA(Method):
    """Penalises beams that lean on one summary token, and goes back if all do.

    Idea:
        Before a hallucination, attention gathers in one column: the model continues its own
        summary instead of looking at the image. Beam search looks one token ahead, penalises
        candidates with such a column, and where all beams have agreed on a column for long goes
        back behind it and chooses anew.
    Paper:
        "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust
        Penalty and Retrospection-Allocation", arXiv 2311.17911, CVPR 2024.
    Equations:
        With w the last layer's weights, largest over the heads, renormalised
        (:func:`strongest_head`), times sigma, from the answer's first token on:
        (5) ``phi_j = 1e-7 * prod over rows i >= j of w_ij``: :func:`column_scores`.
        (6) the penalty is ``max over j of phi_j``: :func:`over_trust`; for the first 10 tokens it
        is minus the candidate's weight on the image.
        (7) ``log softmax (z - penalty)`` over the candidates: :func:`candidate_scores`.
        (8) positions of the maximum, and how often they agree: :func:`most_common`.
    Acts at:
        ``search`` and ``weights`` of the last layer (only looks), decode.
    Cost:
        Beam search's rows, and ``candidates`` positions instead of one per beam and token, in one
        forward pass over one cache; a candidate that is chosen is not run again. A rollback runs
        the answer so far once more. Memory: the cache grows by ``candidates`` columns, and up to
        ``window`` earlier states of the beams are kept, without cache and logits.
    Parameters:
        num_beams: Beams, >= 2. Default 5 (paper).
        candidates: Next tokens each beam looks at, and the most rollbacks to one position, >= 1.
            Default 5 (paper).
        penalty: Weight of the penalty, >= 0. Default 1.0 (paper). At 0 everything is off: plain
            beam search. Neutral 0.
        scale: Factor sigma of the attention weights, > 0. Default 50 (paper).
        threshold: Rollback if every beam has had one position more than this often, >= 1.
            Default 15 (paper; the authors' fast setting has 25).
        window: How many tokens back a rollback may go, >= 1. Default 512 (authors' code).
        history_follows_beams: Whether a beam's history is that of the beams it goes on from.
            Default True (ours); the authors' code leaves the history in place while beams move.
    Shapes:
        rows = prompts * K beams, C candidates, n answer tokens, H heads, V vocabulary.
    State:
        Per prompt: log column scores, history of positions, up to ``window`` earlier steps.
    Differs:
        The authors' code runs candidates one after another with whole attention matrices, one
        prompt at a time, keeps half precision products that overflow, and after a rollback runs
        the whole prompt again. Here candidates share a pass, prompts a batch, products are sums of
        logarithms, and the cache is cropped to the prompt.
        Where fewer tokens than beams are candidates, others rank by their logits behind them; the
        authors give them all the same score.
        What was rejected at a position is forgotten when the search goes back to an earlier one.
        After a rollback tokens are chosen from the whole vocabulary, as in the authors' code; the
        paper chooses among the other candidates.
        Prompts without an image get plain beam search.
    Limits:
        Caches that keep every position: no sliding windows, no static caches. Attention kernels
        that take a mask: no flash attention. No sampling; a streamer gets the answer at its end.
        Not with methods on logits, auxiliary branches or removed tokens.

    Raises:
        ValueError: for a parameter out of range.
        UnsupportedModel: for a model with sliding windows or flash attention.
        IncompatibleMethods: with such a method, or for arguments of ``generate`` that a search
            cannot honour.

    Example:
        with OPERA()(model):
            ids = model.generate(**inputs, max_new_tokens=512)
    """

    paper: ClassVar[Paper] = Paper(
        title="OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via "
        "Over-Trust Penalty and Retrospection-Allocation",
        arxiv="2311.17911",
        year=2024,
        venue="CVPR 2024",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"weights"})

    num_beams: int = 5
    candidates: int = 5
    penalty: float = 1.0
    scale: float = 50.0
    threshold: int = 15
    window: int = 512
    history_follows_beams: bool = True

    def __post_init__(self) -> None:
        self._check_integer("num_beams", at_least=2)
        for name in ("candidates", "threshold", "window"):
            self._check_integer(name, at_least=1)
        self._check_number("penalty", at_least=0)
        self._check_number("scale", above=0)
        self._check_choice("history_follows_beams", (True, False))

    @classmethod
    def fast(cls) -> OPERA:
        """The authors' fast setting: threshold 25, one candidate."""
        return cls(threshold=25, candidates=1)

    @classmethod
    def authors_code(cls) -> OPERA:
        """What the authors' code computes where it can be told from the paper."""
        return cls(history_follows_beams=False)

    def neutral(self) -> OPERA:
        """No penalty: plain beam search."""
        return type(self)(num_beams=self.num_beams, penalty=0.0)

    @property
    def beams(self) -> int:
        """Beams of the search."""
        return self.num_beams

    @property
    def rows(self) -> Rows:
        """The newest row; while candidates are looked at, each of them is one."""
        return "last"

    @property
    def cost(self) -> Cost:
        """Rows beyond greedy decoding: beams, and their candidates as far as they are looked at."""
        if self.penalty == 0:
            return Cost(prompt=self.num_beams - 1, token=self.num_beams - 1)
        seen = self.num_beams * self.candidates
        # The first token has candidates too, so one more look than decoding steps.
        return Cost(prompt=self.num_beams - 1 + seen, token=seen - 1)

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The last layer."""
        return self.penalty > 0 and layer == anatomy.n_layers - 1

    def acts_now(self, state: _State | None, layer: int) -> bool:
        """While candidates are looked at."""
        return state is not None and state.looking

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Sliding windows and kernels without masks."""
        reasons = []
        config: Any = anatomy.text.config
        kinds = set(getattr(config, "layer_types", None) or ())
        if any("sliding" in kind or "chunked" in kind for kind in kinds):
            reasons.append("its layers with a sliding window cannot take tokens back")
        if "flash" in str(config._attn_implementation):
            reasons.append(
                f"{config._attn_implementation} takes no mask, which candidates side by side need; "
                "load it with attn_implementation='sdpa'"
            )
        return reasons

    def begin(self, prompt: Prompt) -> _State:
        """Notes where the image is."""
        return _State(visual=prompt.layout.visual)

    def weights(
        self,
        state: _State | None,
        layer: int,
        rows: Int[Tensor, "B R"],
        a: Float[Tensor, "B H R K"],
    ) -> None:
        """Notes the rows of the candidates."""
        if state is not None and state.looking:
            state.rows.append(strongest_head(a))

    def search(self, run: Search) -> Any:
        """Beam search with penalised candidates and rollback."""
        return run.plain() if self.penalty == 0 else _Loop(self, run).go()


class _Loop:
    """One call's search: what :class:`OPERA` does token by token."""

    def __init__(self, method: OPERA, run: Search) -> None:
        self.method = method
        self.run = run
        self.tracks: list[_Track] = []

    def go(self) -> Any:
        """Runs until every prompt has ended."""
        z = self.run.prefill()
        device = z.device
        for number, shown in enumerate(self.run.has_image):
            nothing = torch.zeros(self.run.beams, 0, device=device)
            beams = self.run.start(number)
            self.tracks.append(_Track(beams, shown, log_phi=nothing, history=nothing.long()))
        while not all(track.over for track in self.tracks):
            z = self._token(z)
        return self.run.result([track.beams for track in self.tracks])

    def _token(self, z: Float[Tensor, "rows V"]) -> Float[Tensor, "rows V"]:
        """One token for every prompt that goes on; returns the logits of the next."""
        ahead = self._look(z.topk(min(self.method.candidates, z.shape[-1])).indices)
        live = [b for b, track in enumerate(self.tracks) if not track.over]
        grown = {b: self._grown(b, ahead) for b in live if self.tracks[b].has_image}
        back = self._returns(grown)
        going = [b for b in live if b not in back]
        choices = self._choose({b: self._scores(b, z, ahead, grown.get(b)) for b in going})
        z, late = self._follow(choices, ahead, grown)
        for b, position in back.items():
            choices[b] = self._go_back(b, position)
        return self._catch_up(z, choices, back, [*late, *back])

    def _look(self, tokens: Int[Tensor, "rows C"]) -> _Ahead:
        state: _State = self.run.state
        state.looking, state.rows = True, []
        try:
            logits = self.run.look(tokens)
        finally:
            state.looking = False
        return _Ahead(tokens, logits, torch.cat(state.rows, dim=1))

    def _own(self, prompt: int) -> slice:
        return slice(prompt * self.run.beams, (prompt + 1) * self.run.beams)

    def _grown(self, prompt: int, ahead: _Ahead) -> Float[Tensor, "K C n1"]:
        """Log column scores of a prompt with each candidate's row added."""
        a = ahead.attention[self._own(prompt)]
        itself = a[..., self.run.width :].diagonal(dim1=-2, dim2=-1)
        w = torch.cat([a[..., self.run.columns(prompt)], itself[..., None]], dim=-1)
        return column_scores(self.tracks[prompt].log_phi, w, self.method.scale)

    def _scores(
        self, prompt: int, z: Tensor, ahead: _Ahead, grown: Tensor | None
    ) -> Float[Tensor, "K V"]:
        """Scores of a prompt's next tokens, before the call's processors."""
        own = self._own(prompt)
        if grown is None:
            return z[own].log_softmax(-1)
        if grown.shape[-1] <= _EARLY:
            visual = self.run.state.visual[own, None]
            penalty = -(ahead.attention[own, :, : visual.shape[-1]] * visual).sum(-1)
        else:
            penalty = over_trust(grown)[0]
        return candidate_scores(z[own], ahead.tokens[own], self.method.penalty * penalty)

    def _choose(self, scores: dict[int, Tensor]) -> dict[int, Choice]:
        """One beam-search step of some prompts; what they choose can be rejected later."""
        choices = self.run.advance({b: self.tracks[b].beams for b in scores}, scores)
        for b, choice in choices.items():
            track = self.tracks[b]
            if track.steps:
                track.steps[-1].chosen = choice.parents * scores[b].shape[-1] + choice.tokens
            track.beams = choice.beams
            if self.method.history_follows_beams:
                track.history = track.history[choice.parents]
        return choices

    def _follow(
        self, choices: dict[int, Choice], ahead: _Ahead, grown: dict[int, Tensor]
    ) -> tuple[Float[Tensor, "rows V"], list[int]]:
        """Moves the cache to what was chosen; says which prompts chose outside the candidates."""
        k, rows = self.run.beams, self.run.rows
        parents = torch.arange(rows, device=ahead.tokens.device)
        slots, known = torch.zeros_like(parents), {}
        for b, choice in choices.items():
            match = ahead.tokens[self._own(b)][choice.parents] == choice.tokens[:, None]
            parents[self._own(b)] = choice.parents + b * k
            slots[self._own(b)] = match.long().argmax(-1)
            known[b] = match.any(-1).all()
        late = []
        flags = [torch.stack([known[b], choice.beams.over]) for b, choice in choices.items()]
        for b, (found, over) in zip(
            choices, torch.stack(flags).tolist() if flags else (), strict=True
        ):
            track, choice = self.tracks[b], choices[b]
            track.over = over
            if b in grown and found:
                track.log_phi = grown[b][choice.parents, slots[self._own(b)]]
            else:
                track.log_phi = track.log_phi[choice.parents]
            if not found:
                late.append(b)
        self.run.keep(
            parents, slots, [b in choices and b not in late for b in range(len(self.tracks))]
        )
        return ahead.logits[parents, slots], late

    def _returns(self, grown: dict[int, Tensor]) -> dict[int, int]:
        """Notes where each prompt's scores are largest; says who must go back, and where to."""
        flags = []
        for b, log_phi in grown.items():
            track = self.tracks[b]
            where = most_common(over_trust(log_phi)[1])
            track.history = torch.cat([track.history, where[:, None]], dim=1)
            track.steps.append(_Step(track.beams, track.log_phi, track.history))
            if len(track.steps) > self.method.window:
                del track.steps[0]
                track.dropped += 1
            column = most_common(where)
            often = (track.history == column).sum(-1) > self.method.threshold
            flags.append(torch.stack([often.all().long(), column]))
        back = {}
        for b, (often, column) in zip(
            grown, torch.stack(flags).tolist() if flags else (), strict=True
        ):
            if often and column >= _EARLY:
                position = self._position(self.tracks[b], column)
                if position is not None:
                    back[b] = position
        return back

    def _position(self, track: _Track, column: int) -> int | None:
        """The answer position to choose anew, unless all attempts there are used up."""
        for position in (column + 1, column):
            if track.tries[position] < self.method.candidates:
                track.tries[position] += 1
                return min(max(position, track.dropped), track.step - 1)
        return None

    def _go_back(self, prompt: int, position: int) -> Choice:
        """Takes a prompt back and chooses at ``position`` what was not chosen there before."""
        track = self.tracks[prompt]
        step = track.steps[position - track.dropped]
        del track.steps[position - track.dropped + 1 :]
        if step.chosen is not None:
            step.rejected.append(step.chosen)
        z = self.run.rewrite(prompt, step.beams.answer)
        left = z.flatten().index_fill(0, torch.cat(step.rejected), -math.inf).view_as(z)
        track.beams, track.history = step.beams, step.history
        choice = self._choose({prompt: left.log_softmax(-1)})[prompt]
        track.log_phi = step.log_phi[choice.parents]
        track.over = bool(choice.beams.over)
        return choice

    def _catch_up(
        self,
        z: Float[Tensor, "rows V"],
        choices: dict[int, Choice],
        back: dict[int, int],
        late: list[int],
    ) -> Float[Tensor, "rows V"]:
        """Runs chosen tokens that nobody had looked at."""
        late = [b for b in late if not self.tracks[b].over]
        if not late:
            return z
        k, count = self.run.beams, len(self.tracks)
        here = torch.arange(self.run.rows, device=z.device)
        parents, tokens, still = here.clone(), torch.zeros_like(here), torch.zeros_like(here)
        for b in late:
            tokens[self._own(b)] = choices[b].tokens
            if b in back:  # rewritten in the order of the step it went back to
                parents[self._own(b)] = choices[b].parents + b * k
        if back:
            self.run.keep(parents, still, [False] * count)
        ahead = self._look(tokens[:, None])
        z = z.clone()
        for b in late:
            z[self._own(b)] = ahead.logits[self._own(b), 0]
            if self.tracks[b].has_image:
                self.tracks[b].log_phi = self._grown(b, ahead)[:, 0]
        self.run.keep(here, still, [b in late for b in range(count)])
        return z
