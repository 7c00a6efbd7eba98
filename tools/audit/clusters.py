"""Stage 3's clusters, read back from its output."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from core.config import Config
from core.data.labels import BACKGROUND, BIASED_ON_DISK, read_label
from core.data.lists import Split, label_files
from core.pipeline import Run
from core.run.errors import UserError
from core.run.files import read_array, read_arrays

SIDE = 160  # pixels, longest side of a picture
REMEDY = "run make_debiased_labels.py with the same --config first"


@dataclass
class Clusters:
    """Stage 3's clusters of all images, one row per cluster, image by image."""

    vectors: Tensor  # (N, D) float32 unit vectors
    labels: np.ndarray  # (N,) 0..C
    images: np.ndarray  # (N,) index of the image
    area: np.ndarray  # (N,) pixels of the cluster's label
    removed: np.ndarray  # (N,) pixels of `area` that were marked biased
    pixels: np.ndarray  # (images,) size of each image
    labelled: np.ndarray  # (1 + C,) pixels by pseudo label
    marked: np.ndarray  # (1 + C,) pixels of `labelled` that were marked biased
    paths: list[tuple[Path, Path, Path]]  # by image: cells, pseudo label, debiased label

    def pixels_of(self, row: int) -> np.ndarray:
        """(H, W) bool: all pixels of a background cluster, the removed ones of a class cluster."""
        image = self.images[row]
        cells, label, debiased = read_maps(self.paths[image], len(self.labelled) - 1)
        inside = cells == row - np.searchsorted(self.images, image)
        return (
            inside
            & (label == self.labels[row])
            & ((self.labels[row] == BACKGROUND) | (debiased == BIASED_ON_DISK))
        )


def read_maps(
    paths: tuple[Path, Path, Path], num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cluster, pseudo label and debiased label of every pixel of an image, each (H, W)."""
    label = read_label(paths[1], num_classes)
    debiased = read_label(paths[2], num_classes, label.shape)
    cells = read_arrays(paths[0], ("cells",), REMEDY)["cells"]
    return cv2.resize(cells, label.shape[::-1], interpolation=cv2.INTER_NEAREST), label, debiased


def read_debiased(config: Config, run: Run, split: Split) -> Clusters:
    """Reads the output of stage 3 for a list of images.

    Raises:
        UserError: stage 3 is not finished, or its output belongs to other images or labels.
    """
    debiased = label_files(run.debias / "labels", split, REMEDY)
    labels = label_files(run.wsss_labels, split, "set wsss.labels_dir to the pseudo labels")
    path = run.debias / "centroids.npz"
    cells = [run.debias / "clusters" / f"{i}.npz" for i in split.ids]
    missing = [p for p in (path, *cells) if not p.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing; {REMEDY}")
    values, images = read_arrays(path, ("labels", "images"), REMEDY).values()
    vectors = read_array(run.debias / "vectors.npy", REMEDY)
    size = len(config.data.classes) + 1
    if images.max(initial=0) >= len(split) or values.max(initial=0) >= size:
        raise UserError(f"{path} belongs to another list of images or classes; {REMEDY}")
    first = np.searchsorted(images, np.arange(len(split) + 1))
    area, removed = (np.zeros(len(values), np.int64) for _ in range(2))
    labelled, marked = (np.zeros(size, np.int64) for _ in range(2))
    pixels, paths = [], [*zip(cells, labels, debiased, strict=True)]
    for k in tqdm(range(len(split)), "reading", unit="image"):
        own, label, after = read_maps(paths[k], size - 1)
        if own.max() >= first[k + 1] - first[k]:
            raise UserError(f"{path} belongs to other images than {paths[k][0]}; {REMEDY}")
        rows = np.maximum(own, 0) + first[k]
        inside = own >= 0
        inside[inside] = values[rows[inside]] == label[inside]
        biased = after == BIASED_ON_DISK
        if (after != label)[~biased].any():
            raise UserError(f"{paths[k][2]} was not made from {paths[k][1]}; {REMEDY}")
        area += np.bincount(rows[inside], minlength=len(area))
        removed += np.bincount(rows[inside & biased], minlength=len(area))
        labelled += np.bincount(label[label < size], minlength=size)
        marked += np.bincount(label[biased & (label < size)], minlength=size)
        pixels.append(label.size)
    if not (values == BACKGROUND).any():
        raise UserError(f"{path} has no backgrounds; there is nothing to compare with")
    units = F.normalize(torch.from_numpy(vectors), dim=1)
    sizes = np.array(pixels)
    return Clusters(units, values, images, area, removed, sizes, labelled, marked, paths)


def crop(split: Split, clusters: Clusters, row: int) -> np.ndarray:
    """(h, w, 3) uint8 RGB, at most `SIDE` pixels: a cluster and the image around it, dimmed."""
    image = split.read_image(int(clusters.images[row]))
    inside = clusters.pixels_of(row)
    if inside.shape != image.shape[:2]:
        raise UserError(f"{split.images[clusters.images[row]]} has another size than its label")
    x, y, width, height = cv2.boundingRect(inside.astype(np.uint8))
    margin = max(4, max(width, height) // 8)
    window = tuple(slice(max(0, a - margin), a + n + margin) for a, n in ((y, height), (x, width)))
    dimmed = np.where(inside[..., None], image, image // 4 + 96).astype(np.uint8)[window]
    edge = cv2.morphologyEx(inside.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3)))[window]
    dimmed[(edge > 0) & ~inside[window]] = (255, 0, 255)
    scale = SIDE / max(dimmed.shape)
    size = [max(1, round(n * scale)) for n in dimmed.shape[1::-1]]
    return cv2.resize(dimmed, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
