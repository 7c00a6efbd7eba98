"""Affinities of pairs of pixels, and the random walk that propagates activation maps along them.

From IRNet (Ahn, Cho and Kwak, CVPR 2019), where two pixels belong together unless a boundary is
between them, and PSA (Ahn and Kwak, CVPR 2018), where they do if their features are alike. All
pairs within a radius are listed once, as offsets that point down or right; P is their number.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from core.data.labels import BACKGROUND, IGNORE
from core.data.settings import AugmentConfig
from core.run import distributed
from core.run.settings import NonNegativeInt, PositiveInt, Radius

Offset = tuple[int, int]  # (rows down, columns to the right)


@dataclass
class PairConfig:
    """Training of a network of pairs, and the random walk along them."""

    seed_keys: ClassVar[tuple[str, ...]] = ()  # what else only training uses
    epochs: PositiveInt = 3  # Passes over the training images.
    batch_size: PositiveInt = 32  # Images per step.
    lr: float = 0.1  # Learning rate of SGD without momentum, polynomial schedule.
    weight_decay: float = 1e-4  # Weight decay.
    radius: Radius = 10  # The network learns from pairs of cells closer than this.
    # Views for training.
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(jitter=(0, 0, 0, 0)))
    beta: float = 10  # Exponent of the affinities in the walk.
    doublings: NonNegativeInt = 8  # log2 of the walk's number of steps.
    # A released checkpoint of this network (IRNet's or PSA's), used instead of training one.
    weights: str | None = None

    def unused(self) -> tuple[str, ...]:
        """Keys without effect if the network is a released one: training and its seeds."""
        training = ("epochs", "batch_size", "lr", "weight_decay", "augment", "crf")
        return (*training, *self.seed_keys) if self.weights else ()


def pair_offsets(radius: int) -> list[Offset]:
    """Offsets (dy, dx) of the pairs closer than `radius`, each pair once: 34 for 5, 152 for 10."""
    right = [(0, x) for x in range(1, radius)]
    below = itertools.product(range(1, radius), range(1 - radius, radius))
    return right + [(y, x) for y, x in below if y * y + x * x < radius * radius]


def path(offset: Offset) -> list[Offset]:
    """Cells between (0, 0) and `offset`, both included: those less than 1 from the line."""
    dy, dx = offset
    columns = range(min(0, dx), max(0, dx) + 1)
    squared = dy * dy + dx * dx
    return [(y, x) for y in range(dy + 1) for x in columns if (dy * x - dx * y) ** 2 < squared]


def path_affinity(boundary: Tensor, radius: int) -> Tensor:
    """1 - the strongest boundary on the path between the two cells of each pair.

    Args:
        boundary: (..., H, W) in [0, 1].
        radius: pairs are closer than this, in cells.

    Returns:
        (..., P, H - r, W - 2 r) with r = radius - 1, for each pair at its upper or left cell; cells
        whose pairs would leave the map have none.
    """
    at = _shifts(boundary, radius)
    strongest = (torch.stack([*map(at, path(o))]).amax(0) for o in pair_offsets(radius))
    return torch.stack([1 - edge for edge in strongest], -3)


def pair_ends(maps: Tensor, radius: int) -> tuple[Tensor, list[Tensor]]:
    """Values of (..., H, W) features or labels at both ends of each pair: (..., H - r, W - 2 r) at
    the upper or left cell, and a list of P such tensors at the other; see `path_affinity`."""
    at = _shifts(maps, radius)
    return at((0, 0)), [at(offset) for offset in pair_offsets(radius)]


def _shifts(maps: Tensor, radius: int) -> Callable[[Offset], Tensor]:
    """Offset -> the map's values at that offset from each cell whose pairs stay inside the map."""
    margin = radius - 1
    height, width = maps.shape[-2] - margin, maps.shape[-1] - 2 * margin
    if height < 1 or width < 1:
        raise ValueError(f"a map of {tuple(maps.shape)} has no pairs of radius {radius}")

    def at(offset: Offset) -> Tensor:
        y, x = offset[0], margin + offset[1]
        return maps[..., y : y + height, x : x + width]

    return at


def affinity_loss(affinity: Tensor, label: Tensor, radius: int) -> Tensor:
    """Cross entropy of affinities with whether both cells have the same label (IRNet, Eq. 8).

    Pairs of two background cells, pairs of two cells of one class, and pairs of different labels
    each count by their own mean: 1/4, 1/4 and 1/2. Ignored cells have no pairs.

    Args:
        affinity: (..., P, h, w) of `path_affinity` or `feature_affinity`.
        label: (..., H, W) integers, 0..C or 255 (or -1) to ignore.
        radius: radius of the pairs, in cells.
    """
    here, there = pair_ends(label, radius)
    here, there = here.unsqueeze(-3), torch.stack(there, -3)
    valid = (here != IGNORE) & (there != IGNORE) & (here >= 0) & (there >= 0)
    same = valid & (here == there)
    attract, repel = -torch.log(affinity + 1e-5), -torch.log(1 + 1e-5 - affinity)
    background = _mean(attract, same & (here == BACKGROUND))
    foreground = _mean(attract, same & (here != BACKGROUND))
    different = _mean(repel, valid & (here != there))
    return background / 4 + foreground / 4 + different / 2


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / (distributed.mean(chosen.sum()) + 1e-5)


def feature_affinity(features: Tensor, radius: int) -> Tensor:
    """exp(-mean |f - g|) of the features at both ends of each pair (PSA).

    (B, D, H, W) -> (B, P, H - r, W - 2 r) with r = radius - 1, in (0, 1]; see `path_affinity`.
    """
    here, there = pair_ends(features, radius)
    gaps = [(here - other).abs().mean(-3) for other in there]
    return torch.exp(-torch.stack(gaps, -3))


def random_walk(maps: Tensor, affinity: Tensor, radius: int, beta: float, doublings: int) -> Tensor:
    """Spreads maps over the image by 2^doublings steps of a random walk (IRNet, Eq. 10-11).

    A step goes to cell j from each cell i of its neighbourhood with the probability a_ij^beta /
    sum_i a_ij^beta, a cell's affinity with itself being 1. Steps are taken one by one on the P maps
    of affinities, so memory is linear in the cells; the paper's matrix power is quadratic.

    Args:
        maps: (K, h, w) maps of the image's classes, not negative; the result has their shape.
        affinity: (P, h, w) in [0, 1] of each cell's pairs; those that leave the image are left out.
        radius: radius of the pairs, in cells.
    """
    # In double precision: rounding of the same kind in each of 256 steps would add up.
    height, width = maps.shape[-2:]
    walked, pairs = maps.double(), []
    for (dy, dx), weight in zip(pair_offsets(radius), affinity.double() ** beta, strict=True):
        here = (..., slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        there = (..., slice(dy, height), slice(max(0, dx), width - max(0, -dx)))
        if dy < height and abs(dx) < width:
            pairs.append((here, there, weight[here].contiguous()))
    # A map of ones collects each cell's sum of affinities, by which the others are divided.
    total = _step(torch.ones_like(walked[:1]), pairs)
    for _ in range(2**doublings):
        walked = _step(walked, pairs) / total
    return walked.to(maps.dtype)


def _step(maps: Tensor, pairs: list) -> Tensor:
    result = maps.clone()
    for here, there, weight in pairs:
        result[there].addcmul_(maps[here], weight)
        result[here].addcmul_(maps[there], weight)
    return result
