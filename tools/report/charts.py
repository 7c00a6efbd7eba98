"""The page's charts: scores by threshold, and training curves."""

from collections.abc import Mapping
from typing import Any

from tools.common.charts import chart
from tools.report.record import LOGS


def sweep_chart(sweep: Mapping[str, Any]) -> dict | None:
    names = {"miou": "mIoU", "biased": "biased classes", "unbiased": "other classes"}
    rows = sweep.get("scores", [])
    series = {
        text: [(r["threshold"], 100 * r[key]) for r in rows if r.get(key) is not None]
        for key, text in names.items()
    }
    same = sweep.get("chosen") == sweep.get("configured")
    marks = [(sweep["chosen"], "best")] if sweep else []
    marks += [] if same else [(sweep["configured"], "configured")]
    return chart("Pseudo labels", "threshold", "IoU, %", series, sorted(marks))


def training_curves(logs: Mapping[str, list[dict]]) -> list[dict]:
    """The loss of every training and, for MARS, what happens to biased pixels."""
    charts = []
    for stage, entries in logs.items():
        charts.append(chart(LOGS[stage], "iteration", "loss", {"loss": _series(entries, "loss")}))
        filled = {
            "filled with an object": _series(entries, "filled_object"),
            "certainty": _series(entries, "certainty"),
        }
        if stage == "segmentation/mars":
            charts.append(chart("MARS: biased pixels", "iteration", "share", filled))
    return [c for c in charts if c]


def _series(entries: list[dict], key: str) -> list[tuple[float, float]]:
    return [(e["iteration"], e[key]) for e in entries if e.get(key) is not None]
