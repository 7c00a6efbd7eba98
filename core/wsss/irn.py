"""IRNet's propagation (Ahn, Cho and Kwak, CVPR 2019): boundaries that no walk crosses."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.crf.dense import CrfConfig, DenseCRF
from core.data.labels import BACKGROUND
from core.models.backbones import Backbone, BackboneConfig
from core.run.settings import OpenUnitInterval, Radius, check
from core.wsss.affinity import PairConfig, path_affinity, random_walk
from core.wsss.cam import RELEASED_RESNET, confident_label, with_background


@dataclass
class IrnConfig(PairConfig):
    """IRNet's second half: boundaries at stride 4 (all defaults: its code). Unlike in that
    code, the network sees the image itself, not a canvas of 512 x 512, and seeds come from maps at
    a quarter of the size."""

    seed_keys: ClassVar = ("radius", "foreground", "background")
    foreground: OpenUnitInterval = 0.30  # A class that beats this background score is confident.
    background: OpenUnitInterval = 0.05  # Background is confident where no class beats this score.
    # Refinement of both decisions.
    crf: CrfConfig = field(default_factory=lambda: CrfConfig("auto", 10, 3, 3, 50, 5, 10))
    walk_radius: Radius = 5  # The random walk links cells closer than this.
    exponent: float = 1.0  # Exponent of the activation maps before the walk (AdvCAM: 1.5).
    threshold: OpenUnitInterval = 0.25  # Background score against the walked maps (maximum 1).

    def __post_init__(self):
        ordered = self.background <= self.foreground
        check(ordered, "wsss.irn.background must not be greater than wsss.irn.foreground")


def seed_by_thresholds(
    image: np.ndarray, keys: np.ndarray, cam: np.ndarray, config: IrnConfig, crf: DenseCRF
) -> np.ndarray:
    """`confident_label` with a high background score and a low one."""
    decisions = [partial(_decision, score) for score in (config.foreground, config.background)]
    return confident_label(image, keys, cam, crf, decisions)


def _decision(score: float, maps: np.ndarray) -> np.ndarray:
    """Which of background and (K, H, W) maps is best, as (1 + K, H, W) probabilities."""
    best = with_background(maps, score).argmax(0)
    certainty = 0.7
    rest = (1 - certainty) / max(1, len(maps))
    probs = np.full((1 + len(maps), *best.shape), rest, np.float32)
    np.put_along_axis(probs, best[None], np.float32(certainty), 0)
    return probs


class BoundaryNetwork(nn.Module):
    """IRNet's boundaries: five stages of a frozen backbone, reduced to 32 channels each and joined.

    The stages have strides 4 (the first one after pooling), 4, 8, 16 and 16. IRNet's second branch,
    of displacements to the centre of an instance, is left out: it shares no trainable weight with
    this one, and class labels do not need it. Parameter names are IRNet's: fc_edge1 to fc_edge6.
    """

    stride, flip = 4, True  # pixels per cell; average predictions with the mirrored image's
    RELEASED: ClassVar = [
        *RELEASED_RESNET,
        ("fc_edge", "fc_edge"),
        *((name, None) for name in ("path_indices", "disp_target", "ind_")),  # of IRNet's pairs
        ("fc_dp", None),
        ("mean_shift.", None),
    ]

    def __init__(self, backbone: BackboneConfig, config: IrnConfig):
        super().__init__()
        self.config = config
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
        """The head alone: the backbone is frozen."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def affinity(self, logits: Tensor) -> Tensor:
        """(B, 1, h, w) logits -> (B, P, ...) absence of a boundary on the path of each pair."""
        return path_affinity(logits.sigmoid()[:, 0], self.config.radius)

    def label(
        self, logits: Tensor, keys: np.ndarray, cam: Tensor, size: tuple[int, int]
    ) -> np.ndarray:
        """(1, h, w) logits, (K,) labels and (K, h', w') maps -> (H, W) uint8 label."""
        walked = walk(logits[0].sigmoid(), cam, self.config)
        return label_of_walked_maps(walked, keys, size, self.config.threshold)

    seed = staticmethod(seed_by_thresholds)


def walk(boundary: Tensor, cam: Tensor, config: IrnConfig) -> Tensor:
    """Averages (K, H', W') maps over the cells of an (h, w) boundary in [0, 1], weakens them on the
    boundary and propagates them -> (K, h, w)."""
    # Beyond the image everything is boundary: pairs that leave it have no affinity.
    margin = config.walk_radius - 1
    padded = F.pad(boundary, (margin, margin, 0, margin), value=1)
    affinity = path_affinity(padded, config.walk_radius)
    maps = F.adaptive_avg_pool2d(cam, boundary.shape)
    maps = maps**config.exponent * (1 - boundary)
    return random_walk(maps, affinity, config.walk_radius, config.beta, config.doublings)


def label_of_walked_maps(
    walked: Tensor, keys: np.ndarray, size: tuple[int, int], threshold: float
) -> np.ndarray:
    """(K, h, w) maps after the walk -> (H, W) uint8 labels, by argmax over a background score.

    Cells are 4 x 4 pixels, and the last ones may reach beyond the image: the maps are enlarged four
    times and cropped. All are divided by their common maximum, so that a class that the walk has
    thinned out everywhere does not come back.
    """
    if not len(keys):
        return np.zeros(size, np.uint8)
    maps = F.interpolate(walked[None], scale_factor=BoundaryNetwork.stride, mode="bilinear")[0]
    maps = maps[:, : size[0], : size[1]]
    maps = maps / maps.max().clamp(min=1e-5)
    scores = F.pad(maps, (0, 0, 0, 0, 1, 0), value=threshold)
    labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
    return labels[scores.argmax(0).cpu().numpy()]
