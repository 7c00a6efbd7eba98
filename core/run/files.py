"""Text, JSON and arrays in files that people wrote, and files written whole or not at all."""

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.run.errors import UserError


def user_path(text: str) -> Path:
    """The path that a user wrote, with ~ replaced by the home folder.

    Raises:
        UserError: there is no such home folder, or the name is not UTF-8.
    """
    if not is_utf8(text):
        raise UserError(f"the name {readable(text)} is not UTF-8; rename it")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home folder; write the whole path") from None


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written in UTF-8; Python keeps other bytes as surrogates."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def readable(name: str) -> str:
    """A file's name in printable form: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_text(path: Path, what: str, remedy: str = "save it as UTF-8") -> str:
    r"""The content of a text file in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark;
    its lines end in "\n". Messages call the file `what`, such as "the list"; `remedy` is the advice
    for one in another encoding.

    Raises:
        UserError: the file cannot be read, is in another encoding, or is not text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror})") from None
    try:
        text = content.decode(_encoding(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{what} {path} is neither UTF-8 nor UTF-16, in line {line}: {error.reason}; {remedy}"
        ) from None
    if "\0" in text:
        raise UserError(f"{what} {path} is not text: it holds zero bytes; {remedy}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"  # before UTF-16, whose mark is the beginning of this one
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # In UTF-16 without a mark, half or more of the characters have a zero as their upper byte.
    start = content[:4096]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if odd > len(start) // 4 and not even:
        return "utf-16-le"
    return "utf-16-be" if even > len(start) // 4 and not odd else "utf-8-sig"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and renames it to `path` if the block succeeds.

    Raises:
        UserError: `path` is a folder.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.part")  # torch.save writes this name into its file
    try:
        yield tmp
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def read_array(path: Path, remedy: str, mmap_mode: Literal["r", "c"] | None = None) -> np.ndarray:
    """The array of an .npy file, in memory or mapped.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        return np.load(path, mmap_mode, allow_pickle=False)
    except Exception as error:  # noqa: BLE001 (any exception type is possible)
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None


def read_arrays(path: Path, names: Sequence[str], remedy: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, by name.

    Raises:
        UserError: the file is missing or broken, or an array is missing or holds no numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in names}
        if any(array.dtype.kind not in "biuf" for array in arrays.values()):
            raise ValueError("an array holds no numbers")
    except Exception as error:  # noqa: BLE001 (any exception type is possible)
        reason = error or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}); {remedy}") from None
    return arrays


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing; run the stage that writes it first")
    try:
        return json.loads(read_text(path, "the file"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); remove it to make it again") from None
