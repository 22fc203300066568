"""The README.md of an exported model: where it comes from, in words and numbers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmlm.records import file_hash

__all__ = ["ModelCard", "data_hashes", "git_revision"]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is said about an exported model.

    Attributes:
        base_model: what the training started from: an id, a folder or "embedded".
        configuration: of the training, as JSON values.
        data: hash of every file of the training data.
        numbers: what was measured at the end, by name.
        revision: of the code, see `git_revision`.
        command: that started the training.
    """

    base_model: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    revision: str = ""
    command: str = ""

    def text(self, name: str, what: str) -> str:
        """The card in Markdown, with the header that the Hugging Face hub reads.

        Args:
            name: of the model.
            what: "adapter", "merged" or "model".
        """
        library = "peft" if what == "adapter" else "transformers"
        header = [f"library_name: {library}", "pipeline_tag: image-text-to-text", "tags: [mmlm]"]
        if self.base_model.count("/") == 1 and not Path(self.base_model).exists():
            header.insert(0, f"base_model: {self.base_model}")
        lines = ["---", *header, "---", "", f"# {name}", "", _WHAT[what], "", "## Origin", ""]
        for label, value in (
            ("Base model", self.base_model),
            ("Code revision", self.revision),
            ("Command", self.command),
        ):
            lines += [f"- {label}: `{value}`"] if value else []
        lines += [f"- Data: `{file}` ({digest})" for file, digest in self.data.items()]
        if self.numbers:
            lines += ["", "## Numbers", "", "| name | value |", "| --- | --- |"]
            lines += [f"| {label} | {value:.6g} |" for label, value in self.numbers.items()]
        if self.configuration:
            text = json.dumps(self.configuration, indent=2, ensure_ascii=False)
            lines += ["", "## Configuration", "", "```json", text, "```"]
        return "\n".join(lines) + "\n"


_WHAT = {
    "adapter": "Adapter weights; load them onto the base model with `peft.PeftModel`.",
    "merged": "The whole model, its adapter folded into the weights. Plain transformers loads it: "
    "`AutoModelForImageTextToText` and `AutoProcessor`.",
    "model": "The whole model. Plain transformers loads it: `AutoModelForImageTextToText` and "
    "`AutoProcessor`.",
}


def git_revision() -> str:
    """The commit of this code, ``-dirty`` behind it if files differ; empty outside of git."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        except OSError:  # no git on this machine
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    changed = commit and git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def data_hashes(files: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of every data file, by its path as it was given."""
    return {str(file): file_hash(Path(file)) for file in files}
