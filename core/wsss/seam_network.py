"""SEAM's classifier (Wang et al., CVPR 2020): activation maps refined by pixel correlation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import WsssConfig
from core.models.backbones import freeze_norms, tapped_backbone
from core.wsss.seam import (
    background_from_classes,
    classification_loss,
    consistency_losses,
    correlated,
    only_the_best_class,
)


class SeamClassifier(nn.Module):
    """A 1x1 classifier with a background channel, and the pixel correlation module (PCM) behind it.

    The PCM sees the image and two middle stages, whose weights it does not move. Names of the heads
    are SEAM's: fc8, f8_3, f8_4, f9.
    """

    def __init__(self, config: WsssConfig, num_classes: int):
        super().__init__()
        self.second_scale = config.seam.second_scale
        self.backbone = tapped_backbone(config.backbone)
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
        refined = correlated(self._scaled(maps.detach()), features)
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
