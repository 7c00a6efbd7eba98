"""Files of one kind below a folder, found by their ids: a file's path below the folder, without
the suffix and in Unicode's composed form (NFC), whatever the form, and the capitals of the suffix,
on disk. Linked files and folders are followed."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from core.run.errors import UserError
from core.run.files import is_utf8, readable
from core.run.log import note, warn


@dataclass(frozen=True)
class Kind:
    """A kind of file; suffixes are in lower case."""

    name: str  # plural
    suffixes: tuple[str, ...]  # those that are read; a missing file is named with the first
    mistaken: tuple[str, ...] = ()  # those that people take for this kind, and that are not read


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
"""Folders that operating systems and file servers create, in lower case."""
UNREAD, NOT_UTF8 = "kinds that are not read", "names that are not UTF-8"


def image_id(name: str) -> str:
    """The id of a photograph, given its relative path with or without a suffix."""
    return _stem(_normal(name), PHOTOGRAPHS)


def _normal(name: str) -> str:
    return str(PurePosixPath(unicodedata.normalize("NFC", name)))


def _stem(name: str, kind: Kind) -> str:
    suffix = _suffix(name)
    return name[: -len(suffix)] if suffix in kind.suffixes else name


def _suffix(name: str) -> str:
    """The suffix in lower case, with its dot; faster than `Path.suffix` in large folders."""
    return f".{name.rpartition('.')[2].lower()}"


class Files:
    """The files of one kind below a folder; prints in one line what is left out, and why.

    Left out are hidden files and folders (such as macOS's ._ files), folders of operating systems
    and file servers, links to nothing or to a parent folder, kinds that are not read, and names
    that are not UTF-8. A missing folder holds no files. The folder `skip` is not searched.

    Raises:
        UserError: a folder cannot be read.
    """

    def __init__(self, root: Path, kind: Kind, skip: Path | None = None):
        self.root, self.kind = root, kind
        self.names: dict[str, list[Path]] = {}  # by relative path in NFC
        self._left_out: defaultdict[str, list[str]] = defaultdict(list)  # names by reason
        self._links = False
        self._first_name: dict[tuple[int, int], str] = {}
        self._second_names: list[tuple[str, str]] = []
        if root.is_dir():
            skipped = _place(skip) if skip is not None and skip.is_dir() else None
            self._walk(root, "", (_place(root),), skipped)
        self.names = dict(sorted(self.names.items(), key=lambda item: item[0].split("/")))
        self.ids: dict[str, list[Path]] = {}  # one with several files is refused when asked for
        for name, paths in self.names.items():
            self.ids.setdefault(_stem(name, kind), []).extend(paths)
        remedy = "rename it (such as with convmv -f cp1252 -t utf8)"
        unreadable = [root / readable(name) for name in self._left_out.get(NOT_UTF8, [])]
        self.problems = [f"the name {path} is not UTF-8; {remedy}" for path in unreadable]
        self._report()

    def _walk(self, folder: Path, prefix: str, parents: tuple, skip: tuple | None) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"the folder {readable(str(folder))} cannot be read ({error.strerror}); correct "
                "its permissions or move it away"
            ) from None
        for entry in entries:
            name, path, link = prefix + entry.name, Path(entry.path), entry.is_symlink()
            target = path if link else entry  # an entry knows its type without asking the disk
            self._links = self._links or link
            if target.is_file():
                self._add(name, path, _place(path) if link else (parents[-1][0], entry.inode()))
            elif not target.is_dir():
                if link:
                    self._left_out["links to nothing"].append(name)
            elif entry.name.startswith("."):
                self._left_out["hidden folders"].append(name)
            elif entry.name.lower() in SYSTEM:
                self._left_out["system folders"].append(name)
            elif _place(path) in parents:
                self._left_out["links to a parent folder"].append(name)
            elif _place(path) != skip:
                self._walk(path, f"{name}/", (*parents, _place(path)), skip)

    def _add(self, name: str, path: Path, place: tuple[int, int]) -> None:
        suffix, hidden = _suffix(name), path.name.startswith(".")
        if suffix in self.kind.mistaken and not hidden:
            self._left_out[UNREAD].append(name)
        elif suffix in self.kind.suffixes and hidden:
            self._left_out["hidden files"].append(name)
        elif suffix in self.kind.suffixes and not is_utf8(name):
            self._left_out[NOT_UTF8].append(name)
        elif suffix in self.kind.suffixes:
            self.names.setdefault(unicodedata.normalize("NFC", name), []).append(path)
            if self._first_name.setdefault(place, name) != name:
                self._second_names.append((self._first_name[place], name))

    def _report(self) -> None:
        parts = []
        for reason, names in self._left_out.items():
            shown = [names[0], *["..."] * (len(names) > 1)]
            shown = sorted({*map(_suffix, names)}) if reason == UNREAD else shown
            examples = "" if "hidden" in reason else f" ({readable(', '.join(shown))})"
            parts.append(f"{reason}: {len(names)}{examples}")
        if parts:
            note(f"{self.kind.name} below {self.root}, left out: {'; '.join(parts)}")
        if self._links and self._second_names and self.kind is PHOTOGRAPHS:
            one, other = self._second_names[0]
            warn(
                f"links give {len(self._second_names)} photographs below {self.root} a second "
                f"name, such as {one} and {other}; each name counts as one photograph"
            )

    def of_id(self, name: str) -> Path:
        """The file of an id, or the path where it is missing.

        Raises:
            UserError: there are several.
        """
        missing = self.root / f"{name}{self.kind.suffixes[0]}"
        return self._only(self.ids.get(name, []), name) or missing

    def named(self, name: str) -> Path:
        """The file of a relative path, written without a suffix or with any capitals in it.

        Raises:
            UserError: there are several.
        """
        plain = _normal(name)
        suffix = _suffix(plain)
        found = self.names.get(plain) or [
            path
            for path in self.ids.get(_stem(plain, self.kind), [])
            if suffix not in self.kind.suffixes or _suffix(path.name) == suffix
        ]
        return self._only(found, name) or self.root / name

    def _only(self, found: list[Path], name: str) -> Path | None:
        if len(found) > 1:
            one, other = (ascii(str(path.relative_to(self.root))) for path in found[:2])
            raise UserError(
                f"{one} and {other} below {self.root} are both {self.kind.name} of {name}; "
                "remove one"
            )
        return found[0] if found else None

    def every(self, ids: Collection[str], remedy: str) -> tuple[Path, ...]:
        """The file of every id.

        Raises:
            UserError: files are missing, or there are several for one id.
        """
        paths = tuple(map(self.of_id, ids))
        missing = [path for path, i in zip(paths, ids, strict=True) if i not in self.ids]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(paths)} {self.kind.name} are missing, first: "
                f"{missing[0]}; {remedy}"
            )
        return paths


def _place(path: Path) -> tuple[int, int]:
    """Device and inode, which identify a file or folder under any path."""
    status = path.stat()
    return status.st_dev, status.st_ino
