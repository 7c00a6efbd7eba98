"""A fast reader of plain label PNGs, which leaves what is unusual to Pillow, and a check of any."""

import struct
import zlib

import numpy as np
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _INDEXED = 0, 3
# After the header; those besides IDAT and IEND say nothing about the values.
_FOLLOWING = {b"IDAT", b"IEND", b"PLTE", b"tRNS", b"pHYs", b"gAMA", b"tEXt", b"tIME"}


def decode(data: bytes, palette: bytes = b"") -> np.ndarray | None:
    """The values of an 8-bit grey or indexed PNG without row filters, which suit photographs only.

    Every checksum is verified, and no more memory is taken than the stated size asks for.

    Args:
        data: the file's content, untrusted.
        palette: red, green, blue of the first colours that an indexed file must have, as far as its
        own palette goes.

    Returns:
        (H, W) uint8; None if the file is of another kind, has another palette, is damaged, or is
        larger than Pillow allows.
    """
    chunks = _chunks(data)
    if chunks is None:
        return None
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    plain = kind == [8, _GREY, 0, 0, 0] or (kind == [8, _INDEXED, 0, 0, 0] and b"PLTE" in chunks)
    colours = chunks.get(b"PLTE", b"")[: len(palette)]
    possible = 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 0)
    if not (plain and possible and palette.startswith(colours)):
        return None
    size = height * (1 + width)
    inflate = zlib.decompressobj()
    try:
        # One byte more than there may be, so that the stream's own end is seen and checked.
        rows = inflate.decompress(chunks[b"IDAT"], size + 1)
    except zlib.error:
        return None
    if len(rows) != size or not inflate.eof or inflate.unused_data:
        return None
    rows = np.frombuffer(rows, np.uint8).reshape(height, 1 + width)
    return None if rows[:, 0].any() else rows[:, 1:].copy()


def is_cut(data: bytes) -> bool:
    """Whether a PNG ends before its last chunk does.

    Decoders fill the rest, or take as much memory as the length of a chunk claims, up to 2 GiB.
    """
    if not data.startswith(_SIGNATURE):
        return False
    start, name = len(_SIGNATURE), b""
    while name != b"IEND":
        if start + 12 > len(data):
            return True
        length, name = struct.unpack_from(">I4s", data, start)
        start += 12 + length
    return start > len(data)


def _chunks(data: bytes) -> dict[bytes, bytes] | None:
    """Content by chunk name, IDATs joined; None if the file is not whole or holds other chunks."""
    if not data.startswith(_SIGNATURE):
        return None
    found: dict[bytes, list[bytes]] = {}
    start, last = len(_SIGNATURE), b""
    while last != b"IEND":
        if start + 12 > len(data):
            return None
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        known = name in _FOLLOWING if found else name == b"IHDR"
        repeated = name in found and not name == last == b"IDAT"  # IDATs may come in a row
        if not known or repeated or end > len(data):
            return None
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return None
        found.setdefault(name, []).append(data[start + 8 : end - 4])
        start, last = end, name
    contents = {name: b"".join(parts) for name, parts in found.items()}
    whole = len(contents[b"IHDR"]) == 13 and b"IDAT" in contents and start == len(data)
    return contents if whole else None
