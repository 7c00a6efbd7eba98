"""Scores of whole folders of label maps, as scores.json holds them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.data.checks import Seen, judge, look_at
from core.data.finder import LABELS, Files
from core.metrics import confusion_matrix, scores
from core.run.errors import UserError, raise_all
from core.run.log import note
from core.run.threads import in_threads

PART = 32  # images that a thread scores at a time
DEFINITIONS = {
    "miou": "mean over background and classes of TP / (TP + FP + FN)",
    "fp": "mean over classes, without background, of FP / (TP + FP + FN)",
    "fn": "mean over classes, without background, of FN / (TP + FP + FN)",
    "fp_per_tp": "mean over classes, without background, of FP / TP (the SEAM paper's definition)",
    "fn_per_tp": "mean over classes, without background, of FN / TP (the SEAM paper's definition)",
}


def pair_folders(predictions: Path, masks: Path) -> tuple[list[Path], list[Path]]:
    """Predictions, which may be missing, and masks: label maps with the same ids in two folders.

    Raises:
        UserError: there are no masks, several for one id, or some whose names are not UTF-8.
    """
    truths, found = Files(masks, LABELS, skip=predictions), Files(predictions, LABELS)
    raise_all(truths.problems(), "rename these masks, and their predictions alike")
    if not truths.ids:
        raise UserError(f"{masks} holds no PNG masks")
    rest = [i for i in found.ids if i not in truths.ids]
    if rest:
        note(f"predictions below {predictions} without a mask: {len(rest)}, such as {rest[0]}")
    return [*map(found.of_id, truths.ids)], [*map(truths.of_id, truths.ids)]


def score_files(
    predictions: Sequence[Path],
    masks: Sequence[Path],
    classes: Sequence[str],
    allow_missing: bool,
    workers: int,
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

    def count(part: Sequence[tuple[Path, Path]]) -> tuple[np.ndarray, list[tuple[Seen, Seen]]]:
        matrix, seen = np.zeros((1 + len(classes),) * 2, np.int64), []
        for prediction, mask in part:
            truth, true = look_at(mask, len(classes), biased=False)
            predicted, guessed = look_at(prediction, len(classes), truth.shape)
            matrix += confusion_matrix(predicted, truth, len(classes))
            seen.append((guessed, true))
        return matrix, seen

    matrix, seen = np.zeros((1 + len(classes),) * 2, np.int64), []
    parts = [pairs[k : k + PART] for k in range(0, len(pairs), PART)]
    for counts, looked in in_threads(count, parts, workers, "scoring", len(parts), unit="part"):
        matrix += counts
        seen += looked
    found = judge([m for _, m in pairs], [s for _, s in seen], classes, "truth")
    found += judge([p for p, _ in pairs], [s for s, _ in seen], classes, "prediction")
    found.refuse()
    return {**summarise(matrix, classes, len(pairs), len(masks)), "notes": found.warnings}


def summarise(matrix: np.ndarray, classes: Sequence[str], scored: int, total: int) -> dict:
    """The content of scores.json."""
    s = scores(matrix)
    values = {"miou": s.miou}
    for key in ("fp", "fn", "fp_per_tp", "fn_per_tp"):
        values[key] = s.mean(getattr(s, key))
    lists = {key: [_number(v) for v in getattr(s, key)] for key in ("iou", "fp", "fn")}
    return {
        **{k: _number(v) for k, v in values.items()},
        "classes": ["background", *classes],
        "per_class": lists,
        "images": {"scored": scored, "of": total},
        "definitions": DEFINITIONS,
        "confusion_matrix": matrix.tolist(),
    }


def _number(value: float) -> float | None:
    """JSON has no NaN; None is a class that occurs nowhere."""
    return float(value) if np.isfinite(value) else None
