"""Feature files: `<id>.npy`, one (D, h, w) array of any float type for each image."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from core.data.finder import FEATURES, Files
from core.data.lists import Split
from core.run import distributed
from core.run.errors import UserError
from core.run.files import atomic_write

FeatureSource = Callable[[Sequence[int]], Iterator[tuple[int, Tensor]]]
"""Indices of images, ascending -> pairs of an index and its (D, h, w) float32 features."""
FORM = "expected finite floats (D, h, w), one array of numpy.save"


def feature_files(
    folder: Path,
    split: Split,
    remedy: str = "uss.features_dir needs one <id>.npy of shape (D, h, w) for each training image",
) -> tuple[Path, ...]:
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
    """(D, h, w) of an .npy file, of which no more than the head is read; see `read_features`."""
    return _load(path, mmap_mode="r").shape


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode, allow_pickle=False)
    except Exception as error:  # noqa: BLE001 (a broken file fails in any way)
        raise UserError(f"features {path} cannot be read ({error}); {FORM}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise UserError(
            f"features {path} are an archive, such as .npz or a checkpoint, whatever the name "
            f"says; {FORM}"
        )
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
    """Features read from files, which must all be as wide as the first."""
    width = None

    def source(indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        nonlocal width
        width = width or len(read_features(paths[0]))
        for k in indices:
            feat = read_features(paths[k])
            if len(feat) != width:
                raise UserError(
                    f"features {paths[k]} are {len(feat)} wide, those of {paths[0].name} {width}"
                )
            yield k, feat

    return source
