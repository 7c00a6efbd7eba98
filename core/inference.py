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
) -> Tensor:
    """Averages a network's maps over resized and mirrored views.

    Args:
        network: (B, 3, h, w) -> (B, C, h', w'), at any stride; its last activation included.
        images: (B, 3, H, W) float32, normalised.
        scales: factors by which the images are resized.
        flip: take the mirrored image at each scale, too.

    Returns:
        (B, C, H, W) float32: the mean over all views, bilinear at the images' size.
    """
    height, width = images.shape[-2:]
    total, views = 0, 0
    for scale in scales:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        view = (
            images
            if scale == 1
            else F.interpolate(images, size, mode="bilinear", antialias=scale < 1)
        )
        maps = network(view).float()
        if flip:
            maps = maps + network(view.flip(-1)).float().flip(-1)
        total = total + F.interpolate(maps, (height, width), mode="bilinear")
        views += 2 if flip else 1
    return total / views
