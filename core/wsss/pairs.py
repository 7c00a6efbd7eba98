"""Networks that say which neighbouring pixels belong together."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import BackboneConfig
from core.models.backbones import Backbone, freeze_norms, tapped_backbone


class BoundaryNetwork(nn.Module):
    """IRNet's boundaries: five stages of a frozen backbone, reduced to 32 channels each and joined.

    They have strides 4 (the first one after pooling), 4, 8, 16 and 16.

    IRNet has a second branch, of displacements to the centre of an instance. It shares no trainable
    weight with this one and class labels do not need it, so it is left out. Parameter names are
    IRNet's: fc_edge1 to fc_edge6.
    """

    def __init__(self, backbone: BackboneConfig):
        super().__init__()
        self.backbone = Backbone(backbone, range(5), 16).requires_grad_(False)
        for k, channels in enumerate(self.backbone.dims, 1):
            reduce = nn.Sequential(nn.Conv2d(channels, 32, 1, bias=False), nn.GroupNorm(4, 32))
            setattr(self, f"fc_edge{k}", reduce)
        self.fc_edge6 = nn.Conv2d(5 * 32, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, H/4, W/4) logits of a boundary."""
        with torch.no_grad():
            first, *rest = self.backbone(images)
            stages = [F.max_pool2d(first, 3, 2, 1), *rest]
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

    def parameter_groups(self, lr: float) -> list[dict]:
        """The head alone."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]


class AffinityNetwork(nn.Module):
    """PSA's AffinityNet: features of three stages, alike where pixels belong to one thing.

    Names of the heads are PSA's: f8_3, f8_4, f8_5, f9.
    """

    def __init__(self, backbone: BackboneConfig):
        super().__init__()
        self.backbone = tapped_backbone(backbone)
        *_, middle, late, last = self.backbone.dims
        self.f8_3 = nn.Conv2d(middle, 64, 1, bias=False)
        self.f8_4 = nn.Conv2d(late, 128, 1, bias=False)
        self.f8_5 = nn.Conv2d(last, 256, 1, bias=False)
        self.f9 = nn.Conv2d(64 + 128 + 256, 64 + 128 + 256, 1, bias=False)
        for head in (self.f8_3, self.f8_4, self.f8_5):
            nn.init.kaiming_normal_(head.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 448, H/8, W/8)."""
        *_, middle, late, last = self.backbone(images)
        heads = ((self.f8_3, middle), (self.f8_4, late), (self.f8_5, last))
        return F.elu(self.f9(torch.cat([F.elu(head(x)) for head, x in heads], 1)))

    def train(self, mode: bool = True) -> "AffinityNetwork":
        super().train(mode)
        freeze_norms(self.backbone)
        return self

    def parameter_groups(self, lr: float) -> list[dict]:
        """The backbone, and the heads at ten times its rate."""
        backbone = [p for p in self.backbone.parameters() if p.requires_grad]
        heads = [m.weight for m in (self.f8_3, self.f8_4, self.f8_5, self.f9)]
        return [{"params": backbone, "lr": lr}, {"params": heads, "lr": 10 * lr}]
