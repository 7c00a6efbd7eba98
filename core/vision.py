"""The one place that imports torchvision and timm, when they are first used: they take seconds.

`vision.v2` are torchvision's transforms, `vision.tv_tensors` its tensors, `vision.timm` is timm.

PyPI's torchvision next to a CPU-only PyTorch does not import, because the operators that it
registers were compiled for another build. Declaring their schemas first makes it importable; models
and transforms work, only the compiled operators themselves stay unavailable, and nothing here needs
them.
"""

import importlib
from typing import Any

import torch

_MODULES = {"v2": "torchvision.transforms.v2", "tv_tensors": "torchvision.tv_tensors"}
_MODULES |= {"timm": "timm"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_torchvision()  # timm imports it, too
    module = importlib.import_module(_MODULES[name])
    globals()[name] = module
    return module


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        globals()["_library"] = library  # a declaration ends with it
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
