"""OPERA: hand-computed examples, a reference that looks at candidates one by one, settings, errors.

The reference recomputes everything at every step: no cache, one beam and one candidate at a time,
whole attention matrices of an eager model, plain Python lists for beams and history.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field, replace

import cases
import checks
import pytest
import tiny
import torch

import mmlm
from decoding.opera import (
    OPERA,
    candidate_scores,
    column_scores,
    most_common,
    over_trust,
    strongest_head,
)
from decoding.vhr import VHR
from mmlm import attach
from mmlm.engine.search import Search
from mmlm.errors import IncompatibleMethods, UnsupportedModel

END = 3
FAMILIES = [f for f in tiny.FAMILIES if not mmlm.Anatomy(tiny.shared(f)[0]).supports(OPERA())]

#: Small numbers with which tiny models go back within twenty-odd tokens.
QUICK = OPERA(num_beams=3, candidates=3, threshold=1, scale=30.0)


# ---- the equations, by hand ----


def test_strongest_head_by_hand():
    # Two heads over three keys: the larger weights are .5 .3 .6, their sum 1.4.
    a = torch.tensor([[[[0.5, 0.3, 0.2]], [[0.2, 0.2, 0.6]]]])
    expected = torch.tensor([[[0.5 / 1.4, 0.3 / 1.4, 0.6 / 1.4]]])
    torch.testing.assert_close(strongest_head(a), expected)


def test_column_scores_by_hand():
    # One beam, sigma 2, two answer rows so far: [.5] and [.1, .4]; a candidate's row [.2, .3, .5].
    # Products down the columns: 1 * .2 * .4 = .08, .8 * .6 = .48, and 1 for its own.
    log_phi = torch.zeros(1, 0)
    for row in ([0.5], [0.1, 0.4], [0.2, 0.3, 0.5]):
        log_phi = column_scores(log_phi, torch.tensor([[row]]), 2.0)[:, 0]
    torch.testing.assert_close(log_phi.exp(), torch.tensor([[0.08, 0.48, 1.0]]))
    penalty, where = over_trust(log_phi[:, None])
    assert where.tolist() == [[2]]
    assert penalty.item() == pytest.approx(1e-7)


def test_penalties_beyond_any_float_stay_finite():
    penalty, _ = over_trust(torch.tensor([[[500.0, 2.0], [400.0, 3.0]]]))
    assert bool(penalty.isfinite().all())


def test_candidate_scores_by_hand():
    # z = [3, 2, 1], candidates 0 and 1, penalties 2 and 0: 1 against 2, so p = 1/(1+e), e/(1+e).
    z = torch.tensor([[3.0, 2.0, 1.0]])
    scores = candidate_scores(z, torch.tensor([[0, 1]]), torch.tensor([[2.0, 0.0]]))
    p = 1 / (1 + math.e)
    torch.testing.assert_close(scores[0, :2].exp(), torch.tensor([p, 1 - p]))
    assert scores[0, 2].item() == pytest.approx(1 - 3 - 999)


def test_most_common_takes_the_smallest_of_several():
    x = torch.tensor([[4, 2, 2, 4, 1], [7, 7, 3, 3, 3], [5, 5, 5, 5, 5]])
    assert most_common(x).tolist() == [2, 3, 5]


# ---- a naive reference ----


@dataclass
class Beam:
    tokens: list[int]
    score: float
    history: list[int] = field(default_factory=list)


@dataclass
class Reference:
    """OPERA for one prompt, from its description."""

    model: torch.nn.Module
    inputs: dict
    method: OPERA
    new: int
    endless: bool = False
    returns: int = 0
    seen: dict = field(default_factory=dict)

    def whole(self, answer):
        """Last logits and the last layer's attention [H, L, L], recomputed from pixels."""
        key = tuple(answer)
        if key not in self.seen:
            more = dict(self.inputs)
            ids = more["input_ids"]
            tail = ids.new_tensor([answer])
            more["input_ids"] = torch.cat([ids, tail], dim=1)
            for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
                if name in more:
                    value = 1 if name == "attention_mask" else 0
                    more[name] = torch.cat([more[name], torch.full_like(tail, value)], dim=1)
            out = self.model(**more, use_cache=False, output_attentions=True)
            self.seen[key] = out.logits[0, -1].float(), out.attentions[-1][0].float()
        return self.seen[key]

    def judged(self, answer, token):
        """Penalty and rollback position of one candidate, from the whole square."""
        attention = self.whole([*answer, token])[1]
        top = attention.max(dim=0).values
        top = top / top.sum(-1, keepdim=True)
        start = self.inputs["input_ids"].shape[1]
        square = top[start:, start:] * self.method.scale
        n = len(square)
        columns = [1e-7 * math.prod(square[i, j].item() for i in range(j, n)) for j in range(n)]
        where = max(range(n), key=lambda j: columns[j])
        if n <= 10:
            visual = mmlm.Anatomy(self.model).image_ids
            image = torch.isin(self.inputs["input_ids"][0], torch.tensor(visual))
            return -top[-1, :start][image].sum().item(), where
        return columns[where], where

    def run(self):
        k, c = self.method.num_beams, self.method.candidates
        beams = [Beam([], 0.0 if b == 0 else -1e9) for b in range(k)]
        records, tries, done = [], {}, []
        while True:
            n = len(beams[0].tokens)
            rows, places = [], []
            for beam in beams:
                z = self.whole(beam.tokens)[0]
                tokens = z.topk(c).indices.tolist()
                judged = [self.judged(beam.tokens, t) for t in tokens]
                places.append(mode([where for _, where in judged]))
                row = z - z.max() - 999
                both = zip(tokens, judged, strict=True)
                penalised = [z[t] - self.method.penalty * p for t, (p, _) in both]
                row[tokens] = torch.stack(penalised).log_softmax(-1)
                rows.append(row)
            met = zip(beams, places, strict=True)
            beams = [Beam(b.tokens, b.score, [*b.history, w]) for b, w in met]
            records.append({"beams": beams, "rejected": set(), "chosen": set()})
            place = mode(places)
            agreed = all(b.history.count(place) > self.method.threshold for b in beams)
            back = self.position(place, tries) if agreed and place >= 10 else None
            if back is not None:
                self.returns += 1
                del records[back + 1 :]
                record = records[back]
                record["rejected"] |= record["chosen"]
                beams, n, rows = record["beams"], back, []
                for b, beam in enumerate(beams):
                    z = self.whole(beam.tokens)[0].clone()
                    z[[t for parent, t in record["rejected"] if parent == b]] = -math.inf
                    rows.append(z)
                rows = [row.log_softmax(-1) for row in rows]
            if self.endless:
                for row in rows:
                    row[END] = -math.inf
            summed = torch.stack([rows[b] + beam.score for b, beam in enumerate(beams)])
            best = summed.flatten().topk(2 * k).indices.tolist()
            kept = [(summed.flatten()[i].item(), *divmod(i, summed.shape[1])) for i in best]
            running = []
            for rank, (score, parent, token) in enumerate(kept):
                answer = [*beams[parent].tokens, token]
                if token == END or len(answer) == self.new:
                    if rank < k:
                        done = sorted([*done, (score / len(answer), answer)], reverse=True)[:k]
                elif len(running) < k:
                    source = parent if self.method.history_follows_beams else len(running)
                    running.append((Beam(answer, score, beams[source].history), parent, token))
            records[-1]["chosen"] = {(parent, token) for _, parent, token in running}
            if not running:
                return done[0]
            beams = [beam for beam, _, _ in running]
            if len(done) == k and beams[0].score / (n + 1) <= done[-1][0]:
                return done[0]

    def position(self, place, tries):
        for position in (place + 1, place):
            if tries.get(position, 0) < self.method.candidates:
                tries[position] = tries.get(position, 0) + 1
                return position
        return None


