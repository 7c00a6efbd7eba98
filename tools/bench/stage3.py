"""Stage 3: each preset against the naive way, and the script on a list like VOC's."""

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

from core.config import VOC_CLASSES, DebiasConfig
from core.crf.dense import DenseCRF
from core.data.labels import write_label
from core.data.tags import read_table, write_table
from core.debias import debiased_centroid
from core.debias_image import crf_settings, find_clusters, refine, similarity
from core.run.files import read_json
from tools.bench.common import drawing, patch_features, photographs, ratio, timed


def benchmark_debias(samples: Path | None) -> None:
    """Stage 3 of each photograph with each preset, from features to label map."""
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


def selected_centroids(clusters: list[dict[int, np.ndarray]]) -> torch.Tensor:
    """(255, D) debiased centroids of all classes (Eq. 1-3)."""
    background = torch.from_numpy(np.concatenate([c[0] for c in clusters if 0 in c]))
    centroids = torch.zeros(255, background.shape[1])
    for value in {v for c in clusters for v in c} - {0}:
        own = np.concatenate([c[value] for c in clusters if value in c])
        centroids[value - 1] = debiased_centroid(torch.from_numpy(own), background)
    return centroids
