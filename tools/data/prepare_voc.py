"""Prepares PASCAL VOC 2012: unpacks, verifies, and derives the training list of 10,582 images.

    python tools/data/prepare_voc.py --voc VOCtrainval_11-May-2012.tar --sbd benchmark.tgz
    python tools/data/prepare_voc.py --voc VOCdevkit/VOC2012    # an unpacked copy, without SBD

Writes into the folder with JPEGImages (--output, for archives):
    ImageSets/Segmentation/train_aug.txt    SBD's lists united with VOC's train, less VOC's val
    tags.csv                                image-level tags, from Annotations
    SegmentationClassAug/<id>.png           with --sbd-masks: masks, for supervised runs

The literature takes only the image names from SBD (Hariharan et al., ICCV 2011); its masks serve
fully supervised training.
"""

import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.data.labels import write_label
from core.data.lists import listed_id, read_list
from core.data.settings import VOC_CLASSES
from core.data.tags import read_annotation
from core.run.errors import UserError, raise_all, run_script
from core.run.files import atomic_write, user_path
from tools.common import tool_parser
from tools.common.tables import write_table
from tools.data.archives import unpack

# The official counts: images on each list, and images of train_aug that show each class.
LISTS = {"train": 1464, "val": 1449, "test": 1456, "train_aug": 10582}
TAGGED = (
    *(590, 504, 705, 468, 714, 393, 1150, 1005, 1228, 267),
    *(613, 1188, 445, 492, 4155, 522, 300, 649, 503, 567),
)


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--voc", type=user_path, required=True, help="VOCtrainval_11-May-2012.tar, or a folder"
    )
    parser.add_argument("--sbd", type=user_path, help="SBD's benchmark.tgz, or a folder")
    parser.add_argument("--test", type=user_path, help="VOC2012test.tar, to predict the test list")
    parser.add_argument(
        "--output",
        type=user_path,
        default=Path("data/VOCdevkit/VOC2012"),
        help="folder for unpacked archives (default: %(default)s)",
    )
    parser.add_argument("--sbd-masks", action="store_true", help="also write SegmentationClassAug")
    parser.add_argument(
        "--subset", action="store_true", help="accept counts other than the official ones"
    )
    options = parser.parse_args()
    if options.sbd_masks and not options.sbd:
        parser.error("--sbd-masks needs --sbd")
    root = find_voc(options.voc, options.output)
    if options.test and find_voc(options.test, root) != root:
        raise UserError(f"--test is a folder; give its archive, or move its files to {root}")
    lists = {name: read_ids(root, name) for name in ("train", "val")}
    if (root / "ImageSets" / "Segmentation" / "test.txt").is_file():
        lists["test"] = read_ids(root, "test")
    if options.sbd:
        sbd = find_sbd(options.sbd, root)
        lists["train_aug"] = derive_train_aug(sbd, lists["train"], lists["val"])
    tagged = lists.get("train_aug", lists["train"])
    tags = check_files(root, lists, tagged)
    problems = compare(lists, tags, tagged)
    if not options.subset:
        raise_all(
            problems, "fetch the official archives again, or give --subset for a part of them"
        )
    write_lists(root, lists, tags)
    if options.sbd and options.sbd_masks:
        write_masks(root, sbd, lists)
    print(f"prepared: {root}")
    if "train_aug" not in lists:
        print(
            "Without SBD there is no train_aug (10,582 images), which the literature trains on.\n"
            f"You can run all stages on train ({len(lists['train']):,} images): "
            "--data.train_list train"
        )


def find_voc(source: Path, output: Path) -> Path:
    """The folder with JPEGImages: in a copy, or unpacked from an archive into `output`."""
    if source.is_dir():
        for folder in (source, source / "VOC2012", source / "VOCdevkit" / "VOC2012"):
            if (folder / "JPEGImages").is_dir():
                return folder
        raise UserError(f"{source} has no JPEGImages; give the folder VOC2012 or the archive")

    def below_year(name: str) -> str | None:
        parts = name.removeprefix("./").split("/VOC2012/", 1)
        wanted = ("JPEGImages/", "Annotations/", "ImageSets/Segmentation/", "SegmentationClass/")
        return parts[1] if len(parts) == 2 and parts[1].startswith(wanted) else None

    if not unpack(source, output, below_year):
        raise UserError(f"{source} is not the archive of VOC 2012: nothing below VOCdevkit/VOC2012")
    return output


def find_sbd(source: Path, root: Path) -> Path:
    """SBD's folder with train.txt, val.txt and cls: in a copy, or unpacked into `root`."""
    if source.is_dir():
        for folder in (source, source / "dataset", source / "benchmark_RELEASE" / "dataset"):
            if (folder / "cls").is_dir():
                return folder
        raise UserError(f"{source} has no folder cls; give SBD's folder dataset or its archive")

    def below_dataset(name: str) -> str | None:
        parts = name.split("/dataset/", 1)
        wanted = len(parts) == 2 and parts[1].startswith(("cls/", "train.txt", "val.txt"))
        return parts[1] if wanted else None

    if not unpack(source, root / "SBD", below_dataset):
        raise UserError(f"{source} is not SBD's archive: nothing below benchmark_RELEASE/dataset")
    return root / "SBD"


def read_ids(root: Path, name: str) -> list[str]:
    return _ids(root / "ImageSets" / "Segmentation" / f"{name}.txt")


