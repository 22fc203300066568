"""Docstrings of methods as paragraphs of Markdown, and code as the formatter leaves it."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any


def section(docstring: str, heading: str) -> str:
    """The text below one of the fixed headings, joined to one paragraph."""
    body = re.search(rf"^{heading}:\n((?:    .*\n|\n)+)", docstring + "\n", re.M)
    if body is None:
        raise ValueError(f"no heading {heading!r} in {docstring[:40]!r}")
    return markdown(body.group(1))


def markdown(text: str) -> str:
    """A docstring's paragraph as Markdown: one line, references as plain code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return " ".join(text.replace("``", "`").split())


def cited(paper: Any) -> str:
    """Where a paper appeared."""
    appeared = f"{paper.year}" if paper.venue == "arXiv" else paper.venue
    return f"{appeared}, arXiv {paper.arxiv}"


def formatted(code: str) -> str:
    """Python as ``ruff format`` leaves it, since it looks into Markdown too."""
    command = [sys.executable, "-m", "ruff", "format", "--line-length", "100", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n")
