"""Photographs in files of any common format."""

import contextlib
import struct
from pathlib import Path

import cv2
import numpy as np
from PIL import ExifTags, Image

from core.data.finder import PHOTOGRAPHS
from core.run.errors import UserError

Size = tuple[int, int]  # height and width
LARGEST = 100_000_000  # pixels; decoded they take 0.3 GB, and a small file may claim any number
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
Image.MAX_IMAGE_PIXELS = LARGEST
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # UserError says what matters


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB from any colour mode, turned upright by the EXIF orientation.

    Raises:
        UserError: the file is missing, broken, truncated or larger than `LARGEST`.
    """
    remedy = "fetch it again or remove its id from the list"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"image {path} is missing; {remedy}") from None
    except OSError as error:
        raise UserError(f"image {path} cannot be read ({error.strerror})") from None
    _refuse_huge(path)
    image = None
    if content and not is_cut(content):
        with contextlib.suppress(cv2.error):  # such as sides beyond its limits
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None and path.suffix.lower() in PHOTOGRAPHS.mistaken:
        raise UserError(f"image {path} has an unsupported format; save it as JPEG or PNG")
    if image is None:
        raise UserError(
            f"image {path} cannot be decoded; it may be truncated, or of a kind such as 32 bits "
            f"per channel, which is not supported; {remedy}"
        )
    return image


def read_header(path: Path) -> tuple[Size | None, int]:
    """Size and orientation of a photograph, without decoding it: (H, W) as `read_image` gives it,
    None where Pillow cannot read it; and the EXIF orientation by which `read_image` turns the
    stored pixels: 1 is none, 3 half a turn, 6 and 8 a quarter."""
    try:
        with Image.open(path) as image:
            exif = Image.Exif()  # not image.getexif(): that also reads XMP, which OpenCV ignores
            if image.format in ("JPEG", "MPO", "PNG", "WEBP"):
                exif.load(image.info.get("exif"))
            orientation = int(exif.get(ExifTags.Base.Orientation, 1))
            size = image.size if orientation in TURNED else image.size[::-1]
            if image.format == "TIFF":  # its size is upright in Pillow
                orientation = int(image.tag_v2.get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 (not a kind that Pillow knows, or broken)
        return None, 1
    return size, orientation


def _refuse_huge(path: Path) -> None:
    try:
        with Image.open(path) as header:  # decodes nothing yet
            huge = header.width * header.height > LARGEST
    except Image.DecompressionBombError:
        huge = True
    except Exception:  # noqa: BLE001 (not a kind that Pillow knows, or broken: OpenCV decides)
        huge = False
    if huge:
        millions = LARGEST // 10**6
        raise UserError(f"image {path} has over {millions} million pixels; shrink it or cut it up")


def is_cut(content: bytes) -> bool:
    """Whether a PNG or JPEG file ends before its picture does: decoders would fill the rest with
    grey, or allocate what the length of a PNG's chunk claims, up to 2 GiB."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        start, name = 8, b""
        while name != b"IEND":
            if start + 12 > len(content):
                return True
            length, name = struct.unpack_from(">I4s", content, start)
            start += 12 + length
        return start > len(content)
    if not content.startswith(b"\xff\xd8"):
        return False
    # Before the first start of scan (DA), a thumbnail may have its own end marker (D9); in the
    # coded picture after it, a marker cannot occur by chance.
    start = 2
    while content[start : start + 1] == b"\xff" and content[start + 1 : start + 2] != b"\xda":
        if content[start + 1 : start + 2] == b"\xff":  # filling
            start += 1
        else:
            start += 2 + int.from_bytes(content[start + 2 : start + 4], "big")
    return content.find(b"\xff\xd9", start) < 0
