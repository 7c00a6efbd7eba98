"""Turns pseudo labels of other programs into label maps for `wsss.labels_dir`.

    python tools/import_labels.py CAMS --images PHOTOGRAPHS --classes boat,train --output LABELS
    python tools/import_labels.py instances.json --images PHOTOGRAPHS --output LABELS

Reads, and finds out by itself which of these it is:
    <id>.npy, .npz   activation maps: {class: map} as SEAM, PSA and MCTformer save them, or
                     {keys, high_res, ...} as IRNet, AdvCAM and CLIP-ES do, classes from 0 on;
                     (C, h, w) activations; (1 + C, h, w) probabilities or logits; (H, W) labels
    <id>.png         label maps: numbers or VOC's colours, or other colours with --colours
    one PNG a class  <class>/<id>.png, <id>/<class>.png or <id>_<class>.png
    a .json file     COCO's instances: polygons and run lengths
Pickled arrays are read without running anything in them. Writes <id>.png for every photograph that
has a label, made_from.json with the class names and a digest of the source, and inputs.json with
one of each file. A second call continues, unless files have changed since.

Names: --classes are the classes wanted, in order, --source-classes those of the source, if they
are others; each is a file with one name per line, or a list. Classes are matched by their names; a
class mapped to nothing (--map THEIRS=) becomes background.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.crf.dense import CrfConfig, make_crf
from core.data.finder import PHOTOGRAPHS, Files
from core.data.images import read_image
from core.data.labels import BIASED_ON_DISK, read_label, write_label
from core.run import inputs
from core.run.errors import UserError, refuse, run_script
from core.run.files import user_path, write_json
from core.run.log import note, warn
from core.run.stage import SIGNATURE, setting_differences
from core.run.threads import in_threads
from core.wsss.settings import WsssConfig
from tools.common import check_outside, tool_parser
from tools.exchange.names import (
    UNFINISHED,
    match,
    read_names,
    read_signature,
    table,
)
from tools.exchange.sources import ARRAYS, CLASS_MASKS, Decision, Source, open_source

SHARED = ("SOURCE", "--colours")
"""Names of the files that all labels are read from."""
MUCH = 0.9
"""A larger share of labelled pixels is rather a fault than an object."""


def main() -> None:
    defaults = WsssConfig()
    parser = tool_parser(__doc__)
    parser.add_argument("source", type=user_path, help="file or folder of labels")
    parser.add_argument("--images", type=user_path, required=True, help="folder of photographs")
    parser.add_argument("--output", type=user_path, required=True, help="folder of label maps")
    parser.add_argument("--classes", help="names of labels 1, 2, ...; default: the source's")
    parser.add_argument("--source-classes", help="the source's names; default: --classes")
    parser.add_argument(
        "--map", action="append", default=[], metavar="THEIRS=OURS", help="THEIRS= leaves it out"
    )
    parser.add_argument("--colours", type=user_path, help="table of colours (CVAT's labelmap.txt)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=defaults.threshold,
        help=f"background's score in activation maps; default {defaults.threshold}",
    )
    parser.add_argument("--crf", action="store_true", help="refine maps by the dense CRF")
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    if not 0 < options.threshold < 1:
        raise UserError(f"--threshold must be between 0 and 1, got {options.threshold}")
    check_outside(options.output, options.source, options.images)
    crf = make_crf(CrfConfig()) if options.crf else None
    decision = Decision(options.threshold, defaults.sharpness, crf)
    classes = read_names(options.classes) if options.classes else ()
    theirs = read_names(options.source_classes) if options.source_classes else classes
    photographs = Files(options.images, PHOTOGRAPHS)
    if not photographs.ids:
        raise UserError(f"there are no photographs in {options.images}; correct --images")
    source = open_source(options.source, theirs, decision, [*photographs.ids], options.colours)
    classes = classes or tuple(source.names)
    numbers = match(source.names, classes, given_pairs(options.map))
    print(f"{options.source}: {source.kind}, {len(source.ids)} images")
    print(table(source.names, classes, numbers))
    made_from = {"classes": list(classes), "source": str(options.source.resolve())}
    made_from |= {"numbers": numbers, "crf": options.crf, "threshold": options.threshold}
    ids = common_images(source, photographs, options.source)
    sign(options.output, made_from, source, ids, options.workers)
    write_labels(source, photographs, ids, numbers, options.output, options.workers)
    write_json(options.output / SIGNATURE, made_from)
    counts = label_counts(options.output, ids, len(classes), options.workers)
    report(source, ids, classes, counts, options.output)
    if source.kind == ARRAYS.name:
        print(f"threshold of activation maps: {options.threshold}")
    images = shlex.join(["--images", str(options.images)])
    labels = shlex.quote(str(options.output))
    names = shlex.quote(json.dumps(classes, ensure_ascii=False))
    print(
        f"next: python tools/audit/audit_labels.py {images} --labels {labels} --output AUDIT\n"
        f"      python tools/export_masks.py {labels} {images} --to FORMAT --output RESULT\n"
        f"      or any stage with --wsss.labels_dir {labels} --data.classes {names}"
    )


def report(
    source: Source, ids: Sequence[str], classes: Sequence[str], counts: np.ndarray, folder: Path
) -> None:
    """Prints how much is labelled, and warns of what looks like a fault.

    `counts`: (N, 256) pixels of each value in the label maps of `ids`.
    """
    sums, labelled = counts.sum(0), counts[:, 1 : 1 + len(classes)].sum(1) / counts.sum(1)
    share = sums[1 : 1 + len(classes)].sum() / sums.sum()
    print(f"{len(ids)} label maps in {folder}, {share:.0%} of their pixels labelled")
    why = "is --threshold right, or are masks inverted, numbers shifted, or is background last?"
    full = [name for name, part in zip(ids, labelled, strict=True) if part > MUCH]
    absent = [name for name, count in zip(classes, sums[1:], strict=False) if not count]
    if share > MUCH:
        warn(f"{share:.0%} of the pixels in {folder} are labelled; {why}")
    elif full and (source.kind == CLASS_MASKS or len(full) > len(ids) / 2):
        warn(
            f"over {MUCH:.0%} of the pixels are labelled in {len(full)} of {len(ids)} label maps, "
            f"such as {full[0]}; {why}"
        )
    if round(share, 2) == 0:
        amount = "nothing is" if len(absent) == len(classes) else "hardly any pixels are"
        warn(f"{amount} labelled in {folder}; {why}")
    if absent and len(absent) < len(classes):
        note(f"no label map contains {', '.join(absent)}; are --classes right?")


def label_counts(folder: Path, ids: Sequence[str], count: int, workers: int) -> np.ndarray:
    """(N, 256) pixels of each value in each label map."""

    def pixels(name: str) -> np.ndarray:
        return np.bincount(read_label(folder / f"{name}.png", count).ravel(), minlength=256)

    return np.stack([*in_threads(pixels, ids, workers, "counting", len(ids))])


def given_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """{their name: our name} of the options --map."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise UserError(f"--map {wrong[0]}: expected THEIRS=OURS")
    split = [pair.split("=", 1) for pair in pairs]
    theirs = [name for name, _ in split]
    twice = next((name for name in theirs if theirs.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--map: {twice!r} is given twice; give each of their classes once")
    return dict(split)


def sign(folder: Path, made_from: dict, source: Source, ids: Sequence[str], workers: int) -> None:
    """Notes what the label maps are made from, and adds its digest to `made_from`.

    Files of images without a label map yet may differ from those of an earlier call.

    Raises:
        UserError: the folder was made from something else, or from files that have changed.
    """
    path, began = folder / SIGNATURE, time.time_ns()
    earlier = read_signature(folder) or made_from
    there = {key: value for key, value in earlier.items() if key not in (UNFINISHED, "inputs")}
    remedy = "choose another --output, or remove the folder"
    title = f"{folder} contains labels made from something else"
    refuse(title, setting_differences(there, made_from, {}), remedy)
    if not path.is_file() and any(folder.glob("**/*.png")):
        raise UserError(f"{folder} already contains PNG files; choose another --output")
    items = {name: files_of(source, name) for name in ids}
    items |= {name: {file.name: file} for name, file in source.shared.items()}
    stamps = inputs.stamp(items, (folder,), workers)
    flat = {f"{name}\t{file}": value for name, row in stamps.items() for file, value in row.items()}
    made_from["inputs"] = inputs.summary({"source": flat})
    old = inputs.read_stamps(folder)[1]
    written = {name for name in {*old, *ids} if (folder / f"{name}.png").exists()}
    if written and path.is_file():
        # Without the list of files, their digest alone decides.
        known = bool(old) or earlier.get("inputs") == made_from["inputs"]
        lines = [] if known else ["the files of the source are not known, or differ"]
        # Photographs that were removed since say nothing about the source.
        compared = written.difference({*source.ids} - {*ids}).union(SHARED)
        sides = [{k: v for k, v in side.items() if k in compared} for side in (old, stamps)]
        lines += inputs.input_differences(*sides, {}, False) if old else []
        refuse(f"the source of the labels in {folder} has changed", lines, remedy)
    inputs.save_stamps(folder, stamps, began)
    write_json(path, {**made_from, UNFINISHED: True})


def files_of(source: Source, name: str) -> dict[str, Path]:
    """The files that an image's label is read from, by folder and name."""
    return {"/".join(file.parts[-2:]): file for file in source.files(name)}


def common_images(source: Source, photographs: Files, path: Path) -> list[str]:
    """Images with photograph and label; says how many lack one of them.

    Raises:
        UserError: there is none.
    """
    ids = [name for name in source.ids if name in photographs.ids]
    if not ids:
        raise UserError(
            f"no photograph has the name of a label: photographs such as "
            f"{next(iter(photographs.ids))}, labels such as {next(iter(source.ids), 'none')} in "
            f"{path}; both are compared without suffixes, below --images and the folder of labels"
        )
    sides = {
        "photographs without a label": [name for name in photographs.ids if name not in source.ids],
        "labels without a photograph": [name for name in source.ids if name not in photographs.ids],
    }
    for what, left in sides.items():
        if left:
            note(f"left out: {len(left)} {what}, such as {left[0]}")
    return ids


def write_labels(
    source: Source,
    photographs: Files,
    ids: Sequence[str],
    numbers: Sequence[int],
    folder: Path,
    workers: int,
) -> None:
    """Writes the label map of each image that has none yet."""
    renumbered = np.arange(256, dtype=np.uint8)
    renumbered[1:BIASED_ON_DISK] = 0
    renumbered[1 : 1 + len(numbers)] = numbers
    todo = [name for name in ids if not (folder / f"{name}.png").exists()]

    def work(name: str) -> None:
        image = read_image(photographs.of_id(name))
        label = source.label(name, image)
        if label.shape != image.shape[:2]:
            sizes = (label.shape[1], label.shape[0], image.shape[1], image.shape[0])
            raise UserError(
                "the label of {} is {}x{} pixels, its photograph {}x{}".format(name, *sizes)
            )
        write_label(folder / f"{name}.png", renumbered[label])

    for _ in in_threads(work, todo, workers, "labels", len(ids), len(ids) - len(todo)):
        pass


if __name__ == "__main__":
    run_script(main)
