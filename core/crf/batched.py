"""The dense CRF of `core.crf.dense` in torch: batches of images on any device.

The same mean field on the same permutohedral lattice as the numba backend. Lattice points are found
by sorting packed coordinates instead of a hash table, neighbours by binary search, and splat, blur
and slice are gathers and sums; the spatial kernel is two matrix products. Results differ by
rounding, which also decides to which simplex a pixel on the border of two belongs, and hence which
points the lattice has.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core.crf.permutohedral import CORNERS, DIM, ELEVATION
from core.crf.spatial import band
from core.run.errors import UserError

MARGIN = 2 * CORNERS  # rounding moves a coordinate by up to 6, a corner by 5, a blur step by 5
BYTES = 2**30  # approximate memory for the lattices of images refined together


def grid_filter(
    size: Sequence[int], sigma: float, weight: float, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function from q, (B, C, H, W), to weight K~ q for the spatial kernel; see `GridFilter`."""
    rows = _matrix(size[0], sigma, weight).to(device)
    columns = _matrix(size[1], sigma, 1).to(device)
    return lambda values: rows @ values @ columns.T


def _matrix(length: int, sigma: float, weight: float) -> Tensor:
    """(length, length) weight K~ along one axis."""
    taps, matrix = torch.from_numpy(band(length, sigma, weight)), torch.zeros(length, length)
    for shift, row in enumerate(taps, -(len(taps) // 2)):
        matrix.diagonal(shift)[:] = row[max(0, -shift) : length - max(0, shift)]
    return matrix


class BatchedLattice:
    """Takes q, (B, C, N), to weight K~ q for the bilateral kernel; see `LatticeFilter`.

    Features are (B, N, 5) float32, divided by the kernel's widths.

    Raises:
        UserError: the features span more than the packed coordinates have room for.
    """

    def __init__(self, features: Tensor, weight: float, vertices: int = CORNERS):
        coordinates, shares = simplices(features)
        if vertices < CORNERS:
            shares, kept = shares.topk(vertices, dim=2)
            shares = shares / shares.sum(2, keepdim=True)
            coordinates = coordinates.gather(2, kept[..., None].expand(*kept.shape, DIM))
        keys, places = _packed(coordinates)
        points, corners = keys.unique(return_inverse=True)
        self.count, self.corners, self.weights = len(points), corners, shares
        self.neighbours = [self._along(points, places, axis) for axis in range(CORNERS)]
        degree = self(torch.ones_like(shares[:, None, :, 0]))
        self.weights = shares * (weight / degree[:, 0]).sqrt()[..., None]

    def _along(self, points: Tensor, places: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Each point's neighbours before and after it along an axis; `count` is none."""
        step = places.sum() - (CORNERS * places[axis] if axis < DIM else 0)
        wanted = points + step
        found = torch.searchsorted(points, wanted).clamp(max=self.count - 1)
        there = points[found] == wanted
        after = torch.where(there, found, self.count)
        before = torch.full_like(after, self.count)
        before[found[there]] = there.nonzero()[:, 0]
        return before, after

    def __call__(self, values: Tensor) -> Tensor:
        # The last point stays 0: it stands for every neighbour that does not exist.
        lattice = values.new_zeros(self.count + 1, values.shape[1])
        corners = [*zip(self.corners.unbind(2), self.weights[..., None].unbind(2), strict=True)]
        for corner, weight in corners:
            spread = weight * values.transpose(1, 2)
            lattice.index_add_(0, corner.flatten(), spread.flatten(0, 1))
        for before, after in self.neighbours:
            lattice[:-1] += (lattice[before] + lattice[after]) / 2
        return sum(weight * lattice[corner] for corner, weight in corners).transpose(1, 2)


def simplices(features: Tensor) -> tuple[Tensor, Tensor]:
    """The corners of the simplex of each pixel, given (B, N, 5) float32 features.

    Returns:
        (B, N, 6, 5) int32, coordinates of the six corners without the last, which is minus the sum
        of the others; (B, N, 6) barycentric coordinates, which sum to 1.
    """
    # One after the other, as numba adds them: many pixels are on the border of two simplices, and
    # a lattice with other points is another filter.
    columns = torch.from_numpy(ELEVATION).to(features).unbind(1)
    elevated = sum(f[..., None] * c for f, c in zip(features.unbind(2), columns, strict=True))
    step = (elevated / CORNERS + 0.5).floor()
    remainder, excess = elevated - CORNERS * step, step.sum(2, keepdim=True)
    # The rank of each remainder, 0 for the largest; of equal ones, the first comes first.
    order = torch.argsort(remainder, dim=2, descending=True, stable=True)
    rank = order.argsort(2) + excess
    turn = (rank < 0).float() - (rank > DIM).float()  # where the sum is mended
    rank = (rank + CORNERS * turn).long()
    origin, remainder = (CORNERS * (step + turn)).int(), remainder - CORNERS * turn
    ordered = remainder.gather(2, rank.argsort(2))  # from the largest to the smallest
    ascending = ordered.flip(2)
    shares = ascending.diff(dim=2, prepend=ordered[..., :1] - CORNERS) / CORNERS
    corner = torch.arange(CORNERS, device=features.device, dtype=torch.int32)[:, None]
    # Corner k is the origin plus k in all coordinates, minus 6 in the k smallest remainders.
    fallen = rank[..., None, :DIM] > DIM - corner
    coordinates = torch.add(origin[..., None, :DIM] + corner, fallen, alpha=-CORNERS)
    return coordinates, shares


def _packed(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """One int64 per corner, distinct for images and points: (B, N, M) keys, (5,) place values."""
    low = coordinates.amin((0, 1, 2)) - MARGIN
    extent = (coordinates.amax((0, 1, 2)) + MARGIN - low + 1).long()
    if extent.double().prod() * len(coordinates) >= 2**63:
        raise UserError(
            "the image spans more widths of the bilateral kernel than its lattice has room for; "
            "raise srgb_bilateral or sxy_bilateral"
        )
    places = extent.cumprod(0).roll(1)
    image, places[0] = places[0].clone(), 1
    images = torch.arange(len(coordinates), device=coordinates.device) * image
    keys = images[:, None, None].repeat(1, *coordinates.shape[1:3])
    for j in range(DIM):
        keys += (coordinates[..., j].long() - low[j]) * places[j]
    return keys, places


def bytes_per_pixel(labels: int) -> int:
    """Approximate peak memory of the refinement per pixel."""
    return CORNERS * (120 + 8 * labels)


@torch.no_grad()
def refine(images: Tensor, probs: Tensor, config, present: Tensor | None = None) -> Tensor:
    """Refines the probabilities of a batch of images on their device.

    Args:
        images: (B, 3, H, W) uint8 RGB.
        probs: (B, L, H, W) float32 in [0, 1]; clipped to [1e-5, 1].
        config: a `DenseCRF` or a `CrfConfig`.
        present: (B, L) bool, labels that take part in each image, label 0 always; None: all. The
            cost is that of the largest number of them.

    Returns the (B, L, H, W) float32 posterior; it sums to 1 over L, labels that take no part get 0.
    """
    if present is None:
        present = torch.ones(probs.shape[:2], dtype=torch.bool, device=probs.device)
    # Each image's own labels come first; no more columns than the largest number of them.
    order = torch.argsort(~present, dim=1, stable=True)[:, : int(present.sum(1).max())]
    rows = torch.arange(len(probs), device=probs.device)[:, None]
    pixels = probs.shape[2] * probs.shape[3]
    count = max(1, BYTES // (pixels * bytes_per_pixel(order.shape[1])))
    tensors = (images, probs[rows, order], present[rows, order])
    parts = zip(*(t.split(count) for t in tensors), strict=True)
    refined = torch.zeros_like(probs)
    with torch.autocast(images.device.type, enabled=False):  # stage 4 refines within a step
        refined[rows, order] = torch.cat([_refine(*part, config) for part in parts])
    return refined


def _refine(images: Tensor, probs: Tensor, present: Tensor, config) -> Tensor:
    if probs.shape[1] == 1:
        return torch.ones_like(probs)
    log = probs.clamp(1e-5, 1).log()
    given = log[:, 1:] - log[:, :1]  # logits relative to label 0, as in `DenseCRF`
    given = given.masked_fill(~present[:, 1:, None, None], -torch.inf)
    filters = _filters(images, config)
    logits = given
    for _ in range(config.iterations):
        posterior = _posterior(logits)
        relative = posterior[:, 1:] - posterior[:, :1]
        updated = given + sum(f(relative) for f in filters)
        if config.relaxation != 1:
            moved = (config.relaxation - 1) * (updated - logits)
            updated = updated + moved.nan_to_num(0)  # -inf stays as it is
        logits = updated
    return _posterior(logits)


def _posterior(logits: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1).softmax(1)


def _filters(images: Tensor, config) -> list[Callable[[Tensor], Tensor]]:
    size, device, filters = images.shape[2:], images.device, []
    if config.weight_gaussian > 0:
        filters.append(grid_filter(size, config.sxy_gaussian, config.weight_gaussian, device))
    if config.weight_bilateral > 0:
        rows, columns = (torch.arange(n, device=device).float() for n in size)
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy")) / config.sxy_bilateral
        places = places.expand(len(images), *places.shape)
        features = torch.cat([places, images.float() / config.srgb_bilateral], 1).flatten(2)
        lattice = BatchedLattice(features.transpose(1, 2), config.weight_bilateral, config.vertices)
        filters.append(lambda values: lattice(values.flatten(2)).unflatten(2, size))
    return filters
