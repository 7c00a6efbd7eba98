"""STEGO's code head (Hamilton et al., ICLR 2022)."""

from torch import Tensor, nn
from torch.nn import functional as F


class StegoHead(nn.Module):
    """A linear and a non-linear projection of frozen features, added up.

    Parameter names are those of the released checkpoints below `net.`.
    """

    def __init__(self, dim: int, code_dim: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.cluster1 = nn.Sequential(nn.Conv2d(dim, code_dim, 1))
        self.cluster2 = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.ReLU(inplace=True), nn.Conv2d(dim, code_dim, 1)
        )

    def drop(self, feat: Tensor) -> Tensor:
        """Channel dropout, in training only; each call draws its own channels."""
        return F.dropout2d(feat, self.dropout, self.training)

    def forward(self, feat: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, code_dim, h, w)."""
        return self.cluster1(self.drop(feat)) + self.cluster2(self.drop(feat))
