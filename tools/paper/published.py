"""Tables 3, 4 and 5 on the paper's data sets: our scores next to the published ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.run.files import read_json
from tools.common.titles import BEFORE_AND_AFTER, FEATURES, METHODS, RECONSTRUCTED
from tools.paper.results import NONE, Analysis, paper, spread

SEGMENTERS = {  # of Table 5, by method
    "irn": "DeepLab v2, ResNet-50",
    "seam": "DeepLab v1, Wide-ResNet-38",
    "advcam": "DeepLab v2, ResNet-101",
    "rsepm": "DeepLab v3+, ResNet-101",
}
KINDS = ("none", "leopart", "stego")  # features of Table 4
SCORED = "mIoU on the validation list, per cent. "
PUBLISHED = (
    "The paper's columns are the figures that its authors published, for labels by the methods' "
    "authors; ours are measured with this code only."
)

Runs = Sequence[Path]
"""One run folder per seed."""


def table3(data: str, labels: str, runs: Runs) -> Analysis:
    """MARS on one data set.

    Args:
        data: data set, "voc" or "coco".
        labels: title of our pseudo labels.
        runs: run folders, one per seed.
    """
    published = paper()["table3"][data]
    ours = [miou(runs, mode) for mode in BEFORE_AND_AFTER]
    rows = [
        ["ours", labels, *map(spread, ours)],
        ["the paper", published["labels"], *(published[mode] for mode in BEFORE_AND_AFTER)],
    ]
    caption = f"{SCORED}Segmenter: DeepLab v3+, ResNet-101. {PUBLISHED}"
    caption += f" {RECONSTRUCTED}" if labels == "RS+EPM" else ""
    columns = ["", "labels of", *BEFORE_AND_AFTER.values()]
    name = {"voc": "PASCAL VOC 2012", "coco": "MS COCO 2014"}[data]
    return Analysis("table3", 30, f"Table 3: MARS on {name}", caption, columns, rows)


def table4(runs: Mapping[str, Mapping[str, Runs]]) -> Analysis:
    """Features: runs by method, then by "leopart" and "stego"; plain training is a mode of each."""
    published, rows = paper()["table4"], []
    for method, found in runs.items():
        ours = {"none": miou(found["stego"], "wsss")}
        ours |= {kind: miou(found[kind], "mars") for kind in ("leopart", "stego")}
        theirs = [published[method][kind] for kind in KINDS]
        rows.append([METHODS[method], *(spread(ours[kind]) for kind in KINDS), *theirs])
    titles = [FEATURES[kind] for kind in KINDS]
    columns = ["labels of", *titles, *(f"the paper, {title}" for title in titles)]
    caption = f"{SCORED}MARS with two kinds of features, and without. {PUBLISHED} {RECONSTRUCTED}"
    return Analysis("table4", 40, "Table 4: unsupervised features", caption, columns, rows)


def table5(runs: Mapping[str, Runs]) -> Analysis:
    """Methods: the runs of each of them."""
    published, rows = paper()["table5"], []
    for method, found in runs.items():
        base, mars, full = (miou(found, mode) for mode in BEFORE_AND_AFTER)
        theirs = [published[method][mode] for mode in BEFORE_AND_AFTER]
        closed = [closed_gap(base, mars, full), closed_gap(*map(np.atleast_1d, theirs))]
        ours = map(spread, (base, mars, full))
        rows.append([METHODS[method], SEGMENTERS[method], *ours, closed[0], *theirs, closed[1]])
    titles = [*BEFORE_AND_AFTER.values(), "gap closed, %"]
    columns = ["labels of", "segmenter", *titles, *(f"the paper, {name}" for name in titles)]
    caption = f"{SCORED}Features of STEGO. {PUBLISHED} {RECONSTRUCTED}"
    return Analysis("table5", 50, "Table 5: every method", caption, columns, rows)


def miou(runs: Runs, name: str) -> np.ndarray:
    """(runs,) mIoU of one evaluation in each run, per cent."""
    scores = (read_json(run / "evaluation" / name / "scores.json") for run in runs)
    return 100 * np.array([score["miou"] for score in scores])


def closed_gap(base: np.ndarray, mars: np.ndarray, full: np.ndarray) -> float | str:
    """The share of the way from `base` to full supervision that MARS covers, per cent."""
    if (full <= base).any():
        return NONE
    return spread(100 * (mars - base) / (full - base))
