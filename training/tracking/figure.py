"""The figure of a training, from its log: `python -m training.tracking.figure LOG [FIGURE]`.

Works for a running training too. Without matplotlib (`pip install 'mmlm[track]'`) the figure at
the end is left out, with a message.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmlm.errors import InputError, MmlmError

__all__ = ["Panel", "draw", "main", "read_log", "write_figure"]

# Okabe and Ito's colours, which people with any colour vision tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


@dataclass(frozen=True)
class Panel:
    """One graph of the figure; it is left out if the log has none of its numbers.

    Attributes:
        title: above it.
        train: fields of the training's entries, the first that is there is drawn.
        evaluation: fields of evaluations, by the words of the legend.
        level: a horizontal line: what a guess would reach.
        exact: the numbers are no measurements: no running mean, and no legend.
        unless: a field that makes the graph pointless.
    """

    title: str
    train: tuple[str, ...] = ()
    evaluation: tuple[tuple[str, str], ...] = ()
    level: float | None = None
    exact: bool = False
    unless: str | None = None


PANELS = (
    Panel("Loss", ("loss",), (("eval_loss", "evaluation"),)),
    Panel(
        "Reward margin, chosen minus rejected",
        ("rewards/margins",),
        (("eval_rewards/margins", "evaluation"),),
        level=0.0,
    ),
    Panel(
        "Reward accuracy",
        ("rewards/accuracies",),
        (("eval_rewards/accuracies", "evaluation"),),
        level=0.5,
    ),
    Panel(
        "Token accuracy",
        ("mean_token_accuracy",),
        (("eval_mean_token_accuracy", "evaluation"),),
        unless="rewards/accuracies",
    ),
    Panel("Learning rate", ("learning_rate",), exact=True),
    Panel(
        "Held-out captions",
        (),
        (("eval_chair_i", "CHAIR_i"), ("eval_chair_s", "CHAIR_s"), ("eval_recall", "recall")),
    ),
)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a `log.jsonl`; a last line that is still being written is left out.

    Raises:
        InputError: the file is missing, or is no such log.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise InputError(
            f"the log {str(path)!r} cannot be read: {error.strerror}",
            advice="Give the log.jsonl of a training.",
        ) from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entries.append({"step": entry["step"], **entry})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(
                f"{path}, line {number} is no log entry", advice="Give the log.jsonl of a training."
            ) from error
    return entries


def write_figure(log: Path, path: Path, title: str) -> bool:
    """Draws the figure if there is something to draw and something to draw it with.

    Returns:
        False: exceptions of the training are not held up (see `contextlib.ExitStack.push`).
    """
    if log.exists() and any("loss" in entry for entry in read_log(log)):
        if find_spec("matplotlib") is None:
            print(
                f"{path.name} is not drawn: matplotlib is not installed. pip install "
                f"'mmlm[track]', then python -m training.tracking.figure {log}",
                file=sys.stderr,
            )
        else:
            draw(read_log(log), path, title)
    return False


def draw(entries: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws one graph per kind of number in the log.

    Args:
        entries: of the log.
        path: PNG file, replaced at once.
        title: above the whole.

    Raises:
        InputError: there is nothing to draw.
    """
    panels = [panel for panel in PANELS if _has(entries, panel)]
    if not panels:
        raise InputError("the log has no entry with a loss yet", advice="Wait for log_every steps.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, entries, panel)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for place, axis in enumerate(axes[: len(panels)]):
        if place + columns >= len(panels):
            axis.set_xlabel("optimiser step", fontsize=8)
            axis.tick_params(labelbottom=True)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    scratch = path.with_name(path.name + ".tmp")
    figure.savefig(scratch, format="png")
    scratch.replace(path)


def _has(entries: Sequence[dict[str, Any]], panel: Panel) -> bool:
    fields = {*panel.train, *(name for name, _ in panel.evaluation)}
    found = set().union(*entries)
    return bool(fields & found) and panel.unless not in found


def _points(entries: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    chosen = [entry for entry in entries if name in entry]
    return [entry["step"] for entry in chosen], [entry[name] for entry in chosen]


def _draw_panel(axis: Any, entries: Sequence[dict[str, Any]], panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.grid(color="0.92", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    if panel.level is not None:
        axis.axhline(panel.level, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    for name in panel.train:
        steps, values = _points(entries, name)
        if steps:
            _draw_training(axis, steps, values, smooth=not panel.exact)
            break
    styles = zip((ORANGE, BLUE, GREEN), "osD", strict=True)
    for (name, label), (colour, marker) in zip(panel.evaluation, styles, strict=False):
        steps, values = _points(entries, name)
        if steps:
            axis.plot(
                steps, values, marker=marker, markersize=4.5, linewidth=1.0, color=colour,
                label=label, markeredgecolor="white", markeredgewidth=0.6,
            )  # fmt: skip
    if panel.exact:
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axis.yaxis.get_offset_text().set_fontsize(8)
    else:
        axis.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="best")


def _draw_training(
    axis: Any, steps: Sequence[float], values: Sequence[float], *, smooth: bool
) -> None:
    """Single entries faint, their running mean over a tenth of the training on top."""
    width = len(values) // 20
    if width < 2 or not smooth:
        axis.plot(steps, values, color=BLUE, linewidth=1.4, label="training")
        return
    axis.plot(steps, values, color=BLUE, linewidth=0.7, alpha=0.3)
    means = [
        sum(values[max(0, at - width) : at + width + 1])
        / len(values[max(0, at - width) : at + width + 1])
        for at in range(len(values))
    ]
    axis.plot(steps, means, color=BLUE, linewidth=1.8, label="training, running mean")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the figure of a log; 2 if that cannot be done."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not 1 <= len(given) <= 2 or given[0].startswith("-"):
        print("usage: python -m training.tracking.figure LOG [FIGURE]", file=sys.stderr)
        return 2
    log = Path(given[0])
    path = Path(given[1]) if len(given) == 2 else log.with_name("training.png")
    try:
        draw(read_log(log), path, log.resolve().parent.name)
    except MmlmError as error:
        print(f"error: {error}\n{error.advice}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
