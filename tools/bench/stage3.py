"""Stage 3: feature cells against a naive implementation, and the script on a list like VOC's."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from torch.nn import functional as F

from core.crf.dense import DenseCRF
from core.data.labels import write_label
from core.data.settings import VOC_CLASSES
from core.data.tags import read_table
from core.debias import (
    DebiasConfig,
    debiased_centroids,
    debiased_mask,
    debiased_score,
    fixed_logit,
    image_centroids,
)
from core.run.files import read_json
from tools.bench.common import drawing, patch_features, photographs, ratio, timed
from tools.common.tables import write_table


def benchmark_debias(samples: Path | None) -> None:
    """Stage 3 of each photograph on feature cells and naively, from features to label map.

    The naive implementation upsamples the features to the image's size, clusters all pixels and
    refines with pydensecrf.
    """
    pictures = photographs(samples) if samples else [drawing(k) for k in range(8)]
    items = [debias_item(image, label) for image, label in pictures]
    config, ways = DebiasConfig(cut="fixed", scale="max"), ("naive", "cells")
    crfs = {"naive": DenseCRF("pydensecrf"), "cells": DenseCRF()}
    steps = ("K-means", "similarity", "unary and CRF")
    times = {w: {step: [] for step in steps} for w in ways}
    clusters, masks = {w: [] for w in ways}, {w: [] for w in ways}

    def seen(way: str, feat: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(feat[None], size, mode="bilinear")[0] if way == "naive" else feat

    def cluster(way: str, feat: torch.Tensor, label: np.ndarray) -> dict[int, torch.Tensor]:
        generator, starts = torch.Generator().manual_seed(0), 10 if way == "naive" else 3
        feat, label = seen(way, feat, label.shape), torch.from_numpy(label)
        return image_centroids(feat, label, config.k_fg, config.k_bg, generator, starts)[0]

    def score(way: str, feat: torch.Tensor, label: np.ndarray) -> torch.Tensor:
        tags = torch.from_numpy(np.isin(np.arange(1, 256), label))
        return debiased_score(seen(way, feat, label.shape), centroids[way], tags)

    for _, label, feat in items:
        for w in ways:
            clusters[w].append(timed(times[w]["K-means"], cluster, w, feat, label))
    centroids = {w: selected_centroids(found) for w, found in clusters.items()}
    for image, label, feat in items:
        for w in ways:
            found = timed(times[w]["similarity"], score, w, feat, label)
            label_map = torch.from_numpy(label)
            logit = fixed_logit(found, label_map, config)
            mask = timed(times[w]["unary and CRF"], debiased_mask, logit, image, label_map, crfs[w])
            masks[w].append(mask.numpy()[label > 0])
    print("medians in ms; naive: features at full size, K-means over all pixels, pydensecrf")
    print(f"{'':8}" + "".join(f"{s:>15}" for s in (*steps, "image", "speed-up")))
    whole = {w: np.sum([times[w][s] for s in steps], 0) for w in ways}
    for w in ways:
        medians = [1000 * np.median(t) for t in (*times[w].values(), whole[w])]
        faster = ratio(list(whole[w]), list(whole["naive"]))
        print(f"{w:8}" + "".join(f"{m:15.1f}" for m in medians) + f"{faster:15.1f}")
    alike = [np.mean(a == b) for a, b in zip(masks["cells"], masks["naive"], strict=True)]
    print(
        f"labels of class regions equal to naive: mean {np.mean(alike):.2%}, "
        f"median {np.median(alike):.2%}, worst {min(alike):.2%}"
    )


def benchmark_voc(samples: Path, count: int) -> None:
    """make_debiased_labels.py on photographs with VOC's sizes and tags, by number of threads."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        settings = voc_like(root, samples, count)
        for workers in (1, 2, 1, 2):
            run_dir = root / f"run{time.monotonic_ns()}"
            (root / "voc.yaml").write_text(
                yaml.safe_dump({**settings, "run_dir": str(run_dir), "workers": workers})
            )
            command = [sys.executable, "make_debiased_labels.py", "--config", root / "voc.yaml"]
            began = time.perf_counter()
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
            if status:
                sys.exit("make_debiased_labels.py failed")
            whole = seconds / count * 10_582 / 60
            manifest = read_json(run_dir / "debias/manifest.json")
            share = manifest["seconds_identifying"] / manifest["seconds"]
            print(
                f"{workers} threads: {count / seconds:.2f} images/s, VOC's 10,582 in {whole:.1f} "
                f"minutes, {share:.1%} of it for digests of the inputs; peak memory of the process "
                f"{usage.ru_maxrss / 1e6:.2f} GB",
                flush=True,
            )


def voc_like(root: Path, samples: Path, count: int) -> dict:
    """Writes images, labels, features and tags for `count` ids of VOC; returns the settings."""
    pictures, rng = photographs(samples), np.random.default_rng(0)
    tags = read_table(samples / "voc_lists" / "image_tags.csv", VOC_CLASSES)
    ids = (samples / "voc_lists" / "train_aug.txt").read_text().split()[:count]
    for folder in ("JPEGImages", "ImageSets/Segmentation", "labels", "features"):
        (root / folder).mkdir(parents=True)
    for k, name in enumerate(ids):
        image, mask = pictures[k % len(pictures)]
        size = ((500, 375), (375, 500), (500, 333), (500, 375))[k % 4]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)[:, :: -1 if k % 3 else 1]
        label = np.zeros(size[::-1], np.uint8)
        for tag in tags[name]:
            centre, axes = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(0.15, 0.4, 2) * size
            number = VOC_CLASSES.index(tag) + 1
            cv2.ellipse(label, centre.astype(int), axes.astype(int), 0, 0, 360, number, -1)
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), image[..., ::-1])
        write_label(root / "labels" / f"{name}.png", label)
        feat = patch_features(np.ascontiguousarray(image), 90).astype(np.float16)
        np.save(root / "features" / f"{name}.npy", feat)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids))
    write_table(root / "tags.csv", {name: tags[name] for name in ids})
    return {
        "data": {"root": str(root), "tags": "tags.csv"},
        "wsss": {"labels_dir": str(root / "labels")},
        "uss": {"features_dir": str(root / "features")},
        "debias": {"cut": "fixed", "scale": "max"},  # auto would leave most of these classes uncut
    }


def debias_item(
    image: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """A photograph of VOC's size, a pseudo label with context, and features."""
    scale = 500 / max(label.shape)
    size = (round(label.shape[1] * scale), round(label.shape[0] * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    label = cv2.dilate(label, np.ones((61, 61), np.uint8))  # a map's usual excess
    return image, label, torch.from_numpy(patch_features(image, 90))


def selected_centroids(clusters: list[dict[int, torch.Tensor]]) -> torch.Tensor:
    """(255, D) debiased centroids of all classes (Eq. 1-3)."""
    vectors = torch.cat([v for found in clusters for v in found.values()])
    labels = torch.tensor([c for found in clusters for c, v in found.items() for _ in v])
    return debiased_centroids(vectors, labels, 255)[0]
