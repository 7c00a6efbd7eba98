"""Lists of images with their image-level tags, in PASCAL VOC's layout or in any folder.

Ground truth is out of reach by construction: a `Split` knows images and tags only. The one way to
the masks is `ground_truth`, which scoring, diagnosis and supervised training call by name.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from unicodedata import normalize

import numpy as np

from core.data.finder import ANNOTATIONS, LABELS, PHOTOGRAPHS, Files, file_id
from core.data.images import read_image
from core.data.names import nearest
from core.data.settings import DataConfig
from core.data.tags import folder_tags, image_id, read_annotation, read_table
from core.run.errors import UserError, raise_all
from core.run.files import read_text
from core.run.notes import note
from core.run.threads import in_threads

SECOND_COLUMN = re.compile(r"(\S+)\s+(-?\d+|\S*[/.]\S*)")
"""Of a list: an id, and a number or a path."""


@dataclass(frozen=True)
class Split:
    """One list of a data set: ids, images and tags, in the order of the list.

    An id names an image's files in every folder of results, `<id>.png`; in a folder of photographs
    it is the path below the root, without the suffix.
    """

    ids: tuple[str, ...]
    images: tuple[Path, ...]
    tags: np.ndarray  # (N, C) bool, which classes each image shows
    skipped: tuple[str, ...] = ()  # ids of the list that are left out (data.on_bad_image)

    def __len__(self) -> int:
        return len(self.ids)

    def read_image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return read_image(self.images[index])


def read_split(data: DataConfig, which: str, tagged: bool = True) -> Split:
    """Reads the list `which` ("train" or "val") with the tags of its images.

    Args:
        data: the data set.
        which: "train" or "val".
        tagged: False leaves all tags unset: scoring and prediction need none.

    Raises:
        UserError: the list, or any image or annotation on it, is missing; all are told together.
    """
    split, problems = gather(data, which, tagged)
    raise_all(problems, "complete data.root, mend the list, or name every class in data.classes")
    return without_bad_images(split) if data.on_bad_image == "skip" else split


def without_bad_images(split: Split) -> Split:
    """The images that can be decoded; says which cannot.

    Raises:
        UserError: none can.
    """

    def problem(path: Path) -> str | None:
        try:
            read_image(path)
        except UserError as error:
            return str(error)

    problems = [*in_threads(problem, split.images, os.cpu_count() or 1, "checking", len(split))]
    bad = [k for k, text in enumerate(problems) if text]
    good = [k for k, text in enumerate(problems) if not text]
    if not good:
        raise UserError(f"none of the {len(split)} images can be used, first: {problems[0]}")
    if bad:
        print(f"{len(bad)} of {len(split)} images are skipped:", file=sys.stderr)
        for k in bad[:8]:
            print(f"  - {problems[k]}", file=sys.stderr)
    ids, images = np.array(split.ids), np.array(split.images)
    return Split(
        tuple(ids[good].tolist()), tuple(images[good]), split.tags[good], tuple(ids[bad].tolist())
    )


def gather(data: DataConfig, which: str, tagged: bool = True) -> tuple[Split, list[str]]:
    """The part of a list that can be used, and every problem with the rest.

    Raises:
        UserError: there is no list at all.
    """
    problems: list[str] = []
    if data.format == "voc":
        find, listed = _list_voc(data, which, problems, tagged)
    else:
        find, listed = _list_folder(data, which, problems)
    usable = []
    known = {name: k for k, name in enumerate(data.classes)}
    count = Counter(i for i, _, _ in listed)
    problems += [f"id {i} stands twice in the list" for i, n in count.items() if n > 1]
    for image, name, tags in listed:
        try:
            _refuse_climbing(image)
            path = find(name)
            if data.on_bad_image == "stop" and not path.is_file():
                raise UserError(f"{path} is missing")
            usable.append((image, path, _labels(tags, known) if tagged else []))
        except UserError as error:
            problems.append(str(error))
    rows = np.zeros((len(usable), len(known)), bool)
    for row, (_, _, present) in zip(rows, usable, strict=True):
        row[present] = True
    return Split(tuple(i for i, _, _ in usable), tuple(p for _, p, _ in usable), rows), problems


Tags = Path | tuple[Sequence[str], Path]
"""An annotation that is still to be read, or tags and where they stand."""
Listed = tuple[Callable[[str], Path], list[tuple[str, str, Tags]]]
"""How the file of a name is found; ids, names and tags of images."""


def _labels(tags: Tags, known: dict[str, int]) -> list[int]:
    names, place = tags if isinstance(tags, tuple) else (read_annotation(tags), tags)
    unknown = [name for name in names if name not in known]
    if unknown:
        near = nearest(unknown[0], known)
        hint = f"; it has {near!r}" if near else ""
        raise UserError(f"{place} names class {unknown[0]!r}, which data.classes lacks{hint}")
    return [known[name] for name in names]


def _list_voc(data: DataConfig, which: str, problems: list[str], tagged: bool) -> Listed:
    """The images of a list in PASCAL VOC's layout."""
    root = Path(data.root)
    remedy = (
        "set data.root to a folder in VOC's layout (tools/prepare_voc.py makes it of the archives, "
        "tools/make_demo_dataset.py draws the demo's)"
    )
    lines = read_list(root / "ImageSets/Segmentation" / f"{list_name(data, which)}.txt", remedy)
    images = Files(root / "JPEGImages", PHOTOGRAPHS)
    ids = [listed_id(line, images.ids, root) for line in lines]
    place = root / (data.tags or "Annotations")
    if not data.tags or not tagged:
        annotations = Files(place, ANNOTATIONS)
        return images.of_id, [(i, i, annotations.of_id(i)) for i in ids]
    table = read_table(place, data.classes, problems)
    table = {image_id(name): tags for name, tags in table.items()}
    problems += [f"{i} has no tags in {place}" for i in ids if i not in table]
    return images.of_id, [(i, i, (table[i], place)) for i in ids if i in table]


