"""Segmentation scores from one exact confusion matrix."""

from dataclasses import dataclass

import cv2
import numpy as np

from core.data.labels import IGNORE

EXACT = 2**24  # pixels up to which OpenCV counts in float32 without rounding


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pixels by true and predicted label.

    Args:
        prediction: (H, W) uint8, 0..C; 255 and 254 inside the valid area count as background.
        truth: (H, W) uint8, 0..C; 255 is left out.
        num_classes: C, without background.

    Returns:
        (1 + C, 1 + C) int64, rows true, columns predicted.
    """
    if ((truth > num_classes) & (truth != IGNORE)).any():
        raise ValueError(f"ground truth holds labels other than 0..{num_classes} and {IGNORE}")
    truth, prediction = (np.atleast_2d(m) for m in (truth, prediction))
    counts = np.zeros((256, 256), np.int64)
    step = max(1, EXACT // max(1, truth.shape[1]))
    for top in range(0, len(truth), step):
        rows = [np.ascontiguousarray(m[top : top + step]) for m in (truth, prediction)]
        counts += cv2.calcHist(rows, [0, 1], None, [256, 256], [0, 256, 0, 256]).astype(np.int64)
    matrix = counts[: 1 + num_classes, : 1 + num_classes].copy()
    matrix[:, 0] += counts[: 1 + num_classes, 1 + num_classes :].sum(1)
    return matrix


@dataclass(frozen=True)
class Scores:
    """IoU, and false positives and negatives as shares of the union, by label, background first.

    A label that occurs neither in truth nor in prediction is NaN and left out of the means.
    """

    iou: np.ndarray  # (1 + C,)
    fp: np.ndarray  # (1 + C,) FP / (TP + FP + FN)
    fn: np.ndarray  # (1 + C,) FN / (TP + FP + FN)
    fp_per_tp: np.ndarray  # (1 + C,) FP / TP, the SEAM paper's definition
    fn_per_tp: np.ndarray  # (1 + C,) FN / TP

    @property
    def miou(self) -> float:
        """Mean IoU, background included."""
        return float(np.nanmean(self.iou))

    def mean(self, values: np.ndarray, labels: list[int] | None = None) -> float:
        """Mean of `values` over `labels`, by default all foreground ones (the paper's Table 6)."""
        chosen = values[labels] if labels is not None else values[1:]
        return float(np.nanmean(chosen)) if np.isfinite(chosen).any() else float("nan")


def scores(matrix: np.ndarray) -> Scores:
    """Scores of a (1 + C, 1 + C) confusion matrix, rows true, columns predicted."""
    tp = np.diag(matrix).astype(float)
    fp, fn = matrix.sum(0) - tp, matrix.sum(1) - tp
    with np.errstate(divide="ignore", invalid="ignore"):
        union = tp + fp + fn
        return Scores(tp / union, fp / union, fn / union, fp / tp, fn / tp)
