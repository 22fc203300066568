"""``report.html`` of a SENTINEL run: what was sampled and paired, and examples to look at."""

from __future__ import annotations

import heapq
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from data_tools.records import RUN, read_kind
from data_tools.sentinel.markup import scene, sentence
from data_tools.sentinel.records import CLASSES, COUNTS, STATUSES
from data_tools.sentinel.summary import Summary, summarise
from data_tools.sentinel.truth import Judgement, judge_pairs
from mmlm import pages
from mmlm.pages import escaped, prose

__all__ = ["GENERATOR", "REPORT", "examples", "write_report"]

GENERATOR = "mmlm data sentinel"
"""Stands in the file's head, so that a report is told apart from somebody else's file."""
REPORT = "report.html"

EXAMPLES = 12
PAIRS_SHOWN = 4
NAMES_SHOWN = 15

Line = Mapping[str, Any]
Example = tuple[Line, Sequence[Line]]


def write_report(folder: Path, n_examples: int = EXAMPLES, summary: Summary | None = None) -> Path:
    """Writes the report beside the lines.

    Args:
        folder: Output of ``mmlm data sentinel``, shards merged.
        n_examples: Pictures that are shown.
        summary: The run's numbers, if they were counted already.

    Returns:
        The file.

    Raises:
        InputError: If there is no such output, or ``report.html`` is somebody else's.
    """
    target = folder / REPORT
    pages.claim(target, GENERATOR)
    summary = summary or summarise(folder)
    judgement = judge_pairs(folder)
    shown = examples(folder, n_examples)
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    title = f"{summary.pairs.total():,} preference pairs from {summary.images.total():,} pictures"
    body = [
        f'<header><p class="eyebrow">SENTINEL · {escaped(folder.name)}</p>',
        f"<h1>{escaped(title)}</h1>",
        _tiles(summary, judgement),
        "</header><main>",
        _counts(summary),
        _judgement(judgement),
        _examples(folder, shown),
        "</main>",
        pages.footer(_facts(run)),
    ]
    css = resources.files("data_tools.sentinel").joinpath("report.css").read_text("utf-8")
    text = pages.document(GENERATOR, title, pages.stylesheet(css), body)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return target


def examples(folder: Path, count: int) -> list[Example]:
    """Some pictures with pairs, chosen by a hash of their ids: the same ones in every report.

    Args:
        folder: Output of ``mmlm data sentinel``, shards merged.
        count: How many.

    Returns:
        The audit line and the pairs of each.
    """
    with_pairs = (
        (zlib.crc32(key.encode()), key, lines) for key, lines in read_kind(folder, "pairs") if lines
    )
    chosen = {key: lines for _, key, lines in heapq.nsmallest(count, with_pairs)}
    return [(lines[0], chosen[key]) for key, lines in read_kind(folder, "images") if key in chosen]


# --- numbers --------------------------------------------------------------------------------------


def _tiles(summary: Summary, judgement: Judgement | None) -> str:
    images = summary.images.total()
    classes = summary.classes
    tiles = {
        "pairs": f"{summary.pairs.total():,}",
        "pictures": f"{images:,}",
        "pairs per picture": f"{summary.pairs.total() / images:.2f}" if images else "-",
        "samples": f"{summary.drawn:,}",
        "different sentences": f"{classes.total():,}",
        "of them with an absent object": _percent(classes["hallucinated"], classes.total()),
    }
    if judgement is not None:
        right = _percent(judgement.rejected_right, judgement.pairs)
        tiles["rejected sentences that are really wrong"] = right
        right = _percent(judgement.chosen_right, judgement.pairs)
        tiles["chosen sentences that are really right"] = right
    cells = "".join(
        f'<div class="panel tile"><strong>{escaped(value)}</strong>'
        f"<span>{escaped(name)}</span></div>"
        for name, value in tiles.items()
    )
    return f'<div class="tiles">{cells}</div>'


def _counts(summary: Summary) -> str:
    status = {name: summary.images[name] for name in STATUSES if summary.images[name]}
    by_step = {f"after {step}": n for step, n in sorted(summary.pairs_by_step.items())}
    key = "".join(f'<span><i class="{name}"></i>{name}</span>' for name in CLASSES)
    sentences = "".join(
        _stacked(f"after {step}", classes)
        for step, classes in sorted(summary.classes_by_step.items())
        if classes.total()
    )
    panels = [
        _panel("Pairs by sentences before", _bars(by_step)),
        _panel("Candidates by class", f'{_group(sentences)}<p class="key">{key}</p>'),
        _panel("What the model invents", _bars(dict(summary.invented.most_common(NAMES_SHOWN)))),
        _panel("Pictures by status", _bars(status)),
        _panel("Named objects by label", _bars({n: summary.labels[n] for n in summary.labels})),
        _panel("Rejected names by detector", _bars(dict(summary.rejected_by))),
    ]
    if summary.counts:
        dropped = {COUNTS.get(name, name): n for name, n in summary.counts.most_common()}
        panels.append(_panel("Left out", _bars(dropped)))
    return f'<h2>What happened</h2><div class="columns">{"".join(panels)}</div>'


