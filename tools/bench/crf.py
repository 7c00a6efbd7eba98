"""Our dense CRF, compiled and in torch, against pydensecrf, on one core; and in torch on a GPU."""

import resource
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from core.crf.batched import BYTES, bytes_per_pixel, refine
from core.crf.dense import CrfConfig, DenseCRF
from tools.bench.common import drawing, photographs, ratio

REFERENCE = "pydensecrf"


def benchmark_crf(samples: Path | None) -> None:
    """Time by number of labels and size, and the agreement on photographs with two labels."""
    pictures = photographs(samples) if samples else [drawing(k) for k in range(16)]
    few = pictures[:: len(pictures) // 8][:8]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'':28}{'numba':>9}{'torch':>9}{REFERENCE:>12}{'numba is faster':>17}   equal labels")
    for height, width in ((375, 500), (480, 640)):
        for labels in (2, 3, 5, 21):
            compare_crf(
                f"{width} x {height}, {labels} labels", few, (width, height), labels, device
            )
    compare_crf(f"longer side 500, {len(pictures)} images", pictures, 500, 2, device)
    for settings in ({"relaxation": 1.8, "iterations": 6}, {"vertices": 4}, {"vertices": 3}):
        fast = {"relaxation": 1.8, "iterations": 6, **settings}
        title = " ".join(f"{k} {v}" for k, v in settings.items())
        compare_crf(title, pictures, 500, 2, device, **fast)
    batch_of_crops(few, device)


def compare_crf(
    title: str, pictures: list, size: tuple[int, int] | int, labels: int, device: str, **ours
) -> None:
    """Prints one row: medians over the pictures, with the backends alternating.

    Equal labels: mean and minimum over the pictures, around the object, of numba and of torch.
    """
    backends = {
        "numba": DenseCRF("numba", **ours),
        "torch": DenseCRF("torch", device, **ours),
        REFERENCE: DenseCRF(REFERENCE),
    }
    times, alike = {name: [] for name in backends}, {"numba": [], "torch": []}
    for k, (image, mask) in enumerate(pictures):
        image, mask = resized(image, mask, size)
        probs = rough_probabilities(mask, labels)
        for crf in () if k else backends.values():
            crf(image, probs)  # compiles, and chooses kernels
        results = {}
        for name, crf in backends.items():
            began = time.perf_counter()
            results[name] = crf(image, probs).argmax(0)
            times[name].append(time.perf_counter() - began)
        region = cv2.dilate(mask, np.ones((13, 13), np.uint8)) > 0
        for name, found in alike.items():
            found.append((results[name] == results[REFERENCE])[region].mean())
    numba, torch_, reference = (1000 * statistics.median(t) for t in times.values())
    equal = "; ".join(f"{n} {np.mean(a):.2%}, worst {min(a):.2%}" for n, a in alike.items())
    print(
        f"{title:28}{numba:6.0f} ms{torch_:6.0f} ms{reference:9.0f} ms"
        f"{ratio(times['numba'], times[REFERENCE]):17.1f}   {equal}",
        flush=True,
    )


def resized(
    image: np.ndarray, mask: np.ndarray, size: tuple[int, int] | int
) -> tuple[np.ndarray, np.ndarray]:
    """Image and 0/1 mask at (width, height), or with a longer side."""
    height, width = mask.shape
    scale = size / max(height, width) if isinstance(size, int) else 0
    target = (round(width * scale), round(height * scale)) if scale else size
    image = cv2.resize(image, target, interpolation=cv2.INTER_AREA)
    return image, cv2.resize(np.minimum(mask, 1), target, interpolation=cv2.INTER_NEAREST)


def batch_of_crops(pictures: list, device: str, count: int = 16, side: int = 512) -> None:
    """Time and peak memory of a batch as in stage 4, in torch: 16 crops with 4 labels."""
    crops = [resized(*pictures[k % len(pictures)], (side, side)) for k in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in crops])).permute(0, 3, 1, 2)
    probs = torch.from_numpy(np.stack([rough_probabilities(mask, 4) for _, mask in crops]))
    images, probs = images.to(device), probs.float().to(device)
    before = peak_bytes(device)
    began = time.perf_counter()
    refine(images, probs, CrfConfig())
    grown, seconds = peak_bytes(device) - before, time.perf_counter() - began
    print(
        f"{count} crops of {side} pixels, 4 labels, torch on {device}: {seconds:.1f} s; peak memory"
        f" {grown / 2**30:.2f} GiB measured, at most {bound(count, side, 4) / 2**30:.2f} computed"
    )


def bound(count: int, side: int, labels: int) -> int:
    """Bytes that `refine` may take at once: one chunk of images, and the result."""
    chunk = max(1, BYTES // (side**2 * bytes_per_pixel(labels)))
    return min(chunk, count) * side**2 * bytes_per_pixel(labels) + 2 * count * labels * side**2 * 4


def peak_bytes(device: str) -> int:
    """Peak memory so far of the GPU, or of this process."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rough_probabilities(mask: np.ndarray, labels: int) -> np.ndarray:
    """(L, H, W) probabilities: background, the blurred object plus smooth noise, and noise."""
    rng = np.random.default_rng(0)
    size = mask.shape[::-1]
    noise = [cv2.resize(rng.random((8, 8), np.float32), size) for _ in range(labels - 1)]
    fg = 0.15 + 0.6 * cv2.blur(mask.astype(np.float32), (41, 41)) + 0.4 * (noise[0] - 0.5)
    fg = np.clip(fg, 0.01, 0.99)
    probs = np.stack([1 - fg, fg, *(0.3 * n for n in noise[1:])])
    return probs / probs.sum(0)
