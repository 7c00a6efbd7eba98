"""Prints mean and spread over several demo runs, as Markdown.

    python tools/summarise_runs.py runs/demo_seed10 runs/demo_seed11 runs/demo_seed12

Reads each run's scores.json files and analysis.json. Spread is (lowest .. highest). "Gap closed" is
(MARS - WSSS) / (supervised - WSSS) in mIoU, WSSS being the plain training at its best threshold.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.run.errors import run_script
from core.run.files import read_json, user_path
from tools.analyses.results import spread

LABELS = {
    "labels_wsss": "pseudo labels",
    "labels_wsss_best": "pseudo labels, best threshold",
    "labels_debias": "debiased labels, biased = background",
}
MODES = {
    "wsss_best": "WSSS, best threshold",
    "ignore": "biased pixels ignored",
    "complement": "complemented",
    "mars": "complemented, weighted by certainty (MARS)",
    "supervised": "fully supervised",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=user_path, nargs="+")
    runs = parser.parse_args().runs
    print(f"{len(runs)} runs: {', '.join(run.name for run in runs)}\n")
    print("| | mIoU | FP | FN | IoU, biased classes | IoU, others |\n|---|---|---|---|---|---|")
    for name, title in {**LABELS, **MODES}.items():
        rows = np.array([figures(run, name) for run in runs])
        print(f"| {title} | " + " | ".join(shown(column) for column in rows.T) + " |")
    base, mars, full = (
        np.array([figures(run, name) for run in runs])
        for name in ("wsss_best", "mars", "supervised")
    )
    gain = mars - base
    with np.errstate(divide="ignore", invalid="ignore"):  # where plain labels leave no gap
        closed = 100 * gain[:, 0] / (full - base)[:, 0]
    print(f"\nGap closed: {shown(closed)} %")
    for column, name in enumerate(("mIoU", "FP", "FN", "biased IoU", "other IoU")):
        print(f"Gain of MARS in {name}: {shown(gain[:, column])}")
    for path, title in (
        (("selection", "mean_selected"), "Targets among the selected centroids"),
        (("selection", "mean_all"), "Targets among all centroids"),
        (("removal", "mean_biased", "context_removed"), "Context removed, biased classes"),
        (("removal", "mean_biased", "object_kept"), "Object kept, biased classes"),
        (("removal", "mean_unbiased", "object_kept"), "Object kept, other classes"),
        (("control", "mean_biased", "context_removed"), "Control: context removed, biased"),
        (("control", "mean_biased", "object_kept"), "Control: object kept, biased"),
    ):
        values = np.array([analysis(run, path) for run in runs], float)
        print(f"{title}: {shown(100 * values)} %")


def shown(values: np.ndarray) -> str:
    """Mean and spread over the runs that have the figure; a dash where none has."""
    known = values[np.isfinite(values)]
    return str(spread(known)) if len(known) else "–"


def figures(run: Path, name: str) -> list[float]:
    """mIoU, FP, FN and the two groups' IoU of one score file, in per cent.

    NaN stands for what the file has not: a class that occurs nowhere has no IoU.
    """
    scores = read_json(run / "evaluation" / name / "scores.json")
    biased = set(scores["data"]["biased_classes"])
    iou = dict(zip(scores["classes"], scores["per_class"]["iou"], strict=True))
    iou = {c: v for c, v in iou.items() if c != "background" and v is not None}
    groups = [[v for c, v in iou.items() if (c in biased) == chosen] for chosen in (True, False)]
    means = [np.mean(group) if group else None for group in groups]
    values = [scores["miou"], scores["fp"], scores["fn"], *means]
    return [100 * v for v in np.array(values, float)]


def analysis(run: Path, path: tuple[str, ...]) -> float | None:
    value = read_json(run / "analysis.json")
    for key in path:
        value = value[key]
    return value


if __name__ == "__main__":
    run_script(main)
