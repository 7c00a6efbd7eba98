"""Stage 3 at every pixel without upsampling the features, exactly.

Bilinear upsampling is linear, so D channels never have to be brought to the image's size:

    (U f)_p . c = U (f . c)_p         similarity to a vector: one upsampled channel
    sum (U f)_p = f U^T 1_S           the sum over a set S of pixels: the adjoint of its mask
    |(U f)_p|^2 = a quadratic form    of inner products of the four cells around the pixel

Full-size K-means and cosines cost a few passes over the pixels that way. `core.debias` on upsampled
features gives the same, slowly, and is what the tests compare with.
"""

from functools import lru_cache

import numpy as np

from core.data.labels import BACKGROUND, IGNORE
from core.run.compiled import compiled

RESTARTS = 10  # of K-means, scikit-learn's for many years
CELL_STEPS, STEPS = 20, 50  # at most, on the cells and at the pixels
SETTLED = 0.0005  # share of pixels that may still change when K-means stops


class Upsampled:
    """The features of one image as bilinear upsampling would have them at its pixels.

    Args:
        feat: (D, h, w) float32.
        size: (H, W) of the image.
    """

    def __init__(self, feat: np.ndarray, size: tuple[int, int]):
        self.shape, self.size = feat.shape[1:], size
        self.cells = np.ascontiguousarray(feat.reshape(len(feat), -1))  # (D, h w)
        self.axes = (*_axis(self.shape[0], size[0]), *_axis(self.shape[1], size[1]))
        self.scale = _inverse_lengths(np.ascontiguousarray(feat), *self.axes)  # (H, W)

    def maps(self, vectors: np.ndarray) -> np.ndarray:
        """(K, h, w) inner products of the cells with (K, D) vectors."""
        return (vectors @ self.cells).reshape(-1, *self.shape)

    def similarity(self, vectors: np.ndarray) -> np.ndarray:
        """(H, W) float32 cosine with the nearest of (K, D) unit vectors."""
        return _highest(self.maps(vectors), self.scale, *self.axes)

    def sums(self, adjoint: np.ndarray) -> np.ndarray:
        """(K, D) sums of unit pixel vectors, from the (K, h, w) adjoints of clusters."""
        return adjoint.reshape(len(adjoint), -1) @ self.cells.T


