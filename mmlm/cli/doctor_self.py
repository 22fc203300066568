"""``mmlm doctor --self``: what is installed here, what is missing, and the line that brings it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.markers import Marker
    from packaging.requirements import Requirement

__all__ = ["EXTRAS", "installation"]

EXTRAS = {
    "web": "`mmlm web`, the playground in a browser",
    "serve": "`mmlm serve`, an HTTP endpoint like OpenAI's",
    "track": "TensorBoard and trackio beside a training",
    "nlp": "objects read from captions with spaCy and a scene graph parser",
    "ray": "data generation as Ray actors",
    "gguf": "a CLIP tower out of a GGUF file",
    "lmms": "our methods inside lmms-eval",
    "docs": "the documentation site",
    "art": "drawing the sprites of the embedded world again",
    "dev": "tests, types and style",
}
"""What the optional groups of packages are for; a test compares the names with the metadata."""
WATCHED = (
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "MMLM_DATA_DIR",
    "NO_COLOR",
    "OMP_NUM_THREADS",
    "XDG_STATE_HOME",
)
"""Variables that change what commands do; none of them is a secret."""
SECONDS = 4.0
"""The hub is asked once, for at most so long."""


@dataclass(frozen=True)
class _Need:
    """One line of the package's requirements, and what is there."""

    name: str
    wanted: str
    extra: str
    installed: str | None

    @property
    def is_met(self) -> bool:
        from packaging.specifiers import SpecifierSet

        if self.installed is None:
            return False
        return SpecifierSet(self.wanted).contains(self.installed, prereleases=True)


def installation() -> dict[str, Any]:
    """Everything as JSON values; without ``problems`` every command that needs no extra can run."""
    needs = list(_needs())
    report: dict[str, Any] = {
        "mmlm": _own(),
        "packages": {
            need.name: {"installed": need.installed, "wanted": need.wanted, "ok": need.is_met}
            for need in needs
            if not need.extra
        },
        "extras": {extra: _extra(extra, needs) for extra in EXTRAS},
        "devices": _devices(),
        "assets": _assets(),
        "folders": _folders(),
        "hub": _hub(),
        "variables": {name: os.environ[name] for name in WATCHED if name in os.environ},
    }
    report["problems"] = list(_problems(report))
    return report


