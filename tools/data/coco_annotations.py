"""COCO's instance annotations: read, checked and painted as masks."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.run.errors import UserError, raise_all
from core.run.files import read_json


def read_instances(path: Path) -> dict:
    """The content of an instance file, with its categories in the order of their ids.

    Raises:
        UserError: the file is missing or is not an instance file.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; unpack COCO's annotations there, or set --root")
    content = read_json(path)
    lacking = [
        k
        for k in ("images", "annotations", "categories")
        if not isinstance(content, dict) or k not in content
    ]
    if lacking:
        raise UserError(f"{path} is not an instance file: it lacks {', '.join(lacking)}")
    needed = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": (),
        "categories": ("id", "name"),
    }
    for name, keys in needed.items():
        entries = content[name] if isinstance(content[name], list) else [None]
        for entry in entries:
            if not isinstance(entry, dict) or not entry.keys() >= {*keys}:
                raise UserError(f"{path}: an entry of {name} lacks one of {', '.join(keys)}")
            if any(isinstance(entry[k], (list, dict)) for k in keys):
                raise UserError(f"{path}: an entry of {name} has a list where a value belongs")
    try:
        content["categories"].sort(key=lambda c: int(c["id"]))
    except ValueError:
        raise UserError(f"{path}: the id of a category is not a number") from None
    return content


def group(
    content: dict, split: str, on_bad: str = "stop"
) -> tuple[list[dict], dict[int, list[dict]], list[dict]]:
    """Groups the annotations by image.

    Args:
        content: content of an instance file, from `read_instances`.
        split: name of the split, for messages.
        on_bad: "stop", or "skip" to leave out unusable annotations.

    Returns:
        The images; by image id, the annotations, each with its `label`, 1..C; and the images some
        of whose annotations were left out.

    Raises:
        UserError: an image is unusable; or an annotation is, and `on_bad` is "stop" or no
            annotation is usable.
    """
    label = {c["id"]: k for k, c in enumerate(content["categories"], 1)}
    images = {image["id"]: image for image in content["images"]}
    problems = []
    for image in images.values():
        name, sides = str(image["file_name"]), (image["height"], image["width"])
        if Path(name).name != name:
            problems.append(f"{split}: {name} is not a plain file name")
        if not all(isinstance(side, int) and side > 0 for side in sides):
            problems.append(f"{split}: {name} has height and width {sides}, not pixels")
    raise_all(problems, "fetch or export the annotations again")
    annotations, incomplete = defaultdict(list), []
    for a in content["annotations"]:
        try:
            item = checked(a, images, label)
            annotations[item["image_id"]].append(item)
        except ValueError as error:
            key = a.get("image_id")
            image = None if isinstance(key, (list, dict)) else images.get(key)
            incomplete += [image] if image else []
            name = image["file_name"] if image else f"{key} (unknown)"
            problems.append(f"annotation {a.get('id')} of {split}, image {name}: {error}")
    remedy = "correct the annotations"
    if len(problems) < len(content["annotations"]):
        remedy += ", or leave these out with --on-bad-annotation skip"
        if on_bad == "skip":
            for problem in problems[:8]:
                print(f"left out: {problem}")
            print(f"{split}: {len(problems)} annotations left out of masks and tags")
            problems.clear()
    raise_all(problems, remedy)
    return list(images.values()), annotations, incomplete


def checked(annotation: dict, images: dict, label: dict) -> dict:
    """The annotation with its `label`.

    Args:
        annotation: entry of the instance file.
        images: entries of the images by id.
        label: labels, 1..C, by category id.

    Raises:
        ValueError: its image or category is unknown, or it has no usable region.
    """
    keys = ("image_id", "category_id", "segmentation", "iscrowd", "area")
    lacking = [key for key in keys if key not in annotation]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    image, category, area = (annotation[k] for k in ("image_id", "category_id", "area"))
    if isinstance(image, (list, dict)) or isinstance(category, (list, dict)):
        raise ValueError("its image or category is a list")
    if image not in images or category not in label:
        raise ValueError("unknown image or category")
    if not _is_number(area):
        raise ValueError(f"its area is {area}, not a number")
    region(annotation["segmentation"], images[image]["height"], images[image]["width"])
    return {**annotation, "label": label[category]}


