"""Which classes are biased: removed clusters and the backgrounds that they resemble."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from core.config import Config
from core.data.labels import BACKGROUND
from core.data.lists import Split
from tools.audit.clusters import Clusters
from tools.common.cuts import ClassCut

NEAREST = 10  # the distance to backgrounds is the mean over this many nearest ones
COMPANY = 20  # nearest backgrounds that show which classes a cluster occurs with
REFERENCE = 0.9  # quantile of the distances between backgrounds of different images
BLIND = 1 / 3  # a larger share of the removed area without a witness gives a warning
SMALLEST = 0.01  # share of an image; smaller removed parts are not shown
FEW = 5  # photographs; a class with fewer gets a warning
SAMPLED = 5000  # largest number of backgrounds that give the reference


@dataclass
class Example:
    """A removed part and its witnesses, the nearest backgrounds in images without its class."""

    part: int  # row of `Clusters`
    witnesses: list[int]  # rows of `Clusters`
    ids: list[str]  # image ids of the part and the witnesses
    pictures: list[np.ndarray] = field(default_factory=list)


@dataclass
class Audit:
    """The findings about one class."""

    name: str
    images: int
    score: float = 0.0
    removed: float = 0.0  # share of the class's area that was marked biased
    odds: float = 1.0  # odds ratio: do surroundings like the removed part come with the class?
    gap: float = 0.0  # between the two clusters' distances, in standard deviations of backgrounds
    unseen: float = 0.0  # share of the removed area without a witness
    warning: str = ""
    examples: list[Example] = field(default_factory=list)
    precision: float | None = None
    recall: float | None = None
    biased: bool | None = None  # by data.biased_classes; None if that is empty
    cut: ClassCut = field(default_factory=ClassCut)
    labelled: int = 0  # pixels of the class's labelled area

    @property
    def warnings(self) -> list[str]:
        """The audit's own warnings and stage 3's, as sentences."""
        doubts = [f"{self.warning[:1].upper()}{self.warning[1:]}."] if self.warning else []
        have = "one photograph has" if self.images == 1 else f"{self.images} photographs have"
        few = f"Only {have} it: too few to trust these figures."
        return [*([few] if 0 < self.images < FEW else []), *doubts, *self.cut.warnings]


def context_share(audits: list[Audit]) -> float | None:
    """Estimated share of context in the whole labelled area; None without estimates."""
    known = [a for a in audits if a.cut.object_share is not None]
    area = sum(a.labelled for a in known)
    return sum(a.labelled * (1 - a.cut.object_share) for a in known) / area if area else None


def rank(
    config: Config, split: Split, clusters: Clusters, examples: int, witnesses: int
) -> list[Audit]:
    """Audits of all classes, the most biased class first.

    Args:
        config: experiment, with the class names.
        split: training images.
        clusters: stage 3's clusters of these images.
        examples: largest number of removed parts shown per class.
        witnesses: number of backgrounds shown with each of them.
    """
    background = np.flatnonzero(clusters.labels == BACKGROUND)
    reference, spread = backgrounds_own(clusters, background)
    known = set(config.data.biased_classes)
    audits = []
    for c, name in enumerate(config.data.classes, 1):
        audit = Audit(name, int(split.tags[:, c - 1].sum()))
        audit.biased = name in known if known else None
        audit.labelled = int(clusters.labelled[c])
        audit.removed = clusters.marked[c] / max(1, audit.labelled)
        audits.append(audit)
        rows = np.flatnonzero(clusters.labels == c)
        tagged = split.tags[clusters.images[background], c - 1]
        if not len(rows):
            audit.warning = "no image has it labelled: nothing to audit"
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
    """(n, Nb) cosines of some rows at a time with the backgrounds; -1 within the same image."""
    others = clusters.vectors[background].T
    images = torch.from_numpy(clusters.images)
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        cosine = clusters.vectors[rows[part]] @ others
        yield part, cosine.masked_fill(images[rows[part], None] == images[background], -1)


def backgrounds_own(clusters: Clusters, background: np.ndarray) -> tuple[float, float]:
    """Distance of backgrounds to other images' backgrounds: reference quantile and deviation."""
    rows = background[:: -(-len(background) // SAMPLED)]
    cosines = [mean_top(s) for _, s in similarities(clusters, rows, background)]
    distance = (1 - torch.cat(cosines)) / 2
    return float(distance.quantile(REFERENCE)), max(float(distance.std(correction=0)), 1e-6)


def mean_top(cosine: Tensor) -> Tensor:
    """(n, Nb) -> (n,) mean of the largest few cosines; -2 without columns."""
    if not cosine.shape[1]:
        return cosine.new_full((len(cosine),), -2)
    return cosine.topk(min(NEAREST, cosine.shape[1]), dim=1).values.mean(1)


@dataclass
class Neighbours:
    """Distances of one class's n clusters to backgrounds, and the nearest backgrounds."""

    without: np.ndarray  # (n,) distance to backgrounds of images without the class
    within: np.ndarray  # (n,) distance to backgrounds of other images with the class
    company: np.ndarray  # (n,) share of the nearest backgrounds whose images have the class
    witnesses: list[list[int]]  # (n, w) nearest backgrounds in images without the class


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
    """The first `count` items of `order` from different images."""
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

    The score is `removed` times the logarithm of `odds`, and at least 0. `odds` is the odds ratio
    of "the image has this class" among the nearest backgrounds of the removed parts, relative to
    all backgrounds: bias is context that mostly occurs with the class. Context that occurs equally
    with all classes has odds of 1, however much of it is removed.
    """
    pairs = [np.flatnonzero(clusters.images[rows] == i) for i in np.unique(clusters.images[rows])]
    gaps = [np.ptp(found.without[pair]) for pair in pairs if len(pair) > 1]
    audit.gap = float(np.mean(gaps)) / spread if gaps else 0.0
    weight = clusters.removed[rows]
    if not weight.sum():
        audit.warning = "nothing of it was removed"
        return
    share = np.average(found.company, weights=weight)
    share = (share * COMPANY + base) / (COMPANY + 1)  # one more at the base rate: never 0 or 1
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
    """Parts that are mostly removed, starting with those nearest to witnesses and to backgrounds
    with the class."""
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
