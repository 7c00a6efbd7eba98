"""Checks of all label maps and features that a stage reads, before it begins: a few odd files are
warnings with counts; maps, numbers or grids that contradict the data as a whole are refused."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from core.data.features import NOT_UPRIGHT, ODD, alike, feature_shape, misread, one_grid
from core.data.images import Size, read_header
from core.data.labels import BIASED_ON_DISK, IGNORE, inspect_label
from core.data.lists import Split
from core.run.errors import raise_all
from core.run.log import warn
from core.run.threads import in_threads, try_in_threads

Paths, Names = Sequence[Path], Sequence[str]
Kind = Literal["pseudo", "debiased", "truth", "prediction"]
"""Pseudo labels before debiasing, debiased labels, ground truth, or predictions."""


@dataclass
class Findings:
    """What is wrong with an input: problems stop a stage, warnings are printed."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Findings") -> "Findings":
        self.problems += other.problems
        self.warnings += other.warnings
        return self

    def refuse(self) -> None:
        """Raises the problems, if any, as one `UserError`."""
        raise_all(self.problems, "correct the files or the setting; see tools/data/check_data.py")


class Photograph(NamedTuple):
    """The header of a photograph; see `core.data.images.read_header`."""

    path: Path
    size: Size | None
    orientation: int


Seen = tuple[np.ndarray, bool]
"""What a label map holds: (256,) bool, which numbers; whether VOC's colours gave them."""


def check_inputs(
    split: Split, labels: Paths, classes: Names, workers: int, kind: Kind, features: Paths = ()
) -> None:
    """Checks all label maps of a stage, and its feature files, if any; prints warnings.

    Raises:
        UserError: there are problems; it names all of them.
    """
    photographs = headers(split, workers)
    found = check_labels(labels, photographs, split.tags, classes, workers, kind)
    if features:
        found += check_features(features, photographs, workers)
    found.refuse()
    for line in found.warnings:
        warn(line)


def headers(split: Split, workers: int) -> list[Photograph]:
    """Size and orientation of every photograph, none of which is decoded."""
    looked = in_threads(read_header, split.images, workers, "headers", len(split))
    return [Photograph(path, *header) for path, header in zip(split.images, looked, strict=True)]


def check_labels(
    paths: Paths,
    photographs: Sequence[Photograph],
    tags: np.ndarray,
    classes: Names,
    workers: int,
    kind: Kind,
) -> Findings:
    """Checks each label map by itself and against its photograph, and all of them against the tags,
    (N, C) bool."""

    def look(k: int) -> Seen:
        return look_at(paths[k], len(classes), photographs[k].size, kind == "debiased")[1:]

    title = f"checking {folder_of(paths).name}" if paths else "checking"
    seen, errors = try_in_threads(look, range(len(paths)), workers, title)
    paths = [paths[k] for k in seen]
    found = Findings([*errors.values()])
    found += judge(paths, [*seen.values()], classes, kind, tags[[*seen]])
    turned = [photographs[k].path for k in seen if _turned_unseen(photographs[k])]
    if turned and not (folder_of(paths).parent / "manifest.json").exists():  # ours are upright
        found.warnings.append(
            f"{len(turned)} photographs are mirrored or upside down without their EXIF "
            f"orientation, first: {turned[0]}; they are read upright, so label maps (in "
            f"{folder_of(paths)}) and features must be upright, too. Check one by eye"
        )
    return found


def _turned_unseen(photograph: Photograph) -> bool:
    """Whether EXIF turns a photograph in a way that its size does not show."""
    _, size, orientation = photograph
    square = size is not None and size[0] == size[1]
    return 2 <= orientation <= (8 if square else 4)


def look_at(
    path: Path, num_classes: int, size: Size | None = None, biased: bool = True
) -> tuple[np.ndarray, np.ndarray, bool]:
    """A label map, (H, W) uint8, and the two parts of its `Seen`; the arguments are those of
    `core.data.labels.inspect_label`."""
    label, by_colour = inspect_label(path, num_classes, size, biased)
    counts = cv2.calcHist([label], [0], None, [256], [0, 256])
    return label, counts.ravel() > 0, by_colour


def judge(
    paths: Paths, seen: Sequence[Seen], classes: Names, kind: Kind, tags: np.ndarray | None = None
) -> Findings:
    """Checks the content of all label maps together, and against the tags, (N, C) bool, if any."""
    found = Findings()
    if not paths:
        return found
    folder, count = folder_of(paths), len(paths)
    values, by_colour = map(np.array, zip(*seen, strict=True))
    if by_colour.any():
        found.warnings.append(
            f"{by_colour.sum()} of {count} label maps in {folder} are read by their colours, which "
            "are VOC's; the numbers of their pixels are not"
        )
    holds = values[:, 1 : 1 + len(classes)]
    masked = values[:, IGNORE] & ~values[:, 1:IGNORE].any(1)
    line, stops = "", False
    if not holds.any():
        line = f"no label map in {folder} holds any class: all {count} hold {_nothing(values)}"
        stops = kind != "prediction" or masked.any()
    elif kind == "truth" and masked.any():
        line = (
            f"{masked.sum()} of {count} masks in {folder} hold no class, only {IGNORE}, first: "
            f"{paths[int(masked.argmax())].name}; {IGNORE} means 'ignored', so objects marked with "
            "it are not scored"
        )
        stops = 2 * masked.sum() >= count
    if line:
        (found.problems if stops else found.warnings).append(line)
    if tags is not None and holds.any():
        found += _against_tags(paths, holds, tags, classes)
    return found


