"""Stage 3 of MARS: debiased centroids and debiased labels (Eq. 1-5). Eq. 6-7: core/complement.py.

Pure functions on tensors. Names of dimensions: D feature width, H W pixels, h w feature cells, C
classes without background, K clusters, Nf and Nb centroids.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core.crf.dense import CrfConfig, DenseCRF
from core.data.labels import BACKGROUND, BIASED, BIASED_ON_DISK, IGNORE
from core.run.settings import OpenUnitInterval, PositiveFloat, PositiveInt, Share, location


@dataclass
class DebiasConfig:
    """Stage 3, debiased centroids and debiased labels (Eq. 1-5)."""

    k_fg: PositiveInt = 2  # Clusters per class region, K_fg (Sec. 4.1).
    k_bg: PositiveInt = 2  # Clusters per background region, K_bg (Sec. 4.1).
    alpha: Share = 0.40  # Share of the foreground centroids, the farthest, that is kept (Sec. 4.1).
    # Mean distance to all background centroids (Eq. 1), or to the `nearest` ones (introduction).
    distance: Literal["mean", "nearest"] = "mean"
    nearest: PositiveInt = 10  # Number of nearest background centroids; 1: the minimum distance.
    # Which similarities of Eq. 4 count as the object. auto: each class has its own cut, found
    # without masks (core/cut.py); fixed: similarities above `threshold`.
    cut: Literal["auto", "fixed"] = "auto"
    # fixed: the similarity map as it is, or divided by its maximum in an image's labelled region.
    scale: Literal["raw", "max"] = "raw"
    threshold: OpenUnitInterval = 0.5  # fixed: similarity above which pixels are kept.
    slope: PositiveFloat = 4.0  # fixed: increase of the object's logit per unit of similarity.
    refine: Literal["crf", "none"] = "crf"  # Refinement of the similarity map (Sec. 3.3).
    crf: CrfConfig = field(default_factory=CrfConfig)  # Settings of that refinement.
    output_dir: str | None = location()  # Folder of the results; None: <run_dir>/debias.

    def unused(self) -> list[str]:
        """Keys of the forms that are not chosen."""
        keys = ["nearest"] if self.distance == "mean" else []
        keys += ["scale", "threshold", "slope"] if self.cut == "auto" else []
        return keys + (["crf"] if self.refine == "none" else [])


def cell_labels(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels of feature cells: (H, W) integers, 0..C or 255 -> (h, w) int64, `size` being (h, w).

    The label of a cell is that of most of the pixels whose upper left corners fall into it. Pixels
    marked ignore have no vote unless the whole cell is ignored. A class that wins no cell at all
    takes the cell where it has most pixels, but not the last cell of another class, so that small
    objects keep a region.
    """
    (height, width), (rows, cols) = label.shape, size
    y = torch.arange(height).mul(rows).div(height, rounding_mode="floor")
    x = torch.arange(width).mul(cols).div(width, rounding_mode="floor")
    cell = (y[:, None] * cols + x[None]).flatten()
    pixels = label.flatten().long()
    values = pixels.bincount().nonzero()[:, 0]  # counting is several times as fast as unique()
    index = torch.full((IGNORE + 1,), -1).scatter(0, values, torch.arange(len(values)))[pixels]
    size = rows * cols * len(values)
    votes = (cell * len(values) + index).bincount(minlength=size).view(-1, len(values))
    spoken = votes * (values != IGNORE)
    # max(1).indices is argmax(1), in a quarter of the time; here and below.
    winner = torch.where(spoken.any(1), spoken.max(1).indices, votes.max(1).indices)
    cells = values[winner]
    for k, value in enumerate(values.tolist()):
        if value in (BACKGROUND, IGNORE) or (cells == value).any():
            continue
        _, place, counts = cells.unique(return_inverse=True, return_counts=True)
        last = (counts[place] == 1) & (cells != BACKGROUND) & (cells != IGNORE)
        if (votes[~last, k] > 0).any():
            cells[votes[:, k].masked_fill(last, 0).argmax()] = value
    return cells.view(rows, cols)


