"""Composes stuff and objects into pictures with their exact label maps.

Two kinds of picture share one painter: `benchmark_scene`, in which half of the classes come with
their own context, and `corpus_scene`, for pre-training, in which objects and stuff are independent.
Pictures are painted at twice their size and averaged, so that edges are smooth as in photographs.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

from .objects import OBJECTS, Pen, draw_invented
from .stuff import STUFF, hsv, noise

SIZE = 128  # pixels, of the finished picture
ZOOM = 2  # painted at SIZE * ZOOM


@dataclass(frozen=True)
class ObjectClass:
    """One class of the benchmark; lengths are pixels of the finished picture."""

    name: str
    context: str | None  # stuff that it comes with; None: unbiased
    own: float  # chance of its context if it is the main object
    other: float  # chance of its context if another class is the main object
    radius: tuple[float, float]  # half the width of the object


CLASSES = (
    ObjectClass("boat", "water", 0.94, 0.05, (31, 46)),
    ObjectClass("train", "rails", 0.94, 0.05, (31, 46)),
    ObjectClass("bird", "foliage", 0.94, 0.05, (32, 46)),
    ObjectClass("bottle", "wood", 0.94, 0.05, (40, 54)),
    ObjectClass("car", None, 0.0, 0.0, (31, 46)),
    ObjectClass("cat", None, 0.0, 0.0, (34, 48)),
    ObjectClass("sheep", None, 0.0, 0.0, (30, 44)),
    ObjectClass("plane", None, 0.0, 0.0, (36, 52)),
)
"""Label c of the benchmark is CLASSES[c - 1]."""

BACKDROPS = ("sky", "facade", "brick", "plaster", "curtain")
GROUNDS = ("road", "sand", "meadow", "tiles", "plaster")
CORPUS_INVENTED = 24  # further object categories of the pre-training corpus
CORPUS_TAGS = (*OBJECTS, *(f"invented_{k:02d}" for k in range(CORPUS_INVENTED)), *STUFF)
"""Image-level labels of the pre-training corpus: objects and stuff."""


@dataclass
class Scene:
    image: np.ndarray  # (SIZE, SIZE, 3) uint8 RGB
    label: np.ndarray  # (SIZE, SIZE) uint8: 0 background, n the n-th entry of `objects` + 1
    stuff: np.ndarray  # (SIZE, SIZE) uint8: index into STUFF of the ground's texture
    boxes: list[tuple[int, tuple[int, int, int, int]]]  # (label, x0 y0 x1 y1), visible objects


class Painter:
    """A picture while it is painted."""

    def __init__(self, rng: Generator):
        self.rng = rng
        self.size = SIZE * ZOOM
        self.picture = np.zeros((self.size, self.size, 3), np.float32)
        self.label = np.zeros((self.size, self.size), np.uint8)
        self.stuff = np.zeros((self.size, self.size), np.uint8)
        self.instances: list[tuple[int, np.ndarray]] = []

    def fill(self, name: str, region: np.ndarray) -> None:
        """Fills the (size, size) bool `region` with a texture."""
        self.picture[region] = STUFF[name](self.rng, self.size)[region]
        self.stuff[region] = list(STUFF).index(name)

    def split(self, low: float, high: float) -> np.ndarray:
        """(size, size) bool: below a wavy horizon at a height drawn from [low, high]."""
        height = self.rng.uniform(low, high) * self.size
        wave = noise(self.rng, self.size, (2, int(self.rng.integers(2, 9))))[0]
        horizon = height + (wave - 0.5) * self.rng.uniform(0, 0.18) * self.size
        return np.arange(self.size)[:, None] > horizon[None]

    def side(self) -> np.ndarray:
        """(size, size) bool: a slab along the left or the right edge."""
        wide = self.rng.uniform(0.12, 0.3) * self.size
        lean = self.rng.uniform(-0.15, 0.15) * np.arange(self.size)[:, None]
        slab = np.arange(self.size)[None] + lean < wide
        return slab[:, ::-1] if self.rng.random() < 0.5 else slab

    def clutter(self) -> None:
        """A few unnamed things, so that not every outline is an object."""
        for _ in range(self.rng.poisson(1.6)):
            colour = hsv(*self.rng.random(3))
            x, y = self.rng.uniform(0, self.size, 2)
            pen = Pen(self.size, (x, y), self.rng.uniform(6, 18), self.rng.uniform(0, 6), False)
            if self.rng.random() < 0.5:
                pen.ellipse(0, 0, 1, self.rng.uniform(0.4, 1), colour)
            else:
                pen.box(-0.2, -1.6, 0.2, 1.6, colour)
            self.picture[pen.mask > 0] = pen.picture[pen.mask > 0]

    def place(self, draw, label: int, radius: float, low: float, high: float) -> None:
        """Draws an object at a random place, its centre between two heights (shares of size)."""
        rng, size = self.rng, self.size
        x, y = rng.uniform(0.22, 0.78) * size, rng.uniform(low, high) * size
        pen = Pen(size, (x, y), radius * ZOOM, rng.normal(0, 0.12), rng.random() < 0.5)
        draw(pen, rng)
        mask = pen.mask > 0
        self.picture[mask] = pen.picture[mask]
        self.label[mask] = label
        self.instances.append((label, mask))

    def finish(self) -> Scene:
        """Adds light and noise and reduces the picture to its final size."""
        rng, size = self.rng, self.size
        y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
        slope = x * rng.normal(0, 0.2) + y * rng.normal(0, 0.2)
        tint = rng.normal(1, 0.06, 3)
        lit = np.clip(self.picture, 0, 1) * (1 + slope[..., None]) * tint * rng.uniform(0.75, 1.2)
        small = cv2.resize(lit.astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        small += rng.normal(0, rng.uniform(0.005, 0.03), small.shape)
        image = np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8)
        label = _majority(self.label)
        boxes, above = [], np.zeros_like(self.label, bool)
        for tag, mask in reversed(self.instances):  # the last one drawn is on top
            visible = mask & ~above
            above |= mask
            if visible.sum() >= 40 * ZOOM**2:
                rows, cols = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
                box = (cols[0], rows[0], cols[-1], rows[-1])
                boxes.append((tag, tuple(int(v) // ZOOM + 1 for v in box)))
        for hidden in set(np.unique(label)) - {0} - {tag for tag, _ in boxes}:
            label[label == hidden] = 0  # a sliver too small to recognise
        return Scene(image, label, _majority(self.stuff), boxes[::-1])


def _majority(labels: np.ndarray) -> np.ndarray:
    """The label map at the final size: a median of each ZOOM x ZOOM block."""
    height, width = labels.shape
    blocks = labels.reshape(height // ZOOM, ZOOM, width // ZOOM, ZOOM).swapaxes(1, 2)
    blocks = np.sort(blocks.reshape(height // ZOOM, width // ZOOM, -1), axis=-1)
    return np.ascontiguousarray(blocks[..., ZOOM * ZOOM // 2])


def benchmark_scene(rng: Generator) -> Scene:
    """A picture of one main class, often with its context, and sometimes a second object."""
    painter = Painter(rng)
    main = int(rng.integers(len(CLASSES)))
    chances = [(c.context, c.own if k == main else c.other) for k, c in enumerate(CLASSES)]
    shown = {context for context, chance in chances if rng.random() < chance}
    _paint_ground(painter, shown)
    painter.clutter()
    extra = [main] if rng.random() < 0.25 else []
    if rng.random() < 0.25:
        extra.append(int(rng.integers(len(CLASSES))))
    for k in (*extra, main):
        ground = CLASSES[k].name not in ("bird", "plane")
        low, high = (0.45, 0.72) if ground else (0.25, 0.65)
        shrink = 1 if k == main and not extra else rng.uniform(0.65, 0.95)
        radius = rng.uniform(*CLASSES[k].radius) * shrink
        painter.place(OBJECTS[CLASSES[k].name], k + 1, radius, low, high)
    return painter.finish()


def _paint_ground(painter: Painter, shown: set[str]) -> None:
    rng = painter.rng
    backdrop = "foliage" if "foliage" in shown else str(rng.choice(BACKDROPS))
    grounds = sorted(shown - {"foliage"}) or [str(rng.choice(GROUNDS))]
    painter.fill(backdrop, np.ones((painter.size, painter.size), bool))
    low, high = (0.5, 0.7) if backdrop == "foliage" and len(shown) == 1 else (0.42, 0.62)
    painter.fill(grounds[0], painter.split(low, high))
    for more in grounds[1:]:
        painter.fill(more, painter.split(0.65, 0.85))
    if rng.random() < 0.35:
        painter.fill(str(rng.choice(BACKDROPS + GROUNDS)), painter.side())


def corpus_scene(rng: Generator) -> tuple[Scene, np.ndarray]:
    """A picture for pre-training and its (len(CORPUS_TAGS),) bool tags.

    Every object may appear on every stuff: nothing co-occurs more often than by chance.
    """
    painter = Painter(rng)
    everywhere = np.ones((painter.size, painter.size), bool)
    textures = [str(t) for t in rng.choice(list(STUFF), int(rng.integers(1, 4)), replace=False)]
    cuts = [everywhere, painter.split(0.25, 0.7), painter.side()]
    for texture, region in zip(textures, cuts, strict=False):
        painter.fill(texture, region)
    painter.clutter()
    for _ in range(int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]))):
        kind = int(rng.integers(len(OBJECTS) + CORPUS_INVENTED))
        painter.place(_drawer(kind), kind + 1, rng.uniform(22, 44), 0.25, 0.75)
    scene = painter.finish()
    tags = np.zeros(len(CORPUS_TAGS), bool)
    tags[[label - 1 for label, _ in scene.boxes]] = True
    seen, counts = np.unique(scene.stuff[scene.label == 0], return_counts=True)
    tags[seen[counts > 0.03 * SIZE**2] + len(OBJECTS) + CORPUS_INVENTED] = True
    return scene, tags


def _drawer(kind: int):
    if kind < len(OBJECTS):
        return list(OBJECTS.values())[kind]
    return lambda pen, rng: draw_invented(pen, rng, kind - len(OBJECTS))
