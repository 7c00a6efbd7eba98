"""Segmentation scores from one exact confusion matrix: of two label maps, and of whole folders."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from core.data.checks import Names, Paths, Seen, judge, look_at
from core.data.finder import LABELS, Files
from core.data.labels import IGNORE
from core.data.lists import note_rest
from core.run.errors import UserError, raise_all
from core.run.threads import in_threads

EXACT = 2**24  # pixels up to which OpenCV counts in float32 without rounding
DEFINITIONS = {
    "miou": "mean over background and classes of TP / (TP + FP + FN)",
    "fp": "mean over classes, without background, of FP / (TP + FP + FN)",
    "fn": "mean over classes, without background, of FN / (TP + FP + FN)",
    "fp_per_tp": "mean over classes, without background, of FP / TP (the SEAM paper's definition)",
    "fn_per_tp": "mean over classes, without background, of FN / TP (the SEAM paper's definition)",
}


def confusion_matrix(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """(1 + C, 1 + C) int64 numbers of pixels by true (rows) and predicted label.

    Both label maps are (H, W) uint8, 0..C. In `truth`, 255 is left out; in `prediction`, 255 and
    254 inside the valid area count as background.
    """
    if ((truth > num_classes) & (truth != IGNORE)).any():
        raise ValueError(f"ground truth holds labels other than 0..{num_classes} and {IGNORE}")
    counts = np.zeros((256, 256), np.int64)
    pair = truth.ravel(), prediction.ravel()
    for start in range(0, truth.size, EXACT):
        part = [pixels[start : start + EXACT] for pixels in pair]
        counts += cv2.calcHist(part, [0, 1], None, [256, 256], [0, 256, 0, 256]).astype(np.int64)
    matrix = counts[: 1 + num_classes, : 1 + num_classes].copy()
    matrix[:, 0] += counts[: 1 + num_classes, 1 + num_classes :].sum(1)
    return matrix


@dataclass(frozen=True)
class Scores:
    """Scores by label, background first; a label that occurs neither in truth nor in prediction is
    NaN and left out of the means."""

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


def pair_folders(predictions: Path, masks: Path) -> tuple[list[Path], list[Path]]:
    """Predictions, which may be missing, and masks: label maps with the same ids in two folders.

    Raises:
        UserError: there are no masks, several for one id, or some whose names are not UTF-8.
    """
    truths, found = Files(masks, LABELS, skip=predictions), Files(predictions, LABELS)
    raise_all(truths.problems, "rename these masks, and their predictions alike")
    if not truths.ids:
        raise UserError(f"{masks} holds no PNG masks")
    note_rest(f"predictions below {predictions} without a mask", found.ids, truths.ids)
    return [*map(found.of_id, truths.ids)], [*map(truths.of_id, truths.ids)]


def score_files(
    predictions: Paths, masks: Paths, classes: Names, allow_missing: bool, workers: int
) -> dict:
    """Scores predicted label maps against masks, file by file.

    Raises:
        UserError: a prediction is missing and that is not allowed, a file is not a label map, or
        no mask holds any class.
    """
    pairs = [(p, m) for p, m in zip(predictions, masks, strict=True) if p.is_file()]
    missing = len(masks) - len(pairs)
    if missing and (not allow_missing or not pairs):
        first = next(p for p in predictions if not p.is_file())
        raise UserError(
            f"{missing} of {len(masks)} predictions are missing, first: {first}; a score on part "
            "of the images is not comparable. Make them, or give --allow-missing"
        )

    def count(pair: tuple[Path, Path]) -> tuple[np.ndarray, Seen, Seen]:
        truth, *true = look_at(pair[1], len(classes), biased=False)
        predicted, *guessed = look_at(pair[0], len(classes), truth.shape)
        return confusion_matrix(predicted, truth, len(classes)), guessed, true

    matrix, seen = np.zeros((1 + len(classes),) * 2, np.int64), []
    for counts, *looked in in_threads(count, pairs, workers, "scoring", len(pairs)):
        matrix += counts
        seen.append(looked)
    found = judge([m for _, m in pairs], [s for _, s in seen], classes, "truth")
    found += judge([p for p, _ in pairs], [s for s, _ in seen], classes, "prediction")
    found.refuse()
    return {**summarise(matrix, classes, len(pairs), len(masks)), "notes": found.warnings}


def summarise(matrix: np.ndarray, classes: Names, scored: int, total: int) -> dict:
    """The content of scores.json."""
    s = scores(matrix)
    means = {key: _number(s.mean(getattr(s, key))) for key in DEFINITIONS if key != "miou"}
    return {
        "miou": _number(s.miou),
        **means,
        "classes": ["background", *classes],
        "per_class": {key: [*map(_number, getattr(s, key))] for key in ("iou", "fp", "fn")},
        "images": {"scored": scored, "of": total},
        "definitions": DEFINITIONS,
        "confusion_matrix": matrix.tolist(),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN; None is a class that occurs nowhere."""
    return float(value) if np.isfinite(value) else None
