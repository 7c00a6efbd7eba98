"""Pseudo labels of other programs, in any of the forms that they are written in."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from core.crf.dense import DenseCRF
from core.data.finder import LABELS, Files, Kind, image_id
from core.data.images import read_image
from core.data.labels import BIASED_ON_DISK, IGNORE, read_label
from core.run.errors import UserError
from core.run.files import read_text
from core.segmenter import most_likely
from core.wsss.cam import cam_label, upsampled
from tools.data.coco_annotations import draw_mask, group, read_instances
from tools.exchange.arrays import channels_first, class_maps, probabilities, read_saved, unit
from tools.exchange.names import EMPTY

ARRAYS = Kind("arrays", (".npy", ".npz"), (".pkl", ".mat", ".h5"))

LOGITS = ("msc_segs", "segs")  # WeCLIP's, ToCo's and AFA's, over all scales first

Label = Callable[[str, np.ndarray], np.ndarray]
"""Id and (H, W, 3) RGB photograph -> (H, W) uint8 labels, 0 for background, 254 and 255 special."""


@dataclass
class Source:
    """Labels of a set of images.

    Attributes:
        kind: what the source is, for people.
        names: its class names, of labels 1, 2, ...
        ids: images with a label.
        label: label of one image.
    """

    kind: str
    names: Sequence[str]
    ids: list[str]
    label: Label


@dataclass
class Decision:
    """How activation maps become labels: background's score, sharpness of the softmax, and CRF."""

    threshold: float
    sharpness: float
    crf: DenseCRF | None


def open_source(
    path: Path,
    names: Sequence[str],
    decision: Decision,
    photographs: Sequence[str],
    colours: Path | None = None,
) -> Source:
    """Finds out what a file or folder of labels is.

    Args:
        path: COCO's instance file; or a folder of arrays, of label maps, or of masks per class.
        names: class names; empty: the source must say them.
        decision: for activation maps.
        photographs: ids of the photographs.
        colours: table of colours, for colour masks that are not in VOC's.

    Raises:
        UserError: it is missing, nothing known, or its classes are not known.
    """
    if path.is_file() and path.suffix == ".json":
        return from_coco(path, photographs)
    if not path.is_dir():
        raise UserError(f"{path} is missing, or neither a folder of labels nor COCO's .json file")
    if colours is not None:
        return from_colours(path, colours)
    if not names:
        raise UserError(f"{path} does not say its class names; give --classes")
    arrays = Files(path, ARRAYS)
    if arrays.ids:
        return from_arrays(arrays, names, decision)
    maps = Files(path, LABELS)
    if not maps.ids:
        raise UserError(f"{path} contains no {', '.join((*ARRAYS.suffixes, '.png'))} files")
    return from_class_masks(maps, names, photographs) or from_label_maps(maps, names)


def from_coco(path: Path, photographs: Sequence[str]) -> Source:
    """COCO's instance file: polygons and both forms of run lengths; smaller areas on top."""
    content = read_instances(path)
    names = [c["name"] for c in content["categories"]]
    if not names:
        raise UserError(f"{path} has no categories")
    known, names_of = set(photographs), {}
    for image in content["images"]:
        name = str(image["file_name"]).replace("\\", "/")
        names_of[image["id"]] = photograph_of(name, known)
        image["file_name"] = name.rpartition("/")[2]
    images, annotations, _ = group(content, path.name)
    by_id = {names_of[image["id"]]: image for image in images}
    if len(by_id) != len(images):
        raise UserError(f"{path} lists two images of one name; rename one of them")

    def label(name: str, image: np.ndarray) -> np.ndarray:
        entry = by_id[name]
        return draw_mask(entry["height"], entry["width"], annotations[entry["id"]], "smaller")

    return Source("COCO's instances", names, [*by_id], label)


def photograph_of(name: str, photographs: Collection[str]) -> str:
    """Id of the photograph that a file name of COCO's stands for.

    Annotation tools write names with folders or without. Label Studio writes local files as
    `/data/local-files/?d=album/one.jpg`, and uploaded ones with eight hexadecimal digits and a
    hyphen before the name. A name that fits no photograph is returned without folders.
    """
    path = unquote(name.rpartition("?d=")[2]) if "?d=" in name else name
    plain = path.rpartition("/")[2]
    guesses = (path, plain, re.sub("^[0-9a-f]{8}-", "", plain))
    return next((g for g in map(image_id, guesses) if g in photographs), image_id(plain))


def from_arrays(files: Files, names: Sequence[str], decision: Decision) -> Source:
    """Activation maps, probabilities, or label maps, saved by NumPy."""

    def label(name: str, image: np.ndarray) -> np.ndarray:
        path, count, size = files.of_id(name), len(names), image.shape[:2]
        content = read_saved(path)
        if isinstance(content, dict) and len(content) == 1 and path.suffix == ".npz":
            content = next(iter(content.values()))
        logits = [content[key] for key in LOGITS if isinstance(content, dict) and key in content]
        if logits:
            content = np.asarray(logits[0])
        if isinstance(content, np.ndarray) and content.ndim == 4 and len(content) == 1:
            content = content[0]
        if isinstance(content, dict):
            keys, maps = class_maps(content, path, count)
        elif not isinstance(content, np.ndarray) or content.dtype.kind not in "fiub":
            raise UserError(f"{path} contains {type(content).__name__}, not numbers")
        elif content.ndim == 2 and content.dtype.kind in "iu":
            return numbers(content, path, count)
        else:
            maps = channels_first(content, path, count)
            check_shape(maps.shape[1:], size, path)
            if len(maps) == count + 1:
                large = upsampled(probabilities(maps, path), size)
                return most_likely(image, large / large.sum(0), decision.crf)
            keys, maps = np.arange(count), unit(maps.astype(np.float32), path)
            keys, maps = keys[maps.any((1, 2))], maps[maps.any((1, 2))]
        check_shape(maps.shape[1:], size, path)
        settings = (decision.threshold, decision.crf, decision.sharpness)
        return cam_label(image, keys + 1, maps, *settings)

    return Source("arrays", names, [*files.ids], label)


