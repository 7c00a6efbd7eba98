"""The bilateral filter of the dense CRF, compiled with numba.

It blurs over position and colour together: such a kernel links every pixel with every other, so the
pixels are carried into a permutohedral lattice (Adams, Baek and Davis, Eurographics 2010), which
tiles the feature space by simplices. Each pixel is *splat* onto the corners of its simplex, the
lattice is *blurred* along its axes, and each pixel is *sliced* back from the same corners. The cost
is linear in the pixels.

The kernel is normalised symmetrically, K~ = D^-1/2 K D^-1/2 with D the row sums of K, as in the
code that Kraehenbuehl and Koltun released with their paper. The square roots, and that of the CRF's
weight, are folded into the weights of both ends once, so that an iteration pays nothing for them.
"""

import numpy as np

from core.run.compiled import compiled
from core.run.errors import UserError

DIM = 5  # features: x, y and three colours; a constant, so that the short loops below are unrolled
CORNERS = DIM + 1  # of a simplex
RADIX = 6000  # of a corner's packed key: 6000^5 < 2^63, so each coordinate is in -3000..2999
SCATTER = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number
LOW = 2**32 - 1  # the half of a table slot that holds a number
BLOCK = 64  # pixels or lattice points handled together
LANES = (4, 2, 1)  # channels filtered together
HALF, SIX = np.float32(0.5), np.float32(CORNERS)  # plain numbers would turn sums into float64


class LatticeFilter:
    """out += weight K~ q for the kernel K(p, p') = exp(-|f_p - f_p'|^2 / 2) of features f.

    Args:
        features: (5, N) float32, divided by the kernel's width in each dimension.
        weight: factor on the result, >= 0.
        vertices: M, 1..6: how many corners of its simplex a pixel is splat onto and sliced from.
            Those with the largest weights are kept and renormalised; all 6 are the true filter.

    Raises:
        UserError: some feature exceeds about 500, the range of the lattice.
    """

    def __init__(self, features: np.ndarray, weight: float, vertices: int = CORNERS):
        extent = np.abs(features).max(1)
        # 12: rounding to a lattice point moves a coordinate by up to 6, and a blur step by 5.
        if not (np.abs(ELEVATION) @ extent).max() + 2 * CORNERS < RADIX / 2:
            raise UserError(
                f"the image spans {extent.max():.0f} widths of the bilateral kernel, more than its "
                "lattice has room for; raise srgb_bilateral or sxy_bilateral"
            )
        pixels = features.shape[1]
        self.corners = np.empty((pixels, vertices), np.uint32)
        self.weights = np.empty((pixels, vertices), np.float32)
        keys = np.empty(vertices * pixels + 1, np.int64)
        table = np.zeros(2 ** int(2 * pixels + 2 * CORNERS * BLOCK).bit_length(), np.int64)
        count, table = _embed(features, self.corners, self.weights, keys, table)
        self.neighbours = np.empty((CORNERS, count + 1, 2), np.uint32)
        _find_neighbours(keys[: count + 1], table, self.neighbours)
        ones = np.ones((1, pixels), np.float32)
        degree = np.zeros_like(ones)
        self.add_to(degree, ones)
        self.weights *= np.sqrt(np.float32(weight) / degree[0])[:, None]

    def add_to(self, out: np.ndarray, values: np.ndarray) -> None:
        """Adds the filtered `values` to `out`; both (C, N) float32."""
        lattice = self.corners, self.weights, self.neighbours, (0,) * self.corners.shape[1]
        while len(values):
            lanes = next(n for n in LANES if n <= len(values))
            _splat_blur_slice(out[:lanes], values[:lanes], *lattice, (0,) * lanes)
            out, values = out[lanes:], values[lanes:]


# (6, 5): carries features onto the plane of the lattice, whose coordinates sum to 0. Scaled so that
# blurring along every axis with 1/2, 1, 1/2, together with splat and slice, makes a Gaussian of
# unit width (Adams et al.).
_J = np.arange(DIM)
ELEVATION = np.triu(np.ones((CORNERS, DIM))) - np.eye(CORNERS, DIM, -1) * (_J + 1)
ELEVATION *= CORNERS * np.sqrt(2 / 3) / np.sqrt((_J + 1) * (_J + 2))
ELEVATION = ELEVATION.astype(np.float32)
# A lattice point's key is linear in its coordinates, so a neighbour's key is the key plus a
# constant. The last coordinate is minus the sum of the others and has no place in the key.
_PLACES = np.array([RADIX**i for i in range(DIM)] + [0])
_MOVES = _PLACES.sum() - CORNERS * _PLACES  # of the key, along each axis
_UNSIGNED_SCATTER = np.uint64(SCATTER % 2**64)
_STEPS = _MOVES.astype(np.uint64) * _UNSIGNED_SCATTER  # of the hash


