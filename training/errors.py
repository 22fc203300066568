"""Errors of training data that are also the builtin kind a caller may expect."""

from __future__ import annotations

from mmlm.errors import InputError

__all__ = ["ConversationTooLong"]


class ConversationTooLong(InputError, ValueError):
    """A conversation has more tokens than a row may have; says how many, and how many of pictures."""
