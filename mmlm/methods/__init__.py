"""Model-side methods: those that change which positions a model computes, or need training."""

from mmlm.methods.dyvte import DyVTE

__all__ = ["DyVTE"]
