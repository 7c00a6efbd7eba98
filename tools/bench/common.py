"""Pictures to measure with, and clocks."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO


def photographs(samples: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """RGB images, each with an (H, W) uint8 label map of its largest object's category."""
    folder = samples / "coco_sample"
    coco = COCO(folder / "annotations" / "instances.json")
    pairs = []
    for key, entry in sorted(coco.imgs.items()):
        found = coco.loadAnns(coco.getAnnIds(key, iscrowd=False))
        image = cv2.imread(str(folder / "images" / entry["file_name"]))
        largest = max(found, key=lambda a: a["area"], default=None)
        if image is not None and largest:
            alike = [a for a in found if a["category_id"] == largest["category_id"]]
            mask = np.max([coco.annToMask(a) for a in alike], 0)
            rank = sorted(coco.cats).index(largest["category_id"]) + 1
            pairs.append((image[..., ::-1].copy(), mask * np.uint8(rank)))
    return pairs


def drawing(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A grainy RGB picture and the (H, W) uint8 label map of its objects."""
    rng = np.random.default_rng(seed)
    label = ellipses(rng)
    image = rng.integers(0, 256, (256, 3))[label] + rng.normal(0, 6, (*label.shape, 3))
    image = np.clip(cv2.GaussianBlur(image, (0, 0), 1), 0, 255).astype(np.uint8)
    return image, label * (label < 255)


def ellipses(rng: np.random.Generator) -> np.ndarray:
    """A mask of VOC's size with up to three objects, whose borders are 255."""
    y, x = np.mgrid[:375, :500]
    label = np.zeros((375, 500), np.uint8)
    for _ in range(rng.integers(1, 4)):
        centre, radii = rng.uniform((0, 0), (375, 500)), rng.uniform(30, 150, 2)
        distance = np.hypot((y - centre[0]) / radii[0], (x - centre[1]) / radii[1])
        label[distance < 1.05] = 255
        label[distance < 1] = rng.integers(1, 21)
    return label


def patch_features(image: np.ndarray, width: int) -> np.ndarray:
    """(D, h, w) float32 at stride 8: colour and texture of patches, in a random projection.

    They vary with the picture as a network's do, but are of no use for segmentation.
    """
    rows, cols = image.shape[0] // 8, image.shape[1] // 8
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32) / 128 - 1
    maps = [*lab.transpose(2, 0, 1)]
    for dx, dy in ((1, 0), (0, 1)):
        maps += [
            np.abs(cv2.Sobel(cv2.GaussianBlur(lab[..., 0], (0, 0), s), -1, dx, dy)) for s in (1, 3)
        ]
    wide = [cv2.GaussianBlur(m, (0, 0), 12) for m in maps]
    cells = [cv2.resize(m, (cols, rows), interpolation=cv2.INTER_AREA) for m in (*maps, *wide)]
    project = np.random.default_rng(0).normal(size=(width, len(cells))).astype(np.float32)
    return np.tanh(1.5 * np.einsum("dc,chw->dhw", project, np.stack(cells)))


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call, alternating, so that all implementations see the same machine load."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if round_:  # the first compiles
                times[name].append(time.perf_counter() - began)
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The speed-up of ours over theirs: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def timed(times: list[float], work: Callable, *arguments):
    began = time.perf_counter()
    result = work(*arguments)
    times.append(time.perf_counter() - began)
    return result
