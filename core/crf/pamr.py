"""Pixel-adaptive mask refinement (PAMR): a local relative of the dense CRF that runs on GPUs.

Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, Sec. 3.3.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

OFFSETS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


class PAMR:
    """Repeatedly replaces each mask value by a mean over neighbours of similar colour.

    The neighbours q of a pixel p are the 8 around it at each dilation, replicated at the border.
    With sigma_c the standard deviation (unbiased) of image channel c over them and p, p once per
    dilation,

        a(p, q) = softmax over q of -mean_c |x_c(p) - x_c(q)| / (1e-8 + 0.1 sigma_c(p)),
        m(p) <- sum_q a(p, q) m(q).

    The neighbours are processed one after the other, so the memory is that of a, which is B * 8 *
    dilations * h * w, plus a few copies of the masks, not their product. No gradient is recorded.
    With 0 `iterations` it returns the masks as they are; `dilations` are the neighbours' distances
    in pixels.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, iterations: int = 10, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24)):
        if iterations < 0:
            raise ValueError(f"iterations must be at least 0, got {iterations}")
        if not dilations or min(dilations) < 1:
            raise ValueError(f"dilations must be at least one distance >= 1, got {dilations}")
        self.iterations, self.dilations = iterations, tuple(dilations)

    @torch.no_grad()
    def __call__(self, images: Tensor, masks: Tensor) -> Tensor:
        """Refines (B, C, h, w) float masks, such as probabilities; keeps their type and sum over C.

        Images are (B, 3, H, W) float, in any range and normalised or not: sigma scales along with
        each channel. They are resized to the masks where the sizes differ. The result is on the
        masks' device.

        Raises:
            ValueError: not floating point, not 4 axes, no pixels, or batches that differ.
        """
        for name, tensor in (("images", images), ("masks", masks)):
            if tensor.ndim != 4 or not tensor.is_floating_point() or 0 in tensor.shape:
                form, got = "non-empty (B, channels, height, width) float", (*tensor.shape,)
                raise ValueError(f"{name} must be a {form} tensor, got {got} {tensor.dtype}")
        if len(images) != len(masks):
            raise ValueError(f"{len(images)} images for {len(masks)} masks; a batch has as many")
        images = images.float()
        if images.shape[2:] != masks.shape[2:]:
            images = F.interpolate(images, masks.shape[2:], mode="bilinear", align_corners=True)
        affinity = self._affinity(images)  # (B, Q, h, w)
        refined = masks.float()
        for _ in range(self.iterations):
            total = torch.zeros_like(refined)
            for q, neighbour in enumerate(self._neighbours(refined)):
                total.addcmul_(affinity[:, q : q + 1], neighbour)
            refined = total
        return refined.to(masks.dtype)

    def _neighbours(self, maps: Tensor) -> Iterator[Tensor]:
        """Views of (B, C, h, w), one per neighbour q: the value of q at the place of p."""
        height, width = maps.shape[2:]
        margin = max(self.dilations)
        padded = F.pad(maps, [margin] * 4, mode="replicate")
        for dilation in self.dilations:
            for step_y, step_x in OFFSETS:
                y, x = margin + step_y * dilation, margin + step_x * dilation
                yield padded[:, :, y : y + height, x : x + width]

    def _affinity(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) float32 -> (B, Q, h, w), sums to 1 over the Q neighbours."""
        # Sums of differences to p, in which p itself is 0: small numbers, so nothing cancels.
        total, squares = torch.zeros_like(images), torch.zeros_like(images)
        for neighbour in self._neighbours(images):
            difference = neighbour - images
            total += difference
            squares.addcmul_(difference, difference)
        count = (len(OFFSETS) + 1) * len(self.dilations)
        variance = (squares - total.square() / count).clamp_(min=0) / (count - 1)
        scale = 1e-8 + 0.1 * variance.sqrt()
        logits = [-((n - images).abs() / scale).mean(1) for n in self._neighbours(images)]
        return torch.stack(logits, 1).softmax(1)
