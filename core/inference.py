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
    """Averages a network's maps over resized and mirrored views.

    Args:
        network: (B, 3, h, w) -> (B, C, h', w'), at any stride; its last activation included.
        images: (B, 3, H, W) float32, normalised.
        scales: factors by which the images are resized.
        flip: take the mirrored image at each scale, too.
        size: (height, width) of the result; None: the images'.
        mode: how the maps are resized to it.

    Returns:
        (B, C, *size) float32: the mean over all views.
    """
    height, width = images.shape[-2:]
    total, views, out = 0, 0, size or (height, width)
    for scale in scales:
        resized = (max(1, round(height * scale)), max(1, round(width * scale)))
        view = (
            images
            if scale == 1
            else F.interpolate(images, resized, mode="bilinear", antialias=scale < 1)
        )
        maps = network(view).float()
        if flip:
            maps = maps + network(view.flip(-1)).float().flip(-1)
        total = total + F.interpolate(maps, out, mode=mode)
        views += 2 if flip else 1
    return total / views


def windowed(network: Callable[[Tensor], Tensor], side: int) -> Callable[[Tensor], Tensor]:
    """The same network, seeing large images through overlapping windows.

    The network needs the memory of one window, and sees sizes like those it was trained on.

    Args:
        network: (B, 3, h, w) -> (B, C, h', w'), at any stride; its last activation included.
        side: side of the square windows, pixels; neighbours overlap by at least a third of it.

    Returns:
        (B, 3, H, W) -> (B, C, H', W'): the network itself where an image fits into a window; else
        (B, C, H, W), the mean of all windows that see a pixel.
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
