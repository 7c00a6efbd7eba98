"""Checks over everything that a stage reads of label maps and features, before it begins.

A few odd files are warnings with counts; what contradicts itself throughout is refused: maps
without any class, class numbers that do not fit the tags, feature grids that do not fit the
photographs. `tools/check_data.py`, the stages and scoring share them.
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from core.data.features import feature_shape
from core.data.images import TURNED, read_header
from core.data.labels import BIASED_ON_DISK, IGNORE, inspect_label
from core.data.lists import Split
from core.run import distributed
from core.run.errors import UserError, raise_all
from core.run.threads import in_threads

Size = tuple[int, int]
Kind = Literal["pseudo", "debiased", "truth", "prediction"]


@dataclass
class Findings:
    """What is wrong with an input: problems stop, warnings are told."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Findings") -> "Findings":
        self.problems += other.problems
        self.warnings += other.warnings
        return self

    def refuse(self) -> None:
        """Raises the problems, if any, as one `UserError`."""
        raise_all(self.problems, "mend the files or the setting; tools/check_data.py looks again")


class Photograph(NamedTuple):
    """What a photograph's header tells; see `core.data.images.read_header`."""

    path: Path
    size: Size | None
    orientation: int


class Seen(NamedTuple):
    """What a label map holds."""

    values: np.ndarray  # (256,) bool, by number
    by_colour: bool  # whether its numbers are those of its colours


def check_inputs(
    split: Split,
    labels: Sequence[Path],
    classes: Sequence[str],
    workers: int,
    kind: Kind = "pseudo",
    features: Sequence[Path] = (),
) -> None:
    """Checks the label maps, and the feature files where given, of all images of a stage.

    Prints warnings.

    Args:
        split: images and tags.
        labels: a label map per image.
        classes: foreground class names.
        workers: threads.
        kind: of the label maps, see `check_labels`.
        features: a feature file per image, or none.

    Raises:
        UserError: with all problems together.
    """
    photographs = headers(split, workers)
    found = check_labels(labels, photographs, split.tags, classes, workers, kind)
    if features:
        found += check_features(features, photographs, workers)
    found.refuse()
    if distributed.rank() == 0:
        for line in found.warnings:
            print(f"warning: {line}", file=sys.stderr)


def headers(split: Split, workers: int) -> list[Photograph]:
    """Size and orientation of every photograph, none of which is decoded."""
    looked = in_threads(read_header, split.images, workers, "headers", len(split))
    return [Photograph(path, *told) for path, told in zip(split.images, looked, strict=True)]


def check_labels(
    paths: Sequence[Path],
    photographs: Sequence[Photograph],
    tags: np.ndarray,
    classes: Sequence[str],
    workers: int,
    kind: Kind = "pseudo",
) -> Findings:
    """Looks through label maps: each for itself, against its photograph, and all against the tags.

    Args:
        paths: label maps.
        photographs: the photograph of each.
        tags: (N, C) bool, which classes each photograph shows.
        classes: C foreground class names.
        workers: threads.
        kind: "pseudo" labels before debiasing, "debiased" ones, or ground "truth".
    """
    found = Findings()
    kept: list[int] = []
    seen: list[Seen] = []

    def look(k: int) -> Seen | str:
        try:
            size = photographs[k].size
            return look_at(paths[k], len(classes), size, biased=kind == "debiased")[1]
        except UserError as error:
            return str(error)

    title = f"checking {folder_of(paths).name}" if paths else "checking"
    looked = in_threads(look, range(len(paths)), workers, title, len(paths), unit="file")
    for k, result in enumerate(looked):
        if isinstance(result, str):
            found.problems.append(result)
        else:
            kept.append(k)
            seen.append(result)
    turned = [photographs[k].path for k in kept if _turned_unseen(photographs[k])]
    paths = [paths[k] for k in kept]
    found += judge(paths, seen, classes, kind, tags[kept])
    if turned and not (folder_of(paths).parent / "manifest.json").exists():  # ours are upright
        found.warnings.append(
            f"{len(turned)} photographs are mirrored or upside down without their EXIF "
            f"orientation, first: {turned[0]}; they are read upright, and label maps "
            f"(here those in {folder_of(paths)}) and features must be upright, too. Look at one"
        )
    return found


def _turned_unseen(photograph: Photograph) -> bool:
    """Whether EXIF turns a photograph in a way that its size does not show."""
    _, size, orientation = photograph
    return orientation in TURNED if size and size[0] == size[1] else orientation in (2, 3, 4)


def look_at(
    path: Path, num_classes: int, size: Size | None = None, biased: bool = True
) -> tuple[np.ndarray, Seen]:
    """Reads a label map and notes what it holds; see `core.data.labels.inspect_label`."""
    label, by_colour = inspect_label(path, num_classes, size, biased)
    counts = cv2.calcHist([label], [0], None, [256], [0, 256])
    return label, Seen(counts.ravel() > 0, by_colour)


