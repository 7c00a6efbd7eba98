"""Pictures of unsupervised features, without labels: can they tell an object from its context?

    python tools/audit/inspect_features.py --config configs/demo.yaml --output runs/features.png

Reads stage 1's network, or the files of uss.features_dir, and draws one row per image:
    the image, with a cross at the pixel that the last picture compares with
    the first three principal components over all chosen images, as red, green and blue
    K-means clusters of the image's cells
    cosine similarity with the chosen pixel, black (0 or less) to white (1)

An --output that ends in .html is one self-contained page instead: a click chooses the pixel, and
all images are compared with it.

--separation also measures, with ground truth, how well K-means within the regions of stage 2's
pseudo labels separates the object from its context: the share of correct pixels if each cluster
counts as what it mostly is, object or context, compared with the share without clusters.
"""

import base64
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.config import Config, make_parser, parse
from core.data.labels import IGNORE, palette, read_label
from core.data.lists import Split, ground_truth, label_files, read_split
from core.debias import image_centroids, kmeans
from core.pictures import principal_components
from core.pipeline import Run, feature_source
from core.run.device import autocast, pick_device
from core.run.errors import UserError, run_script
from core.run.files import atomic_write, write_json
from tools.common.pages import encode, inline, templates

SIDE = 224  # pixels, height of a picture
CODES = 64  # directions that a page's cosines are computed from


def main() -> None:
    parser = make_parser("inspect_features.py", __doc__)
    parser.add_argument("--output", type=str, default="features.png", help="PNG or HTML to write")
    parser.add_argument("--images", type=int, default=8, help="number, evenly spread over the list")
    parser.add_argument("--ids", type=list[str], default=[], help="these images instead")
    parser.add_argument("--pixel", type=list[float], default=[0.5, 0.5], help="x, y in [0, 1]")
    parser.add_argument("--clusters", type=int, default=5, help="K of K-means within an image")
    parser.add_argument("--separation", action="store_true", help="score against ground truth")
    config, options = parse(parser)
    split = read_split(config.data, "train")
    chosen = chosen_images(split, options.ids, options.images)
    if len(options.pixel) != 2 or not all(0 <= p <= 1 for p in options.pixel):
        raise UserError(f"--pixel needs two numbers in [0, 1], x and y, got {options.pixel}")
    output = Path(options.output)
    if output.suffix not in (".png", ".html"):
        raise UserError(f"--output must end in .png or .html, got {output}")
    device = pick_device(config)
    features = feature_source(config, split, device, autocast(config, device))
    found = dict(features(chosen))
    shown = [*draw(split, found, options.clusters, config.seed)]
    make = {".png": contact_sheet, ".html": page}[output.suffix]
    with atomic_write(output) as tmp:
        tmp.write_bytes(make(shown, options.pixel))
    print(f"{len(chosen)} images in {output}")
    if options.separation:
        scores = separation(config, split, features)
        write_json(output.with_suffix(".json"), scores)
        for name, values in scores.items():
            print(f"{name}: {values['clusters']:.1%} with clusters, {values['none']:.1%} without")


def chosen_images(split: Split, ids: list[str], count: int) -> list[int]:
    """Indices of the images `ids`; if empty, of `count` images, evenly spread over the list."""
    unknown = sorted({*ids} - {*split.ids})
    if unknown:
        raise UserError(f"--ids: no image {unknown[0]!r} in the training list")
    if ids:
        return sorted(split.ids.index(i) for i in ids)
    if count < 1:
        raise UserError(f"--images must be at least 1, got {count}")
    return np.unique(np.linspace(0, len(split) - 1, count).round().astype(int)).tolist()


@dataclass
class Shown:
    """One image and its pictures, each (H, W, 3) or (h, w, 3) uint8 RGB."""

    id: str
    image: np.ndarray
    components: np.ndarray
    clusters: np.ndarray
    feat: Tensor  # (D, h, w)


def draw(split: Split, features: dict[int, Tensor], clusters: int, seed: int) -> Iterator[Shown]:
    """The pictures of every chosen image."""
    components = principal_components([*features.values()], seed)
    generator = torch.Generator().manual_seed(seed)
    for (index, feat), colours in zip(features.items(), components, strict=True):
        shape, points = feat.shape[1:], feat.flatten(1).T
        units = F.normalize(points, dim=1)
        assigned = kmeans(units, min(clusters, len(points)), generator)[1]
        image = split.read_image(index)
        size = (round(image.shape[1] * SIDE / image.shape[0]), SIDE)
        yield Shown(
            split.ids[index],
            cv2.resize(image, size, interpolation=cv2.INTER_AREA),
            colours.permute(1, 2, 0).contiguous().numpy(),
            palette()[1:][assigned.view(*shape).numpy()],
            feat,
        )


