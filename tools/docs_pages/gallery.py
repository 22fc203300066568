"""docs/gallery.md: every method with a figure, a paragraph, five lines of code and its effect.

Figures and captions come from tools/gallery_figures.py, effects from what tools/measure_*.py
stored; nothing is run here.
"""

from __future__ import annotations

import html
import inspect
import json
from collections.abc import Sequence
from typing import Any

import effects_page
import measure_pruning
import model_side_page
from embedded_tables import RESULTS, table

import mmlm
from docs_pages.texts import cited, formatted, markdown, section
from mmlm.show.words import pieces

GROUPS = {
    "Heads and attention": (
        *("VHR", "VAR", "ImbalancedAttention", "ACT", "ZeroTuning"),
        *("PH3", "SeeingKnowing"),
    ),
    "Contrast with another prompt": ("VCD", "PAI", "M3ID", "ICD", "INTER"),
    "Contrast with an early layer, steering, search": ("DoLa", "ONLY", "VISTA", "OPERA"),
    "Fewer tokens": ("FlowCut", "ClsPruner", "RandomPruner", "DyVTE"),
    "Trained into the model": ("MMA", "CrossLMM", "DARA"),
}
PRUNERS = ("FlowCut", "ClsPruner", "RandomPruner")

INTRODUCTION = """# Gallery of methods

<!-- Written by tools/build_docs.py; figures by tools/gallery_figures.py. Do not edit. -->

Every method with a picture, its idea, five lines of code, and what it changed on the model that
ships with mmlm. The picture is the first one in whose caption the model invents something and
whose caption the method changes; nothing was chosen by whether the method helps there. Bright
cells are those that the model attended to while it wrote the word in quotes.

Under each figure <b class="invented">bold red words</b> are invented and <span class="found">green
ones</span> are really there. Effects are measured on 300 other pictures: changes in points against
plain decoding with paired 95 % intervals, bold where 0 is outside. CHAIR counts inventions, so
less is better; recall counts true objects, so more is. How they were measured, and what they
teach: [Effects](effects.md). All parameters: [Methods](methods.md).

Every block below goes on from this one:

```python
import mmlm
from mmlm.inputs import message, prepare
from mmlm.show.truth import draw_scene

model, processor = mmlm.load("embedded")  # yours: an id of the hub, or a folder


def asked(number):
    question = message("user", "describe the image .", n_images=1)
    return prepare(processor, [[question]], [[draw_scene(index=number).image]])


def words(ids, inputs):
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
```
"""

#: Method -> (figure, name of its table in docs/effects.md, rows of it, place there, code).
ELSEWHERE: dict[str, tuple[str, str, tuple[str, ...], str, str]] = {
    "DyVTE": (
        "dyvte.svg",
        "dyvte",
        ("none (plain)", "routers, > 0.0", "all after layer 6"),
        "an-early-exit-of-the-visual-tokens-dyvte",
        """inputs = asked(0)
with mmlm.DyVTE.fixed(layer=6)(model):  # DyVTE(weights_file=...) asks trained routers
    ids = model.generate(**inputs, max_new_tokens=84, do_sample=False)
    (record,) = mmlm.measured(model)
print(record["dyvte"]["exit_layer"])""",
    ),
    "MMA": (
        "mma.svg",
        "mma",
        ("before", "mma - causal, seed 0"),
        "training-with-mma",
        """learner, _ = mmlm.load("embedded")
mmlm.build_in(learner, mmlm.MMA())  # from here on images see the question, in training as well
# then train it:  mmlm train --config train/world/mma""",
    ),
    "CrossLMM": (
        "crosslmm.svg",
        "crosslmm",
        ("whole", "CrossLMM", "CrossLMM - pooled"),
        "crosslmm-pooled-tokens-with-and-without-cross-attention",
        """learner, _ = mmlm.load("embedded")
mmlm.build_in(learner, mmlm.CrossLMM(grid=5))  # 25 tokens instead of 100
print(sum(p.numel() for n, p in learner.named_parameters() if "mmlm_methods" in n), "to learn")
# then train them:  mmlm train --config train/world/crosslmm_1""",
    ),
    "DARA": (
        "dara.svg",
        "dara",
        ("demonstration and query",),
        "dara",
        """learner, _ = mmlm.load("embedded")
mmlm.build_in(learner, mmlm.DARA(images=2))  # a factor per head and picture
print(sum(p.numel() for n, p in learner.named_parameters() if "mmlm_methods" in n), "to learn")
# then train them:  mmlm train --config train/world/dara""",
    ),
}
PRINTED = {"DyVTE": "6", "MMA": "", "CrossLMM": "542084 to learn", "DARA": "12 to learn"}


