"""DeepLab v1, v2 and v3+ on any backbone with maps at stride 4 and deeper."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.models.backbones import Backbone, BackboneConfig, OnBackbone, norms
from core.run.settings import Dropout, PositiveFloat, PositiveInt, Share, check


@dataclass
class DeepLabConfig:
    """A DeepLab: a head on a backbone."""

    # A network with maps at strides 4 to 32.
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("resnet101.tv_in1k"))
    network: Literal["deeplabv1", "deeplabv2", "deeplabv3plus"] = "deeplabv3plus"  # The head.
    output_stride: Literal[8, 16] = 8  # Pixels per cell of the deepest map; see wsss.output_stride.
    # Width of v3+'s ASPP and decoder, or of v1's head (512 in the literature).
    aspp_dim: PositiveInt = 256
    low_dim: PositiveInt = 48  # Width of v3+'s projected low-level features.
    # Dilations. The default is for v3+'s ASPP; v2 takes (6, 12, 18, 24), v1 takes (12,).
    rates: tuple[PositiveInt, ...] = (12, 24, 36)
    # Scales of smaller copies that v2 also trains on; (0.5, 0.75) in its Caffe version.
    train_scales: tuple[PositiveFloat, ...] = ()
    dropout: Dropout = 0.1  # Dropout before the last layer.
    # Further dropout in v3+'s head, after the ASPP and after the decoder's first convolution.
    head_dropout: tuple[Dropout, Dropout] = (0.0, 0.0)
    # Weight of each batch in the running statistics of v1's head. v1's code has 3e-4, which takes
    # 10,000 steps to forget the initial values.
    head_momentum: Share = 0.1
    # Backbone normalisation, train: by batch statistics; frozen: by the weight file's.
    norm: Literal["train", "frozen"] = "train"

    def __post_init__(self):
        check(len(self.rates) > 0, "segmentation.rates needs at least one dilation")


def build_deeplab(config: DeepLabConfig, num_classes: int) -> "DeepLab":
    """The configured network for `num_classes` classes and background."""
    heads = {
        "deeplabv1": DeepLabV1Head,
        "deeplabv2": DeepLabV2Head,
        "deeplabv3plus": DeepLabV3PlusHead,
    }
    return DeepLab(config, num_classes, heads[config.network])


class DeepLab(OnBackbone):
    """A backbone and a head, which maps (low, deep) features to logits of C classes and
    background."""

    def __init__(self, config: DeepLabConfig, num_classes: int, head: "type[Head]"):
        super().__init__()
        self.backbone = Backbone(config.backbone, (1, 4), config.output_stride)
        self.head = head(*self.backbone.dims, config, num_classes + 1)
        self.frozen_norm = config.norm == "frozen"
        for module in norms(self.backbone) if self.frozen_norm else ():
            module.requires_grad_(False)  # scale and shift are the weight file's, too
        self.train_scales = config.train_scales

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + C, h, w) logits, background first, at the head's stride; with
        `train_scales`, the maximum over the image and its smaller copies."""
        return self.training_logits(images)[-1]

    def training_logits(self, images: Tensor) -> list[Tensor]:
        """All logits that the loss sums over: the image's; with `train_scales` also the smaller
        copies' and, last, the maximum of all."""
        logits = [self.head(*self.backbone(images))]
        for scale in self.train_scales:
            size = [max(1, int(n * scale)) for n in images.shape[-2:]]
            smaller = F.interpolate(images, size, mode="bilinear")
            logits.append(self.head(*self.backbone(smaller)))
        if not self.train_scales:
            return logits
        size = logits[0].shape[-2:]
        resized = [F.interpolate(level, size, mode="bilinear") for level in logits]
        return [*logits, torch.stack(resized).amax(0)]

    def parameter_groups(self, lr: float, head_lr: float) -> list[dict]:
        """Backbone and head, each with its learning rate; the biases of v1's and v2's last layers
        have twice the head's rate and do not decay, as in their Caffe versions."""
        groups, biases = super().parameter_groups(lr, head_lr), self.head.fast_biases()
        if not biases:
            return groups
        groups[1]["params"] = [p for p in groups[1]["params"] if all(p is not b for b in biases)]
        return [*groups, {"params": biases, "lr": 2 * head_lr, "weight_decay": 0.0}]


class ConvBlock(nn.Sequential):
    """Convolution, normalisation and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, dilation: int = 1, momentum: float = 0.1
    ):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, momentum=momentum)
        self.relu = nn.ReLU(inplace=True)


class Head(nn.Module):
    """Maps (low, deep) features to logits, and declares what is special in its training."""

    at_cells = False  # the loss takes the label at the centres of the logits' cells
    averages_logits = False  # a prediction from several views is the softmax of their mean logits

    def fast_biases(self) -> list[nn.Parameter]:
        """Biases that learn at twice the rate and do not decay."""
        return []


class DeepLabV1Head(Head):
    """DeepLab v1's head: one 3x3 convolution with a large field of view, by its dilation."""

    averages_logits = True

    def __init__(self, low_dim: int, dim: int, config: DeepLabConfig, outputs: int):
        super().__init__()
        width, momentum = config.aspp_dim, config.head_momentum
        self.layers = nn.Sequential(
            ConvBlock(dim, width, 3, config.rates[0], momentum),
            ConvBlock(width, width, 1, momentum=momentum),
            nn.Dropout(config.dropout),
            nn.Conv2d(width, outputs, 1),
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.layers(high)

    def fast_biases(self) -> list[nn.Parameter]:
        return [self.layers[-1].bias]


class DeepLabV2Head(Head):
    """DeepLab v2's head: the sum of one 3x3 classifier per rate."""

    at_cells = True

    def __init__(self, low_dim: int, dim: int, config: DeepLabConfig, outputs: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(dim, outputs, 3, padding=rate, dilation=rate) for rate in config.rates
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return sum(branch(high) for branch in self.branches)

    def fast_biases(self) -> list[nn.Parameter]:
        return [branch.bias for branch in self.branches]


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
        low_dim, low_width: channels of the low-level features, before and after their projection.
        width: channels of the deep features and of the two 3x3 convolutions.
        outputs: channels of the logits.
        dropouts: after each of these convolutions.
        last: the classifying convolution's kernel; only a 1x1 one has a bias.
    """

    def __init__(
        self, low_dim: int, low_width: int, width: int, outputs: int, dropouts: Sequence, last: int
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


class DeepLabV3PlusHead(Head):
    """DeepLab v3+'s head."""

    def __init__(self, low_dim: int, dim: int, config: DeepLabConfig, outputs: int):
        super().__init__()
        width = config.aspp_dim
        behind_aspp, behind_first = config.head_dropout
        # The pooled mean of a single image has no batch statistics, so it is not normalised.
        self.aspp = ASPP(dim, width, config.rates, behind_aspp, mean_norm=False)
        dropouts = (behind_first, config.dropout)
        self.decoder = Decoder(low_dim, config.low_dim, width, outputs, dropouts, last=1)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.decoder(low, self.aspp(high))
