"""Photographs of every kind, and files that are none."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from test_lists import picture, save

from core.data.images import read_header, read_image
from core.run.errors import UserError


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("orientation", "shape", "red"),
    [
        (1, (24, 40), (2, 20)),
        (3, (24, 40), (-3, 20)),
        (6, (40, 24), (20, -3)),
        (8, (40, 24), (20, 2)),
    ],
)
def test_photograph_is_upright(tmp_path, suffix, orientation, shape, red):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / f"a.{suffix}", exif=exif)
    image = read_image(tmp_path / f"a.{suffix}")
    opposite = tuple(-1 - n for n in red)
    assert image.shape == (*shape, 3)
    assert image[red][0] > 180 and image[opposite].max() < 20


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_header_tells_size_and_turn_without_decoding(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / f"a.{suffix}", exif=exif)
    told = 1 if suffix == "bmp" else orientation
    assert read_header(tmp_path / f"a.{suffix}") == (
        read_image(tmp_path / f"a.{suffix}").shape[:2],
        told,
    )


def test_header_heeds_what_the_decoder_heeds(tmp_path):
    """An orientation in XMP alone turns nothing; a file that is no picture has no header."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    save(tmp_path / "a.jpg", xmp=xmp)
    assert read_image(tmp_path / "a.jpg").shape[:2] == (24, 40)
    assert read_header(tmp_path / "a.jpg") == ((24, 40), 1)
    (tmp_path / "b.jpg").write_bytes(b"not a picture")
    assert read_header(tmp_path / "b.jpg") == read_header(tmp_path / "none.jpg") == (None, 1)


@pytest.mark.parametrize(
    ("mode", "name", "above"),
    [
        ("L", "a.jpg", (81, 81, 81)),
        ("L", "a.png", (81, 81, 81)),
        ("LA", "a.png", (81, 81, 81)),
        ("RGBA", "a.png", (200, 30, 30)),
        ("RGBA", "a.webp", (200, 30, 30)),
        ("CMYK", "a.jpg", (200, 30, 30)),
        ("1", "a.png", (255, 255, 255)),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path, mode, name, above):
    image = Image.fromarray(picture())
    if mode == "1":
        image = image.convert("L").point(lambda v: 255 * (v > 0))
    image.convert(mode).save(tmp_path / name)
    found = read_image(tmp_path / name)
    assert found.shape == (24, 40, 3) and found.dtype == np.uint8
    assert np.abs(found[4, 20].astype(int) - above).max() <= 4 and found[-4, 20].max() <= 4


def test_palette_keeps_its_colours(tmp_path):
    Image.fromarray(picture()).quantize(4).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), picture())


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_eight(tmp_path, channels):
    wide = np.full((4, 6, channels), 40_000, np.uint16)
    assert cv2.imwrite(str(tmp_path / "a.png"), wide)
    assert set(np.unique(read_image(tmp_path / "a.png"))) == {40_000 >> 8}


def encoded(kind: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


def thumbnail() -> Image.Exif:
    """EXIF data that holds a whole JPEG, with an end of its own."""
    exif = Image.Exif()
    exif[0x010E] = encoded("JPEG")[:2000].decode("latin1") + "\xff\xd9"
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "thumbnail", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated_photograph_is_refused(tmp_path, kind, share):
    options = {"progressive": {"progressive": True}, "thumbnail": {"exif": thumbnail()}}
    name = "JPEG" if kind in options else kind
    content = encoded(name, **options.get(kind, {}))
    path = tmp_path / "a.img"
    path.write_bytes(content)
    assert read_image(path).shape == (40, 60, 3)
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match="a.img cannot be decoded; it may be truncated"):
        read_image(path)


def test_photograph_of_32_bits_is_not_called_truncated_alone(tmp_path):
    Image.fromarray(np.full((40, 60), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif cannot be decoded; .* 32 bits per channel"):
        read_image(tmp_path / "a.tif")


def test_film_behind_a_photograph_is_no_part_of_it(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG") + b"\xff\xda\x00\x08 a film")
    assert read_image(tmp_path / "a.jpg").shape == (40, 60, 3)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a picture", b"\xff\xd8", b"\xff\xd8\xff\xff\xff", b"\xff\xd8\xff\xe0\0\0"],
)
def test_file_that_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match="a.jpg cannot be decoded"):
        read_image(tmp_path / "a.jpg")


def test_missing_photograph_is_told(tmp_path):
    with pytest.raises(UserError, match="gone.jpg is missing"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path)


@pytest.mark.parametrize("side", [10_001, 20_000, 2**31 - 1])
def test_small_file_of_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, side):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))
    (tmp_path / "a.png").write_bytes(content + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="over 100 million pixels"):
        read_image(tmp_path / "a.png")


def test_sides_beyond_what_opencv_takes_are_refused(tmp_path):
    header = struct.pack("<IiiHHIIiiII", 40, 2**21, 1, 1, 1, 0, 0, 0, 0, 0, 0)
    (tmp_path / "a.bmp").write_bytes(
        b"BM" + struct.pack("<IHHI", 70, 0, 0, 62) + header + bytes(99)
    )
    with pytest.raises(UserError, match="a.bmp cannot be decoded"):
        read_image(tmp_path / "a.bmp")


def test_one_pixel_is_a_picture(tmp_path):
    save(tmp_path / "a.png", np.full((1, 1, 3), 7, np.uint8))
    assert read_image(tmp_path / "a.png").tolist() == [[[7, 7, 7]]]
