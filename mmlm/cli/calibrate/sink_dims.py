"""``mmlm calibrate sink-dims``: the dimensions by which VAR tells attention sinks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.calibrate import common
from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.cli.options import ModelOptions, open_model
from mmlm.progress import tracked

if TYPE_CHECKING:
    from decoding.var import SinkDims

__all__ = ["COMMAND", "Calibrate", "run"]

SHOWN = 5


@dataclass(frozen=True)
class Calibrate:
    """Options of ``mmlm calibrate sink-dims``.

    Attributes:
        output: Where the configuration is written; nothing is, if no dimension is found.
        tau: What counts as massive: |x| over the root mean square of the state. It cannot exceed
            the square root of the model's width.
        share: In which share of prompts times layers a dimension must be massive, 0 to 1.
        data: Which prompts; any will do, since these dimensions belong to the language model.
        model: The model.
    """

    output: Path = Path("var.yaml")
    tau: float = 20.0
    share: float = 0.9
    data: common.PromptOptions = field(default_factory=common.PromptOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: If one is out of range.
        """
        if not self.tau > 0:
            raise ValueError(f"tau must be above 0, got {self.tau}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")


def run(settings: Calibrate, terminal: Terminal) -> int:
    """Measures the first token's states in the middle half of the layers.

    Raises:
        MmlmError: For everything that makes it impossible, before any work.
    """
    common.check_output(settings.output)
    prompts = common.requests(settings.data)
    model, processor = open_model(settings.model, (), terminal)
    from decoding.var import find_sink_dims

    found = find_sink_dims(
        model,
        tracked(
            common.model_inputs(model, processor, prompts),
            terminal.progress,
            "prompts",
            len(prompts),
        ),
        tau=settings.tau,
        share=settings.share,
    )
    report = _report(settings, found)
    if found.dims:
        _write(settings, found, report)
    if terminal.json:
        terminal.emit(report)
        return DONE
    terminal.table(_table(settings, report))
    if found.dims:
        terminal.say(f"Sink dimensions {found.dims}, written to {settings.output}.")
    else:
        terminal.say(
            f"No dimension of the first token is massive at tau {settings.tau:g}; a ratio cannot "
            f"exceed {report['limit']:.1f} here, the square root of the width. Nothing was "
            "written: VAR has no sink to take attention from, unless a smaller --tau finds one."
        )
    return DONE


def _report(settings: Calibrate, found: SinkDims) -> dict[str, Any]:
    width = found.ratio.shape[-1]
    median = found.ratio.flatten(0, 1).median(0).values
    share = (found.ratio > settings.tau).float().mean(dim=(0, 1))
    largest = median.topk(min(SHOWN, width))
    return {
        "model": settings.model.id,
        "tau": settings.tau,
        "limit": width**0.5,
        "layers": [found.layers[0], found.layers[-1]],
        "prompts": found.ratio.shape[0],
        "sink_dims": list(found.dims),
        "largest": [
            {"dim": dim, "median": round(value, 3), "share": round(float(share[dim]), 4)}
            for value, dim in zip(largest.values.tolist(), largest.indices.tolist(), strict=True)
        ],
        "output": str(settings.output) if found.dims else None,
    }


def _write(settings: Calibrate, found: SinkDims, report: dict[str, Any]) -> None:
    from decoding.var import VAR

    first, last = report["layers"]
    remarks = [
        "mmlm generate --config THIS_FILE --input questions.jsonl --output answers.jsonl",
        f"Model {report['model']}, {report['prompts']} prompts, layers {first} to {last}.",
        *(
            f"Dimension {one['dim']}: |x| / RMS of the first token {one['median']:.1f} (median)."
            for one in report["largest"]
            if one["dim"] in found.dims
        ),
    ]
    common.write_config(settings.output, remarks, [VAR(sink_dims=found.dims, tau=settings.tau)])


def _table(settings: Calibrate, report: dict[str, Any]) -> Any:
    from rich.table import Table

    first, last = report["layers"]
    table = Table(
        "dimension",
        "|x| / RMS, median",
        f"above {settings.tau:g} in",
        title=f"First token of {report['prompts']} prompts, inputs of layers {first} to {last}",
    )
    for one in report["largest"]:
        table.add_row(str(one["dim"]), f"{one['median']:.2f}", f"{one['share']:.1%}")
    return table


COMMAND = Command(
    summary="dimensions in which attention sinks have massive activations, for VAR",
    settings=Calibrate,
    run=run,
    example=(
        "mmlm calibrate sink-dims --model ./my-model --output var.yaml\n"
        "mmlm generate --config var.yaml --model ./my-model --input in.jsonl --output out.jsonl"
    ),
)
