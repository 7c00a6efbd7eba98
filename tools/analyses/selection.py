"""Fig. 8: foreground centroids in the plane, which of them show objects, and which are selected."""

import dataclasses

import matplotlib.patheffects
import numpy as np
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from core.config import Config
from core.errors import UserError
from core.labels import read_label
from core.runs import Run
from core.splits import ground_truth, read_split
from tools.analyse_bias import BIASED, TARGET, overlaps, target_share
from tools.analyses.results import BLUE, GREY, ORANGE, Analysis, paper, percent, styled

SHOWN = 4000  # centroids in the picture; t-SNE takes half a minute for so many
CAPTION = (
    "Foreground centroids of all training images: targets (IoU of the cluster with its class in "
    f"ground truth above {TARGET}) and biased ones (below {BIASED}); others are not counted, as in "
    "the paper. Selected is the share alpha that lies farthest from the backgrounds (Eq. 3). "
    "Ground truth tells them apart here, and nowhere else."
)


def figure8(config: Config, listed: str | None, beside: str | None) -> tuple[Analysis, Figure]:
    """The table of Fig. 8 and its picture.

    Args:
        config: of a run whose stage 3 is finished.
        listed: list of the training images that have masks; None: all.
        beside: data set of whose published figures are added, "voc"; None: of none.

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
    labels, selected, overlap = (found[k][fg] for k in ("labels", "selected", "overlap"))
    counted = (overlap > TARGET) | (overlap < BIASED)
    if not counted.any():
        raise UserError("no centroid is a target or biased; are these masks of this data set?")
    rows, shares = [], {}
    for c, name in enumerate(data.classes, 1):
        ours = (labels == c) & np.isfinite(overlap)
        shares[name] = target_share(overlap[ours]), target_share(overlap[ours & selected])
        row = [name, int(ours.sum()), int((ours & selected).sum()), *map(percent, shares[name])]
        rows.append([*row, *_published(beside)])
    kinds = {"biased classes": data.biased_classes, "all classes": data.classes}
    for kind, names in kinds.items():
        pairs = [shares[n] for n in names if None not in shares[n]]
        if pairs:
            means = map(percent, np.mean(pairs, axis=0))
            rows.append([f"mean, {kind}", "", "", *means, *_published(beside)])
    caption = f"{CAPTION} {len(masks)} of {len(split)} training images have masks."
    columns = ["class", "centroids", "selected", "targets of all, %", "targets of selected, %"]
    columns += ["the paper's, selected, %"] if beside == "voc" else []
    analysis = Analysis("figure8", 80, "Fig. 8: what is selected", caption, columns, rows)
    vectors = found["vectors"][fg][counted]
    kept = np.linspace(0, len(vectors) - 1, min(SHOWN, len(vectors))).round().astype(int)
    parts = (labels[counted][kept], selected[counted][kept], overlap[counted][kept] > TARGET)
    return analysis, draw(embed(vectors[kept], config.seed), *parts, shares, beside)


def _published(beside: str | None) -> list[str]:
    least = paper()["figure8"]["least_targets_among_selected"]
    return [f"over {least}"] if beside == "voc" else []


def embed(vectors: np.ndarray, seed: int) -> np.ndarray:
    """(n, D) unit vectors -> (n, 2) by t-SNE, whose distances are then Eq. 1's but for a factor."""
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
    beside: str | None,
) -> Figure:
    """The plane, and the shares of targets among all and among the selected ones by class.

    Args:
        places: (n, 2) of the centroids shown.
        labels: (n,) their classes.
        selected: (n,) bool, whether each belongs to the farthest (Eq. 3).
        target: (n,) bool, whether it shows its class, or else is biased.
        shares: of each class, in 0..1; None where no centroid counts.
        beside: see `figure8`.
    """
    figure = Figure(figsize=(7.2, 3.8))
    left, right = figure.subplots(1, 2, width_ratios=(1.45, 1))
    for kind, colour, of_kind in (("target", BLUE, target), ("biased", ORANGE, ~target)):
        for chosen, strength, title in (
            (~selected, 0.22, kind),
            (selected, 1.0, f"{kind}, selected"),
        ):
            points = places[of_kind & chosen]
            style = {"s": 7, "c": colour, "alpha": strength, "linewidths": 0}
            left.scatter(*points.T, **style, label=f"{title} ({len(points)})", rasterized=True)
    outline = [matplotlib.patheffects.withStroke(linewidth=2, foreground="white")]
    for c, name in enumerate(shares, 1):
        if (labels == c).any():
            place = np.median(places[labels == c], axis=0)
            left.text(*place, name, ha="center", va="center", path_effects=outline, weight="bold")
    left.set(xticks=[], yticks=[], title="t-SNE of the foreground centroids")
    for side in left.spines.values():
        side.set_visible(False)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, markerscale=2)
    known = {name: pair for name, pair in shares.items() if None not in pair}
    for y, (every, chosen) in enumerate(known.values()):
        right.plot([100 * every, 100 * chosen], [y, y], color=GREY, linewidth=1, zorder=1)
    ends = 100 * np.array([*known.values()]).reshape(-1, 2)
    rows = np.arange(len(known))
    right.scatter(ends[:, 0], rows, s=22, color="white", edgecolors=BLUE, label="all", zorder=2)
    right.scatter(ends[:, 1], rows, s=22, color=BLUE, label="selected", zorder=3)
    if beside == "voc":
        least = paper()["figure8"]["least_targets_among_selected"]
        right.axvline(least, color=GREY, linestyle=":", label=f"the paper: all over {least} %")
    right.set(yticks=rows, yticklabels=[*known], xlabel="targets, %")
    right.set(title="Share of targets by class", xlim=(None, 101))
    right.invert_yaxis()
    right.grid(axis="x")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    return figure
