"""Label maps: their numbers, their palette and their files.

On disk a label map is an indexed (palette) PNG, so that any viewer shows it in colour. In memory it
is (H, W) uint8 with the same numbers; in tensors for training it is int64 and biased pixels are -1.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from core.errors import UserError
from core.files import written_whole
from core.png import decode, is_cut

BACKGROUND = 0  # classes are 1..C
BIASED = -1  # in tensors, as in the paper
BIASED_ON_DISK = 254  # -1 cannot be stored in a PNG
IGNORE = 255  # on disk and in tensors: no statement about this pixel


def palette() -> np.ndarray:
    """(256, 3) uint8: PASCAL VOC's colours, with magenta for biased and VOC's cream for ignore."""
    colours = np.zeros((256, 3), np.uint8)
    for label in range(256):
        rest = label
        for bit in range(7, -1, -1):
            for channel in range(3):
                colours[label, channel] |= ((rest >> channel) & 1) << bit
            rest >>= 3
    colours[BIASED_ON_DISK] = (255, 0, 255)
    return colours


def read_label(
    path: Path, num_classes: int | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Reads a label map.

    Args:
        path: an 8-bit PNG, indexed or grey.
        num_classes: C, without background; values outside 0..C, 254 and 255 are then refused.
        size: (H, W) that the map must have.

    Returns:
        (H, W) uint8.

    Raises:
        UserError: the file is missing, broken, of another kind or size, or has other values.
    """
    label = _read_values(path)
    if size is not None and label.shape != size:
        raise UserError(
            f"{path} is {label.shape[1]}x{label.shape[0]} pixels, its image is "
            f"{size[1]}x{size[0]}; a label map has the size of its image"
        )
    if num_classes is not None:
        wrong = label[(label > num_classes) & (label < BIASED_ON_DISK)]
        if wrong.size:
            raise UserError(
                f"{path} holds label {wrong.min()}; expected 0..{num_classes}, {BIASED_ON_DISK} "
                f"(biased) or {IGNORE} (ignore). Check data.classes or the file"
            )
    return label


def _read_values(path: Path) -> np.ndarray:
    try:
        content = path.read_bytes()
        label = decode(content)
        if label is not None:
            return label
        if is_cut(content):
            raise ValueError("it ends too early")
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise UserError(
                    f"{path} has mode {image.mode}; a label map is an indexed or 8-bit grey PNG. "
                    "Save class numbers, not colours"
                )
            return np.array(image)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (Pillow fails in any way)
        raise UserError(
            f"{path} cannot be read ({error or type(error).__name__}); it may be truncated, make "
            "or fetch it again"
        ) from None


def read_truth(
    path: Path, num_classes: int | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Reads a ground-truth mask: as `read_label`, but without biased pixels."""
    label = read_label(path, num_classes, size)
    if (label == BIASED_ON_DISK).any():
        raise UserError(f"{path} holds {BIASED_ON_DISK}, biased pixels; it is no ground truth")
    return label


def write_label(path: Path, label: np.ndarray) -> None:
    """Writes a (H, W) uint8 label map as an indexed PNG, whole or not at all."""
    if label.ndim != 2 or label.dtype != np.uint8:
        raise ValueError(f"a label map is (H, W) uint8, got {label.shape} {label.dtype}")
    image = Image.fromarray(label)
    image.putpalette(palette().tobytes())
    with written_whole(path) as aside:
        image.save(aside, "PNG", compress_level=1)


def to_training(label: np.ndarray) -> np.ndarray:
    """(H, W) uint8 as on disk -> (H, W) int64 in which biased pixels are -1."""
    wide = label.astype(np.int64)
    wide[label == BIASED_ON_DISK] = BIASED
    return wide


def to_disk(label: np.ndarray) -> np.ndarray:
    """(H, W) integers in which biased pixels are -1 -> (H, W) uint8 as on disk."""
    return np.where(label == BIASED, BIASED_ON_DISK, label).astype(np.uint8)