def mode(values):
    return min(set(values), key=lambda v: (-values.count(v), v))


def one(processor, row=0):
    pictures = [tiny.picture(1), tiny.picture(2, (90, 60))]
    return tiny.inputs(processor, checks.PROMPTS[row : row + 1], [[pictures[row]]])


def answers(model, inputs, method, new, **options):
    """Tokens and scores of the best answers."""
    with attach(model, method):
        result = model.generate(
            **inputs,
            max_new_tokens=new,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    return result.sequences[:, inputs["input_ids"].shape[1] :], result.sequences_scores


@pytest.fixture
def rewrites(monkeypatch):
    """The prompts that were taken back, and to which length."""
    seen, original = [], Search.rewrite

    def rewrite(self, prompt, answer):
        seen.append((prompt, answer.shape[1]))
        return original(self, prompt, answer)

    monkeypatch.setattr(Search, "rewrite", rewrite)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_acceptance_3_equals_the_uncached_reference(family):
    model, processor = tiny.build(family)
    inputs = one(processor)
    tokens, scores = answers(model, inputs, QUICK, 13)
    model.set_attn_implementation("eager")
    score, expected = Reference(model, inputs, QUICK, 13).run()
    assert tokens[0].tolist() == expected
    assert scores.item() == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("method", [QUICK, replace(QUICK, history_follows_beams=False)], ids=repr)
@torch.no_grad()
def test_acceptance_3_equals_the_uncached_reference_with_rollbacks(method, rewrites):
    model, processor = tiny.build("llava", seed=2)
    inputs = one(processor)
    tokens, scores = answers(model, inputs, method, 22, suppress_tokens=[END])
    model.set_attn_implementation("eager")
    reference = Reference(model, inputs, method, 22, endless=True)
    score, expected = reference.run()
    assert reference.returns == len(rewrites) > 0
    assert tokens[0].tolist() == expected
    assert scores.item() == pytest.approx(score, abs=1e-4)


# ---- common acceptance tests, by number ----


@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_1_identity(family):
    checks.neutral_is_plain(OPERA(), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_2_padded_batch_equals_single_runs(family):
    checks.batch_equals_single_rows(QUICK, family)


@torch.no_grad()
def test_acceptance_2_prompts_of_a_batch_go_back_by_themselves(rewrites):
    model, processor = tiny.build("llava", seed=2)
    options = {"suppress_tokens": [END]}
    alone = [answers(model, one(processor, row), QUICK, 22, **options) for row in (0, 1)]
    single = list(rewrites)
    rewrites.clear()
    tokens, scores = answers(model, checks.batch(processor), QUICK, 22, **options)
    assert {prompt for prompt, _ in rewrites} == {0}
    assert rewrites == single
    for row, (expected, score) in enumerate(alone):
        assert torch.equal(tokens[row], expected[0])
        torch.testing.assert_close(scores[row], score[0], atol=1e-4, rtol=0)


@functools.cache
def every_token(family):
    """Every token a candidate and no penalty to speak of: beam search in OPERA's own loop."""
    words = mmlm.Anatomy(tiny.shared(family)[0]).head.weight.shape[0]
    return OPERA(num_beams=3, candidates=words, penalty=1e-35, threshold=10**6)


@pytest.mark.parametrize(
    ("seed", "options"),
    [(0, {}), (1, {"length_penalty": 2.0}), (2, {"early_stopping": True})],
    ids=str,
)
@torch.no_grad()
def test_acceptance_4_beams_end_and_are_weighed_as_in_plain_beam_search(seed, options):
    model, processor = tiny.build("llava", seed=seed)
    inputs = checks.batch(processor)
    more = {**options, "max_new_tokens": 8, "eos_token_id": [3, *range(40, 90)]}
    expected = model.generate(**inputs, num_beams=3, **more)
    with attach(model, every_token("llava")):
        assert torch.equal(model.generate(**inputs, **more), expected)
    with attach(model, every_token("llava")):
        many = model.generate(**inputs, num_return_sequences=2, **more)
    assert torch.equal(many, model.generate(**inputs, num_beams=3, num_return_sequences=2, **more))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_acceptance_4_own_loop_equals_plain_beam_search(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    processors = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_new_tokens": 5}
    expected = model.generate(**inputs, num_beams=3, **processors)
    with attach(model, every_token(family)):
        assert torch.equal(model.generate(**inputs, **processors), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_5_rows_are_counted(family):
    checks.counted_cost(OPERA(), family)
    checks.counted_cost(OPERA().neutral(), family)


@pytest.mark.parametrize("name", ["VHR", "ImbalancedAttention", "ACT", "ZeroTuning"])
@torch.no_grad()
def test_acceptance_6_beside_a_method_that_acts_in_the_layers(name):
    """Beam search in OPERA's loop under the other method equals plain beams under it."""
    model, processor = tiny.build("llava", seed=1)
    inputs, other = checks.batch(processor), cases.strong(getattr(mmlm, name))
    with attach(model, other):
        expected = checks.generate(model, inputs, do_sample=False, num_beams=3)
    with attach(model, other, every_token("llava")):
        ours = checks.generate(model, inputs, do_sample=False)
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, checks.generate(model, inputs, do_sample=False, num_beams=3))


@torch.no_grad()
def test_acceptance_6_vhr_goes_on_after_a_rollback(rewrites):
    """What is run again has reinforced heads too: a batch equals single runs."""
    model, processor = tiny.build("llava", seed=2)
    options = {"max_new_tokens": 22, "suppress_tokens": [END]}
    with attach(model, VHR(alpha=1.01), QUICK):
        together = model.generate(**checks.batch(processor), **options)
        assert rewrites
        alone = model.generate(**one(processor), **options)
    assert torch.equal(together[0, -22:], alone[0, -22:])


@pytest.mark.parametrize("family", FAMILIES)
def test_acceptance_7_nothing_remains(family):
    checks.leaves_no_trace(QUICK, family)


# ---- differs, presets, errors ----


@torch.no_grad()
def test_more_beams_than_candidates_rank_others_by_their_logits():
    model, processor = tiny.shared("llava")
    inputs = one(processor)
    method = OPERA(num_beams=4, candidates=1, penalty=0.5)
    _, scores = answers(model, inputs, method, 3, num_return_sequences=4, min_new_tokens=3)
    best, *others = scores.tolist()
    assert best > -50  # a single candidate has probability one at every step
    assert all(-999 < score < -100 for score in others)
    assert len(set(others)) == 3


@torch.no_grad()
def test_a_rollback_never_leaves_the_window(rewrites):
    model, processor = tiny.build("llava", seed=2)
    narrow = replace(QUICK, window=2)
    answers(model, one(processor), narrow, 22, suppress_tokens=[END])
    assert rewrites
    assert all(length >= 10 for _, length in rewrites)


@torch.no_grad()
def test_prompts_without_an_image_get_plain_beam_search():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, checks.PROMPTS, [[tiny.picture(1)], []])
    expected = checks.generate(model, inputs, num_beams=5)
    with attach(model, OPERA(penalty=100.0)):
        ours = checks.generate(model, inputs)
    assert torch.equal(ours[1], expected[1])


def test_presets():
    assert OPERA.fast() == OPERA(threshold=25, candidates=1)
    assert OPERA.authors_code() == OPERA(history_follows_beams=False)
    assert OPERA().neutral().penalty == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 1}, "num_beams must be an integer >= 2, got 1"),
        ({"candidates": 0}, "candidates must be an integer >= 1, got 0"),
        ({"penalty": -1.0}, "penalty must be a finite number >= 0, got -1.0"),
        ({"scale": 0}, "scale must be a finite number > 0, got 0"),
        ({"threshold": 2.5}, "threshold must be an integer >= 1, got 2.5"),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"history_follows_beams": 2}, "history_follows_beams must be one of True, False, got 2"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OPERA(**arguments)


def test_sliding_windows_are_refused():
    model, _ = tiny.build("gemma3")
    with pytest.raises(UnsupportedModel, match="sliding window"), attach(model, OPERA()):
        pass


def test_a_kernel_without_masks_is_refused(monkeypatch):
    model, _ = tiny.build("llava")
    monkeypatch.setattr(model.get_decoder().config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(UnsupportedModel, match="takes no mask"), attach(model, OPERA()):
        pass


@pytest.mark.parametrize("name", ["VCD", "DoLa", "VAR"])
def test_methods_that_cannot_share_a_search_are_refused_by_name(name):
    model, processor = tiny.shared("llava")
    other = cases.strong(getattr(mmlm, name))
    with (
        pytest.raises(IncompatibleMethods, match=rf"OPERA.*{name}|{name}.*OPERA"),
        attach(model, other, OPERA(), processor=processor),
    ):
        pass