def judge(
    paths: Sequence[Path],
    seen: Sequence[Seen],
    classes: Sequence[str],
    kind: Kind,
    tags: np.ndarray | None = None,
) -> Findings:
    """What label maps hold, taken together.

    Args:
        paths: label maps.
        seen: what each holds.
        classes: C foreground class names.
        kind: as for `check_labels`, or "prediction".
        tags: (N, C) bool, or None where there are none to compare with.
    """
    found = Findings()
    if not paths:
        return found
    folder, count = folder_of(paths), len(paths)
    values = np.array([s.values for s in seen])
    by_colour = sum(s.by_colour for s in seen)
    if by_colour:
        found.warnings.append(
            f"{by_colour} of {count} label maps in {folder} are read by their colours, which are "
            "VOC's; the numbers of their pixels are not"
        )
    holds = values[:, 1 : 1 + len(classes)]
    masked = values[:, IGNORE] & ~values[:, 1:IGNORE].any(1)
    if not holds.any():
        line = f"no label map in {folder} holds any class: all {count} hold {_nothing(values)}"
        if kind != "prediction" or masked.any():
            found.problems.append(line)
        else:
            found.warnings.append(line)
    elif kind == "truth" and masked.any():
        line = (
            f"{masked.sum()} of {count} masks in {folder} hold no class, but {IGNORE}, first: "
            f"{paths[int(masked.argmax())].name}; {IGNORE} is 'ignored', so an object that it "
            "marks is not scored"
        )
        (found.problems if 2 * masked.sum() >= count else found.warnings).append(line)
    if tags is not None and holds.any():
        found += against_tags(paths, holds, tags, classes)
    return found


def _nothing(values: np.ndarray) -> str:
    """What label maps without a class hold instead, and the remedy.

    Args:
        values: (N, 256) bool, which numbers each holds.
    """
    if values[:, BIASED_ON_DISK].any():
        return (
            f"{BIASED_ON_DISK}, biased pixels, in place of their classes; see debias.* of stage 3"
        )
    if not values[:, IGNORE].any():
        return "0, background, alone"
    if not values[:, 0].any():
        return f"{IGNORE} alone, which means 'ignored'"
    return (
        f"0 and {IGNORE} alone, and {IGNORE} means 'ignored'. If they are binary masks of a label "
        f"tool, write the class's number (1 to C) instead of {IGNORE}"
    )


def against_tags(
    paths: Sequence[Path], holds: np.ndarray, tags: np.ndarray, classes: Sequence[str]
) -> Findings:
    """Compares the classes of label maps with the tags of their photographs.

    Maps that hold some untagged class are a warning. It stops where half of the maps hold none of
    their tags, or where another order of the classes explains all contradictions but a tenth.

    Args:
        paths: label maps.
        holds: (N, C) bool, which classes each holds.
        tags: (N, C) bool; a photograph without tags is not compared.
        classes: C names.
    """
    rows = np.flatnonzero(tags.any(1) & holds.any(1))
    holds, tags = holds[rows], tags[rows]
    odd = (holds & ~tags).any(1)
    if not odd.any():
        return Findings()
    apart = ~(holds & tags).any(1)
    order = _best_order(holds, tags)
    left = (holds & ~tags[:, order]).any(1).sum()
    explained = odd.sum() >= 3 and left <= 0.1 * odd.sum()
    first = int(odd.argmax())
    names = ", ".join(classes[c] for c in np.flatnonzero(holds[first] & ~tags[first])[:3])
    told = ", ".join(classes[c] for c in np.flatnonzero(tags[first])[:3])
    text = (
        f"{odd.sum()} of {len(rows)} label maps in {folder_of(paths)} hold a class that their "
        f"photograph is not tagged with, first: {paths[rows[first]].name} ({names}; tags: {told})"
    )
    if 2 * apart.sum() < len(rows) and not explained:
        return Findings(warnings=[text])
    held = np.flatnonzero(holds.any(0))
    steps = {int(order[c] - c) for c in held}
    if explained:
        new = ", ".join(classes[c] for c in order)
        reason = f"data.classes in the order [{new}] would fit; set it, or renumber the maps"
        if steps in ({1}, {-1}):
            off = "low" if steps == {1} else "high"
            reason = f"every number is one too {off} (0 is background), or {reason}"
    else:
        reason = (
            "the numbers follow another order than data.classes (1 is "
            f"{classes[0]}), the maps belong to other photographs, or the tags are wrong"
        )
    return Findings(problems=[f"{text}. Likely {reason}"])


