"""Model-side methods: those that change which positions a model computes, or need training."""

from mmlm.methods.cls_pruner import ClsPruner
from mmlm.methods.crosslmm import CrossLMM
from mmlm.methods.dara import DARA
from mmlm.methods.dyvte import DyVTE
from mmlm.methods.flowcut import FlowCut
from mmlm.methods.mma import MMA
from mmlm.methods.random_pruner import RandomPruner

__all__ = ["DARA", "MMA", "ClsPruner", "CrossLMM", "DyVTE", "FlowCut", "RandomPruner"]