def check_shape(shape: tuple[int, ...], size: tuple[int, int], path: Path) -> None:
    """Refuses maps whose shape is not the photograph's, up to rounding and padding."""
    ratio = shape[0] * size[1] / (shape[1] * size[0])
    off = max(1 / min(shape), 0.02)
    if not 1 - off <= ratio <= 1 + off:
        raise UserError(
            f"{path} has maps of {shape[1]}x{shape[0]} (width x height), and its photograph of "
            f"{size[1]}x{size[0]} pixels has another shape"
        )


def numbers(label: np.ndarray, path: Path, count: int) -> np.ndarray:
    """A label map of any integer type as (H, W) uint8; -1 is read as ignored."""
    wrong = label[(label < -1) | ((label > count) & (label < BIASED_ON_DISK)) | (label > IGNORE)]
    if wrong.size:
        raise UserError(f"{path} contains label {wrong[0]}; expected 0..{count}, 254, 255 or -1")
    return np.where(label < 0, IGNORE, label).astype(np.uint8)


def from_label_maps(files: Files, names: Sequence[str]) -> Source:
    """One PNG per image: numbers, or VOC's colours."""

    def label(name: str, image: np.ndarray) -> np.ndarray:
        return read_label(files.of_id(name), len(names))

    return Source("label maps", names, [*files.ids], label)


def from_class_masks(
    files: Files, names: Sequence[str], photographs: Sequence[str]
) -> Source | None:
    """One PNG per class of an image: <class>/<id>, <id>/<class> or <id>_<class>; smaller areas are
    on top. None if the files are not named in this way."""
    known = set(photographs)
    masks: dict[str, dict[int, str]] = {}
    for file in files.ids:
        for number, name in enumerate(names, 1):
            ends = (f"/{name}", f"_{name}", f"-{name}")
            owner = next((file.removesuffix(end) for end in ends if file.endswith(end)), None)
            if file.startswith(f"{name}/"):
                owner = file.removeprefix(f"{name}/")
            if owner in known:
                masks.setdefault(owner, {})[number] = file
    if sum(map(len, masks.values())) != len(files.ids):
        return None

    def label(name: str, image: np.ndarray) -> np.ndarray:
        inside = {k: read_mask(files.of_id(file)) for k, file in masks[name].items()}
        result = np.zeros(image.shape[:2], np.uint8)
        for number, mask in sorted(inside.items(), key=lambda item: -item[1].sum()):
            if mask.shape != result.shape:
                sizes = f"{mask.shape[1]}x{mask.shape[0]} pixels, its photograph {image.shape[1]}x"
                file = files.of_id(masks[name][number])
                raise UserError(f"{file} is {sizes}{image.shape[0]}; a mask has its image's size")
            result[mask] = number
        return result

    return Source("one mask per class", names, [*masks], label)


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool of a PNG of any kind: where it is not black."""
    return read_image(path).any(2)


def from_colours(folder: Path, table: Path) -> Source:
    """Colour masks with a table as CVAT writes it (labelmap.txt): a line `name:red,green,blue:...`
    for each class; a name such as background stands for 0."""
    names, colours = [], {}
    for line in read_text(table, "the table of colours").splitlines():
        name, _, rest = line.strip().partition(":")
        if not name or line.startswith("#"):
            continue
        if not rest.split(":")[0]:
            raise UserError(
                f"{table} gives {name} no colour; if the masks have VOC's colours, or class "
                "numbers, leave out --colours and name the classes in their order with --classes"
            )
        values = rest.split(":")[0].split(",")
        if len(values) != 3 or not all(v.strip().isdigit() and int(v) < 256 for v in values):
            raise UserError(f"{table}: {line!r} is not `name:red,green,blue`")
        empty = name.casefold() in EMPTY
        names += [] if empty else [name]
        colours[tuple(map(int, values))] = 0 if empty else len(names)
    files = Files(folder, LABELS)
    keys = np.array([r << 16 | g << 8 | b for r, g, b in colours])
    order = np.argsort(keys)
    values = np.array([*colours.values()], np.uint8)[order]

    def label(name: str, image: np.ndarray) -> np.ndarray:
        picture = read_image(files.of_id(name)).astype(np.int64)
        packed = picture[..., 0] << 16 | picture[..., 1] << 8 | picture[..., 2]
        place = np.searchsorted(keys[order], packed).clip(max=len(keys) - 1)
        unknown = keys[order][place] != packed
        if unknown.any():
            colour = tuple(picture[unknown][0].tolist())
            raise UserError(f"{files.of_id(name)} has the colour {colour}, which {table} lacks")
        return values[place]

    return Source("colour masks", names, [*files.ids], label)
