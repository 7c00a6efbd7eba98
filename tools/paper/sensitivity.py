"""Fig. 10: how much labels, or segmenters trained on them, depend on the settings of stage 3.

Each point is a separate stage 3 in <run_dir>/analysis/figure10/<point>/, with its scores and, on
request, a segmenter in <point>/segmenter/. One setting is changed at a time. Points that do not
affect K-means reuse the clusters of the configured stage 3.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from core.config import Config
from core.debias import DebiasConfig
from core.pipeline import Run
from core.run.errors import UserError
from core.run.files import read_json
from tools.common.jobs import Job, digest_of_run, run_jobs
from tools.paper.results import BLUE, GREY, ORANGE, Analysis, percent, styled

CLUSTERING = ("k_fg", "k_bg")  # settings that change K-means
CONFIGURED, BEFORE = "configured", "pseudo labels"
SYMBOLS = {
    "K_bg": "$K_{bg}$",
    "alpha": r"$\alpha$",
}
CAPTION = (
    "One setting of stage 3 varies at a time; the others keep the configured value (marked): {}. "
    "Thresholds are shares of the similarity's maximum in each image (debias.cut: fixed)."
)
OF_LABELS = (
    "mIoU of the debiased labels on the training list, biased pixels as background, per cent. The "
    "dashed line shows the pseudo labels before debiasing. The paper's Fig. 10 shows trained "
    "segmenters (--segmenters) on VOC's validation list instead"
)
OF_SEGMENTERS = (
    "mIoU of segmenters trained with MARS on the debiased labels, on the validation list, per "
    "cent. The dashed line shows plain training on the pseudo labels"
)


@dataclass(frozen=True)
class Point:
    """One value of one setting."""

    factor: str  # as shown
    value: str  # as shown
    changes: tuple[tuple[str, Any], ...]  # keys of DebiasConfig

    @property
    def folder(self) -> str:
        return "_".join(f"{key}_{value}" for key, value in self.changes)

    def configured(self, settings: DebiasConfig) -> bool:
        return all(getattr(settings, key) == value for key, value in self.changes)


def factors(settings: DebiasConfig, quick: bool = False) -> dict[str, list[Point]]:
    """The points by setting: Fig. 10's two settings, then choices that the paper leaves open.

    Args:
        settings: configured settings, which are among the points.
        quick: whether to keep only Fig. 10's settings, with the ends of their ranges.
    """
    tenths = [k / 10 for k in range(1, 11)]
    published = {"K_bg": ("k_bg", [1, 2, 3, 4, 5], {}), "alpha": ("alpha", tenths, {})}
    fixed = {"threshold": ("threshold", tenths[:5], {"cut": "fixed", "scale": "max"})}
    found = {
        **_numbers(settings, published),
        "distance": _distances(settings),
        "cut": [Point("cut", "auto", (("cut", "auto"),))],
        **_numbers(settings, fixed),
    }
    if quick:
        found = {
            factor: [p for p in points if p in points[:: len(points) - 1] or p.configured(settings)]
            for factor, points in found.items()
            if factor in published
        }
    return found


def _numbers(settings: DebiasConfig, factors: dict[str, tuple]) -> dict[str, list[Point]]:
    found = {}
    for factor, (key, values, form) in factors.items():
        used = all(getattr(settings, k) == v for k, v in form.items())
        values = sorted({*values} | ({getattr(settings, key)} if used else set()))
        found[factor] = [Point(factor, f"{v:g}", (*form.items(), (key, v))) for v in values]
    return found


def _distances(settings: DebiasConfig) -> list[Point]:
    near = sorted({1, 10, 50} | ({settings.nearest} if settings.distance == "nearest" else set()))
    forms = [("mean", (("distance", "mean"),))]
    forms += [(f"nearest {k}", (("distance", "nearest"), ("nearest", k))) for k in near]
    return [Point("distance", name, changes) for name, changes in forms]


def figure10(
    config: Config,
    arguments: Sequence[str],
    listed: str | None,
    max_parallel: int,
    quick: bool,
    trained: Sequence[str] = (),
) -> tuple[Analysis, Figure]:
    """The table of Fig. 10 and its picture; makes and scores the points that are missing.

    Args:
        config: configuration of a run whose stage 3 is finished.
        arguments: command line that gives `config`.
        listed: list of the training images that have masks; None: all.
        max_parallel: number of points at a time.
        quick: whether to make few points.
        trained: settings whose points get a segmenter, as in the paper, and are shown by it; empty:
            all settings, shown by the labels.

    Raises:
        UserError: stage 3 is not finished, a point failed, or there is no such setting.
    """
    run = Run(config)
    folder = run.folder / "analysis" / "figure10"
    settings = digest_of_run(config, run.debias)
    points = factors(config.debias, quick)
    unknown = sorted({*trained} - points.keys())
    if unknown:
        raise UserError(f"Fig. 10 does not vary {unknown[0]}; it varies {', '.join(points)}")
    points = {factor: points[factor] for factor in points if factor in trained or not trained}
    varied = [p for group in points.values() for p in group if not p.configured(config.debias)]
    jobs = []
    scored = {CONFIGURED: run.debias / "labels", BEFORE: run.wsss_labels}
    for point in varied:
        take_clusters_over(run.debias, folder / point.folder, point)
        changes = [f"--debias.{key}={value}" for key, value in point.changes]
        changes.append(f"--debias.output_dir={folder / point.folder}")
        command = ["make_debiased_labels.py", *arguments, *changes]
        jobs.append(Job(f"{point.folder}: labels", command))
        scored[point.folder] = folder / point.folder / "labels"
    places = {}
    for name, labels in scored.items():
        if trained:
            places[name], added = segmenter_jobs(run, folder, name, labels, arguments)
            jobs += added
            continue
        places[name] = folder / name.replace(" ", "_")
        command = ["evaluate.py", *arguments, f"--predictions={labels}", "--split=train"]
        command += [f"--data.train_list={listed}"] if listed else []
        command.append(f"--output={places[name] / 'scores.json'}")
        jobs.append(Job(f"{name}: score", command, labels_first(name)))
    run_jobs(jobs, folder, settings, max_parallel)
    scores = {name: read_json(place / "scores.json") for name, place in places.items()}
    keys = ("miou", "fp", "fn")
    rows = [["(none)", BEFORE, "", *(percent(scores[BEFORE][key]) for key in keys)]]
    for point in (p for group in points.values() for p in group):
        chosen = point.configured(config.debias)
        score = scores[CONFIGURED if chosen else point.folder]
        mark = CONFIGURED if chosen else ""
        rows.append([point.factor, point.value, mark, *(percent(score[key]) for key in keys)])
    columns = ["setting", "value", "", "mIoU", "FP", "FN"]
    if trained:
        name, title, axis = "figure10_segmenters", "Fig. 10: segmenters", "mIoU, validation, %"
    else:
        name, title, axis = "figure10", "Fig. 10: sensitivity of stage 3", "mIoU of the labels, %"
    caption = CAPTION.format(OF_SEGMENTERS if trained else OF_LABELS)
    return Analysis(name, 100, title, caption, columns, rows), draw(rows, axis)


def labels_first(name: str) -> tuple[str, ...]:
    """The job that makes the labels of a point; the run's own labels exist already."""
    return () if name in (CONFIGURED, BEFORE) else (f"{name}: labels",)


