"""Shows without masks which classes' pseudo labels are biased, by what, and how far to trust it.

    python tools/audit_bias.py --config configs/demo.yaml [--with-masks]

Reads the training images and tags, the pseudo labels and the output of make_debiased_labels.py
(debias.output_dir, or <run_dir>/debias), whoever made labels and features. Writes beside it, or to
--output DIR:
    audit.html   one self-contained page: the ranking, and of every class the removed parts beside
                 the backgrounds of images without that class that they resemble
    audit.csv    the ranking
    audit.png    the ranking with one example of each class
docs/audit.md says how to read them. `--with-masks` adds how right the removal was.
"""

import csv
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.config import Config, make_parser, parse
from core.data.labels import BACKGROUND, BIASED_ON_DISK, read_label, read_truth
from core.data.lists import Split, ground_truth, label_files, read_split
from core.pages import encode, inline, templates
from core.pipeline import Run
from core.run.errors import UserError, run_script
from core.run.files import atomic_write
from core.run.stage import check_upstream_of
from tools.analyse_bias import removal

NEAREST = 10  # a distance to backgrounds is the mean over so many nearest ones
COMPANY = 20  # so many nearest backgrounds tell in whose company a cluster is found
REFERENCE = 0.9  # of all backgrounds are at most as far from those of other images as the reference
BLIND = 1 / 3  # of the removed area: more than that without a witness is warned of
SMALLEST = 0.01  # of an image: smaller removed parts are no examples
SAMPLED = 5000  # at most so many backgrounds give the reference
SIDE = 160  # pixels, longest side of an example
STRIP = 96  # pixels, height of an example in the PNG
REMEDY = "run make_debiased_labels.py with the same --config first"


def main() -> None:
    parser = make_parser("tools/audit_bias.py", __doc__)
    parser.add_argument("--output", type=str | None, help="folder to write to")
    parser.add_argument("--examples", type=int, default=4, help="removed parts shown by class")
    parser.add_argument("--witnesses", type=int, default=3, help="backgrounds beside each")
    parser.add_argument("--with-masks", action="store_true", help="score the removal, too")
    parser.add_argument(
        "--stuff", type=str | None, help="folder of maps of what the ground shows: checks examples"
    )
    config, options = parse(parser)
    if options.examples < 0 or options.witnesses < 1:
        raise UserError("--examples must be at least 0 and --witnesses at least 1")
    run, split = Run(config), read_split(config.data, "train")
    masks = ground_truth(config.data, split) if options.with_masks or options.stuff else ()
    stuff = label_files(Path(options.stuff), split, "check --stuff") if options.stuff else ()
    check_upstream_of(config, split, "wsss", "uss", "debias")
    clusters = read_debiased(config, run, split)
    audits = rank(config, split, clusters, options.examples, options.witnesses)
    scores = {"AUC of the score against data.biased_classes": area_under_curve(audits)}
    if options.with_masks:
        check_removal(config, run, split, masks, audits)
    if stuff:
        name = "share of the backgrounds shown with biased classes that are of the part's kind"
        scores[name] = check_examples(clusters, audits, masks, stuff)
    output = Path(options.output or run.debias)
    write_csv(output / "audit.csv", audits)
    for example in (e for audit in audits for e in audit.examples):
        example.pictures = [crop(split, clusters, k) for k in (example.part, *example.witnesses)]
    with atomic_write(output / "audit.png") as tmp:
        tmp.write_bytes(chart(audits))
    path = output / "audit.html"
    with atomic_write(path) as tmp:
        template = templates(Path(__file__).parent).get_template("audit_bias.html.j2")
        values = {"audits": audits, "images": len(split), "scores": scores, "checked": bool(masks)}
        tmp.write_text(
            template.render(config=config, **values, inline=inline, blind=BLIND), "utf-8"
        )
    print(f"{'class':20}{'score':>7}{'removed':>9}{'odds':>7}{'gap':>6}")
    for audit in audits:
        figures = f"{audit.score:7.2f}{audit.removed:9.1%}{audit.odds:7.1f}{audit.gap:6.2f}"
        print(f"{audit.name:20}{figures}  {audit.warning}".rstrip())
    for name, value in scores.items():
        if value is not None:
            print(f"{name}: {value:.3f}")
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB), audit.csv and audit.png beside it")


