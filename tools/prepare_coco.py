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
"""

import argparse
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

from core.errors import UserError, refuse_together, run_script
from core.files import read_json, write_json, written_whole
from core.finder import user_path
from core.labels import write_label
from core.tags import write_table

# Images, and those with at least one annotation.
KNOWN = {"train2014": (82783, 82081), "val2014": (40504, 40137)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=user_path, default=Path("data/coco2014"))
    parser.add_argument("--overlap", choices=("smaller", "file-order"), default="smaller")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--subset", action="store_true", help="print counts without comparing them")
    options = parser.parse_args()
    root = options.root
    _refuse_another_rule(root, options.overlap)
    classes, tags, counts = None, {}, {}
    for split in KNOWN:
        content = read_instances(root / "annotations" / f"instances_{split}.json")
        names = [c["name"] for c in content["categories"]]
        if classes not in (None, names):
            raise UserError(f"the two instance files of {root} name different categories")
        classes = names
        images, annotations = group(content, split)
        present = {
            f"{split}/{image['file_name']}": [
                names[k - 1] for k in sorted({a["label"] for a in annotations[image["id"]]})
            ]
            for image in images
        }
        counts[split] = (len(present), sum(map(bool, present.values())))
        compare(root, split, counts[split], images, options.subset)
        tags |= present
        write_json(root / "prepared.json", {"overlap": options.overlap})
        write_masks(root / "masks", split, images, annotations, options)
    write_table(root / "tags.csv", tags)
    trained = [name for name, names in tags.items() if name.startswith("train") and names]
    scored = [name for name in tags if name.startswith("val")]
    for name, lines in {"train": trained, "val": scored, "classes": classes}.items():
        with written_whole(root / f"{name}.txt") as aside:
            aside.write_text("\n".join(lines) + "\n", "utf-8")
    write_json(root / "prepared.json", {"overlap": options.overlap, "images_and_tagged": counts})
    print(f"prepared: {root} ({len(trained):,} images to train on, {len(scored):,} to score)")


def _refuse_another_rule(root: Path, overlap: str) -> None:
    record = root / "prepared.json"
    before = read_json(record)["overlap"] if record.exists() else overlap
    if before != overlap:
        raise UserError(
            f"the masks in {root / 'masks'} were made with --overlap {before}; give that, or move "
            f"them and {record} away"
        )


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
        "annotations": ("image_id", "category_id", "segmentation", "iscrowd", "area"),
        "categories": ("id", "name"),
    }
    for name, keys in needed.items():
        entries = content[name] if isinstance(content[name], list) else [None]
        for entry in entries:
            if not isinstance(entry, dict) or not entry.keys() >= {*keys}:
                raise UserError(f"{path}: an entry of {name} lacks one of {', '.join(keys)}")
            if any(isinstance(entry[k], (list, dict)) for k in keys if k != "segmentation"):
                raise UserError(f"{path}: an entry of {name} has a list where a value belongs")
    try:
        content["categories"].sort(key=lambda c: int(c["id"]))
    except ValueError:
        raise UserError(f"{path}: the id of a category is no number") from None
    return content


def group(content: dict, split: str) -> tuple[list[dict], dict[int, list[dict]]]:
    """Images, and the annotations of each with a `label`, 1..C."""
    label = {c["id"]: k for k, c in enumerate(content["categories"], 1)}
    images = {image["id"]: image for image in content["images"]}
    annotations, problems = defaultdict(list), []
    for a in content["annotations"]:
        if a["image_id"] not in images or a["category_id"] not in label:
            problems.append(f"annotation {a.get('id')} of {split}: unknown image or category")
        else:
            annotations[a["image_id"]].append({**a, "label": label[a["category_id"]]})
    names = [Path(image["file_name"]) for image in images.values()]
    problems += [f"{split}: {n} is not a plain file name" for n in names if n.name != str(n)]
    refuse_together(problems, "fetch the official annotations again")
    return list(images.values()), annotations


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
    refuse_together([f"{split}/{name} is missing" for name in missing], f"complete {root / split}")


def write_masks(folder: Path, split: str, images, annotations, options) -> None:
    """Writes the masks that are not there yet, in parallel."""
    todo = []
    for image in images:
        path = folder / split / f"{Path(image['file_name']).stem}.png"
        if not path.exists():
            todo.append((path, image["height"], image["width"], annotations[image["id"]]))
    work = partial(_write_mask, overlap=options.overlap)
    bar = {"desc": f"masks of {split}", "total": len(images), "unit": "mask"}
    with ProcessPoolExecutor(max(1, options.workers)) as pool:
        done = pool.map(work, todo, chunksize=32)
        for _ in tqdm(done, initial=len(images) - len(todo), **bar):
            pass


def _write_mask(item: tuple[Path, int, int, list[dict]], overlap: str) -> None:
    path, height, width, annotations = item
    write_label(path, draw_mask(height, width, annotations, overlap))


def draw_mask(height: int, width: int, annotations: Sequence[dict], overlap: str) -> np.ndarray:
    """Paints the instances of one image.

    Args:
        height, width: of the image, pixels.
        annotations: each with label, segmentation (polygons or run lengths), area and iscrowd.
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
        runs = a["segmentation"]
        if isinstance(runs, list):
            # Less than three corners are no area; four numbers would be read as a box.
            polygons = [p for p in runs if len(p) >= 6]
            if not polygons:
                continue
            runs = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        elif isinstance(runs["counts"], list):
            runs = coco_mask.frPyObjects(runs, height, width)
        label[coco_mask.decode(runs).astype(bool)] = a["label"]
    return label


if __name__ == "__main__":
    run_script(main)
