"""Text that people and their programs wrote: lists, tables and configurations, in any encoding that
says what it is."""

import codecs
from pathlib import Path

from core.run.errors import UserError

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark begins it
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: Path, what: str, remedy: str = "save it as UTF-8") -> str:
    r"""The content of a text file in UTF-8, UTF-16 or UTF-32, its lines ended by "\n".

    Args:
        path: the file, with or without a byte-order mark.
        what: the file's name in messages, such as "the list".
        remedy: what a user can do about a file in another encoding.

    Raises:
        UserError: the file cannot be read, or is in another encoding or no text.
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
        raise UserError(f"{what} {path} is no text, it holds zero bytes; {remedy}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _encoding(content: bytes) -> str:
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return encoding
    # Without a mark: in UTF-16, half or more of the characters' upper bytes are zero.
    start = content[:4096]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if odd > len(start) // 4 and not even:
        return "utf-16-le"
    if even > len(start) // 4 and not odd:
        return "utf-16-be"
    return "utf-8"


def read_list(path: Path, remedy: str) -> list[str]:
    """The lines of a list, without surrounding spaces and without empty ones.

    Args:
        path: the list.
        remedy: what a user can do where it is missing.

    Raises:
        UserError: the list is missing, empty or no text.
    """
    if not path.is_file():
        raise UserError(f"the list {path} is missing; {remedy}")
    lines = [line.strip() for line in read_text(path, "the list").split("\n")]
    if not any(lines):
        raise UserError(f"the list {path} is empty")
    return [line for line in lines if line]
