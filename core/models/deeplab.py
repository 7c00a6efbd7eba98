"""DeepLab v1, v2 and v3+ on any backbone with maps at stride 4 and deeper."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import SegmentationConfig
from core.debias import weighted_cross_entropy
from core.models.backbones import Backbone, freeze_norms, norms


def segmenter(config: SegmentationConfig, num_classes: int) -> "DeepLab":
    """The configured network for `num_classes` classes and background."""
    heads = {"deeplabv1": LargeFov, "deeplabv2": SummedASPP, "deeplabv3plus": DecodedASPP}
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
        self.backbone = Backbone(config.backbone, (1, 4), config.output_stride)
        self.head = head(*self.backbone.dims, config, num_classes + 1)
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

    @staticmethod
    def loss(
        logits: Sequence[Tensor],
        label: Tensor,
        certainty: Tensor | None = None,
        balanced: bool = False,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Sum of `weighted_cross_entropy` over all training logits, at the label's size.

        Args:
            logits: of `training_logits`.
            label, certainty, balanced, counts: see `core.debias`.
        """
        total = 0
        for level in logits:
            level = F.interpolate(level.float(), label.shape[-2:], mode="bilinear")
            total = total + weighted_cross_entropy(level, label, certainty, balanced, counts)
        return total

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


class ConvBlock(nn.Sequential):
    """Convolution, normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)


class LargeFov(nn.Module):
    """DeepLab v1's head: one 3x3 convolution of wide view (its dilation is the first rate)."""

    def __init__(self, low_dim: int, dim: int, config: SegmentationConfig, outputs: int):
        super().__init__()
        width = config.aspp_dim
        self.layers = nn.Sequential(
            ConvBlock(dim, width, 3, config.rates[0]),
            ConvBlock(width, width, 1),
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

    def __init__(
        self, inputs: int, width: int, rates: Sequence[int], dropout: float, mean_norm: bool
    ):
        super().__init__()
        self.names = [f"aspp{k}" for k in range(1, len(rates) + 2)]
        for name, rate in zip(self.names[1:], rates, strict=True):
            self.add_module(name, ConvBlock(inputs, width, 3, rate))
        self.add_module(self.names[0], ConvBlock(inputs, width, 1))
        plain = nn.Sequential(nn.Conv2d(inputs, width, 1), nn.ReLU(inplace=True))
        mean = ConvBlock(inputs, width, 1) if mean_norm else plain
        self.global_avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), mean)
        joined = ConvBlock(width * (len(rates) + 2), width, 1)
        self.block = nn.Sequential(joined, nn.Dropout(dropout))

    def forward(self, features: Tensor) -> Tensor:
        views = [self.get_submodule(name)(features) for name in self.names]
        mean = self.global_avg_pool(features).expand(-1, -1, *features.shape[-2:])
        return self.block(torch.cat([*views, mean], 1))


class Decoder(nn.Module):
    """v3+'s decoder: joins deep features with low-level ones at stride 4 and classifies.

    Args:
        low_dim, low_width: channels of the low-level features, and those left of them.
        width: channels of the deep features and of the two 3x3 convolutions.
        outputs: channels of the logits.
        dropouts: behind each of these convolutions.
        last: the classifying convolution's kernel; only a 1x1 one has a bias.
    """

    def __init__(
        self,
        low_dim: int,
        low_width: int,
        width: int,
        outputs: int,
        dropouts: tuple[float, float],
        last: int,
    ):
        super().__init__()
        self.low_block = ConvBlock(low_dim, low_width, 1)
        self.classifier = nn.Sequential(
            ConvBlock(width + low_width, width, 3),
            nn.Dropout(dropouts[0]),
            ConvBlock(width, width, 3),
            nn.Dropout(dropouts[1]),
            nn.Conv2d(width, outputs, last, padding=last // 2, bias=last == 1),
        )

    def forward(self, low: Tensor, deep: Tensor) -> Tensor:
        deep = F.interpolate(deep, low.shape[-2:], mode="bilinear")
        return self.classifier(torch.cat([deep, self.low_block(low)], 1))


class DecodedASPP(nn.Module):
    """DeepLab v3+'s head."""

    def __init__(self, low_dim: int, dim: int, config: SegmentationConfig, outputs: int):
        super().__init__()
        width = config.aspp_dim
        # The mean of a batch of one image has no statistics: it is not normalised.
        behind_aspp, behind_first = config.head_dropout
        self.aspp = ASPP(dim, width, config.rates, behind_aspp, mean_norm=False)
        dropouts = (behind_first, config.dropout)
        self.decoder = Decoder(low_dim, config.low_dim, width, outputs, dropouts, last=1)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.decoder(low, self.aspp(high))
