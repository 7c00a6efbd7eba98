"""Activation maps and probabilities as other code saves them: read without running anything."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.run.errors import UserError

MAPS = ("attn_highres", "high_res", "highres", "cam", "cams")
"""Entries that hold the maps, the finest first: CLIP-ES, IRNet and its descendants."""
SAVED_AS = "{class: map}, or {keys: classes, cam: maps} as IRNet saves it"


def _bytes_of(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how pickles of Python 2 carry bytes


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays, tensors, numbers and plain containers; refuses every other name in the file
    before anything of it is called."""

    KNOWN = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _bytes_of,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,  # noqa: SLF001
        ("torch.storage", "_load_from_bytes"): _storage,
    }
    NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2

    def find_class(self, module: str, name: str) -> Any:
        if module in self.NUMPY and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)  # noqa: SLF001
        if (module, name) not in self.KNOWN:
            raise UserError(f"it contains {module}.{name}, not an array; nothing of it was run")
        return self.KNOWN[module, name]


def read_saved(path: Path) -> Any:
    """The content of an .npy, .npz, .pt or .pth file: an array, or a container of arrays.

    Raises:
        UserError: the file is missing or broken, or contains anything but arrays.
    """
    try:
        if path.suffix.lower() in (".pt", ".pth"):
            return torch.load(path, map_location="cpu", weights_only=True)
        with path.open("rb") as file:
            if path.suffix.lower() == ".npy" and file.read(6) == b"\x93NUMPY":
                file.seek(0)
                return _read_npy(file)
        if path.suffix.lower() == ".npy":
            raise ValueError("it was not saved by numpy.save")
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # noqa: BLE001 (any exception type is possible)
        raise UserError(f"{path} cannot be read: {error or type(error).__name__}") from None


def _read_npy(file: io.BufferedReader) -> Any:
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0
    if version >= (2, 0):
        header = np.lib.format.read_array_header_2_0
    if not header(file)[2].hasobject:
        file.seek(0)
        return np.load(file, allow_pickle=False)
    content = _ArraysOnly(file).load()
    whole = isinstance(content, np.ndarray) and content.shape == ()
    return content.item() if whole else content


def class_maps(content: Any, path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The activation maps in a file of `read_saved`.

    Args:
        content: a dictionary, see `SAVED_AS`.
        path: path of the file, for messages.
        count: C, the number of classes.

    Returns:
        (K,) int64 classes, from 0; (K, h, w) float32 in [0, 1].

    Raises:
        UserError: the dictionary has another form, or classes outside 0..C-1.
    """
    maps = next((content[key] for key in MAPS if key in content), None)
    if maps is not None and "keys" in content:
        keys = np.asarray(content["keys"]).reshape(-1)
    elif content and all(str(key).lstrip("-").isdigit() for key in content):
        keys, maps = np.array([int(k) for k in content]), [np.asarray(m) for m in content.values()]
    elif not content:
        return np.zeros(0, np.int64), np.zeros((0, 1, 1), np.float32)
    else:
        names = ", ".join(map(str, list(content)[:6]))
        raise UserError(f"{path} has the entries {names}; expected {SAVED_AS}")
    try:
        maps = np.asarray(maps, np.float32)
        keys = keys.astype(np.int64)
    except ValueError:
        raise UserError(f"{path} does not have one map of one size per class") from None
    if maps.ndim != 3 or len(maps) != len(keys) or len({*keys.tolist()}) != len(keys):
        raise UserError(
            f"{path} has {len(keys)} classes and maps {maps.shape}; expected (h, w) for each class"
        )
    wrong = keys[(keys < 0) | (keys >= count)]
    if len(wrong):
        raise UserError(
            f"{path} has a map of class {wrong[0]}; with {count} classes, they are 0..{count - 1}"
        )
    return keys, unit(maps, path)


def unit(maps: np.ndarray, path: Path) -> np.ndarray:
    """Maps in [0, 1]: negative activations are 0, and larger ones are divided by their maximum."""
    if not np.isfinite(maps).all():
        raise UserError(f"{path} contains numbers that are not finite")
    maps = maps.clip(0)
    peaks = maps.max((1, 2), keepdims=True, initial=0)
    return maps / np.where(peaks > 1.001, peaks, 1)


def channels_first(array: np.ndarray, path: Path, count: int) -> np.ndarray:
    """(C, h, w) or (1 + C, h, w) of an array that may have its channels last.

    Raises:
        UserError: neither its first nor its last dimension is C or 1 + C, or both are.
    """
    fits = [array.ndim == 3 and array.shape[k] in (count, count + 1) for k in (0, 2)]
    if sum(fits) != 1:
        raise UserError(
            f"{path} is an array of shape {array.shape}; expected ({count}, h, w) without "
            f"background or ({count + 1}, h, w) with it, or the same with the channels last"
        )
    return array if fits[0] else array.transpose(2, 0, 1)


def probabilities(array: np.ndarray, path: Path) -> np.ndarray:
    """(1 + C, h, w) float32 that sum to 1 from probabilities or logits."""
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path} contains numbers that are not finite")
    if array.min() < 0 or array.max() > 1.001:  # logits
        array = np.exp(array - array.max(0))
    return array / array.sum(0).clip(1e-12)
