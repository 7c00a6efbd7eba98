"""DeepLab v1, v2 and v3+ on a dilated ResNet or Wide-ResNet-38."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import SegmentationConfig
from core.models.backbones import dilated_backbone, freeze_norms, norms


def segmenter(config: SegmentationConfig, num_classes: int) -> "DeepLab":
    """The configured network for `num_classes` classes and background."""
    heads = {"deeplabv1": LargeFov, "deeplabv2": SummedASPP, "deeplabv3plus": Decoder}
    return DeepLab(config, num_classes, heads[config.network])


class DeepLab(nn.Module):
    """A backbone and a head.

    Args:
        config: backbone, widths, rates, normalisation.
        num_classes: C, without background.
        head: built from (low_dim, dim, config, outputs); maps (low, deep) features to logits.
    """

    def __init__(self, config: SegmentationConfig, num_classes: int, head: type[nn.Module]):
        super().__init__()
        self.backbone = dilated_backbone(config.backbone, config.output_stride)
        self.head = head(self.backbone.low_dim, self.backbone.dim, config, num_classes + 1)
        self.frozen_norm = config.norm == "frozen"
        for module in norms(self.backbone) if self.frozen_norm else ():
            module.requires_grad_(False)  # scale and shift are the weight file's, too
        self.train_scales = config.train_scales

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + C, h, w) logits, background first, at the head's stride.

        With `train_scales`, the maximum over the image and its smaller copies.
        """
        return self.training_logits(images)[-1]

    def training_logits(self, images: Tensor) -> list[Tensor]:
        """All logits that the loss is summed over: the image's; with `train_scales` also those of
        the smaller copies, and last the maximum of all."""
        logits = [self.head(*self.backbone(images))]
        if not self.train_scales:
            return logits
        for scale in self.train_scales:
            size = [max(1, round(n * scale)) for n in images.shape[-2:]]
            smaller = F.interpolate(images, size, mode="bilinear")
            logits.append(self.head(*self.backbone(smaller)))
        size = logits[0].shape[-2:]
        resized = [F.interpolate(level, size, mode="bilinear") for level in logits]
        return [*logits, torch.stack(resized).amax(0)]

    def train(self, mode: bool = True) -> "DeepLab":
        super().train(mode)
        if self.frozen_norm:
            freeze_norms(self.backbone)
        return self

    def parameter_groups(self, lr: float, head_lr: float) -> list[dict]:
        """The backbone and the head, each with its learning rate."""
        return [
            {"params": [p for p in self.backbone.parameters() if p.requires_grad], "lr": lr},
            {"params": list(self.head.parameters()), "lr": head_lr},
        ]


def _conv(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class LargeFov(nn.Module):
    """DeepLab v1's head: one 3x3 convolution of wide view (its dilation is the first rate)."""

    def __init__(self, low_dim: int, dim: int, config: SegmentationConfig, outputs: int):
        super().__init__()
        width = config.aspp_dim
        self.layers = nn.Sequential(
            _conv(dim, width, 3, config.rates[0]),
            _conv(width, width, 1),
            nn.Dropout(config.dropout),
            nn.Conv2d(width, outputs, 1),
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.layers(high)


class SummedASPP(nn.Module):
    """DeepLab v2's head: the sum of one 3x3 classifier per rate."""

    def __init__(self, low_dim: int, dim: int, config: SegmentationConfig, outputs: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(dim, outputs, 3, padding=rate, dilation=rate) for rate in config.rates
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return sum(branch(high) for branch in self.branches)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 branch, one 3x3 branch per rate, and the image mean."""

    def __init__(self, inputs: int, outputs: int, rates: Sequence[int]):
        super().__init__()
        dilated = [_conv(inputs, outputs, 3, rate) for rate in rates]
        self.branches = nn.ModuleList([_conv(inputs, outputs, 1), *dilated])
        self.mean = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.ReLU(inplace=True))
        self.project = _conv(outputs * (len(rates) + 2), outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        mean = self.mean(features.mean((2, 3), keepdim=True)).expand(-1, -1, *features.shape[-2:])
        return self.project(torch.cat([*(b(features) for b in self.branches), mean], 1))


class Decoder(nn.Module):
    """DeepLab v3+'s head: ASPP, then a decoder that joins low-level features at stride 4."""

    def __init__(self, low_dim: int, dim: int, config: SegmentationConfig, outputs: int):
        super().__init__()
        width = config.aspp_dim
        self.aspp = ASPP(dim, width, config.rates)
        self.low = _conv(low_dim, config.low_dim, 1)
        self.decoder = nn.Sequential(
            _conv(width + config.low_dim, width, 3),
            _conv(width, width, 3),
            nn.Dropout(config.dropout),
            nn.Conv2d(width, outputs, 1),
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        context = F.interpolate(self.aspp(high), low.shape[-2:], mode="bilinear")
        return self.decoder(torch.cat([context, self.low(low)], 1))