@lru_cache(64)
def _axis(cells: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel the cell before it and the weight of the next one, as torch interpolates."""
    place = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    before = np.minimum(place.astype(np.int64), max(0, cells - 2))
    weight = (place - before).astype(np.float32)
    if cells == 1:
        weight[:] = 0
    return before, weight


@compiled
def _inverse_lengths(feat, y0, ty, x0, tx):
    """(H, W) float32: 1 over the length of each pixel's upsampled feature; 0 where that is 0."""
    depth, rows, cols = feat.shape
    down, right = min(1, rows - 1), min(1, cols - 1)
    own = np.zeros((rows, cols), np.float32)
    beside, below = np.zeros_like(own), np.zeros_like(own)
    falling, rising = np.zeros_like(own), np.zeros_like(own)  # diagonals
    for d in range(depth):
        f = feat[d]
        for y in range(rows):
            z = min(y + down, rows - 1)
            for x in range(cols):
                r = min(x + right, cols - 1)
                own[y, x] += f[y, x] * f[y, x]
                beside[y, x] += f[y, x] * f[y, r]
                below[y, x] += f[y, x] * f[z, x]
                falling[y, x] += f[y, x] * f[z, r]
                rising[y, x] += f[y, r] * f[z, x]
    out = np.empty((len(y0), len(x0)), np.float32)
    two = np.float32(2)
    for i in range(len(y0)):
        y, q = y0[i], ty[i]
        z, p = min(y + down, rows - 1), np.float32(1) - q
        for j in range(len(x0)):
            x, t = x0[j], tx[j]
            r, s = min(x + right, cols - 1), np.float32(1) - t
            a, b, c, d = p * s, p * t, q * s, q * t
            square = a * a * own[y, x] + b * b * own[y, r] + c * c * own[z, x] + d * d * own[z, r]
            square += two * (a * b * beside[y, x] + c * d * beside[z, x])
            square += two * (a * c * below[y, x] + b * d * below[y, r])
            square += two * (a * d * falling[y, x] + b * c * rising[y, x])
            out[i, j] = 1 / np.sqrt(square) if square > 1e-24 else 0
    return out


@compiled
def _highest(maps, scale, y0, ty, x0, tx):
    """(H, W): scale times the highest of the upsampled (K, h, w) maps."""
    count, rows, cols = maps.shape
    out = np.empty(scale.shape, np.float32)
    line = np.empty(cols, np.float32)
    for i in range(len(y0)):
        y, z, q = y0[i], min(y0[i] + 1, rows - 1), ty[i]
        for k in range(count):
            for x in range(cols):
                line[x] = maps[k, y, x] + q * (maps[k, z, x] - maps[k, y, x])
            for j in range(len(x0)):
                x = x0[j]
                value = line[x] + tx[j] * (line[min(x + 1, cols - 1)] - line[x])
                if k == 0 or value > out[i, j]:
                    out[i, j] = value
        for j in range(len(x0)):
            out[i, j] *= scale[i, j]
    return out


@compiled
def _assign(label, cluster, first, count, maps, scale, y0, ty, x0, tx):
    """One step of K-means at the pixels: each takes the best cluster of its region.

    Args:
        label: (H, W) uint8.
        cluster: (H, W) int16, the cluster of each pixel; overwritten, -1 where not clustered.
        first: (256,) the first cluster of each label's region; -1: not clustered.
        count: (256,) clusters of the region.
        maps: (K, h, w) inner products of the cells with the centroids.
        scale: (H, W) weight of each pixel.

    Returns:
        How many pixels changed, (K, h, w) adjoints of the weighted clusters, and (K,) pixels of
        each.
    """
    total, rows, cols = maps.shape
    adjoint = np.zeros(maps.shape, np.float32)
    sizes = np.zeros(total, np.int64)
    lines, shares = np.empty((total, cols), np.float32), np.empty((total, cols), np.float32)
    changed = 0
    for i in range(len(y0)):
        y, z, q = y0[i], min(y0[i] + 1, rows - 1), ty[i]
        for k in range(total):
            for x in range(cols):
                lines[k, x] = maps[k, y, x] + q * (maps[k, z, x] - maps[k, y, x])
                shares[k, x] = 0
        for j in range(len(x0)):
            best = first[label[i, j]]
            if best >= 0:
                x, r, t = x0[j], min(x0[j] + 1, cols - 1), tx[j]
                high = lines[best, x] + t * (lines[best, r] - lines[best, x])
                for k in range(best + 1, best + count[label[i, j]]):
                    value = lines[k, x] + t * (lines[k, r] - lines[k, x])
                    if value > high:
                        best, high = k, value
                shares[best, x] += (1 - t) * scale[i, j]
                shares[best, r] += t * scale[i, j]
                sizes[best] += 1
            changed += cluster[i, j] != best
            cluster[i, j] = best
        for k in range(total):
            for x in range(cols):
                adjoint[k, y, x] += (1 - q) * shares[k, x]
                adjoint[k, z, x] += q * shares[k, x]
    return changed, adjoint, sizes


def pixel_centroids(
    feat: np.ndarray, label: np.ndarray, k_fg: int, k_bg: int, rng: np.random.Generator
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Clusters the pixels of each labelled region of one image (Sec. 3.2).

    Spherical K-means from the best of `RESTARTS` solutions on the cells, weighted by the region's
    share of each. A region of fewer than max(4, K) pixels has one centroid, its mean.

    Args:
        feat: (D, h, w) float32.
        label: (H, W) uint8 pseudo label, 0..C or 255.
        k_fg: clusters of each class region, K_fg.
        k_bg: clusters of the background region, K_bg.
        rng: of K-means' seeds.

    Returns:
        {label: (K, D) float32 unit centroids} for the labels present, ascending, and (h, w) int64:
        which of the centroids, counted through in that order, the pixel in the middle of each cell
        belongs to; -1 where ignored.
    """
    up = Upsampled(feat, label.shape)
    pixels = np.bincount(label.ravel(), minlength=256)
    values = [v for v in pixels.nonzero()[0].tolist() if v != IGNORE]
    if not values:
        return {}, np.full(up.shape, -1)
    first, count = np.full(256, -1), np.zeros(256, np.int64)
    first[values], count[values] = np.arange(len(values)), 1
    cluster = np.full(label.shape, -2, np.int16)
    whole = np.zeros((len(values), *up.shape), np.float32)  # one cluster for each region
    _, weights, _ = _assign(label, cluster, first, count, whole, np.ones_like(up.scale), *up.axes)
    lengths = np.linalg.norm(up.cells, axis=0)
    units = (up.cells / np.maximum(lengths, 1e-12)).T
    starts = []
    for value, weight in zip(values, weights, strict=True):
        k = k_bg if value == BACKGROUND else k_fg
        k = k if pixels[value] >= max(4, k) else 1
        inside = weight.ravel() > 0
        starts.append(cell_kmeans(units[inside], weight.ravel()[inside], k, rng))
        first[value], count[value] = sum(map(len, starts[:-1])), len(starts[-1])
    centroids = np.concatenate(starts)
    cluster.fill(-2)
    for _ in range(STEPS):
        changed, adjoint, sizes = _assign(
            label, cluster, first, count, up.maps(centroids), up.scale, *up.axes
        )
        centroids = _units(up.sums(adjoint), centroids)
        if changed <= SETTLED * label.size:
            break
    owner = np.repeat(values, count[values])
    kept = sizes > 0  # a cluster may have lost its last pixel
    renumbered = np.append(np.cumsum(kept) - 1, -1)  # the last: -1 stays
    middle = [
        (2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(up.shape, label.shape, strict=True)
    ]
    cells = renumbered[cluster[np.ix_(*middle)]]
    return {v: centroids[kept & (owner == v)] for v in values}, cells


def cell_kmeans(
    points: np.ndarray, weight: np.ndarray, k: int, rng: np.random.Generator
) -> np.ndarray:
    """Weighted spherical K-means with k-means++ seeds; the tightest of `RESTARTS`, run together.

    Args:
        points: (n, D) unit vectors, n >= 1.
        weight: (n,) positive.
        k: clusters; some may come out equal or without a point.
        rng: of the seeds.

    Returns:
        (k, D) unit centroids.
    """
    if k == 1:
        return _units(weight[None] @ points, points[:1])
    weighted = points * weight[:, None]
    chance = weight / weight.sum()
    centroids = points[rng.choice(len(points), RESTARTS, p=chance)][:, None]  # (R, 1, D)
    for _ in range(k - 1):
        gap = (1 - (points @ centroids.reshape(-1, points.shape[1]).T)).clip(0)
        gap = (
            gap.reshape(len(points), RESTARTS, -1).min(2) * chance[:, None]
            + 1e-12 * chance[:, None]
        )
        edges = gap.cumsum(0)
        drawn = (edges < rng.random(RESTARTS) * edges[-1]).sum(0).clip(0, len(points) - 1)
        centroids = np.concatenate([centroids, points[drawn][:, None]], 1)
    before = None
    for _ in range(CELL_STEPS):
        similarity = (points @ centroids.reshape(-1, points.shape[1]).T).reshape(-1, RESTARTS, k)
        nearest = similarity.argmax(2)  # (n, R)
        if before is not None and np.array_equal(nearest, before):
            break
        before = nearest
        member = (nearest[..., None] == np.arange(k)).reshape(len(points), -1)
        sums = member.T.astype(np.float32) @ weighted
        centroids = _units(sums, centroids.reshape(sums.shape)).reshape(centroids.shape)
    tightness = (similarity.max(2) * weight[:, None]).sum(0)
    return centroids[tightness.argmax()]


def _units(sums: np.ndarray, instead: np.ndarray) -> np.ndarray:
    """Rows of unit length; those of `instead` where a sum is 0."""
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(lengths > 1e-12, sums / np.maximum(lengths, 1e-12), instead).astype(np.float32)


def pixel_score(
    feat: np.ndarray, centroids: np.ndarray, tags: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Similarity of each pixel to the debiased centroid of any class of the image (Eq. 4).

    Args:
        feat: (D, h, w) float32.
        centroids: (C, D), one per class; a zero row is similar to nothing.
        tags: (C,) bool, classes of the image.
        size: (H, W).

    Returns:
        (H, W) float32 in [0, 1]; 0 everywhere if no class is tagged.
    """
    chosen = centroids[tags]
    if not len(chosen):
        return np.zeros(size, np.float32)
    units = _units(chosen, np.zeros_like(chosen))
    return Upsampled(feat, size).similarity(units).clip(0, 1)
