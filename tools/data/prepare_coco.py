"""Prepares MS COCO 2014: 81-class masks and image-level tags from the official instance files.

    python tools/data/prepare_coco.py --root data/coco2014 --workers 8

Expects in --root the unpacked train2014/, val2014/ and annotations/instances_{train,val}2014.json.
Writes into the same folder:
    masks/<split>/<id>.png     0 background, 1..80 in the order of COCO's category ids
    tags.csv                   categories of all annotations of an image, including crowds
    train.txt, val.txt         images with a tag; all images
    classes.txt                names of the labels 1..80
    prepared.json              counts, and the rule that made the masks

Two rules for overlaps are in use; they differ by a few tenths of a point of mIoU:
    smaller       smaller areas are on top, crowds at the bottom (default)
    file-order    later annotations are on top, crowds are left out
A second call continues where the first one stopped, and refuses masks made with the other rule.

Annotations without a usable region, as some tools write them, are named and stop the script; with
--on-bad-annotation skip they are left out of masks and tags.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.data.labels import write_label
from core.run.errors import NamesFile, UserError, raise_all, run_script
from core.run.files import atomic_write, read_json, user_path, write_json
from tools.common import tool_parser
from tools.common.tables import write_table
from tools.data.coco_annotations import draw_mask, group, read_instances

# Number of images, and of images with at least one annotation.
KNOWN = {"train2014": (82783, 82081), "val2014": (40504, 40137)}


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--root", type=user_path, default=Path("data/coco2014"))
    parser.add_argument("--overlap", choices=("smaller", "file-order"), default="smaller")
    parser.add_argument("--on-bad-annotation", choices=("stop", "skip"), default="stop")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--subset", action="store_true", help="accept counts other than COCO's")
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
    """Images whose masks an earlier call drew without some annotations.

    Raises:
        UserError: the earlier call used another rule for overlaps.
    """
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


def compare(
    root: Path, split: str, counts: tuple[int, int], images: Sequence[dict], subset: bool
) -> None:
    """Prints the counts with the known ones.

    Raises:
        UserError: counts differ and `subset` is not set, or photographs are missing.
    """
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
    """Writes missing masks, and the masks of the images `again`, in parallel."""
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


if __name__ == "__main__":
    run_script(main)
