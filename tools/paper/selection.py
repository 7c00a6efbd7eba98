"""Fig. 8: foreground centroids in a plane; which show objects, and which are selected."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure, SubFigure
from sklearn.manifold import TSNE

from core.config import Config
from core.data.labels import read_label
from core.data.lists import ground_truth, read_split
from core.pipeline import Run
from core.run.errors import UserError
from tools.audit.analyse_bias import BIASED, TARGET, overlaps, target_share
from tools.paper.results import (
    BLUE,
    GREY,
    LIGHT,
    ORANGE,
    STYLE,
    Analysis,
    paper,
    percent,
    styled,
)

SHOWN = 4000  # centroids in the picture; t-SNE takes half a minute for so many
PANELS, COLUMNS = 20, 4  # classes in the picture, those with most centroids
CAPTION = (
    "Foreground centroids of all training images: targets (IoU of the cluster with its class in "
    f"ground truth above {TARGET}) and biased ones (below {BIASED}); others are not counted, as in "
    "the paper. By this rule, a small part of a large object is also biased: the last column "
    "counts biased clusters that are mostly on their class. Selected is the share alpha that is "
    "farthest from the backgrounds (Eq. 3). Ground truth is used for this comparison only."
)


def figure8(config: Config, listed: str | None, data_set: str | None) -> tuple[Analysis, Figure]:
    """The table of Fig. 8 and its picture.

    Args:
        config: configuration of a run whose stage 3 is finished.
        listed: list of the training images that have masks; None: all.
        data_set: data set whose published figures are added, "voc"; None: no published figures.

    Raises:
        UserError: centroids or masks are missing, or no centroid can be judged.
    """
    split = read_split(config.data, "train")
    data = dataclasses.replace(config.data, train_list=listed or config.data.train_list)
    judged = read_split(data, "train")
    masks = dict(zip(judged.ids, ground_truth(data, judged), strict=True))

    def mask(image: int) -> np.ndarray | None:
        path = masks.get(split.ids[image])
        return None if path is None else read_label(path, len(data.classes))

    found = overlaps(Run(config).debias, split, mask)
    fg = found["labels"] > 0
    labels, selected, overlap, inside = (
        found[key][fg] for key in ("labels", "selected", "overlap", "inside")
    )
    counted = (overlap > TARGET) | (overlap < BIASED)
    if not counted.any():
        raise UserError("no centroid is a target or biased; do the masks belong to this data set?")
    rows, shares = [], {}
    for c, name in enumerate(data.classes, 1):
        ours = (labels == c) & np.isfinite(overlap)
        shares[name] = target_share(overlap[ours]), target_share(overlap[ours & selected])
        wrong = ours & selected & (overlap < BIASED)
        row = [name, int(ours.sum()), int((ours & selected).sum()), *map(percent, shares[name])]
        row += [int(wrong.sum()), int((wrong & (inside > 0.5)).sum())]
        rows.append([*row, *_published(data_set)])
    kinds = {"biased classes": data.biased_classes, "all classes": data.classes}
    for kind, names in kinds.items():
        pairs = [shares[n] for n in names if None not in shares[n]]
        if pairs:
            means = map(percent, np.mean(pairs, axis=0))
            rows.append([f"mean, {kind}", "", "", *means, "", "", *_published(data_set)])
    caption = f"{CAPTION} {len(masks)} of {len(split)} training images have masks."
    columns = ["class", "centroids", "selected", "targets of all, %", "targets of selected, %"]
    columns += ["biased of selected", "of these on the object"]
    columns += ["the paper's, selected, %"] if data_set == "voc" else []
    analysis = Analysis("figure8", 80, "Fig. 8: what is selected", caption, columns, rows)
    vectors = found["vectors"][fg][counted]
    kept = np.linspace(0, len(vectors) - 1, min(SHOWN, len(vectors))).round().astype(int)
    parts = (labels[counted][kept], selected[counted][kept], overlap[counted][kept] > TARGET)
    return analysis, draw(embed(vectors[kept], config.seed), *parts, shares, data_set)


def _published(data_set: str | None) -> list[str]:
    least = paper()["figure8"]["least_targets_among_selected"]
    return [f"over {least}"] if data_set == "voc" else []


def embed(vectors: np.ndarray, seed: int) -> np.ndarray:
    """(n, D) unit vectors -> (n, 2) by t-SNE on the distance of Eq. 1, up to a factor."""
    if len(vectors) < 3:
        return np.zeros((len(vectors), 2))
    perplexity = min(30, (len(vectors) - 1) / 3)
    return TSNE(2, perplexity=perplexity, random_state=seed).fit_transform(vectors)


@styled
def draw(
    places: np.ndarray,
    labels: np.ndarray,
    selected: np.ndarray,
    target: np.ndarray,
    shares: dict[str, tuple[float | None, float | None]],
    data_set: str | None,
) -> Figure:
    """The plane, and by class the shares of targets among all and among the selected centroids.

    Args:
        places: (n, 2) positions of the centroids shown.
        labels: (n,) their classes, 1..C.
        selected: (n,) bool, whether each is among the farthest (Eq. 3).
        target: (n,) bool, whether each shows its class; the others are biased.
        shares: by class, both shares in 0..1; None if no centroid counts.
        data_set: see `figure8`.
    """
    panels = np.argsort(-np.bincount(labels, minlength=len(shares) + 1)[1:], kind="stable")
    panels = sorted(panels[:PANELS].tolist())
    known = {name: pair for name, pair in shares.items() if None not in pair}
    height = max(1.1 * -(-len(panels) // COLUMNS), 0.17 * len(known)) + 0.9
    figure = Figure(figsize=(7.6, height))
    left, right = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    left.suptitle("t-SNE of the foreground centroids", size=STYLE["axes.titlesize"])
    grid = left.subplots(-(-len(panels) // COLUMNS), COLUMNS, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, c in zip(grid, panels, strict=False):
        axes.set_title([*shares][c], size=STYLE["font.size"])
        kinds = {"other classes": (labels != c + 1, LIGHT, 1.0)}
        for kind, colour, of_kind in (("target", BLUE, target), ("biased", ORANGE, ~target)):
            ours = of_kind & (labels == c + 1)
            kinds[kind] = ours & ~selected, colour, 0.3
            kinds[f"{kind}, selected"] = ours & selected, colour, 1.0
        for kind, (chosen, colour, strength) in kinds.items():
            style = {"s": 6, "color": colour, "alpha": strength, "linewidths": 0}
            axes.scatter(*places[chosen].T, **style, label=kind, rasterized=True)
    handles, names = grid[0].get_legend_handles_labels()
    left.legend(handles, names, loc="outside lower center", ncols=3, markerscale=2)
    _draw_shares(right, known, data_set)
    return figure


def _draw_shares(
    figure: SubFigure, shares: dict[str, tuple[float, float]], data_set: str | None
) -> None:
    axes, rows = figure.subplots(), np.arange(len(shares))
    every, chosen = 100 * np.array([*shares.values()]).reshape(-1, 2).T
    axes.hlines(rows, every, chosen, color=GREY, linewidth=1)
    axes.scatter(every, rows, s=20, color="white", edgecolors=BLUE, label="all", zorder=2)
    axes.scatter(chosen, rows, s=20, color=BLUE, label="selected", zorder=3)
    if data_set == "voc":
        least = paper()["figure8"]["least_targets_among_selected"]
        axes.axvline(least, color=GREY, linestyle=":", label=f"paper: > {least}")
    axes.set(yticks=rows, yticklabels=[*shares], xlabel="targets, %", xlim=(None, 101))
    axes.set_title("Targets by class")
    axes.invert_yaxis()
    axes.grid(axis="x")
    figure.legend(loc="outside lower center", ncols=2)