@compiled
def _home(mixed, table):
    """The first slot to look at, from the hash's HIGH bits: only they depend on all of the key."""
    return (mixed >> 32) * table.size >> 32 & (table.size - 1)


@compiled
def _grown(table):
    """The same entries in a table of twice the size."""
    larger = np.zeros(2 * table.size, np.int64)
    for entry in table:
        slot = _home(entry, larger)
        while entry != 0 and larger[slot] != 0:
            slot = (slot + 1) & (larger.size - 1)
        if entry != 0:
            larger[slot] = entry
    return larger


@compiled
def _embed(features, corners, weights, keys, table):
    """Finds the simplex of each pixel; numbers lattice points in the order in which they appear.

    Args:
        features: (5, N) float32.
        corners: filled; (N, M) uint32, numbers of the simplex's lattice points. Unsigned: numba
            tests signed ones for being negative.
        weights: filled; (N, M) float32, barycentric coordinates; they sum to 1.
        keys: filled up to V; (M N + 1,) int64, packed coordinates of the lattice points.
        table: (S,) int64 zeros, S a power of two: open addressing; a slot holds the high half of
            a key's hash and 1 + the lattice point's number.

    Returns V, and the table of the lattice points: `table` itself or a larger one.
    """
    pixels, kept = corners.shape
    count, touched = 0, 0
    # The pixel's place in its simplex, elevated - origin; lanes of a block are computed at once.
    remainder = np.empty((CORNERS, BLOCK), np.float32)
    rank = np.empty((CORNERS, BLOCK), np.int32)
    excess = np.empty(BLOCK, np.int32)
    origin = np.empty(BLOCK, np.int64)
    points = np.empty((BLOCK, CORNERS), np.int64)
    shares = np.empty((BLOCK, CORNERS), np.float32)
    for start in range(0, pixels, BLOCK):
        size = min(BLOCK, pixels - start)
        if 2 * (count + CORNERS * BLOCK) > table.size:
            table = _grown(table)
        _place(features[:, start : start + size], remainder, rank, excess, origin)
        _list_corners(remainder[:, :size], rank, origin, kept, points, shares)
        for b in range(size):  # a loop of its own, so that the cache misses overlap
            for k in range(kept):
                touched ^= table[_home(points[b, k] * SCATTER, table)]
        for b in range(size):
            for k in range(kept):
                key = points[b, k]
                mixed = key * SCATTER
                slot = _home(mixed, table)
                while True:  # written out, because a call costs more than all of it
                    entry = table[slot]
                    if entry == 0:
                        keys[count] = key
                        count += 1
                        entry = mixed & ~LOW | count
                        table[slot] = entry
                    number = np.uint32((entry & LOW) - 1)
                    if (entry ^ mixed) >> 32 == 0 and keys[number] == key:
                        break
                    slot = (slot + 1) & (table.size - 1)
                corners[start + b, k] = number
                weights[start + b, k] = shares[b, k]
    keys[count] = touched  # read, so that the compiler does not leave it out
    return count, table


@compiled
def _place(features, remainder, rank, excess, origin):
    """For a block of pixels: the key of the origin, the remainders and their ranks."""
    size = features.shape[1]
    excess[:] = 0
    origin[:] = 0
    rank[:] = 0
    for i in range(CORNERS):
        # The nearest point whose coordinates are all multiples of 6; its sum may be off by a few 6.
        for b in range(size):
            elevated = np.float32(0)
            for j in range(DIM):
                elevated += ELEVATION[i, j] * features[j, b]
            step = np.floor(elevated / SIX + HALF)
            remainder[i, b] = elevated - SIX * step
            excess[b] += np.int32(step)
            origin[b] += np.int64(step) * (CORNERS * _PLACES[i])
    for i in range(CORNERS):  # 0 for the largest remainder, 5 for the smallest
        for j in range(i + 1, CORNERS):
            for b in range(size):
                less = np.int32(remainder[i, b] < remainder[j, b])
                rank[i, b] += less
                rank[j, b] += np.int32(1) - less
    # Correct the sum to 0 where that costs least, which rotates the ranks.
    for i in range(CORNERS):
        for b in range(size):
            turned = rank[i, b] + excess[b]
            turn = np.int32(turned < 0) - np.int32(turned > DIM)
            rank[i, b] = turned + turn * np.int32(CORNERS)
            origin[b] += np.int64(turn) * (CORNERS * _PLACES[i])
            remainder[i, b] -= np.float32(turn) * SIX


