"""IRNet's spreading (Ahn, Cho and Kwak, CVPR 2019): boundaries that no walk crosses."""

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from core.config import IrnConfig, WsssConfig
from core.crf.dense import DenseCRF, make_crf
from core.data.labels import BACKGROUND, IGNORE
from core.wsss.affinity import path_affinity, random_walk
from core.wsss.pairs import BoundaryNetwork
from core.wsss.pseudo_labels import upsampled
from core.wsss.spreading import Spreading

STRIDE = 4  # pixels per cell of the boundaries


def irn_spreading(wsss: WsssConfig) -> Spreading:
    """Boundaries of cells; affinity is the absence of one on the path between two cells."""
    config = wsss.irn
    crf = make_crf(config.crf.settings())
    backbone = wsss.backbone.without_weights() if config.weights else wsss.backbone

    def seed(image: np.ndarray, keys: np.ndarray, cam: np.ndarray) -> np.ndarray:
        return confident_label(image, keys, cam, config.foreground, config.background, crf)

    def label(
        prediction: Tensor, keys: np.ndarray, cam: Tensor, size: tuple[int, int]
    ) -> np.ndarray:
        walked = walk(prediction[0].sigmoid(), cam, config)
        return walked_label(walked, keys, size, config.threshold)

    return Spreading(
        settings=config,
        seed=seed,
        network=lambda: BoundaryNetwork(backbone),
        affinity=lambda logits: path_affinity(logits.sigmoid()[:, 0], config.radius),
        label=label,
        flip=True,
        stride=STRIDE,
    )


def confident_label(
    image: np.ndarray,
    keys: np.ndarray,
    cam: np.ndarray,
    foreground: float,
    background: float,
    crf: DenseCRF,
) -> np.ndarray:
    """A class where it beats a high background score, background where none beats a low one.

    Args:
        image: (H, W, 3) uint8 RGB.
        keys: (K,) labels of the maps, 1-based.
        cam: (K, h, w) in [0, 1].
        foreground, background: the two scores.
        crf: refines both decisions.

    Returns:
        (H, W) uint8, 255 where neither is sure.
    """
    labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
    maps = upsampled(cam, image.shape[:2])
    sure, possible = (
        labels[_refined_decision(image, maps, score, crf)] for score in (foreground, background)
    )
    unsure = np.where(possible == BACKGROUND, BACKGROUND, IGNORE).astype(np.uint8)
    return np.where(sure == BACKGROUND, unsure, sure)


def _refined_decision(
    image: np.ndarray, maps: np.ndarray, score: float, crf: DenseCRF, certainty: float = 0.7
) -> np.ndarray:
    """(H, W) index of the best of background and maps; the CRF starts from that decision alone."""
    background = np.full((1, *maps.shape[1:]), score, np.float32)
    decision = np.concatenate([background, maps]).argmax(0)
    rest = (1 - certainty) / max(1, len(maps))
    probs = np.full((1 + len(maps), *decision.shape), rest, np.float32)
    np.put_along_axis(probs, decision[None], np.float32(certainty), 0)
    return crf(image, probs).argmax(0)


def walk(boundary: Tensor, cam: Tensor, config: IrnConfig) -> Tensor:
    """Spreads (K, H', W') maps, averaged over the cells of a (h, w) boundary in [0, 1] and keeping
    off it -> (K, h, w)."""
    # Beyond the image everything is boundary: pairs that leave it have no affinity.
    margin = config.walk_radius - 1
    padded = F.pad(boundary, (margin, margin, 0, margin), value=1)
    affinity = path_affinity(padded, config.walk_radius)
    maps = F.adaptive_avg_pool2d(cam, boundary.shape)
    maps = maps**config.exponent * (1 - boundary)
    return random_walk(maps, affinity, config.walk_radius, config.beta, config.doublings)


def walked_label(
    walked: Tensor, keys: np.ndarray, size: tuple[int, int], threshold: float
) -> np.ndarray:
    """(K, h, w) maps after the walk -> (H, W) uint8 labels, by argmax over a background score.

    Cells are 4 x 4 pixels, and the last ones may reach beyond the image: the maps are enlarged four
    times and cropped. All are divided by their common maximum, so that a class that the walk has
    thinned out everywhere does not come back.
    """
    if not len(keys):
        return np.zeros(size, np.uint8)
    maps = F.interpolate(walked[None], scale_factor=STRIDE, mode="bilinear")[0]
    maps = maps[:, : size[0], : size[1]]
    maps = maps / maps.max().clamp(min=1e-5)
    scores = F.pad(maps, (0, 0, 0, 0, 1, 0), value=threshold)
    labels = np.concatenate([[BACKGROUND], keys]).astype(np.uint8)
    return labels[scores.argmax(0).cpu().numpy()]
