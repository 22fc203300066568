"""Errors for people: what was wrong and what to do, as a message on the page; never a traceback."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from mmlm.errors import MmlmError

__all__ = ["friendly", "guarded"]

_LOG = logging.getLogger(__name__)

#: What processors, models and torch raise for a request that they cannot carry out.
_REFUSALS = (OSError, ValueError, RuntimeError)


def friendly(error: Exception) -> gr.Error:
    """An error as the page shows it.

    Args:
        error: What was raised. One of ours keeps its advice; whatever nobody expected is written
            to the log with its traceback.
    """
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, MmlmError):
        advice = error.advice
    elif isinstance(error, _REFUSALS):
        advice = "Change the request and try again."
        _LOG.warning("refused: %s", error, exc_info=error)
    else:
        advice = "This is a bug; the server's log says more."
        _LOG.error("unexpected: %s", error, exc_info=error)
    # Gradio takes messages for HTML, and they may quote what a visitor wrote.
    text = f"{html.escape(str(error) or type(error).__name__)}<br><em>{html.escape(advice)}</em>"
    return gr.Error(text, duration=12, print_exception=False)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an event's function, or generator function, so that its errors are shown to people."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                raise friendly(error) from error

        return steps

    @functools.wraps(function)
    def once(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise friendly(error) from error

    return once