def gallery_page() -> str:
    """The page."""
    shown = json.loads((RESULTS / "gallery.json").read_text(encoding="utf-8"))
    lines = [INTRODUCTION.rstrip()]
    for group, names in GROUPS.items():
        lines += ["", f"## {group}"]
        for name in names:
            lines += ["", *_entry(getattr(mmlm, name), shown.get(name))]
    return "\n".join(lines) + "\n"


def _entry(cls: type[mmlm.Method], shown: dict[str, Any] | None) -> list[str]:
    """One method."""
    name, doc = cls.__name__, inspect.getdoc(cls) or ""
    idea = f"{markdown(doc.partition(chr(10))[0])} {section(doc, 'Idea')}"
    lines = [f"### {name}", "", f"*{cls.paper.title}* ({cited(cls.paper)}).", "", idea, ""]
    lines += _from_figures(name, shown) if shown else _from_elsewhere(name)
    return [*lines, "", f"[Parameters](methods.md#{name.lower()})"]


def _from_figures(name: str, shown: dict[str, Any]) -> list[str]:
    """Figure, captions, code and effect of a method that needs no training."""
    seen = f", while it wrote “{shown['words'][1]}”" if shown["words"] else ""
    alt = f"The picture, and what {name} makes of it{seen}"
    code = formatted(
        f"inputs = asked({shown['scene']})\n"
        f"with mmlm.{shown['setting']}(model):\n"
        "    ids = model.generate(**inputs, max_new_tokens=84, do_sample=False)\n"
        "print(words(ids, inputs))\n"
    )
    return [
        f"![{alt}](images/gallery/{name}.png)",
        "",
        f"**Plain:** {_marked(shown['plain'], shown['truth'])}<br>",
        f"**{name}:** {_marked(shown['with'], shown['truth'])}",
        "",
        *("```python", code, "```", "```output", shown["with"], "```", ""),
        _effect(name).rstrip(),
    ]


def _from_elsewhere(name: str) -> list[str]:
    """The same of a method whose effect is measured after a training."""
    figure, made, rows, place, code = ELSEWHERE[name]
    head, line, *body = model_side_page.make(made).strip().splitlines()
    chosen = [row for row in body if row.startswith(tuple(f"| {start} |" for start in rows))]
    output = ["```output", PRINTED[name], "```"] if PRINTED[name] else []
    return [
        f"![What was measured of {name}](images/{figure})",
        "",
        *("```python", formatted(code), "```", *output, ""),
        *(head, line, *chosen, "", f"[How this was measured](effects.md#{place})"),
    ]


def _marked(text: str, truth: Sequence[str]) -> str:
    """A caption with its objects marked, for people who see colours and for those who do not."""
    parts = []
    for piece in pieces(text, frozenset(truth)):
        word = html.escape(piece.text)
        if piece.kind == "bad":
            word = f'<b class="invented">{word}</b>'
        elif piece.kind == "good":
            word = f'<span class="found">{word}</span>'
        parts.append(word)
    return "".join(parts)


def _effect(name: str) -> str:
    """What the recommended setting changes, with intervals."""
    stored = measure_pruning.settings() if name in PRUNERS else None
    plain, *others = effects_page.load(stored)
    (effect,) = (e for e in others if e.setting.group == name and e.setting.rank == 0)
    captions = effects_page.CAPTIONS[:4]
    values = [plain.captions.measure(metric).value or 0.0 for metric in captions]
    cells = [f"{100 * value:.1f}" for value in values[:3]] + [f"{values[3]:.1f}"]
    changes = []
    for metric in captions:
        change = effects_page.difference(plain.captions, effect.captions, metric)
        changes.append(effects_page.change_cell(change, 1 if metric == "mean_length" else 100))
    head = ("", "CHAIR_s", "CHAIR_i", "recall", "words", "captions changed")
    label = f"`{effect.setting.label}`"
    return table(head, [["plain", *cells, ""], [label, *changes, effect.changed(plain)]])
