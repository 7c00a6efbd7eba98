"""The content of what a stage reads: digests of files, remembered with their sizes and times.

Only the content of an input counts, not where it is or how its path is spelt.
"""

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from core.run.errors import UserError
from core.run.files import read_json, write_json

Items = Mapping[str, str | Path]  # what is read, by id: a text, or a file whose content counts
Stamp = str | list  # an item's text; or a file's size, modification time, change time and digest
Stamps = dict[str, dict[str, Stamp | None]]  # by name of the input and id; None: a missing file
TICK = 2 * 10**9  # nanoseconds within which some file systems give two changes the same time


def stamp(inputs: Mapping[str, Items], folders: Sequence[Path], workers: int = 0) -> Stamps:
    """Identifies every item: a text by itself, a file by its content; None: the file is missing.

    A file with the size and times that a stage noted in one of `folders` (see `known_stamps`) is
    not read; `workers` threads read the others.
    """
    known = known_stamps(*folders)
    found: Stamps = {name: dict(items) for name, items in inputs.items()}
    unread: list[tuple[str, str, Path, list]] = []
    for name, items in inputs.items():
        for key, path in items.items():
            if isinstance(path, Path):
                times, old = _times(path), known.get(name, {}).get(key)
                found[name][key] = old if times and old and old[:3] == times else None
                if times and found[name][key] is None:
                    unread.append((name, key, path, times))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        digests = pool.map(_digest, [path for _, _, path, _ in unread])
        hidden = len(unread) < 3000 or None
        bar = tqdm(digests, "reading inputs", len(unread), unit="file", disable=hidden)
        for (name, key, _, times), digest in zip(unread, bar, strict=True):
            found[name][key] = [*times, digest]
    return found


def _times(path: Path) -> list[int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def _digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def known_stamps(*folders: Path) -> Stamps:
    """Files that stages noted in these folders, joined; later folders win.

    Files that may have changed again within the clock tick in which they were read are left out.
    """
    known: Stamps = {}
    for folder in folders:
        written, stamps = read_stamps(folder)
        for name, entries in stamps.items():
            files = {key: stamp for key, stamp in entries.items() if isinstance(stamp, list)}
            settled = {k: stamp for k, stamp in files.items() if max(stamp[1:3]) + TICK < written}
            known.setdefault(name, {}).update(settled)
    return known


def read_stamps(folder: Path) -> tuple[int, Stamps]:
    """What `save_stamps` wrote: the time and every item; nothing if the file is lost or broken."""
    try:
        content = read_json(folder / "inputs.json")
        return int(content["written"]), content["items"]
    except (UserError, KeyError, TypeError, ValueError):
        return 0, {}


def save_stamps(folder: Path, stamps: Stamps, began: int) -> None:
    """Writes `<folder>/inputs.json`, unless it says the same already.

    `began`: time before the first item was read, nanoseconds since the epoch.
    """
    files = {n: {k: v for k, v in s.items() if isinstance(v, list)} for n, s in stamps.items()}
    if read_stamps(folder)[1] != stamps or known_stamps(folder) != files:
        write_json(folder / "inputs.json", {"written": began, "items": stamps}, indent=None)


def summary(stamps: Stamps) -> dict[str, dict[str, Any]]:
    """{name: {"count", "sha256"}} over all items, in their order."""
    result = {}
    for name, items in stamps.items():
        lines = "\n".join(f"{key}\t{_content(value)}" for key, value in items.items())
        digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
        result[name] = {"count": len(items), "sha256": digest}
    return result


def _content(stamp: Stamp | None) -> str | None:
    """The part of a stamp that identifies an item: its text, or the digest of its content."""
    return stamp[-1] if isinstance(stamp, list) else stamp


def input_differences(
    old: Stamps, new: Stamps, open_lists: Mapping[str, Container[str]], common: bool
) -> Iterator[str]:
    """One line for each input that differs from the old one, naming the first item.

    Items of the inputs in `open_lists` may come and go, and only those listed there are compared;
    with `common`, items of every input may come and go.
    """
    for name in dict.fromkeys((*old, *new)):
        there, here = old.get(name, {}), new.get(name, {})
        only_common, compared = common or name in open_lists, open_lists.get(name, there)
        gone = [k for k in there if k not in here]
        come = [k for k in here if k not in there]
        if (gone or come) and not only_common:
            yield (
                f"{name}: {len(here)} now, {len(there)} there; {len(come)} new and {len(gone)} "
                f"gone, first {(gone or come)[0]}"
            )
            continue
        both = [k for k in there if k in compared and here.get(k) is not None]
        differ = [k for k in both if _content(there[k]) != _content(here[k])]
        if differ:
            a, b = there[differ[0]], here[differ[0]]
            texts = isinstance(a, str) and isinstance(b, str)
            values = f": {a or 'none'} there, {b or 'none'} now" if texts else ""
            what = "differ" if texts else "have another content"
            yield f"{name}: {len(differ)} of {len(both)} {what}, first {differ[0]}{values}"
        elif not only_common and [*there] != [*here]:
            yield f"{name}: the same items in another order"
