"""Time, memory and disk of selecting debiased centroids at the scale of Open Images.

    python tools/bench/simulate_scale.py --factor 1/300 --sizes 1 3 10 30

For each size, writes synthetic clusters of `images * factor * size` images as shards, selects from
them in a separate process, prints a line, and removes them. Then divides the images of the
smallest size into 1, 3 and 8 shards and compares the results bit for bit. The last line of the
table is the full size, extrapolated from the largest measured one.

Assumed, not measured on Open Images: each image has 1 + Poisson(7) classes, the k-th in proportion
to 1/k, without duplicates; two centroids per class and two of background. A vector is the sum of a
direction of its class, a direction of context, shared by all, and noise.
"""

import hashlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.debias_shards import (
    background_sum,
    kept_counts,
    mean_of_kept,
    thresholds,
    write_distances,
    write_shard,
)
from core.run.errors import UserError, run_script
from tools.common import tool_parser

CHUNK = 500  # images per seed, so that shards of any size draw the same ones
ALPHA = 0.4
PASSES = ("sum", "distances", "thresholds", "means")


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--images", type=int, default=9_000_000, help="number of images at full size"
    )
    parser.add_argument("--classes", type=int, default=19_794)
    parser.add_argument("--factor", type=Fraction, default=Fraction(1, 300), help="share drawn")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 10], help="times the factor")
    parser.add_argument("--width", type=int, default=90, help="width D of the features")
    parser.add_argument("--shard", type=int, default=4000, help=f"images; a multiple of {CHUNK}")
    parser.add_argument("--nearest", type=int, help="rank by this number of nearest backgrounds")
    parser.add_argument("--folder", help="for the shards; default: temporary")
    options = parser.parse_args()
    sizes = sorted(options.sizes)
    counts = [round(options.images * options.factor * s / CHUNK) * CHUNK for s in sizes]
    if counts[0] < CHUNK or options.shard % CHUNK or options.shard < CHUNK:
        raise UserError(
            f"--factor must leave {CHUNK} images or more, and --shard be a multiple of {CHUNK}"
        )
    print("| images | shards | centroids | on disk, GB | " + ", s | ".join(PASSES), end=", s | ")
    print("all, s | peak memory, MB |\n" + "|---" * (6 + len(PASSES)) + "|", flush=True)
    draw = (options.classes, options.width)
    for count in counts:
        measured = simulate(count, options.shard, draw, options.nearest, options.folder)
        print(line(count, measured), flush=True)
    times = options.images / counts[-1]
    full = {k: v if k == "peak" else v * times for k, v in measured.items() if k != "hash"}
    if options.nearest:  # each pair of a foreground and a background centroid
        full["distances"] *= times
    print(line(options.images, full).replace("| ", "| ~", 1) + " extrapolated\n")
    hashes = {}
    for parts in (1, 3, 8):
        size = -(-counts[0] // parts // CHUNK) * CHUNK
        result = simulate(counts[0], size, draw, options.nearest, options.folder, parts > 1)
        hashes[result["shards"]] = result["hash"]
        print(f"{counts[0]:,} images in {result['shards']} shards: sha256 {result['hash']}")
    same = len({*hashes.values()}) == 1
    print("the same bytes" if same else "NOT the same bytes")
    sys.exit(not same)


def simulate(
    count: int,
    shard: int,
    draw: tuple[int, int],
    nearest: int | None,
    folder: str | None,
    backwards: bool = False,
) -> dict:
    """Writes shards, selects from them and removes them, in two processes to separate their memory.

    Returns:
        Seconds of each pass, `peak` memory and `disk` in bytes, `shards`, `centroids`, `hash`.
    """
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        free, needed = shutil.disk_usage(place).free, count * 18 * (draw[1] * 4 + 20)
        if free < 1.2 * needed:
            raise UserError(f"{place} has {free / 1e9:.1f} GB, needed {needed / 1e9:.1f}")
        shards = [Path(place) / f"{k:05d}.npz" for k in range(-(-count // shard))]
        _alone(write_shards, shards, count, shard, *draw)
        measured = _alone(select, shards[::-1] if backwards else shards, draw[0], nearest)
        measured["disk"] = sum(path.stat().st_size for path in Path(place).iterdir())
    return measured | {"shards": len(shards)}


def _alone(function: Callable, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_shards(shards: list[Path], count: int, size: int, classes: int, width: int) -> None:
    """Writes `count` images, `size` per shard."""
    for k, path in enumerate(shards):
        first = range(k * size, min(count, (k + 1) * size), CHUNK)
        parts = [draw_clusters(f, classes, width) for f in first]
        write_shard(path, **{n: np.concatenate([p[n] for p in parts]) for n in parts[0]})


def draw_clusters(first: int, classes: int, width: int) -> dict[str, np.ndarray]:
    """Clusters of the images `first` to `first + CHUNK`, which depend on nothing else."""
    rng = np.random.default_rng(first)
    share = (1 / np.arange(1, classes + 1)).cumsum()
    images = np.arange(CHUNK).repeat(1 + rng.poisson(7, CHUNK))
    tags = 1 + np.searchsorted(share, rng.uniform(0, share[-1], len(images)))
    pairs = np.stack([images, tags.clip(1, classes)], 1)
    pairs = np.unique(np.concatenate([[[i, 0] for i in range(CHUNK)], pairs]), axis=0)
    images, labels = pairs.repeat(2, 0).T
    directions = np.random.default_rng(classes).standard_normal((1 + classes, width), np.float32)
    vectors = directions[labels] + rng.standard_normal((len(labels), width), np.float32)
    vectors += directions[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sizes = rng.integers(1, 500, len(labels))
    return {"vectors": vectors, "labels": labels, "images": images + first, "sizes": sizes}


def select(shards: list[Path], classes: int, nearest: int | None) -> dict:
    """The passes of core/debias_shards.py, timed."""
    stamps = [time.perf_counter()]
    background, found = background_sum(shards, classes)
    stamps.append(time.perf_counter())
    distances = write_distances(shards, background, found[0], nearest)
    stamps.append(time.perf_counter())
    kept = kept_counts(found, ALPHA)
    floor = thresholds(shards, distances, kept)
    stamps.append(time.perf_counter())
    centroids = mean_of_kept(shards, distances, floor, kept)
    stamps.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        **dict(zip(PASSES, np.diff(stamps).tolist(), strict=True)),
        "peak": peak * (1 if sys.platform == "darwin" else 1024),  # kilobytes elsewhere
        "centroids": int(found.sum()),
        "hash": hashlib.sha256(centroids.tobytes() + kept.tobytes()).hexdigest()[:16],
    }


def line(images: int, measured: dict) -> str:
    """One row of the table."""
    seconds = [measured[name] for name in PASSES]
    cells = [
        *(f"{n:,.0f}" for n in (images, measured["shards"], measured["centroids"])),
        f"{measured['disk'] / 1e9:.2f}",
        *(f"{s:,.1f}" for s in (*seconds, sum(seconds))),
        f"{measured['peak'] / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run_script(main)
