"""The two Gaussian filters of the dense CRF, compiled with numba.

`GridFilter` blurs over the pixel grid by two banded matrices. `LatticeFilter` blurs over position
and colour together: such a kernel links every pixel with every other, so the pixels are carried
into a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010), which tiles the feature
space by simplices. Each pixel is *splat* onto the corners of its simplex, the lattice is *blurred*
along its axes, and each pixel is *sliced* back from the same corners. The cost is linear in the
pixels.

Both kernels are normalised symmetrically, K~ = D^-1/2 K D^-1/2 with D the row sums of K, as in the
code that Kraehenbuehl and Koltun released with their paper. The square roots, and that of the CRF's
weight, are folded into the weights of both ends once, so that an iteration pays nothing for them.
"""

import numpy as np
from numba import njit

DIM = 5  # features: x, y and three colours; a constant, so that the short loops below are unrolled
CORNERS = DIM + 1  # of a simplex
RADIX = 6000  # of a corner's packed key: 6000^5 < 2^63, so each coordinate lies in -3000..2999
SCATTER = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number
HALF, SIX = np.float32(0.5), np.float32(CORNERS)  # plain numbers would turn sums into float64

COMPILE = {"cache": True, "nogil": True, "fastmath": True, "error_model": "numpy"}


class GridFilter:
    """out += weight K~ q for the spatial kernel K(p, p') = exp(-|p - p'|^2 / 2 sigma^2).

    Args:
        height, width: of the images, pixels.
        sigma: pixels. Beyond 4 sigma the kernel, under 0.0004 there, is cut off.
        weight: factor on the result, >= 0.
    """

    def __init__(self, height: int, width: int, sigma: float, weight: float):
        self.rows = _band(height, sigma, weight)
        self.columns = _band(width, sigma, 1.0)

    def add_to(self, out: np.ndarray, values: np.ndarray) -> None:
        """Adds the filtered `values` to `out`; both (H * W,) float32."""
        shape = self.rows.shape[1], self.columns.shape[1]
        _add_separable(out.reshape(shape), values.reshape(shape), self.rows, self.columns)


def _band(length: int, sigma: float, weight: float) -> np.ndarray:
    """(2 r + 1, length) float32: weight K~[i, i + t - r] at [t, i], and 0 beyond the border.

    On a grid K is the product of one matrix per axis, and so are D and K~.
    """
    radius = min(int(np.ceil(4 * sigma)), length - 1)
    shift = np.arange(-radius, radius + 1)[:, None]
    other = np.arange(length) + shift  # (2 r + 1, length)
    inside = (other >= 0) & (other < length)
    kernel = np.where(inside, np.exp(-0.5 * (shift / sigma) ** 2), 0)
    degree = kernel.sum(0)
    norm = np.sqrt(degree * degree[np.clip(other, 0, length - 1)])
    return (weight * kernel / norm).astype(np.float32)


@njit(**COMPILE)
def _add_separable(out, values, rows, columns):
    """out += R values C for the banded matrices `rows` and `columns`; (H, W)."""
    height, width = values.shape
    row_radius, column_radius = rows.shape[0] // 2, columns.shape[0] // 2
    padded = np.zeros(width + 2 * column_radius, np.float32)
    for y in range(height):
        line = padded[column_radius : column_radius + width]
        line[:] = 0
        for t in range(max(0, row_radius - y), min(rows.shape[0], row_radius - y + height)):
            tap, source = rows[t, y], values[y + t - row_radius]
            for x in range(width):
                line[x] += tap * source[x]
        for t in range(columns.shape[0]):
            taps, source = columns[t], padded[t : t + width]
            for x in range(width):
                out[y, x] += taps[x] * source[x]


class LatticeFilter:
    """out += weight K~ q for the kernel K(p, p') = exp(-|f_p - f_p'|^2 / 2) of features f.

    Args:
        features: (5, N) float32, divided by the kernel's width in each dimension.
        weight: factor on the result, >= 0.

    Raises:
        ValueError: some feature exceeds about 500, the range of the lattice.
    """

    def __init__(self, features: np.ndarray, weight: float):
        extent = np.abs(features).max(1)
        # 12: rounding to a lattice point moves a coordinate by up to 6, and a blur step by 5.
        if not (np.abs(_ELEVATION) @ extent).max() + 2 * CORNERS < RADIX / 2:
            raise ValueError(
                f"the image spans {extent.max():.0f} widths of the bilateral kernel, more than its "
                "lattice has room for; raise srgb_bilateral or sxy_bilateral"
            )
        self.corners, self.weights, keys, table = _embed(features)
        self.neighbours = _find_neighbours(keys, table)
        ones = np.ones(features.shape[1], np.float32)
        degree = np.zeros_like(ones)
        self.add_to(degree, ones)
        self.weights *= np.sqrt(np.float32(weight) / degree)[:, None]

    def add_to(self, out: np.ndarray, values: np.ndarray) -> None:
        """Adds the filtered `values` to `out`; both (N,) float32."""
        _add_splat_blur_slice(out, values, self.corners, self.weights, self.neighbours)


def _elevation() -> np.ndarray:
    """(6, 5) float32: carries features onto the plane of R^6 whose coordinates sum to 0.

    The columns are orthogonal, and of the one length at which splat, blur and slice together make a
    Gaussian of unit variance (Adams et al.).
    """
    matrix = np.zeros((CORNERS, DIM))
    for j in range(DIM):
        matrix[: j + 1, j] = 1
        matrix[j + 1, j] = -(j + 1)
        matrix[:, j] *= CORNERS * np.sqrt(2 / 3) / np.sqrt((j + 1) * (j + 2))
    return matrix.astype(np.float32)


