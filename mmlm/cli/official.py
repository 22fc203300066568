"""Official files for a benchmark: what the user gave, else what ``mmlm data fetch`` has brought."""

from __future__ import annotations

from pathlib import Path

from mmlm.errors import InputError

__all__ = ["given_or_official"]


def given_or_official(option: str, given: Path | None, name: str) -> Path:
    """The files that a benchmark reads.

    Args:
        option: Name of the option by which a user gives a local copy, for messages.
        given: What was given.
        name: Name of the official files, as in ``mmlm data list``.

    Raises:
        InputError: If they are nowhere; says what to download, from where, and where it goes.
    """
    from benchmarks.official import instructions, locate

    if given is None:
        try:
            return locate(name)
        except InputError as error:
            raise InputError(
                f"--{option} is missing. {error}", advice=f"{error.advice} Or give --{option}."
            ) from error
    if not given.exists():
        raise InputError(
            f"--{option} {str(given)!r} does not exist.",
            advice=f"Check the path. {instructions(name)}",
        )
    return given