def _own() -> dict[str, Any]:
    import mmlm

    return {
        "version": mmlm.__version__,
        "folder": str(Path(mmlm.__file__).parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
    }


def _needs() -> Iterator[_Need]:
    for one, extra in _requirements():
        if one.marker is not None and not one.marker.evaluate({"extra": extra}):
            continue  # for another system or Python
        try:
            installed = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            installed = None
        yield _Need(one.name, str(one.specifier), extra, installed)


def _requirements() -> list[tuple[Requirement, str]]:
    """What mmlm requires, each with the extra that asks for it ("" for mmlm itself).

    A checkout's own declaration comes first: the metadata of an editable installation stays as it
    was when pip ran.
    """
    from packaging.requirements import Requirement

    if (_root() / "pyproject.toml").is_file():
        project = tomllib.loads((_root() / "pyproject.toml").read_text("utf-8"))["project"]
        groups = {"": project["dependencies"], **project["optional-dependencies"]}
        return [(Requirement(line), extra) for extra, lines in groups.items() for line in lines]
    found = []
    for line in metadata.requires("mmlm") or []:
        one = Requirement(line)
        extra = "" if one.marker is None else _extra_of(one.marker)
        found.append((one, extra))
    return found


def _extra_of(marker: Marker) -> str:
    """The extra without which a requirement does not count."""
    if marker.evaluate({"extra": ""}):
        return ""
    return next((name for name in EXTRAS if marker.evaluate({"extra": name})), "")


def _root() -> Path:
    import mmlm

    return Path(mmlm.__file__).resolve().parents[1]


def _extra(extra: str, needs: list[_Need]) -> dict[str, Any]:
    missing = [need.name for need in needs if need.extra == extra and not need.is_met]
    return {
        "for": EXTRAS[extra],
        "missing": missing,
        "install": _pip(extra) if missing else None,
    }


def _pip(extra: str = "") -> str:
    """The line that installs mmlm, or one of its extras, as it was installed: from a checkout?"""
    group = f"[{extra}]" if extra else ""
    if (_root() / "pyproject.toml").is_file():
        return f'pip install -e "{_root()}{group}"'
    return f'pip install "mmlm{group}"'


def _devices() -> dict[str, Any]:
    """Where models can run; the reason if torch itself does not start."""
    found: dict[str, Any] = {
        "processors": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")  # not on macOS
        else os.cpu_count(),
    }
    try:
        import torch
        from transformers.utils.import_utils import is_flash_attn_2_available
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return found | {"error": f"{type(error).__name__}: {error}"}
    cuda = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return found | {
        "threads": torch.get_num_threads(),
        "built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "accelerator": accelerator.type if accelerator else None,
        "gpus": [
            {"name": one.name, "memory_gib": round(one.total_memory / 2**30, 1)} for one in cuda
        ],
        "bfloat16": bool(cuda) and torch.cuda.is_bf16_supported(),
        "flash_attention_2": is_flash_attn_2_available(),
    }


def _assets() -> dict[str, Any]:
    """What ships beside the code, each with the reason if it is not whole."""
    from mmlm.cli.configs import shipped_configs
    from mmlm.language.tables import load_table

    def model() -> str:
        from safetensors import safe_open

        import mmlm

        folder = Path(mmlm.__file__).parent / "assets"
        with safe_open(folder / "model.safetensors", "numpy") as tensors:  # checks all offsets
            count = len(tensors.keys())
        for name in ("config.json", "tokenizer.json", "processor_config.json"):
            (folder / name).read_bytes()
        return f"{count} tensors"

    def configs() -> str:
        if not (names := shipped_configs()):
            raise FileNotFoundError("no file in the folder `configs`")
        return f"{len(names)} files"

    def words() -> str:
        return f"{len(load_table('synonyms.json'))} objects"

    found = {}
    for name, check in {"embedded model": model, "configurations": configs, "words": words}.items():
        try:
            found[name] = {"state": check(), "error": None}
        # Whatever is wrong with a file is what this command is asked to tell.
        except Exception as error:
            found[name] = {"state": None, "error": f"{type(error).__name__}: {error}"}
    return found


def _folders() -> dict[str, Any]:
    """Where large files go, what is there, and how much room is left."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from benchmarks.official import OFFICIAL, data_folder, search_path
    from mmlm.cli.chat_lines import history_file

    hub = Path(HF_HUB_CACHE)
    models = [path.name for path in sorted(hub.glob("models--*"))]
    official = [name for name in OFFICIAL if any(place.exists() for place in search_path(name))]
    return {
        "models": _folder(hub) | {"holds": [name[8:].replace("--", "/") for name in models]},
        "official files": _folder(data_folder()) | {"holds": official},
        "chat history": _folder(history_file().parent) | {"holds": []},
    }


def _folder(path: Path) -> dict[str, Any]:
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    return {
        "folder": str(path),
        "writable": os.access(place, os.W_OK),
        "free_gib": round(shutil.disk_usage(place).free / 2**30, 1),
    }


def _hub() -> dict[str, Any]:
    """Whether models can be fetched now."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return {"address": ENDPOINT, "reachable": False, "why": "HF_HUB_OFFLINE is set"}
    import httpx

    try:
        httpx.head(ENDPOINT, timeout=SECONDS, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return {"address": ENDPOINT, "reachable": False, "why": str(error) or type(error).__name__}
    return {"address": ENDPOINT, "reachable": True, "why": ""}


def _problems(report: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for name, package in report["packages"].items():
        if not package["ok"]:
            has = package["installed"] or "not installed"
            yield {
                "problem": f"{name} is {has}; mmlm needs {package['wanted'] or 'it'}.",
                "advice": _pip(),
            }
    if error := report["devices"].get("error"):
        yield {"problem": f"torch does not start: {error}", "advice": _pip()}
    for name, asset in report["assets"].items():
        if asset["error"]:
            yield {
                "problem": f"The {name} that ship with mmlm cannot be read: {asset['error']}",
                "advice": f"Install mmlm again: {_pip()} --force-reinstall --no-deps",
            }
    for name, folder in report["folders"].items():
        if not folder["writable"]:
            yield {
                "problem": f"The folder for {name}, {folder['folder']}, cannot be written.",
                "advice": "Change its owner, or name another one: HF_HOME for models, "
                "MMLM_DATA_DIR for official files, XDG_STATE_HOME for the history.",
            }
