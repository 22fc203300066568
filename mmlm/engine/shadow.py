"""Replaces a method of one object for a while; other objects of its class stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

__all__ = ["shadow"]


def shadow(
    owner: Any,
    name: str,
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]],
    stack: ExitStack,
) -> None:
    """Puts ``wrap(method)`` in the place of a method until ``stack`` is closed.

    Args:
        owner: The object.
        name: Of its method; another attachment may have replaced it already.
        wrap: Gets the method as it is now.
        stack: Takes the replacement back on exit.
    """
    before, original = vars(owner).get(name), getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrap(original)))
    if before is None:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, before)
