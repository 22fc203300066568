"""Text dominance: does an answer look at the prompt's text or at the picture?

Paper: "When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models",
arXiv 2508.10552 (2025). With the attention A_T and A_O that generated tokens pay to |T| text and
|O| visual tokens of the prompt, in one layer::

    MDI = (A_T / |T|) / (A_O / |O|)
    AEI_T = [A_T / (A_T + A_O)] / [|T| / (|T| + |O|)],  AEI_O likewise;  MDI = AEI_T / AEI_O

MDI above 1: a text token gets more attention than a visual one. The masses are measured while a
model answers (`mmlm.TextDominance`) and stored with every answer; scoring needs nothing else.

**MDI has |O| in it.** If all but a few visual tokens are removed and nothing else changes, MDI
falls by arithmetic. A method *rebalances* only if A_O itself is kept or grows: see `rebalanced`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

from benchmarks.base import CountTable, Ratio, Sample, Scores
from benchmarks.run import Item, Task
from benchmarks.stored import check_ids
from benchmarks.text_dominance.records import Masses, Record, Text, answer_of, read_record
from mmlm.engine.stages import STAGES, stage_layers
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.coco import Picture

__all__ = ["NOTE", "name_of", "rebalanced", "score_stored", "task"]

NOTE = (
    "MDI contains the number of visual tokens: where tokens are removed, it falls by arithmetic. "
    "Say 'rebalanced' only if attention_image is kept or grows."
)
_RATIOS = ("mdi", "aei_text", "aei_image")


def name_of(text: Text = "all", first_token: bool = True) -> str:
    """Name under which numbers may be published."""
    return f"text-dominance/{text}" + ("" if first_token else "/without-first")


def task(pictures: Sequence[Picture], folder: Path, prompt: str) -> Task:
    """One caption per picture; a run needs `mmlm.TextDominance` attached.

    Args:
        pictures: The pictures.
        folder: Where their files are.
        prompt: The question.
    """
    items = tuple(
        Item(
            Request(str(picture.image_id), (folder / picture.file_name,), prompt),
            {"image": picture.file_name},
        )
        for picture in pictures
    )
    return Task(name_of(), items)


def score_stored(
    lines: Sequence[Mapping[str, Any]], text: Text = "all", first_token: bool = True
) -> Scores:
    """Scores stored lines of any benchmark that was run with `mmlm.TextDominance` attached.

    Metrics are ``mdi``, ``aei_text`` and ``aei_image`` of each stage, as means over layers and
    answers (mean of ratios); ``attention_text`` and ``attention_image``, the shares of a query's
    attention that go to each side; and how many tokens each side has. ``details`` holds all four
    variants of the text, each as mean of ratios and as ``ratio_of_sums``. Bootstrap unit: the
    image.

    A layer in which nothing of the picture is seen (A_O = 0) has no MDI and counts as ``exited``;
    an answer without a picture has no ratio at all. Neither is replaced by a large number.

    Args:
        lines: Stored lines.
        text: "all": every prompt token but visual ones; "instruction": text behind the last image.
        first_token: Whether the prompt's first token, an attention sink, is counted.

    Raises:
        ValueError: If ``text`` is unknown.
        InputError: If a line has no record or a broken one, an id is missing or occurs twice,
            records of different models or kinds of queries are mixed, or there is no answer.
    """
    if text not in get_args(Text):
        raise ValueError(f"text must be one of {', '.join(get_args(Text))}, got {text!r}.")
    answered = [(i, line) for i, line in enumerate(lines, start=1) if not line.get("error")]
    check_ids(lines)
    if not lines:
        raise InputError("There are no lines to score.", advice="Check that the run wrote any.")
    if not answered:
        raise InputError(f"All {len(lines)} lines hold errors.", advice="Repeat the run.")
    records = [read_record(line, number) for number, line in answered]
    _check_alike(records)
    rows = [_row(record, text, first_token) for record in records]
    images = [str(line.get("image", line["id"])) for _, line in answered]
    queries = _kind(records[0])
    return Scores(
        name=name_of(text, first_token) + ("" if queries == "generated" else f"/{queries}"),
        table=CountTable.build(images, rows, _metrics()),
        directions=dict.fromkeys(["mdi_middle", *_metrics()], "none"),
        good=(),
        samples=[
            _sample(line, record, row)
            for (_, line), record, row in zip(answered, records, rows, strict=True)
        ],
        statuses=_statuses(records, rows, len(lines) - len(answered)),
        details={"note": NOTE, "variants": _variants(records)},
    )


def rebalanced(before: Scores, after: Scores) -> dict[str, str]:
    """What a change of MDI means, stage by stage, from paired intervals over images.

    Returns:
        By stage: "rebalanced" (MDI clearly lower, attention on the picture not clearly lower),
        "less attention on the picture" (both lower: MDI fell because there are fewer visual tokens
        or less else to look at), or "no clear fall of MDI".

    Raises:
        InputError: If the two runs are about different images.
    """
    verdicts = {}
    for stage in STAGES:
        mdi = before.table.difference(after.table, f"mdi_{stage}")
        seen = before.table.difference(after.table, f"attention_image_{stage}")
        if not (mdi.is_clear and (mdi.value or 0) < 0):
            verdicts[stage] = "no clear fall of MDI"
        elif seen.is_clear and (seen.value or 0) < 0:
            verdicts[stage] = "less attention on the picture"
        else:
            verdicts[stage] = "rebalanced"
    return verdicts


# ---- counts -------------------------------------------------------------------------------------


def _metrics() -> dict[str, Ratio]:
    found = {
        f"{kind}_{stage}": Ratio((f"{stage}.{kind}",), (f"{stage}.{kind}.n",))
        for kind in _RATIOS
        for stage in STAGES
    }
    for kind in ("attention_text", "attention_image"):
        for stage in STAGES:
            found[f"{kind}_{stage}"] = Ratio((f"{stage}.{kind}",), (f"{stage}.layers",))
    for side in ("text_tokens", "image_tokens"):
        found[side] = Ratio((side,), ("with_image",))
    return found


def _row(record: Record, text: Text, first: bool) -> dict[str, float]:
    """Counts of one answer: sums of ratios over layers, and how many of them exist."""
    by_layer = record.masses(text, first)
    some = next(iter(by_layer.values()))
    here = some.n_visual > 0
    row: dict[str, float] = {
        "answers": 1,
        "with_image": int(here),
        "text_tokens": some.n_text * here,
        "image_tokens": some.n_visual * here,
        "exited": sum(not m.visual for m in by_layer.values()) * here,
        "without_text": int(here and not some.n_text),
    }
    for stage, layers in stage_layers(record.n_layers).items():
        masses = [by_layer[layer] for layer in layers]
        for kind in _RATIOS:
            values = [v for v in (getattr(m, kind) for m in masses) if v is not None]
            row |= {f"{stage}.{kind}": sum(values), f"{stage}.{kind}.n": len(values)}
        row[f"{stage}.attention_text"] = here * sum(m.text for m in masses) / record.queries
        row[f"{stage}.attention_image"] = here * sum(m.visual for m in masses) / record.queries
        row[f"{stage}.layers"] = len(masses) * here
    return row


def _variants(records: Sequence[Record]) -> dict[str, Any]:
    """Every variant of the text in both ways to average, with the sums behind them."""
    return {
        name_of(text, first).removeprefix("text-dominance/"): {
            stage: _stage(
                [
                    m
                    for record in records
                    for layer, m in record.masses(text, first).items()
                    if m.n_visual and layer in stage_layers(record.n_layers)[stage]
                ]
            )
            for stage in STAGES
        }
        for text in get_args(Text)
        for first in (True, False)
    }


def _stage(masses: Sequence[Masses]) -> dict[str, Any]:
    total = Masses(
        text=math.fsum(m.text for m in masses),
        visual=math.fsum(m.visual for m in masses),
        n_text=sum(m.n_text for m in masses),
        n_visual=sum(m.n_visual for m in masses),
    )
    return {
        "mean_of_ratios": {kind: _mean([getattr(m, kind) for m in masses]) for kind in _RATIOS},
        "ratio_of_sums": {kind: getattr(total, kind) for kind in _RATIOS},
        "undefined": sum(m.mdi is None for m in masses),
        "sums": {
            "A_T": total.text,
            "A_O": total.visual,
            "|T|": total.n_text,
            "|O|": total.n_visual,
        },
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _statuses(
    records: Sequence[Record], rows: Sequence[Mapping[str, float]], failed: int
) -> dict[str, int]:
    return {
        "failed": failed,
        "without a picture": sum(not row["with_image"] for row in rows),
        "without such text": sum(int(row["without_text"]) for row in rows),
        "last prompt row": sum(r.queries_from == "last prompt row" for r in records),
        "exited layers": sum(int(row["exited"]) for row in rows),
    }


def _sample(line: Mapping[str, Any], record: Record, row: Mapping[str, float]) -> Sample:
    if not row["with_image"]:
        note = "no picture"
    elif not row["middle.mdi.n"]:
        note = "middle layers: no MDI"
    else:
        share = row["middle.attention_image"] / row["middle.layers"]
        note = (
            f"middle layers: MDI {row['middle.mdi'] / row['middle.mdi.n']:.2f}, "
            f"{100 * share:.1f} % of the attention on the picture"
        )
    if record.queries_from == "last prompt row":
        note += "; measured at the prompt's last row"
    return Sample(
        id=str(line["id"]),
        image=str(line.get("image", "")),
        question=str(line.get("prompt", "")),
        answer=answer_of(line) or "",
        correct=None,
        note=note,
    )


def _kind(record: Record) -> str:
    """Whose tokens were the queries: those the model generated, or a given answer's."""
    return "answer" if record.queries_from == "answer" else "generated"


def _check_alike(records: Sequence[Record]) -> None:
    kinds = {(record.n_layers, _kind(record)) for record in records}
    if len(kinds) > 1:
        shown = " and ".join(f"{n} layers ({source} tokens)" for n, source in sorted(kinds))
        raise InputError(
            f"The lines were measured in different ways: {shown}.",
            advice="Score the runs of each model by themselves.",
        )
