"""Label maps: on disk an indexed (palette) PNG, so that any viewer shows it in colour; in memory
(H, W) uint8 with the same numbers; in tensors for training int64, and biased pixels are -1."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from core.data.images import Size, is_cut
from core.run.errors import UserError
from core.run.files import atomic_write

BACKGROUND = 0  # classes are 1..C
BIASED = -1  # in tensors, as in the paper
BIASED_ON_DISK = 254  # -1 cannot be stored in a PNG
IGNORE = 255  # on disk and in tensors: the pixel does not count


def palette() -> np.ndarray:
    """(256, 3) uint8: PASCAL VOC's colours, with magenta for biased and VOC's cream for ignore."""
    # From the lowest on, the bits of a label go to red, green and blue in turn, highest bit first.
    shifts = np.arange(256)[:, None, None] >> np.arange(9).reshape(3, 3)
    colours = ((shifts & 1) * np.array([128, 64, 32])[:, None]).sum(1).astype(np.uint8)
    colours[BIASED_ON_DISK] = (255, 0, 255)
    return colours


VOC = palette()
_GREY_STEPS = {1: 1, 2: 85, 4: 17, 8: 1}  # by bit depth: Pillow stretches 2 and 4 bits to 0..255


def read_label(path: Path, num_classes: int | None = None, size: Size | None = None) -> np.ndarray:
    """Reads a PNG of grey or indexed numbers of any depth, or in VOC's colours, as (H, W) uint8.

    With `num_classes`, C without background, values outside 0..C, 254 and 255 are refused; with
    `size`, (H, W), any other size is.

    Raises:
        UserError: the file is missing, broken, of another kind or size, has other values, or has a
            palette that contradicts its numbers.
    """
    return inspect_label(path, num_classes, size)[0]


def inspect_label(
    path: Path, num_classes: int | None, size: Size | None = None, biased: bool = True
) -> tuple[np.ndarray, bool]:
    """As `read_label`, and True if VOC's colours, not stored values, gave the numbers; biased
    pixels are refused unless `biased` is set."""
    label, by_colour = _read_values(path, num_classes)
    if not biased and (label == BIASED_ON_DISK).any():
        raise UserError(
            f"{path} holds {BIASED_ON_DISK}, biased pixels: it is already debiased, not ground "
            "truth; use the labels from before debiasing"
        )
    if size is not None and label.shape != size:
        hint = ""
        if label.shape == size[::-1]:
            hint = (
                ". Width and height are swapped: if the image is turned upright by its EXIF "
                "orientation, turn the map, too, or save the image upright"
            )
        raise UserError(
            f"{path} is {label.shape[1]}x{label.shape[0]} pixels, its image is "
            f"{size[1]}x{size[0]}; a label map has the size of its image{hint}"
        )
    if num_classes is not None:
        wrong = label[(label > num_classes) & (label < BIASED_ON_DISK)]
        if wrong.size:
            raise UserError(
                f"{path} holds label {wrong.min()}; expected 0..{num_classes}, {BIASED_ON_DISK} "
                f"(biased) or {IGNORE} (ignore). Check data.classes or the file"
            )
    return label, by_colour


def _read_values(path: Path, num_classes: int | None) -> tuple[np.ndarray, bool]:
    try:
        content = path.read_bytes()
        if is_cut(content):
            raise ValueError("it ends too early")
        with Image.open(io.BytesIO(content)) as file:
            kind, image = file.format, ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # noqa: BLE001 (any exception type is possible)
        raise UserError(
            f"{path} cannot be read ({error or type(error).__name__}); it may be truncated. Make "
            "or fetch it again"
        ) from None
    if kind != "PNG":
        raise UserError(
            f"{path} is a {kind} picture, whatever its name says; a label map is a PNG (JPEG would "
            "change its numbers). Save it as PNG again, from its source"
        )
    return _values_of(path, image, content[24], num_classes)


def _values_of(
    path: Path, image: Image.Image, bits: int, num_classes: int | None
) -> tuple[np.ndarray, bool]:
    """Class numbers of a PNG with `bits` per channel, and whether its colours gave them."""
    mode = image.mode
    if mode in ("LA", "RGBA") and bits == 8 and image.getextrema()[-1] == (255, 255):
        mode = mode.removesuffix("A")  # nothing is transparent
        image = image.convert(mode)
    values = np.array(image)
    if mode == "P":
        return _by_palette(path, values, image, num_classes)
    if mode in ("1", "L"):
        return values.astype(np.uint8) // np.uint8(_GREY_STEPS[bits]), False
    if mode.startswith("I"):  # 16 bits
        step = 257 if values.max() > 255 and not (values % 257).any() else 1
        if values.max() // step > 255:
            raise UserError(f"{path} holds {values.max()}; class numbers end at 255")
        return (values // step).astype(np.uint8), False
    if mode == "RGB" and bits == 8:
        label, known = _by_colour(values, num_classes)
        if known.all():
            return label, True
        wrong = tuple(values[~known][0].tolist())
        odd = f"is a colour picture, and {wrong} is not VOC's colour of any of these classes"
    else:
        odd = f"is a {mode} picture with {bits} bits per channel"
        odd = "has transparent pixels" if bits == 8 else odd
    raise UserError(f"{path} {odd}. Save class numbers, not colours: an indexed or grey PNG")


def _by_palette(
    path: Path, values: np.ndarray, image: Image.Image, num_classes: int | None
) -> tuple[np.ndarray, bool]:
    """Class numbers of an indexed PNG: its stored values, or those of VOC's colours, which GIMP,
    pngquant and Pillow renumber. Any other palette says nothing about the numbers."""
    colours = np.zeros((256, 3), np.uint8)
    stored = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    colours[: len(stored)] = stored
    used = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    numbers, known = _by_colour(colours, num_classes)
    moved = used[(numbers[used] != used) & (used < BIASED_ON_DISK)]
    if not (known[used].all() and moved.size and (stored != stored[0]).any()):
        return values, False
    shown = colours[: used[-1] + 1]
    if _by_colour(shown, None)[1].all() and len(np.unique(shown, axis=0)) == len(shown):
        return numbers[values], True
    raise UserError(
        f"{path} draws number {moved[0]} in VOC's colour of {numbers[moved[0]]}, but its palette "
        "also has other colours, or one colour twice: numbers and colours contradict each other. "
        "Save class numbers as a grey PNG, or with VOC's palette"
    )


def _by_colour(colours: np.ndarray, num_classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(..., 3) uint8 -> (...) uint8 labels; (...) bool, True where the colour is exactly that of
    0..C, 254 or 255."""
    table = np.zeros(512, np.uint8)
    table[_top_bits(VOC)] = np.arange(256)
    label = table[_top_bits(colours)]
    known = (VOC[label] == colours).all(-1)
    if num_classes is not None:
        known &= (label <= num_classes) | (label >= BIASED_ON_DISK)
    return label, known


def _top_bits(colours: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> (...) int64 of each channel's upper three bits; VOC's colours differ."""
    return (colours >> 5).astype(np.int64) @ np.array([64, 8, 1])


def write_label(path: Path, label: np.ndarray) -> None:
    """Writes a (H, W) uint8 label map as an indexed PNG, completely or not at all."""
    if label.ndim != 2 or label.dtype != np.uint8:
        raise ValueError(f"a label map is (H, W) uint8, got {label.shape} {label.dtype}")
    image = Image.fromarray(label)
    image.putpalette(VOC.tobytes())
    with atomic_write(path) as tmp:
        image.save(tmp, "PNG", compress_level=1)


def to_training(label: np.ndarray) -> np.ndarray:
    """(H, W) uint8 as on disk -> (H, W) int64 in which biased pixels are -1."""
    wide = label.astype(np.int64)
    wide[label == BIASED_ON_DISK] = BIASED
    return wide


def to_disk(label: np.ndarray) -> np.ndarray:
    """(H, W) integers in which biased pixels are -1 -> (H, W) uint8 as on disk."""
    return np.where(label == BIASED, BIASED_ON_DISK, label).astype(np.uint8)
