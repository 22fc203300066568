"""Constructors that say what was given and what is allowed."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Checked"]


class Checked:
    """Help for dataclasses of parameters: a value out of its range is refused with its name."""

    def _check_number(
        self,
        name: str,
        *,
        above: float = -math.inf,
        at_least: float = -math.inf,
        at_most: float = math.inf,
    ) -> None:
        """Raises ValueError unless the field is a finite number within the bounds."""
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and above < value and at_least <= value <= at_most:
            return
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">", above), (">=", at_least), ("<=", at_most))
            if math.isfinite(bound)
        ]
        allowed = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise ValueError(f"{type(self).__name__}: {name} must be {allowed}, got {value!r}.")

    def _check_integer(self, name: str, *, at_least: int, at_most: int | None = None) -> None:
        """Raises ValueError unless the field is an integer within the bounds."""
        value = getattr(self, name)
        integer = isinstance(value, int) and not isinstance(value, bool)
        if integer and value >= at_least and (at_most is None or value <= at_most):
            return
        upper = "" if at_most is None else f" and <= {at_most}"
        raise ValueError(
            f"{type(self).__name__}: {name} must be an integer >= {at_least}{upper}, got {value!r}."
        )

    def _check_choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Raises ValueError unless the field is one of the allowed values."""
        value = getattr(self, name)
        if value not in allowed:
            options = ", ".join(repr(a) for a in allowed)
            raise ValueError(
                f"{type(self).__name__}: {name} must be one of {options}, got {value!r}."
            )
