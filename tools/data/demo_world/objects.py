"""Things drawn from polygons and ellipses, with random parts, proportions, colours and patterns.

Each `draw_*` function paints one instance around the origin of a unit box (x right, y down, about
[-1, 1] each way); a `Pen` maps the box into the picture and records which pixels were touched,
which is the exact mask of the object.
"""

import math

import cv2
import numpy as np
from numpy.random import Generator

from .stuff import hsv, noise

SHIFT = 4  # cv2 takes fixed-point coordinates, here in 1/16 pixel


class Pen:
    """Draws shapes given in an object's unit box into a (size, size, 3) picture in [0, 1]."""

    def __init__(
        self, size: int, centre: tuple[float, float], scale: float, angle: float, flip: bool
    ):
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        mirror = -1 if flip else 1
        self._matrix = np.array([[cos * mirror, -sin], [sin * mirror, cos]])
        self._centre = np.array(centre)
        self._scale = scale
        self.picture = np.zeros((size, size, 3), np.float32)
        self.mask = np.zeros((size, size), np.uint8)

    def _place(self, points) -> np.ndarray:
        placed = np.asarray(points, float) @ self._matrix.T + self._centre
        return np.rint(placed * (1 << SHIFT)).astype(np.int32)

    def polygon(self, points, colour) -> None:
        placed = self._place(points)
        cv2.fillPoly(self.picture, [placed], np.asarray(colour, float).tolist(), shift=SHIFT)
        cv2.fillPoly(self.mask, [placed], 1, shift=SHIFT)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour, angle: float = 0) -> None:
        turn = np.linspace(0, 2 * math.pi, 28, endpoint=False)
        px, py = rx * np.cos(turn), ry * np.sin(turn)
        cos, sin = math.cos(angle), math.sin(angle)
        self.polygon(np.stack([x + px * cos - py * sin, y + px * sin + py * cos], 1), colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def line(self, points, width: float, colour) -> None:
        placed = self._place(points)
        thick = max(2, round(width * self._scale))
        for canvas, value in ((self.picture, np.asarray(colour, float).tolist()), (self.mask, 1)):
            cv2.polylines(canvas, [placed], False, value, thick, cv2.LINE_8, SHIFT)

    def shade(self, rng: Generator, grain: float = 0.0) -> None:
        """Lights the object from one side; `grain` adds fur or dirt."""
        size = len(self.picture)
        angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.3)
        y, x = np.mgrid[:size, :size].astype(np.float32)
        x, y = (x - self._centre[0]) / self._scale, (y - self._centre[1]) / self._scale
        light = 1 + strength * np.clip(x * math.cos(angle) + y * math.sin(angle), -1, 1)
        if grain:
            light += grain * (noise(rng, size, (size // 4, size // 4)) - 0.5)
        self.picture *= light[..., None].astype(np.float32)

    def paint(self, pattern: np.ndarray, colour) -> None:
        """Recolours the touched pixels inside the (size, size) bool `pattern`."""
        self.picture[pattern & (self.mask > 0)] = colour


def _any_colour(rng: Generator) -> np.ndarray:
    return hsv(rng.random(), rng.uniform(0.25, 0.95), rng.uniform(0.35, 0.95))


def _stripes(pen: Pen, rng: Generator) -> np.ndarray:
    size = len(pen.mask)
    angle, period = rng.uniform(0, math.pi), rng.uniform(10, 22)
    y, x = np.mgrid[:size, :size]
    wobble = 14 * noise(rng, size, (5, 5))
    return ((x * math.cos(angle) + y * math.sin(angle) + wobble) % period) < period * 0.35


def draw_car(pen: Pen, rng: Generator) -> None:
    paint, glass = _any_colour(rng), hsv(rng.uniform(0.5, 0.65), 0.25, rng.uniform(0.3, 0.9))
    kind = rng.integers(3)  # saloon, van, pick-up
    roof, nose = rng.uniform(-0.55, -0.4), rng.uniform(0.0, 0.12)
    front, back = ((0.55, -0.6), (0.75, -0.92), (0.45, -0.05))[kind]
    pen.polygon(
        [(back - 0.08, -0.02), (back + 0.08, roof), (front - 0.25, roof), (front, -0.02)], paint
    )
    pen.polygon(
        [
            (back + 0.02, -0.05),
            (back + 0.13, roof + 0.08),
            (front - 0.28, roof + 0.08),
            (front - 0.1, -0.05),
        ],
        glass,
    )
    pen.box((front + back) / 2 - 0.05, roof, (front + back) / 2 + 0.03, 0, paint)
    pen.polygon([(-1, -0.05), (front, -0.08), (1, nose), (1, 0.34), (-1, 0.34)], paint)
    pen.box(-1, 0.22, 1, 0.32, paint * 0.6)
    radius = rng.uniform(0.19, 0.25)
    for x in (-0.58, 0.58):
        pen.ellipse(x, 0.34, radius, radius, (0.08, 0.08, 0.09))
        pen.ellipse(x, 0.34, radius * 0.5, radius * 0.5, np.full(3, rng.uniform(0.5, 0.9)))
    pen.ellipse(0.94, 0.1, 0.06, 0.08, (1, 0.95, 0.6))
    pen.ellipse(-0.96, 0.1, 0.05, 0.08, (0.85, 0.1, 0.1))
    pen.shade(rng)


def draw_bottle(pen: Pen, rng: Generator) -> None:
    glass = hsv(
        rng.choice([0.08, 0.3, 0.36, 0.55, 0.0]), rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.75)
    )
    wide, neck = rng.uniform(0.26, 0.38), rng.uniform(0.09, 0.13)
    shoulder = rng.uniform(-0.45, -0.1)
    outline = [(-wide, 0.98), (-wide, shoulder + 0.2), (-neck, shoulder - 0.12), (-neck, -0.85)]
    pen.polygon(outline + [(-x, y) for x, y in outline[::-1]], glass)
    pen.box(-neck - 0.02, -1, neck + 0.02, -0.82, _any_colour(rng))
    top = rng.uniform(0.15, 0.35)
    paper = hsv(rng.random(), rng.uniform(0, 0.6), rng.uniform(0.75, 1))
    pen.box(-wide, top, wide, top + rng.uniform(0.3, 0.5), paper)
    pen.box(-wide * 0.7, top + 0.1, wide * 0.7, top + 0.16, paper * 0.4)
    pen.box(-wide * 0.8, shoulder + 0.25, -wide * 0.6, 0.9, np.minimum(glass * 1.5 + 0.1, 1))
    pen.shade(rng)


def draw_cat(pen: Pen, rng: Generator) -> None:
    hue, value = rng.uniform(0.03, 0.12), rng.uniform(0.25, 0.9)
    fur = hsv(hue, rng.uniform(0.0, 0.6), value)
    sitting = rng.random() < 0.5
    if sitting:
        pen.line([(0.3, 0.85), (0.75, 0.75), (0.8, 0.3)], 0.14, fur)
        pen.ellipse(0, 0.4, rng.uniform(0.42, 0.55), 0.58, fur)
        head = (-0.05, -0.4)
    else:
        pen.line([(0.7, 0.0), (0.95, -0.35), (0.85, -0.75)], 0.13, fur)
        for x in (-0.5, -0.3, 0.4, 0.6):
            pen.box(x - 0.08, 0.1, x + 0.08, rng.uniform(0.7, 0.8), fur * 0.9)
        pen.ellipse(0.05, 0.1, 0.75, rng.uniform(0.3, 0.4), fur)
        head = (-0.65, -0.3)
    x, y = head
    radius = rng.uniform(0.3, 0.38)
    for side in (-1, 1):
        ear = [(side * 0.3, -0.1), (side * 0.32, -0.55), (side * 0.05, -0.25)]
        pen.polygon([(x + dx, y + dy) for dx, dy in ear], fur)
    pen.ellipse(x, y, radius, radius * 0.9, fur)
    if rng.random() < 0.6:
        pen.paint(_stripes(pen, rng), fur * rng.uniform(0.45, 0.7))
    for side in (-1, 1):
        pen.ellipse(x + side * 0.13, y - 0.03, 0.07, 0.08, hsv(rng.uniform(0.1, 0.4), 0.8, 0.9))
        pen.ellipse(x + side * 0.13, y - 0.03, 0.025, 0.07, (0, 0, 0))
    pen.polygon([(x - 0.05, y + 0.1), (x + 0.05, y + 0.1), (x, y + 0.17)], (0.7, 0.4, 0.4))
    pen.shade(rng, 0.25)


def draw_plane(pen: Pen, rng: Generator) -> None:
    skin = hsv(rng.random(), rng.uniform(0, 0.25), rng.uniform(0.7, 1))
    livery = _any_colour(rng)
    wing = skin * rng.uniform(0.65, 0.9)
    reach = rng.uniform(0.55, 0.8)
    pen.polygon([(0.25, -0.05), (-0.05, -reach), (-0.25, -reach), (-0.1, -0.05)], wing * 0.9)
    pen.polygon([(-0.7, -0.05), (-0.95, -0.55), (-0.75, -0.55), (-0.4, -0.08)], livery)
    pen.ellipse(0, 0, 1, rng.uniform(0.15, 0.2), skin)
    pen.polygon([(0.25, 0.05), (-0.15, reach), (-0.35, reach), (-0.15, 0.05)], wing)
    pen.polygon([(-0.65, 0.0), (-0.95, 0.25), (-0.8, 0.25), (-0.45, 0.03)], wing)
    pen.box(-0.7, 0.04, 0.75, 0.08, livery)
    for px in np.arange(-0.5, 0.65, 0.14):
        pen.box(px, -0.06, px + 0.06, 0.0, (0.2, 0.25, 0.35))
    pen.polygon([(0.8, -0.09), (0.95, -0.03), (0.82, -0.01)], (0.15, 0.2, 0.3))
    pen.shade(rng)


def draw_boat(pen: Pen, rng: Generator) -> None:
    hull, trim = _any_colour(rng), hsv(rng.random(), rng.uniform(0, 0.5), rng.uniform(0.6, 1))
    deck = rng.uniform(0.25, 0.4)
    kind = rng.integers(3)  # sailing boat, motor boat, steamer
    if kind == 0:
        cloth = hsv(rng.random(), rng.uniform(0, 0.7), rng.uniform(0.7, 1))
        pen.box(-0.06, -1, 0.02, deck, (0.35, 0.22, 0.12))
        pen.polygon([(0.05, -0.95), (0.05, deck - 0.1), (rng.uniform(0.5, 0.8), deck - 0.1)], cloth)
        pen.polygon([(-0.1, -0.85), (-0.1, deck - 0.1), (-0.65, deck - 0.1)], cloth * 0.85)
    else:
        pen.box(-0.6, deck - 0.45, 0.25, deck + 0.05, trim)
        for px in np.arange(-0.5, 0.15, 0.24):
            pen.box(px, deck - 0.35, px + 0.14, deck - 0.18, (0.15, 0.25, 0.35))
        if kind == 2:
            chimney = _any_colour(rng)
            pen.box(-0.35, deck - 0.95, -0.1, deck - 0.45, chimney)
            pen.box(-0.35, deck - 0.85, -0.1, deck - 0.75, chimney * 0.4)
        else:
            pen.polygon([(0.25, deck - 0.35), (0.5, deck), (0.25, deck)], trim * 0.8)
    pen.polygon([(-0.95, deck), (1, deck - 0.08), (0.7, 0.82), (-0.75, 0.82)], hull)
    pen.polygon([(-0.95, deck), (1, deck - 0.08), (0.96, deck + 0.06), (-0.93, deck + 0.12)], trim)
    pen.polygon([(-0.8, 0.68), (0.76, 0.68), (0.7, 0.82), (-0.75, 0.82)], hull * 0.5)
    pen.shade(rng)


def draw_train(pen: Pen, rng: Generator) -> None:
    paint, band = _any_colour(rng), _any_colour(rng)
    top, low = rng.uniform(-0.5, -0.35), 0.38
    engine = rng.random() < 0.5
    if engine:  # a steam engine with its boiler, or a carriage
        pen.box(-1, top - 0.12, -0.3, low, paint)
        pen.box(-0.85, top, -0.5, top + 0.28, (0.25, 0.3, 0.4))
        pen.box(-0.35, -0.15, 0.95, low, paint * 0.85)
        pen.ellipse(0.95, 0.12, 0.1, 0.28, paint * 0.55)
        pen.box(0.5, -0.6, 0.72, -0.12, (0.12, 0.12, 0.13))
        pen.box(-0.35, 0.0, 0.95, 0.06, band)
        pen.polygon([(0.9, low), (1.05, low + 0.25), (0.7, low + 0.25)], (0.2, 0.2, 0.22))
    else:
        pen.polygon([(-1, top), (0.85, top), (1, top + 0.25), (1, low), (-1, low)], paint)
        pen.box(-1, top - 0.06, 0.85, top + 0.03, paint * 0.5)
        count = int(rng.integers(4, 7))
        glass = hsv(0.55, 0.15, rng.uniform(0.35, 0.9))
        for px in np.linspace(-0.92, 0.6, count):
            pen.box(px, top + 0.14, px + 1.1 / count, top + 0.42, glass)
        pen.box(-1, low - 0.22, 1, low - 0.14, band)
    for px in np.linspace(-0.8, 0.75, 4 if engine else 5):
        pen.ellipse(px, low + 0.1, 0.13, 0.13, (0.1, 0.1, 0.1))
        pen.ellipse(px, low + 0.1, 0.06, 0.06, (0.55, 0.2, 0.15) if engine else (0.5, 0.5, 0.5))
    pen.shade(rng)


def draw_sheep(pen: Pen, rng: Generator) -> None:
    wool = hsv(rng.uniform(0.05, 0.15), rng.uniform(0, 0.3), rng.uniform(0.65, 1))
    face = hsv(rng.uniform(0.02, 0.1), rng.uniform(0.1, 0.4), rng.choice([0.12, 0.25, 0.85]))
    for x in (-0.45, -0.25, 0.3, 0.5):
        pen.box(x - 0.07, 0.2, x + 0.07, rng.uniform(0.78, 0.9), face)
    for turn in np.linspace(0, 2 * math.pi, 11, endpoint=False):
        x, y = 0.1 + 0.55 * math.cos(turn), 0.05 + 0.3 * math.sin(turn)
        pen.ellipse(
            x, y, rng.uniform(0.2, 0.27), rng.uniform(0.18, 0.25), wool * rng.uniform(0.88, 1)
        )
    pen.ellipse(0.1, 0.05, 0.6, 0.36, wool)
    y = rng.choice([-0.2, 0.35], p=[0.7, 0.3])  # looking up, or grazing
    pen.ellipse(-0.72, y, 0.2, 0.26, face, 0.4)
    pen.ellipse(-0.55, y - 0.14, 0.16, 0.07, face * 0.8, 0.5)
    pen.ellipse(-0.78, y - 0.05, 0.035, 0.035, (0.95, 0.95, 0.9))
    pen.shade(rng, 0.5)


def draw_bird(pen: Pen, rng: Generator) -> None:
    coat, breast, beak = _any_colour(rng), _any_colour(rng), hsv(rng.uniform(0.05, 0.14), 0.8, 0.9)
    fat = rng.uniform(0.33, 0.45)
    pen.polygon([(0.35, 0.1), (1, rng.uniform(0.1, 0.45)), (0.95, 0.6), (0.25, 0.4)], coat * 0.7)
    for x in (-0.02, 0.14):
        pen.line([(x, 0.4), (x - 0.03, 0.85)], 0.06, beak * 0.7)
    pen.ellipse(0, 0.1, 0.6, fat, coat, 0.35)
    pen.ellipse(-0.15, 0.22, 0.4, fat * 0.7, breast, 0.5)
    pen.ellipse(-0.5, -0.4, 0.3, 0.27, coat if rng.random() < 0.5 else breast)
    pen.polygon([(-0.74, -0.48), (-1, -0.33), (-0.72, -0.28)], beak)
    if rng.random() < 0.4:  # flying
        pen.polygon([(-0.2, -0.05), (0.35, -0.05), (0.55, -0.95), (0.2, -0.8)], coat * 0.85)
    else:
        pen.ellipse(0.2, 0.05, 0.42, 0.2, coat * 0.65, 0.5)
    pen.ellipse(-0.56, -0.45, 0.06, 0.06, (0.95, 0.95, 0.9))
    pen.ellipse(-0.57, -0.45, 0.03, 0.03, (0, 0, 0))
    pen.shade(rng, 0.2)


OBJECTS = {
    "boat": draw_boat,
    "train": draw_train,
    "sheep": draw_sheep,
    "bird": draw_bird,
    "car": draw_car,
    "bottle": draw_bottle,
    "cat": draw_cat,
    "plane": draw_plane,
}
"""The eight object classes of the benchmark."""


def draw_invented(pen: Pen, rng: Generator, kind: int) -> None:
    """Draws one instance of invented category `kind`: a fixed build, free colours and proportions.

    The build (outline of the body, limbs, windows, pattern) depends only on `kind`, so any number
    of categories can fill a pre-training corpus.
    """
    build = np.random.default_rng([kind, 20230417])
    lobes, jag = int(build.integers(2, 8)), build.uniform(0, 0.35)
    flat, boxy = build.uniform(0.4, 1), build.random() < 0.4
    limbs, limb_spread = int(build.integers(0, 6)), build.uniform(0.5, math.pi)
    limb_turn, limb_width = build.uniform(0, 2 * math.pi), build.uniform(0.08, 0.2)
    spots, pattern, head = int(build.integers(0, 6)), int(build.integers(3)), build.random() < 0.5
    first, second = _any_colour(rng), _any_colour(rng)
    for n in range(limbs):
        angle = limb_turn + limb_spread * (n / max(1, limbs - 1) - 0.5) + rng.normal(0, 0.05)
        tip = (math.cos(angle) * rng.uniform(0.85, 1), math.sin(angle) * rng.uniform(0.85, 1))
        pen.line([(0, 0), tip], limb_width, second)
    turn = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    radius = 0.7 * (1 + jag * np.cos(lobes * turn + build.uniform(0, 6))) * rng.uniform(0.9, 1.1)
    x, y = radius * np.cos(turn), flat * radius * np.sin(turn) * rng.uniform(0.85, 1.15)
    if boxy:
        x, y = np.clip(x, -0.55, 0.55), np.clip(y, -0.45 * flat, 0.45 * flat)
    pen.polygon(np.stack([x, y], 1), first)
    if pattern == 1:
        pen.paint(_stripes(pen, rng), first * 0.5)
    elif pattern == 2:
        pen.polygon(np.stack([x, y], 1) * 0.55, second)
    if head:
        pen.ellipse(-0.65, -0.45 * flat, 0.25, 0.25, second)
        pen.ellipse(-0.7, -0.5 * flat, 0.06, 0.06, (0.05, 0.05, 0.05))
    for n in range(spots):
        pen.ellipse(-0.4 + 0.8 * n / max(1, spots - 1), 0.05, 0.08, 0.1, second * 0.6)
    pen.shade(rng, 0.2)
