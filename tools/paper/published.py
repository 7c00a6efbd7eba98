"""Tables 3, 4 and 5 on the paper's data sets: our scores beside the published ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from core.run.files import read_json
from tools.paper.results import NONE, Analysis, paper, spread

METHODS = {
    "irn": ("IRNet", "DeepLab v2, ResNet-50"),
    "seam": ("SEAM", "DeepLab v1, Wide-ResNet-38"),
    "advcam": ("AdvCAM", "DeepLab v2, ResNet-101"),
    "rsepm": ("RS+EPM", "DeepLab v3+, ResNet-101"),
}
MODES = {"wsss": "without MARS", "mars": "with MARS", "supervised": "supervised"}
FEATURES = {"none": "none", "leopart": "Leopart", "stego": "STEGO"}
SCORED = "mIoU on the validation list, per cent. "
PUBLISHED = (
    "The paper's columns are the figures that its authors published, for labels of the methods' "
    "authors; ours are measured with this code alone."
)
RECONSTRUCTED = " Ours under RS+EPM are labels of our reconstruction of that method."

Runs = Sequence[Path]
"""One run folder a seed."""


def table3(data: str, labels: str, runs: Runs) -> Analysis:
    """MARS on a data set, "voc" or "coco", with `labels` as ours are called."""
    published = paper()["table3"][data]
    ours = [miou(runs, mode) for mode in MODES]
    rows = [
        ["ours", labels, *map(spread, ours)],
        ["the paper", published["labels"], *(published[mode] for mode in MODES)],
    ]
    caption = f"{SCORED}Segmenter: DeepLab v3+, ResNet-101. {PUBLISHED}"
    caption += RECONSTRUCTED if labels == "RS+EPM" else ""
    columns = ["", "labels of", *MODES.values()]
    name = {"voc": "PASCAL VOC 2012", "coco": "MS COCO 2014"}[data]
    return Analysis("table3", 30, f"Table 3: MARS on {name}", caption, columns, rows)


def table4(runs: Mapping[str, Mapping[str, Runs]]) -> Analysis:
    """Features: runs by method, then by "leopart" and "stego"; "none" is plain training there."""
    published, rows = paper()["table4"], []
    for method, found in runs.items():
        ours = {"none": miou(found["stego"], "wsss")}
        ours |= {kind: miou(found[kind], "mars") for kind in ("leopart", "stego")}
        theirs = [published[method][kind] for kind in FEATURES]
        rows.append([METHODS[method][0], *(spread(ours[kind]) for kind in FEATURES), *theirs])
    columns = ["labels of", *FEATURES.values()]
    columns += [f"the paper, {name}" for name in FEATURES.values()]
    caption = SCORED + "MARS with two kinds of features, and without. " + PUBLISHED + RECONSTRUCTED
    return Analysis("table4", 40, "Table 4: unsupervised features", caption, columns, rows)


def table5(runs: Mapping[str, Runs]) -> Analysis:
    """Methods: the runs of each."""
    published, rows = paper()["table5"], []
    for method, found in runs.items():
        base, mars, full = (miou(found, mode) for mode in MODES)
        theirs = [published[method][mode] for mode in MODES]
        closed = [closed_gap(base, mars, full), closed_gap(*map(np.atleast_1d, theirs))]
        ours = map(spread, (base, mars, full))
        rows.append([*METHODS[method], *ours, closed[0], *theirs, closed[1]])
    titles = [*MODES.values(), "gap closed, %"]
    columns = ["labels of", "segmenter", *titles, *(f"the paper, {name}" for name in titles)]
    caption = SCORED + "Features of STEGO. " + PUBLISHED + RECONSTRUCTED
    return Analysis("table5", 50, "Table 5: every method", caption, columns, rows)


def miou(runs: Runs, name: str) -> np.ndarray:
    """(seeds,) mIoU in per cent of one evaluation in each run."""
    scores = (read_json(run / "evaluation" / name / "scores.json") for run in runs)
    return 100 * np.array([score["miou"] for score in scores])


def closed_gap(base: np.ndarray, mars: np.ndarray, full: np.ndarray) -> float | str:
    """Which part of the way from `base` to full supervision MARS goes, per cent."""
    if (full <= base).any():
        return NONE
    return spread(100 * (mars - base) / (full - base))
