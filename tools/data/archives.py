"""Archives from elsewhere, unpacked without trust."""

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
    *(EOFError, UnicodeDecodeError, OverflowError, MemoryError),  # of names, of claimed lengths
    RuntimeError,  # encrypted, or packed in an unusual way
)
"""What reading a damaged archive raises."""

Member = tuple[str, int, Callable[[], IO[bytes]]]
"""Name, size in bytes, and a function that opens the content."""


def unpack(archive: Path, folder: Path, rename: Callable[[str], str | None]) -> int:
    """Unpacks the regular files of a tar (any compression) or zip below `folder`.

    A file that lies there already with the size that the archive names is left alone, so an
    unpacking that was stopped goes on where it was.

    Args:
        archive: the file.
        folder: made where missing.
        rename: name in the archive -> path below `folder`, or None for what is not wanted.

    Returns:
        How many files were wanted.

    Raises:
        UserError: it is no archive, it is damaged, or a wanted member would be written outside of
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
            raise  # a full disk is not the archive's fault; a place before its start is
        raise UserError(f"the archive {archive} is damaged ({error}); fetch it again") from None
    return wanted


def _refuse_outside(archive: Path, name: str, target: str) -> None:
    for path in (PurePosixPath(name), PurePosixPath(target)):
        foreign = "\\" in str(path) or ":" in str(path)[:2]  # separators and drives of Windows
        if path.is_absolute() or ".." in path.parts or foreign:
            raise UserError(
                f"{archive} holds {name!r}, which would be written outside of its folder"
            )


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """Opens an archive as a sequence of its members; links and devices are not among them."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            entries = [i for i in file.infolist() if not i.filename.endswith("/")]
            yield ((i.filename, i.file_size, lambda i=i: file.open(i)) for i in entries)
    else:
        with tarfile.open(archive) as file:
            entries = (m for m in tar_entries(file) if m.isfile())
            yield ((m.name, m.size, lambda m=m: file.extractfile(m)) for m in entries)


def tar_entries(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive that is read to its end, where checksums stand.

    Raises:
        tarfile.ReadError: a header is broken; tarfile itself takes that for the end.
    """
    yield from file
    file.fileobj.seek(file.offset)
    if any(file.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"broken header at byte {file.offset}")
    while file.fileobj.read(1 << 20):
        pass
