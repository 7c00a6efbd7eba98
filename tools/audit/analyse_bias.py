"""Diagnoses stage 3 with ground truth: does it select objects, and does it remove context?

    python tools/audit/analyse_bias.py --config configs/demo.yaml [--control DIR]

Selection (the paper's Fig. 8): a centroid is a *target* if the IoU of its cluster with the class
mask exceeds 0.3, and *biased* if it is below 0.1; others are not counted. Removal: which share of
each class's false pixels was marked biased, and which share of its object pixels was kept.
`--control` names the output of another stage 3, on the classifier's own features. Writes
<run_dir>/analysis.json.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import Config, make_parser, parse
from core.data.labels import BIASED_ON_DISK, read_label
from core.data.lists import Split, ground_truth, read_split
from core.pipeline import Run, check_upstream
from core.run.errors import run_script
from core.run.files import read_array, read_arrays, write_json

TARGET, BIASED = 0.3, 0.1  # IoU, Fig. 8


def main() -> None:
    parser = make_parser("analyse_bias.py", __doc__)
    parser.add_argument("--control", type=str | None, help="debias folder of the control")
    config, options = parse(parser)
    run, split = Run(config), read_split(config.data, "train")
    check_upstream(config, split, "wsss", "uss", "debias")
    masks = [read_label(p, len(config.data.classes)) for p in ground_truth(config.data, split)]
    analysis = {
        "selection": selection(config, run.debias, split, masks),
        "removal": removal(config, run, run.debias / "labels", split, masks),
    }
    if options.control:
        folder = Path(options.control) / "labels"
        analysis["control"] = removal(config, run, folder, split, masks)
    write_json(run.folder / "analysis.json", analysis)
    chosen, every = analysis["selection"]["mean_selected"], analysis["selection"]["mean_all"]
    if chosen is not None:
        print(f"target share: selected {chosen:.1%}, all {every:.1%}")
    for key in ("removal", "control"):
        for group in ("mean_biased", "mean_unbiased"):
            values = analysis.get(key, {}).get(group, {})
            shown = ", ".join(f"{k} {v:.1%}" for k, v in values.items() if v is not None)
            print(f"{key}, {group}: {shown}" if shown else f"{key}, {group}: none")


def selection(config: Config, folder: Path, split: Split, masks: list[np.ndarray]) -> dict:
    """Share of targets among the selected centroids and among all, by class."""
    found = overlaps(folder, split, masks.__getitem__)
    labels, selected, overlap = (found[key] for key in ("labels", "selected", "overlap"))
    classes = {}
    for c, name in enumerate(config.data.classes, 1):
        ours = labels == c
        classes[name] = {
            "target_share_selected": target_share(overlap[ours & selected]),
            "target_share_all": target_share(overlap[ours]),
            "selected": int((ours & selected).sum()),
            "centroids": int(ours.sum()),
        }
    return {
        "classes": classes,
        "mean_selected": _mean(v["target_share_selected"] for v in classes.values()),
        "mean_all": _mean(v["target_share_all"] for v in classes.values()),
    }


def overlaps(
    folder: Path, split: Split, mask: Callable[[int], np.ndarray | None]
) -> dict[str, np.ndarray]:
    """Every centroid of a finished stage 3, and how well its cluster shows its class.

    Args:
        folder: folder of stage 3.
        split: training images.
        mask: index of an image -> (H, W) ground truth, or None if it has none.

    Returns:
        vectors (N, D), labels (N,), images (N,) and selected (N,) bool of the centroids; overlap
        (N,), the IoU of each cluster with the mask of its class, and inside (N,), the share of the
        cluster that is on this mask, both in 0..1 and NaN without a mask.

    Raises:
        UserError: the centroids are missing.
    """
    found = read_arrays(
        folder / "centroids.npz",
        ("labels", "images", "selected"),
        "run make_debiased_labels.py",
    )
    found["vectors"] = read_array(folder / "vectors.npy", "run make_debiased_labels.py")
    overlap, inside = np.full((2, len(found["labels"])), np.nan)
    for image, image_id in enumerate(split.ids):
        truth = mask(image)
        if truth is None:
            continue
        path = folder / "clusters" / f"{image_id}.npz"
        cells = read_arrays(path, ("cells",), "run make_debiased_labels.py")["cells"]
        clusters = cv2.resize(cells, truth.shape[::-1], interpolation=cv2.INTER_NEAREST)
        for k, row in enumerate(np.flatnonzero(found["images"] == image)):
            cluster, shown = clusters == k, truth == found["labels"][row]
            shared = (cluster & shown).sum()
            overlap[row] = shared / max(1, (cluster | shown).sum())
            inside[row] = shared / max(1, cluster.sum())
    return {**found, "overlap": overlap, "inside": inside}


def target_share(overlap: np.ndarray) -> float | None:
    """Share of targets among targets and biased centroids, 0..1; None without any."""
    target, biased = (overlap > TARGET).sum(), (overlap < BIASED).sum()
    return round(float(target / (target + biased)), 4) if target + biased else None


def removal(config: Config, run: Run, folder: Path, split: Split, masks: list[np.ndarray]) -> dict:
    """By class: shares of false pixels removed and object pixels kept, precision of the removal."""
    size = len(config.data.classes) + 1
    false, false_out, true, true_out = (np.zeros(size, np.int64) for _ in range(4))
    for image_id, mask in zip(split.ids, masks, strict=True):
        label = read_label(run.wsss_labels / f"{image_id}.png", size - 1)
        marked = read_label(folder / f"{image_id}.png") == BIASED_ON_DISK
        right = label == mask
        valid = (mask < size) & (label < size)
        false += np.bincount(label[valid & ~right], minlength=size)
        false_out += np.bincount(label[valid & ~right & marked], minlength=size)
        true += np.bincount(label[valid & right], minlength=size)
        true_out += np.bincount(label[valid & right & marked], minlength=size)
    classes = {}
    for c, name in enumerate(config.data.classes, 1):
        classes[name] = {
            "context_removed": _ratio(false_out[c], false[c]),
            "object_kept": _ratio(true[c] - true_out[c], true[c]),
            "precision": _ratio(false_out[c], false_out[c] + true_out[c]),
        }
    biased = set(config.data.biased_classes)
    groups = {"mean_biased": biased, "mean_unbiased": set(config.data.classes) - biased}
    means = {
        group: {
            key: _mean(classes[n][key] for n in sorted(names))
            for key in next(iter(classes.values()))
        }
        for group, names in groups.items()
    }
    return {"classes": classes, **means}


def _ratio(part: int, whole: int) -> float | None:
    return round(float(part / whole), 4) if whole else None


def _mean(values) -> float | None:
    values = [v for v in values if v is not None]
    return round(float(np.mean(values)), 4) if values else None


if __name__ == "__main__":
    run_script(main)
