"""Damaged, truncated and odd PNG label maps."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from core.data.images import is_cut
from core.data.labels import palette, read_label
from core.run.errors import UserError


def label_map() -> np.ndarray:
    label = np.random.default_rng(0).integers(0, 21, (6, 8)).astype(np.uint8)
    label = label.repeat(5, 0).repeat(6, 1)
    label[3] = 255
    return label


def saved(image: Image.Image, **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "PNG", **options)
        return file.getvalue()


def indexed() -> Image.Image:
    image = Image.fromarray(label_map())
    image.putpalette(palette().tobytes())
    return image


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(rows: bytes, width: int, height: int, kind=(8, 0, 0, 0, 0), parts: int = 1) -> bytes:
    """A PNG with sound checksums, whatever its rows are."""
    packed = zlib.compress(rows)
    step = -(-len(packed) // parts)
    data = b"".join(chunk(b"IDAT", packed[k : k + step]) for k in range(0, len(packed), step))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *kind))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "values"),
    [
        (png(b"\0\1\2\0\3\4", 2, 2, parts=7), [[1, 2], [3, 4]]),  # in several parts
        (png(b"\1\1\1\0\3\4", 2, 2), [[1, 2], [3, 4]]),  # the first row as differences
        (png(b"\0" * 10**6, 2, 2), [[0, 0], [0, 0]]),  # grows a thousandfold: the rest is not read
        (png(b"\0\1", 1, 1, kind=(8, 0, 0, 0, 1)), [[1]]),  # interlaced
        (png(b"\0\7", 1, 1) + b"more", [[7]]),
    ],
)
def test_unusual_files_are_read(tmp_path, content, values):
    (tmp_path / "x.png").write_bytes(content)
    assert read_label(tmp_path / "x.png").tolist() == values


@pytest.mark.parametrize(
    "content",
    [
        png(b"\0\1\2\0\3", 2, 2),  # a value short
        png(b"", 0, 0),
        png(b"\0\1", 2**31 - 1, 2**31 - 1),
        png(b"\0\1", 60_000, 60_000),
        png(b"\0\1", 9_999, 9_999),
        b"",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_broken_files_are_refused(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match="x.png cannot be read"):
        read_label(tmp_path / "x.png")


def test_image_larger_than_pillow_allows_is_one_message(tmp_path):
    (tmp_path / "x.png").write_bytes(png(b"\0\1", 60_000, 60_000))
    with pytest.raises(UserError, match=r"x.png cannot be read \(.*bomb"):
        read_label(tmp_path / "x.png")


def test_truncated_file_is_never_read(tmp_path):
    data = saved(indexed())
    for end in range(0, len(data), 50):
        (tmp_path / "x.png").write_bytes(data[:end])
        with pytest.raises(UserError, match="x.png cannot be read"):
            read_label(tmp_path / "x.png")


def test_flipped_bit_is_refused_or_changes_no_number(tmp_path):
    """A checksum of its own protects the pixels, so that of their chunk may be wrong."""
    data, refused = saved(indexed()), 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "x.png").write_bytes(damaged)
        try:
            assert np.array_equal(read_label(tmp_path / "x.png"), label_map())
        except UserError:
            refused += 1
    assert refused > 0.98 * len(data)


def test_files_that_end_too_early_are_told_apart():
    whole = saved(indexed())
    assert not is_cut(whole) and not is_cut(whole + b"rest") and not is_cut(b"BM a bitmap")
    assert all(is_cut(whole[:end]) for end in range(8, len(whole)))
    place = whole.index(b"IDAT") - 4
    claim = (2**31 - 1).to_bytes(4, "big")
    assert is_cut(whole[:place] + claim + whole[place + 4 :])
