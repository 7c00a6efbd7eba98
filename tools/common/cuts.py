"""What stage 3 decided for each class, and the similarities behind it, as a map and as a chart."""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from core.cut import BINS, COLUMNS, GROUPS, MIN_GAIN
from core.run.files import read_arrays, read_json
from tools.common.charts import chart

POINTS = 80  # of a line
TAIL = 0.001  # share of the cells that may lie beyond either end of a chart
LINES = {"kept": "kept clusters", "ring": "ring (context)", "region": "region"}
REMEDY = "remove the folder and run make_debiased_labels.py again"


@dataclass
class ClassCut:
    """What stage 3 did with one class; figures are None where it has none."""

    removed: float | None = None  # share of the class's label area, 0..1
    cut: float | None = None  # similarity above which a cell is kept, -1..1
    object_share: float | None = None  # of the region, 0..1
    contrast: float | None = None  # how often a kept cell exceeds a cell of the ring, 0..1
    expected_iou: float | None = None  # of what is kept with the objects, 0..1
    left: str = ""  # why the labels were left as they are
    warnings: list[str] = field(default_factory=list)  # sentences
    chart: dict | None = None  # see `chart`

    @property
    def sentence(self) -> str:
        """The decision in words; empty with `debias.cut: fixed`."""
        if self.cut is None:
            return self.left and f"Left as it is: {self.left}."
        removed = "" if self.removed is None else f", {self.removed:.1%} removed"
        return (
            f"Cut at {self.cut:.2f}: object share {self.object_share:.0%}, contrast "
            f"{self.contrast:.2f}, expected IoU {self.expected_iou:.0%}{removed}."
        )


@dataclass
class Decisions:
    """Stage 3's decisions by class, in the order of the classes, and its warnings in full."""

    classes: dict[str, ClassCut] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def any_cut(self) -> bool:
        """Whether classes have cuts of their own, or reasons why not."""
        return any(c.cut is not None or c.left for c in self.classes.values())


def read_decisions(folder: Path) -> Decisions:
    """Reads manifest and cuts of a finished stage 3; nothing where it is not finished.

    Args:
        folder: folder of stage 3; without cuts.npz, as with `debias.cut: fixed`, no class has
            figures or a chart.

    Raises:
        UserError: a file is broken.
    """
    path = folder / "manifest.json"
    manifest = read_json(path) if path.is_file() else {}
    if not manifest.get("finished"):
        return Decisions()
    names, results = manifest.get("classes", []), manifest["results"]
    found = Decisions({name: ClassCut() for name in names})
    for name, share in zip(names, results.get("removed", ()), strict=False):
        found.classes[name].removed = share
    for warning in results.get("warnings", ()):
        problem = warning["problem"][:1].upper() + warning["problem"][1:]
        listed = ", ".join(f"{name} {figure}" for name, figure in warning["classes"].items())
        found.warnings.append(f"{problem}: {listed}. {warning['remedy']}.")
        for name, figure in warning["classes"].items():
            found.classes[name].warnings.append(f"{problem}: {figure}. {warning['remedy']}.")
    path = folder / "cuts.npz"
    if path.is_file():
        arrays = read_arrays(path, ("counts", *COLUMNS), REMEDY)
        for k, (name, own) in enumerate(found.classes.items()):
            for key in ("cut", "object_share", "contrast", "expected_iou"):
                value = float(arrays[key][k])
                setattr(own, key, None if np.isnan(value) else value)
            own.left = why_left(arrays["counts"][k], own)
            own.chart = cut_chart(name, arrays["counts"][k], own)
    return found


def why_left(counts: np.ndarray, own: ClassCut) -> str:
    """Why a class has no cut; empty if it has one. `counts`: (3, BINS) cells, see core/cut.py."""
    empty = [group for group, cells in zip(GROUPS, counts, strict=True) if not cells.any()]
    if empty:
        return f"there are no cells to compare (none in: {', '.join(empty)})"
    if own.cut is not None:
        return ""
    if own.expected_iou is None:
        return "its kept clusters are no more similar to it than its surroundings"
    return (
        f"a cut would raise its expected IoU from {own.object_share:.2f} to "
        f"{own.expected_iou:.2f}, by less than {MIN_GAIN}"
    )


def cut_chart(name: str, counts: np.ndarray, own: ClassCut) -> dict | None:
    """Densities of the groups' similarities, and the cut as a mark; None without a cell.

    Args:
        name: class.
        counts: (3, BINS) cells by group and similarity, see core/cut.py.
        own: decision on the class.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    held = np.cumsum(shares.mean(0))
    if not held[-1]:
        return None
    low, high = np.searchsorted(held, (TAIL * held[-1], (1 - TAIL) * held[-1]))
    sigma = max((high - low) / POINTS, 4)  # bins
    density = cv2.GaussianBlur(
        shares, (2 * round(3 * sigma) + 1, 1), sigma, borderType=cv2.BORDER_CONSTANT
    )
    ends = np.clip((low - 3 * sigma, high + 3 * sigma), 0, BINS - 1)
    at = np.unique(np.linspace(*ends, POINTS).round().astype(int))
    similarity, density = (at + 0.5) * (2 / BINS) - 1, density[:, at] / density[:, at].max()
    lines = {
        text: [*zip(similarity.tolist(), density[GROUPS.index(group)].tolist(), strict=True)]
        for group, text in LINES.items()
        if counts[GROUPS.index(group)].any()
    }
    marks = []
    if own.cut is not None:  # a cut below all cells, which keeps them all, is drawn at the edge
        marks = [(float(np.clip(own.cut, *similarity[[0, -1]])), f"cut {own.cut:.2f}")]
    title = f"Similarities in and around {name}"
    drawn = chart(title, "similarity", "share of cells", lines, marks)
    # Heights mean nothing by themselves: no ticks, and the summary is the decision.
    return drawn and drawn | {"y_ticks": [], "summary": f"{title}. {own.sentence}"}
