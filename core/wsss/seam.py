"""SEAM: classifier, pixel correlation module and losses (Wang et al., CVPR 2020).

Activation maps should be the same at another scale. Scores have 1 + C channels, background first;
`tags` are (B, C) multi-hot. Names in SEAM's code are given where they differ.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.models.backbones import BackboneConfig, freeze_norms, tapped_backbone
from core.run.settings import OpenUnitInterval
from core.wsss.cam import normalise_cams


@dataclass
class SeamConfig:
    """SEAM's two views (its code's default)."""

    second_scale: OpenUnitInterval = 0.3  # Scale of the second view, which must give the same maps.


def normalised(maps: Tensor, tags: Tensor) -> Tensor:
    """(B, 1 + C, H, W) scores -> each map stretched to [0, 1], classes not tagged set to 0 (SEAM's
    max_norm)."""
    maps = maps.relu()
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low - 1e-5).relu() / (high - low + 1e-5) * channel_mask(tags)


def channel_mask(tags: Tensor) -> Tensor:
    """(B, C) -> (B, 1 + C, 1, 1), the background always present."""
    return F.pad(tags, (1, 0), value=1)[:, :, None, None]


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
    """Multi-label loss of the maps' averages, and a term that pulls the lowest values of the
    refined maps to 0 (adaptive_min_pooling_loss).

    Args:
        maps, refined: (B, 1 + C, H, W) scores before and after the pixel correlation module.
        tags: (B, C) multi-hot.
    """
    loss = F.multilabel_soft_margin_loss(maps.mean((2, 3))[:, 1:], tags)
    present = (refined * channel_mask(tags))[:, 1:].amax(1).flatten(1)
    lowest = present.topk(max(1, present.shape[1] // 4), largest=False).values
    return loss + lowest.relu().mean()


def consistency_losses(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], tags: Tensor
) -> tuple[Tensor, Tensor]:
    """L_ER and L_ECR: both views' maps should agree, and refined maps with the other view's plain.

    Args:
        first: maps and refined maps of the image, (B, 1 + C, H, W) scores.
        second: the same of its smaller copy, (B, 1 + C, h, w).
        tags: (B, C) multi-hot.

    Returns:
        Two () losses.
    """
    size = second[0].shape[-2:]
    plain_1, refined_1 = (
        F.interpolate(normalised(m, tags), size, mode="bilinear", align_corners=True) for m in first
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


def normalise_refined(maps: np.ndarray) -> np.ndarray:
    """`normalise_cams` of (K, h, w) refined maps less their minima, which are never quite 0."""
    return normalise_cams(maps - maps.min((1, 2), keepdims=True))


class SeamClassifier(nn.Module):
    """A 1x1 classifier with a background channel, and the pixel correlation module (PCM) behind it.

    The PCM sees the image and two middle stages, whose weights it does not move. Names of the heads
    are SEAM's: fc8, f8_3, f8_4, f9.
    """

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

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> (B, 1 + C, H, W) scores before and after the PCM, background first."""
        *_, middle, late, last = self.backbone(images)
        maps = self.fc8(self.dropout(last)).float()
        small = F.interpolate(images, maps.shape[-2:], mode="bilinear", align_corners=True)
        sides = [self.f8_3(middle.detach()).relu(), self.f8_4(late.detach()).relu()]
        features = self.f9(torch.cat([small, *sides], 1)).float()
        refined = pixel_correlation(self._scaled(maps.detach()), features)
        size = images.shape[-2:]
        return tuple(
            F.interpolate(m, size, mode="bilinear", align_corners=True) for m in (maps, refined)
        )

    @staticmethod
    def _scaled(maps: Tensor) -> Tensor:
        """Each map divided by its maximum; then background, and only the best class of a cell."""
        maps = maps.relu()
        high = maps.amax((2, 3), keepdim=True) + 1e-5
        return only_the_best_class(background_from_classes((maps - 1e-5).relu() / high))

    def activation(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H, W) refined activation maps, not negative."""
        return self(images)[1][:, 1:].relu()

    def train(self, mode: bool = True) -> "SeamClassifier":
        super().train(mode)
        freeze_norms(self.backbone)
        return self

    def parameter_groups(self, lr: float, head_lr: float) -> list[dict]:
        """The backbone and the new layers, each with its learning rate."""
        backbone = [p for p in self.backbone.parameters() if p.requires_grad]
        new = [m.weight for m in (self.fc8, self.f8_3, self.f8_4, self.f9)]
        return [{"params": backbone, "lr": lr}, {"params": new, "lr": head_lr}]

    def loss(self, images: Tensor, tags: Tensor) -> Tensor:
        """All of SEAM's losses: (B, 3, H, W) and (B, C) multi-hot -> ()."""
        size = [max(1, int(n * self.second_scale)) for n in images.shape[-2:]]
        smaller = F.interpolate(images, size, mode="bilinear", align_corners=True)
        views = [self(images), self(smaller)]
        classes = sum(classification_loss(*view, tags) for view in views) / 2
        return classes + sum(consistency_losses(*views, tags))
