"""Draws what stage 3 did to a few images: the pictures of docs/method.md.

    python tools/audit/draw_method.py --config configs/demo.yaml --output docs

Reads the training images and the output of stages 1 to 3, no masks. Writes into `--output`:
    method.png      for each image: pseudo label, clusters, their distance to the backgrounds (Eq.
                    1, white is far), similarity (Eq. 4, white is 1), debiased label
    selection.png   for each class: the distances of its centroids, kept (Eq. 3) and left out
"""

import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import Config, make_parser, parse
from core.data.labels import palette, read_label
from core.data.lists import Split, read_split
from core.debias import debiased_score
from core.pipeline import Run, feature_source
from core.run.device import autocast, pick_device
from core.run.errors import run_script
from core.run.files import atomic_write, read_arrays
from tools.audit.inspect_features import chosen_images

REMEDY = "run make_debiased_labels.py with the same --config"
KEYS = ("images", "labels", "distance", "selected", "centroids")
TITLES = ("image", "pseudo label", "clusters", "distance", "similarity", "debiased label")


def main() -> None:
    parser = make_parser("draw_method.py", __doc__)
    parser.add_argument("--output", type=str, required=True, help="output folder")
    parser.add_argument("--ids", type=list[str], default=[], help="images; default: four")
    config, options = parse(parser)
    run, split = Run(config), read_split(config.data, "train")
    chosen = chosen_images(split, options.ids, 4)
    rows = read_arrays(run.debias / "centroids.npz", KEYS, REMEDY)
    figures = {
        "method.png": images_figure(config, run, split, chosen, rows),
        "selection.png": selection_figure(config.data.classes, rows),
    }
    for name, figure in figures.items():
        with atomic_write(Path(options.output) / name) as tmp:
            figure.savefig(tmp, format="png", dpi=80)
        print(Path(options.output) / name)


def images_figure(
    config: Config, run: Run, split: Split, chosen: list[int], rows: dict[str, np.ndarray]
) -> Figure:
    """A row of six pictures for each chosen image."""
    device = pick_device(config)
    feats = dict(feature_source(config, split, device, autocast(config, device))(chosen))
    centroids = torch.from_numpy(rows["centroids"])
    classes = rows["labels"] > 0
    span = np.quantile(rows["distance"][classes], (0.05, 0.95)) if classes.any() else (0, 1)
    figure = Figure((9.6, 1.7 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), len(TITLES), squeeze=False)
    for line, index in zip(axes, chosen, strict=True):
        image, name = split.read_image(index), split.ids[index]
        size = image.shape[:2]
        label, after = (
            read_label(f / f"{name}.png", len(config.data.classes))
            for f in (run.wsss_labels, run.debias / "labels")
        )
        (cells,) = read_arrays(run.debias / f"clusters/{name}.npz", ("cells",), REMEDY).values()
        clusters = cv2.resize(cells, size[::-1], interpolation=cv2.INTER_NEAREST)
        far = np.append(rows["distance"][rows["images"] == index], 0)[clusters]  # -1 is the last: 0
        score = debiased_score(feats[index], centroids, torch.from_numpy(split.tags[index]))
        score = cv2.resize(score.numpy(), size[::-1])
        grey = {"cmap": "gray", "vmin": span[0], "vmax": span[1]}
        line[0].imshow(image)
        line[1].imshow(palette()[label])
        line[2].imshow(palette()[np.where(clusters < 0, 255, clusters + 1)])
        line[3].imshow(far, **grey)
        line[4].imshow(score, cmap="gray", vmin=0, vmax=1)
        line[5].imshow(palette()[after])
        tags = np.array(config.data.classes)[split.tags[index]]
        line[0].set_ylabel(", ".join(tags))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], TITLES, strict=True):
        axis.set_title(title, fontsize=10)
    return figure


def selection_figure(classes: tuple[str, ...], rows: dict[str, np.ndarray]) -> Figure:
    """A row of dots for each class, one per centroid, the kept ones above the others."""
    figure = Figure((7.2, 0.8 + 0.4 * len(classes)), layout="constrained")
    axis = figure.subplots()
    rng = np.random.default_rng(0)
    for kept, colour, text in ((False, "0.6", "left out"), (True, "tab:blue", "kept")):
        mine = (rows["labels"] > 0) & (rows["selected"] == kept)
        place = rows["labels"][mine] - 1 + rng.uniform(0.05, 0.3, mine.sum()) * (-1 if kept else 1)
        axis.scatter(rows["distance"][mine], place, s=3, color=colour, label=text)
    axis.set_yticks(range(len(classes)), classes)
    axis.invert_yaxis()
    axis.set_xlabel("distance to the backgrounds")
    axis.legend(loc="upper left", markerscale=3)
    return figure


if __name__ == "__main__":
    run_script(main)
