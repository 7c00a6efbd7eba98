"""STEGO's feature correspondence distillation (Hamilton et al., ICLR 2022)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from core.data.lists import Split
from core.data.loader import make_loader
from core.data.transforms import normalise
from core.run import distributed, vision
from core.run.files import atomic_write
from core.run.settings import Dropout, NonNegativeInt, PositiveInt, location

PAIRS = ("intra", "inter", "negative")
PRESETS = {
    # Weights of `PAIRS`, then their shifts.
    "cocostuff27_vitb8": (0.10, 1.0, 0.1538, 0.12, 0.20, 1.0),
    "cocostuff27_vits8": (0.67, 0.25, 0.63, 0.08, 0.02, 0.66),
    "cityscapes_vitb8": (1.0, 0.577, 0.906, 0.458, 0.175, 0.314),
    "potsdam_vits8": (0.67, 0.25, 0.63, 0.08, 0.02, 0.46),
    "code_default": (0.67, 0.25, 0.63, 0.18, 0.12, 0.46),
}
"""STEGO's published values of the keys of `StegoConfig` from `weight_intra` to `shift_negative`."""
Pair = tuple[Tensor, Tensor]


@dataclass
class StegoConfig:
    """STEGO's code head and its training."""

    code_dim: PositiveInt = 70  # Width of STEGO's code.
    iterations: PositiveInt = 5000  # Iterations of STEGO's training.
    batch_size: PositiveInt = 16  # Images per STEGO step.
    resolution: PositiveInt = 224  # Side of the square images that STEGO trains on, pixels.
    lr: float = 5e-4  # Adam's learning rate for the head.
    samples: PositiveInt = 11  # Random points per image side: samples^2 points per image.
    neighbours: PositiveInt = 7  # Nearest neighbours per image; one of them makes a positive pair.
    dropout: Dropout = 0.1  # Channel dropout on the frozen features.
    # STEGO's published values of the next six keys, by data set of its paper; none are for VOC.
    preset: Literal[tuple(PRESETS)] = location("cocostuff27_vitb8")
    # Weight of pairs of an image with itself. None, here and in the next five: the preset's.
    weight_intra: float | None = None
    weight_inter: float | None = None  # Weight of nearest-neighbour pairs.
    weight_negative: float | None = None  # Weight of random pairs.
    # Shift b of pairs of an image with itself; higher values push codes apart.
    shift_intra: float | None = None
    shift_inter: float | None = None  # Shift b of nearest-neighbour pairs.
    shift_negative: float | None = None  # Shift b of random pairs.
    # Train on five crops of each image, its four corners and its centre, each with half the image's
    # sides, as STEGO does on COCO-Stuff and Cityscapes, instead of on its centre square.
    five_crops: bool = False
    # Clusters that follow the codes as a monitor, without influence on them; 0: none.
    probe_clusters: NonNegativeInt = 27
    # A released STEGO checkpoint, backbone and head, used instead of training the head.
    weights: str | None = None

    def __post_init__(self):
        names = [f"{key}_{pair}" for key in ("weight", "shift") for pair in PAIRS]
        for name, value in zip(names, PRESETS[self.preset], strict=True):
            if getattr(self, name) is None:
                setattr(self, name, value)


class StegoHead(nn.Module):
    """A linear and a non-linear projection of frozen features, added up; named as released."""

    def __init__(self, dim: int, code_dim: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.cluster1 = nn.Sequential(nn.Conv2d(dim, code_dim, 1))
        self.cluster2 = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.ReLU(inplace=True), nn.Conv2d(dim, code_dim, 1)
        )

    def drop(self, feat: Tensor) -> Tensor:
        """Channel dropout, in training only; each call draws its own channels."""
        return F.dropout2d(feat, self.dropout, self.training)

    def forward(self, feat: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, code_dim, h, w)."""
        return self.cluster1(self.drop(feat)) + self.cluster2(self.drop(feat))


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of (B, D, h, w) maps at (B, n, n, 2) points in [-1, 1]: (B, D, n, n)."""
    return F.grid_sample(maps, points, padding_mode="border", align_corners=True)