def _ids(path: Path) -> list[str]:
    lines = read_list(path, "the archive or the copy is not complete")
    return [listed_id(line, ()) for line in lines]


def derive_train_aug(sbd: Path, train: list[str], val: list[str]) -> list[str]:
    """SBD's lists and VOC's train list without VOC's val list, sorted."""
    ids = {*_ids(sbd / "train.txt"), *_ids(sbd / "val.txt"), *train}
    return sorted(ids - set(val))


def check_files(root: Path, lists: dict[str, list[str]], tagged: list[str]) -> dict[str, list[str]]:
    """Checks that every file exists; returns the tags of the training and validation images.

    Raises:
        UserError: files are missing or broken, or the lists overlap.
    """
    problems, tags = [], {}
    for name, ids in lists.items():
        missing = [i for i in ids if not (root / "JPEGImages" / f"{i}.jpg").is_file()]
        problems += [f"{name}: JPEGImages/{i}.jpg is missing" for i in missing]
        if name in ("train", "val"):
            missing = [i for i in ids if not (root / "SegmentationClass" / f"{i}.png").is_file()]
            problems += [f"{name}: SegmentationClass/{i}.png is missing" for i in missing]
    for image_id in tqdm(dict.fromkeys([*tagged, *lists["val"]]), "annotations", unit="image"):
        try:
            names = read_annotation(root / "Annotations" / f"{image_id}.xml")
            strange = sorted(set(names) - set(VOC_CLASSES))
            if strange or not names:
                what = f"class {strange[0]!r}" if strange else "no class"
                raise UserError(f"Annotations/{image_id}.xml names {what}; VOC has 20")
            tags[image_id] = [c for c in VOC_CLASSES if c in names]
        except UserError as error:
            problems.append(str(error))
    both = set(lists["train"]) & set(lists["val"])
    problems += [f"{i} is on both lists, train and val" for i in sorted(both)]
    raise_all(problems, "unpack the official archives again")
    return tags


def compare(
    lists: dict[str, list[str]], tags: dict[str, list[str]], tagged: list[str]
) -> list[str]:
    """Prints the counts with the official ones; returns the differences."""
    found = {name: (len(set(ids)), LISTS[name]) for name, ids in lists.items()}
    if "train_aug" in lists:
        counts = Counter(c for i in tagged for c in tags[i])
        found["tags of train_aug"] = (sum(counts.values()), sum(TAGGED))
        known = zip(VOC_CLASSES, TAGGED, strict=True)
        found |= {f"train_aug with {c}": (counts[c], n) for c, n in known}
    for name, (count, known) in found.items():
        print(f"{name:26}{count:>8,}" + ("" if count == known else f"   known: {known:,}"))
    return [f"{k}: {n:,} instead of {known:,}" for k, (n, known) in found.items() if n != known]


def write_lists(root: Path, lists: dict[str, list[str]], tags: dict[str, list[str]]) -> None:
    if "train_aug" in lists:
        path = root / "ImageSets" / "Segmentation" / "train_aug.txt"
        with atomic_write(path) as tmp:
            tmp.write_text("\n".join(lists["train_aug"]) + "\n", "utf-8")
    write_table(root / "tags.csv", tags)


def write_masks(root: Path, sbd: Path, lists: dict[str, list[str]]) -> None:
    """Writes masks of train_aug and val: VOC's own if it has one, else SBD's."""
    own = {*lists["train"], *lists["val"]}
    folder, jobs = root / "SegmentationClassAug", []
    for image_id in [*lists["train_aug"], *lists["val"]]:
        target = folder / f"{image_id}.png"
        if target.exists():
            continue
        if image_id in own:
            with atomic_write(target) as tmp:
                shutil.copyfile(root / "SegmentationClass" / f"{image_id}.png", tmp)
        else:
            jobs.append((sbd / "cls" / f"{image_id}.mat", target))
    # In processes, because a broken .mat file may kill its reader (scipy 1.17).
    with ProcessPoolExecutor() as pool:
        try:
            done = pool.map(_convert, [j[0] for j in jobs], [j[1] for j in jobs], chunksize=8)
            problems = [p for p in tqdm(done, "masks", len(jobs), unit="mask") if p]
        except BrokenProcessPool:
            raise UserError(
                f"a process died while it read masks in {sbd / 'cls'}: a file is broken, or memory "
                "ran out; unpack SBD again"
            ) from None
    raise_all(problems, "unpack SBD again")


def _convert(source: Path, target: Path) -> str | None:
    """Writes one mask; returns the problem, or None."""
    try:
        write_label(target, read_sbd_mask(source))
    except UserError as error:
        return str(error)


def read_sbd_mask(path: Path) -> np.ndarray:
    """The mask in one of SBD's .mat files, (H, W) uint8, 0..20.

    Raises:
        UserError: the file is missing or is not such a mask.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        mask = loadmat(path)["GTcls"][0]["Segmentation"][0]
        if mask.ndim != 2 or mask.min() < 0 or mask.max() > len(VOC_CLASSES):
            raise ValueError(f"expected labels 0..{len(VOC_CLASSES)}")
        return mask.astype(np.uint8)
    except Exception as error:  # noqa: BLE001 (a broken file fails in any way)
        raise UserError(f"{path} is not a mask of SBD ({error})") from None


if __name__ == "__main__":
    run_script(main)
