"""SEAM: classifier, pixel correlation module and losses (Wang et al., CVPR 2020).

Activation maps should be the same at another scale. Scores have 1 + C channels, background first;
`tags` are (B, C) multi-hot. Names in SEAM's code are given where they differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.models.backbones import BackboneConfig, OnBackbone, tapped_backbone
from core.run.settings import OpenUnitInterval
from core.wsss.cam import normalise_cams

Pair = tuple[Tensor, Tensor]


@dataclass
class SeamConfig:
    """SEAM's two views (its code's default)."""

    second_scale: OpenUnitInterval = 0.3  # Scale of the second view, which must give the same maps.


def normalised(maps: Tensor, tags: Tensor) -> Tensor:
    """(B, 1 + C, H, W) scores -> each map stretched to [0, 1], classes not tagged set to 0 (SEAM's
    max_norm)."""
    maps = maps.relu()
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    present = F.pad(tags, (1, 0), value=1)[:, :, None, None]  # background always is present
    return (maps - low - 1e-5).relu() / (high - low + 1e-5) * present


def aligned(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation from corner to corner, as in all of SEAM."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def background_from_classes(maps: Tensor) -> Tensor:
    """Replaces the background of (B, 1 + C, H, W) maps in [0, 1] by 1 - the best class."""
    return torch.cat([1 - maps[:, 1:].amax(1, keepdim=True), maps[:, 1:]], 1)


def only_the_best_class(maps: Tensor) -> Tensor:
    """Sets every class of (B, 1 + C, H, W) maps to 0 where another is higher (max_onehot)."""
    classes = maps[:, 1:]
    best = classes == classes.amax(1, keepdim=True)
    return torch.cat([maps[:, :1], classes * best], 1)


def pixel_correlation(maps: Tensor, features: Tensor) -> Tensor:
    """PCM: each cell takes the mean of the maps, weighted by the similarity of its features.

    (B, C, h, w) maps and (B, D, h, w) features -> (B, C, h, w).
    """
    features = features.flatten(2)
    features = features / (features.norm(dim=1, keepdim=True) + 1e-5)
    with torch.autocast(maps.device.type, enabled=False):  # sums over thousands of cells
        affinity = (features.transpose(1, 2) @ features).relu()  # (B, h w, h w)
        affinity = affinity / (affinity.sum(1, keepdim=True) + 1e-5)
        return (maps.flatten(2) @ affinity).view_as(maps)


def classification_loss(maps: Tensor, refined: Tensor, tags: Tensor) -> Tensor:
    """Multi-label loss of the maps' averages, and a term that pulls the lowest values of the
    refined maps to 0 (adaptive_min_pooling_loss); both are (B, 1 + C, H, W) scores."""
    loss = F.multilabel_soft_margin_loss(maps.mean((2, 3))[:, 1:], tags)
    present = (refined[:, 1:] * tags[:, :, None, None]).amax(1).flatten(1)
    lowest = present.topk(max(1, present.shape[1] // 4), largest=False).values
    return loss + lowest.relu().mean()


def consistency_losses(first: Pair, second: Pair, tags: Tensor) -> Pair:
    """L_ER and L_ECR: both views' maps should agree, and refined maps with the other view's plain.

    A view is its maps and refined maps: (B, 1 + C, H, W) scores of the image, and (B, 1 + C, h, w)
    of its smaller copy; `tags` are (B, C). The result is two () losses.
    """
    size = second[0].shape[-2:]
    plain_1, refined_1 = (aligned(normalised(m, tags), size) for m in first)
    plain_2, refined_2 = (normalised(m, tags) for m in second)
    equivariance = (plain_1[:, 1:] - plain_2[:, 1:]).abs().mean()
    cross = 0
    for plain, refined in ((plain_2, refined_1), (plain_1, refined_2)):
        target = only_the_best_class(background_from_classes(plain).detach())
        gap = (target - refined).abs().flatten(1)
        cross = cross + gap.topk(max(1, gap.shape[1] // 5)).values.mean()
    return equivariance, cross


def normalise_refined(maps: np.ndarray) -> np.ndarray:
    """`normalise_cams` of (K, h, w) refined maps less their minima, which are never quite 0."""
    return normalise_cams(maps - maps.min((1, 2), keepdims=True))


class SeamClassifier(OnBackbone):
    """A 1x1 classifier with a background channel, and the pixel correlation module (PCM) behind it.

    The PCM sees the image and two middle stages, whose weights it does not move. Names of the heads
    are SEAM's: fc8, f8_3, f8_4, f9.
    """

    frozen_norm = True
    RELEASED: ClassVar = [
        *((name, name) for name in ("fc8.", "f8_3.", "f8_4.", "f9.")),
        ("", "backbone."),
    ]

    def __init__(self, backbone: BackboneConfig, num_classes: int, config: SeamConfig):
        super().__init__()
        self.second_scale = config.second_scale
        self.backbone = tapped_backbone(backbone)
        *_, middle, late, last = self.backbone.dims
        self.dropout = nn.Dropout2d(0.5)
        self.fc8 = nn.Conv2d(last, num_classes + 1, 1, bias=False)
        self.f8_3 = nn.Conv2d(middle, 64, 1, bias=False)
        self.f8_4 = nn.Conv2d(late, 128, 1, bias=False)
        self.f9 = nn.Conv2d(3 + 64 + 128, 192, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)
        nn.init.kaiming_normal_(self.f8_3.weight)
        nn.init.kaiming_normal_(self.f8_4.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)

    def forward(self, images: Tensor) -> Pair:
        """(B, 3, H, W) -> (B, 1 + C, H, W) scores before and after the PCM, background first."""
        *_, middle, late, last = self.backbone(images)
        maps = self.fc8(self.dropout(last)).float()
        small = aligned(images, maps.shape[-2:])
        sides = [self.f8_3(middle.detach()).relu(), self.f8_4(late.detach()).relu()]
        features = self.f9(torch.cat([small, *sides], 1)).float()
        # Each map divided by its maximum; then background, and only the best class of a cell.
        scaled = maps.detach().relu()
        scaled = (scaled - 1e-5).relu() / (scaled.amax((2, 3), keepdim=True) + 1e-5)
        scaled = only_the_best_class(background_from_classes(scaled))
        both = (maps, pixel_correlation(scaled, features))
        return tuple(aligned(m, images.shape[-2:]) for m in both)

    def activation(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H, W) refined activation maps, not negative."""
        return self(images)[1][:, 1:].relu()

    def loss(self, images: Tensor, tags: Tensor) -> Tensor:
        """All of SEAM's losses: (B, 3, H, W) and (B, C) multi-hot -> ()."""
        size = [max(1, int(n * self.second_scale)) for n in images.shape[-2:]]
        views = [self(images), self(aligned(images, size))]
        classes = sum(classification_loss(*view, tags) for view in views) / 2
        return classes + sum(consistency_losses(*views, tags))
