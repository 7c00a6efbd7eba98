"""STEGO's feature correspondence distillation (Hamilton et al., ICLR 2022)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of (B, D, h, w) maps at (B, n, n, 2) points in [-1, 1]: (B, D, n, n)."""
    return F.grid_sample(maps, points, padding_mode="border", align_corners=True)


def correspondence(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity of every cell of one map with every cell of another.

    (B, D, h, w), (B, D, i, j) -> (B, h, w, i, j).
    """
    return torch.einsum("bdhw,bdij->bhwij", F.normalize(first, dim=1), F.normalize(second, dim=1))


def correspondence_loss(
    feat: tuple[Tensor, Tensor], code: tuple[Tensor, Tensor], shift: float
) -> Tensor:
    """Pulls codes together where frozen features agree more than `shift`, and apart elsewhere.

    l = -max(cos(code), 0) (F - b), F the features' correspondence, centred cell by cell.

    Args:
        feat: frozen features of the pair, (B, D, h, w) each.
        code: codes of the pair at the same points, (B, d, h, w) each.
        shift: b.

    Returns:
        () mean over images and pairs of points.
    """
    with torch.no_grad():
        fd = correspondence(*feat)
        centred = fd - fd.mean((3, 4), keepdim=True)
        fd = centred - centred.mean() + fd.mean()
    cd = correspondence(*code)
    return -(cd.clamp(min=0) * (fd - shift)).mean()


def derangement(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count,) int64: every image's partner for a negative pair, never itself (if count > 1)."""
    order = torch.randperm(count, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner
