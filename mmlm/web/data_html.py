"""SENTINEL on one picture as HTML: what is known of its objects, and every sentence with its fate.

The picture with boxes and the marked sentences are `data_tools.sentinel.markup`'s, as in the report
of `mmlm data sentinel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from mmlm import pages
from mmlm.pages import escaped, prose

if TYPE_CHECKING:
    from mmlm.web.data_steps import Watch

__all__ = ["knowledge", "steps", "style"]

Line = Mapping[str, Any]

_LABELS = {"factual": "found", "hallucinated": "absent", "uncertain": "uncertain"}
_TONES = {"factual": "better", "hallucinated": "worse", "uncertain": "noise"}
_KINDS = {
    "coherent": "clean, about something said before: can win",
    "agnostic": "clean, about something new: can go on",
    "hallucinated": "names an absent object: can lose",
    "uncertain": "the detectors differ: left out",
    "objectless": "names no object",
}


def style() -> str:
    """The report's style sheet with the playground's colours, for one component of the page."""
    report = resources.files("data_tools.sentinel").joinpath("report.css").read_text("utf-8")
    own = resources.files("mmlm.web").joinpath("reports.css").read_text("utf-8")
    return pages.stylesheet(report, own)


def knowledge(watch: Watch) -> str:
    """The picture with the detectors' boxes, and what each of them says about every object."""
    from data_tools.sentinel.markup import scene

    if not watch.image:
        return ""
    return (
        f"{scene(watch.folder, watch.image)}"
        '<p class="note">Each object that a sentence names is asked once.</p>'
        f'<div class="panel scroll">{_objects(watch)}</div>'
    )


def _objects(watch: Watch) -> str:
    head = "".join(f"<th>{escaped(name)}</th>" for name in ("", "", *watch.detectors))
    lines = []
    for label, word in _LABELS.items():
        for name in watch.image[label]:
            said = [_said(watch.image, detector, name) for detector in watch.detectors]
            unknown = label == "factual" and "yes" not in said  # outside of every vocabulary
            cells = "".join(f"<td>{one}</td>" for one in said)
            verdict = f'<td><b class="{_TONES[label]}">{"counts as " * unknown}{word}</b></td>'
            lines.append(f"<tr><th>{escaped(name)}</th>{verdict}{cells}</tr>")
    if not lines:
        return '<p class="note">No object was named yet.</p>'
    return (
        f'<table class="objects"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _said(image: Line, detector: str, name: str) -> str:
    """One detector about one object. The audit keeps boxes and rejections; the rest follows."""
    rejected, boxes = image["rejected_by"], image["boxes"]
    if name in rejected.get(detector, ()):
        return "no"
    if detector in boxes.get(name, ()):
        return "yes"
    if any(detector in by_detector for by_detector in boxes.values()):
        return "cannot tell"  # it gives boxes, and none here
    others = any(name in names for other, names in rejected.items() if other != detector)
    # Where another one rejects, the object is uncertain because this one accepts it.
    accepted = name in image["factual"] or (name in image["uncertain"] and others)
    return "yes" if accepted else "cannot tell"


def steps(watch: Watch) -> str:
    """Every step so far: the newest first and open, with its candidates and its pairs."""
    if not watch.image:
        return ""
    told = list(_steps(watch.image, watch.pairs))
    return f"{_summary(watch)}{''.join(reversed(told))}"


def _summary(watch: Watch) -> str:
    image = watch.image
    state = "Complete" if watch.complete else "So far"
    caption = prose(image["caption"]) or "nothing"
    trouble = f'<p class="worse">{escaped(image["error"])}</p>' if image.get("error") else ""
    return (
        f'<div class="panel" data-state="{"complete" if watch.complete else "open"}">'
        f"<p><strong>{state}: {_count(len(image['steps']), 'step')}, "
        f"{_count(len(watch.pairs), 'pair')}.</strong> {escaped(_status(image))}</p>"
        f'<p class="note">The caption: {caption}</p>{trouble}</div>'
    )


def _status(image: Line) -> str:
    from data_tools.sentinel.records import STATUSES

    return "" if image["status"] == "ok" else f"{STATUSES[image['status']].capitalize()}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _steps(image: Line, pairs: Sequence[Line]) -> Iterator[str]:
    context: list[str] = []
    for number, step in enumerate(image["steps"]):
        newest = number == len(image["steps"]) - 1
        own = [pair for pair in pairs if pair["step"] == number]
        yield (
            f'<details class="step panel" data-step="{number}"{" open" if newest else ""}>'
            f"<summary><strong>Step {number + 1}</strong> · {_head(step, own)}</summary>"
            f'<p class="context">After: {prose(" ".join(context)) or "the beginning"}</p>'
            f"{_candidates(image, step)}{_pairs(image, step, own)}</details>"
        )
        if step["next"] is not None:
            context.append(step["candidates"][step["next"]]["text"])


def _head(step: Line, pairs: Sequence[Line]) -> str:
    if not step["candidates"]:
        return f"the model ended the caption in all {step['ended']} samples"
    parts = [_count(len(step["candidates"]), "different sentence"), _count(len(pairs), "pair")]
    if step["ended"]:
        parts.append(f"the model ended the caption in {_count(step['ended'], 'sample')}")
    return ", ".join(parts)


def _candidates(image: Line, step: Line) -> str:
    from data_tools.sentinel.markup import sentence

    lines = []
    for position, one in enumerate(step["candidates"]):
        kind = one["class"]
        notes = "".join(f'<span class="chip">{escaped(note)}</span>' for note in _notes(one))
        goes_on = position == step["next"]
        if goes_on:
            notes += '<span class="chip goes-on">goes on</span>'
        lines.append(
            f'<li class="candidate{" next" if goes_on else ""}" data-class="{kind}">'
            f'<span class="class"><i class="{kind}"></i>{kind}</span>'
            f"<p>{sentence(image, one['text'], one['objects'])} {notes}</p></li>"
        )
    if not lines:
        return ""
    meanings = "".join(
        f'<span title="{escaped(meaning)}"><i class="{kind}"></i>{kind}: {escaped(meaning)}</span>'
        for kind, meaning in _KINDS.items()
        if any(one["class"] == kind for one in step["candidates"])
    )
    return f'<ul class="candidates">{"".join(lines)}</ul><p class="key">{meanings}</p>'


def _notes(candidate: Line) -> Iterator[str]:
    if candidate["drawn"] > 1:
        yield f"drawn {candidate['drawn']} times"
    if candidate.get("pronoun"):
        yield "about an unnamed it or they: not paired"
    if candidate.get("finished"):
        yield "ends the caption"


def _pairs(image: Line, step: Line, pairs: Sequence[Line]) -> str:
    from data_tools.sentinel.markup import sentence

    objects = {one["text"]: one["objects"] for one in step["candidates"]}
    blocks = "".join(
        f'<div class="pair" data-pair="{escaped(pair["id"])}">'
        f'<p><span class="sign better">+</span>'
        f"{sentence(image, pair['chosen'], objects[pair['chosen']])}</p>"
        f'<p><span class="sign worse">−</span>'
        f"{sentence(image, pair['rejected'], objects[pair['rejected']])}</p></div>"
        for pair in pairs
    )
    return f'<h3>Pairs</h3><div class="pair-list">{blocks}</div>' if blocks else ""
