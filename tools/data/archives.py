"""Unpacks archives without trusting them."""

import errno
import gzip
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from core.run.errors import UserError
from core.run.files import atomic_write

DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(EOFError, UnicodeDecodeError, OverflowError, MemoryError),  # names, claimed lengths
    RuntimeError,  # encrypted, or packed in an unusual way
)
"""Errors from reading a damaged archive."""

Member = tuple[str, int, Callable[[], IO[bytes]]]
"""Name, size in bytes, and a function that opens the content."""


def unpack(archive: Path, folder: Path, rename: Callable[[str], str | None]) -> int:
    """Unpacks the regular files of a tar (any compression) or zip archive.

    Existing files of the right size are kept, so an interrupted call can be repeated.

    Args:
        archive: path of the archive.
        folder: output folder; made if missing.
        rename: function from a name in the archive to the path below `folder`, or None to skip it.

    Returns:
        The number of files that were not skipped.

    Raises:
        UserError: the archive is missing or damaged, or a file would be written outside
            `folder`.
    """
    wanted = 0
    try:
        with _members(archive) as members:
            for name, size, content in tqdm(members, archive.name, unit="file", mininterval=1):
                target = rename(name)
                if target is None:
                    continue
                _refuse_outside(archive, name, target)
                wanted += 1
                path = folder / target
                if path.is_file() and path.stat().st_size == size:
                    continue
                with atomic_write(path) as tmp, content() as source, tmp.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except FileNotFoundError:
        raise UserError(f"the archive {archive} is missing") from None
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # not the archive's fault, such as a full disk; EINVAL is a seek before its start
        raise UserError(f"the archive {archive} is damaged ({error}); fetch it again") from None
    return wanted


def _refuse_outside(archive: Path, name: str, target: str) -> None:
    for path in (PurePosixPath(name), PurePosixPath(target)):
        foreign = "\\" in str(path) or ":" in str(path)[:2]  # Windows separators and drives
        if path.is_absolute() or ".." in path.parts or foreign:
            raise UserError(
                f"{archive} contains {name!r}, which would be written outside its folder"
            )


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """Opens an archive as a sequence of its files, without links and devices."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            entries = [i for i in file.infolist() if not i.filename.endswith("/")]
            yield ((i.filename, i.file_size, lambda i=i: file.open(i)) for i in entries)
    else:
        with tarfile.open(archive) as file:
            entries = (m for m in tar_entries(file) if m.isfile())
            yield ((m.name, m.size, lambda m=m: file.extractfile(m)) for m in entries)


def tar_entries(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, which is read to its end to verify the checksums.

    Raises:
        tarfile.ReadError: a header is broken, which tarfile itself takes for the end.
    """
    yield from file
    file.fileobj.seek(file.offset)
    if any(file.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"broken header at byte {file.offset}")
    while file.fileobj.read(1 << 20):
        pass