_ELEVATION = _elevation()
# A lattice point's key is linear in its coordinates, so a neighbour's key is the key plus a
# constant. The last coordinate follows from the others, which sum to minus it, and has no place in
# the key.
_PLACES = np.array([RADIX**i for i in range(DIM)] + [0])
_ALL_PLACES = int(_PLACES.sum())


@njit(**COMPILE)
def _find(key, keys, table):
    """The slot of the open-addressing `table` that holds `key`, or else the one free for it."""
    # The HIGH bits of the product depend on every coordinate, the low ones on the first few only.
    slot = ((((key * SCATTER) >> 32) + (1 << 31)) * table.size) >> 32
    while table[slot] != 0 and keys[table[slot] - 1] != key:
        slot += 1
        if slot == table.size:
            slot = 0
    return slot


@njit(**COMPILE)
def _embed(features):
    """Finds the simplex of each pixel; numbers the lattice points as they are first met.

    Args:
        features: (5, N) float32.

    Returns:
        corners: (N, 6) uint32, numbers of the simplex's lattice points. Unsigned, because numba
            would otherwise test each of them for being negative.
        weights: (N, 6) float32, barycentric coordinates; they sum to 1.
        keys: (V,) int64, packed coordinates of the lattice points.
        table: (8 N,) int32, the hash table: 1 + a lattice point's number, 0 where free.
    """
    pixels = features.shape[1]
    corners = np.empty((pixels, CORNERS), np.uint32)
    weights = np.empty((pixels, CORNERS), np.float32)
    keys = np.empty(CORNERS * pixels, np.int64)
    table = np.zeros(8 * pixels, np.int32)
    count = 0
    remainder = np.empty(CORNERS, np.float32)  # the pixel's place in its simplex: elevated - origin
    origin = np.empty(CORNERS, np.int64)
    rank = np.empty(CORNERS, np.int64)
    by_rank = np.empty(CORNERS, np.int64)
    for p in range(pixels):
        # The nearest point whose coordinates are all multiples of 6; its sum may be off by a few 6.
        excess = 0
        for i in range(CORNERS):
            elevated = np.float32(0)
            for j in range(DIM):
                elevated += _ELEVATION[i, j] * features[j, p]
            step = np.int64(np.floor(elevated / SIX + HALF))
            excess += step
            origin[i] = step * CORNERS
            remainder[i] = elevated - np.float32(origin[i])
            rank[i] = 0
        for i in range(CORNERS):  # 0 for the largest remainder, 5 for the smallest
            for j in range(i + 1, CORNERS):
                less = remainder[i] < remainder[j]
                rank[i] += less
                rank[j] += not less
        # Mend the sum where that costs least, which turns the ranks round.
        key = 0
        for i in range(CORNERS):
            rank[i] += excess
            turn = (rank[i] < 0) - (rank[i] > DIM)
            rank[i] += turn * CORNERS
            origin[i] += turn * CORNERS
            remainder[i] -= np.float32(turn * CORNERS)
            by_rank[rank[i]] = i
            key += origin[i] * _PLACES[i]
        # From the origin to each next corner, all coordinates grow by 1 and one of them falls by 6.
        previous = remainder[by_rank[0]] - SIX
        for k in range(CORNERS):
            i = by_rank[DIM - k]
            weights[p, k] = (remainder[i] - previous) / SIX
            previous = remainder[i]
            slot = _find(key, keys, table)
            if table[slot] == 0:
                keys[count] = key
                count += 1
                table[slot] = count
            corners[p, k] = table[slot] - 1
            key += _ALL_PLACES - CORNERS * _PLACES[i]
    return corners, weights, keys[:count].copy(), table


@njit(**COMPILE)
def _find_neighbours(keys, table):
    """(6, V, 2) uint32: the two neighbours along each axis; V is a point that is not there."""
    count = keys.size
    neighbours = np.full((CORNERS, count, 2), count, np.uint32)
    for axis in range(CORNERS):
        step = _ALL_PLACES - CORNERS * _PLACES[axis]
        for v in range(count):
            found = table[_find(keys[v] + step, keys, table)]
            if found != 0:
                neighbours[axis, v, 1] = found - 1
                neighbours[axis, found - 1, 0] = v
    return neighbours


@njit(**COMPILE)
def _add_splat_blur_slice(out, values, corners, weights, neighbours):
    """out += S^T B S values, where S splats and B blurs; `out`, `values` are (N,)."""
    count = neighbours.shape[1]
    lattice = np.zeros(count + 1, np.float32)  # the last is any point that is not there: always 0
    blurred = np.zeros(count + 1, np.float32)
    for p in range(values.size):
        for k in range(CORNERS):
            lattice[corners[p, k]] += weights[p, k] * values[p]
    for axis in range(CORNERS):
        for v in range(count):
            left, right = neighbours[axis, v, 0], neighbours[axis, v, 1]
            blurred[v] = lattice[v] + HALF * (lattice[left] + lattice[right])
        lattice, blurred = blurred, lattice
    for p in range(values.size):
        total = np.float32(0)
        for k in range(CORNERS):
            total += weights[p, k] * lattice[corners[p, k]]
        out[p] += total