def correspondence(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of every cell with every other: (B, D, h, w), (B, D, i, j) -> (B, h, w, i, j)."""
    return torch.einsum("bdhw,bdij->bhwij", F.normalize(first, dim=1), F.normalize(second, dim=1))


def correspondence_loss(feat: Pair, code: Pair, shift: float) -> Pair:
    """Pulls codes together where frozen features agree more than `shift`, and apart elsewhere.

    l = -max(cos(code), 0) (F - shift), F the features' correspondence, centred cell by cell.

    Args:
        feat: frozen features of the pair, (B, D, h, w) each.
        code: codes of the pair at the same points, (B, d, h, w) each.

    Returns:
        () mean over images and pairs of points, and the codes' similarities (B, h, w, i, j).
    """
    with torch.no_grad():
        fd = correspondence(*feat)
        centred = fd - fd.mean((3, 4), keepdim=True)
        fd = centred - centred.mean() + fd.mean()
    cd = correspondence(*code)
    return -(cd.clamp(min=0) * (fd - shift)).mean(), cd


def derangement(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count,) int64: every image's partner for a negative pair, never itself (if count > 1)."""
    order = torch.randperm(count, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def health(negative: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """Label-free diagnostics for choosing settings, from similarities of codes, of any shape: in
    good training, most of those of random pairs (`negative`) are near 0 ("negatives_at_zero", the
    share below 0.1), and those of neighbours spread upwards ("positives_spread", the standard
    deviation)."""
    near_zero = (negative < 0.1).float().mean()
    return {"negatives_at_zero": near_zero, "positives_spread": positive.detach().std()}


class ClusterProbe(nn.Module):
    """Unit vectors that follow the codes, as STEGO's monitor does: a loss near -1 says that codes
    gather around them."""

    def __init__(self, clusters: int, dim: int):
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(clusters, dim))

    def forward(self, code: Tensor) -> Tensor:
        """(B, dim, h, w) -> () minus the mean similarity with the nearest one; codes get no
        gradient."""
        centres = F.normalize(self.clusters, dim=1)
        similarity = torch.einsum("bdhw,kd->bkhw", F.normalize(code.detach(), dim=1), centres)
        return -similarity.amax(1).mean()


def stego_losses(settings: StegoConfig, anchor: Pair, partner: Pair) -> dict[str, Tensor]:
    """STEGO's three terms on (features, codes) of a batch and of a neighbour of each image, "loss",
    their weighted sum, and the figures of `health`."""
    feat, code = anchor
    shape = (len(feat), settings.samples, settings.samples, 2)
    here, there = (torch.rand(shape, device=feat.device) * 2 - 1 for _ in range(2))
    feat_here, code_here = (sample_points(maps, here) for maps in anchor)

    def term(other: Pair, shift: float) -> Pair:
        feat_there, code_there = (sample_points(maps, there) for maps in other)
        return correspondence_loss((feat_here, feat_there), (code_here, code_there), shift)

    orders = [derangement(len(feat)).to(feat.device) for _ in range(5)]  # STEGO's neg_samples
    others = [term((feat[order], code[order]), settings.shift_negative) for order in orders]
    negatives, unlike = zip(*others, strict=True)
    inter, alike = term(partner, settings.shift_inter)
    intra, _ = correspondence_loss((feat_here,) * 2, (code_here,) * 2, settings.shift_intra)
    figures = {"intra": intra, "inter": inter, "negative": torch.stack(negatives).mean()}
    loss = sum(getattr(settings, f"weight_{pair}") * figures[pair] for pair in PAIRS)
    return {"loss": loss, **figures, **health(unlike[0], alike)}


class SquareImages(Dataset):
    """Squares of one resolution, without augmentation: with `crops` 1 the centre square of each
    image; with 5, centre squares of its four corners and its middle, each half its sides long."""

    def __init__(self, split: Split, resolution: int, crops: int):
        self.split, self.resolution, self.crops = split, resolution, crops

    def __len__(self) -> int:
        return len(self.split) * self.crops

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        """{"image": (3, resolution, resolution) float32, normalised, "id"}."""
        index, crop = divmod(draw[0], self.crops)
        image = torch.from_numpy(self.split.read_image(index)).permute(2, 0, 1)
        if self.crops == 5:
            half = [max(1, n // 2) for n in image.shape[-2:]]
            image = vision.v2.functional.five_crop(image, half)[crop]
        side = min(image.shape[-2:])
        square = vision.v2.functional.center_crop(image, [side, side])
        if side != self.resolution:
            size = (self.resolution, self.resolution)
            square = F.interpolate(square[None].float(), size, mode="nearest")[0].to(torch.uint8)
        return {"image": normalise(square), "id": self.split.ids[index]}


def _nearest_neighbours(means: Tensor, count: int) -> Tensor:
    """(N, D) unit mean features -> (N, count) int64: the most similar others of each."""
    near = []
    for start in range(0, len(means), 1024):
        similarity = means[start : start + 1024] @ means.T
        similarity.diagonal(start).fill_(-2)  # not itself
        near.append(similarity.topk(min(count, len(means) - 1)).indices)
    return torch.cat(near)


@torch.inference_mode()
def neighbours_of(
    squares: SquareImages, encode: Callable[[Tensor], Tensor], count: int, path: Path, workers: int
) -> np.ndarray:
    """(N, count) int64: for each square, those whose mean patch feature is most similar.

    Kept in the file `path`, which a resumed training reads.
    """
    if distributed.rank() == 0 and not path.exists():
        draws = [(k, 0) for k in range(len(squares))]
        order = [draws[s : s + 32] for s in range(0, len(draws), 32)]
        means = []
        for batch in tqdm(make_loader(squares, order, workers), desc="nearest neighbours"):
            feat = encode(batch["image"])  # (B, D, h, w) float32
            means.append(F.normalize(feat.mean((2, 3)), dim=1).cpu())
        with atomic_write(path) as tmp, tmp.open("wb") as file:
            np.save(file, _nearest_neighbours(torch.cat(means), count).numpy())
    distributed.barrier()
    return np.load(path, allow_pickle=False)


class NeighbourPairs(Dataset):
    """Squares, each with one of its nearest neighbours as "partner"."""

    def __init__(self, squares: SquareImages, neighbours: np.ndarray):
        self.squares, self.neighbours = squares, neighbours

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Tensor | str]:
        index, seed = draw
        near = self.neighbours[index]
        partner = self.squares[int(near[seed % len(near)]), seed]
        return {**self.squares[draw], "partner": partner["image"]}
