"""The one place that imports torchvision.

PyPI's torchvision beside a CPU-only PyTorch does not import, because the operators that it
registers were compiled for another build. Declaring their schemas first makes it importable; models
and transforms work, only the compiled operators themselves stay unavailable, and nothing here needs
them.
"""

import torch

try:
    import torchvision
except RuntimeError:
    _library = torch.library.Library("torchvision", "DEF")  # kept: a declaration ends with it
    for _operator in ("nms", "qnms"):
        _library.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
