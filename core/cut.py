"""Where stage 3 cuts the similarity of Eq. 4: for each class, without masks.

The paper refines the similarity by a CRF and names no threshold. No single one would do: cosines of
different features have different scales, and classes differ in how much context their labels
contain. So each class gets its own cut t, from three groups of feature cells of its images:

    region  cells labelled as the class: its object and context, in unknown proportion
    ring    background cells next to the region: context
    kept    cells of the clusters that Eq. 3 keeps: object

If the region is a mixture of the other two, the share of objects in it follows from the means,

    pi = (mean(region) - mean(ring)) / (mean(kept) - mean(ring)).

Let R(t) and B(t) be the shares of the region and of the ring above t. As shares of the region, the
object cells above t are R - (1 - pi) B, and the union of the cells above t with all object cells is
pi + (1 - pi) B. The cut maximises the ratio of the two, the expected IoU. Scaling or shifting all
similarities changes nothing.
"""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

BINS = 4096  # of a histogram of cosines, from -1 to 1
RING = 2  # width of the ring, cells
MIN_GAIN = 0.1  # a class is left as it is if the best cut raises its expected IoU by less
GROUPS = ("region", "ring", "kept")
COLUMNS = ("cut", "slope", "object_share", "remaining", "contrast", "expected_iou")


def count_similarities(
    maps: np.ndarray, regions: np.ndarray, kept: np.ndarray, classes: Sequence[int]
) -> np.ndarray:
    """Histograms of one image's similarities: (T, 3, BINS) int64 numbers of cells in the region,
    the ring and the kept clusters of each class.

    Args:
        maps: (T, h, w) cosines with the debiased centroid of each class of the image.
        regions: (h, w) label of each cell: 0..C, others are ignored.
        kept: (h, w) bool, cells of the clusters that Eq. 3 keeps.
        classes: the T classes, 1..C.
    """
    bins = ((maps.astype(np.float64) + 1) * (BINS / 2)).astype(np.int64).clip(0, BINS - 1)
    counts = np.zeros((len(classes), len(GROUPS), BINS), np.int64)
    for k, label in enumerate(classes):
        region = regions == label
        near = cv2.dilate(region.astype(np.uint8), np.ones((2 * RING + 1, 2 * RING + 1), np.uint8))
        groups = (region, (near > 0) & (regions == 0), region & kept)
        counts[k] = [np.bincount(bins[k][group], minlength=BINS) for group in groups]
    return counts


def find_cuts(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The cut of each class, from (C, 3, BINS) cells by group and similarity.

    Returns:
        Arrays (C,) float64: `cut`, similarity t, NaN for a class that is left as it is; `slope` of
        the object's logit, that of two normal distributions with the groups' mean variance;
        `object_share`, pi, which is also the expected IoU without a cut; `remaining`, R(t);
        `contrast`, how often a kept cell exceeds a cell of the ring, 0.5 if they are alike;
        `expected_iou` of the best cut, taken or not.
    """
    rows = np.array([_cut(*groups) for groups in counts])
    return dict(zip(COLUMNS, rows.T, strict=True))


def _cut(region: np.ndarray, ring: np.ndarray, kept: np.ndarray) -> tuple[float, ...]:
    groups = np.stack([region, ring, kept]).astype(np.float64)
    if not groups.sum(1).all():
        return np.nan, 0.0, np.nan, 1.0, np.nan, np.nan
    groups /= groups.sum(1, keepdims=True)
    similarity = (np.arange(BINS) + 0.5) * (2 / BINS) - 1
    mean = groups @ similarity
    variance = (groups @ similarity**2 - mean**2)[1:].mean() + (2 / BINS) ** 2
    region, ring, kept = groups
    contrast = kept @ (np.cumsum(ring) - ring / 2)
    if mean[2] <= mean[1]:  # what Eq. 3 keeps is no more similar to its own mean than context
        return np.nan, 0.0, np.nan, 1.0, contrast, np.nan
    share = np.clip((mean[0] - mean[1]) / (mean[2] - mean[1]), 0.01, 1)
    above_region, above_ring = (1 - np.append(0, np.cumsum(g)[:-1]) for g in (region, ring))
    context = (1 - share) * above_ring
    iou = (above_region - context) / (share + context)
    best = iou.argmax()  # iou may exceed 1 where the mixture does not quite fit
    expected = min(iou[best], 1)
    if expected - share < MIN_GAIN:
        return np.nan, 0.0, share, 1.0, contrast, expected
    cut, slope = 2 / BINS * best - 1, (mean[2] - mean[1]) / variance
    return cut, slope, share, above_region[best], contrast, expected


def logit_map(maps: np.ndarray, cuts: dict[str, np.ndarray], classes: Iterable[int]) -> np.ndarray:
    """(T, h, w) similarities of an image's T classes -> (h, w) logit of "an object of any class".

    Classes without a cut take no part; -inf where there is no other.
    """
    rows = [c - 1 for c in classes]
    logits = (maps - cuts["cut"][rows, None, None]) * cuts["slope"][rows, None, None]
    return np.fmax.reduce(logits, initial=-np.inf)
