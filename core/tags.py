"""Image-level tags: which classes an image shows, from a table, an annotation or a folder."""

import csv
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from core.errors import UserError, refuse_together
from core.files import written_whole

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SEPARATORS = re.compile(r"[;,|]")


def read_table(
    path: Path, classes: Collection[str] = (), problems: list[str] | None = None
) -> dict[str, list[str]]:
    """Reads a CSV with the columns `image` and `tags`.

    Tags of one image are separated by ";", "," or "|". In a file without any of these a cell is one
    tag, spaces or not, unless all of its words are known classes.

    Args:
        path: the CSV, UTF-8; other columns are left alone.
        classes: known names.
        problems: gets what is wrong with single lines; None: that is refused together.

    Returns:
        {image as written there: its tags, without repetitions}, in the order of the file.

    Raises:
        UserError: the file is missing or is no such table.
    """
    found = [] if problems is None else problems
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except FileNotFoundError:
        raise UserError(
            f"the tags {path} are missing; set data.tags to a CSV with the columns image,tags"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the tags {path} cannot be read ({error}); save them as UTF-8") from None
    if not rows or not {"image", "tags"} <= set(rows[0]):
        raise UserError(f"{path} is no table of tags; its first line must be: image,tags")
    separated = any(SEPARATORS.search(row["tags"] or "") for row in rows)
    table: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 2):
        name, cell = (row["image"] or "").strip(), (row["tags"] or "").strip()
        if not name or None in row:
            found.append(
                f"{path}, line {number}: expected one image and one cell of tags; put tags that "
                'hold commas in quotes: photo.jpg,"dog, cat"'
            )
            continue
        if name in table:
            found.append(f"{path}, line {number}: image {name} stands there twice")
        parts = SEPARATORS.split(cell)
        words = cell.split()
        if not separated and cell not in classes and set(words) <= set(classes):
            parts = words
        table[name] = list(dict.fromkeys(p.strip() for p in parts if p.strip()))
    if problems is None:
        refuse_together(found, f"mend {path}")
    return table


def write_table(path: Path, table: Mapping[str, Sequence[str]]) -> None:
    """Writes what `read_table` reads, whole or not at all."""
    with written_whole(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "tags"])
        writer.writerows((name, ";".join(tags)) for name, tags in table.items())


def read_annotation(path: Path) -> list[str]:
    """Names of the objects in an XML annotation of PASCAL VOC, difficult ones included.

    Raises:
        UserError: the file is missing or broken.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"annotation {path} cannot be read ({error})") from None
    # Direct children alone: a person's head and hands are <part>s, with names of their own.
    return list(dict.fromkeys(e.findtext("name", "") for e in root.findall("object")))


def find_images(
    root: Path, setting: str = "data.root", skip: Path | None = None
) -> dict[str, list[str]]:
    """Every image file below `root`, as a relative path, with its first folder as its tag.

    Hidden files and folders are left out, and the folder `skip` (of masks). An image directly in
    `root` has no tag. `setting` is what a message tells the user to mend.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        hidden = hidden or (skip is not None and skip in path.parents)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            found[relative.as_posix()] = list(relative.parts[:-1][:1])
    if not found:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"no image ({kinds}) was found below {root}; set {setting}")
    return found


def folder_tags(
    root: Path,
    tags: str | None,
    masks: str | None,
    classes: Collection[str] = (),
    problems: list[str] | None = None,
) -> dict[str, list[str]]:
    """Tags of a folder of photographs: from the CSV `tags` below `root`, or from sub-folders.

    Args:
        root: the folder.
        tags: the CSV; None: an image's tag is the sub-folder of `root` that it lies in.
        masks: a folder below `root` that holds no photographs.
        classes, problems: see `read_table`.
    """
    if tags:
        return read_table(root / tags, classes, problems)
    return find_images(root, skip=root / masks if masks else None)


def image_id(name: str) -> str:
    """The id of an image given by its relative path: the path without an image file's suffix."""
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in IMAGE_SUFFIXES else str(path)
