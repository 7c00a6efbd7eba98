"""Files of one kind below a folder, found by their ids: photographs, label maps, features.

An id is a file's path below the folder, without the suffix and in Unicode's composed form (NFC),
whatever form and whatever capitals in the suffix the disk has. Linked files and folders count.
"""

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from core.run.errors import UserError
from core.run.files import is_utf8, readable
from core.run.notes import note, warn


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: in messages, plural.
        suffixes: what is read, lower case; where no file is found, the first one is named.
        mistaken: suffixes of files that people take for this kind, and that are not read.
    """

    name: str
    suffixes: tuple[str, ...]
    mistaken: tuple[str, ...] = ()


PHOTOGRAPHS = Kind(
    "photographs",
    (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    (
        *(".heic", ".heif", ".avif", ".gif", ".jxl", ".jp2", ".svg", ".psd", ".pdf", ".mp4"),
        *(".mov", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    ),
)
LABELS = Kind(
    "label maps",
    (".png",),
    (*(".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"), ".npy", ".npz", ".mat"),
)
FEATURES = Kind("feature files", (".npy",), (".npz", ".pt", ".pth", ".pkl", ".h5", ".mat"))
ANNOTATIONS = Kind("annotations", (".xml",))

SYSTEM = {
    *("@eadir", "#recycle", "@recycle", "$recycle.bin", "__macosx", "lost+found"),
    *("system volume information", "@recently-snapshot", "#snapshot", "@syno"),
}
"""Folders that file servers and systems put among people's own, in lower case."""


def file_id(name: str, kind: Kind) -> str:
    """The id of a file given by its relative path; other suffixes than the kind's are kept."""
    return _stem(str(PurePosixPath(unicodedata.normalize("NFC", name))), kind)


def _stem(name: str, kind: Kind) -> str:
    suffix = _suffix(name)
    return name[: -len(suffix)] if suffix in kind.suffixes else name


def _suffix(name: str) -> str:
    """In lower case and with its dot; quicker than a path's, for folders of many files."""
    return f".{name.rpartition('.')[2].lower()}"


