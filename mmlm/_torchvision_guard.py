"""Makes torchvision importable beside a torch build that lacks its compiled operators.

The torchvision wheel on the package index is linked against CUDA libraries. Beside a CPU build of
torch its compiled part does not load, and the import then dies with ``operator torchvision::nms
does not exist`` because two fake kernels are registered for operators that were never defined.
Nothing else in the package needs them. The guard waits for that one error: a working torchvision
is never touched, and torch itself is not imported before somebody asks for torchvision.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

__all__ = ["install"]

_SYMPTOM = "operator torchvision::nms does not exist"
_kept_alive: list[Any] = []  # a Library that is garbage collected takes its operators with it


def install() -> None:
    """Puts the guard in front of the import system, once; does nothing if torchvision is in."""
    if "torchvision" in sys.modules or any(isinstance(f, _Finder) for f in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())


def _define_missing_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept_alive.append(library)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the real torchvision and wraps its loader; every other name is left alone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Runs the real loader; on the one known error defines the operators and runs it again."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._real.exec_module(module)
        except RuntimeError as error:
            if _SYMPTOM not in str(error):
                raise
            for name in [n for n in sys.modules if n.startswith("torchvision.")]:
                del sys.modules[name]
            _define_missing_operators()
            self._real.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        # Resource readers and inspection ask the loader for more than the two methods above.
        return getattr(self._real, name)
