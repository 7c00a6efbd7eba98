"""Our dense CRF against pydensecrf, on one core."""

import statistics
import time
from pathlib import Path

import cv2
import numpy as np

from core.crf.dense import DenseCRF
from tools.bench.common import drawing, photographs, ratio


def benchmark_crf(samples: Path | None) -> None:
    """Time by number of labels and size, and the agreement on photographs with two labels."""
    pictures = photographs(samples) if samples else [drawing(k) for k in range(16)]
    few = pictures[:: len(pictures) // 8][:8]
    print(f"{'':28}{'ours':>9}{'pydensecrf':>12}{'speed-up':>15}   equal labels around the object")
    for height, width in ((375, 500), (480, 640)):
        for labels in (2, 3, 5, 21):
            compare_crf(f"{width} x {height}, {labels} labels", few, (width, height), labels)
    compare_crf(f"longer side 500, {len(pictures)} images", pictures, 500, 2)
    for settings in ({"relaxation": 1.8, "iterations": 6}, {"vertices": 4}, {"vertices": 3}):
        fast = {"relaxation": 1.8, "iterations": 6, **settings}
        compare_crf(" ".join(f"{k} {v}" for k, v in settings.items()), pictures, 500, 2, **fast)


def compare_crf(title: str, pictures: list, size: tuple[int, int] | int, labels: int, **ours):
    """Prints one row: medians over the pictures, with both backends alternating."""
    reference, faster = DenseCRF("pydensecrf"), DenseCRF("numba", **ours)
    times, alike = {"ours": [], "pydensecrf": []}, []
    for image, mask in pictures:
        height, width = mask.shape
        scale = size / max(height, width) if isinstance(size, int) else 0
        target = (round(width * scale), round(height * scale)) if scale else size
        image = cv2.resize(image, target, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(np.minimum(mask, 1), target, interpolation=cv2.INTER_NEAREST)
        probs = rough_probabilities(mask, labels)
        if not alike:
            faster(image, probs)  # compiles
        results = {}
        for name, crf in (("ours", faster), ("pydensecrf", reference)):
            began = time.perf_counter()
            results[name] = crf(image, probs).argmax(0)
            times[name].append(time.perf_counter() - began)
        region = cv2.dilate(mask, np.ones((13, 13), np.uint8)) > 0
        alike.append((results["ours"] == results["pydensecrf"])[region].mean())
    medians = [1000 * statistics.median(t) for t in times.values()]
    print(
        f"{title:28}{medians[0]:6.0f} ms{medians[1]:9.0f} ms{ratio(*times.values()):15.1f}"
        f"   {np.mean(alike):.2%}, worst {min(alike):.2%}",
        flush=True,
    )


def rough_probabilities(mask: np.ndarray, labels: int) -> np.ndarray:
    """(L, H, W) probabilities: background, the blurred object plus smooth noise, and noise."""
    rng = np.random.default_rng(0)
    size = mask.shape[::-1]
    noise = [cv2.resize(rng.random((8, 8), np.float32), size) for _ in range(labels - 1)]
    fg = 0.15 + 0.6 * cv2.blur(mask.astype(np.float32), (41, 41)) + 0.4 * (noise[0] - 0.5)
    fg = np.clip(fg, 0.01, 0.99)
    probs = np.stack([1 - fg, fg, *(0.3 * n for n in noise[1:])])
    return probs / probs.sum(0)
