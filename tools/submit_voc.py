"""Archives for the evaluation server of PASCAL VOC, which scores the test list."""

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from core.run.errors import UserError, raise_all
from core.run.files import atomic_write
from tools.data.archives import DAMAGED, tar_entries

COMPETITIONS = ("comp5_test_cls", "comp6_test_cls", "comp5_val_cls", "comp6_val_cls")
"""comp5: trained on VOC alone; comp6: on anything else too, ImageNet included."""


def member(competition: str, image_id: str) -> str:
    """Where the server expects the prediction of one image."""
    return f"results/VOC2012/Segmentation/{competition}/{image_id}.png"


def write_submission(path: Path, competition: str, predictions: Sequence[Path]) -> None:
    """Packs indexed PNGs into a tar.gz in the server's tree; equal inputs give equal bytes."""
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
    """Refuses an archive that the server would refuse, or would score as something else.

    Args:
        path: the tar or tar.gz.
        competition: one of `COMPETITIONS`.
        ids: the list.
        sizes: (H, W) of the images; None leaves sizes unchecked.
        num_classes: without background.

    Raises:
        UserError: with everything that is wrong.
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
                    problems.append(f"{name} does not belong there, or stands twice")
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
    raise_all(problems, f"make {path} again with evaluate.py --submission {competition}")


def _check_png(data: bytes, size: tuple[int, int] | None, num_classes: int) -> str | None:
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
