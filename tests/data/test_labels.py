import io

import numpy as np
import pytest
from PIL import Image
from test_png import png

from core.data.labels import (
    BIASED,
    IGNORE,
    inspect_label,
    palette,
    read_label,
    to_disk,
    to_training,
    write_label,
)
from core.run.errors import UserError


@pytest.mark.parametrize(
    ("label", "colour"),
    [
        (0, (0, 0, 0)),
        (1, (128, 0, 0)),
        (2, (0, 128, 0)),
        (15, (192, 128, 128)),
        (255, (224, 224, 192)),
    ],
)
def test_palette_is_that_of_voc(label, colour):
    assert tuple(palette()[label]) == colour


def test_label_map_survives_the_disk_and_has_a_palette(tmp_path):
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_label(tmp_path / "a" / "x.png", label)
    assert np.array_equal(read_label(tmp_path / "a" / "x.png"), label)
    with Image.open(tmp_path / "a" / "x.png") as image:
        assert image.mode == "P" and image.getpalette()[3:6] == [128, 0, 0]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.png"]


def test_biased_is_minus_one_in_tensors_and_254_on_disk():
    disk = np.array([[0, 3, 254, 255]], np.uint8)
    assert to_training(disk).tolist() == [[0, 3, BIASED, 255]]
    assert np.array_equal(to_disk(to_training(disk)), disk)


def test_value_beyond_the_classes_is_refused(tmp_path):
    write_label(tmp_path / "x.png", np.full((2, 2), 9, np.uint8))
    with pytest.raises(UserError, match="x.png holds label 9"):
        read_label(tmp_path / "x.png", num_classes=8)


def test_wrong_size_is_refused(tmp_path):
    write_label(tmp_path / "x.png", np.zeros((2, 3), np.uint8))
    with pytest.raises(UserError, match="3x2 pixels"):
        read_label(tmp_path / "x.png", size=(3, 2))


def test_truncated_file_is_refused(tmp_path):
    label = np.random.default_rng(0).integers(0, 9, (64, 64), np.uint8)
    write_label(tmp_path / "x.png", label)
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        read_label(tmp_path / "x.png")


def test_colour_picture_is_not_a_label_map(tmp_path):
    Image.new("RGB", (4, 4), (9, 200, 9)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"\(9, 200, 9\).*Save class numbers"):
        read_label(tmp_path / "x.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.png is missing"):
        read_label(tmp_path / "gone.png")


def test_float_label_is_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_label(tmp_path / "x.png", np.zeros((2, 2)))


def test_vocs_masks_survive_the_palette_with_every_value(voc_masks, tmp_path):
    values = set()
    for path in voc_masks.glob("*.png"):
        label = read_label(path, 20)
        write_label(tmp_path / path.name, label)
        again = read_label(tmp_path / path.name, 20, label.shape)
        assert again.dtype == label.dtype == np.uint8 and again.tobytes() == label.tobytes()
        with Image.open(path) as original, Image.open(tmp_path / path.name) as written:
            assert np.array_equal(original.convert("RGB"), written.convert("RGB"))
        values |= set(np.unique(label).tolist())
    assert values == {*range(21), IGNORE}


def test_ground_truth_holds_no_biased_pixels(tmp_path):
    write_label(tmp_path / "x.png", np.array([[0, 3, 255]], np.uint8))
    assert inspect_label(tmp_path / "x.png", 3, biased=False)[0].tolist() == [[0, 3, 255]]
    write_label(tmp_path / "x.png", np.array([[0, 3, 254]], np.uint8))
    with pytest.raises(UserError, match="x.png holds 254, biased pixels.*not ground truth"):
        inspect_label(tmp_path / "x.png", 3, biased=False)


def blocks() -> np.ndarray:
    """(20, 30) label map of a few classes, an ignored border among them."""
    label = np.zeros((20, 30), np.uint8)
    label[4:12, 5:20], label[8:18, 12:28], label[0] = 15, 8, IGNORE
    return label


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_another_kind_of_picture_under_the_name_of_a_png_is_refused(tmp_path, kind):
    Image.fromarray(blocks()).save(tmp_path / "x.png", kind)
    with pytest.raises(UserError, match=f"x.png is a {kind} picture, whatever its name says"):
        read_label(tmp_path / "x.png", 20)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colours", ["grey", "indexed"])
def test_number_is_the_stored_one_at_every_bit_depth(tmp_path, bits, colours):
    label = (np.arange(24).reshape(3, 8) % min(21, 2**bits)).astype(np.uint8)
    if colours == "grey":
        packed = np.unpackbits(label[..., None], axis=-1)[..., -bits:].reshape(3, -1)
        rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in packed)
        (tmp_path / "x.png").write_bytes(png(rows, 8, 3, (bits, 0, 0, 0, 0)))
    else:
        image = Image.fromarray(label)
        image.putpalette([200, 30, 30, 9, 200, 9, 40, 40, 250] + [7, 7, 7] * 21)
        image.save(tmp_path / "x.png", bits=bits)
    assert (tmp_path / "x.png").read_bytes()[24] == bits
    assert np.array_equal(read_label(tmp_path / "x.png", 20), label)