class Files:
    """The files of one kind below a folder; says in one line what is left out, and why.

    Left out are hidden files and folders (among them macOS's ._ files), folders of file servers and
    systems, links that lead nowhere or back, kinds that are not read, and names that are not UTF-8.

    Args:
        root: the folder; one that is missing holds no files.
        kind: which files.
        skip: a folder below `root` that is passed over.

    Attributes:
        ids: {id: its files}; several for one id are refused where that id is asked for.
        names: {relative path in NFC: its files}.
        unnamed: relative paths that are not UTF-8, readable.

    Raises:
        UserError: a folder cannot be read.
    """

    def __init__(self, root: Path, kind: Kind, skip: Path | None = None):
        self.root, self.kind = root, kind
        self.names: dict[str, list[Path]] = {}
        self.unnamed: list[str] = []
        self._left: dict[tuple[str, str], list[str]] = {}
        self._links = False
        self._first: dict[tuple[int, int], str] = {}
        self._again: list[tuple[str, str]] = []
        if root.is_dir():
            passed = _place(skip) if skip is not None and skip.is_dir() else None
            self._walk(root, "", (_place(root),), passed)
        self.names = dict(sorted(self.names.items(), key=lambda item: item[0].split("/")))
        self.ids: dict[str, list[Path]] = {}
        for name, paths in self.names.items():
            self.ids.setdefault(_stem(name, kind), []).extend(paths)
        self._tell()

    def _walk(self, folder: Path, prefix: str, above: tuple, skip: tuple | None) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"the folder {readable(str(folder))} cannot be read ({error.strerror}); mend its "
                "permissions or move it away"
            ) from None
        for entry in entries:
            name, path, link = prefix + entry.name, Path(entry.path), entry.is_symlink()
            there = path if link else entry  # which knows what it is, without a look at the disk
            self._links = self._links or link
            if there.is_file():
                self._take(name, path, _place(path) if link else (above[-1][0], entry.inode()))
            elif not there.is_dir():
                if link:
                    self._leave("link that leads nowhere", "links that lead nowhere", name)
            elif entry.name.startswith("."):
                self._leave("hidden folder", "hidden folders", name)
            elif entry.name.lower() in SYSTEM:
                self._leave("folder of a system", "folders of a system", name)
            elif _place(path) in above:
                self._leave("link to a folder above it", "links to folders above them", name)
            elif _place(path) != skip:
                self._walk(path, f"{name}/", (*above, _place(path)), skip)

    def _take(self, name: str, path: Path, place: tuple[int, int]) -> None:
        """Takes a file or leaves it out."""
        suffix, hidden = _suffix(name), path.name.startswith(".")
        if suffix in self.kind.mistaken and not hidden:
            self._leave("of a kind that is not read", "of kinds that are not read", name)
        if suffix not in self.kind.suffixes:
            return
        if hidden:
            self._leave("hidden file", "hidden files", name)
        elif not is_utf8(name):
            self.unnamed.append(readable(name))
            self._leave("whose name is not UTF-8", "whose names are not UTF-8", name)
        else:
            self.names.setdefault(unicodedata.normalize("NFC", name), []).append(path)
            if self._first.setdefault(place, name) != name:
                self._again.append((self._first[place], name))

    def _leave(self, one: str, several: str, name: str) -> None:
        self._left.setdefault((one, several), []).append(name)

    def _tell(self) -> None:
        parts = []
        for (one, several), names in self._left.items():
            shown = [names[0], *["..."] * (len(names) > 1)]
            if "kind" in one:
                shown = sorted({*map(_suffix, names)})
            examples = "" if "hidden" in one else f" ({readable(', '.join(shown))})"
            parts.append(f"{len(names)} {one if len(names) == 1 else several}{examples}")
        if parts:
            note(f"{self.kind.name} below {self.root}, left out: {', '.join(parts)}")
        if self._links and self._again and self.kind is PHOTOGRAPHS:
            one, other = self._again[0]
            warn(
                f"links give {len(self._again)} photographs below {self.root} a second name, such "
                f"as {one} and {other}; each name counts as a photograph of its own"
            )

    def problems(self) -> list[str]:
        """A line for each file that would belong here if its name were UTF-8."""
        return [
            f"the name {self.root / name} is not UTF-8; rename it (such as with convmv -f cp1252 "
            "-t utf8)"
            for name in self.unnamed
        ]

    def of_id(self, name: str) -> Path:
        """The file of an id; where there is none, where it would be.

        Raises:
            UserError: there are several.
        """
        return self._only(self.ids.get(name, []), name) or (
            self.root / f"{name}{self.kind.suffixes[0]}"
        )

    def named(self, name: str) -> Path:
        """The file of a relative path as people write it, with any capitals in its suffix or
        without one; where there is none, where it would be.

        Raises:
            UserError: there are several.
        """
        plain = str(PurePosixPath(unicodedata.normalize("NFC", name)))
        found = self.names.get(plain, [])
        if not found:
            suffix = _suffix(plain)
            wanted = {suffix} if suffix in self.kind.suffixes else self.kind.suffixes
            alike = self.ids.get(_stem(plain, self.kind), [])
            found = [path for path in alike if _suffix(path.name) in wanted]
        return self._only(found, name) or self.root / name

    def _only(self, found: list[Path], name: str) -> Path | None:
        if len(found) > 1:
            one, other = (ascii(str(path.relative_to(self.root))) for path in found[:2])
            raise UserError(
                f"{one} and {other} below {self.root} are both {self.kind.name} of {name}; "
                "remove one"
            )
        return found[0] if found else None

    def every(self, ids: Iterable[str], remedy: str) -> tuple[Path, ...]:
        """The file of every id.

        Raises:
            UserError: files are missing, or there are several for one id.
        """
        ids = [*ids]
        paths = tuple(map(self.of_id, ids))
        missing = [path for path, i in zip(paths, ids, strict=True) if i not in self.ids]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(paths)} {self.kind.name} are missing, first: "
                f"{missing[0]}; {remedy}"
            )
        return paths


def _place(path: Path) -> tuple[int, int]:
    """What tells a file or a folder apart, by whatever path it is reached."""
    status = path.stat()
    return status.st_dev, status.st_ino
