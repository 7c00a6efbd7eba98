"""Writes or checks an archive for the evaluation server of PASCAL VOC, which scores the test list.

    python tools/submit_voc.py --config configs/voc.yaml --data.val_list test \
        --competition comp6_test_cls
    python tools/submit_voc.py --check ARCHIVE --voc data/VOCdevkit/VOC2012

The first form predicts the list with the trained network of the run, packs the predictions into
<run_dir>/evaluation/<competition>/<competition>.tar.gz and checks the archive. The second checks an
archive from elsewhere: the tree, the ids of the list, that each file is an indexed PNG with labels
0..20, and, where the photograph is there, its size. The archive's name gives the competition.
"""

import gzip
import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.config import Config, make_parser, parse
from core.data.lists import list_name, listed_id, read_list, read_split
from core.data.settings import VOC_CLASSES
from core.run import distributed
from core.run.errors import UserError, raise_all, run_script
from core.run.files import atomic_write
from core.run.log import warn
from core.run.stage import class_differences
from evaluate import predict_list
from tools.data.archives import DAMAGED, tar_entries

COMPETITIONS = ("comp5_test_cls", "comp6_test_cls", "comp5_val_cls", "comp6_val_cls")
"""comp5: trained on VOC only; comp6: also on anything else, including ImageNet."""


def main() -> None:
    parser = make_parser("tools/submit_voc.py", __doc__)
    parser.add_argument("--competition", type=Literal[COMPETITIONS], help="What to submit to.")
    parser.add_argument("--name", type=str | None, help="Folder below <run_dir>/evaluation.")
    parser.add_argument("--check", type=str | None, help="Check this archive instead.")
    parser.add_argument("--voc", type=str | None, help="For --check: the folder VOC2012.")
    config, options = parse(parser)
    if options.check and options.voc:
        check(Path(options.check), Path(options.voc), options.competition)
    elif options.check or options.voc:
        raise UserError("--check and --voc are given together")
    elif options.competition:
        submit(config, options.competition, options.name)
    else:
        raise UserError(f"give --competition, one of {', '.join(COMPETITIONS)}, or --check")


def submit(config: Config, competition: str, name: str | None = None, split: str = "val") -> None:
    """Predicts a list without masks and packs the predictions.

    Args:
        config: experiment with a trained network.
        competition: one of `COMPETITIONS`.
        name: folder below <run_dir>/evaluation; None: the competition.
        split: which of the two lists is predicted, "train" or "val".

    Raises:
        UserError: the list is not the competition's, or the predictions do not fit it.
    """
    if competition not in COMPETITIONS:
        raise UserError(f"no competition {competition!r}; there are {', '.join(COMPETITIONS)}")
    wanted, listed = competition.split("_")[1], list_name(config.data, split)
    if listed != wanted:
        raise UserError(
            f"{competition} is for the list {wanted}, not {listed}; give --data.val_list {wanted}"
        )
    for line in class_differences(VOC_CLASSES, config.data.classes):
        warn(f"VOC's server expects VOC's classes in their order; it would misread others: {line}")
    images = read_split(config.data, split, tagged=False)
    stage, predictions = predict_list(config, images, name or competition)
    archive = stage.folder / f"{competition}.tar.gz"
    if distributed.rank() == 0:
        write_submission(archive, competition, predictions)
        check_submission(archive, competition, images.ids, num_classes=len(config.data.classes))
    distributed.barrier()
    if not stage.finished:
        stage.finish({})
    print(f"{len(predictions)} predictions in {archive}")


def check(archive: Path, voc: Path, competition: str | None) -> None:
    """Checks an archive against the list and the photographs of VOC's folder.

    Raises:
        UserError: the competition is unknown, the list is missing, or the archive is wrong.
    """
    competition = competition or archive.name.split(".")[0]
    if competition not in COMPETITIONS:
        raise UserError(
            f"{competition} is not one of {', '.join(COMPETITIONS)}; give --competition"
        )
    path = voc / "ImageSets" / "Segmentation" / f"{competition.split('_')[1]}.txt"
    ids, sizes = [listed_id(line, ()) for line in read_list(path, "set --voc")], {}
    for image_id in ids:
        photograph = voc / "JPEGImages" / f"{image_id}.jpg"
        if photograph.is_file():
            with Image.open(photograph) as image:
                sizes[image_id] = image.size[::-1]
    check_submission(archive, competition, ids, sizes)
    unknown = f"; {len(ids) - len(sizes)} sizes unchecked" if len(sizes) < len(ids) else ""
    print(f"{archive}: {len(ids)} predictions, nothing wrong{unknown}")


def member(competition: str, image_id: str) -> str:
    """Where the server expects the prediction of one image."""
    return f"results/VOC2012/Segmentation/{competition}/{image_id}.png"


def write_submission(path: Path, competition: str, predictions: Sequence[Path]) -> None:
    """Packs indexed PNGs into a tar.gz with the server's tree; same inputs give the same bytes."""
    with atomic_write(path) as tmp:
        with (
            tmp.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            for prediction in sorted(predictions):
                entry = tarfile.TarInfo(member(competition, prediction.stem))
                data = prediction.read_bytes()
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


def check_submission(
    path: Path,
    competition: str,
    ids: Sequence[str],
    sizes: dict[str, tuple[int, int]] | None = None,
    num_classes: int = 20,
) -> None:
    """Refuses an archive that the server would refuse, or would score wrongly.

    Args:
        path: tar or tar.gz file.
        competition: one of `COMPETITIONS`.
        ids: image ids of the competition's list.
        sizes: (height, width) in pixels by image id; images without one are not checked for size.
        num_classes: number of classes without background.

    Raises:
        UserError: the archive is missing or damaged, or has problems, which are listed together.
    """
    wanted, problems = {member(competition, i): i for i in ids}, []
    try:
        with tarfile.open(path) as archive:
            for entry in tar_entries(archive):
                name = entry.name.removeprefix("./")
                if entry.isdir():
                    continue
                image_id = wanted.pop(name, None)
                if image_id is None or not entry.isfile():
                    problems.append(f"{name} does not belong there, or occurs twice")
                    continue
                size = sizes and sizes.get(image_id)
                problem = _check_png(archive.extractfile(entry).read(), size, num_classes)
                if problem:
                    problems.append(f"{name}: {problem}")
    except FileNotFoundError:
        raise UserError(f"the archive {path} is missing") from None
    except (*DAMAGED, OSError) as error:
        raise UserError(f"the archive {path} is damaged ({error})") from None
    problems += [f"{name} is missing" for name in wanted]
    raise_all(problems, f"write {path} again with tools/submit_voc.py --competition {competition}")


def _check_png(data: bytes, size: tuple[int, int] | None, num_classes: int) -> str | None:
    """What the server would refuse in the bytes of one prediction, or None."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "PNG" or image.mode != "P":
                return f"is {image.format} of mode {image.mode}, not an indexed PNG"
            label = np.array(image)
    except Exception as error:  # noqa: BLE001 (Pillow fails in any way)
        return f"cannot be decoded ({error or type(error).__name__})"
    if size is not None and label.shape != size:
        return f"is {label.shape[1]}x{label.shape[0]}, its image {size[1]}x{size[0]}"
    if label.max() > num_classes:
        return f"holds label {label.max()}; only 0..{num_classes} are scored"
    return None


if __name__ == "__main__":
    run_script(main)
