"""Images scored per second, including the decoding of PNGs."""

import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from core.data.labels import read_label, write_label
from core.metrics import score_files
from tools.bench.common import ellipses, interleaved, ratio

IMAGES = 1449  # VOC's validation list


def benchmark_evaluate(masks: Path | None, workers: int) -> None:
    """Scores all pairs, alternating between ours and plain code on one core."""
    with tempfile.TemporaryDirectory() as folder:
        truths, predictions = draw_pairs(Path(folder), masks)
        classes = [str(c) for c in range(1, 21)]
        ways = {
            "ours": lambda n: score_files(predictions[:n], truths[:n], classes, False, workers),
            "Pillow and np.bincount, one core": lambda n: plain_matrix(predictions[:n], truths[:n]),
        }
        times = interleaved({name: partial(way, IMAGES) for name, way in ways.items()}, 5)
        matrices = ways["ours"](IMAGES)["confusion_matrix"], plain_matrix(predictions, truths)
        assert np.array_equal(*matrices)
    for name, seconds in times.items():
        print(f"evaluate, {name}: {IMAGES / statistics.median(seconds):,.0f} images/s", end="; ")
    print(f"speed-up {ratio(*times.values()):.2f}, counts equal")


def plain_matrix(predictions: list[Path], truths: list[Path]) -> np.ndarray:
    """(21, 21) counts by the most direct code."""
    total = np.zeros(21 * 21, np.int64)
    for prediction, truth in zip(predictions, truths, strict=True):
        predicted, true = np.array(Image.open(prediction)), np.array(Image.open(truth))
        valid = true != 255
        pairs = 21 * true[valid].astype(np.int64) + predicted[valid]
        total += np.bincount(pairs, minlength=21 * 21)
    return total.reshape(21, 21)


def draw_pairs(folder: Path, masks: Path | None) -> tuple[list[Path], list[Path]]:
    """1,449 masks, and predictions that are the masks shifted by a few pixels."""
    rng = np.random.default_rng(0)
    sources = sorted(masks.glob("*.png")) if masks else []
    truths, predictions = [], []
    for k in range(IMAGES):
        truth = read_label(sources[k % len(sources)]) if sources else ellipses(rng)
        moved = np.roll(truth, rng.integers(-9, 10, 2), (0, 1))
        moved[moved == 255] = 0
        truths.append(folder / "truth" / f"{k}.png")
        predictions.append(folder / "predicted" / f"{k}.png")
        write_label(truths[-1], truth)
        write_label(predictions[-1], moved)
    return truths, predictions