def contact_sheet(shown: Iterable[Shown], pixel: list[float]) -> bytes:
    """A PNG with a row of four pictures for each image."""
    rows = []
    for item in shown:
        shape, size = item.feat.shape[1:], item.image.shape[1::-1]
        y, x = cell_of(pixel, shape)
        cosine = F.cosine_similarity(item.feat, item.feat[:, y, x, None, None], dim=0)
        similar = (cosine.clamp(0, 1) * 255).round().byte()[..., None].expand(-1, -1, 3).numpy()
        centre = (int((x + 0.5) / shape[1] * size[0]), int((y + 0.5) / shape[0] * size[1]))
        cv2.drawMarker(item.image, centre, (255, 255, 255), cv2.MARKER_CROSS, 18, 5)
        cv2.drawMarker(item.image, centre, (220, 0, 0), cv2.MARKER_CROSS, 16, 2)
        pictures = (item.components, item.clusters, similar)
        large = [cv2.resize(p, size, interpolation=cv2.INTER_NEAREST) for p in pictures]
        rows.append(np.concatenate([item.image, *large], 1))
    width = max(row.shape[1] for row in rows)
    margins = [((0, 4), (0, width - row.shape[1]), (0, 0)) for row in rows]
    sheet = [np.pad(r, m, constant_values=255) for r, m in zip(rows, margins, strict=True)]
    return encode(np.concatenate(sheet), ".png")


def page(shown: Sequence[Shown], pixel: list[float]) -> bytes:
    """A self-contained HTML page in which a click chooses the pixel to compare with."""
    units = [F.normalize(item.feat.flatten(1).T, dim=1) for item in shown]
    every = torch.cat(units)
    energy, axes = torch.linalg.eigh(every.T @ every)  # ascending
    axes = axes[:, -CODES:]
    data = []
    for item, unit in zip(shown, units, strict=True):
        codes = (unit @ axes * 127).round().to(torch.int8).numpy()
        _, rows, columns = item.feat.shape
        text = base64.b64encode(codes.tobytes()).decode()
        data.append({"rows": rows, "columns": columns, "codes": text})
    y, x = cell_of(pixel, shown[0].feat.shape[1:])
    template = templates(Path(__file__).parent).get_template("inspect_features.html.j2")
    rows = [
        {
            "id": item.id,
            "image": inline(item.image, ".jpg"),
            "components": inline(item.components, ".png"),
            "clusters": inline(item.clusters, ".png"),
            "size": item.feat.shape[1:],
            "aspect": item.image.shape[1] / item.image.shape[0],
        }
        for item in shown
    ]
    start = {"index": 0, "y": y, "x": x}
    kept = f"{energy[-CODES:].sum() / energy.sum():.1%}"
    html = template.render(rows=rows, data=data, width=axes.shape[1], kept=kept, start=start)
    return html.encode()


def cell_of(pixel: list[float], shape: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the cell at the position (x, y) in [0, 1]^2."""
    y, x = (min(n - 1, int(p * n)) for p, n in zip(pixel[::-1], shape, strict=True))
    return y, x


def separation(config: Config, split: Split, features) -> dict[str, dict[str, float]]:
    """Share of correct pixels in pseudo-label regions with and without clusters, by class."""
    names = ("all", *config.data.classes)
    right, base, total = (np.zeros(len(names), np.int64) for _ in range(3))
    labels = label_files(Run(config).wsss_labels, split, "run train_wsss.py first")
    masks = ground_truth(config.data, split)
    for index, feat in features(range(len(split))):
        label = read_label(labels[index], len(config.data.classes))
        mask = read_label(masks[index], len(config.data.classes), label.shape)
        generator = torch.Generator().manual_seed(config.seed)
        settings = config.debias
        centroids, cells = image_centroids(
            feat, torch.from_numpy(label), settings.k_fg, settings.k_bg, generator
        )
        cells = cells.numpy().astype(np.int16)
        clusters = cv2.resize(cells, label.shape[::-1], interpolation=cv2.INTER_NEAREST)
        first = 0
        for c, vectors in centroids.items():
            own = range(first, first := first + len(vectors))
            region = (label == c) & (mask != IGNORE)
            if c == 0 or not region.any():
                continue
            objects = mask == c
            parts = [region & (clusters == k) for k in own]
            parts.append(region & ~np.isin(clusters, own))  # cells of another majority
            correct = sum(max((p & objects).sum(), (p & ~objects).sum()) for p in parts)
            plain = max((region & objects).sum(), (region & ~objects).sum())
            for row in (0, c):
                right[row] += correct
                base[row] += plain
                total[row] += region.sum()
    return {
        name: {"clusters": right[k] / total[k], "none": base[k] / total[k]}
        for k, name in enumerate(names)
        if total[k]
    }


if __name__ == "__main__":
    run_script(main)
