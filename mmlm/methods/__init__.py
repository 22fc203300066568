"""Model-side methods: those that change which positions a model computes, or need training."""

from mmlm.methods.crosslmm import CrossLMM
from mmlm.methods.dara import DARA
from mmlm.methods.dyvte import DyVTE
from mmlm.methods.mma import MMA

__all__ = ["CrossLMM", "DARA", "DyVTE", "MMA"]
