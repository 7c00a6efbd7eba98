"""A classifier whose last layer is a class activation map."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import WsssConfig
from core.models.backbones import Backbone, freeze_norms


class CamClassifier(nn.Module):
    """A backbone and a 1x1 convolution; the class logits are the map's mean (as in IRNet).

    With log-mean-exp pooling they lie between the average and the maximum (Pinheiro and Collobert,
    CVPR 2015), so that a small object is not outvoted by its surroundings.
    """

    def __init__(self, config: WsssConfig, num_classes: int):
        super().__init__()
        self.pooling = config.pooling
        self.frozen_norm = config.norm == "frozen"
        self.backbone = Backbone(config.backbone, (4,), config.output_stride)
        self.classifier = nn.Conv2d(self.backbone.dims[-1], num_classes, 1, bias=False)
        if config.frozen_stages is not None:
            self.backbone.freeze_stages(config.frozen_stages)

    def train(self, mode: bool = True) -> "CamClassifier":
        super().train(mode)
        if self.frozen_norm:
            freeze_norms(self.backbone)
        return self

    def maps(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/stride, W/stride) class scores, any sign."""
        return self.classifier(self.backbone(images)[-1])

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C) logits."""
        maps = self.maps(images).flatten(2)
        if self.pooling == "mean":
            return maps.mean(2)
        return maps.float().logsumexp(2) - math.log(maps.shape[2])

    def loss(self, images: Tensor, tags: Tensor) -> Tensor:
        """(B, 3, H, W) and (B, C) multi-hot -> () mean binary cross entropy."""
        return F.multilabel_soft_margin_loss(self(images).float(), tags)

    def parameter_groups(self, lr: float, head_lr: float) -> list[dict]:
        """The backbone and the classifier, each with its learning rate."""
        return [
            {"params": [p for p in self.backbone.parameters() if p.requires_grad], "lr": lr},
            {"params": list(self.classifier.parameters()), "lr": head_lr},
        ]

    def activation(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/stride, W/stride) activation maps, not negative."""
        return torch.relu(self.maps(images))
