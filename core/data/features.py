"""Feature files: `<id>.npy`, one (D, h, w) array of any float type per image; and their shapes."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from core.data.finder import FEATURES, Files
from core.data.images import TURNED, Size
from core.data.lists import Split
from core.run import distributed
from core.run.errors import UserError
from core.run.files import atomic_write, read_array

FeatureSource = Callable[[Sequence[int]], Iterator[tuple[int, Tensor]]]
"""Indices of images, ascending -> pairs of an index and its (D, h, w) float32 features."""
NEEDED = "uss.features_dir needs one <id>.npy of shape (D, h, w) for each training image"
FORM = "expected finite floats (D, h, w), one array of numpy.save"

# What features that do not have the shape of a grid seem to be.
LAST = "they seem to be (h, w, D): save array.transpose(2, 0, 1)"
TOKENS = "they seem to be a list of tokens: drop the class token, and reshape to (D, h, w)"
SWAPPED = "they seem to be (D, w, h): save array.transpose(0, 2, 1)"
POOLED = "they are one vector for a whole photograph: save the network's map before it is pooled"
NOT_UPRIGHT = (
    "they were made from photographs that were not turned upright by their EXIF orientation; make "
    "them again from upright ones"
)
ODD = "a grid covers the whole photograph, row by row"


def feature_files(folder: Path, split: Split, remedy: str = NEEDED) -> tuple[Path, ...]:
    """The `<id>.npy` of every image of `split` in `folder`.

    Raises:
        UserError: files are missing, or there are several for one id.
    """
    return Files(folder, FEATURES).every(split.ids, remedy)


def read_features(path: Path) -> Tensor:
    """(D, h, w) float32 of an .npy file of any float type.

    Raises:
        UserError: the file is missing, broken, pickled, of another form or not finite.
    """
    array = _load(path)
    if not np.isfinite(array).all():
        raise UserError(f"features {path} are not finite; {FORM}")
    return torch.from_numpy(array.astype(np.float32))


def feature_shape(path: Path) -> tuple[int, ...]:
    """(D, h, w) of an .npy file, of which only the header is read; see `read_features`."""
    return _load(path, mmap_mode="r").shape


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    array = read_array(path, FORM, mmap_mode)
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(f"features {path} are an archive (.npz, checkpoint), not .npy; {FORM}")
    if array.ndim != 3 or array.dtype.kind != "f" or not array.size:
        raise UserError(f"features {path} are {array.shape} {array.dtype}; {FORM}")
    return array


def write_features(source: FeatureSource, split: Split, folder: Path) -> None:
    """Writes `<id>.npy`, (D, h, w) float16, of every image of `split` that has none in `folder`."""
    paths = [folder / f"{i}.npy" for i in split.ids]
    todo = distributed.my_share(paths)
    bar = tqdm(source(todo), "features", len(paths), initial=len(paths) - len(todo), unit="image")
    for index, feat in bar:
        with atomic_write(paths[index]) as tmp, tmp.open("wb") as file:
            np.save(file, feat.numpy().astype(np.float16))
    distributed.barrier()


def file_features(paths: Sequence[Path]) -> FeatureSource:
    """Features from files, all of which must have as many channels as the first."""

    def source(indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        width = feature_shape(paths[0])[0]
        for k in indices:
            feat = read_features(paths[k])
            if len(feat) != width:
                raise UserError(
                    f"features {paths[k]} have {len(feat)} channels, {paths[0].name} has {width}"
                )
            yield k, feat

    return source


def misread(shape: tuple[int, ...], size: Size, orientation: int) -> str | None:
    """Why a shape (a, b, c) cannot be the (D, h, w) of its photograph; None if it can. `size` is
    (H, W) of the upright photograph in pixels, `orientation` its EXIF orientation."""
    a, b, c = shape
    if b == c == 1 and min(size) >= 64:
        return POOLED
    if b == c or alike((b, c), size):  # many networks resize every photograph to a square
        return None
    if 1 in shape:
        return TOKENS
    if a == b or alike((a, b), size):
        return LAST
    if alike((c, b), size):
        return NOT_UPRIGHT if orientation in TURNED else SWAPPED
    return ODD


def one_grid(shapes: Sequence[tuple[int, ...]], sizes: Sequence[Size]) -> bool:
    """Whether photographs of different shapes have one grid, that of a network's fixed input."""
    if len({shape[1:] for shape in shapes}) != 1:
        return False
    varied = any(not alike(sizes[0], size) for size in sizes)
    return varied and all(d > max(h, w) and max(h, w) <= 2 * min(h, w) for d, h, w in shapes)


def alike(grid: Size, size: Size) -> bool:
    """Whether a grid has a photograph's shape up to rounding and padding: by one cell, or by a
    quarter of a side."""
    (h, w), (height, width) = grid, size
    lowest = max(height / (h + 1), width / (w + 1))
    highest = min(n / (k - 1) if k > 1 else math.inf for n, k in ((height, h), (width, w)))
    return lowest <= highest or abs(math.log(h * width / (w * height))) <= math.log(1.25)
