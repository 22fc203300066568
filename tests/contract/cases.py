"""Which methods and families the contract matrix covers: every exported method, by itself."""

from __future__ import annotations

import tiny

import mmlm

FAMILIES = tiny.FAMILIES
METHODS = tuple(getattr(mmlm, name) for name in mmlm.method_names())

#: A setting that must change the logits of a random tiny model. Defaults are strong enough for
#: every method so far; a method whose default is too weak names a stronger one here.
STRONG: dict[str, str] = {
    "ACT": "ACT(heads_by_layer=((1, (0, 1, 2, 5)), (2, (3, 4, 5, 6, 7))), beta=0.1, theta=0.03)",
    "DARA": "DARA(layers=(0, 1), images=3, align='query_last', init=3.0)",
    # Tiny pictures have four features in some families.
    "CrossLMM": "CrossLMM(grid=2, gate=1.0)",
    # A fixed exit: routers would have to be trained. Theirs: tests/methods/test_dyvte.py. (An
    # exit after layer 0 would leave nothing to methods that change visual rows only.)
    "DyVTE": "DyVTE(exit_layer=1)",
    "ClsPruner": "ClsPruner(keep=8)",
    "FlowCut": "FlowCut(target=8)",
    "RandomPruner": "RandomPruner(keep=8)",
    "HeadAblation": "HeadAblation(heads_by_layer=((1, (3, 5)), (2, (4, 7))))",
    # The score that every tower without rotary positions can give; test_imbalanced_attention.py
    # runs the whole contract with the default one.
    "ImbalancedAttention": "ImbalancedAttention(tower_score='column_mean')",
    "INTER": "INTER(k=0.0, w=3.0, allow_text_only=True)",
    "M3ID": "M3ID(decay=0.5, first_step=1)",
    # Other heads than those of the methods on heads below: what is pruned cannot be changed.
    "PH3": "PH3(heads_by_layer=((1, (3, 4, 6)), (2, (0, 1, 2))))",
    "SeeingKnowing": "SeeingKnowing(image_change=2.0, memory_change=-2.0, "
    "image_heads=((1, (0, 1)), (2, (3, 4))), memory_heads=((1, (2, 5)), (2, (6, 7))))",
    # Tiny prompts have two dozen tokens.
    "StreamingHeads": "StreamingHeads(sink=1, recent=6, "
    "heads_by_layer=((1, (0, 1, 2, 5)), (2, (3, 4, 5, 6, 7))))",
    "VAR": "VAR(move_fraction=0.9, min_nonsink_ratio=0.0, min_visual_mass=0.0, tau=0.9, "
    "sink_dims=(2, 7), include_last_layer=True)",
    "ZeroTuning": "ZeroTuning(gamma=20.0, heads_by_layer=((1, (0, 1, 2, 5)), (2, (3, 4, 6, 7))))",
}

#: Parameters for which infinity means something: a threshold that nothing reaches.
MAY_BE_INFINITE = {("INTER", "k"), ("DyVTE", "threshold")}


#: Another setting of the first method beside the second, which would have nothing to act on.
BESIDE = {("DyVTE", "MMA"): "DyVTE(exit_layer=2)"}


def strong(cls, beside=None):
    """The method at a setting that visibly changes a tiny random model."""
    name = cls.__name__
    text = STRONG.get(name, name)
    return mmlm.parse_method(BESIDE.get((name, beside and beside.__name__), text))
