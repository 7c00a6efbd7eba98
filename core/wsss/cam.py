"""From class activation maps to pseudo labels, and the files of both."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.crf.dense import DenseCRF
from core.data.labels import BACKGROUND, IGNORE
from core.models.backbones import Backbone, BackboneConfig, OnBackbone
from core.run.files import atomic_write, read_arrays

RELEASED_RESNET = [
    *(("resnet50.fc.", None), ("resnet50.", "backbone.net."), ("stage", None)),
    *((f"{name}.", None) for name in ("backbone", "newly_added", "edge_layers", "dp_layers")),
]
"""Prefixes in IRNet's and AdvCAM's files, some of which have a tensor twice, and ours."""


class CamClassifier(OnBackbone):
    """A backbone and a 1x1 convolution; the class logits are the map's mean (as in IRNet).

    With log-mean-exp pooling they are between the average and the maximum (Pinheiro and Collobert,
    CVPR 2015), so that a small object is not outvoted by its surroundings.
    """

    RELEASED: ClassVar = [*RELEASED_RESNET, ("classifier.", "classifier.")]

    def __init__(
        self,
        backbone: BackboneConfig,
        num_classes: int,
        output_stride: int = 16,
        pooling: str = "mean",
        frozen_norm: bool = False,
        frozen_stages: int | None = None,
    ):
        super().__init__()
        self.pooling, self.frozen_norm = pooling, frozen_norm
        self.backbone = Backbone(backbone, (4,), output_stride)
        self.classifier = nn.Conv2d(self.backbone.dims[-1], num_classes, 1, bias=False)
        if frozen_stages is not None:
            self.backbone.freeze_stages(frozen_stages)

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

    def activation(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/stride, W/stride) activation maps, not negative."""
        return torch.relu(self.maps(images))


def save_cam(path: Path, keys: np.ndarray, cam: np.ndarray) -> None:
    """Saves the (K,) labels, 1-based, and (K, h, w) maps in [0, 1] of one image."""
    with atomic_write(path) as tmp, tmp.open("wb") as file:
        np.savez(file, keys=keys.astype(np.int16), cam=cam.astype(np.float16))


def load_cam(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads what `save_cam` wrote: (K,) int16 and (K, h, w) float32."""
    arrays = read_arrays(path, ("keys", "cam"), "remove it and run train_wsss.py again")
    return arrays["keys"], arrays["cam"].astype(np.float32)


def normalise_cams(maps: np.ndarray) -> np.ndarray:
    """Divides each of (K, h, w) maps, not negative, by its maximum."""
    return maps / (maps.max((1, 2), keepdims=True) + 1e-5)


def background_score(object_share: float, maps: Sequence[Path]) -> float:
    """The score in (0, 1) that a share `object_share` of all pixels exceeds in the maps' files."""
    edges = np.linspace(0, 1, 2001)
    counts = np.zeros(len(edges) - 1, np.int64)
    for path in maps:
        cam = load_cam(path)[1]
        # An image without tags has no maps, (0, h, w): all of its pixels are background.
        counts += np.histogram(cam.max(0, initial=0), edges)[0]
    passing = counts[::-1].cumsum()[::-1] / max(1, counts.sum())
    return float(edges[np.abs(passing - object_share).argmin()])


def cam_label(
    image: np.ndarray,
    keys: np.ndarray,
    cam: np.ndarray,
    threshold: float,
    crf: DenseCRF | None,
    sharpness: float,
) -> np.ndarray:
    """The pseudo label Y^b of one image: argmax over a constant background score and its class
    maps.

    Args:
        image: (H, W, 3) uint8 RGB.
        keys: (K,) labels of the maps, 1-based.
        cam: (K, h, w) in [0, 1].
        threshold: the background's score.
        crf: refinement of the softmax of `sharpness` times the scores; None for none.

    Returns:
        (H, W) uint8 labels.
    """
    labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
    scores = with_background(upsampled(cam, image.shape[:2]), threshold)
    if crf is not None and len(keys):
        exponent = np.exp(sharpness * (scores - scores.max(0)))
        scores = crf(image, (exponent / exponent.sum(0)).astype(np.float32))
    return labels[scores.argmax(0)]


def confident_label(
    image: np.ndarray,
    keys: np.ndarray,
    cam: np.ndarray,
    crf: DenseCRF,
    decisions: Sequence[Callable[[np.ndarray], np.ndarray]],
) -> np.ndarray:
    """A class where it beats a strong background; background where even a weak one wins.

    Args:
        image, keys, cam: see `cam_label`.
        crf: refinement of both decisions.
        decisions: two functions, (K, H, W) maps -> (1 + K, H, W) probabilities that the CRF starts
            from: with a strong background, and with a weak one.

    Returns:
        (H, W) uint8, 255 where neither is certain.
    """
    labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
    maps = upsampled(cam, image.shape[:2])
    strong, weak = (labels[crf(image, decide(maps)).argmax(0)] for decide in decisions)
    unsure = np.where(weak == BACKGROUND, BACKGROUND, IGNORE).astype(np.uint8)
    return np.where(strong == BACKGROUND, unsure, strong)


def with_background(maps: np.ndarray, score: float) -> np.ndarray:
    """Puts a constant background score before (K, H, W) float32 maps."""
    return np.concatenate([np.full((1, *maps.shape[1:]), score, np.float32), maps])


def upsampled(cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(K, h, w) float32 -> (K, H, W), bilinear."""
    maps = [cv2.resize(m, size[::-1], interpolation=cv2.INTER_LINEAR) for m in cam]
    return np.stack(maps) if maps else np.zeros((0, *size), np.float32)
