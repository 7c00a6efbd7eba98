"""Looks an archive through before it is sent to PASCAL VOC's evaluation server.

    python tools/check_submission.py ARCHIVE --voc data/VOCdevkit/VOC2012

Checks the tree, the ids of the list, that each file is an indexed PNG with labels 0..20, and, where
the photographs are there, its size. The competition and the list are read from the archive's name.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core.data.lists import listed_id, read_list
from core.run.errors import UserError, run_script
from core.run.files import user_path
from core.submission import COMPETITIONS, check_submission


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=user_path)
    parser.add_argument("--voc", type=user_path, required=True, help="the folder VOC2012")
    parser.add_argument("--competition", choices=COMPETITIONS, help="default: the file's name")
    options = parser.parse_args()
    competition = options.competition or options.archive.name.split(".")[0]
    if competition not in COMPETITIONS:
        raise UserError(f"{competition} is none of {', '.join(COMPETITIONS)}; give --competition")
    name = competition.split("_")[1]
    path = options.voc / "ImageSets" / "Segmentation" / f"{name}.txt"
    ids, sizes = [listed_id(line, ()) for line in read_list(path, "set --voc")], {}
    for image_id in ids:
        photograph = options.voc / "JPEGImages" / f"{image_id}.jpg"
        if photograph.is_file():
            with Image.open(photograph) as image:
                sizes[image_id] = image.size[::-1]
    check_submission(options.archive, competition, ids, sizes)
    unknown = f"; {len(ids) - len(sizes)} sizes unchecked" if len(sizes) < len(ids) else ""
    print(f"{options.archive}: {len(ids)} predictions, nothing wrong{unknown}")


if __name__ == "__main__":
    run_script(main)
