r"""Stage 3: find the debiased centroid of each class and mark biased pixels (Eq. 1-5).

    python make_debiased_labels.py --config configs/demo.yaml
    python make_debiased_labels.py --config configs/folder.yaml --data.root PHOTOGRAPHS \
        --data.tags tags.csv --run_dir runs/mine \
        --wsss.labels_dir LABELS --uss.features_dir FEATURES --debias.output_dir DEBIASED

Reads the training images and tags, any folder of pseudo labels and any features. Writes below
<run_dir>/debias/ (or debias.output_dir):
    clusters/<id>.npz       per image: vectors (n, D), labels (n,), sizes (n,), cells (h, w)
    vectors.npy             the centroids of all images, (N, D)
    centroids.npz           their labels, images, distances and selection; debiased centroids (C, D)
    similarities/<id>.npy   (T, h, w) similarity to the debiased centroid of each tagged class
    cuts.npz                for each class, the similarity above which it is kept, and why
    labels/<id>.png         pseudo labels in which biased pixels are 254
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core import debias
from core.config import Config, make_parser, parse
from core.crf.dense import make_crf
from core.cut import BINS, COLUMNS, MIN_GAIN, count_similarities, find_cuts, logit_map
from core.data.checks import check_inputs
from core.data.features import FeatureSource, feature_files
from core.data.labels import BIASED_ON_DISK, read_label, to_disk, write_label
from core.data.lists import Split, label_files, read_split
from core.pipeline import Run, check_upstream, debias_identity, feature_source
from core.run import distributed
from core.run.device import autocast, pick_device
from core.run.errors import UserError, run_script
from core.run.files import atomic_write, read_array, read_arrays
from core.run.log import warn
from core.run.stage import Stage, check_classes
from core.run.threads import in_threads, make_missing

# Stage 3 warns if it removes more than the first, or less than the second, of a class's labels.
NEARLY_ALL, NEARLY_NOTHING = 0.9, 0.01
UNSUITED = 0.7  # and if the median class's `tag_auc` is below this
REMEDY = "remove it to have it made again"


def main() -> None:
    config, _ = parse(make_parser("make_debiased_labels.py", __doc__, "uss", "wsss", "debias"))
    run, split = Run(config), read_split(config.data, "train")
    remedy = "run train_wsss.py, or set wsss.labels_dir to your labels"
    labels = label_files(run.wsss_labels, split, remedy)
    check_upstream(config, split, "wsss", "uss")
    check_classes(run.wsss_labels, config.data.classes)
    folder = config.uss.features_dir
    files = feature_files(Path(folder), split) if folder else ()
    if not folder and not (run.uss / "checkpoint.pth").is_file():
        raise UserError(f"{run.uss} holds no features; run train_uss.py, or set uss.features_dir")
    identity = debias_identity(config, split)
    title = "stage 3, debiasing"
    stage = Stage(run.debias, title, config, identity, config.data.root, split.skipped)
    if stage.already_done():
        return
    check_inputs(split, labels, config.data.classes, config.workers, "pseudo", files)
    stage.sign(run.debias / "labels")
    device = pick_device(config)
    features = feature_source(config, split, device, autocast(config, device))
    cluster_images(config, run, split, labels, features)
    stage.save()
    centroids, auc = select_centroids(config, run, split, json.dumps(stage.made_from))
    stage.save()
    write_similarities(config, run, split, features, centroids)
    cuts = select_cuts(config, run, split)
    removed = write_debiased_labels(config, run, split, labels, cuts)
    warnings = warn_of(config, removed, cuts, auc)
    columns = {name: without_nan(values) for name, values in cuts.items()}
    found = {"removed": removed, "tag_auc": without_nan(auc), "cuts": columns}
    stage.finish({**found, "warnings": warnings})
    shares = ", ".join(f"{c} {v:.0%}" for c, v in zip(config.data.classes, removed, strict=True))
    print(
        f"{len(split)} debiased labels in {run.debias / 'labels'}\nremoved as biased: {shares}\n"
        "next: python train_segmentation.py, with the same --config"
    )


def cluster_images(
    config: Config, run: Run, split: Split, labels: tuple[Path, ...], features: FeatureSource
) -> None:
    """First pass: K-means inside each labelled region of every image not done yet."""
    paths = [run.debias / "clusters" / f"{i}.npz" for i in split.ids]

    def work(item: tuple[int, Tensor]) -> None:
        index, feat = item
        label = torch.from_numpy(read_label(labels[index], len(config.data.classes)))
        seed = config.seed ^ zlib.crc32(split.ids[index].encode())  # by id, not by place
        generator = torch.Generator().manual_seed(seed)
        k_fg, k_bg = config.debias.k_fg, config.debias.k_bg
        centroids, cells = debias.image_centroids(feat, label, k_fg, k_bg, generator)
        vectors = torch.cat([feat.new_zeros(0, len(feat)), *centroids.values()])
        with atomic_write(paths[index]) as tmp, tmp.open("wb") as file:
            np.savez(
                file,
                vectors=vectors.cpu().numpy(),
                labels=np.array([c for c, v in centroids.items() for _ in v], np.int16),
                sizes=np.bincount(cells[cells >= 0].flatten(), minlength=len(vectors)),
                cells=cells.numpy().astype(np.int16),
            )

    make_missing(paths, work, config.workers, "centroids", features)


def select_centroids(
    config: Config, run: Run, split: Split, made_from: str
) -> tuple[Tensor, np.ndarray]:
    """Eq. 1-3 for every class: (C, D), a zero row for a class without centroids; and their (C,)
    `tag_auc`."""
    path, settings = run.debias / "centroids.npz", config.debias
    if distributed.rank() == 0:
        rows = join_clusters(run, split)
        labels = torch.from_numpy(rows["labels"])
        if not (labels == 0).any():
            raise UserError(
                "no label map of the training list has background, which Eq. 1 compares with; "
                "check the labels (wsss.labels_dir, or wsss/labels below run_dir)"
            )
        vectors = torch.from_numpy(read_array(run.debias / "vectors.npy", REMEDY, "c"))
        nearest = settings.nearest if settings.distance == "nearest" else None
        classes = len(config.data.classes)
        result = debias.debiased_centroids(vectors, labels, classes, settings.alpha, nearest)
        names = ("centroids", "distance", "selected")
        rows |= {key: value.numpy() for key, value in zip(names, result, strict=True)}
        images, tags = torch.from_numpy(rows["images"]).long(), torch.from_numpy(split.tags).bool()
        rows["tag_auc"] = debias.tag_auc(vectors, images, result[0], tags).numpy()
        with atomic_write(path) as tmp, tmp.open("wb") as file:
            np.savez(file, **rows, made_from=np.array(made_from))
    distributed.barrier()
    centroids, auc = read_arrays(path, ("centroids", "tag_auc"), REMEDY).values()
    return torch.from_numpy(centroids), auc


def join_clusters(run: Run, split: Split) -> dict[str, np.ndarray]:
    """Joins the centroids of all images in one file, which may be larger than the memory.

    Returns (N,) arrays: `labels`, `sizes` and `images`, the place of each centroid's image in the
    list.
    """
    files = [run.debias / "clusters" / f"{i}.npz" for i in split.ids]
    parts = [read_arrays(path, ("labels", "sizes"), REMEDY) for path in files]
    counts = [len(part["labels"]) for part in parts]
    rows = {key: np.concatenate([part[key] for part in parts]) for key in ("labels", "sizes")}
    rows["images"] = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    width = read_arrays(files[0], ("vectors",), REMEDY)["vectors"].shape[1]
    with atomic_write(run.debias / "vectors.npy") as tmp:
        shape = (len(rows["labels"]), width)
        vectors = np.lib.format.open_memmap(tmp, "w+", np.float32, shape)
        for file, end, count in zip(files, np.cumsum(counts), counts, strict=True):
            vectors[end - count : end] = read_arrays(file, ("vectors",), REMEDY)["vectors"]
        vectors.flush()
    return rows


def write_similarities(
    config: Config, run: Run, split: Split, features: FeatureSource, centroids: Tensor
) -> None:
    """Second pass over the features: Eq. 4 for each class of each image not done yet."""
    paths = [run.debias / "similarities" / f"{i}.npy" for i in split.ids]

    def work(item: tuple[int, Tensor]) -> None:
        index, feat = item
        maps = debias.similarities(feat, centroids, torch.from_numpy(split.tags[index]))
        with atomic_write(paths[index]) as tmp, tmp.open("wb") as file:
            np.save(file, maps.cpu().numpy().astype(np.float16))

    make_missing(paths, work, config.workers, "similarities", features)


def select_cuts(config: Config, run: Run, split: Split) -> dict[str, np.ndarray]:
    """The cut of each class, see `find_cuts`; none with `debias.cut: fixed`."""
    if config.debias.cut == "fixed":
        return {}
    path = run.debias / "cuts.npz"
    if distributed.rank() == 0:
        names = ("images", "selected")
        images, selected = read_arrays(run.debias / "centroids.npz", names, REMEDY).values()
        starts = np.searchsorted(images, np.arange(len(split)))

        def count(index: int) -> tuple[np.ndarray, np.ndarray]:
            name, classes = split.ids[index], split.tags[index].nonzero()[0]
            clusters = run.debias / "clusters" / f"{name}.npz"
            labels, cells = read_arrays(clusters, ("labels", "cells"), REMEDY).values()
            kept = np.append(selected[starts[index] :][: len(labels)], False)[cells]
            regions = np.append(labels, -1)[cells]  # an ignored cell, -1, selects the last
            maps = read_array(run.debias / "similarities" / f"{name}.npy", REMEDY)
            return classes, count_similarities(maps, regions, kept, (classes + 1).tolist())

        total = np.zeros((len(config.data.classes), 3, BINS), np.int64)
        counted = in_threads(count, range(len(split)), config.workers, "cuts", len(split))
        for classes, counts in counted:
            total[classes] += counts
        with atomic_write(path) as tmp, tmp.open("wb") as file:
            np.savez(file, counts=total, **find_cuts(total))
    distributed.barrier()
    return read_arrays(path, COLUMNS, REMEDY)


def write_debiased_labels(
    config: Config, run: Run, split: Split, labels: tuple[Path, ...], cuts: dict[str, np.ndarray]
) -> list[float]:
    """Cut, refinement and Eq. 5. Returns the share of each class's label area that is marked."""
    paths = [run.debias / "labels" / f"{i}.png" for i in split.ids]
    size, settings = len(config.data.classes) + 1, config.debias
    crf = make_crf(settings.crf, pick_device(config)) if settings.refine == "crf" else None
    uncut = np.flatnonzero(np.isnan(cuts["cut"])) + 1 if cuts else np.array([], int)

    def work(index: int) -> None:
        image = split.read_image(index)
        label = torch.from_numpy(read_label(labels[index], size - 1, image.shape[:2]))
        classes = split.tags[index].nonzero()[0] + 1
        if len(np.setdiff1d(classes, uncut)):  # else nothing can be marked
            path = run.debias / "similarities" / f"{split.ids[index]}.npy"
            maps = read_array(path, REMEDY).astype(np.float32)
            if cuts:
                logit = torch.from_numpy(logit_map(maps, cuts, classes))
            else:
                score = torch.from_numpy(maps.max(0)).clamp(0, 1)  # Eq. 4
                logit = debias.fixed_logit(score, label, settings)
            mask = debias.debiased_mask(logit, image, label, crf)
            label = debias.mark_biased(label, mask | torch.from_numpy(np.isin(label, uncut)))
        write_label(paths[index], to_disk(label.numpy()))

    make_missing(paths, work, config.workers, "debiasing")

    def count(index: int) -> np.ndarray:
        wsss, marked = read_label(labels[index], size - 1), read_label(paths[index])
        counted = wsss[wsss < size], wsss[marked == BIASED_ON_DISK]
        return np.stack([np.bincount(values, minlength=size) for values in counted])

    counts = in_threads(count, range(len(split)), config.workers, "counting", len(split))
    before, marked = sum(counts)
    return (marked[1:] / np.maximum(before[1:], 1)).tolist()


