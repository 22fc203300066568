"""``mmlm data micl``: tasks that cannot be solved without their demonstrations."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data_tools.micl.settings import MiclSettings
from mmlm.cli.frame import DONE, Command, Terminal

__all__ = ["COMMAND", "Micl", "make_episodes"]


@dataclass(frozen=True, kw_only=True)
class Micl(MiclSettings):
    """Options of ``mmlm data micl``.

    Attributes:
        output: Folder for episodes.jsonl and pictures; if episodes of the same run are there, the
            rest is made.
        shard: Make only part i of n, written `i/n`.
        overwrite: Throw away what another run left in the folder.
    """

    output: Path
    shard: str = ""
    overwrite: bool = False


def make_episodes(settings: Micl, terminal: Terminal) -> int:
    """Writes episodes.

    Raises:
        InputError: If a value is out of range, or the folder holds another run.
    """
    from data_tools.micl.export import EpisodeStage, records
    from data_tools.records import StageOutput
    from data_tools.stages import run_stage
    from mmlm.errors import InputError
    from mmlm.sharding import this_shard

    wanted = MiclSettings(**{one.name: getattr(settings, one.name) for one in fields(MiclSettings)})
    everything = records(wanted)
    stage = EpisodeStage(wanted, settings.output)
    output = StageOutput(
        settings.output,
        {"command": "data micl", **asdict(wanted)},
        stage.kinds,
        this_shard(settings.shard),
        total=len(everything),
        overwrite=settings.overwrite,
    )
    try:
        counts = run_stage(stage, everything, output, progress=terminal.progress)
    except ValueError as error:  # so few demonstrations cannot tell the latents apart
        raise InputError(f"{error}.", advice="Raise --shots, or leave the task out.") from error
    if terminal.json:
        terminal.emit({"output": str(settings.output), "episodes": counts.total()})
    terminal.note(
        f"{counts.total()} episodes in {output.path('episodes')}.\nAnswer them with "
        f"`mmlm generate --input {output.path('episodes')} --output answers.jsonl`, then "
        "`mmlm score micl answers.jsonl`."
    )
    return DONE


COMMAND = Command(
    summary="tasks that cannot be solved without their demonstrations, after TrueMICL",
    settings=Micl,
    run=make_episodes,
    example=(
        "mmlm data micl --output micl --shots 4 --n 100\n"
        "mmlm data micl --output zero-shot --condition zero_shot\n"
        "mmlm data micl --output train --split support --task operator --n 2000"
    ),
)