def kmeans(
    points: Tensor, k: int, generator: torch.Generator, restarts: int = 3
) -> tuple[Tensor, Tensor]:
    """Spherical K-means with k-means++ seeds; the tightest of `restarts` runs of up to 50 steps.

    Args:
        points: (n, D) unit vectors, n >= 1.
        k: clusters; fewer come out when there are fewer distinct points.
        generator: source of the seeds, on the CPU.

    Returns:
        (k', D) unit centroids and (n,) int64 cluster of each point, 1 <= k' <= k.
    """
    best = None
    for _ in range(restarts if k > 1 else 1):
        centroids = _seeds(points, k, generator)
        assignment = (points @ centroids.T).max(1).indices
        for _ in range(50):
            sums = torch.zeros_like(centroids).index_add_(0, assignment, points)
            centroids = F.normalize(sums, dim=1)
            similarity, update = (points @ centroids.T).max(1)
            if torch.equal(update, assignment):
                break
            assignment = update
        score = similarity.sum().item()
        if best is None or score > best[0]:
            best = score, centroids, assignment
    _, centroids, assignment = best
    kept, renumbered = assignment.unique(return_inverse=True)  # one may have lost its last point
    return centroids[kept], renumbered


def _seeds(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    first = torch.randint(len(points), (1,), generator=generator)
    chosen = [points[first]]
    for _ in range(k - 1):
        gap = (1 - (points @ torch.cat(chosen).T).max(1).values).clamp(min=0)
        if gap.max() < 1e-6:
            break  # no point differs from those chosen
        draw = torch.multinomial(gap.cpu(), 1, generator=generator)
        chosen.append(points[draw.to(points.device)])
    return torch.cat(chosen)


def image_centroids(
    feat: Tensor, label: Tensor, k_fg: int, k_bg: int, generator: torch.Generator, restarts: int = 3
) -> tuple[dict[int, Tensor], Tensor]:
    """Clusters the features of each labelled region of one image (Sec. 3.2).

    A region of fewer than max(4, K) cells has one centroid, its mean. K is `k_fg` for classes and
    `k_bg` for background; features are (D, h, w), the label is (H, W), 0..C or 255, at any size;
    `generator`, on the CPU, and `restarts` are those of `kmeans`.

    Returns:
        {label: (K, D) unit centroids} for the labels present, ascending, and (h, w) int64: the
        centroid that each cell belongs to, numbered in that order from 0; -1 where ignored.
    """
    width, rows, cols = feat.shape
    cells = cell_labels(label, (rows, cols)).flatten()
    points = F.normalize(feat.float().flatten(1).T, dim=1)  # (h w, D)
    centroids, clusters, count = {}, torch.full((rows * cols,), -1), 0
    for value in cells.unique().tolist():
        if value == IGNORE:
            continue
        region = (cells == value).nonzero().squeeze(1)
        k = k_bg if value == BACKGROUND else k_fg
        k = k if len(region) >= max(4, k) else 1
        centroids[value], assignment = kmeans(points[region], k, generator, restarts)
        clusters[region] = assignment + count
        count += len(centroids[value])
    return centroids, clusters.view(rows, cols)


def background_distance(fg: Tensor, bg: Tensor, nearest: int | None = None) -> Tensor:
    """Distance of each foreground centroid to the backgrounds of all images (Eq. 1).

    D(a, b) = (1 - cos(a, b)) / 2. The paper's formula averages over all background centroids; its
    introduction speaks of the minimum, which is `nearest=1`; a few more make it robust.

    (Nf, D) and (Nb, D) centroids -> (Nf,) in [0, 1]; `nearest` None averages over all.
    """
    fg, bg = F.normalize(fg, dim=1), F.normalize(bg, dim=1)
    if nearest is not None:
        k = min(nearest, len(bg))
        similar = [(part @ bg.T).topk(k, dim=1).values.mean(1) for part in fg.split(1024)]
        return (1 - torch.cat(similar)) / 2
    # Cosine similarity is linear in the unit vectors, so their mean stands for all Nb of them.
    return (1 - fg @ bg.mean(0)) / 2


def select_farthest(distance: Tensor, alpha: float) -> Tensor:
    """(n_c,) indices of the n_c = ceil(alpha Nf) largest distances, farthest first (Eq. 3)."""
    count = math.ceil(round(alpha * len(distance), 6))  # .4 * 5 must be 2, whatever floats say
    return distance.sort(descending=True, stable=True).indices[:count]


def debiased_centroid(
    fg: Tensor, bg: Tensor, alpha: float = 0.40, nearest: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Averages the foreground centroids that are farthest from every background (Eq. 1-3).

    Rails found under a train also appear in the backgrounds of other images, so centroids of
    context are nearer to `bg` than centroids of the object. The farthest share `alpha` is kept.

    Args:
        fg: (N_c, D) centroids of one class, K_fg per training image that shows it.
        bg: (Nb, D) background centroids of all training images.
        alpha: share of `fg` kept, in (0, 1]; the count is rounded up.
        nearest: see `background_distance`.

    Returns:
        (D,) mean of the kept unit centroids V^c, not of unit length itself; (N_c,) distances;
        (n_c,) indices of the kept centroids, farthest first.

    Raises:
        ValueError: `fg` or `bg` is empty, their widths differ, or alpha is out of range.
    """
    if fg.ndim != 2 or bg.ndim != 2 or fg.shape[1] != bg.shape[1] or not len(fg) or not len(bg):
        raise ValueError(f"fg, bg must be non-empty (N, D): got {(*fg.shape,)}, {(*bg.shape,)}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}; the paper uses 0.40")
    distance = background_distance(fg, bg, nearest)  # Eq. 1
    kept = select_farthest(distance, alpha)  # Eq. 3
    return F.normalize(fg[kept], dim=1).mean(0), distance, kept  # Eq. 2


def debiased_centroids(
    vectors: Tensor, labels: Tensor, classes: int, alpha: float = 0.40, nearest: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 1-3 for every class.

    Args:
        vectors: (N, D) centroids of all regions of all training images; may be a mapped file, of
            which the backgrounds and one class at a time are read into memory.
        labels: (N,) 0..C, the region's label; 0 is background. C is `classes`.
        alpha, nearest: see `debiased_centroid`.

    Returns:
        (C, D) debiased centroids, a zero row for a class without any; (N,) distance of each
        foreground centroid to the backgrounds, 0 for backgrounds; (N,) bool, which are kept.
    """
    bg = vectors[labels == 0]
    centroids = torch.zeros(classes, vectors.shape[1])
    distance, kept = torch.zeros(len(vectors)), torch.zeros(len(vectors), dtype=torch.bool)
    for c in labels[labels > 0].unique().tolist():
        rows = (labels == c).nonzero()[:, 0]
        found = debiased_centroid(vectors[rows], bg, alpha, nearest)
        centroids[c - 1], distance[rows], chosen = found
        kept[rows[chosen]] = True
    return centroids, distance, kept


def tag_auc(vectors: Tensor, images: Tensor, centroids: Tensor, tags: Tensor) -> Tensor:
    """How well each debiased centroid tells the images that show its class from all others.

    The score of an image is the largest similarity of the centroids of its regions, background
    included. Features that do not suit the images stay close to 0.5, whatever else looks right.

    Args:
        vectors: (N, D) centroids of all regions of all images; may be a mapped file.
        images: (N,) int64, the image of each.
        centroids: (C, D) debiased centroids.
        tags: (I, C) bool, the classes of each image.

    Returns:
        (C,) area under the ROC curve: how often an image with the class scores higher than one
        without; NaN for a class without centroids, or that all images or none of them show.
    """
    score, size = torch.full(tags.shape, -1.0), 8192
    for part, index in zip(vectors.split(size), images.split(size), strict=True):
        similarity = F.normalize(part, dim=1) @ F.normalize(centroids, dim=1).T
        score.scatter_reduce_(0, index[:, None].expand_as(similarity), similarity, "amax")
    result = torch.full((len(centroids),), math.nan)
    for c, shows in enumerate(tags.T):
        shown, others = score[shows, c], score[~shows, c].sort().values
        if len(shown) and len(others) and centroids[c].any():
            lower = torch.searchsorted(others, shown) + torch.searchsorted(
                others, shown, right=True
            )
            result[c] = lower.float().mean() / (2 * len(others))
    return result


def similarities(feat: Tensor, centroids: Tensor, tags: Tensor) -> Tensor:
    """Similarity to the debiased centroid of each class of the image.

    (D, h, w) features, (C, D) centroids and (C,) bool tags -> (T, h, w) cosines, in the order of
    the T classes of the image. A zero centroid (a class never seen) is similar to nothing.
    """
    chosen = F.normalize(centroids[tags.bool()], dim=1)
    return torch.einsum("cd,dhw->chw", chosen, F.normalize(feat, dim=0))


def debiased_score(feat: Tensor, centroids: Tensor, tags: Tensor) -> Tensor:
    """Similarity to the debiased centroid of any class of the image (Eq. 4); see `similarities`.

    The maximum runs over all classes of the image, not the pixel's own label alone, because
    features confuse related classes: a horse that resembles the sheep centroid is still an object.
    The result is (h, w) in [0, 1], 0 everywhere if no class is tagged.
    """
    if not tags.any():
        return feat.new_zeros(feat.shape[1:])
    return similarities(feat, centroids, tags).amax(0).clamp(0, 1)


def fixed_logit(score: Tensor, label: Tensor, config: DebiasConfig) -> Tensor:
    """(h, w) similarity of Eq. 4 -> (H, W) logit, above 0 where it exceeds the fixed threshold.

    The labelled region of the (H, W) pseudo label gives the maximum of `scale: max`.
    """
    score = F.interpolate(score[None, None], label.shape, mode="bilinear")[0, 0]
    region = (label > 0) & (label < BIASED_ON_DISK)
    if config.scale == "max" and region.any():
        score = score / score[region].max().clamp(min=1e-6)
    return config.slope * (score - config.threshold)


def debiased_mask(logit: Tensor, image: np.ndarray, label: Tensor, crf: DenseCRF | None) -> Tensor:
    """Refines the similarity, as a logit, into the binary mask M (Sec. 3.3).

    Args:
        logit: (h, w) or (H, W), above 0 where the similarity indicates an object.
        image: (H, W, 3) uint8 RGB.
        label: (H, W) pseudo label; nothing is refined if it shows no class.
        crf: two-label refinement; None leaves the sign of the logit.

    Returns an (H, W) bool mask, True where the pixel resembles a debiased centroid.
    """
    logit = F.interpolate(logit[None, None].float(), image.shape[:2], mode="bilinear")[0, 0].cpu()
    if crf is None or not ((label > 0) & (label < BIASED_ON_DISK)).any():
        return logit > 0
    probs = crf(image, torch.stack([-logit, logit]).sigmoid().numpy())
    return torch.from_numpy(probs[1] > probs[0])


def mark_biased(wsss_label: Tensor, debiased_mask: Tensor) -> Tensor:
    """Marks labelled pixels outside the debiased mask as biased; background never changes (Eq. 5).

    The label is (H, W) integers, 0..C or 255, the mask (H, W) bool, the refined similarity map M.
    The result is (H, W) int64: -1 where biased, else the WSSS label.
    """
    label = wsss_label.long()
    biased = (label != BACKGROUND) & (label != IGNORE) & ~debiased_mask
    return torch.where(biased, BIASED, label)
