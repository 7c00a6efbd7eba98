"""Prepares MS COCO 2014: 81-class masks and image-level tags of the official instance files.

    python tools/prepare_coco.py --root data/coco2014 --workers 8

Expects in --root the unpacked train2014/, val2014/ and annotations/instances_{train,val}2014.json.
Writes beside them:
    masks/<split>/<id>.png     0 background, 1..80 in the order of COCO's category ids
    tags.csv                   categories of all annotations of an image, crowds included
    train.txt, val.txt         images with a tag; all images
    classes.txt                names of the labels 1..80
    prepared.json              counts, and which rule made the masks

Two rules of overlap are in use, and a few tenths of a point of mIoU lie between them:
    smaller       smaller areas lie on top, crowds at the bottom (default)
    file-order    later annotations lie on top, crowds are left out
Made again, it goes on where it was; masks of another rule are refused.

Annotations without a usable region, which other tools write, are named and stop the script; with
--on-bad-annotation skip they are left out of masks and tags alike.
"""

import argparse
import math
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.data.labels import write_label
from core.data.tags import write_table
from core.run.errors import NamesFile, UserError, raise_all, run_script
from core.run.files import atomic_write, read_json, user_path, write_json

# Images, and those with at least one annotation.
KNOWN = {"train2014": (82783, 82081), "val2014": (40504, 40137)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=user_path, default=Path("data/coco2014"))
    parser.add_argument("--overlap", choices=("smaller", "file-order"), default="smaller")
    parser.add_argument("--on-bad-annotation", choices=("stop", "skip"), default="stop")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--subset", action="store_true", help="print counts without comparing them")
    options = parser.parse_args()
    root = options.root
    incomplete_before = _earlier(root, options.overlap)
    classes, tags, counts, incomplete = None, {}, {}, []
    for split in KNOWN:
        content = read_instances(root / "annotations" / f"instances_{split}.json")
        names = [c["name"] for c in content["categories"]]
        if classes not in (None, names):
            raise UserError(f"the two instance files of {root} name different categories")
        classes = names
        images, annotations, skipped = group(content, split, options.on_bad_annotation)
        incomplete += [f"{split}/{image['file_name']}" for image in skipped]
        present = {
            f"{split}/{image['file_name']}": [
                names[k - 1] for k in sorted({a["label"] for a in annotations[image["id"]]})
            ]
            for image in images
        }
        counts[split] = (len(present), sum(map(bool, present.values())))
        compare(root, split, counts[split], images, options.subset)
        tags |= present
        _note(root, options.overlap, [*incomplete_before, *incomplete])
        write_masks(root / "masks", split, images, annotations, options, incomplete_before)
    write_table(root / "tags.csv", tags)
    trained = [name for name, names in tags.items() if name.startswith("train") and names]
    scored = [name for name in tags if name.startswith("val")]
    for name, lines in {"train": trained, "val": scored, "classes": classes}.items():
        with atomic_write(root / f"{name}.txt") as tmp:
            tmp.write_text("\n".join(lines) + "\n", "utf-8")
    _note(root, options.overlap, incomplete, images_and_tagged=counts)
    print(f"prepared: {root} ({len(trained):,} images to train on, {len(scored):,} to score)")


def _earlier(root: Path, overlap: str) -> list[str]:
    """Images whose masks an earlier call drew without some annotations; refuses another rule."""
    path = root / "prepared.json"
    record = read_json(path) if path.exists() else {"overlap": overlap}
    if record["overlap"] != overlap:
        raise UserError(
            f"the masks in {root / 'masks'} were made with --overlap {record['overlap']}; give "
            f"that, or move them and {path} away"
        )
    return record.get("annotations_left_out", [])


def _note(root: Path, overlap: str, incomplete: Sequence[str], **counts: dict) -> None:
    left_out = {"annotations_left_out": sorted({*incomplete})} if incomplete else {}
    write_json(root / "prepared.json", {"overlap": overlap, **counts, **left_out})


def read_instances(path: Path) -> dict:
    """The official file, its categories in the order of their ids."""
    if not path.is_file():
        raise UserError(f"{path} is missing; unpack COCO's annotations there, or set --root")
    content = read_json(path)
    lacking = [
        k
        for k in ("images", "annotations", "categories")
        if not isinstance(content, dict) or k not in content
    ]
    if lacking:
        raise UserError(f"{path} is no instance file: it lacks {', '.join(lacking)}")
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
        raise UserError(f"{path}: the id of a category is no number") from None
    return content


