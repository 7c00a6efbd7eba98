"""SEAM's losses (Wang et al., CVPR 2020): activation maps that are the same at another scale.

Pure functions on tensors. A map of scores has C + 1 channels, background first; `tags` are (B, C)
multi-hot.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def normalised(maps: Tensor, tags: Tensor) -> Tensor:
    """(B, 1 + C, H, W) scores -> each map stretched to [0, 1], classes not tagged set to 0."""
    maps = maps.relu()
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low - 1e-5).relu() / (high - low + 1e-5) * with_background(tags)


def with_background(tags: Tensor) -> Tensor:
    """(B, C) -> (B, 1 + C, 1, 1), the background always present."""
    return F.pad(tags, (1, 0), value=1)[:, :, None, None]


def background_from_classes(maps: Tensor) -> Tensor:
    """Replaces the background of (B, 1 + C, H, W) maps in [0, 1] by 1 - the best class."""
    return torch.cat([1 - maps[:, 1:].amax(1, keepdim=True), maps[:, 1:]], 1)


def only_the_best_class(maps: Tensor) -> Tensor:
    """Sets every class of (B, 1 + C, H, W) maps to 0 where another one is higher."""
    classes = maps[:, 1:]
    best = classes == classes.amax(1, keepdim=True)
    return torch.cat([maps[:, :1], classes * best], 1)


def correlated(maps: Tensor, features: Tensor) -> Tensor:
    """Pixel correlation module: each cell takes the mean of the maps at cells with like features.

    Args:
        maps: (B, C, h, w).
        features: (B, D, h, w).

    Returns:
        (B, C, h, w).
    """
    features = features.flatten(2)
    features = features / (features.norm(dim=1, keepdim=True) + 1e-5)
    with torch.autocast(maps.device.type, enabled=False):  # sums over thousands of cells
        affinity = (features.transpose(1, 2) @ features).relu()  # (B, h w, h w)
        affinity = affinity / (affinity.sum(1, keepdim=True) + 1e-5)
        return (maps.flatten(2) @ affinity).view_as(maps)


def classification_loss(maps: Tensor, refined: Tensor, tags: Tensor) -> Tensor:
    """Multi-label loss of the maps' averages, and a push of the refined maps' low ends to 0.

    Args:
        maps, refined: (B, 1 + C, H, W) scores before and after the pixel correlation module.
        tags: (B, C) multi-hot.
    """
    loss = F.multilabel_soft_margin_loss(maps.mean((2, 3))[:, 1:], tags)
    present = (refined * with_background(tags))[:, 1:].amax(1).flatten(1)
    lowest = present.topk(max(1, present.shape[1] // 4), largest=False).values
    return loss + lowest.relu().mean()


def consistency_losses(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], tags: Tensor
) -> tuple[Tensor, Tensor]:
    """L_ER and L_ECR: both views' maps agree, and each view's refined maps with the other's plain.

    Args:
        first: maps and refined maps of the image, (B, 1 + C, H, W) scores.
        second: those of its smaller copy, (B, 1 + C, h, w).
        tags: (B, C) multi-hot.

    Returns:
        Two () losses.
    """
    size, present = second[0].shape[-2:], with_background(tags)
    plain_1, refined_1 = (
        F.interpolate(normalised(m, tags), size, mode="bilinear", align_corners=True) * present
        for m in first
    )
    plain_2, refined_2 = (normalised(m, tags) for m in second)
    equivariance = (plain_1[:, 1:] - plain_2[:, 1:]).abs().mean()
    plain = [background_from_classes(m) for m in (plain_1, plain_2)]
    cross = 0
    for target, refined in ((plain[1], refined_1), (plain[0], refined_2)):
        gap = (only_the_best_class(target.detach()) - refined).abs()
        gap = gap.flatten(1)
        cross = cross + gap.topk(max(1, gap.shape[1] // 5)).values.mean()
    return equivariance, cross