def _list_folder(data: DataConfig, which: str, problems: list[str]) -> Listed:
    """The images of a list in a folder of photographs."""
    root, masks = Path(data.root), masks_folder(data)
    place = root / (data.tags or "")
    table = folder_tags(root, data.tags, data.masks, data.classes, problems)
    images = Files(root, PHOTOGRAPHS, masks)
    rows: dict[str, tuple[str, list[str]]] = {}
    for name, tags in table.items():
        other = rows.setdefault(image_id(name), (name, tags))[0]
        if normalize("NFC", other) != normalize("NFC", name):
            problems.append(f"{other} and {name} would share a file of results; rename one")
    listed = list_name(data, which)
    if listed:
        path = root / f"{listed}.txt"
        lines = read_list(path, f"set data.{which}_list to a list there")
        ids = [listed_id(line, rows, root) for line in lines]
        problems += [f"{i} of {path} has no tags in {place}" for i in ids if i not in rows]
        ids = [i for i in ids if i in rows]
    elif which == "train":
        ids = [i for i, (_, tags) in rows.items() if tags]
        _tell_rest(f"photographs below {root} that are not in {place}", images.ids, rows)
        _tell_rest("photographs without a tag, which are not trained on", rows, ids)
    elif masks is None:
        ids = []
    else:
        labels = Files(masks, LABELS)
        ids = [i for i in rows if i in labels.ids]
        if ids:
            _tell_rest(f"masks below {masks} of no photograph", labels.ids, rows)
    if not ids:
        raise_all(problems, f"mend {place}")
    if not ids and which == "train":
        raise UserError(f"{place} gives no image a tag; there is nothing to learn from")
    if not ids:
        raise UserError(f"no image of {place} has a mask in data.masks; there is nothing to score")
    return images.named, [(i, rows[i][0], (rows[i][1], place)) for i in ids]


def _tell_rest(what: str, ids: Iterable[str], used: Iterable[str]) -> None:
    """Tells how many of `ids` are not used."""
    used = {*used}
    rest = [i for i in ids if i not in used]
    if rest:
        note(f"{what}: {len(rest)}, such as {rest[0]}")


def list_name(data: DataConfig, which: str) -> str | None:
    """Name of the list "train" or "val"; None in a folder whose images are all of it."""
    name = {"train": data.train_list, "val": data.val_list}[which]
    if name is None:
        return which if data.format == "voc" else None
    return name.removesuffix(".txt")


def _refuse_climbing(image: str) -> None:
    path = PurePosixPath(image)
    if path.is_absolute() or ".." in path.parts or "\\" in image or str(path) != image:
        raise UserError(f"id {image!r} is not a plain path below the data set's folder")


def masks_folder(data: DataConfig) -> Path | None:
    """Where the ground truth lies, if anywhere."""
    if data.masks:
        return Path(data.root) / data.masks
    return Path(data.root) / "SegmentationClass" if data.format == "voc" else None


def ground_truth(data: DataConfig, split: Split) -> tuple[Path, ...]:
    """Paths of the ground-truth masks: for scoring and fully supervised training, nothing else.

    Raises:
        UserError: masks are missing.
    """
    folder = masks_folder(data)
    if folder is None:
        raise UserError("this data set has no masks to score with; set data.masks if it does")
    return label_files(folder, split, "get the masks of this list")


def label_files(folder: Path, split: Split, remedy: str) -> tuple[Path, ...]:
    """The label map of every image of `split` in `folder`, all of which must exist."""
    return Files(folder, LABELS).every(split.ids, remedy)


def read_list(path: Path, remedy: str) -> list[str]:
    """The lines of a list, without surrounding spaces and without empty ones.

    Args:
        path: the list.
        remedy: what a user can do where it is missing.

    Raises:
        UserError: the list is missing, empty or no text.
    """
    if not path.is_file():
        raise UserError(f"the list {path} is missing; {remedy}")
    lines = [line.strip() for line in read_text(path, "the list").split("\n")]
    if not any(lines):
        raise UserError(f"the list {path} is empty")
    return [line for line in lines if line]


def listed_id(line: str, known: Collection[str], root: Path | None = None) -> str:
    """The id of the photograph that a line of a list names.

    A line may hold the photograph's path with its suffix, a leading slash and VOC's folder
    JPEGImages, and a second column, such as the path of a mask. Names may hold spaces: the longest
    beginning of the line that is a known id counts.

    Args:
        line: without surrounding spaces.
        known: ids of the photographs that there are.
        root: the folder of the data set; paths below it may be absolute.
    """
    ends = [m.start() for m in re.finditer(r"\s+", line)]
    for end in (len(line), *reversed(ends)):
        for name in _spellings(line[:end], root):
            if name in known:
                return name
    columns = SECOND_COLUMN.fullmatch(line)
    return _spellings(columns[1] if columns else line, root)[-1]


def _spellings(name: str, root: Path | None) -> list[str]:
    """The ids that a path in a list may stand for, the likeliest first."""
    if root is not None:
        name = name.removeprefix(f"{root.absolute()}/")
    ids = [file_id(part, PHOTOGRAPHS) for part in (name.lstrip("/"), name.split("JPEGImages/")[-1])]
    return [ids[0], ids[1].lstrip("/")]
