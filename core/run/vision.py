"""The one place that imports torchvision and timm, when they are first used: they take seconds.

`vision.v2` are torchvision's transforms, `vision.tv_tensors` its tensors, `vision.timm` is timm.

PyPI's torchvision next to a CPU-only PyTorch does not import, because its operators were compiled
for another build. Declaring their schemas makes it importable, by timm and by unpickling in another
process, too, once this module is imported; only the operators stay unavailable, and nothing here
needs them.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_MODULES = {"v2": "torchvision.transforms.v2", "tv_tensors": "torchvision.tv_tensors"}
_MODULES |= {"timm": "timm"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(_MODULES[name])


class _Torchvision(MetaPathFinder, Loader):
    """Imports torchvision; where it does not fit the installed PyTorch, without its operators."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == "torchvision" else None
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self._loader.exec_module(module)
        except RuntimeError:
            self._library = torch.library.Library("torchvision", "DEF")  # declared while it lives
            boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for operator in ("nms", "qnms"):
                self._library.define(f"{operator}{boxes}")
            self._loader.exec_module(module)


sys.meta_path.insert(0, _Torchvision())
