"""IRNet's random walk: step by step against the matrix power."""

import resource
import time

import torch

from core.wsss.affinity import pair_offsets, path_affinity
from core.wsss.irn import IrnConfig, walk


def benchmark_walk() -> None:
    """Memory of a walk on 160 x 160 cells (640 x 640 pixels); a walk on 64 x 64 both ways."""
    generator = torch.Generator().manual_seed(0)
    settings = IrnConfig()
    for side in (160, 64):
        boundary = torch.rand(side, side, generator=generator) ** 4
        maps = torch.rand(2, side, side, generator=generator)
        began = time.perf_counter()
        walked = walk(boundary, maps, settings)
        seconds = time.perf_counter() - began
        print(f"walk on {side} x {side} cells, 256 steps: {seconds:.2f} s", end="; ")
        if side > 64:
            print(f"process peak {peak_memory():.2f} GB (a dense matrix: {side**4 * 4e-9:.1f} GB)")
    began = time.perf_counter()
    dense_walk(maps, boundary, settings)
    slower = time.perf_counter() - began
    exact = dense_walk(maps.double(), boundary.double(), settings)
    print(
        f"by matrix power {slower:.2f} s, {slower / seconds:.0f} times as long; largest difference "
        f"from the power in double precision {(walked - exact).abs().max():.1e}"
    )


def dense_walk(maps: torch.Tensor, boundary: torch.Tensor, settings: IrnConfig) -> torch.Tensor:
    """The paper's form: the transition matrix, squared repeatedly."""
    (height, width), radius = boundary.shape, settings.walk_radius
    margin = radius - 1
    padded = torch.nn.functional.pad(boundary, (margin, margin, 0, margin), value=1)
    weights = path_affinity(padded, radius) ** settings.beta
    place = torch.arange(height * width).view(height, width)
    matrix = torch.eye(height * width, dtype=maps.dtype)
    for (dy, dx), weight in zip(pair_offsets(radius), weights, strict=True):
        rows, columns = slice(0, height - dy), slice(max(0, -dx), width - max(0, dx))
        here = place[rows, columns].flatten()
        there = here + dy * width + dx
        matrix[here, there] = matrix[there, here] = weight[rows, columns].flatten()
    matrix /= matrix.sum(0)
    for _ in range(settings.doublings):
        matrix = matrix @ matrix
    return ((maps * (1 - boundary)).flatten(1) @ matrix).view_as(maps)


def peak_memory() -> float:
    """Peak memory of this process, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
