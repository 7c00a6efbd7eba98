"""Measures what speed and memory are claimed of; ratios within one run, on this machine.

    python tools/benchmark.py debias              # stage 3: the presets against the naive way
    python tools/benchmark.py crf                 # our dense CRF against pydensecrf, one core
    python tools/benchmark.py evaluate            # images scored per second, PNG decoding included
    python tools/benchmark.py walk                # IRNet's random walk: steps against matrix power

`debias` and `crf` draw pictures, or read photographs with COCO's objects below --samples, and take
turns between the presets or backends. Without --samples the agreement says little. `evaluate` draws
1,449 masks and predictions of 500 x 375 pixels, or repeats those of --masks; the median of five
measurements.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.affinity import pair_offsets, path_affinity
from core.config import DebiasConfig, IrnConfig
from core.crf import DenseCRF
from core.debias import debiased_centroid
from core.debias_image import crf_settings, find_clusters, refine, similarity
from core.errors import run_script
from core.irn import walk
from core.labels import read_label, write_label
from core.scoring import score_files

IMAGES = 1449  # VOC's validation list


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("debias", "crf", "evaluate", "walk"))
    parser.add_argument("--masks", type=Path, help="evaluate: real masks, repeated to 1,449")
    parser.add_argument("--samples", type=Path, help="debias, crf: folder that holds coco_sample")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {options.workers} workers, torch {torch.__version__}")
    if options.what == "debias":
        benchmark_debias(options.samples)
    elif options.what == "crf":
        benchmark_crf(options.samples)
    elif options.what == "evaluate":
        benchmark_evaluate(options.masks, options.workers)
    else:
        benchmark_walk()


def benchmark_debias(samples: Path | None) -> None:
    """Stage 3 of each photograph by each preset in turn, from its features to its label map."""
    pictures = photographs(samples) if samples else [drawing(k) for k in range(8)]
    items = [debias_item(image, label) for image, label in pictures]
    presets = ("naive", "exact", "fast", "grid")
    settings = {p: DebiasConfig(preset=p, scale="minmax") for p in presets}
    crfs = {p: DenseCRF(**crf_settings(s)) for p, s in settings.items()}
    crfs["naive"] = DenseCRF("pydensecrf")
    steps = ("K-means", "similarity", "unary and CRF")
    times = {p: {step: [] for step in steps} for p in presets}
    clusters = {p: [] for p in presets}
    masks = {p: [] for p in presets}
    for preset in presets[1:]:  # compiles
        find_clusters(items[0][2], items[0][1], settings[preset], 0)
    for _, label, feat in items:
        for p in presets:
            found = timed(times[p]["K-means"], find_clusters, feat, label, settings[p], 0)
            clusters[p].append(found[0])
    centroids = {p: selected_centroids(found) for p, found in clusters.items()}
    for image, label, feat in items:
        tags, region = np.isin(np.arange(1, 256), label), torch.from_numpy(label)
        for p in presets:
            arguments = (feat, centroids[p], tags, label.shape, settings[p])
            score = timed(times[p]["similarity"], similarity, *arguments)
            arguments = (score, image, region, settings[p], crfs[p])
            mask = timed(times[p]["unary and CRF"], refine, *arguments)
            masks[p].append(mask.numpy()[label > 0])
    print("medians in ms; naive: features at full size, K-means over all pixels, pydensecrf")
    print(f"{'':8}" + "".join(f"{s:>15}" for s in (*steps, "image", "times as fast")))
    whole = {p: np.sum([times[p][s] for s in steps], 0) for p in presets}
    for p in presets:
        medians = [1000 * np.median(t) for t in (*times[p].values(), whole[p])]
        faster = ratio(list(whole[p]), list(whole["naive"]))
        print(f"{p:8}" + "".join(f"{m:15.1f}" for m in medians) + f"{faster:15.1f}")
    for p in presets[1:]:
        alike = [np.mean(a == b) for a, b in zip(masks[p], masks["naive"], strict=True)]
        close = [
            len(ours[v]) == len(theirs[v]) and (ours[v] @ theirs[v].T).max(1).min() > 0.99
            for ours, theirs in zip(clusters[p], clusters["naive"], strict=True)
            for v in theirs
        ]
        print(
            f"{p}: labels of class regions as naive {np.mean(alike):.2%}, median "
            f"{np.median(alike):.2%}, worst {min(alike):.2%}; centroids with cosine > 0.99 in "
            f"{np.mean(close):.1%} of {len(close)} regions"
        )


def debias_item(
    image: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """A photograph of VOC's size, a pseudo label that holds context, and features."""
    scale = 500 / max(label.shape)
    size = (round(label.shape[1] * scale), round(label.shape[0] * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    label = cv2.dilate(label, np.ones((61, 61), np.uint8))  # a map's usual excess
    return image, label, torch.from_numpy(patch_features(image, 90))


def patch_features(image: np.ndarray, width: int) -> np.ndarray:
    """(D, h, w) float32 at stride 8: colour and texture of patches, lifted by a random projection.

    They vary with the picture, as a network's do; they are no features to segment with.
    """
    rows, cols = image.shape[0] // 8, image.shape[1] // 8
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32) / 128 - 1
    maps = [*lab.transpose(2, 0, 1)]
    for dx, dy in ((1, 0), (0, 1)):
        maps += [
            np.abs(cv2.Sobel(cv2.GaussianBlur(lab[..., 0], (0, 0), s), -1, dx, dy)) for s in (1, 3)
        ]
    wide = [cv2.GaussianBlur(m, (0, 0), 12) for m in maps]
    cells = [cv2.resize(m, (cols, rows), interpolation=cv2.INTER_AREA) for m in (*maps, *wide)]
    project = np.random.default_rng(0).normal(size=(width, len(cells))).astype(np.float32)
    return np.tanh(1.5 * np.einsum("dc,chw->dhw", project, np.stack(cells)))


def selected_centroids(clusters: list[dict[int, np.ndarray]]) -> torch.Tensor:
    """(255, D) debiased centroids of all classes (Eq. 1-3)."""
    background = torch.from_numpy(np.concatenate([c[0] for c in clusters if 0 in c]))
    centroids = torch.zeros(255, background.shape[1])
    for value in {v for c in clusters for v in c} - {0}:
        own = np.concatenate([c[value] for c in clusters if value in c])
        centroids[value - 1] = debiased_centroid(torch.from_numpy(own), background)
    return centroids


def timed(times: list[float], work: Callable, *arguments):
    began = time.perf_counter()
    result = work(*arguments)
    times.append(time.perf_counter() - began)
    return result


def benchmark_crf(samples: Path | None) -> None:
    """Time by number of labels and size, and of 64 photographs with two labels the agreement."""
    pictures = photographs(samples) if samples else [drawing(k) for k in range(16)]
    few = pictures[:: len(pictures) // 8][:8]
    print(f"{'':28}{'ours':>9}{'pydensecrf':>12}{'times as fast':>15}   labels alike in the object")
    for height, width in ((375, 500), (480, 640)):
        for labels in (2, 3, 5, 21):
            compare_crf(f"{width} x {height}, {labels} labels", few, (width, height), labels)
    compare_crf(f"longer side 500, {len(pictures)} images", pictures, 500, 2)
    for settings in ({"relaxation": 1.8, "iterations": 6}, {"vertices": 4}, {"vertices": 3}):
        fast = {"relaxation": 1.8, "iterations": 6, **settings}
        compare_crf(" ".join(f"{k} {v}" for k, v in settings.items()), pictures, 500, 2, **fast)


def compare_crf(title: str, pictures: list, size: tuple[int, int] | int, labels: int, **ours):
    """One row: medians over the pictures, each seen by both by turns."""
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
    """(L, H, W) that know the object blurred, with slow noise; other labels are noise alone."""
    rng = np.random.default_rng(0)
    size = mask.shape[::-1]
    noise = [cv2.resize(rng.random((8, 8), np.float32), size) for _ in range(labels - 1)]
    fg = 0.15 + 0.6 * cv2.blur(mask.astype(np.float32), (41, 41)) + 0.4 * (noise[0] - 0.5)
    fg = np.clip(fg, 0.01, 0.99)
    probs = np.stack([1 - fg, fg, *(0.3 * n for n in noise[1:])])
    return probs / probs.sum(0)


def photographs(samples: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """RGB images and (H, W) uint8 label maps of the category of their largest object."""
    folder = samples / "coco_sample"
    coco = COCO(folder / "annotations" / "instances.json")
    pairs = []
    for key, entry in sorted(coco.imgs.items()):
        found = coco.loadAnns(coco.getAnnIds(key, iscrowd=False))
        image = cv2.imread(str(folder / "images" / entry["file_name"]))
        largest = max(found, key=lambda a: a["area"], default=None)
        if image is not None and largest:
            alike = [a for a in found if a["category_id"] == largest["category_id"]]
            mask = np.max([coco.annToMask(a) for a in alike], 0)
            rank = sorted(coco.cats).index(largest["category_id"]) + 1
            pairs.append((image[..., ::-1].copy(), mask * np.uint8(rank)))
    return pairs


def drawing(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture with grain, and its objects."""
    rng = np.random.default_rng(seed)
    label = ellipses(rng)
    image = rng.integers(0, 256, (256, 3))[label] + rng.normal(0, 6, (*label.shape, 3))
    image = np.clip(cv2.GaussianBlur(image, (0, 0), 1), 0, 255).astype(np.uint8)
    return image, label * (label < 255)


def benchmark_evaluate(masks: Path | None, workers: int) -> None:
    """Scores all pairs, by turns ours and the plain way on one core."""
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
    print(f"{ratio(*times.values()):.2f} times as fast, counts equal")


def plain_matrix(predictions: list[Path], truths: list[Path]) -> np.ndarray:
    """(21, 21) counts as one would write them down first."""
    total = np.zeros(21 * 21, np.int64)
    for prediction, truth in zip(predictions, truths, strict=True):
        predicted, true = np.array(Image.open(prediction)), np.array(Image.open(truth))
        valid = true != 255
        pairs = 21 * true[valid].astype(np.int64) + predicted[valid]
        total += np.bincount(pairs, minlength=21 * 21)
    return total.reshape(21, 21)


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, taken by turns, so that all of them see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if round_:  # the first compiles
                times[name].append(time.perf_counter() - began)
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as fast ours is: the median over the turns."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


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
