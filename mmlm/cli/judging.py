"""Options of judges, for every benchmark that knows one; no judge is asked unless one is named."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.chat_server.options import ServerOptions, patience_of
from mmlm.errors import InputError
from mmlm.progress import tracked

if TYPE_CHECKING:
    from benchmarks.judges import Judge, Verdict
    from mmlm.chat_server.client import Patience
    from mmlm.cli.frame import Terminal

__all__ = ["JudgeOptions", "open_judge"]


@dataclass(frozen=True)
class JudgeOptions(ServerOptions):
    """Who judges, and how it is asked.

    Attributes:
        kind: `none` asks nobody; `openai`: a server that speaks OpenAI's chat completions,
            wherever it runs; `hf`: a Hugging Face language model on this machine; `scripted`:
            replies from a file.
        model: Name of the model; goes into the name of the result.
        temperature: `official`: what the benchmark's authors used; `omit`: not sent, for models
            that refuse it; or a number.
        cache: Folder of the replies. What is in it is not asked again.
        offline: Use stored replies only.
        replies: For `scripted`: JSON lines with `id` and `reply`.
        device: For `hf`: where the model runs.
        dtype: For `hf`: number format of the weights.
    """

    kind: Literal["none", "openai", "hf", "scripted"] = dataclasses.field(
        default="none", metadata={"alias": "--judge"}
    )
    model: str | None = None
    temperature: Literal["official", "omit"] | float = "official"
    cache: Path = Path("judge_replies")
    offline: bool = False
    replies: Path | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def open_judge(
    options: JudgeOptions, terminal: Terminal, *, temperature: float = 0.0
) -> Judge | None:
    """The judge that the options name, with its replies kept on the disk; None for `none`.

    Nothing is loaded or sent before the first prompt.

    Args:
        options: Who judges.
        terminal: Where progress is shown.
        temperature: The official temperature of the benchmark.

    Raises:
        InputError: If options are missing or contradict each other.
    """
    if options.kind == "none":
        return None
    from benchmarks.judges import ScriptedJudge, WatchedJudge, read_script
    from benchmarks.judges.cache import CachedJudge

    if options.kind == "scripted":
        if options.replies is None:
            raise InputError(
                "A scripted judge needs --judge.replies.",
                advice='Give JSON lines such as {"id": "1", "reply": "Rating: 4"}.',
            )
        return ScriptedJudge(read_script(options.replies), options.model or "scripted")
    if options.model is None:
        raise InputError(
            f"--judge {options.kind} needs --judge.model.",
            advice="Numbers of different judges are not comparable: name the one of the paper.",
        )
    patience = patience_of(options, "--judge")
    judge = _server(options, patience, temperature) if options.kind == "openai" else _local(options)
    if terminal.progress:
        judge = WatchedJudge(judge, _show(options.model))
    return CachedJudge(judge, options.cache, offline=options.offline)


def _server(options: JudgeOptions, patience: Patience, official: float) -> Judge:
    from benchmarks.judges.http import ChatJudge

    parameters: dict[str, Any] = {options.limit_field: options.max_tokens}
    if options.temperature != "omit":
        chosen = float(official if options.temperature == "official" else options.temperature)
        if not 0 <= chosen < math.inf:
            raise InputError(
                f"--judge.temperature is {chosen}; it must be 0 or more.",
                advice="Leave it out for what the benchmark's authors used.",
            )
        parameters["temperature"] = chosen
    return ChatJudge(
        str(options.model),
        options.base_url,
        key=os.environ.get(options.key_variable),
        parameters=parameters,
        patience=patience,
    )


def _local(options: JudgeOptions) -> Judge:
    from benchmarks.judges.local import LocalJudge

    if options.temperature not in ("official", "omit", 0.0):
        raise InputError(
            f"A local judge decodes greedily; --judge.temperature is {options.temperature}.",
            advice="Leave the option out.",
        )
    return LocalJudge(
        str(options.model),
        max_tokens=options.max_tokens,
        dtype=options.dtype,
        device=options.device,
    )


def _show(model: str) -> Callable[[Iterator[Verdict], int], Iterable[Verdict]]:
    """A progress bar over the prompts that have no stored reply."""

    def watch(verdicts: Iterator[Verdict], total: int) -> Iterable[Verdict]:
        return tracked(verdicts, True, f"asking {model}", total)

    return watch
