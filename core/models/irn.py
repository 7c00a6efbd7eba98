"""IRNet's boundary branch: where one object ends, learnt from pairs of confident pixels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import BackboneConfig
from core.models.backbones import Pyramid


class BoundaryNetwork(nn.Module):
    """Five stages of a frozen ResNet, each reduced to 32 channels, joined at stride 4.

    IRNet has a second branch, of displacements to the centre of an instance. It shares no trainable
    weight with this one and class labels do not need it, so it is left out. Parameter names are
    IRNet's: fc_edge1 to fc_edge6.
    """

    def __init__(self, backbone: BackboneConfig):
        super().__init__()
        self.backbone = Pyramid(backbone).requires_grad_(False)
        for k, channels in enumerate(self.backbone.dims, 1):
            reduce = nn.Sequential(nn.Conv2d(channels, 32, 1, bias=False), nn.GroupNorm(4, 32))
            setattr(self, f"fc_edge{k}", reduce)
        self.fc_edge6 = nn.Conv2d(5 * 32, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, H/4, W/4) logits of a boundary."""
        with torch.no_grad():
            stages = self.backbone(images)
        size = stages[1].shape[-2:]
        edges = []
        for k, features in enumerate(stages, 1):
            reduced = getattr(self, f"fc_edge{k}")(features)
            edges.append(F.interpolate(reduced, size, mode="bilinear").relu())
        return self.fc_edge6(torch.cat(edges, 1))

    def train(self, mode: bool = True) -> "BoundaryNetwork":
        super().train(mode)
        self.backbone.eval()
        return self

    def head(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.parameters() if p.requires_grad]
