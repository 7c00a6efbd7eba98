"""Stage 3: find the debiased centroid of each class and mark biased pixels (Eq. 1-5).

    python make_debiased_labels.py --config configs/demo.yaml
    python make_debiased_labels.py --config configs/demo.yaml \
        --wsss.labels_dir THEIR_LABELS --uss.features_dir THEIR_FEATURES --debias.output_dir OURS

Reads the training images and tags, any folder of pseudo labels and any features. Writes below
<run_dir>/debias/ (or debias.output_dir):
    clusters/<id>.npz   per image: vectors (n, D), labels (n,), sizes (n,), cells (h, w)
    shards/             the same of many images in one file, and distances (core/centroids.py)
    centroids.npz       debiased centroids; up to 1 GiB: all centroids, distances, the selection
    labels/<id>.png     pseudo labels in which biased pixels are 254
"""

import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from core.centroids import (
    background_sum,
    kept_counts,
    mean_of_kept,
    thresholds,
    write_distances,
    write_selection,
    write_shard,
)
from core.config import Config, DebiasConfig, make_parser, parse
from core.crf import DenseCRF
from core.debias import debiased_score, image_centroids, mark_biased
from core.errors import UserError, run_script
from core.features import FeatureSource, feature_files, feature_source
from core.files import read_arrays, written_whole
from core.labels import BIASED_ON_DISK, read_label, to_disk, write_label
from core.runs import Run, Stage
from core.splits import Split, label_files, read_split
from core.training import autocast, pick_device

IMAGES_PER_SHARD = 4096


def main() -> None:
    config, _ = parse(make_parser("make_debiased_labels.py", __doc__))
    run, split = Run(config), read_split(config.data, "train")
    labels = label_files(
        run.wsss_labels, split, "run train_wsss.py, or set wsss.labels_dir to your labels"
    )
    device = pick_device(config)
    identity, inputs = ("seed", "data", "uss", "wsss", "debias"), {"labels": labels}
    if config.uss.features_dir:
        inputs["features"] = feature_files(Path(config.uss.features_dir), split)
    stage = Stage(run.debias, "stage 3, debiasing", config, identity, inputs, split.skipped)
    if stage.already_done():
        return
    features = feature_source(config, split, device, autocast(config, device))
    cluster_images(config, run, split, labels, features)
    stage.save()
    centroids = debias_centroids(config, run, split)
    removed = write_debiased_labels(config, run, split, labels, features, centroids)
    stage.finish({"removed": removed})
    shares = ", ".join(f"{c} {v:.0%}" for c, v in zip(config.data.classes, removed, strict=True))
    print(
        f"{len(split)} debiased labels in {run.debias / 'labels'}\nremoved as biased: {shares}\n"
        "next: python train_segmentation.py, with the same --config"
    )


def cluster_images(
    config: Config, run: Run, split: Split, labels: tuple[Path, ...], features: FeatureSource
) -> None:
    """Pass 1: K-means inside each labelled region of every image not done yet."""
    folder, settings = run.debias / "clusters", config.debias
    todo = [k for k, i in enumerate(split.ids) if not (folder / f"{i}.npz").exists()]
    bar = tqdm(
        features(todo), "centroids", len(split), initial=len(split) - len(todo), unit="image"
    )
    for index, feat in bar:
        image_id = split.ids[index]
        label = torch.from_numpy(read_label(labels[index], len(config.data.classes)))
        if (label == BIASED_ON_DISK).any():
            raise UserError(f"{labels[index]} is debiased already; give the labels before that")
        seed = config.seed ^ zlib.crc32(
            image_id.encode()
        )  # of the image, not of its place in the list
        generator = torch.Generator().manual_seed(seed)
        centroids, cells = image_centroids(feat, label, settings.k_fg, settings.k_bg, generator)
        vectors = torch.cat([*centroids.values()]) if centroids else feat.new_zeros(0, len(feat))
        with written_whole(folder / f"{image_id}.npz") as aside, aside.open("wb") as file:
            np.savez(
                file,
                vectors=vectors.numpy(),
                labels=np.array([c for c, v in centroids.items() for _ in v], np.int16),
                sizes=np.bincount(cells[cells >= 0].flatten(), minlength=len(vectors)),
                cells=cells.numpy().astype(np.int16),
            )


