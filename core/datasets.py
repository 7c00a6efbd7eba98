"""Images and image-level tags in PASCAL VOC's layout, and batches of them that can be resumed.

Ground truth is out of reach by construction: a `Split` knows images and tags only. The one way to
the masks is `ground_truth`, which scoring, diagnosis and supervised training call by name.
"""

import itertools
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.config import AugmentConfig, DataConfig
from core.errors import UserError, refuse_together
from core.labels import IGNORE, read_label, to_training
from core.transforms import TrainingView, normalise


@dataclass(frozen=True)
class Split:
    """One list of a data set: ids, images and tags, in the order of the list."""

    ids: tuple[str, ...]
    images: tuple[Path, ...]
    tags: np.ndarray  # (N, C) bool, which classes each image shows

    def __len__(self) -> int:
        return len(self.ids)

    def read_image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return read_image(self.images[index])


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, whatever the file's own colour mode."""
    data = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) if path.exists() else None
    if data is None:
        state = "cannot be decoded; it may be truncated" if path.exists() else "is missing"
        raise UserError(f"image {path} {state}; fetch it again or take its id off the list")
    return data


def read_split(data: DataConfig, which: str) -> Split:
    """Reads the list `which` ("train" or "val") with the tags of its images.

    Raises:
        UserError: the list, or any image or annotation on it, is missing; all are told together.
    """
    root = Path(data.root)
    name = {"train": data.train_list, "val": data.val_list}[which]
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        raise UserError(
            f"the list {path} is missing; set data.root to a folder in VOC's layout "
            f"(the demo's is made by tools/make_demo_dataset.py)"
        )
    ids = tuple(line.split()[0] for line in path.read_text("utf-8").splitlines() if line.strip())
    if not ids:
        raise UserError(f"the list {path} is empty")
    strange = [i for i in ids if Path(i).name != i]
    refuse_together([f"id {i!r} is not a plain file name" for i in strange], f"mend {path}")
    twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    refuse_together([f"id {i} stands twice in the list" for i in twice], f"mend {path}")
    images = tuple(root / "JPEGImages" / f"{i}.jpg" for i in ids)
    refuse_together([f"{p} is missing" for p in images if not p.is_file()], "complete data.root")
    tags, problems = np.zeros((len(ids), len(data.classes)), bool), []
    for row, image_id in zip(tags, ids, strict=True):
        try:
            row[_read_tags(root / "Annotations" / f"{image_id}.xml", data.classes)] = True
        except UserError as error:
            problems.append(str(error))
    refuse_together(problems, "complete data.root, or list every class in data.classes")
    return Split(ids, images, tags)


def _read_tags(path: Path, classes: Sequence[str]) -> list[int]:
    try:
        names = {e.findtext("name", "") for e in ElementTree.parse(path).getroot().iter("object")}
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"annotation {path} cannot be read ({error})") from None
    unknown = sorted(names - set(classes))
    if unknown:
        raise UserError(f"annotation {path} names class {unknown[0]!r}, which data.classes lacks")
    return [classes.index(name) for name in names]


def ground_truth(data: DataConfig, split: Split) -> tuple[Path, ...]:
    """Paths of the ground-truth masks: for scoring and fully supervised training, nothing else.

    Raises:
        UserError: masks are missing.
    """
    return label_files(Path(data.root) / "SegmentationClass", split, "get the masks of this list")


def label_files(folder: Path, split: Split, remedy: str) -> tuple[Path, ...]:
    """The label map of every image of `split` in `folder`, all of which must exist."""
    paths = tuple(folder / f"{i}.png" for i in split.ids)
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} label maps are missing, first: {missing[0]}; {remedy}"
        )
    return paths


class LabelledImages(Dataset):
    """Augmented images with tags and, where given, label maps; items are drawn by (index, seed).

    Args:
        split: images and tags.
        labels: a label map per image, or None: then labels are all 255.
        num_classes: C, to check the label maps against.
        augment: how views are made.
    """

    def __init__(
        self, split: Split, labels: Sequence[Path] | None, num_classes: int, augment: AugmentConfig
    ):
        self.split, self.labels, self.num_classes = split, labels, num_classes
        self._view = TrainingView(augment)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        """{"image": (3, S, S) float32, "label": (S, S) int64, "tags": (C,) float32}."""
        index, seed = draw
        image = self.split.read_image(index)
        if self.labels is None:
            label = np.full(image.shape[:2], IGNORE, np.int64)
        else:
            label = read_label(self.labels[index], self.num_classes, image.shape[:2])
            label = to_training(label)
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        view, label = self._view(pixels, torch.from_numpy(label), seed)
        tags = torch.from_numpy(self.split.tags[index]).float()
        return {"image": view, "label": label, "tags": tags}


class RawImages(Dataset):
    """Images as they are, all of one size, for views that are made in batches."""

    def __init__(self, split: Split):
        self.split = split

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor]:
        """{"image": (3, H, W) uint8}."""
        return {"image": torch.from_numpy(self.split.read_image(draw[0])).permute(2, 0, 1)}


class Draws:
    """Batches of (index, seed) for `iterations` steps: shuffled epochs without a short last batch.

    Step t is a function of (seed, t), so a training that starts again at `start` sees exactly what
    it would have seen.
    """

    def __init__(self, count: int, batch_size: int, iterations: int, seed: int, start: int = 0):
        if count < 1:
            raise UserError("the training list is empty")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.iterations, self.start = iterations, start

    def __len__(self) -> int:
        return self.iterations - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.iterations):
            yield self.batch(step)

    def batch(self, step: int) -> list[tuple[int, int]]:
        draws = range(step * self.batch_size, (step + 1) * self.batch_size)
        orders = {d // self.count for d in draws}
        order = {e: np.random.default_rng([self.seed, e]).permutation(self.count) for e in orders}
        return [
            (int(order[d // self.count][d % self.count]), (self.seed * 1_000_003 + d) & 0x7FFFFFFF)
            for d in draws
        ]


def make_loader(dataset: Dataset, draws: Draws, workers: int) -> DataLoader:
    """Batches of `dataset` in the order of `draws`."""
    return DataLoader(
        dataset,
        batch_sampler=draws,
        num_workers=workers,
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="spawn" if workers and torch.cuda.is_available() else None,
        worker_init_fn=_one_thread,
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def batches_by_size(
    split: Split, batch_size: int, todo: Collection[int]
) -> Iterator[tuple[list[int], Tensor]]:
    """Images of one size each: their indices and (B, 3, H, W) float32, normalised.

    Batches are cut from the whole list, and those without anything `todo` are left out: a run that
    goes on after a kill computes the same batches, hence the same bytes, as an uninterrupted one.
    """
    todo = set(todo)
    for start in range(0, len(split), batch_size):
        block = range(start, min(start + batch_size, len(split)))
        if todo.isdisjoint(block):
            continue
        images = [torch.from_numpy(split.read_image(k)).permute(2, 0, 1) for k in block]
        for _, run in itertools.groupby(zip(block, images, strict=True), lambda p: p[1].shape):
            indices, pixels = zip(*run, strict=True)
            yield list(indices), normalise(torch.stack(pixels))
