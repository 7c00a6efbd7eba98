"""Textures of amorphous regions (stuff), each a function of only (rng, size).

Every function returns a (size, size, 3) float32 RGB picture in [0, 1]. Hue, contrast, scale and
direction vary widely within a kind, and kinds share hues (curtains can be as blue as water, plaster
as green as a meadow), so that colour does not identify a texture.
"""

import colorsys

import cv2
import numpy as np
from numpy.random import Generator


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """(3,) RGB in [0, 1]; the hue wraps around, the other two are clipped."""
    return np.float32(colorsys.hsv_to_rgb(hue % 1, np.clip(saturation, 0, 1), np.clip(value, 0, 1)))


def noise(rng: Generator, size: int, cells: tuple[int, int], octaves: int = 1) -> np.ndarray:
    """(size, size) value noise in about [0, 1]; `cells`: rows, columns of the coarsest grid."""
    field, total = np.zeros((size, size), np.float32), 0.0
    for octave in range(octaves):
        rows, cols = (min(size, max(2, n * 2**octave)) for n in cells)
        grid = rng.random((rows, cols), dtype=np.float32)
        field += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) / 2**octave
        total += 1 / 2**octave
    return field / total


def _blend(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return low + (high - low) * np.clip(weight, 0, 1)[..., None]


def water(rng: Generator, size: int) -> np.ndarray:
    hue, calm = rng.uniform(0.47, 0.66), rng.uniform(0.25, 1)
    deep = hsv(hue, rng.uniform(0.35, 0.9), rng.uniform(0.25, 0.65))
    light = hsv(hue + rng.normal(0, 0.02), rng.uniform(0.1, 0.5), rng.uniform(0.6, 1))
    waves = noise(rng, size, (int(rng.integers(16, 34)), int(rng.integers(3, 8))), 2)
    ripples = noise(rng, size, (int(rng.integers(40, 80)), int(rng.integers(8, 20))))
    return _blend(deep, light, (waves - 0.35) * (0.6 + calm) + np.maximum(ripples - 0.7, 0) * 2)


def rails(rng: Generator, size: int) -> np.ndarray:
    stone = hsv(rng.uniform(0.02, 0.14), rng.uniform(0.05, 0.3), rng.uniform(0.3, 0.65))
    gravel = noise(rng, size, (size // 3, size // 3)) * 0.5 + noise(rng, size, (6, 6)) * 0.2
    picture = stone * (0.55 + gravel[..., None])
    wood = hsv(rng.uniform(0.02, 0.1), rng.uniform(0.2, 0.6), rng.uniform(0.12, 0.35))
    steel = hsv(rng.uniform(0, 1), rng.uniform(0, 0.12), rng.uniform(0.6, 0.92))
    gauge, slope = int(rng.integers(14, 26)), rng.uniform(-0.12, 0.12)
    pitch, lean = int(rng.integers(10, 20)), rng.uniform(-6, 6)
    for top in range(int(rng.integers(-20, 0)), size + 20, gauge + int(rng.integers(12, 24))):
        for x in range(-10, size + 10, pitch):
            y = top + slope * x
            ends = np.float32([[x + lean, y - 4], [x - lean, y + gauge + 4]])
            cv2.line(picture, *_points(ends), wood.tolist(), int(pitch // 3), cv2.LINE_AA)
        for offset in (0, gauge):
            ends = np.float32([[0, top + offset], [size, top + offset + slope * size]])
            cv2.line(picture, *_points(ends), steel.tolist(), 3, cv2.LINE_AA)
    return picture


def meadow(rng: Generator, size: int) -> np.ndarray:
    hue = rng.uniform(0.17, 0.36)
    dark = hsv(hue, rng.uniform(0.4, 0.8), rng.uniform(0.2, 0.45))
    bright = hsv(hue - rng.uniform(0, 0.06), rng.uniform(0.35, 0.8), rng.uniform(0.5, 0.85))
    blades = noise(rng, size, (int(rng.integers(18, 30)), size // 2))
    picture = _blend(dark, bright, 0.7 * blades + 0.5 * noise(rng, size, (5, 5), 2) - 0.1)
    if rng.random() < 0.4:  # flowers
        colour = hsv(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.8, 1)).tolist()
        for x, y in rng.integers(0, size, (int(rng.integers(10, 50)), 2)).tolist():
            cv2.circle(picture, (x, y), int(rng.integers(1, 4)), colour, -1, cv2.LINE_AA)
    return picture


def foliage(rng: Generator, size: int) -> np.ndarray:
    hue = rng.uniform(0.2, 0.42) if rng.random() < 0.75 else rng.uniform(0.0, 0.13)
    saturation, value = rng.uniform(0.4, 0.85), rng.uniform(0.4, 0.8)
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = hsv(hue, saturation, value * 0.3)
    length = rng.uniform(7, 16)
    count = int(2.2 * (size / length) ** 2)
    depth = np.sort(rng.random(count))
    places, angles = rng.uniform(0, size, (count, 2)), rng.uniform(0, 360, count)
    for (x, y), z, angle in zip(places, depth, angles, strict=True):
        colour = hsv(hue + rng.normal(0, 0.02), saturation, value * (0.35 + 0.7 * z))
        axes = (int(length * rng.uniform(0.6, 1)), int(length * rng.uniform(0.25, 0.5)))
        cv2.ellipse(picture, (int(x), int(y)), axes, angle, 0, 360, colour.tolist(), -1)
    return picture


def sky(rng: Generator, size: int) -> np.ndarray:
    hue = rng.uniform(0.52, 0.64) if rng.random() < 0.7 else rng.uniform(0.02, 0.12)
    top = hsv(hue, rng.uniform(0.2, 0.7), rng.uniform(0.5, 0.95))
    low = hsv(hue + rng.normal(0, 0.03), rng.uniform(0.05, 0.35), rng.uniform(0.75, 1))
    picture = _blend(top, low, np.linspace(0, 1, size, dtype=np.float32)[:, None].repeat(size, 1))
    clouds = np.maximum(noise(rng, size, (3, 4), 4) - rng.uniform(0.4, 0.7), 0) * 3
    return _blend(picture, np.float32([1, 1, 1]) * rng.uniform(0.8, 1), clouds)


def facade(rng: Generator, size: int) -> np.ndarray:
    wall = hsv(rng.random(), rng.uniform(0.03, 0.45), rng.uniform(0.4, 0.95))
    glass = hsv(rng.uniform(0.5, 0.75), rng.uniform(0.05, 0.5), rng.uniform(0.15, 0.5))
    picture = wall * (0.9 + 0.2 * noise(rng, size, (8, 8), 2)[..., None])
    step_x, step_y = (int(n) for n in rng.integers(24, 48, 2))
    width, height = int(step_x * rng.uniform(0.4, 0.7)), int(step_y * rng.uniform(0.45, 0.75))
    for y in range(int(rng.integers(-step_y, 0)), size, step_y):
        for x in range(int(rng.integers(-4, 4)) - step_x // 2, size, step_x):
            pane = (glass * rng.uniform(0.7, 1.4)).tolist()
            cv2.rectangle(picture, (x, y), (x + width, y + height), pane, -1)
            cv2.rectangle(picture, (x, y), (x + width, y + height), (wall * 0.6).tolist(), 2)
    return picture


def brick(rng: Generator, size: int) -> np.ndarray:
    clay = hsv(rng.uniform(-0.03, 0.09), rng.uniform(0.15, 0.65), rng.uniform(0.4, 0.75))
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = hsv(0.1, 0.05, rng.uniform(0.45, 0.85))
    high = int(rng.integers(9, 17))
    wide = int(high * rng.uniform(1.8, 2.6))
    for row, y in enumerate(range(0, size, high)):
        for x in range(-wide // 2 * (row % 2), size, wide):
            colour = clay * rng.uniform(0.8, 1.15)
            cv2.rectangle(picture, (x, y), (x + wide - 3, y + high - 3), colour.tolist(), -1)
    return picture


def plaster(rng: Generator, size: int) -> np.ndarray:
    wall = hsv(rng.random(), rng.uniform(0.02, 0.4), rng.uniform(0.45, 0.95))
    stains = noise(rng, size, (3, 3), 5) * rng.uniform(0.1, 0.45)
    return wall * (0.85 + stains[..., None])


def curtain(rng: Generator, size: int) -> np.ndarray:
    cloth = hsv(rng.random(), rng.uniform(0.2, 0.85), rng.uniform(0.35, 0.9))
    x = np.arange(size, dtype=np.float32)[None]
    bend = 12 * noise(rng, size, (3, 6))
    folds = 0.5 + 0.5 * np.sin(2 * np.pi * (x + bend) / rng.uniform(14, 36))
    return cloth * (0.5 + 0.6 * folds[..., None])


def road(rng: Generator, size: int) -> np.ndarray:
    tar = hsv(rng.uniform(0.5, 0.75), rng.uniform(0, 0.12), rng.uniform(0.25, 0.6))
    picture = tar * (0.8 + 0.35 * noise(rng, size, (size // 2, size // 2))[..., None])
    if rng.random() < 0.5:
        dash, y = int(rng.integers(20, 44)), int(rng.integers(size // 2, size))
        for x in range(0, size, 2 * dash):
            cv2.line(picture, (x, y), (x + dash, y), (0.9, 0.9, 0.85), 4, cv2.LINE_AA)
    return picture


def sand(rng: Generator, size: int) -> np.ndarray:
    grain = hsv(rng.uniform(0.07, 0.15), rng.uniform(0.2, 0.55), rng.uniform(0.6, 0.95))
    ripples = noise(rng, size, (int(rng.integers(10, 22)), 5), 2) * rng.uniform(0.1, 0.4)
    return grain * (0.75 + ripples + 0.2 * rng.random((size, size), dtype=np.float32))[..., None]


def wood(rng: Generator, size: int) -> np.ndarray:
    plank = hsv(rng.uniform(0.03, 0.12), rng.uniform(0.3, 0.75), rng.uniform(0.3, 0.8))
    picture = plank * (0.7 + 0.5 * noise(rng, size, (64, 4), 2)[..., None])
    high = int(rng.integers(18, 40))
    for y in range(int(rng.integers(0, high)), size, high):
        picture[y : y + high] *= rng.uniform(0.85, 1.12)
        cv2.line(picture, (0, y), (size, y), (plank * 0.35).tolist(), 2)
    return picture


def tiles(rng: Generator, size: int) -> np.ndarray:
    first = hsv(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.55, 0.95))
    second = first * rng.uniform(0.55, 1.0)
    step, slant = int(rng.integers(18, 40)), rng.uniform(-0.4, 0.4)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    column, row = np.floor((x + slant * y) / step), np.floor(y / step)
    picture = np.where(((column + row) % 2)[..., None] > 0, first, second).astype(np.float32)
    joint = (((x + slant * y) % step) < 2) | ((y % step) < 2)
    picture[joint] = first * 0.5
    return picture


def snow(rng: Generator, size: int) -> np.ndarray:
    cold = hsv(rng.uniform(0.55, 0.68), rng.uniform(0.03, 0.2), rng.uniform(0.85, 1))
    return cold * (0.8 + 0.25 * noise(rng, size, (3, 5), 3)[..., None])


def rock(rng: Generator, size: int) -> np.ndarray:
    stone = hsv(rng.uniform(0, 1), rng.uniform(0.02, 0.2), rng.uniform(0.35, 0.7))
    ridges = 1 - 2 * np.abs(noise(rng, size, (6, 6), 5) - 0.5)
    return stone * (0.4 + 0.8 * ridges[..., None])


def plaid(rng: Generator, size: int) -> np.ndarray:
    cloth = hsv(rng.random(), rng.uniform(0.3, 0.8), rng.uniform(0.4, 0.85))
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = cloth
    for axis in range(2):
        step, wide = int(rng.integers(20, 44)), int(rng.integers(4, 14))
        band = (np.arange(size) % step) < wide
        picture *= np.where(np.expand_dims(band, axis)[..., None], rng.uniform(0.55, 0.8), 1)
    return picture


def _points(ends: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    (x0, y0), (x1, y1) = np.rint(ends).astype(int).tolist()
    return (x0, y0), (x1, y1)


STUFF = {
    f.__name__: f
    for f in (
        *(water, rails, meadow, foliage, sky, facade, brick, plaster, curtain),
        *(road, sand, wood, tiles, snow, rock, plaid),
    )
}
"""All textures by name."""