def _best_order(holds: np.ndarray, tags: np.ndarray) -> np.ndarray:
    """(C,) the class that each number stands for, if the maps shall fit the tags as well as can be.

    A number's own class where nothing speaks for another.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, seldom needed

    together = holds.T.astype(np.float32) @ tags.astype(np.float32)
    gain = 2 * together - holds.sum(0)[:, None] + 0.5 * np.eye(len(together))
    return linear_sum_assignment(gain, maximize=True)[1]


def check_features(
    paths: Sequence[Path],
    photographs: Sequence[Photograph],
    workers: int,
    read: Callable[[Path], tuple[int, ...]] = feature_shape,
) -> Findings:
    """Checks that feature files are grids of their photographs' shape and all as wide as most.

    Args:
        paths: feature files.
        photographs: the photograph of each.
        workers: threads.
        read: gives the shape (D, h, w) of a file.
    """
    found = Findings()

    def look(path: Path) -> tuple[int, ...] | str:
        try:
            return read(path)
        except UserError as error:
            return str(error)

    looked = [*in_threads(look, paths, workers, "checking features", len(paths), unit="file")]
    found.problems += [r for r in looked if isinstance(r, str)]
    grids = [
        Grid(path, shape, photograph)
        for path, shape, photograph in zip(paths, looked, photographs, strict=True)
        if not isinstance(shape, str)
    ]
    wrong = _misshapen(grids)
    found += wrong
    if grids and not wrong.problems:  # else the first number is no width
        usual = Counter(g.shape[0] for g in grids).most_common(1)[0][0]
        found.problems += [
            f"features {g.path} have another width than {usual}: {g.shape[0]}"
            for g in grids
            if g.shape[0] != usual
        ]
    return found


REASONS = {
    "last": "they seem to be (h, w, D): save array.transpose(2, 0, 1)",
    "tokens": "they seem to be a list of tokens: drop the class token, and reshape to (D, h, w)",
    "turned": "they seem to be (D, w, h): save array.transpose(0, 2, 1)",
    "exif": (
        "they were made of photographs that were not turned upright by their EXIF orientation; "
        "make them again of upright ones"
    ),
    "odd": "a grid covers the whole photograph, row by row",
}


class Grid(NamedTuple):
    """A feature file and its photograph."""

    path: Path
    shape: tuple[int, ...]
    photograph: Photograph


def _misshapen(grids: Sequence[Grid]) -> Findings:
    """Compares (D, h, w) of feature files with the sides of their photographs."""
    known = [g for g in grids if g.photograph.size]
    reasons = {} if _fixed(known) else {g: _misread(g) for g in known}
    wrong = {g: reason for g, reason in reasons.items() if reason}
    if not wrong:
        return Findings()
    # Whether height and width are swapped shows in photographs that are not square.
    telling = [g for g in known if g in wrong or not _square(g.photograph.size)]
    reason, count = Counter(wrong.values()).most_common(1)[0]
    first = next(g for g, r in wrong.items() if r == reason)
    (d, h, w), (height, width) = first.shape, first.photograph.size
    text = (
        f"{len(wrong)} of {len(grids)} feature files do not have the shape of their photographs, "
        f"first: {first.path}, {first.shape}, read as {d} channels on a grid of {h} x {w}, for "
        f"{height} x {width} pixels (height x width); {REASONS[reason]}"
    )
    systematic = reason != "odd" and 2 * count >= len(telling)
    if systematic or "exif" in wrong.values():
        return Findings(problems=[text])
    return Findings(warnings=[text])


def _misread(grid: Grid) -> str | None:
    """Why (a, b, c) is no (D, h, w) of its photograph, as in `REASONS`; None where it may be."""
    (a, b, c), size = grid.shape, grid.photograph.size
    if b == c or _alike((b, c), size):  # many networks take squares, whatever the photograph
        return None
    if 1 in grid.shape:
        return "tokens"
    if a == b or _alike((a, b), size):
        return "last"
    if _alike((c, b), size):
        return "exif" if grid.photograph.orientation in TURNED else "turned"
    return "odd"


def _fixed(grids: Sequence[Grid]) -> bool:
    """Whether photographs of different shapes have one grid, that of a network's fixed input."""
    shapes = {g.shape for g in grids}
    if len({shape[1:] for shape in shapes}) != 1:
        return False
    first = grids[0].photograph.size
    varied = any(not _alike(first, g.photograph.size) for g in grids)
    return varied and all(d > max(h, w) and max(h, w) <= 2 * min(h, w) for d, h, w in shapes)


def _square(size: Size) -> bool:
    return _alike(size, size[::-1])


def _alike(grid: Size, size: Size) -> bool:
    """Whether two shapes are one up to rounding and padding, by a cell or a quarter of a side."""
    (h, w), (height, width) = grid, size
    lowest = max(height / (h + 1), width / (w + 1))
    highest = min(n / (k - 1) if k > 1 else math.inf for n, k in ((height, h), (width, w)))
    return lowest <= highest or abs(math.log(h * width / (w * height))) <= math.log(1.25)


def folder_of(paths: Sequence[Path]) -> Path:
    """The folder that all of the files are in."""
    return Path(os.path.commonpath([p.parent for p in paths]))
