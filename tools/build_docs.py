"""Writes the pages that are made from the code. A test compares them with what is committed.

python tools/build_docs.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import mmlm

DOCS = Path(__file__).parents[1] / "docs"

INTRODUCTION = """# Methods

<!-- Written by tools/build_docs.py from the classes; do not edit. -->

Every method works on every family below, batched and left-padded, with greedy decoding, sampling
and beams, under SDPA or eager attention, alone or with others. None of those below reads attention
weights, so other kernels need nothing extra. A method is written as its Python call everywhere: in
code, on the command line, in YAML and in run records.

Cost is counted in decoder rows per row of the batch: extra rows in the prefill, and for every
generated token. Inside `generate` extra rows share the forward pass of the main rows.
"""


def section(docstring: str, heading: str) -> str:
    """The text below one of the fixed headings, joined to one paragraph."""
    body = re.search(rf"^{heading}:\n((?:    .*\n|\n)+)", docstring + "\n", re.M)
    if body is None:
        raise ValueError(f"no heading {heading!r} in {docstring[:40]!r}")
    return " ".join(body.group(1).split())


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
        where = f"{paper.venue}, arXiv {paper.arxiv}"
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
        f"| `{f.name}` | `{f.default!r}` | {' '.join(texts[f.name].split())} |"
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
    ]
    return [
        f"## {cls.__name__}",
        "",
        f"*{cls.paper.title}* ({cls.paper.venue}, arXiv {cls.paper.arxiv}).",
        "",
        section(doc, "Idea"),
        "",
        f"**Acts at.** {section(doc, 'Acts at')}",
        "",
        f"**Cost.** {section(doc, 'Cost')}",
        "",
        "| parameter | default | meaning |",
        "| --- | --- | --- |",
        *rows,
        "",
        f"**Differs from the paper.** {section(doc, 'Differs')}",
        "",
        f"**Limits.** {section(doc, 'Limits')}",
    ]


def families() -> str:
    """The families with a row of their own."""
    from mmlm.engine.anatomy import FAMILIES

    names = ", ".join(f"`{name}`" for name in FAMILIES)
    return (
        f"{names}. Other models are tried with generic discovery; `mmlm doctor MODEL` says what "
        "works and why not."
    )


PAGES = {"methods.md": methods_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
        print(f"wrote docs/{name}")
