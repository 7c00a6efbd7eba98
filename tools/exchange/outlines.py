"""Masks as polygons along the edges of pixels, which enclose exactly the same pixels."""

from collections.abc import Iterator

import cv2
import numpy as np

Polygon = list[tuple[int, int]]
"""Corners (x, y), pixels; pixel (0, 0) reaches from (0, 0) to (1, 1)."""


def regions(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The connected parts of a mask, (H, W) bool, over edges and not over corners."""
    parts = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    count, labels, boxes, _ = parts
    for k in range(1, count):
        x, y, width, height = boxes[k, :4]
        part = np.zeros_like(mask)
        window = np.s_[y : y + height, x : x + width]
        part[window] = labels[window] == k
        yield part


def polygon_of(region: np.ndarray, tolerance: float = 0) -> Polygon:
    """The outline of one connected region as a single polygon.

    A hole is joined to the outline by a line there and back, so that programs without holes show it
    as well.

    Args:
        region: (H, W) bool, connected over edges.
        tolerance: distance in pixels by which corners may be left out (Douglas and Peucker); 0
            keeps every corner, and the polygon encloses exactly the region.
    """
    loops = [simplified(loop, tolerance) for loop in outlines(region)]
    loops.sort(key=lambda loop: -abs(signed_area(loop)))
    outline, holes = loops[0], loops[1:]
    # From the left to the right, each hole can be reached from what is joined already.
    for hole in sorted(holes, key=min):
        outline = joined(outline, hole)
    return outline


def outlines(region: np.ndarray) -> list[Polygon]:
    """The closed lines around a region and its holes, corners only; the region is on the right of
    each line, seen in its direction with y downwards."""
    padded = np.pad(region, 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def add(change: np.ndarray, offset: tuple[int, int], step: tuple[int, int]) -> None:
        for y, x in zip(*change.nonzero(), strict=True):
            steps.setdefault((int(x) + offset[0], int(y) + offset[1]), []).append(step)

    inside = padded[1:-1, 1:-1]
    add(inside & ~padded[:-2, 1:-1], (0, 0), (1, 0))  # along the upper edge, to the right
    add(inside & ~padded[1:-1, 2:], (1, 0), (0, 1))  # the right edge, down
    add(inside & ~padded[2:, 1:-1], (1, 1), (-1, 0))  # the lower edge, to the left
    add(inside & ~padded[1:-1, :-2], (0, 1), (0, -1))  # the left edge, up
    loops = []
    while steps:
        # From the highest corner, then the leftmost, there is only one way to go.
        start = min(steps, key=lambda point: point[::-1])
        point, direction, loop = start, None, []
        while not loop or point != start:
            options = steps[point]
            # Where two lines touch, turn right: the region is connected over edges, not corners.
            right = (-direction[1], direction[0]) if direction else None
            step = right if right in options else options[0]
            options.remove(step)
            if not options:
                del steps[point]
            if step != direction:
                loop.append(point)
            point, direction = (point[0] + step[0], point[1] + step[1]), step
        loops.append(loop)
    return loops


def simplified(loop: Polygon, tolerance: float) -> Polygon:
    """The polygon without corners that are within `tolerance` pixels of it; at least a triangle."""
    if not tolerance:
        return loop
    corners = cv2.approxPolyDP(np.array(loop, np.int32)[:, None], tolerance, closed=True)[:, 0]
    return [(int(x), int(y)) for x, y in corners] if len(corners) >= 3 else loop


def signed_area(loop: Polygon) -> float:
    """Area of a polygon, pixels; positive for an outline and negative for a hole."""
    x, y = np.array(loop, float).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def joined(outline: Polygon, hole: Polygon) -> Polygon:
    """The outline with a line to a hole's leftmost corner, around the hole, and back."""
    first = hole.index(min(hole))
    hole = hole[first:] + hole[: first + 1]
    x, y = hole[0]
    best = None
    for k, ((x0, y0), (x1, y1)) in enumerate(zip(outline, outline[1:] + outline[:1], strict=True)):
        if y0 != y1 and min(y0, y1) <= y <= max(y0, y1):
            crossing = x0 + (x1 - x0) * (y - y0) / (y1 - y0)
            if crossing <= x and (best is None or crossing > best[0]):
                best = crossing, k
    crossing, k = best
    bridge = (int(crossing) if crossing == int(crossing) else crossing, y)
    return [*outline[: k + 1], bridge, *hole, bridge, *outline[k + 1 :]]