def group(
    content: dict, split: str, on_bad: str = "stop"
) -> tuple[list[dict], dict[int, list[dict]], list[dict]]:
    """Images, the annotations of each with a `label`, 1..C, and images that lack some of theirs.

    Raises:
        UserError: an image is not usable; or an annotation is not, and `on_bad` is "stop" or all of
            them are alike.
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
    remedy = "mend the annotations"
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

    Raises:
        ValueError: it is of an unknown image or category, or has no usable region.
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
    """What an annotation covers.

    Args:
        segmentation: polygons as lists of x, y, x, y or of points [x, y]; one such polygon; or run
            lengths, as numbers or as COCO's text.
        height, width: of the image, pixels.

    Returns:
        Polygons of three corners or more as lists of x, y, x, y; or run lengths down the columns,
        which begin with background.

    Raises:
        ValueError: it is none of these, or does not fit the image.
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
        raise ValueError("its coordinates lie between 0 and 1; they must be pixels")
    far = 2 * max(height, width)
    if any(not -far < value < 2 * far for value in values):
        raise ValueError(f"its coordinates are far outside the image of {width}x{height} pixels")
    # Less than three corners are no area; four numbers would be read as a box.
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
    """x, y, x, y of a polygon given so or as points."""
    if isinstance(polygon, list) and polygon and all(isinstance(p, list) for p in polygon):
        if any(len(point) != 2 for point in polygon):
            raise ValueError("a point of its polygon is not a pair of numbers")
        polygon = [value for point in polygon for value in point]
    if not isinstance(polygon, list) or not all(map(_is_number, polygon)) or len(polygon) % 2:
        raise ValueError("its polygon is no list of pairs of numbers")
    return polygon


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _runs(segmentation: dict, height: int, width: int) -> list[int]:
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if size != [height, width]:
        raise ValueError(
            f"its run lengths are of an image of {size} pixels, the image is {[height, width]} "
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
    """Run lengths of COCO's text: five bits a character, the lowest first, the sixth says whether
    more follow; from the fourth on, they are differences from the last but one."""
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


def compare(
    root: Path, split: str, counts: tuple[int, int], images: Sequence[dict], subset: bool
) -> None:
    """Prints counts beside the known ones; refuses others, and missing photographs."""
    for what, count, known in zip(("images", "with a tag"), counts, KNOWN[split], strict=True):
        note = "" if count == known else f"   known: {known:,}"
        print(f"{split} {what:12}{count:>8,}{note}")
    if counts != KNOWN[split] and not subset:
        raise UserError(f"{split} is not complete; fetch it again, or give --subset for a part")
    missing = [i["file_name"] for i in images if not (root / split / i["file_name"]).is_file()]
    raise_all([f"{split}/{name} is missing" for name in missing], f"complete {root / split}")


def write_masks(
    folder: Path, split: str, images, annotations, options, again: Sequence[str]
) -> None:
    """Writes the masks that are not there yet, and those of the images `again`, in parallel."""
    todo = []
    for image in images:
        path = folder / split / f"{Path(image['file_name']).stem}.png"
        if not path.exists() or f"{split}/{image['file_name']}" in again:
            todo.append((path, image["height"], image["width"], annotations[image["id"]]))
    work = partial(_write_mask, overlap=options.overlap)
    bar = {"desc": f"masks of {split}", "total": len(images), "unit": "mask"}
    with ProcessPoolExecutor(max(1, options.workers)) as pool:
        done = pool.map(NamesFile(work), todo, chunksize=32)
        for _ in tqdm(done, initial=len(images) - len(todo), **bar):
            pass


def _write_mask(item: tuple[Path, int, int, list[dict]], overlap: str) -> None:
    path, height, width, annotations = item
    write_label(path, draw_mask(height, width, annotations, overlap))


def draw_mask(height: int, width: int, annotations: Sequence[dict], overlap: str) -> np.ndarray:
    """Paints the instances of one image.

    Args:
        height, width: of the image, pixels.
        annotations: each with label, segmentation (see `region`), area and iscrowd.
        overlap: `smaller` or `file-order`, see above.

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


if __name__ == "__main__":
    run_script(main)
