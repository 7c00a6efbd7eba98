"""Multi-scale and flip inference, once, for every network that maps images to channels."""

from collections.abc import Callable, Sequence

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
) -> Tensor:
    """Averages a network's maps over resized and mirrored views.

    Args:
        network: (B, 3, h, w) -> (B, C, h', w'), at any stride; its last activation included.
        images: (B, 3, H, W) float32, normalised.
        scales: factors by which the images are resized.
        flip: take the mirrored image at each scale, too.
        size: (height, width) of the result; None: the images'.

    Returns:
        (B, C, *size) float32: the mean over all views, bilinear.
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
        total = total + F.interpolate(maps, out, mode="bilinear")
        views += 2 if flip else 1
    return total / views
