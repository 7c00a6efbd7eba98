"""STEGO's feature correspondence distillation (Hamilton et al., ICLR 2022)."""

import torch
from torch import Tensor, nn
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
) -> tuple[Tensor, Tensor]:
    """Pulls codes together where frozen features agree more than `shift`, and apart elsewhere.

    l = -max(cos(code), 0) (F - b), F the features' correspondence, centred cell by cell.

    Args:
        feat: frozen features of the pair, (B, D, h, w) each.
        code: codes of the pair at the same points, (B, d, h, w) each.
        shift: b.

    Returns:
        () mean over images and pairs of points, and the codes' similarities (B, h, w, i, j).
    """
    with torch.no_grad():
        fd = correspondence(*feat)
        centred = fd - fd.mean((3, 4), keepdim=True)
        fd = centred - centred.mean() + fd.mean()
    cd = correspondence(*code)
    return -(cd.clamp(min=0) * (fd - shift)).mean(), cd


def derangement(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count,) int64: every image's partner for a negative pair, never itself (if count > 1)."""
    order = torch.randperm(count, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def health(negative: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """What to choose settings by where there are no labels: in a good training most pairs of
    unrelated images are near 0 while the similarities of neighbours spread upwards.

    Args:
        negative, positive: similarities of codes of random pairs and of neighbours, any shape.

    Returns:
        "negatives_at_zero", the share below 0.1, and "positives_spread", the standard deviation.
    """
    negative, positive = negative.detach(), positive.detach()
    return {
        "negatives_at_zero": (negative < 0.1).float().mean(),
        "positives_spread": positive.std(),
    }


class ClusterProbe(nn.Module):
    """Unit vectors that follow the codes, as STEGO's monitor does: a loss near -1 says that codes
    gather around them."""

    def __init__(self, clusters: int, dim: int):
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(clusters, dim))

    def forward(self, code: Tensor) -> Tensor:
        """(B, dim, h, w) -> () minus the mean similarity with the nearest one; codes get no
        gradient."""
        centres = F.normalize(self.clusters, dim=1)
        similarity = torch.einsum("bdhw,kd->bkhw", F.normalize(code.detach(), dim=1), centres)
        return -similarity.amax(1).mean()