def without_nan(values: np.ndarray) -> list[float | None]:
    """(C,) numbers as JSON has them."""
    return [None if np.isnan(x) else x for x in values.tolist()]


def warn_of(
    config: Config, removed: list[float], cuts: dict[str, np.ndarray], auc: np.ndarray
) -> list[dict]:
    """Warns of features that do not suit the images, and of classes that lost nearly all, or nearly
    nothing, of their labels.

    Returns each warning as the manifest keeps it: `problem`, `classes`, each with the figure that
    shows it, and `remedy`.
    """
    names, left, absent = config.data.classes, {}, set()
    if cuts:
        columns = ("cut", "object_share", "expected_iou", "contrast")
        for c, cut, now, best, contrast in zip(names, *(cuts[k] for k in columns), strict=True):
            if np.isnan(contrast):  # no cells to compare
                absent.add(c)
            elif np.isnan(cut):
                left[c] = "no gain" if np.isnan(best) else f"{now:.2f} to {best:.2f}"
    shares = [*zip(names, removed, strict=True)]
    lost = {c: f"{share:.0%}" for c, share in shares if share > NEARLY_ALL}
    treated = [(c, share) for c, share in shares if c not in {*left, *absent}]
    intact = {c: f"{share:.1%}" for c, share in treated if share < NEARLY_NOTHING}
    advice = "python tools/audit/inspect_features.py shows the features"
    unsuited = np.isfinite(auc).any() and np.nanmedian(auc) < UNSUITED
    vague = {c: f"{v:.2f}" for c, v in zip(names, auc, strict=True) if v < UNSUITED}
    found = [
        (
            "the debiased centroids barely separate the images that show a class from the others "
            f"(area under the ROC curve, 0.5 by chance, below {UNSUITED})",
            vague if unsuited else {},
            "These features do not suit these images, and what stage 3 removes may be the objects. "
            f"Use other features (uss.backbone), or look at what was removed; {advice}",
        ),
        (
            "stage 3 removed nearly all labels",
            lost,
            "Training on what is left would lose the class. Use other features (uss.backbone)"
            f"{'' if cuts else ', debias.cut auto'} or another debias.alpha; {advice}",
        ),
        (
            "stage 3 left labels as they are, since a cut would raise their expected IoU by less "
            f"than {MIN_GAIN}",
            left,
            "Either they contain little context, or the features do not tell it from the class; "
            f"in that case, use other features (uss.backbone). {advice}",
        ),
        (
            f"stage 3 removed less than {NEARLY_NOTHING:.0%} of the labels",
            intact,
            "That is right if they contain no context; if they do, add photographs of the context "
            "without the class",
        ),
    ]
    warnings = []
    for problem, classes, remedy in found:
        if classes:
            listed = ", ".join(f"{name} {figure}" for name, figure in classes.items())
            warn(f"{problem}: {listed}. {remedy}")
            warnings.append({"problem": problem, "classes": classes, "remedy": remedy})
    return warnings


if __name__ == "__main__":
    run_script(main)
