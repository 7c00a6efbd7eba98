"""Writes label maps in the format of another program.

    python tools/export_masks.py LABELS --images PHOTOGRAPHS --to coco --output RESULT

LABELS are <id>.png, such as the `labels` that tools/predict.py and every stage write; class names
come from the made_from.json there, or from --classes (a list, or a file with one name per line).
Formats:
    coco          COCO's instances, a polygon for each connected region
    coco-rle      COCO's instances, run lengths for each class
    yolo          YOLO's segmentation text
    labelme       a JSON file for each photograph, polygons
    labelme-mask  the same, a mask for each class
    cvat          CVAT for images 1.1, masks
    label-studio  tasks with polygons as predictions
    png           class numbers without ignored pixels, and a table of colours
Polygons follow the edges of pixels and enclose exactly the same pixels; --tolerance leaves out
corners. Pixels without a class (254, 255) are in no mask.
"""

import math
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.data.finder import LABELS, PHOTOGRAPHS, Files
from core.data.images import read_header
from core.data.labels import read_label
from core.run.errors import UserError, run_script
from core.run.files import user_path
from core.run.log import note
from tools.common import check_outside, tool_parser
from tools.exchange.formats import FORMATS
from tools.exchange.names import names_of


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("labels", type=user_path, help="folder of label maps")
    parser.add_argument("--images", type=user_path, required=True, help="folder of photographs")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format")
    parser.add_argument("--output", type=user_path, required=True, help="folder of the result")
    parser.add_argument("--classes", help="names of labels 1, 2, ...; default: made_from.json's")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="pixels that polygons may be off; default 0"
    )
    options = parser.parse_args()
    if not 0 <= options.tolerance < math.inf:  # not NaN either
        raise UserError(f"--tolerance must be a number of at least 0, got {options.tolerance}")
    if options.tolerance and not FORMATS[options.to].polygons:
        raise UserError(f"--tolerance is for polygons, and {options.to} has none")
    check_outside(options.output, options.labels, options.images)
    names = names_of(options.labels, options.classes)
    labels, photographs = Files(options.labels, LABELS), Files(options.images, PHOTOGRAPHS)
    if not labels.ids:
        raise UserError(f"{options.labels} contains no label maps")
    if options.output.is_dir() and any(options.output.iterdir()):
        raise UserError(f"{options.output} is not empty; choose another --output")
    paths = photographs.every(labels.ids, "correct --images: each label map needs its photograph")
    rest = [name for name in photographs.ids if name not in labels.ids]
    if rest:
        note(f"photographs without a label map, left out: {len(rest)}, such as {rest[0]}")
    writer = FORMATS[options.to](options.output, names, options.tolerance)
    for name, photograph in zip(tqdm(labels.ids, "masks", unit="image"), paths, strict=True):
        size, _ = read_header(photograph)
        writer.add(name, photograph, read_label(labels.of_id(name), len(names), size))
    print(f"{len(paths)} images. {writer.finish()}")


if __name__ == "__main__":
    run_script(main)
