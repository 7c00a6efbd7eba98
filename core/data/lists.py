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

from core.data.finder import ANNOTATIONS, LABELS, PHOTOGRAPHS, Files, image_id
from core.data.images import read_image
from core.data.names import nearest
from core.data.settings import DataConfig
from core.data.tags import folder_tags, read_annotation, read_table
from core.run.errors import UserError, raise_all
from core.run.files import read_text
from core.run.log import note
from core.run.threads import try_in_threads

SECOND_COLUMN = re.compile(r"(\S+)\s+(-?\d+|\S*[/.]\S*)")  # an id, and a number or a path
Listed = tuple[Callable[[str], Path], list[tuple[str, str, Path, Sequence[str] | None]]]
"""Function that finds the file of a name; (id, name, source of tags, tags) of images, tags None
where they are still to be read from the source, an annotation."""


@dataclass(frozen=True)
class Split:
    """One list of a data set, in its order. An id names an image's files in all folders of results,
    `<id>.png`; in a folder of photographs it is the path below the root, without the suffix."""

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
    """Reads the list `which`, "train" or "val"; all tags are left unset unless `tagged` is True.

    Raises:
        UserError: the list, or any image or annotation on it, is missing; one error names all.
    """
    split, problems = gather(data, which, tagged)
    raise_all(problems, "complete data.root, correct the list, or add the classes to data.classes")
    return without_bad_images(split) if data.on_bad_image == "skip" else split


def gather(data: DataConfig, which: str, tagged: bool = True) -> tuple[Split, list[str]]:
    """The usable part of a list, and every problem with the rest; see `read_split`.

    Raises:
        UserError: there is no list at all.
    """
    problems: list[str] = []
    if data.format == "voc":
        find, listed = _list_voc(data, which, problems, tagged)
    else:
        find, listed = _list_folder(data, which, problems)
    numbers = {name: k for k, name in enumerate(data.classes)}
    count = Counter(i for i, *_ in listed)
    problems += [f"id {i} is twice in the list" for i, n in count.items() if n > 1]
    ids, paths, rows = [], [], np.zeros((len(listed), len(numbers)), bool)
    for image, name, source, tags in listed:
        try:
            plain = PurePosixPath(image)
            if str(plain) != image or plain.is_absolute() or ".." in plain.parts or "\\" in image:
                raise UserError(f"id {image!r} is not a plain path below the data set's folder")
            path = find(name)
            if data.on_bad_image == "stop" and not path.is_file():
                raise UserError(f"{path} is missing")
            tags = read_annotation(source) if tagged and tags is None else tags
            for tag in tags if tagged else ():
                if tag not in numbers:
                    near = nearest(tag, numbers)
                    hint = f"; it has {near!r}" if near else ""
                    raise UserError(f"{source} names class {tag!r}, which data.classes lacks{hint}")
                rows[len(ids), numbers[tag]] = True
        except UserError as error:
            rows[len(ids)] = False
            problems.append(str(error))
        else:
            ids.append(image)
            paths.append(path)
    return Split(tuple(ids), tuple(paths), rows[: len(ids)]), problems


def without_bad_images(split: Split) -> Split:
    """The images that can be decoded to their end; prints which cannot.

    Raises:
        UserError: none can.
    """

    def decode(path: Path) -> None:
        read_image(path)  # and forget the image

    _, bad = try_in_threads(decode, split.images, os.cpu_count() or 1, "checking images")
    good = [k for k in range(len(split)) if k not in bad]
    if not good:
        first = next(iter(bad.values()), "the list is empty")
        raise UserError(f"none of the {len(split)} images can be used, first: {first}")
    if bad:
        shown = [f"\n  - {text}" for text in bad.values()][:8]
        print(f"{len(bad)} of {len(split)} images are skipped:{''.join(shown)}", file=sys.stderr)
    ids, images = (tuple(items[k] for k in good) for items in (split.ids, split.images))
    return Split(ids, images, split.tags[good], tuple(split.ids[k] for k in bad))


