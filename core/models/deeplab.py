"""DeepLabv3+ (Chen et al., ECCV 2018) on a dilated ResNet."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import SegmentationConfig
from core.models.backbones import ResNet, freeze_norms


def _conv(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 branch, one 3x3 branch per rate, and the image mean."""

    def __init__(self, inputs: int, outputs: int, rates: tuple[int, ...]):
        super().__init__()
        dilated = [_conv(inputs, outputs, 3, rate) for rate in rates]
        self.branches = nn.ModuleList([_conv(inputs, outputs, 1), *dilated])
        self.mean = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.ReLU(inplace=True))
        self.project = _conv(outputs * (len(rates) + 2), outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        mean = self.mean(features.mean((2, 3), keepdim=True)).expand(-1, -1, *features.shape[-2:])
        return self.project(torch.cat([*(b(features) for b in self.branches), mean], 1))


class DeepLabV3Plus(nn.Module):
    """Backbone, ASPP, and a decoder that joins low-level features at stride 4."""

    def __init__(self, config: SegmentationConfig, num_classes: int):
        super().__init__()
        self.backbone = ResNet(config.backbone, config.output_stride)
        self.frozen_norm = config.norm == "frozen"
        width = config.aspp_dim
        self.aspp = ASPP(self.backbone.dim, width, config.rates)
        self.low = _conv(self.backbone.low_dim, config.low_dim, 1)
        self.decoder = nn.Sequential(
            _conv(width + config.low_dim, width, 3),
            _conv(width, width, 3),
            nn.Dropout(config.dropout),
            nn.Conv2d(width, num_classes + 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + C, H/4, W/4) logits, background first."""
        low, high = self.backbone(images)
        context = F.interpolate(self.aspp(high), low.shape[-2:], mode="bilinear")
        return self.decoder(torch.cat([context, self.low(low)], 1))

    def train(self, mode: bool = True) -> "DeepLabV3Plus":
        super().train(mode)
        if self.frozen_norm:
            freeze_norms(self.backbone)
        return self

    def parameter_groups(self, lr: float, head_lr: float) -> list[dict]:
        """The backbone and the new layers, each with its learning rate."""
        backbone = list(self.backbone.parameters())
        known = {id(p) for p in backbone}
        head = [p for p in self.parameters() if id(p) not in known]
        return [{"params": backbone, "lr": lr}, {"params": head, "lr": head_lr}]
