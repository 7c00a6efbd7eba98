r"""Stage 3: find the debiased centroid of each class and mark biased pixels (Eq. 1-5).

    python make_debiased_labels.py --config configs/demo.yaml
    python make_debiased_labels.py --config configs/folder.yaml --data.root PHOTOGRAPHS \
        --data.tags tags.csv --run_dir runs/mine \
        --wsss.labels_dir LABELS --uss.features_dir FEATURES --debias.output_dir DEBIASED

Reads the training images and tags, any folder of pseudo labels and any features. Writes below
<run_dir>/debias/ (or debias.output_dir):
    clusters/<id>.npz   per image: vectors (n, D), labels (n,), sizes (n,), cells (h, w)
    centroids.npz       debiased centroids; up to 1 GiB: all centroids, distances, the selection
    labels/<id>.png     pseudo labels in which biased pixels are 254
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.config import Config, make_parser, parse
from core.crf.dense import make_crf
from core.data.checks import check_inputs
from core.data.features import FeatureSource, feature_files
from core.data.labels import BIASED_ON_DISK, read_label, to_disk, write_label
from core.data.lists import Split, label_files, read_split
from core.debias import (
    debiased_centroids,
    debiased_mask,
    debiased_score,
    image_centroids,
    mark_biased,
)
from core.debias_shards import NO_BACKGROUND, select, write_shard
from core.pipeline import Run, check_upstream, debias_identity, feature_source
from core.run import distributed
from core.run.device import autocast, pick_device
from core.run.errors import UserError, run_script
from core.run.files import atomic_write, read_arrays
from core.run.stage import Stage, check_classes
from core.run.threads import in_threads

IN_MEMORY = 2**30  # bytes of centroids up to which they are selected in memory, not from shards
IMAGES_PER_SHARD = 4096


def main() -> None:
    config, _ = parse(make_parser("make_debiased_labels.py", __doc__, "uss", "wsss", "debias"))
    run, split = Run(config), read_split(config.data, "train")
    remedy = "run train_wsss.py, or set wsss.labels_dir to your labels"
    labels = label_files(run.wsss_labels, split, remedy)
    check_upstream(config, split, "wsss", "uss")
    check_classes(run.wsss_labels, config.data.classes)
    files: tuple[Path, ...] = ()
    if config.uss.features_dir:
        files = feature_files(Path(config.uss.features_dir), split)
    elif not (run.uss / "checkpoint.pth").is_file():
        raise UserError(f"{run.uss} holds no features; run train_uss.py, or set uss.features_dir")
    identity = debias_identity(config, split)
    title = "stage 3, debiasing"
    stage = Stage(run.debias, title, config, identity, config.data.root, split.skipped)
    if stage.already_done():
        return
    check_inputs(split, labels, config.data.classes, config.workers, features=files)
    stage.sign(run.debias / "labels")
    device = pick_device(config)
    features = feature_source(config, split, device, autocast(config, device))
    cluster_images(config, run, split, labels, features)
    stage.save()
    centroids = select_centroids(config, run, split, json.dumps(stage.made_from))
    removed = write_debiased_labels(config, run, split, labels, features, centroids.to(device))
    stage.finish({"removed": removed})
    shares = ", ".join(f"{c} {v:.0%}" for c, v in zip(config.data.classes, removed, strict=True))
    print(
        f"{len(split)} debiased labels in {run.debias / 'labels'}\nremoved as biased: {shares}\n"
        "next: python train_segmentation.py, with the same --config"
    )


def cluster_images(
    config: Config, run: Run, split: Split, labels: tuple[Path, ...], features: FeatureSource
) -> None:
    """First pass: K-means inside each labelled region of every image not done yet."""
    folder, settings = run.debias / "clusters", config.debias
    todo = distributed.my_share([folder / f"{i}.npz" for i in split.ids])

    def work(item: tuple[int, Tensor]) -> None:
        index, feat = item
        image_id = split.ids[index]
        label = torch.from_numpy(read_label(labels[index], len(config.data.classes)))
        seed = config.seed ^ zlib.crc32(image_id.encode())  # of the image, not of its place
        generator = torch.Generator().manual_seed(seed)
        centroids, cells = image_centroids(feat, label, settings.k_fg, settings.k_bg, generator)
        vectors = torch.cat([feat.new_zeros(0, len(feat)), *centroids.values()])
        with atomic_write(folder / f"{image_id}.npz") as tmp, tmp.open("wb") as file:
            np.savez(
                file,
                vectors=vectors.cpu().numpy(),
                labels=np.array([c for c, v in centroids.items() for _ in v], np.int16),
                sizes=np.bincount(cells[cells >= 0].flatten(), minlength=len(vectors)),
                cells=cells.numpy().astype(np.int16),
            )

    done = len(split) - len(todo)
    for _ in in_threads(work, features(todo), config.workers, "centroids", len(split), done):
        pass
    distributed.barrier()


def select_centroids(config: Config, run: Run, split: Split, made_from: str) -> Tensor:
    """Eq. 1-3 for every class: (C, D), a zero row for a class without centroids."""
    path, settings = run.debias / "centroids.npz", config.debias
    nearest = settings.nearest if settings.distance == "nearest" else None
    classes = len(config.data.classes)
    files = [run.debias / "clusters" / f"{i}.npz" for i in split.ids]
    if distributed.rank() == 0 and sum(f.stat().st_size for f in files) > IN_MEMORY:
        shards = pack_clusters(run.debias / "shards", files)
        found = {"centroids": select(shards, classes, settings.alpha, nearest)}
    elif distributed.rank() == 0:
        found = joined(files, 0)
        if not (found["labels"] == 0).any():
            raise UserError(NO_BACKGROUND)
        vectors, regions = (torch.from_numpy(found[key]) for key in ("vectors", "labels"))
        result = debiased_centroids(vectors, regions, classes, settings.alpha, nearest)
        names = ("centroids", "distance", "selected")
        found |= {key: value.numpy() for key, value in zip(names, result, strict=True)}
    if distributed.rank() == 0:
        with atomic_write(path) as tmp, tmp.open("wb") as file:
            np.savez(file, **found, made_from=np.array(made_from))
    distributed.barrier()
    return torch.from_numpy(read_arrays(path, ("centroids",), "remove it")["centroids"])


def joined(files: list[Path], first: int) -> dict[str, np.ndarray]:
    """The clusters of many images, and which image each is of, counted from `first`."""
    names, remedy = ("vectors", "labels", "sizes"), "remove it to have it made again"
    parts = [read_arrays(path, names, remedy) for path in files]
    rows = {key: np.concatenate([part[key] for part in parts]) for key in names}
    counts = [len(part["labels"]) for part in parts]
    return {**rows, "images": np.repeat(np.arange(len(files)) + first, counts).astype(np.int32)}


def pack_clusters(folder: Path, files: list[Path]) -> list[Path]:
    """Joins the clusters of every few thousand images in one file, unless that is done."""
    shards = []
    for first in range(0, len(files), IMAGES_PER_SHARD):
        shards.append(folder / f"{first // IMAGES_PER_SHARD:05d}.npz")
        if not shards[-1].exists():
            write_shard(shards[-1], **joined(files[first : first + IMAGES_PER_SHARD], first))
    return shards


def write_debiased_labels(
    config: Config,
    run: Run,
    split: Split,
    labels: tuple[Path, ...],
    features: FeatureSource,
    centroids: Tensor,
) -> list[float]:
    """Second pass: Eq. 4, refinement and Eq. 5. Returns the share of each class that is marked."""
    folder, size = run.debias / "labels", len(config.data.classes) + 1
    todo = distributed.my_share([folder / f"{i}.png" for i in split.ids])
    crf = make_crf(config.debias.crf) if config.debias.refine == "crf" else None

    def work(item: tuple[int, Tensor]) -> None:
        index, feat = item
        image = split.read_image(index)
        label = torch.from_numpy(read_label(labels[index], size - 1, image.shape[:2]))
        tags = torch.from_numpy(split.tags[index])
        if tags.any():  # else there is no centroid that it could resemble
            score = debiased_score(feat, centroids, tags).cpu()
            label = mark_biased(label, debiased_mask(score, image, label, config.debias, crf))
        write_label(folder / f"{split.ids[index]}.png", to_disk(label.numpy()))

    done = len(split) - len(todo)
    for _ in in_threads(work, features(todo), config.workers, "debiasing", len(split), done):
        pass
    distributed.barrier()

    def count(index: int) -> np.ndarray:
        wsss = read_label(labels[index], size - 1)
        biased = read_label(folder / f"{split.ids[index]}.png") == BIASED_ON_DISK
        counted = (wsss[wsss < size], wsss[biased])
        return np.stack([np.bincount(values, minlength=size) for values in counted])

    before, marked = sum(
        in_threads(count, range(len(split)), config.workers, "counting", len(split))
    )
    return (marked[1:] / np.maximum(before[1:], 1)).tolist()


if __name__ == "__main__":
    run_script(main)