def test_sixteen_bits_are_read_where_they_are_class_numbers(tmp_path):
    label = blocks()
    for factor in (1, 257):  # as they are; stretched, as image editors do
        Image.fromarray(label.astype(np.uint16) * factor).save(tmp_path / "x.png")
        assert np.array_equal(read_label(tmp_path / "x.png", 20), label)
    Image.fromarray(label.astype(np.uint16) * 1000).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="x.png holds 255000|class numbers end at 255"):
        read_label(tmp_path / "x.png", 20)


@pytest.mark.parametrize("kind", [(16, 2, 0, 0, 0), (16, 4, 0, 0, 0), (16, 6, 0, 0, 0)])
def test_sixteen_bits_of_which_eight_would_be_lost_are_refused(tmp_path, kind):
    channels = {2: 3, 4: 2, 6: 4}[kind[1]]
    (tmp_path / "x.png").write_bytes(png(b"\0" + b"\0\3" * channels, 1, 1, kind))
    with pytest.raises(UserError, match="picture with 16 bits per channel"):
        read_label(tmp_path / "x.png", 20)


def test_alpha_channel_without_transparency_is_left_out(tmp_path):
    label, path = blocks(), tmp_path / "x.png"
    Image.fromarray(label).convert("LA").save(path)
    assert np.array_equal(read_label(path, 20), label)
    picture = Image.fromarray(palette()[label]).convert("RGBA")
    picture.save(path)
    assert np.array_equal(read_label(path, 20), label)
    picture.putpixel((3, 3), (0, 0, 0, 0))
    picture.save(path)
    with pytest.raises(UserError, match="transparent"):
        read_label(path, 20)


def recoloured(how: str) -> Image.Image:
    """`blocks` in VOC's colours, but with other numbers."""
    picture = Image.fromarray(palette()[blocks()])
    if how == "quantised":
        return picture.quantize(16)
    if how == "picture":
        return picture
    order = np.random.default_rng(0).permutation(256)
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[blocks()])
    image.putpalette(palette()[order].tobytes())
    return image


@pytest.mark.parametrize("how", ["quantised", "picture", "shuffled"])
def test_colours_of_voc_count_where_the_numbers_are_others(tmp_path, how):
    image = recoloured(how)
    assert not np.array_equal(np.array(image), blocks())
    image.save(tmp_path / "x.png")
    label, by_colour = inspect_label(tmp_path / "x.png", 20)
    assert by_colour and np.array_equal(label, blocks())
    # A picture in the colour of a class that this data set does not have
    if how == "picture":
        with pytest.raises(UserError, match="Save class numbers"):
            read_label(tmp_path / "x.png", 12)


TABLEAU = [31, 119, 180, 255, 127, 14, 44, 160, 44, 214, 39, 40, 148, 103, 189]
PALETTES = {
    "VOC's": palette().tobytes(),
    "VOC's, white for ignored": palette()[:255].tobytes() + b"\xff\xff\xff",
    "VOC's first 21": palette()[:21].tobytes(),
    "a ramp of grey": bytes(np.arange(256).repeat(3).astype(np.uint8)),
    "all black": bytes(768),
    "a tool's own": bytes(TABLEAU) + bytes(768 - len(TABLEAU)),
    "a tool's own with a colour of VOC's": bytes([0, 0, 0, 0, 128, 0, 250, 9, 9] * 99)[:768],
}


@pytest.mark.parametrize("name", PALETTES)
def test_numbers_count_under_any_other_palette(tmp_path, name):
    label = blocks()
    label[label == 15], label[label == 8] = 2, 1
    image = Image.fromarray(label)
    image.putpalette(PALETTES[name])
    image.save(tmp_path / "x.png")
    again, by_colour = inspect_label(tmp_path / "x.png", 20)
    assert np.array_equal(again, label) and not by_colour


@pytest.mark.parametrize(
    "colours",
    [
        [[0, 0, 0], [0, 128, 0], [128, 0, 0], [128, 0, 0]],  # two numbers of one colour
        [[0, 0, 0], [0, 128, 0], [250, 9, 9], [128, 0, 0]],  # among colours of a tool's own
    ],
)
def test_palette_that_contradicts_the_numbers_is_refused(tmp_path, colours):
    image = Image.fromarray(np.array([[0, 1, 3]], np.uint8))
    image.putpalette(np.array(colours, np.uint8).tobytes())
    image.save(tmp_path / "x.png")
    with pytest.raises(UserError, match="x.png draws number 1 in VOC's colour of 2"):
        read_label(tmp_path / "x.png", 20)


def test_map_that_carries_the_orientation_of_its_photograph_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(blocks()).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_label(tmp_path / "x.png", 20, (30, 20)), np.rot90(blocks(), -1))


def test_swapped_sides_name_the_likely_reason(tmp_path):
    write_label(tmp_path / "x.png", np.zeros((2, 3), np.uint8))
    with pytest.raises(UserError, match="Width and height are swapped: .*EXIF orientation"):
        read_label(tmp_path / "x.png", size=(3, 2))


def test_truncated_map_of_an_unusual_kind_is_refused(tmp_path):
    file = io.BytesIO()
    recoloured("picture").save(file, "PNG")
    for share in (0.1, 0.5, 0.95):
        content = file.getvalue()
        (tmp_path / "x.png").write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match="cannot be read"):
            read_label(tmp_path / "x.png", 20)
