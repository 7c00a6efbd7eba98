"""The fast PNG reader: the same values as Pillow, or none."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import sample
from PIL import Image

from core.data.labels import palette, read_label
from core.data.png import decode, is_cut
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


def test_indexed_label_map_is_read():
    assert np.array_equal(decode(saved(indexed())), label_map())


def test_indexed_file_of_another_palette_is_left_to_pillow():
    image, first = indexed(), palette()[:254].tobytes()
    assert np.array_equal(decode(saved(image), first), label_map())
    image.putpalette(palette()[:21].tobytes())  # as far as it goes
    assert decode(saved(image), first) is not None
    image.putpalette(palette()[::-1].tobytes())
    assert decode(saved(image), first) is None and decode(saved(image)) is not None


def test_values_may_come_in_several_parts():
    assert decode(png(b"\0\1\2\0\3\4", 2, 2, parts=7)).tolist() == [[1, 2], [3, 4]]
    assert decode(png(b"\0\7", 1, 1)).tolist() == [[7]]


def test_real_masks_equal_pillows_reading():
    for path in sorted(sample("voc_masks").glob("*.png")):
        with Image.open(path) as image:
            assert np.array_equal(decode(path.read_bytes()), np.array(image))


def filtered() -> bytes:
    return png(b"\1\1\1\0\3\4", 2, 2)  # the first row as differences


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(label_map() > 3)),  # 1 bit
        saved(Image.fromarray(label_map().astype(np.uint16))),
        saved(indexed().convert("RGB")),
        saved(indexed()) + b"more",
        filtered(),
        png(b"\0\1\2\0\3", 2, 2),  # a value short
        png(b"\0\1\2\0\3\4\5", 2, 2),  # one too many
        png(b"\0" * 10**6, 2, 2),  # grows a thousandfold
        png(b"", 0, 0),
        png(b"\0\1", 2**31 - 1, 2**31 - 1),
        png(b"\0\1", 1, 1, kind=(8, 0, 0, 0, 1)),  # interlaced
        png(b"\0\1", 1, 1, kind=(8, 3, 0, 0, 0)),  # indexed without a palette
        b"",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_other_kinds_are_left_to_pillow(data):
    assert decode(data) is None


def test_filtered_rows_are_read_by_pillow(tmp_path):
    (tmp_path / "x.png").write_bytes(filtered())
    assert read_label(tmp_path / "x.png").tolist() == [[1, 2], [3, 4]]


def test_image_larger_than_pillow_allows_is_one_message(tmp_path):
    (tmp_path / "x.png").write_bytes(png(b"\0\1", 60_000, 60_000))
    with pytest.raises(UserError, match=r"x.png cannot be read \(.*bomb"):
        read_label(tmp_path / "x.png")


def test_truncated_file_is_never_read():
    data = saved(indexed())
    for end in range(0, len(data), 50):
        assert decode(data[:end]) is None


def test_file_with_a_flipped_bit_is_never_read():
    data = saved(indexed())
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        assert decode(bytes(damaged)) is None


def test_files_that_end_too_early_are_told_apart():
    whole = saved(indexed())
    assert not is_cut(whole) and not is_cut(whole + b"rest") and not is_cut(b"\xff\xd8 a JPEG")
    assert all(is_cut(whole[:end]) for end in range(8, len(whole)))
    place = whole.index(b"IDAT") - 4
    claim = (2**31 - 1).to_bytes(4, "big")
    assert is_cut(whole[:place] + claim + whole[place + 4 :])
