"""Multi-scale, flip and sliding-window inference for every network from images to channels."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.inference_mode()
def multi_scale(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    size: tuple[int, int] | None = None,
    mode: Literal["bilinear", "nearest"] = "bilinear",
) -> Tensor:
    """Averages a network's maps over views of normalised (B, 3, H, W) images, which are resized by
    the factors `scales` and, with `flip`, also mirrored.

    The network takes (B, 3, h, w) to (B, C, h', w'), at any stride, its last activation included.
    The result is (B, C, *size) float32; `size` is the (height, width) to which `mode` resizes the
    maps, by default the images'.
    """
    total = 0
    for scale in scales:
        view = images
        if scale != 1:
            resized = [max(1, round(n * scale)) for n in images.shape[-2:]]
            view = F.interpolate(images, resized, mode="bilinear", antialias=scale < 1)
        maps = network(view).float()
        if flip:
            maps = maps + network(view.flip(-1)).float().flip(-1)
        total = total + F.interpolate(maps, size or images.shape[-2:], mode=mode)
    return total / (len(scales) * (2 if flip else 1))


def windowed(network: Callable[[Tensor], Tensor], side: int) -> Callable[[Tensor], Tensor]:
    """The same network (see `multi_scale`), seeing large images through overlapping windows.

    It needs the memory of one window, and sees sizes like those it was trained on. Windows are
    squares of `side` pixels; neighbours overlap by at least a third. Images that fit into one give
    the network's own maps, (B, C, H', W'); larger ones give (B, C, H, W), at each pixel the mean of
    all windows that see it.
    """

    def through_windows(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if max(height, width) <= side:
            return network(images)
        total, seen = None, images.new_zeros(1, 1, height, width)
        for y, x in itertools.product(_starts(height, side), _starts(width, side)):
            place = (..., slice(y, y + side), slice(x, x + side))
            view = images[place]
            maps = F.interpolate(network(view).float(), view.shape[-2:], mode="bilinear")
            if total is None:
                total = maps.new_zeros(*maps.shape[:2], height, width)
            total[place] += maps
            seen[place] += 1
        return total / seen

    return through_windows


def _starts(length: int, side: int) -> list[int]:
    """First pixels of windows that cover `length`, evenly spread."""
    if length <= side:
        return [0]
    count = 1 + math.ceil((length - side) / (side * 2 / 3))
    return [round(k * (length - side) / (count - 1)) for k in range(count)]