def _list_voc(data: DataConfig, which: str, problems: list[str], tagged: bool) -> Listed:
    """The images of a list in PASCAL VOC's layout."""
    root = Path(data.root)
    remedy = "set data.root to VOC's layout; see tools/data/prepare_voc.py, make_demo_dataset.py"
    lines = read_list(root / "ImageSets/Segmentation" / f"{list_name(data, which)}.txt", remedy)
    images = Files(root / "JPEGImages", PHOTOGRAPHS)
    ids = [listed_id(line, images.ids, root) for line in lines]
    place = root / (data.tags or "Annotations")
    if not data.tags or not tagged:
        annotations = Files(place, ANNOTATIONS)
        return images.of_id, [(i, i, annotations.of_id(i), None) for i in ids]
    table = read_table(place, data.classes, problems)
    table = {image_id(name): tags for name, tags in table.items()}
    problems += [f"{i} has no tags in {place}" for i in ids if i not in table]
    return images.of_id, [(i, i, place, table[i]) for i in ids if i in table]


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
    listed, ids = list_name(data, which), []
    if listed:
        path = root / f"{listed}.txt"
        lines = read_list(path, f"set data.{which}_list to a list there")
        ids = [listed_id(line, rows, root) for line in lines]
        problems += [f"{i} of {path} has no tags in {place}" for i in ids if i not in rows]
        ids = [i for i in ids if i in rows]
    elif which == "train":
        ids = [i for i, (_, tags) in rows.items() if tags]
        note_rest(f"photographs below {root} that are not in {place}", images.ids, rows)
        note_rest("photographs without a tag, which are not used for training", rows, ids)
    elif masks is not None:
        labels = Files(masks, LABELS)
        ids = [i for i in rows if i in labels.ids]
        if ids:
            note_rest(f"masks below {masks} without a photograph", labels.ids, rows)
    if not ids:
        raise_all(problems, f"correct {place}")
        if which == "train":
            raise UserError(f"{place} gives no image a tag; there is nothing to learn from")
        raise UserError(f"no image of {place} has a mask in data.masks; there is nothing to score")
    return images.named, [(i, rows[i][0], place, rows[i][1]) for i in ids]


def note_rest(what: str, ids: Iterable[str], used: Iterable[str]) -> None:
    """Prints a note of how many `ids` are not in `used`, and the first; `what` describes them."""
    used = {*used}
    rest = [i for i in ids if i not in used]
    if rest:
        note(f"{what}: {len(rest)}, such as {rest[0]}")


def list_name(data: DataConfig, which: str) -> str | None:
    """Name of the list "train" or "val"; None for all images of a folder."""
    name = {"train": data.train_list, "val": data.val_list}[which]
    if name is None:
        return which if data.format == "voc" else None
    return name.removesuffix(".txt")


def masks_folder(data: DataConfig) -> Path | None:
    """The folder of the ground truth, if there is one."""
    name = data.masks or ("SegmentationClass" if data.format == "voc" else None)
    return Path(data.root) / name if name else None


def ground_truth(data: DataConfig, split: Split) -> tuple[Path, ...]:
    """Paths of the ground-truth masks, for scoring and fully supervised training only.

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
    """The lines of a list, without surrounding spaces and without empty lines.

    Raises:
        UserError: the list is missing (`remedy` says what to do), empty or not text.
    """
    if not path.is_file():
        raise UserError(f"the list {path} is missing; {remedy}")
    lines = [line.strip() for line in read_text(path, "the list").split("\n")]
    if not any(lines):
        raise UserError(f"the list {path} is empty")
    return [line for line in lines if line]


def listed_id(line: str, known: Collection[str], root: Path | None = None) -> str:
    """The id of the photograph that a line of a list, without surrounding spaces, names.

    A line may hold the photograph's path with its suffix, a leading slash and VOC's folder
    JPEGImages, and a second column, such as the path of a mask. Names may hold spaces: the longest
    beginning of the line that is a known id counts. Paths below `root` may be absolute.
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
    return [image_id(part.lstrip("/")) for part in (name, name.split("JPEGImages/")[-1])]