@compiled
def _list_corners(remainder, rank, origin, kept, points, shares):
    """For a block of pixels: the keys of their simplices' corners and the barycentric weights."""
    by_rank = np.empty(CORNERS, np.int64)
    for b in range(remainder.shape[1]):
        for i in range(CORNERS):
            by_rank[rank[i, b]] = i
        # From the origin to each next corner, all coordinates grow by 1 and one of them falls by 6.
        previous, key = remainder[by_rank[0], b] - SIX, origin[b]
        for k in range(CORNERS):
            i = by_rank[DIM - k]
            shares[b, k] = (remainder[i, b] - previous) / SIX
            previous = remainder[i, b]
            points[b, k] = key
            key += _MOVES[i]
        if kept < CORNERS:
            _keep_largest(shares[b], points[b], kept)


@compiled
def _keep_largest(share, points, kept):
    """Moves the `kept` largest shares and their points to the front; these sum to 1 then."""
    total = np.float32(0)
    for k in range(kept):
        largest = k
        for other in range(k + 1, CORNERS):
            if share[other] > share[largest]:
                largest = other
        share[k], share[largest] = share[largest], share[k]
        points[k], points[largest] = points[largest], points[k]
        total += share[k]
    for k in range(kept):
        share[k] /= total


@compiled
def _find_neighbours(keys, table, neighbours):
    """Fills (6, V + 1, 2) uint32: the two neighbours along each axis; V is a point not there.

    The hash is linear, so the hashes of all neighbours along an axis are those of the points plus a
    constant. In the order of the hashes, points and neighbours are matched by walking through both
    lists at once; looking each of them up would miss the cache.
    """
    count = keys.size - 1
    neighbours[:] = count
    hashes = np.empty(count, np.uint64)
    numbers = np.empty(count, np.uint32)
    _sort_by_hash(keys, table, hashes, numbers)
    for axis in range(CORNERS):
        step = _STEPS[axis]
        wrap = np.searchsorted(hashes, np.uint64(0) - step)  # from here on, sums start at 0 again
        _link(hashes, numbers, step, 0, wrap, neighbours[axis])
        _link(hashes, numbers, step, wrap, count, neighbours[axis])
        neighbours[axis, count] = count


@compiled
def _sort_by_hash(keys, table, hashes, numbers):
    """Fills (V,) ascending hashes of the lattice points, less a constant, and their numbers.

    The table is nearly in that order, from any of its empty slots on.
    """
    first = 0
    while table[first] != 0:
        first += 1
    start = np.uint64(first) * np.uint64(2**63 // table.size * 2)
    count = 0
    for slot in range(first, first + table.size):
        entry = table[slot & (table.size - 1)]
        if entry != 0:
            number = np.uint32((entry & LOW) - 1)
            mixed = np.uint64(keys[number]) * _UNSIGNED_SCATTER - start
            place = count
            while place > 0 and hashes[place - 1] > mixed:
                hashes[place], numbers[place] = hashes[place - 1], numbers[place - 1]
                place -= 1
            hashes[place], numbers[place] = mixed, number
            count += 1


@compiled
def _link(hashes, numbers, step, i, end, links):
    """Enters into `links` all pairs whose hashes differ by `step`, the first one in i..end."""
    nobody = np.uint32(hashes.size)  # no branches: they could not be predicted
    j = 0
    while i < end and j < hashes.size:
        ours, theirs = hashes[i] + step, hashes[j]
        here, there = numbers[i], numbers[j]
        links[here if ours == theirs else nobody, 1] = there
        links[there if ours == theirs else nobody, 0] = here
        i += np.int64(ours <= theirs)
        j += np.int64(ours >= theirs)


@compiled
def _splat_blur_slice(out, values, corners, weights, neighbours, vertices, channels):
    """out += S^T B S values, where S splats and B blurs; `out`, `values` are (C, N).

    `vertices` and `channels` are tuples of M and C zeros: lengths that the compiler knows.
    """
    count = neighbours.shape[1] - 1
    shape = (count + 1, len(channels))
    lattice = np.zeros(shape, np.float32)  # the last is any point that is not there: always 0
    blurred = np.zeros(shape, np.float32)
    for p in range(values.shape[1]):
        for k in range(len(vertices)):
            for c in range(len(channels)):
                lattice[corners[p, k], c] += weights[p, k] * values[c, p]
    for axis in range(CORNERS):
        for v in range(count):
            left, right = neighbours[axis, v, 0], neighbours[axis, v, 1]
            for c in range(len(channels)):
                both = lattice[left, c] + lattice[right, c]
                blurred[v, c] = lattice[v, c] + HALF * both
        lattice, blurred = blurred, lattice
    for p in range(values.shape[1]):
        for c in range(len(channels)):
            total = np.float32(0)
            for k in range(len(vertices)):
                total += weights[p, k] * lattice[corners[p, k], c]
            out[c, p] += total
