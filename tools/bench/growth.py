"""How time and memory of stage 3 and of scoring grow with images, their size and classes."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import yaml

from core.data.labels import write_label
from tools.bench.common import drawing, patch_features
from tools.common.tables import write_table

DRAWN = 50  # pictures, repeated
SMALL = (128, 96)  # width, height


def benchmark_growth(workers: int) -> None:
    """Varies one factor at a time; all figures include the start and imports of a process."""
    cases = [(count, SMALL, 20) for count in (100, 1000, 5000)]
    cases += [(100, size, 20) for size in ((250, 188), (500, 375), (1000, 750))]
    cases += [(1000, SMALL, classes) for classes in (60, 200)]
    print("images  size       classes  stage 3, s  peak, MB  scoring, s  peak, MB")
    for count, size, classes in cases:
        with tempfile.TemporaryDirectory() as name:
            path = write_experiment(Path(name), count, size, classes, workers)
            labels = f"--predictions={name}/labels", f"--masks={name}/labels"
            debias = measured("make_debiased_labels.py", "--config", path)
            score = measured("evaluate.py", *labels, f"--num_classes={classes}")
        print(
            f"{count:6}  {size[0]:4} x {size[1]:3} {classes:7}"
            f" {debias[0]:11.1f} {debias[1]:9.0f} {score[0]:11.1f} {score[1]:9.0f}",
            flush=True,
        )


def measured(*command: str | Path) -> tuple[float, float]:
    """Seconds and peak megabytes of one of the scripts."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1000


def write_experiment(
    root: Path, count: int, size: tuple[int, int], classes: int, workers: int
) -> Path:
    """Writes images, labels, features and tags below `root`; returns their configuration file."""
    for folder in ("JPEGImages", "ImageSets/Segmentation", "labels", "features"):
        (root / folder).mkdir(parents=True)
    names = [str(k) for k in range(1, classes + 1)]
    tags = {}
    for k in range(min(count, DRAWN)):
        image, mask = drawing(k)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        feat = patch_features(image, 32).astype(np.float16)
        picture = cv2.imencode(".jpg", image[..., ::-1])[1].tobytes()
        for copy in range(k, count, DRAWN):
            label = np.where(mask, (mask.astype(int) + 20 * copy) % classes + 1, 0).astype(np.uint8)
            (root / "JPEGImages" / f"{copy}.jpg").write_bytes(picture)
            write_label(root / "labels" / f"{copy}.png", label)
            np.save(root / "features" / f"{copy}.npy", feat)
            tags[str(copy)] = [names[c - 1] for c in np.unique(label) if c]
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(tags))
    write_table(root / "tags.csv", tags)
    settings = {
        "run_dir": str(root / "run"),
        "workers": workers,
        "data": {"root": str(root), "tags": "tags.csv", "classes": names},
        "wsss": {"labels_dir": str(root / "labels")},
        "uss": {"features_dir": str(root / "features")},
    }
    path = root / "growth.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
