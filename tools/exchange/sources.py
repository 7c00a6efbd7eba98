"""Pseudo labels of other programs, in any of the forms that they are written in."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

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
from tools.exchange.names import EMPTY, check_names

ARRAYS = Kind("arrays", (".npy", ".npz"), (".pkl", ".mat", ".h5"))

CLASS_MASKS = "one mask per class"
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
        files: the files that the label of one image is read from.
        shared: files that all labels are read from, by what they are.
    """

    kind: str
    names: Sequence[str]
    ids: list[str]
    label: Label
    files: Callable[[str], Sequence[Path]] = lambda name: ()
    shared: dict[str, Path] = field(default_factory=dict)


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
    if path.is_file() and path.suffix.lower() == ".json":
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
    """COCO's instance file: polygons and both forms of run lengths; smaller areas on top.

    Raises:
        UserError: it is damaged, or categories share a name or are too many for a label map.
    """
    content = read_instances(path)
    names, used = [c["name"] for c in content["categories"]], set()
    for annotation in content["annotations"]:
        used.add(str(annotation.get("category_id")))
    # Roboflow lists the project as a category of its own, which may have the name of a class.
    content["categories"] = [
        c for c in content["categories"] if names.count(c["name"]) == 1 or str(c["id"]) in used
    ]
    numbers, names = ([c[key] for c in content["categories"]] for key in ("id", "name"))
    check_names(names, f"{path}: categories")
    twice = next((number for number in numbers if numbers.count(number) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has two categories with the id {twice}; export it again")
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

    return Source("COCO's instances", names, [*by_id], label, shared={"SOURCE": path})


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
        if isinstance(content, dict) and len(content) == 1 and path.suffix.lower() == ".npz":
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

    return Source("arrays", names, [*files.ids], label, lambda name: [files.of_id(name)])


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

    return Source("label maps", names, [*files.ids], label, lambda name: [files.of_id(name)])


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

    def read(name: str) -> list[Path]:
        return [files.of_id(file) for file in masks[name].values()]

    return Source(CLASS_MASKS, names, [*masks], label, read)


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool of a PNG with black and at most one other colour or number: where not black.

    Raises:
        UserError: it is missing, broken, no PNG, has 16 bits or transparent pixels, has more than
            two values, or has two and neither is black.
    """
    picture, odd = read_image(path), ""
    with path.open("rb") as content:
        bits = content.read(25)[24:]  # of a PNG, per channel; Pillow does not tell
    with Image.open(path) as file:
        if file.format != "PNG":
            odd = f"is a {file.format} picture, whatever its name says"
        elif bits == b"\x10":
            odd = "has 16 bits per channel"
        elif file.has_transparency_data and file.convert("RGBA").getextrema()[3] != (255, 255):
            odd = "has transparent pixels"
    values = np.unique(packed(picture))
    if not odd and len(values) > 2:
        odd = f"has {len(values)} values"
    elif not odd and len(values) == 2 and values[0]:
        odd = "has two values, neither of them black"
    if odd:
        raise UserError(
            f"{path} {odd}. A mask of a class is a PNG with 8 bits and two values, black outside "
            "and white inside; save it like this, without smoothing"
        )
    return picture.any(2)


def packed(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) int64, a number for each colour; black is 0."""
    return picture.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def from_colours(folder: Path, table: Path) -> Source:
    """Colour masks with a table as CVAT writes it (labelmap.txt): a line `name:red,green,blue:...`
    for each class; a name such as background stands for 0.

    Raises:
        UserError: the table is damaged, names no class, or has a name or a colour twice.
    """
    names, colours, owners = [], {}, {}
    for line in read_text(table, "the table of colours").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        # A name may contain colons, so the colour is what looks like one.
        found = re.fullmatch(r"(.+?):\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(:.*)?", line.strip())
        first, _, rest = line.strip().partition(":")
        if not found and not rest.split(":")[0]:
            raise UserError(
                f"{table} gives {first} no colour; if the masks have VOC's colours, or class "
                "numbers, leave out --colours and name the classes in their order with --classes"
            )
        if not found or max(map(int, found.groups()[1:4])) > 255:
            raise UserError(f"{table}: {line!r} is not `name:red,green,blue`, each 0 to 255")
        name, colour = found[1], tuple(map(int, found.groups()[1:4]))
        empty = name.casefold() in EMPTY
        names += [] if empty else [name]
        if colour in owners or name in owners.values():
            what = f"the colour {colour}" if colour in owners else f"the name {name!r}"
            raise UserError(f"{table} has {what} twice; each class has a name and a colour")
        colours[colour], owners[colour] = 0 if empty else len(names), name
    check_names(names, f"the table of colours {table}")
    files = Files(folder, LABELS)
    keys = packed(np.array([*colours]))
    order = np.argsort(keys)
    values = np.array([*colours.values()], np.uint8)[order]

    def label(name: str, image: np.ndarray) -> np.ndarray:
        picture = read_image(files.of_id(name))
        found = packed(picture)
        place = np.searchsorted(keys[order], found).clip(max=len(keys) - 1)
        unknown = keys[order][place] != found
        if unknown.any():
            colour = tuple(picture[unknown][0].tolist())
            raise UserError(f"{files.of_id(name)} has the colour {colour}, which {table} lacks")
        return values[place]

    def read(name: str) -> list[Path]:
        return [files.of_id(name)]

    return Source("colour masks", names, [*files.ids], label, read, {"--colours": table})
