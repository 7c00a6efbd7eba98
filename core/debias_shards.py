"""Selection of debiased centroids (Eq. 1-3) as a stream over shards on disk that merges exactly.

A shard is an .npz file with the clusters of many images (`write_shard`). One shard is in memory at
a time, and for each class two tables: 256 counters and a sum of D numbers. On disk, each centroid
gets four bytes more, its distance. The result is the same, bit for bit, for any division of the
images into shards and any order of the shards, on any number of threads:

- Unit vectors are rounded to multiples of 2^-26. Their sums are integers, exact in int64 up to 2^37
  vectors; their dot products are multiples of 2^-52 below 2, exact in float64 in whatever order a
  BLAS adds. Rounding changes a mean by 2^-27 per component at most.
- Distances are ranked as keys of 64 bits: the distance as float32, then the image, then the
  cluster. No two are equal, so that "the farthest n" is one set; among equal distances the image
  that comes first wins.

Names: D feature width, C classes without background, n centroids of a shard.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from core.run.errors import UserError
from core.run.files import atomic_write, read_arrays

SCALE = 2.0**26
CLUSTER_BITS, ORDER_BITS = 9, 34
"""Clusters of an image, and images with their clusters: at most 512, and 33,554,432 images."""
NO_BACKGROUND = (
    "no label map of the training list has background, with which Eq. 1 compares; check the labels "
    "(wsss.labels_dir, or wsss/labels below run_dir)"
)
BLOCK = 1024
"""Foreground centroids that are compared with a shard's backgrounds at a time."""


def write_shard(
    path: Path, vectors: np.ndarray, labels: np.ndarray, images: np.ndarray, sizes: np.ndarray
) -> None:
    """Writes the clusters of many images into one file, and the sum of their backgrounds.

    Args:
        path: path of the .npz file.
        vectors: (n, D) float32, of unit length or zero; rows of an image are contiguous.
        labels: (n,) 0..C, 0 is background.
        images: (n,) which image each is of, counted through over all shards.
        sizes: (n,) cells of the clusters.

    Raises:
        UserError: a vector is longer than 1, or there are more images or clusters than keys tell
            apart.
    """
    squares = np.einsum("nd,nd->n", vectors, vectors)
    if not (squares < 1.01).all():  # nor NaN
        raise UserError(f"the centroids for {path} are not of unit length; are features finite?")
    limits = 2 ** (ORDER_BITS - CLUSTER_BITS), 2**CLUSTER_BITS
    if images.max(initial=0) >= limits[0] or _place(images).max(initial=0) >= limits[1]:
        raise UserError(f"{path}: more than {limits[0]} images, or {limits[1]} clusters in one")
    with atomic_write(path) as tmp, tmp.open("wb") as file:
        np.savez(
            file,
            vectors=vectors,
            labels=labels.astype(np.int16),
            images=images.astype(np.int32),
            sizes=sizes.astype(np.int32),
            background=_integers(vectors[labels == 0]).sum(0).astype(np.int64),
        )


def select(
    shards: Sequence[Path], classes: int, alpha: float, nearest: int | None = None
) -> np.ndarray:
    """Eq. 1-3 from beginning to end: the (C, D) float32 debiased centroids.

    Args:
        shards: all files of `write_shard`.
        classes: C.
        alpha: share of each class's centroids that is kept.
        nearest: see `write_distances`.

    Raises:
        UserError: there is no background to compare with.
    """
    background, found = background_sum(shards, classes)
    if not found[0]:
        raise UserError(NO_BACKGROUND)
    distances = write_distances(shards, background, found[0], nearest)
    kept = kept_counts(found, alpha)
    return mean_of_kept(shards, distances, thresholds(shards, distances, kept), kept)


