"""Wide-ResNet-38 (Wu, Shen and van den Hengel, 2016, model A1) at output stride 8.

Parameters are named as in the weight files of its users (PSA, SEAM), which load as they are.
"""

import torch
from torch import Tensor, nn


class _Block(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, mid: int, out: int, stride=1, first_dilation=1, dilation=1):
        super().__init__()
        self.same = inputs == out and stride == 1
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = _conv3(inputs, mid, stride, first_dilation)
        self.bn_branch2b1 = nn.BatchNorm2d(mid)
        self.conv_branch2b1 = _conv3(mid, out, 1, dilation)
        if not self.same:
            self.conv_branch1 = nn.Conv2d(inputs, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and the activation that the convolutions start from."""
        active = self.bn_branch2a(x).relu()
        shortcut = x if self.same else self.conv_branch1(active)
        mid = self.bn_branch2b1(self.conv_branch2a(active)).relu()
        return shortcut + self.conv_branch2b1(mid), active


class _Bottleneck(nn.Module):
    """Pre-activation residual block 1x1, dilated 3x3, 1x1, with dropout before the last two."""

    def __init__(self, inputs: int, mid: int, out: int, dilation: int, dropout: float):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, mid, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(mid)
        self.dropout_2b1 = nn.Dropout2d(dropout)
        self.conv_branch2b1 = _conv3(mid, out // 2, 1, dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(out // 2)
        self.dropout_2b2 = nn.Dropout2d(dropout)
        self.conv_branch2b2 = nn.Conv2d(out // 2, out, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inputs, out, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active = self.bn_branch2a(x).relu()
        mid = self.dropout_2b1(self.bn_branch2b1(self.conv_branch2a(active)).relu())
        mid = self.dropout_2b2(self.bn_branch2b2(self.conv_branch2b1(mid)).relu())
        return self.conv_branch1(active) + self.conv_branch2b2(mid), active


def _conv3(inputs: int, outputs: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)


class WideResNet38(nn.Module):
    """The network without its classifier; `width` is a factor on all channels, 1 as published."""

    def __init__(self, width: float = 1.0):
        super().__init__()
        c64, c128, c256, c512, c1024, c2048, c4096 = (round(width * 2**k) for k in range(6, 13))
        self.conv1a = _conv3(3, c64, 1, 1)
        self.b2, self.b2_1, self.b2_2 = _stage(c64, c128, c128, 3, stride=2)
        self.b3, self.b3_1, self.b3_2 = _stage(c128, c256, c256, 3, stride=2)
        b4 = _stage(c256, c512, c512, 6, stride=2)
        self.b4, self.b4_1, self.b4_2, self.b4_3, self.b4_4, self.b4_5 = b4
        self.b5, self.b5_1, self.b5_2 = _stage(c512, c512, c1024, 3, stride=1, dilation=2)
        self.b6 = _Bottleneck(c1024, c512, c2048, dilation=4, dropout=0.3)
        self.b7 = _Bottleneck(c2048, c1024, c4096, dilation=4, dropout=0.5)
        self.bn7 = nn.BatchNorm2d(c4096)
        self.dims = [c256, c512, c1024, c4096]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the activations that b4 (stride 4), b5 and b6 (8) start from, and the
        last map."""
        (_, first), *blocks, (_, last) = self.named_children()
        x, taps = first(images), []
        for name, block in blocks:
            x, active = block(x)
            if name in ("b4", "b5", "b6"):
                taps.append(active)
        return [*taps, torch.relu(last(x))]


def _stage(
    inputs: int, mid: int, out: int, blocks: int, stride: int, dilation: int = 1
) -> list[_Block]:
    """Blocks of one resolution; the first one's first convolution is never dilated."""
    first = _Block(inputs, mid, out, stride, 1, dilation)
    return [first, *(_Block(out, mid, out, 1, dilation, dilation) for _ in range(blocks - 1))]
