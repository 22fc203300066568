"""``mmlm calibrate inter-k``: the variance from which a step is a key step of INTER."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmlm.cli.calibrate import common
from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.cli.options import ModelOptions, open_model
from mmlm.progress import tracked

__all__ = ["COMMAND", "Calibrate", "run"]

_SHOWN = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Calibrate:
    """Options of ``mmlm calibrate inter-k``.

    Attributes:
        output: Where the configuration is written.
        quantile: Share of steps below the threshold, 0 to 1; the others become key steps.
        image_mask: What INTER puts in the place of the image.
        scope: Over which tokens INTER takes the variance.
        max_new_tokens: Longest answer whose steps are measured.
        batch_size: Prompts at once.
        data: Which prompts; best the kind that INTER will be used on.
        model: The model.
    """

    output: Path = Path("inter.yaml")
    quantile: float = 0.5
    image_mask: Literal["uniform_noise", "zeros", "mean", "columns", "drop"] = "uniform_noise"
    scope: Literal["vocabulary", "plausible"] = "vocabulary"
    max_new_tokens: int = 64
    batch_size: int = 8
    data: common.PromptOptions = field(default_factory=common.PromptOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: If one is out of range.
        """
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be between 0 and 1, got {self.quantile}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def run(settings: Calibrate, terminal: Terminal) -> int:
    """Answers the prompts greedily and measures the variance at every step.

    Raises:
        MmlmError: For everything that makes it impossible, before any work.
    """
    common.check_output(settings.output)
    prompts = common.requests(settings.data)
    from decoding.inter import INTER, measure_dispersion

    method = INTER(image_mask=settings.image_mask, scope=settings.scope)
    model, processor = open_model(settings.model, (method,), terminal)
    batches = tracked(
        common.model_inputs(model, processor, prompts, settings.batch_size),
        terminal.progress,
        "batches",
        -(-len(prompts) // settings.batch_size),
    )
    spread = measure_dispersion(
        model,
        batches,
        method=method,
        processor=processor,
        max_new_tokens=settings.max_new_tokens,
    )
    method = replace(method, k=float(f"{float(spread.quantile(settings.quantile)):.4g}"))
    report = {
        "model": settings.model.id,
        "prompts": len(prompts),
        "steps": len(spread),
        "quantile": settings.quantile,
        "k": method.k,
        "quantiles": {f"{q:g}": round(float(spread.quantile(q)), 4) for q in _SHOWN},
        "output": str(settings.output),
    }
    remarks = [
        "mmlm generate --config THIS_FILE --input questions.jsonl --output answers.jsonl",
        f"Model {report['model']}: k is the {settings.quantile:g} quantile of the dividend's "
        f"variance over {report['steps']} greedy steps of {report['prompts']} prompts.",
    ]
    common.write_config(settings.output, remarks, [method])
    if terminal.json:
        terminal.emit(report)
        return DONE
    terminal.table(_table(report))
    terminal.say(f"k = {method.k:g}, written to {settings.output}.")
    return DONE


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        "share of steps below",
        "variance D",
        title=f"{report['steps']} greedy steps of {report['prompts']} prompts",
    )
    for quantile, value in report["quantiles"].items():
        table.add_row(f"{float(quantile):.0%}", f"{value:.4g}")
    return table


COMMAND = Command(
    summary="the variance from which a step is a key step, for INTER",
    settings=Calibrate,
    run=run,
    example=(
        "mmlm calibrate inter-k --model ./my-model --quantile 0.5 --output inter.yaml\n"
        "mmlm generate --config inter.yaml --model ./my-model --input in.jsonl --output out.jsonl"
    ),
)