def region(segmentation: object, height: int, width: int) -> list[list[float]] | list[int]:
    """The region that an annotation covers.

    Args:
        segmentation: polygons as lists of x, y, x, y or of points [x, y]; a single such polygon; or
            run lengths, as numbers or as COCO's text.
        height: image height in pixels.
        width: image width in pixels.

    Returns:
        Polygons with at least three corners, as lists of x, y, x, y; or run lengths down the
        columns, which begin with background.

    Raises:
        ValueError: the segmentation has another form, or does not fit the image.
    """
    if isinstance(segmentation, dict):
        return _runs(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"its segmentation is {segmentation!r}; it shows no region")
    one = _is_number(segmentation[0]) or (
        isinstance(segmentation[0], list)
        and all(
            isinstance(p, list) and len(p) == 2 and all(map(_is_number, p)) for p in segmentation
        )
    )
    polygons = [_corners(p) for p in ([segmentation] if one else segmentation)]
    values = [value for polygon in polygons for value in polygon]
    if any(v != int(v) for v in values) and all(0 <= v <= 1 for v in values):
        raise ValueError("its coordinates are between 0 and 1; they must be pixels")
    far = 2 * max(height, width)
    if any(not -far < value < 2 * far for value in values):
        raise ValueError(f"its coordinates are far outside the image of {width}x{height} pixels")
    # Fewer than three corners have no area; pycocotools would read four numbers as a box.
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    seen = [
        p
        for p in polygons
        if min(p[::2]) < width and min(p[1::2]) < height and max(p[::2]) > 0 and max(p[1::2]) > 0
    ]
    if not seen:
        raise ValueError("it encloses nothing inside the image")
    return seen


def _corners(polygon: object) -> list[float]:
    """A polygon, given as x, y, x, y or as points, as x, y, x, y."""
    if isinstance(polygon, list) and polygon and all(isinstance(p, list) for p in polygon):
        if any(len(point) != 2 for point in polygon):
            raise ValueError("a point of its polygon is not a pair of numbers")
        polygon = [value for point in polygon for value in point]
    if not isinstance(polygon, list) or not all(map(_is_number, polygon)) or len(polygon) % 2:
        raise ValueError("its polygon is not a list of pairs of numbers")
    return polygon


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _runs(segmentation: dict, height: int, width: int) -> list[int]:
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if size != [height, width]:
        raise ValueError(
            f"its run lengths are for an image of {size} pixels, the image has {[height, width]} "
            "(height, width)"
        )
    if isinstance(counts, (str, bytes)):
        counts = _unpacked(counts if isinstance(counts, bytes) else counts.encode())
    whole = isinstance(counts, list) and all(type(c) is int and c >= 0 for c in counts)
    if not whole or sum(counts) != height * width:
        raise ValueError("its run lengths are damaged: they do not cover the image")
    if not sum(counts[1::2]):
        raise ValueError("its run lengths are all background")
    return counts


def _unpacked(text: bytes) -> list[int]:
    """Run lengths from COCO's text; empty if it is cut off.

    A character holds five bits, the lowest first; a sixth bit says whether more follow. From the
    fourth run on, a value is the difference from the run before the last. pycocotools decodes this,
    too, but damaged text may crash it.
    """
    counts, value, shift = [], 0, 0
    for character in text:
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts if not shift else []


def draw_mask(height: int, width: int, annotations: Sequence[dict], overlap: str) -> np.ndarray:
    """Paints the instances of one image.

    Args:
        height: image height in pixels.
        width: image width in pixels.
        annotations: annotations with label, segmentation (see `region`), area and iscrowd.
        overlap: "smaller" (smaller areas on top, crowds at the bottom) or "file-order" (later
            annotations on top, without crowds).

    Returns:
        (H, W) uint8, 0..C.
    """
    from pycocotools import mask as coco_mask

    if overlap == "smaller":
        order = sorted(annotations, key=lambda a: (not a["iscrowd"], -a["area"]))
    else:
        order = [a for a in annotations if not a["iscrowd"]]
    label = np.zeros((height, width), np.uint8)
    for a in order:
        parts = region(a["segmentation"], height, width)
        if isinstance(a["segmentation"], dict):
            inside = np.repeat(np.arange(len(parts)) % 2 == 1, parts)
            label[inside.reshape(width, height).T] = a["label"]
        elif parts:
            drawn = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
            label[coco_mask.decode(drawn).astype(bool)] = a["label"]
    return label
