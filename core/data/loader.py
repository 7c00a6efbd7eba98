"""Training items and batches of the images of a split, in an order that can be resumed."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.data.labels import read_label, to_training
from core.data.lists import Split
from core.data.settings import AugmentConfig
from core.data.transforms import TrainingView, normalise
from core.run import distributed, vision
from core.run.errors import NamesFile
from core.run.settings import Runtime, check

BLOCK = 64
"""Outside training, images of one size share batches within blocks of this many images."""
PIXELS = {"cuda": 2**22, "cpu": 2**20}
"""Pixels of such a batch at the largest scale; a DeepLab v3+ takes about 1 kB for each."""


class LabelledImages(Dataset):
    """Augmented images with tags and, where given, label maps of 0..C, C = `num_classes`; items are
    drawn by (index, seed). Without label maps, labels are 0, and 255 in padding."""

    def __init__(
        self, split: Split, labels: Sequence[Path] | None, num_classes: int, augment: AugmentConfig
    ):
        self.split, self.labels, self.num_classes = split, labels, num_classes
        self._view = TrainingView(augment)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        """{"image": (3, S, S) float32, "label": (S, S) int64, "tags": (C,) float32, "id"}."""
        index, seed = draw
        image = self.split.read_image(index)
        if self.labels is None:
            label = np.zeros(image.shape[:2], np.int64)
        else:
            label = to_training(read_label(self.labels[index], self.num_classes, image.shape[:2]))
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        view, label = self._view(pixels, torch.from_numpy(label), seed)
        tags = torch.from_numpy(self.split.tags[index]).float()
        return {"image": view, "label": label, "tags": tags, "id": self.split.ids[index]}


class RawImages(Dataset):
    """Centre squares of one size, for views that are made in batches."""

    def __init__(self, split: Split, side: int):
        self.split, self.side = split, side

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        """{"image": (3, side, side) uint8, "id"}."""
        image = torch.from_numpy(self.split.read_image(draw[0])).permute(2, 0, 1)
        square = vision.v2.functional.center_crop(image, [min(image.shape[-2:])])
        square = vision.v2.functional.resize(square, [self.side, self.side], antialias=True)
        return {"image": square, "id": self.split.ids[draw[0]]}


def balanced_weights(tags: np.ndarray, balance: float) -> np.ndarray:
    """How often each image of (N, C) bool tags is drawn, so that rare classes come more evenly.

    An image has the weight of its rarest class, n^-balance for a class of n images. With 0.5 these
    are the repeat factors of LVIS (Gupta et al., 2019) without their threshold; with 0 all images
    are drawn alike, with 1 rare classes about as often as frequent ones. An image without classes
    has the mean weight of the others. The (N,) float64 weights have mean 1.
    """
    counts = np.maximum(tags.sum(0), 1.0)
    weights = (tags * counts**-balance).max(1, initial=0)
    tagged = tags.any(1)
    weights[~tagged] = weights[tagged].mean() if tagged.any() else 1
    return weights / weights.mean()


@dataclass(frozen=True)
class StepSampler:
    """Batches of (index, seed) for `iterations` steps: shuffled epochs without a short last batch.

    Step t is a function of (seed, t), so a training that resumes at `start` sees exactly what it
    would have seen. Several processes share each batch.
    """

    count: int  # images
    batch_size: int  # images per step, over all processes
    iterations: int
    seed: int
    start: int = 0  # first step
    # (count,) of mean 1: how often an epoch has each image, rounded down or up. None: once each.
    weights: np.ndarray | None = None

    def __post_init__(self):
        check(self.count > 0, "the training list is empty")
        check(
            self.batch_size % distributed.world() == 0,
            f"a batch of {self.batch_size} cannot be shared by {distributed.world()} processes; "
            "batch sizes are totals over all processes",
        )

    def __len__(self) -> int:
        return self.iterations - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.iterations):
            yield self.batch(step)[distributed.rank() :: distributed.world()]

    def batch(self, step: int) -> list[tuple[int, int]]:
        draws = range(step * self.batch_size, (step + 1) * self.batch_size)
        order = {e: self._epoch(e) for e in {d // self.count for d in draws}}
        return [
            (int(order[d // self.count][d % self.count]), (self.seed * 1_000_003 + d) & 0x7FFFFFFF)
            for d in draws
        ]

    def _epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.count)
        if self.weights is None:
            return order
        # Systematic sampling: `count` even steps along the images, each as long as its weight.
        ends = np.cumsum(self.weights[order])
        steps = (np.arange(self.count) + rng.random()) * (ends[-1] / self.count)
        return rng.permutation(order[np.searchsorted(ends, steps, "right").clip(0, self.count - 1)])


def make_loader(dataset: Dataset, draws: StepSampler, workers: int) -> DataLoader:
    """Batches of `dataset` in the order of `draws`."""
    return DataLoader(
        NamesFile(dataset.__getitem__),
        batch_sampler=draws,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="spawn" if workers and torch.cuda.is_available() else None,
        worker_init_fn=_one_thread,
    )


def batches_from(
    dataset: Dataset, batch_size: int, iterations: int, runtime: Runtime, balance: float = 0
) -> Callable[[int], DataLoader]:
    """What `core.run.loop.Loop` takes: first step -> all batches from there on. `dataset` takes
    (index, seed), its `split` has the images. With `balance` 0, an epoch draws every image once;
    see `balanced_weights`."""
    count, seed = len(dataset.split), runtime.seed
    weights = balanced_weights(dataset.split.tags, balance) if balance else None

    def batches(start: int) -> DataLoader:
        draws = StepSampler(count, batch_size, iterations, seed, start, weights)
        return make_loader(dataset, draws, runtime.workers)

    return batches


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(1)


def batches_by_size(
    split: Split, todo: Collection[int], device: torch.device, scale: float = 1
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of images of one size: indices and (B, 3, H, W) float32, normalised, on `device`.

    Blocks of consecutive images are sorted by size. Batches are cut from the whole list, and those
    without any image of `todo` are left out: a run that goes on after a kill computes the same
    batches as an uninterrupted one, and on a CPU the same bytes. `scale` is the largest factor by
    which the network's views are enlarged.
    """
    todo = set(todo)
    for start in range(0, len(split), BLOCK):
        block = range(start, min(start + BLOCK, len(split)))
        if todo.isdisjoint(block):
            continue
        by_size: dict[torch.Size, dict[int, Tensor]] = {}
        for k in block:
            image = torch.from_numpy(split.read_image(k)).permute(2, 0, 1)
            by_size.setdefault(image.shape, {})[k] = image
        for size, images in by_size.items():
            count = max(1, int(PIXELS[device.type] / (size[1] * size[2] * max(1, scale) ** 2)))
            for first in range(0, len(images), count):
                indices = [*images][first : first + count]
                if not todo.isdisjoint(indices):
                    pixels = torch.stack([images[k] for k in indices])
                    yield indices, normalise(pixels.to(device))
