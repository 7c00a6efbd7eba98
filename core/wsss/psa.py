"""PSA (Ahn and Kwak, CVPR 2018), as SEAM uses it: cells with similar features belong together."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.crf.dense import CrfConfig, DenseCRF
from core.data.labels import BACKGROUND
from core.data.settings import AugmentConfig
from core.models.backbones import BackboneConfig, OnBackbone, tapped_backbone
from core.run.settings import NonNegativeInt, PositiveInt, Radius
from core.wsss.affinity import PairConfig, feature_affinity, random_walk
from core.wsss.cam import confident_label


@dataclass
class PsaConfig(PairConfig):
    """PSA's affinity network as SEAM uses it: features at stride 8 (all defaults: SEAM's code).
    Unlike there, seeds are sampled at the cells' centres instead of averaging scores over 8 x 8
    pixels; the walk takes every pair inside the image, including the pairs of the frame; and cells
    are stretched onto the image instead of padded and cropped."""

    seed_keys: ClassVar = ("low_exponent", "high_exponent")
    epochs: PositiveInt = 8  # Passes over the training images.
    batch_size: PositiveInt = 8  # Images per step.
    lr: float = 0.01  # Learning rate of the backbone; the heads have ten times as much.
    weight_decay: float = 5e-4  # Weight decay.
    radius: Radius = 5  # Training and the random walk link cells closer than this.
    # Views for training.
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(scale=(1, 1), crop=448))
    beta: float = 8  # Exponent of the affinities in the walk.
    doublings: NonNegativeInt = 6  # log2 of the walk's number of steps.
    low_exponent: float = 4  # A class is confident where it beats background (1 - best)^low.
    high_exponent: float = 24  # Background is confident where (1 - best)^high still wins.
    walk_exponent: float = 6  # Background (1 - best)^walk is propagated, too.
    # Refinement of both decisions.
    crf: CrfConfig = field(default_factory=lambda: CrfConfig("auto", 10, 3, 3, 80, 13, 10))


def seed_by_exponents(
    image: np.ndarray, keys: np.ndarray, cam: np.ndarray, config: PsaConfig, crf: DenseCRF
) -> np.ndarray:
    """`confident_label` with a low exponent, which makes a strong background, and a high one."""
    exponents = (config.low_exponent, config.high_exponent)
    return confident_label(image, keys, cam, crf, [partial(_with_power, e) for e in exponents])


def _with_power(exponent: float, maps: np.ndarray) -> np.ndarray:
    """Puts (1 - best class)^exponent before (K, H, W) maps, all clipped to [0, 1]."""
    maps = maps.clip(0, 1)
    background = (1 - maps.max(0, keepdims=True, initial=0)) ** exponent
    return np.concatenate([background, maps]).astype(np.float32)


class AffinityNetwork(OnBackbone):
    """PSA's AffinityNet: features of three stages, alike where pixels belong to one thing.

    Names of the heads are PSA's: f8_3, f8_4, f8_5, f9.
    """

    frozen_norm = True
    stride, flip = 8, False  # pixels per cell; predictions of the mirrored image are not used
    RELEASED: ClassVar = [
        *((name, name) for name in ("f8_3.", "f8_4.", "f8_5.", "f9.")),
        ("", "backbone."),
    ]

    def __init__(self, backbone: BackboneConfig, config: PsaConfig):
        super().__init__()
        self.config = config
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

    def parameter_groups(self, lr: float) -> list[dict]:
        """The backbone, and the heads at ten times its rate."""
        return super().parameter_groups(lr, 10 * lr)

    def affinity(self, features: Tensor) -> Tensor:
        """(B, D, h, w) features -> (B, P, ...) exp(-mean |difference|) of each pair."""
        return feature_affinity(features, self.config.radius)

    def label(
        self, features: Tensor, keys: np.ndarray, cam: Tensor, size: tuple[int, int]
    ) -> np.ndarray:
        """Spreads background and classes over the features; argmax.

        (D, h, w) features, (K,) labels and (K, h', w') maps -> (H, W) uint8 label.
        """
        if not len(keys):
            return np.zeros(size, np.uint8)
        config = self.config
        maps = F.interpolate(cam[None], features.shape[-2:], mode="area")[0].clamp(0, 1)
        background = (1 - maps.amax(0, keepdim=True)) ** config.walk_exponent
        # Pairs that leave the image are cut off by the walk, regardless of their affinity.
        margin = config.radius - 1
        padded = F.pad(features[None], (margin, margin, 0, margin), mode="replicate")
        affinity, scores = self.affinity(padded)[0], torch.cat([background, maps])
        walked = random_walk(scores, affinity, config.radius, config.beta, config.doublings)
        scores = F.interpolate(walked[None], size, mode="bilinear")[0]
        labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
        return labels[scores.argmax(0).cpu().numpy()]

    seed = staticmethod(seed_by_exponents)
