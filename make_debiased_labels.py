"""Stage 3: find the debiased centroid of each class and mark biased pixels (Eq. 1-5).

    python make_debiased_labels.py --config configs/demo.yaml
    python make_debiased_labels.py --config configs/folder.yaml --data.root PHOTOGRAPHS \
        --data.tags tags.csv --run_dir runs/mine \
        --wsss.labels_dir LABELS --uss.features_dir FEATURES --debias.output_dir DEBIASED

Reads the training images and tags, any folder of pseudo labels and any features. Writes below
<run_dir>/debias/ (or debias.output_dir):
    clusters/<id>.npz   per image: vectors (n, D), labels (n,), sizes (n,), cells (h, w)
    shards/             the same of many images in one file, and distances (core/debias_shards.py)
    centroids.npz       debiased centroids; up to 1 GiB: all centroids, distances, the selection
    labels/<id>.png     pseudo labels in which biased pixels are 254
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from core.config import Config, make_parser, parse
from core.crf.dense import make_crf
from core.data.checks import check_inputs
from core.data.labels import BIASED_ON_DISK, read_label, to_disk, write_label
from core.data.splits import Split, label_files, read_split
from core.debias import mark_biased
from core.debias_image import crf_settings, find_clusters, refine, similarity
from core.debias_shards import select, write_shard
from core.run import distributed
from core.run.errors import UserError, run_script
from core.run.files import atomic_write, read_arrays
from core.run.loop import autocast, pick_device
from core.run.stage import Run, Stage, check_classes, check_upstream_of
from core.run.threads import in_threads
from core.uss.features import FeatureSource, feature_files, feature_source

IMAGES_PER_SHARD = 4096


def main() -> None:
    config, _ = parse(make_parser("make_debiased_labels.py", __doc__))
    run, split = Run(config), read_split(config.data, "train")
    labels = label_files(
        run.wsss_labels, split, "run train_wsss.py, or set wsss.labels_dir to your labels"
    )
    check_upstream_of(config, split, "wsss", "uss")
    check_classes(run.wsss_labels, config.data.classes)
    files: tuple[Path, ...] = ()
    if config.uss.features_dir:
        files = feature_files(Path(config.uss.features_dir), split)
    elif not (run.uss / "checkpoint.pth").is_file():
        raise UserError(f"{run.uss} holds no features; run train_uss.py, or set uss.features_dir")
    stage = Stage(
        run.debias, "stage 3, debiasing", config, run.debias_identity(split), split.skipped
    )
    if stage.already_done():
        return
    check_inputs(split, labels, config.data.classes, config.workers, features=files)
    stage.sign(run.debias / "labels")
    device = pick_device(config)
    features = feature_source(config, split, device, autocast(config, device))
    cluster_images(config, run, split, labels, features)
    stage.save()
    centroids = debias_centroids(config, run, split, json.dumps(stage.made_from))
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
    todo = distributed.my_share([folder / f"{i}.npz" for i in split.ids])

    def work(item: tuple[int, torch.Tensor]) -> None:
        index, feat = item
        image_id = split.ids[index]
        label = read_label(labels[index], len(config.data.classes))
        seed = config.seed ^ zlib.crc32(image_id.encode())  # of the image, not of its place
        centroids, cells = find_clusters(feat, label, settings, seed)
        vectors = np.concatenate([np.zeros((0, len(feat)), np.float32), *centroids.values()])
        with atomic_write(folder / f"{image_id}.npz") as tmp, tmp.open("wb") as file:
            np.savez(
                file,
                vectors=vectors,
                labels=np.array([c for c, v in centroids.items() for _ in v], np.int16),
                sizes=np.bincount(cells[cells >= 0].flatten(), minlength=len(vectors)),
                cells=cells.astype(np.int16),
            )

    run_over(split, work, features, todo, config.workers, "centroids")


def run_over(
    split: Split,
    work: Callable[[tuple[int, torch.Tensor]], None],
    features: FeatureSource,
    todo: list[int],
    workers: int,
    title: str,
) -> None:
    """`work` on the features of every image to do, in threads; returns when all processes have."""
    done = len(split) - len(todo)
    for _ in in_threads(work, features(todo), workers, title, len(split), done):
        pass
    distributed.barrier()


def debias_centroids(config: Config, run: Run, split: Split, made_from: str) -> torch.Tensor:
    """Eq. 1-3 for every class: (C, D), a zero row for a class without centroids."""
    path, settings = run.debias / "centroids.npz", config.debias
    if distributed.rank() == 0:
        nearest = settings.nearest if settings.distance == "nearest" else None
        shards = pack_clusters(run, split)
        select(shards, path, len(config.data.classes), settings.alpha, nearest, made_from)
    distributed.barrier()
    return torch.from_numpy(read_arrays(path, ("centroids",), "remove it")["centroids"])


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
    todo = distributed.my_share([folder / f"{i}.png" for i in split.ids])
    crf = make_crf(crf_settings(config.debias)) if config.debias.refine == "crf" else None

    def work(item: tuple[int, torch.Tensor]) -> None:
        index, feat = item
        image = split.read_image(index)
        label = torch.from_numpy(read_label(labels[index], size - 1, image.shape[:2]))
        tags = split.tags[index]
        if tags.any():  # else there is no centroid that it could resemble
            score = similarity(feat, centroids, tags, image.shape[:2], config.debias)
            label = mark_biased(label, refine(score, image, label, config.debias, crf))
        write_label(folder / f"{split.ids[index]}.png", to_disk(label.numpy()))

    run_over(split, work, features, todo, config.workers, "debiasing")

    def count(index: int) -> np.ndarray:
        wsss = read_label(labels[index], size - 1)
        biased = read_label(folder / f"{split.ids[index]}.png") == BIASED_ON_DISK
        counted = (wsss[wsss < size], wsss[biased])
        return np.stack([np.bincount(values, minlength=size) for values in counted])

    images = range(len(split))
    before, marked = sum(in_threads(count, images, config.workers, "counting", len(split)))
    return (marked[1:] / np.maximum(before[1:], 1)).tolist()


if __name__ == "__main__":
    run_script(main)
