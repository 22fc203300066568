"""The naive runs that speed is compared with do the method's own maths: the same tokens."""

import pytest
import torch

import mmlm
from benchmarks.naive import NAIVE
from benchmarks.speed_model import Shape, build_model, build_processor, make_task

TOKENS = 6
SEARCH_TOKENS = 14  # OPERA's penalty changes its form after ten
SHAPE = Shape(layers=4, width=64, heads=4, intermediate=96, tower=(3, 32, 2), side=56)
#: Settings that change tokens of a random model.
STRONG = {
    "PAI": ["PAI(alpha=2.0, gamma=1.0)", "PAI(alpha=2.0, gamma=2.0)"],
    "VAR": [
        "VAR(move_fraction=1.0, min_visual_mass=0.01, min_nonsink_ratio=0.1, tau=1.2, "
        "sink_dims=(3, 5))"
    ],
    "ImbalancedAttention": ["ImbalancedAttention(alpha=3.0, beta=2.0)"],
    "INTER": ["INTER(k=0.0, w=5.0)"],
    "M3ID": ["M3ID(decay=1.0)"],
    "VISTA": ["VISTA(strength=2.0, late_weight=0.9)"],
    "ICD": ["ICD(alpha=5.0, prefix='w8 w9 w10')"],
    "VCD": ["VCD(alpha=5.0)"],
    "ACT": ["ACT(theta=0.01, beta=0.0, heads_by_layer=((0, (0, 1, 2, 3)), (2, (0, 2))))"],
    "ZeroTuning": ["ZeroTuning(gamma=50.0, heads_by_layer=((0, (0, 1, 2, 3)), (2, (1, 3))))"],
    # Without rollback, which the naive run leaves out.
    "OPERA": ["OPERA(threshold=1000)", "OPERA(threshold=1000, penalty=9.0, num_beams=3)"],
}


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    model = build_model(SHAPE)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():  # wider than the library's initialisation
        if tensor.ndim > 1:
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.2
    return make_task(model, build_processor(SHAPE), 2, SHAPE.side)


def ours(task, *methods, tokens=TOKENS):
    with mmlm.attach(task.model, *methods, processor=task.processor):
        ids = task.model.generate(**task.inputs, max_new_tokens=tokens, do_sample=False)
    return ids[:, task.inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("text", [t for name in NAIVE for t in STRONG.get(name, [f"{name}()"])])
def test_naive_and_ours_choose_the_same_tokens(text, task):
    method = mmlm.parse_method(text)
    n = SEARCH_TOKENS if "search" in method.sites else TOKENS
    ticks = []
    tokens = NAIVE[type(method).__name__](method, task, n, lambda: ticks.append(1))
    assert len(ticks) == n
    assert tokens.tolist() == ours(task, method, tokens=n).tolist()
    assert tokens.tolist() != ours(task, tokens=n).tolist()  # the method acts at all


def test_naive_runs_leave_the_model_as_it_was(task):
    before = ours(task)
    for name, run in NAIVE.items():
        method = mmlm.parse_method(STRONG.get(name, [f"{name}()"])[0])
        run(method, task, 2, lambda: None)
        assert task.model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(ours(task), before)


def test_every_method_has_a_naive_run():
    # Gains on heads and experiments: nobody's code runs them in a slow way of its own.
    no_way_of_their_own = {"HeadAblation", "PH3", "SeeingKnowing", "StreamingHeads"}
    assert set(NAIVE) == set(mmlm.method_names("decoding")) - no_way_of_their_own
