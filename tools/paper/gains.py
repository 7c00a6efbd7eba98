"""Fig. 9: what MARS gains in each class."""

import numpy as np
from matplotlib.figure import Figure

from core.config import Config
from core.pipeline import Run
from core.run.errors import UserError
from core.run.files import read_json
from tools.common.titles import MODES
from tools.paper.results import BLUE, GREY, NONE, ORANGE, Analysis, paper, styled

BASELINES = ("wsss", "wsss_best")
CAPTION = (
    "IoU on the list {}, per cent, and what MARS gains over plain training on the labels that it "
    "starts from and, if that was trained, on labels whose threshold was chosen with ground truth."
)


def figure9(config: Config, data_set: str | None) -> tuple[Analysis, Figure]:
    """The table of Fig. 9 and its picture, from the scores of the run.

    Args:
        config: configuration of a run in which MARS and plain training are scored.
        data_set: data set whose published figures are added, "voc"; None: no published figures.

    Raises:
        UserError: the scores are missing, or are not on the same list.
    """
    run, iou, data = Run(config), {}, {}
    for name in (*BASELINES, "mars", "supervised"):
        path = run.evaluation(name) / "scores.json"
        if path.is_file():
            scores = read_json(path)
            data[name] = scores.get("data", {})
            values = (np.nan if v is None else 100 * v for v in scores["per_class"]["iou"])
            iou[name] = dict(zip(scores["classes"], values, strict=True))
    bases = [name for name in BASELINES if name in iou]
    if "mars" not in iou or not bases:
        raise UserError(
            f"{run.folder / 'evaluation'} lacks scores of mars, or of wsss; train and score "
            "both: train_segmentation.py and evaluate.py with --segmentation.mode"
        )
    for name, found in data.items():
        if [found.get(k) for k in ("list", "masks")] != [
            data["mars"].get(k) for k in ("list", "masks")
        ]:
            raise UserError(
                f"{run.evaluation(name)} and {run.evaluation('mars')} are scores on other images "
                f"({found.get('list')}, {data['mars'].get('list')}); score both on one list"
            )
    published = paper()["figure9"] if data_set == "voc" else {}
    biased, rows, gains = config.data.biased_classes, [], {base: {} for base in bases}
    titles = {name: name for name in iou["mars"]} | {"": "mean"}
    for values in iou.values():
        values[""] = np.nanmean([*values.values()])
    for name, title in titles.items():
        row = [title, *(["yes" if name in biased else ""] if biased else [])]
        row += [_cell(iou[which][name]) for which in (*bases, "mars")]
        for base in bases:
            gains[base][title] = iou["mars"][name] - iou[base][name]
            row.append(_cell(gains[base][title]))
        row += [_cell(iou["supervised"][name])] if "supervised" in iou else []
        row += [f"about +{published[name]}" if name in published else ""] if published else []
        rows.append(row)
    columns = ["class", *(["biased"] if biased else [])]
    columns += [MODES[name][0] for name in (*bases, "mars")]
    columns += [f"gain over {MODES[base][0]}" for base in bases]
    columns += [MODES["supervised"][0]] if "supervised" in iou else []
    columns += ["the paper's gain"] if published else []
    caption = CAPTION.format(data["mars"].get("list") or "val")
    analysis = Analysis("figure9", 90, "Fig. 9: gains by class", caption, columns, rows)
    return analysis, draw(gains, biased)


def _cell(value: float) -> float | str:
    return round(float(value), 1) if np.isfinite(value) else NONE


def kind_of(name: str, biased: tuple[str, ...]) -> str:
    if name in ("mean", "background"):
        return "mean, background"
    return "biased class" if name in biased else "other class"


@styled
def draw(gains: dict[str, dict[str, float]], biased: tuple[str, ...]) -> Figure:
    """Bars for the gains over the first baseline, dots for the gains over the second, in points."""
    base, *others = gains
    classes = sorted(gains[base], key=lambda name: np.nan_to_num(gains[base][name]))
    figure = Figure(figsize=(5.2, 1.2 + 0.22 * len(classes)))
    axes = figure.subplots()
    rows, values = np.arange(len(classes)), np.array([gains[base][c] for c in classes])
    kinds = {"biased class": ORANGE, "other class": BLUE, "mean, background": GREY}
    for kind, colour in kinds.items():
        ours = np.array([kind_of(name, biased) == kind for name in classes])
        if ours.any():
            axes.barh(rows[ours], values[ours], 0.6, color=colour, label=kind)
    for other in others:
        points = [gains[other][c] for c in classes]
        style = {"s": 18, "color": "white", "edgecolors": "black", "zorder": 3}
        axes.scatter(points, rows, **style, label=f"over {MODES[other][0]}")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(yticks=rows, yticklabels=classes, xlabel=f"gain in IoU over {MODES[base][0]}, points")
    axes.set(title="What MARS gains in each class")
    axes.grid(axis="x")
    if biased or others:
        figure.legend(loc="outside lower center", ncols=2)
    return figure