@dataclass
class Clusters:
    """Stage 3's clusters of all images, one row each, image by image."""

    vectors: Tensor  # (N, D) float32 unit vectors
    labels: np.ndarray  # (N,) 0..C
    images: np.ndarray  # (N,) index of the image
    area: np.ndarray  # (N,) pixels that have the cluster's label
    removed: np.ndarray  # (N,) those of them that were marked biased
    pixels: np.ndarray  # (images,) size of each image
    labelled: np.ndarray  # (1 + C,) pixels by pseudo label
    marked: np.ndarray  # (1 + C,) those that were marked biased
    paths: list[tuple[Path, Path, Path]]  # of each image: cells, pseudo label, debiased label

    def pixels_of(self, row: int) -> np.ndarray:
        """(H, W) bool: a background cluster's pixels, or a class cluster's removed ones."""
        image = self.images[row]
        cells, label, debiased = read_maps(self.paths[image], len(self.labelled) - 1)
        inside = cells == row - np.searchsorted(self.images, image)
        return (
            inside
            & (label == self.labels[row])
            & ((self.labels[row] == BACKGROUND) | (debiased == BIASED_ON_DISK))
        )


def read_maps(
    paths: tuple[Path, Path, Path], num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cluster, pseudo label and debiased label of every pixel of an image, each (H, W)."""
    label = read_label(paths[1], num_classes)
    debiased = read_label(paths[2], num_classes, label.shape)
    (cells,) = read_arrays(paths[0], "cells")
    return cv2.resize(cells, label.shape[::-1], interpolation=cv2.INTER_NEAREST), label, debiased


def read_arrays(path: Path, *keys: str) -> list[np.ndarray]:
    """Arrays of one of stage 3's files."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[key] for key in keys]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from None


def read_debiased(config: Config, run: Run, split: Split) -> Clusters:
    """Reads what stage 3 wrote of this list of images.

    Raises:
        UserError: it is not finished, or was made of other images or labels.
    """
    debiased = label_files(run.debias / "labels", split, REMEDY)
    labels = label_files(run.wsss_labels, split, "set wsss.labels_dir to the pseudo labels")
    path = run.debias / "centroids.npz"
    cells = [run.debias / "clusters" / f"{i}.npz" for i in split.ids]
    missing = [p for p in (path, *cells) if not p.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing; {REMEDY}")
    vectors, values, images = read_arrays(path, "vectors", "labels", "images")
    size = len(config.data.classes) + 1
    if images.max(initial=0) >= len(split) or values.max(initial=0) >= size:
        raise UserError(f"{path} was made of another list of images or classes; {REMEDY}")
    first = np.searchsorted(images, np.arange(len(split) + 1))
    area, removed = (np.zeros(len(values), np.int64) for _ in range(2))
    labelled, marked = (np.zeros(size, np.int64) for _ in range(2))
    pixels, paths = [], [*zip(cells, labels, debiased, strict=True)]
    for k in tqdm(range(len(split)), "reading", unit="image"):
        own, label, after = read_maps(paths[k], size - 1)
        if own.max() >= first[k + 1] - first[k]:
            raise UserError(f"{path} was made of other images than {paths[k][0]}; {REMEDY}")
        rows = np.maximum(own, 0) + first[k]
        inside = own >= 0
        inside[inside] = values[rows[inside]] == label[inside]
        biased = after == BIASED_ON_DISK
        if (after != label)[~biased].any():
            raise UserError(f"{paths[k][2]} was not made of {paths[k][1]}; {REMEDY}")
        area += np.bincount(rows[inside], minlength=len(area))
        removed += np.bincount(rows[inside & biased], minlength=len(area))
        labelled += np.bincount(label[label < size], minlength=size)
        marked += np.bincount(label[biased & (label < size)], minlength=size)
        pixels.append(label.size)
    if not (values == BACKGROUND).any():
        raise UserError(f"{path} has no backgrounds; there is nothing to compare with")
    units = F.normalize(torch.from_numpy(vectors), dim=1)
    sizes = np.array(pixels)
    return Clusters(units, values, images, area, removed, sizes, labelled, marked, paths)


@dataclass
class Example:
    """A removed part and the nearest backgrounds of images without its class, as rows."""

    part: int
    witnesses: list[int]
    ids: list[str]  # of their images
    pictures: list[np.ndarray] = field(default_factory=list)


@dataclass
class Audit:
    """What was found about one class."""

    name: str
    images: int
    score: float = 0.0
    removed: float = 0.0  # share of the class's area that was marked biased
    odds: float = 1.0  # of meeting the removed part in images of the class, against others
    gap: float = 0.0  # between the two clusters' distances, in standard deviations of backgrounds
    unseen: float = 0.0  # share of the removed area without a witness
    warning: str = ""
    examples: list[Example] = field(default_factory=list)
    precision: float | None = None
    recall: float | None = None
    biased: bool | None = None  # by data.biased_classes, if there are any


def rank(
    config: Config, split: Split, clusters: Clusters, examples: int, witnesses: int
) -> list[Audit]:
    """Audits of all classes, the most biased one first."""
    background = np.flatnonzero(clusters.labels == BACKGROUND)
    reference, spread = backgrounds_own(clusters, background)
    known = set(config.data.biased_classes)
    audits = []
    for c, name in enumerate(config.data.classes, 1):
        audit = Audit(name, int(split.tags[:, c - 1].sum()))
        audit.biased = name in known if known else None
        audit.removed = clusters.marked[c] / max(1, clusters.labelled[c])
        audits.append(audit)
        rows = np.flatnonzero(clusters.labels == c)
        tagged = split.tags[clusters.images[background], c - 1]
        if not len(rows):
            audit.warning = "no image has it labelled: nothing to see"
            continue
        if tagged.all():
            audit.warning = "no image without it has a background to compare with"
            continue
        found = neighbours(clusters, rows, background, tagged, witnesses)
        judge(audit, clusters, rows, found, float(tagged.mean()), reference, spread)
        audit.examples = choose(clusters, split, rows, found, background, examples)
    return sorted(audits, key=lambda a: a.score, reverse=True)


def similarities(
    clusters: Clusters, rows: np.ndarray, background: np.ndarray
) -> Iterator[tuple[slice, Tensor]]:
    """Cosines (n, Nb) of some rows at a time with the backgrounds, -1 with their own images'."""
    others = clusters.vectors[background].T
    images = torch.from_numpy(clusters.images)
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        cosine = clusters.vectors[rows[part]] @ others
        yield part, cosine.masked_fill(images[rows[part], None] == images[background], -1)


def backgrounds_own(clusters: Clusters, background: np.ndarray) -> tuple[float, float]:
    """How far backgrounds are from those of other images: the reference, and the deviation."""
    rows = background[:: -(-len(background) // SAMPLED)]
    cosines = [mean_top(s) for _, s in similarities(clusters, rows, background)]
    distance = (1 - torch.cat(cosines)) / 2
    return float(distance.quantile(REFERENCE)), max(float(distance.std(correction=0)), 1e-6)


def mean_top(cosine: Tensor) -> Tensor:
    """(n, Nb) -> (n,) mean of the largest few; -2 where there are no columns."""
    if not cosine.shape[1]:
        return cosine.new_full((len(cosine),), -2)
    return cosine.topk(min(NEAREST, cosine.shape[1]), dim=1).values.mean(1)


@dataclass
class Neighbours:
    """Of n clusters of one class: their distances to backgrounds and the nearest of these."""

    without: np.ndarray  # (n,) distance to backgrounds of images without the class
    within: np.ndarray  # (n,) distance to those of other images with it
    company: np.ndarray  # (n,) share of images with it among those of the nearest backgrounds
    witnesses: np.ndarray  # (n, w) the nearest backgrounds of images without it


def neighbours(
    clusters: Clusters, rows: np.ndarray, background: np.ndarray, tagged: np.ndarray, count: int
) -> Neighbours:
    without, within, company, witnesses = [], [], [], []
    has = torch.from_numpy(tagged)
    order = np.flatnonzero(~tagged)
    for _, cosine in similarities(clusters, rows, background):
        apart = cosine[:, ~has]
        without.append((1 - mean_top(apart)) / 2)
        within.append((1 - mean_top(cosine[:, has])) / 2)
        nearest = cosine.topk(min(COMPANY, cosine.shape[1]), dim=1).indices
        company.append(has[nearest].float().mean(1))
        # An image has up to K_bg backgrounds; a witness is an image.
        best = apart.topk(min(4 * count, apart.shape[1]), dim=1).indices.numpy()
        witnesses += [distinct(order[b], clusters.images[background], count) for b in best]
    parts = (torch.cat(p).numpy() for p in (without, within, company))
    return Neighbours(*parts, witnesses)


def distinct(order: np.ndarray, images: np.ndarray, count: int) -> list[int]:
    """The first `count` of `order` that lie in different images."""
    first: dict[int, int] = {}
    for k in order:
        first.setdefault(images[k], k)
    return [*first.values()][:count]


def judge(
    audit: Audit,
    clusters: Clusters,
    rows: np.ndarray,
    found: Neighbours,
    base: float,
    reference: float,
    spread: float,
) -> None:
    """Fills in the figures of one class from its clusters `rows`.

    The score is `removed` times the logarithm of `odds`, or 0 where that is negative. `odds` is
    the odds ratio of "an image has this class" among the nearest backgrounds of the removed parts
    against all backgrounds: bias is context that keeps the class's company. Context of no class
    meets all of them alike, and 1 comes out however much is removed.
    """
    pairs = [np.flatnonzero(clusters.images[rows] == i) for i in np.unique(clusters.images[rows])]
    gaps = [np.ptp(found.without[pair]) for pair in pairs if len(pair) > 1]
    audit.gap = float(np.mean(gaps)) / spread if gaps else 0.0
    weight = clusters.removed[rows]
    if not weight.sum():
        audit.warning = "nothing of it was removed"
        return
    share = np.average(found.company, weights=weight)
    share = (share * COMPANY + base) / (COMPANY + 1)  # one more that knows nothing: never 0 or 1
    if 0 < base < 1:
        audit.odds = share / (1 - share) * (1 - base) / base
    audit.score = audit.removed * max(0.0, float(np.log(audit.odds)))
    unseen = (found.without > reference) & (found.within < found.without)
    audit.unseen = float(np.average(unseen, weights=weight))
    if audit.unseen > BLIND:
        audit.warning = "its surroundings hardly occur without it: bias may go unseen"


def choose(
    clusters: Clusters,
    split: Split,
    rows: np.ndarray,
    found: Neighbours,
    background: np.ndarray,
    count: int,
) -> list[Example]:
    """Parts most of which was removed: those nearest to their witnesses, in the class's company."""
    area, removed = clusters.area[rows], clusters.removed[rows]
    large = removed >= SMALLEST * clusters.pixels[clusters.images[rows]]
    kept = np.flatnonzero((removed > area / 2) & large)
    if not len(kept):
        return []
    near, company = -found.without[kept], found.company[kept]
    merit = near / max(near.std(), 1e-6) + company / max(company.std(), 1e-6)
    order = kept[np.argsort(-merit, kind="stable")]
    examples = []
    for k in distinct(order, clusters.images[rows], count):
        part, others = int(rows[k]), [int(background[w]) for w in found.witnesses[k]]
        ids = [split.ids[clusters.images[row]] for row in (part, *others)]
        examples.append(Example(part, others, ids))
    return examples


def check_removal(
    config: Config, run: Run, split: Split, masks: Sequence[Path], audits: list[Audit]
) -> None:
    """Fills in precision and recall."""
    truth = [read_truth(p, len(config.data.classes)) for p in masks]
    classes = removal(config, run, run.debias / "labels", split, truth)["classes"]
    for audit in audits:
        audit.precision = classes[audit.name]["precision"]
        audit.recall = classes[audit.name]["context_removed"]


def area_under_curve(audits: list[Audit]) -> float | None:
    """Chance that a class known to be biased has a higher score than one known not to be."""
    biased = np.array([a.score for a in audits if a.biased])
    others = np.array([a.score for a in audits if a.biased is False])
    if not len(biased) or not len(others):
        return None
    return float((np.sign(biased[:, None] - others) / 2 + 0.5).mean())


def check_examples(
    clusters: Clusters, audits: list[Audit], masks: Sequence[Path], stuff: Sequence[Path]
) -> float | None:
    """Share of witnesses whose ground mostly shows what that of the removed part does."""

    def kind(row: int) -> int | None:
        image = clusters.images[row]
        inside = clusters.pixels_of(row) & (read_label(masks[image]) == BACKGROUND)
        values = read_label(stuff[image])[inside]
        return int(np.bincount(values).argmax()) if len(values) else None

    examples = [e for a in audits if a.biased is not False for e in a.examples]
    same = [kind(e.part) == kind(w) for e in examples for w in e.witnesses]
    return float(np.mean(same)) if same else None


def crop(split: Split, clusters: Clusters, row: int) -> np.ndarray:
    """The part of an image around a cluster, the rest of it dimmed: at most SIDE pixels."""
    image = split.read_image(int(clusters.images[row]))
    inside = clusters.pixels_of(row)
    if inside.shape != image.shape[:2]:
        raise UserError(f"{split.images[clusters.images[row]]} has another size than its label")
    x, y, width, height = cv2.boundingRect(inside.astype(np.uint8))
    margin = max(4, max(width, height) // 8)
    window = tuple(slice(max(0, a - margin), a + n + margin) for a, n in ((y, height), (x, width)))
    dimmed = np.where(inside[..., None], image, image // 4 + 96).astype(np.uint8)[window]
    edge = cv2.morphologyEx(inside.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3)))[window]
    dimmed[(edge > 0) & ~inside[window]] = (255, 0, 255)
    scale = SIDE / max(dimmed.shape)
    size = [max(1, round(n * scale)) for n in dimmed.shape[1::-1]]
    return cv2.resize(dimmed, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def write_csv(path: Path, audits: list[Audit]) -> None:
    """One line per class in the order of the ranking; empty where nothing is known."""
    keys = ("name", "images", "score", "removed", "odds", "gap", "unseen", "warning")
    keys += ("precision", "recall", "biased")
    with atomic_write(path) as tmp, tmp.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("rank", *keys))
        for number, audit in enumerate(audits, 1):
            values = (getattr(audit, key) for key in keys)
            writer.writerow((number, *(f"{v:.4f}" if isinstance(v, float) else v for v in values)))


def chart(audits: list[Audit]) -> bytes:
    """A PNG: of each class a bar, and its first removed part beside the witnesses."""
    row, left, bar = STRIP + 8, 150, 260
    shown = [[fit(p) for p in a.examples[0].pictures] if a.examples else [] for a in audits]
    pictures = max((sum(p.width + 8 for p in line) for line in shown), default=0)
    sheet = Image.new("RGB", (left + bar + 80 + pictures, row * len(audits) + 40), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    draw.text((10, 10), "bias score; a removed part | backgrounds without the class", "#333", font)
    best = max((a.score for a in audits), default=0) or 1
    for k, (audit, line) in enumerate(zip(audits, shown, strict=True)):
        top = 40 + k * row
        draw.text((10, top + 30), audit.name[:18], "black", font)
        length = round(bar * audit.score / best)
        draw.rectangle((left, top + 24, left + length, top + 54), "#b0148c")
        text = f"{audit.score:.2f}" + (" (!)" if audit.warning else "")
        draw.text((left + length + 6, top + 30), text, "black", font)
        x = left + bar + 80
        for picture in line:
            sheet.paste(picture, (x, top + (STRIP - picture.height) // 2))
            x += picture.width + 8
    return encode(np.array(sheet), ".png")


def fit(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    image.thumbnail((STRIP, STRIP))
    return image


if __name__ == "__main__":
    run_script(main)
