"""Prints mean and spread over several demo runs, as Markdown.

    python tools/demo/summarise_runs.py runs/demo_seed10 runs/demo_seed11 runs/demo_seed12

Reads each run's scores.json files and analysis.json. The spread is (lowest .. highest). "Gap
closed" is (MARS - WSSS) / (supervised - WSSS) in mIoU, where WSSS is plain training on the pseudo
labels at their best threshold.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.run.errors import run_script
from core.run.files import read_json, user_path
from tools.common import tool_parser
from tools.common.titles import LABELS, MODES
from tools.paper.results import spread
from tools.report.figures import figures

SHOWN = {name: title for name, (title, _) in (LABELS | MODES).items() if name != "wsss"}


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("runs", type=user_path, nargs="+")
    runs = parser.parse_args().runs
    print(f"{len(runs)} runs: {', '.join(run.name for run in runs)}\n")
    print("| | mIoU | FP | FN | IoU, biased classes | IoU, others |\n|---|---|---|---|---|---|")
    for name, title in SHOWN.items():
        rows = np.array([scores(run, name) for run in runs])
        print(f"| {title} | " + " | ".join(shown(column) for column in rows.T) + " |")
    base, mars, full = (
        np.array([scores(run, name) for run in runs])
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
    """Mean and spread over the runs that have the figure; a dash if none has it."""
    known = values[np.isfinite(values)]
    return str(spread(known)) if len(known) else "–"


def scores(run: Path, name: str) -> list[float]:
    """mIoU, FP, FN and the IoU of both groups of classes in one score file, per cent.

    NaN stands for a missing figure: a class that occurs nowhere has no IoU.
    """
    score = read_json(run / "evaluation" / name / "scores.json")
    values = figures(score, score["data"]["biased_classes"]).values()
    return [100 * v for v in np.array([*values], float)]


def analysis(run: Path, path: tuple[str, ...]) -> float | None:
    value = read_json(run / "analysis.json")
    for key in path:
        value = value[key]
    return value


if __name__ == "__main__":
    run_script(main)
