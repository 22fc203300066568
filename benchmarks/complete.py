"""Strict scoring: no number unless every answer was scored and every metric exists.

By default an undefined ratio is shown as such and what was not scored is counted. A script that
publishes numbers may want a refusal instead, as the official scorers crash there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.base import Scored

__all__ = ["require_complete"]


def require_complete(scored: Scored) -> None:
    """Refuses scores with gaps.

    Args:
        scored: The scores of any benchmark.

    Raises:
        InputError: If answers were not plainly scored (failed, missing, unparsed, not judged, as
            far as the benchmark counts them in ``statuses``), or a metric is undefined; names all.
    """
    statuses = getattr(scored, "statuses", {})
    gaps = [f"{count} {name}" for name, count in statuses.items() if count]
    undefined = [name for name, measure in scored.table.measures().items() if measure.undefined]
    if undefined:
        gaps.append(f"undefined: {', '.join(undefined)}")
    if gaps:
        raise InputError(
            f"{scored.name} is not complete: {'; '.join(gaps)}.",
            advice="Finish or repeat the run, or score without --strict to see what there is.",
        )