def _panel(title: str, content: str) -> str:
    return f'<section class="panel"><h3>{escaped(title)}</h3>{content}</section>'


def _bars(values: Mapping[str, int], empty: str = "none") -> str:
    if not values:
        return f'<p class="note">{escaped(empty)}</p>'
    top = max(*values.values(), 1)
    lines = "".join(
        f'<div class="bar"><span>{escaped(name)}</span>'
        f'<div><i class="accent" style="width:{100 * value / top:.1f}%"></i></div>'
        f"<span>{value:,}</span></div>"
        for name, value in values.items()
    )
    return _group(lines)


def _stacked(name: str, classes: Counter[str]) -> str:
    total = classes.total()
    parts = "".join(
        f'<i class="{kind}" style="width:{100 * classes[kind] / total:.2f}%" '
        f'title="{kind}: {classes[kind]:,}"></i>'
        for kind in CLASSES
        if classes[kind]
    )
    return (
        f'<div class="bar"><span>{escaped(name)}</span><div>{parts}</div>'
        f"<span>{total:,}</span></div>"
    )


def _group(lines: str) -> str:
    return f'<div class="bars">{lines}</div>'


def _judgement(judgement: Judgement | None) -> str:
    if judgement is None:
        return ""
    rows = [
        (
            "rejected sentences with an absent object",
            judgement.rejected_right,
            judgement.pairs,
        ),
        ("chosen sentences that name none", judgement.chosen_right, judgement.pairs),
        ("objects called absent that are", judgement.named_right, judgement.named),
    ]
    body = "".join(
        f"<tr><th>{escaped(name)}</th><td>{part:,} of {whole:,}</td>"
        f"<td><strong>{_percent(part, whole)}</strong></td></tr>"
        for name, part, whole in rows
    )
    return (
        '<h2>Against the truth</h2><p class="note">The pictures are drawn, so what is in them is '
        "known. Sentences are read as the CHAIR scorers read them, without the detectors and the "
        f'extractor of the run.</p><div class="panel scroll"><table><tbody>{body}</tbody></table>'
        "</div>"
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _facts(run: Line) -> dict[str, str]:
    """The run record in the order of the file, without what is long."""
    facts = {}
    for name, value in run.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        facts[name] = text if len(text) <= 600 else f"{text[:600]} ..."
    return facts


# --- examples -------------------------------------------------------------------------------------


def _examples(folder: Path, shown: Sequence[Example]) -> str:
    if not shown:
        return ""
    cards = "".join(_example(folder, image, pairs) for image, pairs in shown)
    return (
        "<h2>Examples</h2>"
        '<p class="note">Boxes are the detectors\'. In the sentences '
        '<mark class="good">green</mark> objects were found, <mark class="bad">red</mark> ones '
        "by no detector, and about "
        '<mark class="doubt">dotted</mark> ones the detectors differ.</p>' + cards
    )


def _example(folder: Path, image: Line, pairs: Sequence[Line]) -> str:
    spans = {
        candidate["text"]: candidate["objects"]
        for step in image["steps"]
        for candidate in step["candidates"]
    }
    blocks = []
    for pair in pairs[:PAIRS_SHOWN]:
        context = prose(pair["context"]) or "(no context)"
        chosen, rejected = (
            sentence(image, pair[side], spans.get(pair[side], ()))
            for side in ("chosen", "rejected")
        )
        blocks.append(
            f'<div><p class="context">{context}</p>'
            f'<p><span class="sign better">+</span>{chosen}</p>'
            f'<p><span class="sign worse">−</span>{rejected}</p>'
            "</div>"
        )
    if len(pairs) > PAIRS_SHOWN:
        blocks.append(f'<div class="context">and {len(pairs) - PAIRS_SHOWN} more pairs</div>')
    return (
        f'<article class="card example">{scene(folder, image)}'
        f'<div class="pair-list">{"".join(blocks)}</div></article>'
    )