def segmenter_jobs(
    run: Run, folder: Path, name: str, labels: Path, arguments: Sequence[str]
) -> tuple[Path, list[Job]]:
    """The folder of one point's score, and the jobs that train and score its segmenter.

    MARS on the configured labels and plain training on the pseudo labels belong to the run itself.
    """
    mode = "wsss" if name == BEFORE else "mars"
    settings = [*arguments, f"--segmentation.mode={mode}"]
    place = run.folder
    if name not in (CONFIGURED, BEFORE):
        place = folder / name / "segmenter"
        settings += [f"--run_dir={place}", f"--segmentation.labels_dir={labels}"]
    train = Job(f"{name}: train", ["train_segmentation.py", *settings], labels_first(name))
    score = Job(f"{name}: score of the segmenter", ["evaluate.py", *settings], (train.name,))
    return place / "evaluation" / mode, [train, score]


def take_clusters_over(source: Path, target: Path, point: Point) -> None:
    """Links the configured stage 3's clusters into the folder of a point that has the same ones."""
    if any(key in CLUSTERING for key, _ in point.changes) or (target / "manifest.json").exists():
        return
    for path in (source / "clusters").glob("*.npz"):
        ours = target / path.relative_to(source)
        if ours.exists():
            continue
        ours.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, ours)
        except OSError:  # a file system without links
            shutil.copy(path, ours)


@styled
def draw(rows: list[list[Any]], axis: str) -> Figure:
    """A panel for each setting.

    Args:
        rows: rows of the table, which begin with setting, value, mark and mIoU; the first row shows
            the pseudo labels.
        axis: title of the y axis.
    """
    groups: dict[str, list[tuple[str, str, float]]] = {}
    for factor, value, mark, miou, *_ in rows[1:]:
        groups.setdefault(factor, []).append((value, mark, miou))
    columns = min(3, len(groups))
    height = -(-len(groups) // columns)
    figure = Figure(figsize=(2.4 * columns, 1.9 * height + 0.3))
    panels = figure.subplots(height, columns, sharey="row", squeeze=False).flatten()
    for axes, (factor, points) in zip(panels, groups.items(), strict=False):
        values, marks, miou = zip(*points, strict=True)
        places = np.arange(len(values))
        ordered = factor not in ("distance", "scale")
        axes.plot(places, miou, "o-" if ordered else "o", color=BLUE, markersize=3.5, linewidth=1)
        for place, mark, height_ in zip(places, marks, miou, strict=True):
            if mark:
                axes.plot(place, height_, "*", color=ORANGE, markersize=10, label=CONFIGURED)
        axes.axhline(rows[0][3], color=GREY, linestyle="--", linewidth=1, label=BEFORE)
        ticks = [value.replace(" ", "\n") for value in values]
        axes.set(xticks=places, xticklabels=ticks, xlim=(-0.5, len(places) - 0.5))
        axes.set_title(SYMBOLS.get(factor, factor))
        axes.grid(axis="y")
    for axes in panels[len(groups) :]:
        axes.remove()
    for axes in panels[::columns]:
        axes.set_ylabel(axis)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure
