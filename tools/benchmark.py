"""Measures what speed and memory are claimed of; ratios within one run, on this machine.

    python tools/benchmark.py evaluate            # images scored per second, PNG decoding included
    python tools/benchmark.py walk                # IRNet's random walk: steps against matrix power

`evaluate` draws 1,449 masks and predictions of 500 x 375 pixels, or repeats those of --masks, and
prints the median of five measurements.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.affinity import pair_offsets, path_affinity
from core.config import IrnConfig
from core.errors import run_script
from core.irn import walk
from core.labels import read_label, write_label
from core.scoring import score_files

IMAGES = 1449  # VOC's validation list


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("evaluate", "walk"))
    parser.add_argument("--masks", type=Path, help="evaluate: real masks, repeated to 1,449")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {options.workers} workers, torch {torch.__version__}")
    if options.what == "evaluate":
        benchmark_evaluate(options.masks, options.workers)
    else:
        benchmark_walk()


def benchmark_evaluate(masks: Path | None, workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        truths, predictions = draw_pairs(Path(folder), masks)
        classes = [str(c) for c in range(1, 21)]
        score_files(predictions[:8], truths[:8], classes, False, workers)  # compiles
        times = []
        for _ in range(5):
            began = time.perf_counter()
            score_files(predictions, truths, classes, False, workers)
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times)
        print(
            f"evaluate: {len(truths) / seconds:,.0f} images/s ({seconds:.2f} s for {len(truths)})"
        )


def draw_pairs(folder: Path, masks: Path | None) -> tuple[list[Path], list[Path]]:
    """1,449 masks, and predictions that are these moved by a few pixels."""
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


def ellipses(rng: np.random.Generator) -> np.ndarray:
    """A mask of VOC's size with up to three objects and their borders of 255."""
    y, x = np.mgrid[:375, :500]
    label = np.zeros((375, 500), np.uint8)
    for _ in range(rng.integers(1, 4)):
        centre, radii = rng.uniform((0, 0), (375, 500)), rng.uniform(30, 150, 2)
        distance = np.hypot((y - centre[0]) / radii[0], (x - centre[1]) / radii[1])
        label[distance < 1.05] = 255
        label[distance < 1] = rng.integers(1, 21)
    return label


def benchmark_walk() -> None:
    """Memory of a walk on 160 x 160 cells (640 x 640 pixels); one on 64 x 64 both ways."""
    generator = torch.Generator().manual_seed(0)
    settings = IrnConfig()
    for side in (160, 64):
        boundary = torch.rand(side, side, generator=generator) ** 4
        maps = torch.rand(2, side, side, generator=generator)
        began = time.perf_counter()
        walked = walk(boundary, maps, settings)
        seconds = time.perf_counter() - began
        print(f"walk on {side} x {side} cells, 256 steps: {seconds:.2f} s", end="; ")
        if side > 64:
            print(f"process peak {peak_memory():.2f} GB (a dense matrix: {side**4 * 4e-9:.1f} GB)")
    began = time.perf_counter()
    dense_walk(maps, boundary, settings)
    slower = time.perf_counter() - began
    exact = dense_walk(maps.double(), boundary.double(), settings)
    print(
        f"by matrix power {slower:.2f} s, {slower / seconds:.0f} times as long; largest difference "
        f"from the power in double precision {(walked - exact).abs().max():.1e}"
    )


def dense_walk(maps: torch.Tensor, boundary: torch.Tensor, settings: IrnConfig) -> torch.Tensor:
    """The paper's form: the transition matrix, squared again and again."""
    (height, width), radius = boundary.shape, settings.walk_radius
    margin = radius - 1
    padded = torch.nn.functional.pad(boundary, (margin, margin, 0, margin), value=1)
    weights = path_affinity(padded, radius) ** settings.beta
    place = torch.arange(height * width).view(height, width)
    matrix = torch.eye(height * width, dtype=maps.dtype)
    for (dy, dx), weight in zip(pair_offsets(radius), weights, strict=True):
        rows, columns = slice(0, height - dy), slice(max(0, -dx), width - max(0, dx))
        here = place[rows, columns].flatten()
        there = here + dy * width + dx
        matrix[here, there] = matrix[there, here] = weight[rows, columns].flatten()
    matrix /= matrix.sum(0)
    for _ in range(settings.doublings):
        matrix = matrix @ matrix
    return ((maps * (1 - boundary)).flatten(1) @ matrix).view_as(maps)


def peak_memory() -> float:
    """Of this process, GB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    run_script(main)
