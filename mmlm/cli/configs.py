"""Configuration files that ship with mmlm, found by name (``decode/vhr``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import mmlm
from mmlm.cli.frame import closest
from mmlm.errors import InputError

__all__ = ["effect_label", "effect_settings", "find_config", "shipped_configs", "with_config_paths"]

# `configs` is installed beside `mmlm`, in a checkout as well as from a wheel.
FOLDER = Path(mmlm.__file__).resolve().parent.parent / "configs"


def shipped_configs(folder: Path = FOLDER) -> list[str]:
    """Names of the shipped configuration files, e.g. ``decode/vhr``, sorted."""
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """The file behind ``--config NAME``: an existing path, or the name of a shipped file.

    Args:
        name: A path, or a shipped name with or without ``.yaml``.

    Raises:
        InputError: If there is no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    known = shipped_configs()
    raise InputError(
        f"There is no configuration {name!r}: neither a file nor a shipped name.",
        advice=closest(name, known) or f"Shipped names: {', '.join(known)}",
    )


def effect_settings(model: str) -> dict[str, tuple[str, ...]]:
    """Settings of every method on a model: the recommended one first, then other strengths.

    Args:
        model: Name of a shipped file ``effects/MODEL``.

    Returns:
        Method name -> text forms.

    Raises:
        InputError: If nothing is shipped for that model.
    """
    import yaml

    content = yaml.safe_load(find_config(f"effects/{model}").read_text(encoding="utf-8"))
    return {name: tuple(texts) for name, texts in content.items()}


def effect_label(text: str) -> str:
    """A setting's text form for tables: without the lists of heads that end it, if any do."""
    return re.sub(r",\s*(heads_by_layer|image_heads)=.*\)$", ")", text)


def with_config_paths(argv: Sequence[str]) -> list[str]:
    """The arguments with every ``--config NAME`` replaced by the path of that file.

    Raises:
        InputError: If there is no such file.
    """
    found: list[str] = []
    for token in argv:
        name, equals, value = token.partition("=")
        if found and found[-1] == "--config":
            found[-1] = f"--config={find_config(token)}"
        elif equals and name == "--config":
            found.append(f"--config={find_config(value)}")
        else:
            found.append(token)
    return found
