"""The spatial filter of the dense CRF, compiled with numba: a blur by two banded matrices.

It is normalised as the bilateral filter is (`core.crf.permutohedral`).
"""

import numpy as np

from core.run.compiled import compiled


class GridFilter:
    """out += weight K~ q for the spatial kernel K(p, p') = exp(-|p - p'|^2 / 2 sigma^2).

    Sizes and sigma are in pixels; `weight` is a factor on the result. Beyond 4 sigma the kernel,
    under 0.0004 there, is cut off.
    """

    def __init__(self, height: int, width: int, sigma: float, weight: float):
        self.rows = band(height, sigma, weight)
        self.columns = band(width, sigma, 1.0)

    def add_to(self, out: np.ndarray, values: np.ndarray) -> None:
        """Adds the filtered `values` to `out`; both (C, H * W) float32."""
        shape = -1, self.rows.shape[1], self.columns.shape[1]
        for channel, source in zip(out.reshape(shape), values.reshape(shape), strict=True):
            _add_separable(channel, source, self.rows, self.columns)


def band(length: int, sigma: float, weight: float) -> np.ndarray:
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


@compiled
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
