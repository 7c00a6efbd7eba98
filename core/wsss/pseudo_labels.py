"""From class activation maps to pseudo labels, and the files of both."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from core.config import WsssConfig
from core.crf.dense import DenseCRF, make_crf
from core.run.files import atomic_write, read_arrays


def save_cam(path: Path, keys: np.ndarray, cam: np.ndarray) -> None:
    """Saves the (K,) labels, 1-based, and (K, h, w) maps in [0, 1] of one image."""
    with atomic_write(path) as tmp:
        with tmp.open("wb") as file:
            np.savez(file, keys=keys.astype(np.int16), cam=cam.astype(np.float16))


def load_cam(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads what `save_cam` wrote: (K,) int16 and (K, h, w) float32."""
    arrays = read_arrays(path, ("keys", "cam"), "remove it and run train_wsss.py again")
    return arrays["keys"], arrays["cam"].astype(np.float32)


def normalise_cams(maps: np.ndarray) -> np.ndarray:
    """Divides each of (K, h, w) maps, not negative, by its maximum."""
    return maps / (maps.max((1, 2), keepdims=True) + 1e-5)


def background_score(config: WsssConfig, maps: Sequence[Path]) -> float:
    """The score of the background: `threshold`, or the one that `object_share` of all pixels pass.

    Args:
        config: which of the two.
        maps: the files of all images.

    Returns:
        In (0, 1).
    """
    if config.object_share is None:
        return config.threshold
    edges = np.linspace(0, 1, 2001)
    counts = np.zeros(len(edges) - 1, np.int64)
    for path in maps:
        cam = load_cam(path)[1]
        # An image without tags has no maps, (0, h, w): all of its pixels are background.
        counts += np.histogram(cam.max(0, initial=0), edges)[0]
    passing = counts[::-1].cumsum()[::-1] / max(1, counts.sum())
    return float(edges[np.abs(passing - config.object_share).argmin()])


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
        crf: refinement of the softmax of the scores; None for none.
        sharpness: factor on the scores in that softmax.

    Returns:
        (H, W) uint8 labels.
    """
    height, width = image.shape[:2]
    labels = np.concatenate([[0], keys]).astype(np.uint8)
    background = np.full((1, height, width), threshold, np.float32)
    scores = np.concatenate([background, upsampled(cam, (height, width))])
    if crf is not None and len(keys):
        exponent = np.exp(sharpness * (scores - scores.max(0)))
        scores = crf(image, (exponent / exponent.sum(0)).astype(np.float32))
    return labels[scores.argmax(0)]


def upsampled(cam: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(K, h, w) float32 -> (K, H, W), bilinear."""
    maps = [cv2.resize(m, size[::-1], interpolation=cv2.INTER_LINEAR) for m in cam]
    return np.stack(maps) if maps else np.zeros((0, *size), np.float32)


def label_crf(config: WsssConfig) -> DenseCRF | None:
    """The configured refinement of pseudo labels."""
    return make_crf(config.crf.settings()) if config.refine == "crf" else None
