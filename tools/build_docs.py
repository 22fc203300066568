"""Writes the pages that are made from the code. A test compares them with what is committed.

python tools/build_docs.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import mmlm

sys.path.insert(0, str(Path(__file__).parent))

from docs_pages.gallery import gallery_page
from docs_pages.models import models_page
from docs_pages.texts import cited, markdown, section

DOCS = Path(__file__).parents[1] / "docs"

INTRODUCTION = """# Methods

<!-- Written by tools/build_docs.py from the classes; do not edit. -->

All of them run batched and left-padded, with greedy decoding, sampling and beams (OPERA is a search
of its own), under SDPA or eager attention, alone or with others; what a family cannot have stands
under *Limits*, and `mmlm doctor MODEL` says it for a model. A method is written as its Python call
everywhere: in code, on the command line, in YAML and in run records.

What they change on the embedded model: [Effects](effects.md). What they cost: [Speed](speed.md).
The papers' settings and numbers: [Papers](papers.md).

Rows are decoder rows per row of the batch, beyond plain greedy decoding, at the defaults: in the
prefill, and for every generated token. Inside `generate` extra rows share the forward pass of the
main rows wherever positions allow it.
"""


def methods_page() -> str:
    """docs/methods.md."""
    classes = [getattr(mmlm, name) for name in mmlm.method_names()]
    lines = [
        INTRODUCTION,
        "| method | paper | acts at | rows per prompt / token |",
        "| --- | --- | --- | --- |",
    ]
    for cls in classes:
        method, paper = cls(), cls.paper
        sites = ", ".join(f"`{s}`" for s in sorted(method.sites))
        where = cited(paper)
        cost = f"+{method.cost.prompt} / +{method.cost.token}"
        lines.append(f"| [{cls.__name__}](#{cls.__name__.lower()}) | {where} | {sites} | {cost} |")
    for cls in classes:
        lines += ["", *method_section(cls)]
    lines += ["", "## Families", "", families()]
    return "\n".join(lines) + "\n"


def method_section(cls: type[mmlm.Method]) -> list[str]:
    """One method: what it does, its parameters, what differs from the paper, limits."""
    doc = inspect.getdoc(cls) or ""
    block = re.search(r"^Parameters:\n(.*?)^Shapes:", doc, re.M | re.S)
    texts = dict(
        re.findall(
            r"^    (\w+): (.*?)(?=^    \w+: |\Z)", block.group(1) if block else "", re.M | re.S
        )
    )
    rows = [
        f"| `{f.name}` | `{f.default!r}` | {markdown(texts[f.name])} |"
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
    ]
    return [
        f"## {cls.__name__}",
        "",
        f"*{cls.paper.title}* ({cited(cls.paper)}).",
        "",
        f"{doc.partition(chr(10))[0]} {section(doc, 'Idea')}",
        "",
        f"**Acts at.** {section(doc, 'Acts at')}",
        "",
        f"**Cost.** {section(doc, 'Cost')}",
        "",
        "| parameter | default | meaning |",
        "| --- | --- | --- |",
        *rows,
        "",
        *presets(cls),
        f"**Differs from the paper.** {section(doc, 'Differs')}",
        "",
        f"**Limits.** {section(doc, 'Limits')}",
    ]


def presets(cls: type[mmlm.Method]) -> list[str]:
    """What a class has to make settings of the papers, with the first line of its text."""
    makers = {
        name: inspect.getdoc(getattr(cls, name)) or ""
        for name, member in sorted(vars(cls).items())
        if isinstance(member, classmethod | staticmethod) and not name.startswith("_")
    }
    if not makers:
        return []
    texts = (f"`{cls.__name__}.{n}`: {doc.partition(chr(10))[0]}" for n, doc in makers.items())
    return [f"**Presets.** {' '.join(texts)}", ""]


def families() -> str:
    """The families with a row of their own."""
    from mmlm.engine.families import FAMILIES

    names = ", ".join(f"`{name}`" for name in FAMILIES)
    return (
        f"{names}. Other models are tried with generic discovery; `mmlm doctor MODEL` says what "
        "works and why not."
    )


PAGES = {"gallery.md": gallery_page, "methods.md": methods_page, "models.md": models_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
        print(f"wrote docs/{name}")