def _nothing(values: np.ndarray) -> str:
    """What label maps without a class hold instead, and the remedy; `values` is (N, 256) bool."""
    if values[:, BIASED_ON_DISK].any():
        return f"{BIASED_ON_DISK}, biased pixels, instead of their classes; see debias.* of stage 3"
    if not values[:, IGNORE].any():
        return "only 0, the background"
    if not values[:, 0].any():
        return f"only {IGNORE}, which means 'ignored'"
    return (
        f"only 0 and {IGNORE}, and {IGNORE} means 'ignored'. If they are binary masks from a "
        f"labelling tool, write the class's number (1 to C) instead of {IGNORE}"
    )


def _against_tags(paths: Paths, holds: np.ndarray, tags: np.ndarray, classes: Names) -> Findings:
    """Compares the classes of label maps, (N, C) bool, with the tags of their photographs.

    Maps with an untagged class are a warning. It is a problem if half of the maps hold none of
    their tags, or if another order of the classes explains nine tenths of the contradictions.
    """
    rows = np.flatnonzero(tags.any(1) & holds.any(1))
    holds, tags = holds[rows], tags[rows]
    odd = (holds & ~tags).any(1)
    if not odd.any():
        return Findings()
    order = _best_order(holds, tags)
    left = (holds & ~tags[:, order]).any(1).sum()
    explained = odd.sum() >= 3 and left <= 0.1 * odd.sum()
    first = int(odd.argmax())
    names = ", ".join(classes[c] for c in np.flatnonzero(holds[first] & ~tags[first])[:3])
    tagged = ", ".join(classes[c] for c in np.flatnonzero(tags[first])[:3])
    text = (
        f"{odd.sum()} of {len(rows)} label maps in {folder_of(paths)} hold a class that their "
        f"photograph is not tagged with, first: {paths[rows[first]].name} ({names}; tags: {tagged})"
    )
    disjoint = ~(holds & tags).any(1)
    if 2 * disjoint.sum() < len(rows) and not explained:
        return Findings(warnings=[text])
    reason = (
        f"the numbers follow another order than data.classes (1 is {classes[0]}), the maps belong "
        "to other photographs, or the tags are wrong"
    )
    if explained:
        new = ", ".join(classes[c] for c in order)
        reason = f"data.classes in the order [{new}] would fit; set it, or renumber the maps"
        steps = {int(order[c] - c) for c in np.flatnonzero(holds.any(0))}
        if steps in ({1}, {-1}):
            off = "low" if steps == {1} else "high"
            reason = f"every number is one too {off} (0 is background), or {reason}"
    return Findings([f"{text}. Likely {reason}"])


def _best_order(holds: np.ndarray, tags: np.ndarray) -> np.ndarray:
    """(C,) the class that fits the tags best for each number; ties keep a number's own class."""
    from scipy.optimize import linear_sum_assignment  # slow to import, seldom needed

    together = holds.T.astype(np.float32) @ tags.astype(np.float32)
    gain = 2 * together - holds.sum(0)[:, None] + 0.5 * np.eye(len(together))
    return linear_sum_assignment(gain, maximize=True)[1]


def check_features(
    paths: Paths, photographs: Sequence[Photograph], workers: int, read: Callable = feature_shape
) -> Findings:
    """Checks that feature files have their photographs' shape, and equally many channels; `read`
    gives the shape (D, h, w) of a file."""
    shapes, errors = try_in_threads(read, paths, workers, "checking features")
    found = Findings([*errors.values()])
    sizes = {k: photographs[k].size for k in shapes if photographs[k].size}
    reasons = {k: misread(shapes[k], sizes[k], photographs[k].orientation) for k in sizes}
    wrong = {k: reason for k, reason in reasons.items() if reason}
    if wrong and not one_grid([shapes[k] for k in sizes], [*sizes.values()]):
        reason, count = Counter(wrong.values()).most_common(1)[0]
        first = next(k for k, other in wrong.items() if other == reason)
        (d, h, w), (height, width) = shapes[first], sizes[first]
        line = (
            f"{len(wrong)} of {len(shapes)} feature files do not have the shape of their "
            f"photographs, first: {paths[first]}, {shapes[first]}, read as {d} channels on a grid "
            f"of {h} x {w}, for {height} x {width} pixels (height x width); {reason}"
        )
        # Square photographs do not show whether height and width are swapped.
        telling = [k for k, size in sizes.items() if k in wrong or not alike(size[::-1], size)]
        systematic = reason != ODD and 2 * count >= len(telling)
        if systematic or NOT_UPRIGHT in wrong.values():
            found.problems.append(line)
            return found  # widths are not checked: the first number is not the width
        found.warnings.append(line)
    widths = Counter(shape[0] for shape in shapes.values())
    usual = max(widths, key=widths.get, default=0)
    found.problems += [
        f"features {paths[k]} have {shape[0]} channels, not {usual} like most"
        for k, shape in shapes.items()
        if shape[0] != usual
    ]
    return found


def folder_of(paths: Paths) -> Path:
    """The innermost folder that contains all of the files."""
    return Path(os.path.commonpath([p.parent for p in paths]))