def background_sum(shards: Sequence[Path], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """First pass: (D,) int64, sum of all background vectors / 2^-26; (1 + C,) int64 centroids."""
    total, found = 0, np.zeros(1 + classes, np.int64)
    for shard in shards:
        part = _read(shard, "background", "labels")
        total = total + part["background"]
        found += np.bincount(part["labels"], minlength=1 + classes)
    return total, found


def write_distances(
    shards: Sequence[Path],
    background: np.ndarray,
    count: int,
    nearest: int | None = None,
    among: Sequence[Path] | None = None,
) -> list[Path]:
    """Second pass: the distance of each foreground centroid to the backgrounds (Eq. 1).

    Args:
        shards: whose distances are wanted.
        background: (D,) sum of the backgrounds of all shards, as `background_sum` gives it.
        count: how many they are, at least 1.
        nearest: average over this many nearest backgrounds instead, which costs a dot product for
            each pair of a foreground and a background centroid; None: over all.
        among: all shards, of which `nearest` reads the backgrounds; None: `shards`.

    Returns:
        For each shard a file next to it with `distance` (n,) float32 in [0, 1], 0 for backgrounds.
        One that was made against the same backgrounds before is left as it is.
    """
    state = background.tobytes() + str((count, nearest)).encode()
    suffix = f".{hashlib.sha256(state).hexdigest()[:12]}.npz"
    files = [shard.with_suffix(suffix) for shard in shards]
    for shard, path in zip(shards, files, strict=True):
        if path.exists():
            continue
        part = _read(shard, "vectors", "labels")
        rows = part["labels"] > 0
        vectors = _integers(part["vectors"][rows])
        if nearest is None:
            similarity = vectors @ np.rint(background / count) / SCALE**2
        else:
            similarity = _nearest(vectors, shards if among is None else among, min(nearest, count))
        distance = np.zeros(len(rows), np.float32)
        distance[rows] = np.clip((1 - similarity) / 2, 0, 1)
        with atomic_write(path) as tmp, tmp.open("wb") as file:
            np.savez(file, distance=distance)
    return files


def kept_counts(found: np.ndarray, alpha: float) -> np.ndarray:
    """(1 + C,) int64 n_c = ceil(alpha N_c) of the (1 + C,) N_c (Eq. 3); 0 for background."""
    # .4 * 5 must be 2, whatever floats say
    return np.array([0, *(math.ceil(round(alpha * n, 6)) for n in found[1:].tolist())])


def thresholds(shards: Sequence[Path], distances: Sequence[Path], kept: np.ndarray) -> np.ndarray:
    """(1 + C,) uint64: the kept[c] farthest centroids of class c have this key or a higher one.

    Finds the keys digit by digit, from the highest of eight, by counting; stops when what is left
    of every class is kept as a whole. Without ties that takes four readings of the distances.
    """
    floor, need = np.zeros(len(kept), np.uint64), kept.copy()
    every = np.arange(len(kept))
    for shift in range(56, -8, -8):
        seen = np.zeros((len(kept), 257), np.int64)  # the last column stays 0
        for labels, keys in _ranked(shards, distances):
            prefix = floor >> np.uint64(shift) >> np.uint64(8)
            inside = keys >> np.uint64(shift) >> np.uint64(8) == prefix[labels]
            digit = (keys[inside] >> np.uint64(shift)).astype(np.uint8)
            np.add.at(seen.reshape(-1), labels[inside].astype(np.int64) * 257 + digit, 1)
        above = seen[:, ::-1].cumsum(1)[:, ::-1]
        digit = (above[:, :256] >= need[:, None]).sum(1) - 1  # the highest that holds enough
        floor |= digit.astype(np.uint64) << np.uint64(shift)
        need -= above[every, digit + 1]
        if (need == seen[every, digit]).all():
            break
    return floor


def mean_of_kept(
    shards: Sequence[Path], distances: Sequence[Path], floor: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """Third pass: (C, D) float32 means of the kept centroids (Eq. 2); 0 for a class without any."""
    sums = 0
    for shard, (labels, keys) in zip(shards, _ranked(shards, distances), strict=True):
        vectors = _read(shard, "vectors")["vectors"]
        if not isinstance(sums, np.ndarray):
            sums = np.zeros((len(kept), vectors.shape[1]), np.int64)
        rows = np.flatnonzero(keys >= floor[labels])
        rows = rows[np.argsort(labels[rows])]
        if len(rows):
            chosen, starts = np.unique(labels[rows], return_index=True)
            part = np.add.reduceat(_integers(vectors[rows]), starts)
            sums[chosen] += part.astype(np.int64)
    return (sums / np.maximum(kept, 1)[:, None] / SCALE)[1:].astype(np.float32)


def _integers(vectors: np.ndarray) -> np.ndarray:
    """(n, D) float64 of integers: the vectors in units of 2^-26."""
    return np.rint(vectors * SCALE, dtype=np.float64)


def _nearest(vectors: np.ndarray, shards: Sequence[Path], k: int) -> np.ndarray:
    """(n,) mean similarity of each vector to the k most similar backgrounds of all shards."""
    best = np.full((len(vectors), k), -np.inf)
    for shard in shards:
        part = _read(shard, "vectors", "labels")
        background = _integers(part["vectors"][part["labels"] == 0]).T
        for begin in range(0, len(vectors), BLOCK):
            block = slice(begin, begin + BLOCK)
            similar = np.concatenate([best[block], vectors[block] @ background], axis=1)
            best[block] = np.partition(similar, -k, axis=1)[:, -k:]
    return np.sort(best, axis=1).mean(1) / SCALE**2  # sorted, lest the order of the shards show


def _ranked(
    shards: Sequence[Path], distances: Sequence[Path]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each shard its labels and (n,) uint64 keys: farther is greater."""
    for shard, file in zip(shards, distances, strict=True):
        part = _read(shard, "labels", "images")
        images = part["images"].astype(np.int64)
        order = images << CLUSTER_BITS | _place(images)
        far = _read(file, "distance")["distance"].view(np.uint32).astype(np.uint64)
        last = 2**ORDER_BITS - 1
        yield part["labels"], far << np.uint64(ORDER_BITS) | (last - order).astype(np.uint64)


def _place(images: np.ndarray) -> np.ndarray:
    """(n,) number of each centroid within its image, from 0."""
    first = np.flatnonzero(np.diff(images, prepend=-1))
    return np.arange(len(images)) - np.repeat(first, np.diff(first, append=len(images)))


def _read(path: Path, *names: str) -> dict[str, np.ndarray]:
    return read_arrays(path, names, "remove it to have it made again")