def debias_centroids(config: Config, run: Run, split: Split) -> torch.Tensor:
    """Eq. 1-3 for every class: (C, D), a zero row for a class without centroids."""
    shards, settings = pack_clusters(run, split), config.debias
    background, found = background_sum(shards, len(config.data.classes))
    if not found[0]:
        raise UserError(
            f"no label map in {run.wsss_labels} has background; Eq. 1 compares with backgrounds"
        )
    nearest = settings.nearest if settings.distance == "nearest" else None
    distances = write_distances(shards, background, found[0], nearest)
    kept = kept_counts(found, settings.alpha)
    floor = thresholds(shards, distances, kept)
    centroids = mean_of_kept(shards, distances, floor, kept)
    write_selection(run.debias / "centroids.npz", shards, distances, floor, centroids, found)
    return torch.from_numpy(centroids)


def pack_clusters(run: Run, split: Split) -> list[Path]:
    """Joins the clusters of every few thousand images in one file, where that is not done yet."""
    shards = []
    for first in range(0, len(split), IMAGES_PER_SHARD):
        shards.append(run.debias / "shards" / f"{first // IMAGES_PER_SHARD:05d}.npz")
        if shards[-1].exists():
            continue
        ids = split.ids[first : first + IMAGES_PER_SHARD]
        parts = [read_clusters(run.debias / "clusters" / f"{i}.npz") for i in ids]
        counts = [len(part["labels"]) for part in parts]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        write_shard(shards[-1], images=np.repeat(np.arange(len(ids)) + first, counts), **joined)
    return shards


def read_clusters(path: Path) -> dict[str, np.ndarray]:
    """Vectors, labels and sizes of one image's clusters."""
    return read_arrays(path, ("vectors", "labels", "sizes"), "remove it to have it made again")


def write_debiased_labels(
    config: Config,
    run: Run,
    split: Split,
    labels: tuple[Path, ...],
    features: FeatureSource,
    centroids: torch.Tensor,
) -> list[float]:
    """Pass 2: similarity, refinement and Eq. 5. Returns the share of each class that was marked."""
    folder, size = run.debias / "labels", len(config.data.classes) + 1
    todo = [k for k, i in enumerate(split.ids) if not (folder / f"{i}.png").exists()]
    crf = DenseCRF(**config.debias.crf.settings()) if config.debias.refine == "crf" else None

    def work(item: tuple[int, torch.Tensor]) -> None:
        index, feat = item
        image = split.read_image(index)
        label = torch.from_numpy(read_label(labels[index], size - 1, image.shape[:2]))
        score = debiased_score(feat, centroids, torch.from_numpy(split.tags[index]))
        mask = refine(score, image, label, config.debias, crf)
        write_label(folder / f"{split.ids[index]}.png", to_disk(mark_biased(label, mask).numpy()))

    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        bar = tqdm(total=len(split), initial=len(split) - len(todo), desc="debiasing", unit="image")
        for chunk in _chunks(features(todo), 64):
            for _ in pool.map(work, chunk):
                bar.update()
        bar.close()
    before, marked = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for index, image_id in enumerate(split.ids):
        wsss = read_label(labels[index])
        biased = read_label(folder / f"{image_id}.png") == BIASED_ON_DISK
        before += np.bincount(wsss[wsss < size], minlength=size)
        marked += np.bincount(wsss[biased], minlength=size)
    return (marked[1:] / np.maximum(before[1:], 1)).tolist()


def refine(
    score: torch.Tensor,
    image: np.ndarray,
    label: torch.Tensor,
    settings: DebiasConfig,
    crf: DenseCRF | None,
) -> torch.Tensor:
    """Turns the similarity map of Eq. 4 into the binary mask M.

    Args:
        score: (h, w) in [0, 1], at the features' size.
        image: (H, W, 3) uint8 RGB.
        label: (H, W) pseudo label.
        settings: unary and scale.
        crf: two-label refinement; None leaves the unary's own decision.

    Returns:
        (H, W) bool, True where the pixel resembles a debiased centroid.
    """
    score = F.interpolate(score[None, None], image.shape[:2], mode="bilinear")[0, 0].clamp(0, 1)
    region = (label > 0) & (label < 254)
    if settings.scale != "raw" and region.any():
        low = score[region].min() if settings.scale == "minmax" else 0
        high = score[region].max()
        score = ((score - low) / (high - low + 1e-6)).clamp(0, 1)
    if settings.unary == "gamma":
        probs = torch.stack([(1 - score) ** settings.gamma, score])
    else:
        debiased = torch.sigmoid(settings.slope * (score - settings.threshold))
        probs = torch.stack([1 - debiased, debiased])
    if crf is not None and region.any():
        probs = torch.from_numpy(crf(image, probs.float().numpy()))
    return probs[1] > probs[0]


def _chunks(items: Iterator, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


if __name__ == "__main__":
    run_script(main)
