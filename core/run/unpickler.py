"""A stand-in for pickle that reads tensors of any checkpoint and runs no code of the file."""

import pickle
import types
from typing import Any

from core.run.errors import UserError


class _Ignored:
    """Stands for an object of a checkpoint that is not a tensor; it does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "_Ignored":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _TensorsOnly(pickle.Unpickler):
    """Builds tensors and plain containers; every other class becomes `_Ignored`, so no code of the
    file runs."""

    KNOWN = frozenset(
        {
            ("collections", "OrderedDict"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch", "Size"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        storage = module in ("torch", "torch.storage") and name.endswith("Storage")
        storage = storage and "." not in name  # no attribute of an attribute
        if (module, name) in self.KNOWN or storage:
            return super().find_class(module, name)
        return _Ignored


def _refused(*args: Any, **kwargs: Any) -> None:
    raise UserError("it is not a checkpoint, or older than torch 1.6; save its state dict again")


tensors_only = types.SimpleNamespace(Unpickler=_TensorsOnly, load=_refused, __name__="tensors")
"""The `pickle_module` of torch.load."""
