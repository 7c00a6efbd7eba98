"""PSA's spreading (Ahn and Kwak, CVPR 2018), as SEAM uses it: alike features belong together."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core.config import PsaConfig, WsssConfig
from core.crf.dense import DenseCRF, make_crf
from core.data.labels import BACKGROUND, IGNORE
from core.wsss.affinity import feature_affinity, random_walk
from core.wsss.pairs import AffinityNetwork
from core.wsss.pseudo_labels import upsampled
from core.wsss.spreading import Spreading


def psa_spreading(wsss: WsssConfig) -> Spreading:
    """Features at stride 8; affinity is exp(-mean |difference|)."""
    config = wsss.psa
    crf = make_crf(config.crf.settings())
    backbone = wsss.backbone.without_weights() if config.weights else wsss.backbone

    def seed(image: np.ndarray, keys: np.ndarray, cam: np.ndarray) -> np.ndarray:
        return confident_label(image, keys, cam, config, crf)

    def label(
        prediction: Tensor, keys: np.ndarray, cam: Tensor, size: tuple[int, int]
    ) -> np.ndarray:
        return walked_label(prediction, keys, cam, size, config)

    return Spreading(
        settings=config,
        seed=seed,
        network=lambda: AffinityNetwork(backbone),
        affinity=lambda features: feature_affinity(features, config.radius),
        label=label,
        flip=False,  # as PSA
        stride=8,
    )


def with_background(maps: np.ndarray, exponent: float) -> np.ndarray:
    """Puts (1 - best class)^exponent before (K, H, W) maps in [0, 1]."""
    best = maps.max(0, keepdims=True, initial=0)
    return np.concatenate([(1 - best) ** exponent, maps])


def confident_label(
    image: np.ndarray, keys: np.ndarray, cam: np.ndarray, config: PsaConfig, crf: DenseCRF
) -> np.ndarray:
    """A class where it beats a strong background, background where it wins though weak.

    Args:
        image: (H, W, 3) uint8 RGB.
        keys: (K,) labels of the maps, 1-based.
        cam: (K, h, w) in [0, 1].
        config: the two exponents; a low one makes a strong background.
        crf: refines both decisions.

    Returns:
        (H, W) uint8, 255 where neither is sure.
    """
    labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
    maps = upsampled(cam, image.shape[:2]).clip(0, 1)
    strong, weak = (
        labels[crf(image, with_background(maps, exponent).astype(np.float32)).argmax(0)]
        for exponent in (config.low_exponent, config.high_exponent)
    )
    unsure = np.where(weak == BACKGROUND, BACKGROUND, IGNORE).astype(np.uint8)
    return np.where(strong == BACKGROUND, unsure, strong)


def walked_label(
    features: Tensor, keys: np.ndarray, cam: Tensor, size: tuple[int, int], config: PsaConfig
) -> np.ndarray:
    """Spreads background and classes over (D, h, w) features -> (H, W) uint8 labels by argmax."""
    if not len(keys):
        return np.zeros(size, np.uint8)
    cells = features.shape[-2:]
    maps = F.interpolate(cam[None], cells, mode="area")[0].clamp(0, 1)
    background = (1 - maps.amax(0, keepdim=True)) ** config.walk_exponent
    # Pairs that leave the image are cut off by the walk, whatever their affinity.
    margin = config.radius - 1
    padded = F.pad(features[None], (margin, margin, 0, margin), mode="replicate")
    affinity = feature_affinity(padded, config.radius)[0]
    walked = random_walk(
        torch.cat([background, maps]), affinity, config.radius, config.beta, config.doublings
    )
    scores = F.interpolate(walked[None], size, mode="bilinear")[0]
    labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
    return labels[scores.argmax(0).cpu().numpy()]
