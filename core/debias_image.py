"""Stage 3 on one image, in the way that `debias.preset` asks for."""

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from core.bilinear import RESTARTS, pixel_centroids, pixel_score
from core.config import DebiasConfig
from core.crf.dense import DenseCRF
from core.debias import debiased_score, image_centroids


def find_clusters(
    feat: torch.Tensor, label: np.ndarray, settings: DebiasConfig, seed: int
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Centroids of each region of an image, and the cluster of each cell, as the preset says."""
    k = settings.k_fg, settings.k_bg
    if settings.preset in ("exact", "fast"):
        return pixel_centroids(feat.numpy(), label, *k, np.random.default_rng(seed))
    generator, restarts = torch.Generator().manual_seed(seed), 3
    if settings.preset == "naive":
        feat, restarts = F.interpolate(feat[None], label.shape, mode="bilinear")[0], RESTARTS
    centroids, cells = image_centroids(feat, torch.from_numpy(label), *k, generator, restarts)
    return {c: v.numpy() for c, v in centroids.items()}, cells.numpy()


def crf_settings(settings: DebiasConfig) -> dict[str, Any]:
    """Those of the configuration; the fast preset takes longer steps on a thinner lattice."""
    chosen = settings.crf.settings()
    if settings.preset == "fast":
        fewer = math.ceil(0.6 * settings.crf.iterations)
        chosen |= {"iterations": fewer, "relaxation": 1.8, "vertices": 4}
    return chosen


def similarity(
    feat: torch.Tensor,
    centroids: torch.Tensor,
    tags: np.ndarray,
    size: tuple[int, int],
    settings: DebiasConfig,
) -> torch.Tensor:
    """Eq. 4 as the preset says: (H, W), or, on the grid, (h, w)."""
    if settings.preset in ("exact", "fast"):
        return torch.from_numpy(pixel_score(feat.numpy(), centroids.numpy(), tags, size))
    if settings.preset == "naive":
        feat = F.interpolate(feat[None], size, mode="bilinear")[0]
    return debiased_score(feat, centroids, torch.from_numpy(tags))


def refine(
    score: torch.Tensor,
    image: np.ndarray,
    label: torch.Tensor,
    settings: DebiasConfig,
    crf: DenseCRF | None,
) -> torch.Tensor:
    """Turns the similarity map of Eq. 4 into the binary mask M.

    Args:
        score: (h, w) in [0, 1], at the features' size or the image's.
        image: (H, W, 3) uint8 RGB.
        label: (H, W) pseudo label.
        settings: unary and scale.
        crf: two-label refinement; None leaves the unary's own decision.

    Returns:
        (H, W) bool, True where the pixel resembles a debiased centroid.
    """
    score = F.interpolate(score[None, None], image.shape[:2], mode="bilinear")[0, 0].clamp(0, 1)
    region = (label > 0) & (label < 254)
    if settings.scale != "raw" and region.any():
        low = score[region].min() if settings.scale == "minmax" else 0
        high = score[region].max()
        score = ((score - low) / (high - low + 1e-6)).clamp(0, 1)
    if settings.unary == "gamma":
        probs = torch.stack([(1 - score) ** settings.gamma, score])
    else:
        debiased = torch.sigmoid(settings.slope * (score - settings.threshold))
        probs = torch.stack([1 - debiased, debiased])
    if crf is not None and region.any():
        probs = torch.from_numpy(crf(image, probs.float().numpy()))
    return probs[1] > probs[0]
